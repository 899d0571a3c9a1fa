"""The judge: right on real clips after H.264, steady on the soft and noisy ones of a small model, fair to empty."""

from __future__ import annotations

import inspect
import io
from dataclasses import asdict

import av
import numpy as np
import pytest

from lingen.data.synthetic import captions, draw_clip
from lingen.media import encode_mp4
from lingen.metrics.shapes import clustered_interval, diversity_of, judge, score_clips, student, wilson


def real(size: tuple[int, int], frames: int = 8) -> tuple[list[np.ndarray], list[str]]:
    """Four clips of each held-out caption, through H.264."""
    rng = np.random.default_rng(7)
    texts = [*captions("tune"), *captions("report")] * 4
    clips = []
    for text in texts:
        with av.open(io.BytesIO(encode_mp4(draw_clip(text, size, frames, rng), 8))) as file:
            clips.append(np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]))
    return clips, texts


def shares(clips: list[np.ndarray], texts: list[str]) -> tuple[float, float, float]:
    result = score_clips(clips, texts)
    assert result.empty == 0
    return result.colour.share, result.shape.share, result.motion.share


def soften(clip: np.ndarray) -> np.ndarray:
    padded = np.pad(clip.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    h, w = clip.shape[1:3]
    return sum(padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)) / 9


def as_clip(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(24, 24), (32, 32), (24, 40)])
def test_the_judge_is_right_on_real_clips(size: tuple[int, int]):
    colour, shape, motion = shares(*real(size))
    assert colour >= 0.99 and shape >= 0.97 and motion >= 0.97


@pytest.mark.parametrize("fault", ["blur", "noise", "faint", "fade"])
def test_the_judge_is_steady_on_clips_of_a_small_model(fault: str):
    rng = np.random.default_rng(0)
    make = {
        "blur": lambda clip: soften(soften(clip)),
        "noise": lambda clip: soften(clip) + rng.normal(0, 20, clip.shape),
        "faint": lambda clip: (soften(clip) - 128) * 0.4 + 128,
        "fade": lambda clip: clip * np.linspace(0.75, 1, len(clip))[:, None, None, None],
    }[fault]
    clips, texts = real((24, 24))
    colour, shape, motion = shares([as_clip(make(clip)) for clip in clips], texts)
    assert colour >= 0.97 and shape >= 0.9 and motion >= 0.95


def test_wrong_clips_are_judged_wrong():
    clips, texts = real((24, 24))
    for attribute, index in (("colour", 0), ("shape", 1), ("motion", 2)):
        other = [_swap(text, index) for text in texts]
        result = score_clips(clips, other)
        assert getattr(result, attribute).share <= 0.03
        assert all(getattr(result, name).share >= 0.97 for name in {"colour", "shape", "motion"} - {attribute})
        assert result.all.share <= 0.03


def _swap(caption: str, index: int) -> str:
    """The caption with one attribute changed."""
    a, colour, shape, motion = caption.split(" ", 3)
    if index == 0:
        colour = "green" if colour != "green" else "red"
    elif index == 1:
        shape = "circle" if shape != "circle" else "square"
    else:
        motion = "grows" if motion != "grows" else "moves up"
    return f"{a} {colour} {shape} {motion}"


@pytest.mark.parametrize("kind", ["plain", "faint noise", "noise", "half and half"])
def test_a_clip_that_shows_no_object_is_empty(kind: str):
    rng = np.random.default_rng(1)
    clip = {
        "plain": np.full((8, 24, 24, 3), 90),
        "faint noise": 120 + rng.normal(0, 8, (8, 24, 24, 3)),
        "noise": rng.uniform(0, 255, (8, 24, 24, 3)),
        "half and half": np.concatenate([np.zeros((8, 24, 9, 3)), np.full((8, 24, 15, 3), 255)], axis=2),
    }[kind]
    verdict = judge(as_clip(clip))
    assert verdict == (None, None, None, True), verdict
    result = score_clips([as_clip(clip)], ["a red circle grows"])
    assert result.empty == 1 and result.all.share == 0 and result.motion.share == 0


