"""The shapes data set: splits, drawing, real files, one folder that appears whole."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset

from lingen.data.locations import expand
from lingen.data.synthetic import COLOURS, MOTIONS, SHAPES, captions, draw_clip, ensure, held_out_clips, parse_caption
from lingen.media import encode_mp4
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import DataConfig, Recipe

pytestmark = pytest.mark.usefixtures("cache")


def recipe(size: tuple[int, int] = (24, 24), frames: int = 8, **settings: int) -> Recipe:
    component = {"name": "shapes", **{"clips": 10, "images": 6, "held_out": 4, **settings}}
    return Recipe(data=DataConfig(synthetic=component, size=size, frames=frames, fps=8.0))


def read(pattern: object) -> list[dict]:
    paths = expand(pattern, "video")
    return list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))


def test_splits_never_share_a_caption_and_cover_all():
    train, tune, report = (captions(split) for split in ("train", "tune", "report"))
    assert (len(train), len(tune), len(report)) == (84, 12, 12)
    assert len({*train, *tune, *report}) == 108
    for held_out in (tune, report):
        words = [parse_caption(caption) for caption in held_out]
        assert all(sum(w.colour == colour for w in words) == 2 for colour in COLOURS)
        assert all(sum(w.motion == motion for w in words) == 2 for motion in MOTIONS)
        assert all(sum(w.shape == shape for w in words) == 4 for shape in SHAPES)


def test_training_keeps_every_pair_of_attributes():
    words = [parse_caption(caption) for caption in captions("train")]
    values = (tuple(COLOURS), SHAPES, MOTIONS)
    for i, j in combinations(range(3), 2):
        assert {(w[i], w[j]) for w in words} == {(a, b) for a in values[i] for b in values[j]}


def test_captions_are_read_back():
    assert parse_caption("a red circle moves right") == ("red", "circle", "moves right")
    assert parse_caption("a blue square") == ("blue", "square", None)
    assert all(str(parse_caption(text)) == text for text in [*captions("train"), *captions("tune", "image")])
    with pytest.raises(ValueError, match="'a pink circle' is not a caption of the shapes data set"):
        parse_caption("a pink circle")


def test_drawing_is_reproducible_and_every_motion_shows_on_every_shape():
    for shape in SHAPES:
        still = draw_clip(f"a cyan {shape}", (24, 32), 8, np.random.default_rng(3))
        assert still.shape == (8, 24, 32, 3) and (still == still[0]).all()
        for motion in MOTIONS:
            clip = draw_clip(f"a cyan {shape} {motion}", (24, 32), 8, np.random.default_rng(3))
            assert (clip == draw_clip(f"a cyan {shape} {motion}", (24, 32), 8, np.random.default_rng(3))).all()
            changes = np.abs(clip[1:].astype(int) - clip[:-1]).max((1, 2, 3))
            assert (changes > 8).all(), (shape, motion, changes)


def test_shards_hold_real_files_with_their_captions():
    train, validation = ensure(recipe())
    videos, held_out = read(train.video), read(validation.video)
    assert len(videos) == 10 and len(held_out) == 4 and len(read(train.image)) == 6 and len(read(validation.image)) == 4
    assert {json.loads(sample["json"])["caption"] for sample in held_out} <= set(captions("tune"))
    assert {json.loads(sample["json"])["caption"] for sample in videos} <= set(captions("train"))
    with av.open(io.BytesIO(videos[0]["mp4"])) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 24, 24)
        assert stream.average_rate == 8 and sum(1 for _ in file.decode(video=0)) == 8
    assert read(train.image)[0]["png"].startswith(b"\x89PNG")


def test_held_out_clips_are_those_of_the_split():
    clips, texts = held_out_clips(recipe(held_out=24), 20, "report")
    assert len(clips) == 20 and clips[0].shape == (8, 24, 24, 3) and clips[0].dtype == np.uint8
    assert set(texts) == set(captions("report"))
    assert len(held_out_clips(recipe(held_out=24), 99)[0]) == 24


def test_h264_keeps_the_picture():
    clip = draw_clip("a magenta triangle turns", (24, 24), 8, np.random.default_rng(0))
    with av.open(io.BytesIO(encode_mp4(clip, 8))) as file:
        back = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    away = np.sqrt(((back.astype(float) - clip) ** 2).mean())
    assert 0 < away < 16, away  # 4:2:0 halves the resolution of the colours


def test_same_settings_same_bytes_other_settings_another_folder(cache: Path, monkeypatch: pytest.MonkeyPatch):
    first = ensure(recipe())[0]
    monkeypatch.setenv("LINGEN_CACHE", str(cache.parent / "second"))
    second = ensure(recipe())[0]
    for one, two in zip(expand(first.video, "video"), expand(second.video, "video"), strict=True):
        assert Path(one).read_bytes() == Path(two).read_bytes()
    assert ensure(recipe())[0] == second
    others = [ensure(recipe(seed=1)), ensure(recipe(size=(32, 32))), ensure(recipe(frames=4)), ensure(recipe(clips=11))]
    assert len({shards.video for shards, _ in others} | {second.video}) == 5


def test_single_frames_odd_sizes_and_a_recipe_of_images():
    assert ensure(recipe(frames=1)) == ensure(recipe(frames=8))
    sample = read(ensure(recipe(size=(17, 23), frames=3))[0].video)[0]
    with av.open(io.BytesIO(sample["mp4"])) as file:
        assert (file.streams.video[0].height, file.streams.video[0].width) == (18, 24)


@pytest.mark.parametrize(
    ("component", "words"),
    [
        ({"name": "shape"}, "There is no synthetic data set called 'shape'. Known: shapes."),
        ({"name": "shapes", "clip": 3}, "Did you mean 'clips'?"),
        ({"name": "shapes", "seed": -1}, "Expected at least 0, got -1. (at seed of synthetic data set 'shapes')"),
        ({"name": "shapes", "clips": 0}, "Expected at least 1, got 0. (at clips of synthetic data set 'shapes')"),
    ],
)
def test_wrong_settings_are_named(component: dict, words: str):
    with pytest.raises(RecipeError) as error:
        ensure(Recipe(data=DataConfig(synthetic=component)))
    assert words in str(error.value)


DRAW = """
from lingen.recipe.sections import DataConfig, Recipe
from lingen.data.synthetic import ensure
settings = {{"name": "shapes", "clips": {clips}, "images": 6, "held_out": 4}}
ensure(Recipe(data=DataConfig(synthetic=settings, size=(24, 24), frames=8, fps=8.0)))
"""


def draw_in_a_process(clips: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", DRAW.format(clips=clips)])


def test_a_killed_process_leaves_nothing_half_made(cache: Path):
    process = draw_in_a_process(clips=4000)
    while not list(cache.glob(".lingen-building-*/train/video-*")):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -9 and not list(cache.glob("shapes-*"))
    assert len(read(ensure(recipe())[0].video)) == 10


def test_two_processes_at_once_make_one_whole_folder(cache: Path):
    processes = [draw_in_a_process(clips=200) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert [path.name.startswith("shapes-") for path in cache.iterdir()] == [True]
    assert len(read(ensure(recipe(clips=200))[0].video)) == 200
