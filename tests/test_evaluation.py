"""`lingen eval`: distances, intervals, measures and the command, with a small network of the tests' own."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import linalg

from lingen.cli import main
from lingen.data.synthetic import captions, draw_clip
from lingen.evaluation.clips import View, check_paired, find_clips
from lingen.evaluation.comparison import REAL, Entrant, compare_subjects, evaluate_clips
from lingen.evaluation.features import network_of
from lingen.evaluation.judging import Judge, Judged
from lingen.evaluation.statistics import (
    FeatureSet,
    KernelDistance,
    frechet_distance,
    frechet_floor,
    holm,
    kernel_floor,
    mean_interval,
    paired_kernel_p,
    paired_p,
    polynomial_kernel,
)
from lingen.files import cache_folder
from lingen.media import encode_mp4, save_video
from lingen.metrics.measures import ClipScore, measure_coherence, measure_drift, measure_motion, measure_shapes
from lingen.prepare.networks import ArraysOnly
from lingen.recipe.errors import RecipeError
from tests.helpers import encoders
from tests.helpers.closeness import assert_close, relative_error
from tests.helpers.commands import ROOT, run_python
from tests.tools.i3d_reference import reference_clip

PROMPTS = captions()[:6]
NET = "tests.test_evaluation:SmallNet"
WEIGHTS = cache_folder() / "weights"


class SmallNet(torch.nn.Module):
    """A seeded 3-D convolution of a clip."""

    video = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv3d(3, 8, (3, 16, 16), (2, 16, 16))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return self.conv(clips.float() / 127.5 - 1).relu().mean((2, 3, 4)) * 10


class Frames(torch.nn.Module):
    """Frames of 4 x 4 pixels."""

    video = False

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(clips[:, :, 0].float(), 4).flatten(1) / 64 - 1


def features(n: int, shift: float = 0.0, seed: int = 0, d: int = 6) -> FeatureSet:
    rng = np.random.default_rng(seed)
    return FeatureSet(rng.normal(size=(n, d)) + shift, list(range(n)))


# distances


def test_the_kernel_distance_is_the_unbiased_estimate_of_the_double_sum():
    x, y = features(7).rows, features(5, 1.0, 1).rows
    xx, yy, xy = polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y)
    want = (xx.sum() - np.trace(xx)) / 42 + (yy.sum() - np.trace(yy)) / 20
    got = KernelDistance(features(7), features(5, 1.0, 1)).value()
    assert got == pytest.approx(want - 2 * xy.mean(), rel=1e-9)


def test_distances_agree_with_torchmetrics():
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    sides = features(40), features(40, 0.5, 1)
    moments = [torch.from_numpy(value) for one in sides for value in (one.rows.mean(0), np.cov(one.rows.T))]
    assert frechet_distance(*(one.rows for one in sides)) == pytest.approx(float(_compute_fid(*moments)), rel=1e-6)
    theirs = float(poly_mmd(*(torch.from_numpy(one.rows) for one in sides)))
    assert KernelDistance(*sides).value() == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("n", [4, 50])
def test_the_frechet_distance_is_that_of_the_matrix_root(n: int):
    """With fewer clips than features, too."""
    x, y = features(n).rows, features(n, 0.3, 1).rows
    a, b = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(a @ b + 0j).real
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(want, rel=1e-4)
    assert abs(frechet_distance(x, x)) < 1e-9


def test_pairs_within_a_prompt_are_left_out():
    """Clips of one prompt are alike; with them the distance of two sets of the same sort would not be 0 on average."""
    found = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        sides = [FeatureSet(np.repeat(rng.normal(size=(8, 4)), 4, 0), list(np.repeat(range(8), 4))) for _ in range(2)]
        found.append(KernelDistance(*sides).value())
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


def test_a_set_lies_within_the_floor_of_its_like_and_noise_far_above():
    real = features(80)
    floor = kernel_floor(real, 40)
    near, far = (KernelDistance(features(40, shift, 1), real).value() for shift in (0.0, 1.0))
    assert near < floor < far
    assert kernel_floor(features(3), 2) is None
    assert frechet_floor(real.rows, 40) > 0.5 > abs(frechet_distance(real.rows, real.rows))


def test_a_pair_as_far_from_the_real_clips_is_not_told_apart():
    real, near, like, far = (features(30, shift, seed) for shift, seed in ((0, 0), (0, 1), (0, 2), (0.8, 3)))
    assert paired_kernel_p(near, far, real)[1] < 0.01 < 0.05 < paired_kernel_p(near, like, real)[1]
    assert paired_kernel_p(near, far, real)[0] == pytest.approx(-paired_kernel_p(far, near, real)[0])
    assert paired_kernel_p(near, near, real) == (0.0, 1.0)


# statistics


def coverage(hits: list[bool]) -> float:
    return float(np.mean(hits))


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [12, 40])
def test_an_interval_of_a_mean_covers_it(prompts: int):
    rng, hits = np.random.default_rng(3), []
    of = np.repeat(range(prompts), 3).tolist()
    for _ in range(500):
        low, high = mean_interval((rng.normal(size=prompts)[of] + rng.normal(size=len(of))).tolist(), of)
        hits.append(low <= 0 <= high)
    assert 0.93 <= coverage(hits) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [12, 24])
def test_an_interval_covers_a_mean_that_few_prompts_carry(prompts: int):
    rng, hits = np.random.default_rng(5), []
    for _ in range(600):
        values = np.exp(rng.normal(size=prompts)) + rng.normal(size=(3, prompts)).mean(0)
        low, high = mean_interval(values.tolist(), range(prompts))
        hits.append(low <= np.exp(0.5) <= high)
    assert 0.915 <= coverage(hits) <= 0.97  # of 600: two standard errors are 0.02; bootstrap-t alone: 0.90 to 0.93


@pytest.mark.slow
@pytest.mark.parametrize("apart", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [12, 60])
def test_an_interval_of_the_kernel_distance_covers_it(n: int, apart: float):
    rng, hits = np.random.default_rng(4), []
    truth = KernelDistance(*(FeatureSet(rng.normal(size=(2000, 6)) + s, list(range(2000))) for s in (0, apart))).value()
    for _ in range(250):
        sides = [FeatureSet(rng.normal(size=(n, 6)) + shift, list(range(n))) for shift in (0, apart)]
        low, high = KernelDistance(*sides).interval()
        hits.append(low <= (truth if apart else 0) <= high)
    assert 0.91 <= coverage(hits) <= 0.99  # of 250: two standard errors are 0.028


def test_an_interval_of_a_kernel_distance_reaches_further_up_and_knows_its_few_prompts():
    far = [features(30, shift, seed) for shift, seed in ((0, 0), (1, 1))]
    value, (low, high) = KernelDistance(*far).value(), KernelDistance(*far).interval()
    assert 0 < low < value < high and high - value > value - low
    low, high = KernelDistance(features(30, 0, 3), features(30, 0, 4)).interval()
    assert low < 0 < high
    assert KernelDistance(features(3, 0, 0), features(30, 0, 1)).interval() is None
    clips = [FeatureSet(np.repeat(one.rows, 3, 0), [p for p in one.prompts for _ in range(3)]) for one in far]
    assert KernelDistance(*clips).interval() == pytest.approx(KernelDistance(*far).interval())  # no new prompts
    same = FeatureSet(np.ones((8, 4)), list(range(8)))
    assert KernelDistance(same, same).interval() == pytest.approx((0, 0), abs=1e-9)


def test_a_mean_over_clips_is_judged_by_prompts():
    values = [float(n) for n in range(8) for _ in range(8)]
    narrow, wide = mean_interval(values, range(64)), mean_interval(values, [n // 8 for n in range(64)])
    assert wide[1] - wide[0] > 2.5 * (narrow[1] - narrow[0])
    assert mean_interval([1.0, 2.0], "aa") is None
    assert mean_interval([2.0, 2.0], "ab") == (2.0, 2.0)
    low, high = mean_interval([1.0] * 10, range(10))
    assert low < 0.8 and high == 1.0


def test_pairs_swap_within_prompts():
    first = [float(n) for n in range(10)]
    assert paired_p([n + 1 for n in first], first, range(10)) == pytest.approx(2 / 2**10)
    assert paired_p(first, first, range(10)) == 1.0
    assert paired_p([1.0] * 10, [0.0] * 10, ["one prompt"] * 10) == 1.0
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


# measures


def moving(frames: int = 16, step: int = 4, side: int = 96) -> np.ndarray:
    """A texture that moves `step` pixels a frame to the right."""
    rng = np.random.default_rng(0)
    wide = np.kron(rng.integers(40, 220, (side // 8, (side + frames * step) // 8 + 1, 3)), np.ones((8, 8, 1)))
    return np.stack([wide[:, (frames - t) * step :][:, :side] for t in range(frames)]).astype(np.uint8)


def test_motion_is_the_speed_and_flicker_what_motion_does_not_explain():
    clip = moving()
    found = measure_motion(clip, fps=8)
    assert found["motion"] == pytest.approx(4 / 96 * 8, rel=0.2)
    assert measure_motion(clip[:1].repeat(16, 0), 8) == pytest.approx({"motion": 0, "flicker": 0}, abs=1e-6)
    lit = (clip * np.linspace(0.6, 1, 16)[np.random.default_rng(1).permutation(16), None, None, None]).astype(np.uint8)
    assert measure_motion(lit, 8)["flicker"] > 2 * found["flicker"]


def test_drift_is_a_second_and_has_its_sign():
    clip = moving(32)
    assert measure_drift(clip[:1].repeat(32, 0), 8) == {"colour drift": 0, "sharpness drift": 0}
    red = clip + np.linspace(0, 30, 32)[:, None, None, None] * [1, 0, 0]
    still = clip[:1].repeat(32, 0) + np.linspace(0, 31, 32)[:, None, None, None] * [1, 0, 0]
    assert measure_drift(still.astype(np.uint8), 8)["colour drift"] == pytest.approx(8 / 255, rel=0.02)
    blurred = np.concatenate([clip[:16], clip[16:] // 4 + 96])
    assert measure_drift(blurred, 8)["sharpness drift"] < -0.5 and red.shape == clip.shape


def test_coherence_falls_with_distance_and_a_still_clip_has_all():
    rows = torch.cumsum(torch.randn(60, 16, generator=torch.Generator().manual_seed(0)), 0)
    found = measure_coherence(rows, "net", 8)
    near = [found[f"coherence@{k}, net"] for k in (1, 5, 50)]
    assert near == sorted(near, reverse=True) and list(found)[-1] == "identity drift, net"
    still = measure_coherence(rows[:1].repeat(12, 1), "net", 8)
    assert still == pytest.approx({f"coherence@{k}, net": 1 for k in (1, 2, 5, 10)} | {"identity drift, net": 0})


def test_the_judge_of_shapes_reads_shapes_prompts_only():
    data = draw_clip("a red circle grows", (48, 48), 16, np.random.default_rng(0))
    assert set(measure_shapes(data, "a red circle grows").values()) == {1.0}
    assert measure_shapes(data, "a blue circle grows") == {
        "text: colour": 0, "text: shape": 1, "text: motion": 1, "text: all": 0,
    }  # fmt: skip
    assert measure_shapes(data, "a cockatoo") == {}


def test_the_clip_score_is_the_cosine_of_open_clip(tmp_path: Path):
    import open_clip

    folder = encoders.clip(tmp_path / "clip", file="open_clip_model.safetensors", custom=False)
    score = ClipScore(folder, torch.device("cpu"))
    clip = moving(8)
    found = score(clip, "a red circle")
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    from PIL import Image

    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([prepare(Image.fromarray(frame)) for frame in clip]), True)
        text = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(["a red circle"]), True)
    assert found == pytest.approx(max(0.0, 100 * float((images @ text.T).mean())), abs=1e-3)
    with pytest.raises(RecipeError, match="is no folder with open_clip_config.json"):
        ClipScore(tmp_path, torch.device("cpu"))


# the command


def write_clips(folder: Path, noise: int = 0, seed: int = 0, prompts: list[str] = PROMPTS) -> None:
    rng = np.random.default_rng(seed)
    for number, prompt in enumerate(prompts):
        clip = draw_clip(prompt, (32, 32), 12, rng)
        clip = (255 - clip if noise else clip) + rng.integers(-noise, noise + 1, clip.shape)
        save_video(clip.clip(0, 255).astype(np.uint8), folder / f"{number}.mp4", 8)
        (folder / f"{number}.txt").write_text(prompt)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder / "A")
    write_clips(folder / "B", noise=90, seed=1)
    write_clips(folder / "real", seed=2, prompts=captions()[6:18])
    return folder


@pytest.fixture
def here(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(clips, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LINGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path


FRAMES = "tests.test_evaluation:Frames"
FLAGS = ["--features", NET, "--features", FRAMES, "--frames", "12"]


def run(*words: str, code: int = 0) -> None:
    assert main(["eval", *words, *FLAGS, "--device", "cpu"]) == code


def test_two_folders_side_by_side(here: Path, capsys: pytest.CaptureFixture[str]):
    run("A", "B", "--real", "real")
    found = json.loads((here / "eval/clips/results.json").read_text())
    rows = {(row["subject"], row["metric"]): row for row in found["results"]}
    assert rows["A", "text: all"]["value"] == 1
    assert rows["A", "flicker"]["interval"][1] < rows["B", "flicker"]["interval"][0]
    far, near = (rows[name, f"kernel distance, {FRAMES}"] for name in "BA")
    assert (
        far["value"] > 3 * max(near["value"], far["floor"]) and far["interval"][0] < far["value"] < far["interval"][1]
    )
    frechet = rows["A", f"Frechet distance, {NET}"]
    assert frechet["interval"] is None and frechet["floor"] > 0 and frechet["n"] == 6
    assert rows["real clips", "motion"]["n"] == 12
    flicker = next(row for row in found["comparisons"] if row["metric"] == "flicker")
    assert flicker["p"] == 2 / 2**6 < flicker["holm"]
    assert found["fingerprint"]["codec"] == ["h264 yuv420p"] and found["fingerprint"]["n"] == 6
    assert (here / "eval/clips/results.png").stat().st_size > 10_000
    assert "below 2,048 they are mostly bias" in capsys.readouterr().out


def test_an_earlier_result_that_is_none_is_told_before_anything_is_measured(here: Path, capsys):
    for held in ("{", "[]", '{"results": [1], "fingerprint": {}}', '{"results": [{"subject": "a"}]}'):
        (here / "old.json").write_text(held)
        with pytest.raises(RecipeError, match="old.json is not there, or no results.json"):
            evaluate_clips(["A", "old.json"], lambda: pytest.fail("measured"), here, lambda name: pytest.fail(name))


def test_real_clips_of_one_prompt_have_no_distances():
    def entrant(name: str, prompts: str) -> Entrant:
        rows = np.random.default_rng(len(name)).random((len(prompts), 3))
        judged = {(one, n): Judged({"motion": 1.0}, {"net": rows[n]}) for n, one in enumerate(prompts)}
        return Entrant(name, judged, {})

    judge = SimpleNamespace(networks={"net": None}, fingerprint={})
    subjects = [entrant("a", "vwxyz"), entrant("bc", "vwxyz")]
    for prompts, told in (("rrrrr", True), ("rstuv", False)):
        found = compare_subjects(judge, subjects, entrant(REAL, prompts))  # type: ignore[arg-type]
        json.dumps(found, allow_nan=False)
        assert any("fewer than two prompts" in note for note in found["notes"]) is told
        assert any("distance" in row["metric"] for row in (*found["results"], *found["comparisons"])) is not told


def test_what_was_measured_is_kept_and_gives_the_same(here: Path, monkeypatch: pytest.MonkeyPatch):
    run("A", "B", "--real", "real")
    first = (here / "eval/clips/results.json").read_text()
    kept = sorted((here / "cache/evaluation").iterdir())
    kept[0].write_bytes(b"damaged")
    from lingen.evaluation import judging

    shown = []
    real = judging.show_clip
    monkeypatch.setattr(judging, "show_clip", lambda *args: shown.append(1) or real(*args))
    run("A", "B", "--real", "real")
    assert len(shown) == 1 and (here / "eval/clips/results.json").read_text() == first


def test_a_broken_clip_is_a_failure_and_follows_no_text(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "A/0.mp4").write_bytes((here / "A/0.mp4").read_bytes()[:400])
    run("A", "B", "--json")
    found = json.loads(capsys.readouterr().out)
    rows = {(row["subject"], row["metric"]): row for row in found["results"]}
    assert rows["A", "failed clips"]["value"] == pytest.approx(1 / 6) and rows["A", "motion"]["n"] == 5
    assert rows["A", "text: shape"]["n"] == 6 and rows["A", "text: shape"]["value"] < 1
    assert [reason for reason in found["failures"]["A"] if reason.startswith("0.mp4: broken video")]


def test_prompts_are_the_same_or_it_is_said(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "A/0.mp4").unlink()
    run("A", "B", code=2)
    assert f"A lacks 1 prompts, such as '{PROMPTS[0]}'" in capsys.readouterr().err
    (here / "prompts").write_text("\n".join(PROMPTS))
    run("A", "B", "--prompts", "prompts", "--json")
    assert json.loads(capsys.readouterr().out)["failures"]["A"] == {"missing": 1}
    (here / "prompts").write_text("\n".join(PROMPTS[:2]))
    run("A", "B", "--prompts", "prompts", code=2)
    assert "A has clips of 4 prompts that --prompts lacks" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_are_sampled_with_the_same_prompts_and_seed(
    here: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
):
    (here / "prompts").write_text("a red square\na blue circle moves up\na red square\n")
    words = [str(tiny_run), "--prompts", "prompts", "--repeat", "2", "--json"]
    for seen in ([], ["sampling"]):
        assert main(["eval", *words, "--features", FRAMES, "--frames", "4"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["fingerprint"]["n"] == 4 and found["failures"] == {str(tiny_run): {}} and len(seen) < 2
    (folder,) = (here / "eval/clips/samples").iterdir()
    assert {(clip.prompt, clip.repetition, clip.seed) for clip in find_clips(folder)} == {
        (prompt, number, 0) for prompt in ("a red square", "a blue circle moves up") for number in (0, 1)
    }
    with pytest.raises(RecipeError, match="different seeds"):
        check_paired({"a": find_clips(folder), "b": [clip._replace(seed=1) for clip in find_clips(folder)]})
    assert main(["eval", str(tiny_run), "--features", FRAMES]) == 2
    assert "is to be sampled: give --prompts FILE" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_short_clips_is_refused_before_it_is_sampled(
    here: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
):
    (here / "prompts").write_text("a red square\n")
    words = ["eval", str(tiny_run), "--prompts", "prompts", "--features", FRAMES]
    assert main(words) == 2 and not (here / "eval").exists()
    assert "makes clips of 4 frames at 8 a second, 4 at --fps 8, and --frames 16 are wanted: say --frames 4." in (
        capsys.readouterr().err
    )


def test_clips_of_folders_that_are_short_say_the_cure(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", "A", "--features", FRAMES, "--device", "cpu"]) == 0
    assert "short clip: 12 frames where 16 are wanted; --frames 12 takes it" in capsys.readouterr().out


def test_motion_flicker_and_drift_need_no_network(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", "A", "--features", "none", "--frames", "12", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = {row["metric"] for row in found["results"]}
    assert {"motion", "flicker", "colour drift", "sharpness drift"} < names
    assert not [name for name in names if "coherence" in name] and found["fingerprint"]["networks"] == {}


def test_a_network_without_weights_is_told_before_torch_is_imported(here: Path):
    code = "import sys; from lingen.cli import main; print(main(['eval', 'A']), 'torch' in sys.modules)"
    assert run_python("-c", code) == "2 False\n"


def test_results_of_before_stand_beside_new_ones_or_are_refused(here: Path, capsys: pytest.CaptureFixture[str]):
    run("A", "--out", "first")
    run("B", "first/results.json")
    found = json.loads((here / "eval/clips/results.json").read_text())
    assert {row["subject"] for row in found["results"]} == {"A", "B"}
    run("B", "first/results.json", "--fps", "4", "--frames", "6", code=2)
    assert "first/results.json was measured differently and is not compared (fps: 8.0 there, 4.0 here" in (
        capsys.readouterr().err
    )


def test_other_codecs_are_refused(here: Path, capsys: pytest.CaptureFixture[str]):
    import av

    for path in (here / "B").glob("*.mp4"):
        pixels = draw_clip(PROMPTS[0], (32, 32), 12, np.random.default_rng(0))
        with av.open(str(path), "w") as file:
            stream = file.add_stream("mpeg4", rate=8)
            stream.width = stream.height = 32
            for frame in pixels:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            file.mux(stream.encode())
    run("A", "B", code=2)
    assert "stored by different codecs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["C"], "C: "),
        (["A", "--real", "cache"], "cache is no folder with clips"),
        (["x.json"], "Earlier results need clips"),
        (["A", "--features", "i3d"], "weights/i3d.safetensors is not there: lingen data fetch i3d"),
        (["A", "--features", "i4d"], "Did you mean 'i3d'"),
    ],
)
def test_mistakes_are_said_in_a_sentence(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str):
    (here / "cache").mkdir()
    run(*words, code=2)
    assert told in capsys.readouterr().err


def test_a_missing_extra_has_its_cure(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(__import__("sys").modules, "statsmodels.stats.multitest", None)
    run("A", code=2)
    assert "pip install 'scipy>=1.15' statsmodels" in capsys.readouterr().err


# networks


def test_a_pickle_that_names_more_than_arrays_is_refused():
    import io

    arrays = {"a": np.arange(3.0)}
    assert ArraysOnly(io.BytesIO(pickle.dumps({"x": 1}))).load() == {"x": 1}
    for bad in (print, Path("x"), np.random.default_rng(0)):
        with pytest.raises(pickle.UnpicklingError, match="is no array"):
            ArraysOnly(io.BytesIO(pickle.dumps({**arrays, "b": bad}, protocol=2))).load()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["i3d", "efficientnet"])
def test_the_real_network_sees_damage(name: str):
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"lingen data fetch {name} --out {WEIGHTS}")
    network = network_of(f"{name}={path}")
    frames = 9 if network.video else 1
    clip = torch.from_numpy(moving(frames, side=224)).permute(3, 0, 1, 2)[None]
    noise = 60 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    noise = (clip.float() + noise).clamp(0, 255).byte()
    with torch.no_grad():
        one, again, other = network(clip), network(clip), network(noise)
    assert torch.equal(one, again) and one.shape == (1, 400 if network.video else 1280)
    assert (one - other).norm() > 0.3 * one.norm()


@pytest.mark.slow
def test_i3d_is_that_of_an_independent_implementation():
    """Its logits of a clip beside the Flax port's; `tests/tools/i3d_reference.py` made them."""
    path = WEIGHTS / "i3d.safetensors"
    if not path.is_file():
        pytest.skip(f"lingen data fetch i3d --out {WEIGHTS}")
    want = torch.tensor(json.loads((ROOT / "tests" / "tools" / "i3d_reference.json").read_text())["logits"])
    clip = torch.from_numpy(reference_clip()).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        assert_close("logits of I3D", want, network_of(f"i3d={path}")(clip)[0], 1e-4)