def test_still_clips_images_grey_and_vanishing_objects():
    rng = np.random.default_rng(2)
    clip = draw_clip("a yellow square", (24, 24), 8, rng)
    assert judge(clip) == ("yellow", "square", None, False)
    assert judge(clip[:1]) == ("yellow", "square", None, False)
    grey = clip.mean(-1, keepdims=True).repeat(3, -1)
    assert judge(as_clip(grey)).colour is None
    moving = draw_clip("a yellow square moves left", (24, 24), 8, rng)
    moving[5:] = moving[0, 0, 0]
    assert judge(moving).motion is None
    assert score_clips([clip[:1]], ["a yellow square"]).all.share == 1


def test_a_score_and_its_intervals():
    clips, texts = real((24, 24))
    asked = [*texts[:6], _swap(texts[6], 0), _swap(texts[7], 0)]
    result = score_clips(clips[:8], asked)
    assert result.colour.share == 0.75 and result.clips == 8 and result.captions == len(set(asked)) == 7
    counts = [(sum(text == one for text in texts[:6]), asked.count(one)) for one in dict.fromkeys(asked)]
    assert (result.colour.low, result.colour.high) == clustered_interval(counts)
    assert result.colour.chance == 1 / 6 and result.all.chance == pytest.approx(1 / 108)
    assert asdict(result)["shape"]["chance"] == 1 / 3


def test_wilson_agrees_with_the_literature():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # Newcombe 1998, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="at least one sample"):
        wilson(0, 0)


def test_students_t_agrees_with_the_tables():
    found = [student(degrees) for degrees in (1, 2, 3, 5, 11, 30, 83)]
    assert found == pytest.approx([12.706, 4.303, 3.182, 2.571, 2.201, 2.042, 1.989], abs=0.004)


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
@pytest.mark.parametrize(("captions_", "clips"), [(12, 3), (12, 25), (5, 3), (84, 3)])
def test_the_interval_covers_what_it_promises(captions_: int, clips: int, share: float, alike: float):
    """Beta-binomial clips of many captions, whose correlation within a caption is `alike`."""
    rng, trials = np.random.default_rng(0), 1000
    spread = (1 - alike) / alike if alike else 1e9
    each = rng.beta(share * spread, (1 - share) * spread, (trials, captions_))
    intervals = [clustered_interval([(int(n), clips) for n in row]) for row in rng.binomial(clips, each)]
    low, high = np.array(intervals).T
    covered = np.mean((low <= share) & (share <= high))
    assert covered > 0.95 - 3 * np.sqrt(0.95 * 0.05 / trials), covered


def test_clips_that_are_alike_count_once():
    """Twelve captions in three equal versions know what twelve clips know, and all right is no certainty."""
    once, thrice = ([(n * right, n) for right in [1] * 9 + [0] * 3] for n in (1, 3))
    assert clustered_interval(thrice) == pytest.approx(clustered_interval(once), abs=0.02)
    assert clustered_interval([(3, 3)] * 12)[0] < 0.8 < wilson(36, 36)[0]
    apart = clustered_interval([(2, 3)] * 8 + [(3, 3)] * 4)
    assert apart[1] - apart[0] < np.diff(clustered_interval([(3, 3)] * 9 + [(0, 3)] * 3))[0]
    assert clustered_interval([(1, 1)])[0] < 0.05  # one caption says nothing of others
    lows = [clustered_interval([(3, 3)] * (12 - wrong) + [(2, 3)] * wrong)[0] for wrong in range(5)]
    assert max(np.diff(lows)) < 0.005  # nor does a fault narrow it


def test_diversity_is_between_clips_of_one_caption():
    black, white = (np.full((2, 4, 4, 3), value, np.uint8) for value in (0, 255))
    assert diversity_of([[black, black], [white, white]]) == 0 and diversity_of([[black], [white]]) is None
    assert diversity_of([[black, white]]) == 1
    assert diversity_of([[black, black, white], [black, black]]) == pytest.approx(np.sqrt((2 / 3 + 0) / 2))
    clips, texts = real((24, 24))
    result = score_clips(clips, texts)
    assert result.captions == 24 and 0.02 < result.diversity < 0.3


def test_wrong_calls_say_so():
    with pytest.raises(ValueError, match="got 0 clips and 0 captions"):
        score_clips([], [])
    unchecked = inspect.unwrap(judge)  # the types that the tests watch would speak first
    with pytest.raises(ValueError, match=r"A clip is uint8 \[t h w 3\], got float64 \[8, 24, 24, 3\]"):
        unchecked(np.zeros((8, 24, 24, 3)))
