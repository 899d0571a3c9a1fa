"""Every fault of the data at once, in a real run: it goes on, counts each by its key, or stops and names the first."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingen.cli.progress import ConsoleReporter
from lingen.data import manifest
from lingen.data.fingerprint import frozen_settings, hash_settings
from lingen.data.latents import LATENTS_NPY
from lingen.data.ledger import DataError
from lingen.data.manifest import About, Row
from lingen.data.shards import scan_shard, write_shards
from lingen.media import encode_mp4
from lingen.recipe import load_curriculum, load_recipe
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import Recipe
from lingen.run import Reporter, fit, fit_curriculum
from lingen.run_folder.intact import Checkpoint


def mp4(shade: int, frames: int = 6) -> bytes:
    return encode_mp4(np.full((frames, 8, 8, 3), shade, np.uint8), 8)


def lying(data: bytes, times: int) -> bytes:
    """An MP4 whose three headers claim that it lasts so many times as long."""
    changed = bytearray(data)
    for box, at in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):  # ISO 14496-12: duration, in version 0
        (found,) = re.finditer(re.escape(box), data)
        (duration,) = struct.unpack_from(">I", data, found.start() + at)
        struct.pack_into(">I", changed, found.start() + at, duration * times)
    return bytes(changed)


def npy(value: float) -> bytes:
    """Latents of the recipe's pixels: [c t h w] of an 8x8 picture."""
    array, stream = np.zeros((3, 1, 8, 8), np.float16), io.BytesIO()
    array[0, 0, 3, 4] = value
    np.save(stream, array)
    return stream.getvalue()


def write_latents(folder: Path, recipe: Recipe, values: dict[str, float]) -> None:
    """Pictures that were encoded as `lingen encode` does it."""
    samples = [{"__key__": key, LATENTS_NPY: npy(value), "json": {"captions": ["a"]}} for key, value in values.items()]
    (path,) = write_shards(samples, f"{folder}/image-%d.tar")
    rows = [
        Row(
            one.key,
            path.name,
            one.start,
            one.end - one.start,
            "latents",
            8,
            8,
            1,
            0.0,
            1,
            1,
            LATENTS_NPY,
            source="encoded",
        )
        for one in scan_shard(path)
    ]
    settings = frozen_settings(recipe)
    manifest.write(folder / manifest.NAME, rows, About(hash_settings(settings), settings))


@pytest.fixture
def faulty(tiny_recipe: Path, tmp_path: Path) -> list[str]:
    """Overrides that name a data set with every fault in it."""
    folder = tmp_path / "faulty"
    bad = {
        "lying": {"mp4": lying(mp4(7, 3), 100), "txt": "a"},
        "latin": {"mp4": mp4(8), "txt": "caf\u00e9".encode("latin-1")},
        "half": {"mp4": mp4(9)[:900], "txt": "a"},
        "honest": {"mp4": lying(mp4(10, 6), 100), "txt": "a"},  # its header lies, but there is enough of it
    }
    good = [{"__key__": f"v{i}", "mp4": mp4(16 * i), "txt": "a"} for i in range(6)]
    write_shards([*good[:4], *({"__key__": key, **members} for key, members in bad.items())], f"{folder}/video-%d.tar")
    (cut,) = write_shards(good[4:], f"{folder}/video-cut-%d.tar")
    cut.write_bytes(cut.read_bytes()[: list(scan_shard(cut))[1].start + 700])
    (folder / "video-zero.tar").write_bytes(b"")
    recipe = load_recipe(tiny_recipe, stage="clips")
    write_latents(
        folder / "latents", recipe, {"i0": 0.5, "i1": 1.0, "nan": float("nan"), "i3": 0.0, "inf": float("inf")}
    )
    return [
        f"data.shards.video={folder}/video-*.tar", f"data.shards.image={folder}/latents",
        "stages.clips.train.steps=24", "train.sample_every=0", "sample.prompts=[]",
    ]  # fmt: skip


