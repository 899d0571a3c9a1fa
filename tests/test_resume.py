"""A run of two ranks that is killed and goes on with three, then with one: no sample is lost, none comes twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingen.data.shards import write_shards
from lingen.media import encode_mp4, encode_picture
from lingen.prepare.index import index_folder
from lingen.run_folder.folder import RunFolder
from tests.helpers.commands import wait_for

RECORDER = '''
"""Trains as `lingen fit` does, and notes the samples of every batch that is trained on."""
import json, os, sys
from lingen.training.denoiser import LinGenModule
from lingen.run import fit

notes, recipe, run, *overrides = sys.argv[1:]
train = LinGenModule.training_step

def note(self, batch, batch_idx):
    line = {"stage": self.recipe.stage, "step": batch.step, "kind": batch.kind, "shape": list(batch.clips.shape[2:]),
            "slots": batch.slots.tolist(), "keys": batch.keys}
    with open(f"{notes}-{os.environ.get('LOCAL_RANK', '0')}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\\n")
    return train(self, batch, batch_idx)

LinGenModule.training_step = note
fit(recipe, overrides, run=run, stage="clips")
'''
STEPS = 48


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """21 clips of three shapes and 13 pictures of two, with a manifest."""
    folder = tmp_path / "clips"
    shapes = [(4, 8, 8), (4, 8, 16), (9, 8, 8)]
    videos = [
        {"__key__": f"v{i:02d}", "mp4": encode_mp4(np.full((*shapes[i % 3], 3), 9 * i, np.uint8), 8), "txt": "a shape"}
        for i in range(21)
    ]
    images = [
        {"__key__": f"i{i}", "png": encode_picture(np.full((*shapes[i % 2][1:], 3), 9 * i, np.uint8)), "txt": "a shape"}
        for i in range(13)
    ]
    write_shards(videos, f"{folder}/video-%d.tar", per_shard=8)
    write_shards(images, f"{folder}/image-%d.tar")
    index_folder(folder, 0)
    return folder


def notes_of(path: Path) -> list[dict[str, Any]]:
    """What the ranks of a part of the run noted; a line that the kill cut is no note."""
    notes = []
    for file in path.parent.glob(f"{path.name}-*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                notes.append(json.loads(line))
            except ValueError:
                continue
    return notes


def checkpoint_of(run: Path) -> int:
    return RunFolder(run).last_step("clips")


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_with_other_ranks_and_workers(
    tiny_recipe: Path, clips: Path, tmp_path: Path
) -> None:
    chance = random.Random()
    seed = chance.getrandbits(32)
    chance.seed(seed)
    print("seed of the kills:", seed)
    (tmp_path / "recorder.py").write_text(RECORDER)
    run = tmp_path / "run"
    overrides = [
        f"data.shards={{image: {clips}, video: {clips}}}", "data.validation.video=null", "data.sizes=[[8, 16]]",
        "data.lengths=[8]", "train.checkpoint_every=1", "train.log_every=100", "sample.prompts=[]",
        f"stages.clips.train.steps={STEPS}",
    ]  # fmt: skip

    def begin(part: int, ranks: int, workers: int) -> subprocess.Popen[bytes]:
        words = [sys.executable, "recorder.py", str(tmp_path / f"part{part}"), str(tiny_recipe), str(run), *overrides]
        words += [f"data.workers={workers}", f"trainer.devices={ranks}"]
        words += ["trainer.strategy=fsdp"] if ranks > 1 else []
        return subprocess.Popen(words, cwd=tmp_path, start_new_session=True)

    starts, ranks = [0], [2, 3, 1]
    for part in range(2):
        process = begin(part, ranks[part], workers=2)
        step = starts[-1] + chance.randint(2, 8)
        wait_for(lambda step=step: checkpoint_of(run) >= step, process)
        time.sleep(chance.random() * 0.3)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        starts.append(checkpoint_of(run))
        assert starts[-2] < starts[-1] < STEPS - 5, "the kill came at no useful time"
    assert begin(2, ranks[2], workers=3).wait(180) == 0

    trained = {}
    for part, (first, last) in enumerate(zip(starts, [*starts[1:], STEPS], strict=True)):
        notes = [note for note in notes_of(tmp_path / f"part{part}") if first <= note["step"] < last]
        assert len(notes) == (last - first) * ranks[part], "a step was trained twice or not at all"
        trained |= {(note["step"], note["slots"][0]): note for note in notes}
    check_nothing_lost_or_repeated([trained[key] for key in sorted(trained)])


def check_nothing_lost_or_repeated(notes: list[dict[str, Any]]) -> None:
    """From what was trained on, in order."""
    assert [note["step"] for note in notes] == sorted(note["step"] for note in notes)
    slots = [slot for note in notes for slot in note["slots"]]
    assert slots == list(range(len(slots)))
    kinds = {note["step"]: note["kind"] for note in notes}
    assert Counter(kinds.values())["video"] == 2 * STEPS // 3
    streams = defaultdict(list)
    for note in notes:
        streams[note["kind"], tuple(note["shape"])] += note["keys"]
    assert {stream: len(set(keys)) for stream, keys in streams.items()} == {
        ("video", (4, 8, 8)): 7, ("video", (4, 8, 16)): 7, ("video", (8, 8, 8)): 7,
        ("image", (1, 8, 8)): 7, ("image", (1, 8, 16)): 6,
    }  # fmt: skip
    for stream, keys in streams.items():
        size = len(set(keys))
        epochs = [keys[i : i + size] for i in range(0, len(keys), size)]
        assert len(epochs) > 1, stream
        for epoch in epochs[:-1]:
            assert len(set(epoch)) == size, f"{stream}: {epoch}"
        assert len(set(epochs[-1])) == len(epochs[-1]), f"{stream}: {epochs[-1]}"
