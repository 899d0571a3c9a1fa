"""`lingen eval selftest` and `lingen eval vbench`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lingen_yardsticks import coverage, selftest, vbench

from lingen.cli import main
from tests.test_evaluation import FRAMES, NET, moving


@pytest.mark.parametrize("damage", selftest.DAMAGES)
def test_each_damage_grows_with_its_strength(damage: str):
    """In the difference of pixels, and it is the same again."""
    act, strengths, _ = selftest.DAMAGES[damage]
    clip = moving()
    found = [act(clip, strength, np.random.default_rng(0)) for strength in strengths]
    again = act(clip, strengths[-1], np.random.default_rng(0))
    assert np.array_equal(found[-1], again) and found[-1].dtype == np.uint8 and found[-1].shape == clip.shape
    sizes = [float(np.abs(one.astype(float) - clip).mean()) for one in found]
    assert sizes[0] > 0 and sizes[-1] > sizes[0] and sizes[2] > 0


def test_reordered_frames_are_the_clips_own():
    clip, rng = moving(), np.random.default_rng(0)
    assert np.array_equal(selftest.reverse(clip, 1, rng), clip[::-1])
    assert np.array_equal(selftest.freeze(clip, 1, rng), clip[:1].repeat(16, 0))
    assert np.array_equal(selftest.freeze(clip, 0.5, rng)[:8], clip[:8])
    assert sorted(frame.tobytes() for frame in selftest.shuffle(clip, 16, rng)) == sorted(f.tobytes() for f in clip)
    for start in range(0, 16, 4):  # frames stay in their window
        part = selftest.shuffle(clip, 4, np.random.default_rng(1))[start : start + 4]
        assert sorted(frame.tobytes() for frame in part) == sorted(f.tobytes() for f in clip[start : start + 4])
    assert np.array_equal(selftest.drift(clip, 180, rng)[0], selftest.drift(clip, 10, rng)[0])


@pytest.mark.slow
def test_the_command_sees_noise_and_not_a_whole_reversal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "deep" / "selftest.json"
    words = ["eval", "selftest", "--clips", "2", "--features", NET, "--features", FRAMES, "--jobs", "1"]
    assert main([*words, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "hue drift" in shown and (tmp_path / "deep/selftest_shapes.png").stat().st_size > 10_000
    rows = {(row["damage"], row["metric"]): row for row in json.loads(out.read_text())["shapes"]["rows"]}
    noisy, back = rows["noise", "flicker"], rows["reversal", "flicker"]
    assert noisy["damaged"][-1] > 5 * noisy["clean"]
    assert back["damaged"][-1] == pytest.approx(back["clean"], rel=0.2)  # a whole reversal is a motion, too
    assert rows["freeze", "motion"]["damaged"][-1] == pytest.approx(0, abs=1e-3)
    assert rows["shuffle", f"Frechet distance, {FRAMES}"]["clean"] > 0
    assert rows["hue drift", "text: colour"]["damaged"][-1] < 0.6
    assert main(["eval", "selftest", "--coverage", "--times", "2", "--out", str(out), "--json"]) == 0
    assert set(json.loads(out.read_text())) == {"shapes", "coverage"}


def test_folders_with_too_few_clips_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", "selftest", str(tmp_path), "--features", NET, "--out", str(tmp_path / "o.json")]) == 2
    assert "holds no clips and no shards of them" in capsys.readouterr().err


def test_a_wrong_interval_is_found_out(monkeypatch: pytest.MonkeyPatch):
    """The simulation tells an interval that is half as wide as it should be from one that covers."""
    right = np.mean([coverage.normal_mean(np.random.default_rng(k), 12) for k in range(60)])
    real = coverage.mean_interval

    def half(values: list[float], prompts: list[int]) -> tuple[float, float]:
        low, high = real(values, prompts) or (0, 0)
        return (3 * low + high) / 4, (low + 3 * high) / 4

    monkeypatch.setattr(coverage, "mean_interval", half)
    assert np.mean([coverage.normal_mean(np.random.default_rng(k), 12) for k in range(60)]) < 0.85 < right


DIMENSIONS = [*vbench.QUALITY, *vbench.SEMANTIC]
PUBLISHED = {
    "Gen-3": "97.10 96.62 98.61 99.23 60.14 63.34 66.82 87.81 53.64 96.40 80.90 65.09 54.57 24.31 24.71 26.69"
    " | 84.11 75.17 82.32",
    "Kling": "98.33 97.60 99.30 99.40 46.94 61.21 65.62 87.24 68.05 93.40 89.90 73.03 50.86 19.62 24.17 26.42"
    " | 83.39 75.68 81.85",
    "Pika 1.0": "96.94 97.36 99.74 99.50 47.50 62.04 61.87 88.72 43.08 86.20 90.57 61.03 49.83 22.26 24.22 25.94"
    " | 82.92 71.77 80.69",
    "OpenSora 1.2": "96.75 97.61 99.53 98.50 42.39 56.85 63.34 82.22 51.83 91.20 90.08 68.56 42.44 23.95 24.54 26.85"
    " | 81.35 73.39 79.76",
    "T2V-Turbo": "96.28 97.02 97.48 97.34 49.17 63.04 72.49 93.96 54.65 95.20 89.90 38.67 55.58 24.42 25.51 28.16"
    " | 82.57 74.76 81.01",
    "CogVideoX-5B": "96.23 96.52 98.66 96.92 70.97 61.98 62.90 85.23 62.11 99.40 82.81 66.35 53.20 24.91 25.38 27.59"
    " | 82.75 77.04 81.61",
    "LaVie": "91.41 97.47 98.30 96.38 49.72 54.94 61.90 91.82 33.32 96.80 86.39 34.09 52.69 23.56 25.93 26.41"
    " | 78.78 70.31 77.08",
}
"""Dimensions, then Quality, Semantic and Total, as VBench's leaderboard shows them, in percent."""