@pytest.fixture
def page_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `mine.py` of docs/evaluation.md."""
    (code,) = re.findall(r"```python\n(# mine.py\n.*?)```", (ROOT / "docs" / "evaluation.md").read_text("utf-8"), re.S)
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["VideoMAE", "VJEPA2"])
def test_video_networks_of_the_page_judge_clips(name: str, page_networks: Path):
    import transformers

    few = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "tubelet_size": 2}
    settings: dict[str, dict] = {
        "VideoMAE": {"image_size": 224, "patch_size": 112, "num_frames": 16, "intermediate_size": 8},
        "VJEPA2": {
            "crop_size": 256, "patch_size": 64, "frames_per_clip": 16, "mlp_ratio": 1, "pred_hidden_size": 24,
            "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1, "num_pooler_layers": 1,
        },
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**few, **settings[name])
    getattr(transformers, f"{name}Model")(config).save_pretrained(page_networks / name)
    judge = Judge([f"mine:{name}={page_networks / name}"], View(8.0, 16, 224), device="cpu")
    one, other = (judge.measure(moving(16, step, side=224)).features[f"mine:{name}"] for step in (2, 4))
    assert one.shape == (24,) and one.dtype == np.float32 and not np.allclose(one, other)


def test_the_inception_of_the_page_judges_frames(page_networks: Path, monkeypatch: pytest.MonkeyPatch):
    """Random weights in FID's real network; only where torch-fidelity is installed."""
    pytest.importorskip("torch_fidelity")
    from torchmetrics.image.fid import NoTrainInceptionV3

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **named: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **named: None)
        torch.save(NoTrainInceptionV3("inception-v3-compat", ["2048"], "none").state_dict(), page_networks / "net.pth")
    judge = Judge([f"mine:Inception={page_networks / 'net.pth'}"], View(8.0, 16, 224), device="cpu")
    found = judge.measure(moving(16, side=224))
    assert found.features["mine:Inception"].shape == (2048,) and "coherence@1, mine:Inception" in found.values


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["i3d", "efficientnet"])
def test_features_of_a_gpu_are_those_of_a_cpu(name: str):
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"lingen data fetch {name} --out {WEIGHTS}")
    clips = [moving(16, step, side=224) for step in (2, 4)]
    cpu, gpu = (
        [Judge([f"{name}={path}"], View(8.0, 16, 224), device=device).measure(clip) for clip in clips]
        for device in ("cpu", "cuda")
    )
    for one, other in zip(cpu, gpu, strict=True):
        assert relative_error(torch.from_numpy(one.features[name]), torch.from_numpy(other.features[name])) < 1e-3
        assert other.values == pytest.approx(one.values, rel=1e-2, abs=1e-4)


def test_the_view_is_the_same_for_every_size_and_rate(tmp_path: Path):
    from lingen.evaluation.clips import show_clip

    big = moving(24, 8, 128)
    shown, codec = show_clip(encode_mp4(big, 16), View(8.0, 4, 64))
    assert shown.shape == (12, 64, 64, 3) and codec == "h264 yuv420p"
    with pytest.raises(ValueError, match="short clip: 12 frames where 16 are wanted"):
        show_clip(encode_mp4(big, 16), View(8.0, 16, 64))
    with pytest.raises(RecipeError, match="is no folder with clips"):
        find_clips(tmp_path)