class Listener(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_and_every_fault_is_counted(
    tiny_recipe: Path, faulty: list[str], tmp_path: Path, workers: int
) -> None:
    listener = Listener()
    lax = [*faulty, "data.max_dropped=1", f"data.workers={workers}"]
    run = fit_curriculum(load_curriculum(tiny_recipe, lax), run=tmp_path / "run", stage="clips", reporter=listener)
    ledger = json.loads(run.ledger.read_text())
    assert {where: reason.partition(":")[0] for where, reason in ledger["faults"].items()} == {
        "video-cut-0.tar": "truncated shard", "video-cut-0.tar:v5": "cut off", "video-zero.tar": "empty shard",
    }  # fmt: skip
    named = {line.split(": ")[0]: reason for reason, lines in ledger["named"].items() for line in lines}
    assert named == {
        "video-0.tar:lying": "short clip", "video-0.tar:latin": "caption is not UTF-8",
        "video-0.tar:half": "broken video",
        "image-0.tar:nan": "latents not finite", "image-0.tar:inf": "latents not finite",
    }  # fmt: skip
    assert ledger["used"] == 24 * 2 and ledger["seen"] == ledger["used"] + sum(ledger["dropped"].values())
    assert ledger["truncated"] == 3
    assert ledger["sources"]["encoded"] == {"used": 16, "dropped": ledger["dropped"]["latents not finite"]}
    assert sum(counts.get("used", 0) for counts in ledger["shards"].values()) == 48

    with run.metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for column, total in (("data/used", 48), ("data/dropped", ledger["seen"] - 48), ("data/retried", 0)):
        assert sum(int(float(row[column])) for row in rows if row[column]) == total
    state = Checkpoint(run.checkpoints("clips")[-1]).state
    assert state["callbacks"]["StepEdge"]["ledger"]["used"] == 48
    told = listener.said[-1].splitlines()
    assert told[0].startswith(f"48 samples were used, {ledger['seen'] - 48} dropped and replaced; 3 faults found")
    assert any("found: truncated shard" in line and "video-cut-0.tar" in line for line in told)
    assert any("dropped: latents not finite" in line and "image-0.tar:" in line for line in told)

    more = [*lax, "stages.clips.train.steps=26"]
    fit_curriculum(load_curriculum(tiny_recipe, more), run=tmp_path / "run", stage="clips", reporter=listener)
    after = json.loads(run.ledger.read_text())
    assert after["used"] == 52 and after["faults"] == ledger["faults"]
    assert after["dropped"].keys() == ledger["dropped"].keys()


def test_with_a_budget_of_0_the_first_stops_the_run(tiny_recipe: Path, faulty: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="data.max_dropped: 0 allows. The first: video-cut-0.tar:v5: cut off: v5.mp4 ends"
    ):
        fit(tiny_recipe, [*faulty, "data.max_dropped=0"], run=tmp_path / "run", stage="clips")
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert ledger["used"] == 2 and len(ledger["faults"]) == 3  # one step: what is wrong is said at once


def test_broken_held_out_samples_are_named(
    tiny_recipe: Path, faulty: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held_out = faulty[0].replace("data.shards", "data.validation")
    few = [held_out, "stages.clips.train.steps=1", "train.validation_samples=8", "sample.prompts=[]"]
    with caplog.at_level("WARNING", logger="lingen"):
        fit(tiny_recipe, few, run=tmp_path / "run", stage="clips")
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("a fault in held-out shards: video-zero.tar: empty shard") for line in said)
    assert any(
        "held-out sample was dropped and replaced: video-0.tar:latin: caption is not UTF-8" in line for line in said
    )


def test_latents_of_another_recipe_are_refused(tiny_recipe: Path, faulty: list[str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="data.shards.image: these samples were encoded by something else"):
        fit(tiny_recipe, [*faulty, "data.fps_prefix=false"], run=tmp_path / "run", stage="clips")


def test_without_a_terminal_a_slow_run_still_gives_signs(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are told every half minute where no row comes, each line with what is left of the stage and, where
    others follow, of the run: by FLOP, of which the stage after these 100 steps needs half as many."""
    from rich.console import Console

    now = [100.0]
    monkeypatch.setattr("lingen.cli.progress.time.monotonic", lambda: now[0])
    out = io.StringIO()
    with ConsoleReporter(Console(file=out, width=200)) as reporter:
        reporter.flop = {"clips": 1e9, "longer": 5e8}
        reporter.stage(load_recipe(tiny_recipe, ["train.steps=100"], stage="clips"), 2, 3, 10)
        for step, now[0] in ((11, 110.0), (12, 140.0), (13, 141.0), (14, 180.0)):
            reporter.step(step)
        now[0] = 190.0
        reporter.row({"step": 15, "loss": 1.0})
    lines = [line for line in out.getvalue().splitlines() if "left" in line]
    assert [line.split("  ")[0] for line in lines] == [
        "clips 12/100, 30 min left, 46 min of the run", "clips 14/100, 29 min left, 46 min of the run",
        "clips 15/100, 26 min left, 41 min of the run",
    ]  # fmt: skip


def test_the_progress_line_tells_what_was_dropped(tiny_recipe: Path) -> None:
    from rich.console import Console

    out = io.StringIO()
    with ConsoleReporter(Console(file=out), every=0) as reporter:
        reporter.stage(load_recipe(tiny_recipe, stage="clips"), 2, 2, 0)
        for step, dropped in ((1, 0), (2, 3.0), (3, 1.0)):
            row: dict[str, Any] = {"step": step, "loss": 1.0, "data/dropped": dropped, "tokens_per_second": 5}
            reporter.row(row)
    lines = [line for line in out.getvalue().splitlines() if "loss" in line]
    assert [line.partition("tokens/s")[2].strip() for line in lines] == ["", "3 dropped", "4 dropped"]