@pytest.mark.parametrize("model", PUBLISHED)
def test_vbench_totals_are_those_that_were_published(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """From files of one dimension each. Published numbers are rounded: a total may differ by one in the last place."""
    parts, totals = ([float(word) for word in half.split()] for half in PUBLISHED[model].split("|"))
    for name, value in zip(DIMENSIONS, parts, strict=True):
        (tmp_path / f"{name}_eval_results.json").write_text(
            json.dumps({name: [value / 100, [{"video_path": "a.mp4"}]]})
        )
    (tmp_path / "a_full_info.json").write_text("[]")
    assert main(["eval", "vbench", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [100 * found[name] for name in ("quality", "semantic", "total")] == pytest.approx(totals, abs=0.011)
    assert found["missing"] == []


def test_vbench_totals_of_the_papers_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """LinGen's Quality comes out of its seven dimensions, and its Total out of Quality and Semantic (docs/facts.md)."""
    file = tmp_path / "lingen.json"
    shares = dict(zip(vbench.QUALITY, (0.983, 0.976, 0.9926, 0.9858, 0.6367, 0.6055, 0.6336), strict=True))
    file.write_text(json.dumps({name: [value, []] for name, value in shares.items()}))
    assert main(["eval", "vbench", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 100 * found["quality"] == pytest.approx(83.77, abs=0.006)
    assert found["semantic"] is None and found["total"] is None and len(found["missing"]) == 9
    assert (4 * 83.77 + 73.73) / 5 == pytest.approx(81.76, abs=0.006)
    assert main(["eval", "vbench", str(file)]) == 0
    assert "missing: scene" in capsys.readouterr().out


def test_vbench_files_that_say_nothing_sensible_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for text, told in {
        "[]": "holds no dimension of VBench", "{": "is no JSON", '{"scene": [54.57, []]}': "is 54.57 in",
        '{"scene": []}': "is [] in",
    }.items():  # fmt: skip
        (tmp_path / "a.json").write_text(text)
        assert main(["eval", "vbench", str(tmp_path)]) == 2
        assert told in capsys.readouterr().err
    for name, value in (("a", 0.5), ("b", 0.6)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"scene": [value, []]}))
    assert main(["eval", "vbench", str(tmp_path)]) == 2
    assert "scene is 0.5 and 0.6 below" in capsys.readouterr().err
