"""The benchmark of the loader: its rivals make the same clips, and a small run writes its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingen.cli import main
from lingen.cli.bench import yardstick
from lingen.data.decode import decode_video
from lingen.data.shards import write_shards
from lingen.media import encode_mp4
from lingen.recipe.sections import DataConfig, Recipe

loader, rivals, pairs, index_scale = (yardstick(name) for name in ("loader", "rivals", "pairs", "index_scale"))


def film(frames: int, height: int, width: int, fps: float) -> bytes:
    """Each frame is brighter than the one before; its left half is darker."""
    shades = np.linspace(20, 230, frames).astype(np.uint8)[:, None, None, None]
    pictures = np.broadcast_to(shades, (frames, height, width, 3)).copy()
    pictures[:, :, : width // 2] //= 2
    return encode_mp4(pictures, fps)


@pytest.mark.parametrize(("fps", "start"), [(25, 0.0), (25, 0.5), (30, 0.99), (12, 0.3)])
def test_the_bare_loop_makes_the_clips_of_the_loader(tmp_path: Path, fps: int, start: float) -> None:
    path, wanted = tmp_path / "a.mp4", rivals.Wanted(8, (32, 48), 16.0)
    path.write_bytes(film(30, 64, 80, fps))
    ours = decode_video(path.read_bytes(), frames=8, size=(32, 48), fps=16.0, start=start).pixels.numpy()
    theirs = rivals.bare_clip(rivals.Job(path, start), wanted)
    assert theirs.shape == ours.shape == (3, 8, 32, 48) and theirs.dtype == np.uint8
    # A frame is 7 brighter than the one before, 5.4 on average; FFmpeg rounds differently on the way to other formats.
    assert np.abs(ours.astype(int) - theirs).mean() < 2.5


def test_pairs_take_turns_and_give_the_median_of_their_ratios() -> None:
    asked: list[str] = []

    def side(name: str, seconds: list[float]) -> Any:
        def run(pair: int) -> Any:
            asked.append(f"{name}{pair}")
            return pairs.Measured(10, seconds[pair], 2 * seconds[pair])

        return run

    comparison = pairs.Comparison("raw", "rival", 2, side("a", [1, 4, 2]), side("b", [1, 8, 1]), 16)
    found = pairs.measure(comparison, 3, lambda pair: None)
    assert asked == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert found["ratios"] == [1.0, 2.0, 0.5] and found["ratio"] == 1.0
    assert found["clips_per_second"] == [5.0, 10.0] and found["frames_per_second"] == [80.0, 160.0]
    assert found["cpu_ms_per_clip"] == [400.0, 200.0]


def test_a_small_run_writes_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LINGEN_CACHE", str(tmp_path / "cache"))
    for name, value in (
        ("RAW", Recipe(data=DataConfig(frames=4, size=(16, 16), fps=8.0))), ("TOKENS", 3), ("SAMPLES", 8),
        ("ENCODED", replace(loader.ENCODED, data=DataConfig(frames=8, size=(16, 16), fps=8.0))), ("COPIES", 4),
    ):  # fmt: skip
        monkeypatch.setattr(loader, name, value)
    monkeypatch.setattr(rivals, "DELAY", 0.001)
    monkeypatch.setattr(index_scale, "BATCHES", 3)
    monkeypatch.setattr(index_scale, "_fresh", lambda work, folder: work(folder))  # new processes take seconds
    clips = [{"__key__": f"c{i}", "mp4": film(12, 16, 32, 8), "txt": "a clip"} for i in range(2)]
    write_shards(clips, f"{tmp_path}/footage/video-%d.tar")
    words = ["bench", "loader", "--shards", f"{tmp_path}/footage/*.tar", "--out", str(tmp_path / "out")]
    assert main([*words, "--pairs", "1", "--seconds", "0.01", "--rows", "5000"]) == 0
    result = json.loads((tmp_path / "out" / "loader.json").read_text())
    names = {(one["what"], one["beside"], one["workers"]) for one in result["comparisons"]}
    assert len(names) == len(result["comparisons"]) == 10
    assert {workers for what, beside, workers in names if beside == "bare PyAV loop"} == {1, 2}
    for one in result["comparisons"]:
        assert one["ratio"] > 0 and len(one["ratios"]) == 1 and all(one["clips_per_second"] + one["cpu_ms_per_clip"])
    assert result["index"]["rows"] == 5000 and result["index"]["worker_private_mib"] > 0
    out = capsys.readouterr().out
    assert "bare PyAV loop" in out and "5,000 rows" in out and str(tmp_path / "out" / "loader.json") in out
    assert main([*words[:2], "--shards", f"{tmp_path}/none*.tar"]) == 2
