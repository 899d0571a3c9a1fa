"""Checkpoints: whole or not there, read before they are trusted, and the same run afterwards."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lingen.cli import main
from lingen.run import fit
from lingen.run_folder import saver as saving
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.intact import ABOUT, BrokenError, Checkpoint, check_intact, newest_intact
from lingen.run_folder.saver import Saver
from lingen.run_folder.storage import pieces_of
from lingen.weights import read_run, read_weights
from tests.helpers.commands import ROOT, run_python

SHORT = ["train.checkpoint_every=1", "train.log_every=1", "sample.prompts=[]", "data.workers=0"]


def tensors(scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Of several types and shapes; one without axes, one without elements."""
    generator = torch.Generator().manual_seed(0)
    return {
        "raw.matrix": scale * torch.randn(7, 5, generator=generator),
        "raw.double": scale * torch.randn(3, 2, 2, generator=generator, dtype=torch.float64),
        "raw.half": (scale * torch.randn(11, generator=generator)).bfloat16(),
        "raw.scalar": torch.tensor(3.5 * scale),
        "raw.empty": torch.zeros(0, 4),
        "raw.count": torch.tensor([1, 2, 3]),
    }


@pytest.mark.parametrize("world", [1, 2, 3, 4, 100])
def test_every_row_is_written_by_one_rank(world: int):
    held = tensors()
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in held}
    sizes = []
    for rank in range(world):
        pieces = pieces_of(held, rank, world)
        sizes.append(sum(piece.rows.nbytes for piece in pieces))
        for piece in pieces:
            found[piece.name].append((piece.start, piece.stop))
            assert torch.equal(
                piece.rows, held[piece.name][piece.start : piece.stop] if piece.rows.ndim else piece.rows
            )
    for name, spans in found.items():
        rows = held[name].shape[0] if held[name].ndim else 1
        assert [row for span in sorted(spans) for row in range(*span)] == list(range(rows)), name
    assert sum(sizes) == sum(value.nbytes for value in held.values())
    assert max(sizes) <= sum(sizes) / world + 20 + 32  # at most a row of each kind more than a fair share


def save(folder: RunFolder, step: int, scale: float = 1.0, **how: int) -> None:
    saver = Saver(folder, "one", how.get("keep", 2), how.get("keep_every"))
    saver.prepare(tensors(), pinned=False)
    saver.begin(step, tensors(scale), {"step": step}, {"seen": step})
    saver.finish()


def test_what_is_written_is_read_again_also_in_parts(tmp_path: Path):
    folder = RunFolder(tmp_path)
    save(folder, 5)
    stored = Checkpoint(folder.checkpoint("one", 5))
    assert stored.state == {"step": 5} and json.loads(folder.ledger.read_text()) == {"seen": 5}
    for name, value in tensors().items():
        read = stored.read(name)
        assert read.dtype == value.dtype and torch.equal(read, value), name
    assert torch.equal(stored.read("raw.matrix", 2, 4), tensors()["raw.matrix"][2:4])
    (file,) = folder.checkpoint("one", 5).glob("*.safetensors")
    assert load_file(file)["raw.matrix"].shape == (7, 5)  # any reader of safetensors takes it


def test_the_five_lines_of_the_page_read_one(tiny_run: Path):
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    (checkpoint,) = (tiny_run / "stages" / "clips").glob("step-*")
    found: dict[str, Any] = {}
    exec(code.replace("runs/x/stages/clips/step-00000500", str(checkpoint)), found)
    kept = read_weights(RunFolder(tiny_run).weights("clips"), "raw")["model.patchify.weight"]
    assert torch.equal(found["weight"], kept)


def test_numbers_are_those_of_the_moment_it_began(tmp_path: Path):
    folder, held = RunFolder(tmp_path), tensors()
    saver = Saver(folder, "one", 2)
    assert saver.prepare(held, pinned=False) is None
    saver.begin(1, held, {}, {})
    for value in held.values():
        value.zero_()
    saver.finish()
    assert torch.equal(Checkpoint(folder.checkpoint("one", 1)).read("raw.matrix"), tensors()["raw.matrix"])


def test_the_last_ones_and_multiples_stay(tmp_path: Path):
    folder = RunFolder(tmp_path)
    for step in range(1, 10):
        save(folder, step, keep=2, keep_every=4)
    assert [path.name for path in folder.checkpoints("one")] == [f"step-{n:08d}" for n in (4, 8, 9)]
    assert sorted(path.name for path in (tmp_path / "stages" / "one").iterdir()) == [
        path.name for path in folder.checkpoints("one")
    ]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def shard_of(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.safetensors"))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda at: cut(shard_of(at)), "bytes in place of"),
    "flipped": (lambda at: flip(shard_of(at)), "holds other bytes than were written"),
    "empty": (lambda at: shard_of(at).write_bytes(b""), "has 0 bytes in place of"),
    "missing file": (lambda at: shard_of(at).unlink(), "safetensors is missing"),
    "missing json": (lambda at: (at / ABOUT).unlink(), "it has no checkpoint.json"),
    "empty json": (lambda at: (at / ABOUT).write_bytes(b""), "checkpoint.json is damaged"),
    "cut json": (lambda at: cut(at / ABOUT), "checkpoint.json is damaged"),
    "changed json": (
        lambda at: (at / ABOUT).write_text((at / ABOUT).read_text().replace('"step": 6', '"step": 9')),
        "checkpoint.json was changed or damaged",
    ),
    "empty folder": (lambda at: [file.unlink() for file in at.iterdir()], "it has no checkpoint.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_one_is_passed_over_and_the_one_before_taken(tmp_path: Path, name: str):
    folder, (damage, why) = RunFolder(tmp_path), DAMAGE[name]
    save(folder, 5)
    save(folder, 6, 2.0)
    assert newest_intact(folder, "one") == (folder.checkpoint("one", 6), [])
    damage(folder.checkpoint("one", 6))
    found, (passed, instead) = newest_intact(folder, "one")
    assert found == folder.checkpoint("one", 5)
    assert passed.startswith(f"{folder.checkpoint('one', 6)} is passed over: ") and why in passed
    assert instead == "stage one goes on from step 5 instead"
    save(folder, 6)  # what is trained again takes its place
    assert newest_intact(folder, "one") == (folder.checkpoint("one", 6), [])


KILLED = """
import os, sys
from pathlib import Path
import torch
from lingen.run_folder import saver as saving
from lingen.run_folder.folder import RunFolder, step_of
from lingen.run_folder.intact import Checkpoint, newest_intact
from lingen.run_folder.saver import Saver

CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")
folder = RunFolder(Path("run"))

def save(step):
    tensors = {"raw.a": torch.full((9, 4), float(step)), "raw.b": torch.full((3,), step)}
    saver = Saver(folder, "one", 2)
    saver.prepare(tensors, pinned=False)
    saver.begin(step, tensors, {"step": step}, {"seen": step})
    saver.finish()

def killed_at(number):
    \"\"\"Whether a process that saves step 7 is killed at its so-manieth call; a write is done by half.\"\"\"
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    left = number
    def counting(name, call):
        def counted(*args, **how):
            nonlocal left
            left -= 1
            if left == 0:
                if name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                os._exit(9)
            return call(*args, **how)
        return counted
    for name in CALLS:
        setattr(os, name, counting(name, getattr(os, name)))
    try:
        save(7)
        os._exit(0)
    finally:
        os._exit(1)

save(5)
save(6)
number, ends = 1, []
while killed_at(number):
    path, lines = newest_intact(folder, "one")
    assert not lines and path is not None, lines
    ends.append(step_of(path))
    assert (Checkpoint(path).read("raw.a") == ends[-1]).all()
    save(ends[-1] + 1)  # the next start goes on
    there = sorted(one.name for one in (folder.path / "stages" / "one").iterdir())
    assert there == [f"step-{step:08d}" for step in (ends[-1], ends[-1] + 1)], (number, there)
    for one in folder.checkpoints("one"):
        os.rename(one, one.with_name(one.name + ".partial-old"))
    save(5)
    save(6)
    number += 1
assert set(ends) == {6, 7} and ends == sorted(ends), ends
print(number)
"""


def test_a_kill_at_any_call_leaves_what_was_complete(tmp_path: Path):
    assert int(run_python("-c", KILLED, cwd=tmp_path)) > 15


def test_training_goes_on_while_a_slow_disk_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The next one waits for it; a failure is told where it is waited for, and leaves nothing."""
    folder, held, free = RunFolder(tmp_path), tensors(), threading.Event()
    write = saving.write_file

    def slow(path: Path, chunks: Any) -> tuple[int, str]:
        assert threading.current_thread() is threading.main_thread() or free.wait(60)
        return write(path, chunks)

    monkeypatch.setattr(saving, "write_file", slow)
    saver = Saver(folder, "one", 2)
    saver.prepare(held, pinned=False)
    assert not saver.is_writing
    saver.begin(1, held, {}, {})
    assert saver.is_writing and not folder.checkpoints("one")
    threading.Timer(0.2, free.set).start()
    saver.begin(2, held, {}, {})
    assert [path.name for path in folder.checkpoints("one")] == ["step-00000001"]
    saver.finish()
    assert [path.name for path in folder.checkpoints("one")] == ["step-00000001", "step-00000002"]

    def full(path: Path, chunks: Any) -> tuple[int, str]:
        path.write_bytes(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(saving, "write_file", full)
    saver.begin(3, held, {}, {})
    with pytest.raises(OSError, match=r"No space left on device: '.*step-00000003'$"):
        saver.finish()
    assert sorted(path.name for path in (tmp_path / "stages" / "one").iterdir()) == ["step-00000001", "step-00000002"]


def test_without_room_for_a_copy_it_is_written_at_once_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, held = RunFolder(tmp_path), tensors()
    monkeypatch.setattr(saving, "memory_left", lambda: 100)
    saver = Saver(folder, "one", 2)
    assert "checkpoints are written while training waits: a copy of " in str(saver.prepare(held, pinned=False))
    saver.begin(1, held, {}, {})
    assert torch.equal(Checkpoint(folder.checkpoint("one", 1)).read("raw.matrix"), tensors()["raw.matrix"])


def test_no_damage_goes_unseen(tmp_path: Path):
    """Whatever happens to a file of it, a checkpoint is refused, or holds what was written."""
    folder, chance = RunFolder(tmp_path), Random(0)
    save(folder, 5)
    path, refused = folder.checkpoint("one", 5), 0
    files = {file: file.read_bytes() for file in path.iterdir()}
    for _ in range(400):
        file = chance.choice(sorted(files))
        data = bytearray(files[file])
        start = chance.randrange(len(data))
        how = chance.choice(["flip", "cut", "zeros", "insert", "repeat"])
        if how == "flip":
            data[start] ^= 1 << chance.randrange(8)
        elif how == "cut":
            del data[start:]
        elif how == "zeros":
            data[start : start + 512] = bytes(len(data[start : start + 512]))
        else:
            data[start:start] = data[:start] if how == "repeat" else bytes([chance.randrange(256)])
        file.write_bytes(data)
        try:
            check_intact(path)
        except BrokenError:
            refused += 1
        else:  # white space of the JSON file
            assert Checkpoint(path).state == {"step": 5} and file.name == ABOUT
        file.write_bytes(files[file])
    assert refused > 350
    check_intact(path)


def test_a_disk_that_fills_up_keeps_what_was_complete(tiny_recipe: Path, tmp_path: Path, capsys):
    """A file system of its own, with room for two checkpoints and a half."""
    overrides = [*SHORT, "data.shards.video=[]", "data.mix.video=0", "stages.images.train.steps=6"]
    words = ["fit", "--recipe", str(tiny_recipe), "--stage", "images", *overrides]
    straight = RunFolder(fit(tiny_recipe, overrides, run=tmp_path / "straight", stage="images"))
    size = sum(file.stat().st_size for file in straight.checkpoints("images")[-1].iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size) + 40_000}", "none", str(disk)]
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(mounted, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        assert main([*words, "--run", str(disk / "run")]) == 1
        folder = RunFolder(disk / "run")
        (line,) = [one for one in capsys.readouterr().err.splitlines() if "No space left on device" in one]
        assert str(disk) in line  # a checkpoint, or what training wrote at that moment
        assert [path.name for path in (disk / "run" / "stages" / "images").iterdir() if "partial" in path.name] == []
        found, passed_over = newest_intact(folder, "images")
        assert found == folder.checkpoint("images", 2) and not passed_over
        subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(disk)], check=True)
        assert main([*words, "--run", str(disk / "run")]) == 0
        for name, value in read_weights(straight.weights("images"), "raw").items():
            assert torch.equal(value, read_weights(folder.weights("images"), "raw")[name]), name
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_finished_weights_that_are_cut_off_are_named_and_their_stage_ends_anew(tiny_recipe: Path, here: Path, capsys):
    words = ["fit", "--recipe", str(tiny_recipe), "--run", "run", "--stage", "images", *SHORT]
    assert main(words) == 0
    weights = RunFolder(Path("run")).weights("images")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"{weights}: it is cut off" in said and "Delete it, and `lingen fit` ends stage 'images' anew" in said
    weights.unlink()
    assert main(words) == 0 and weights.read_bytes() == whole


def test_without_a_whole_one_the_stage_begins_again(tiny_recipe: Path, here: Path, capsys):
    words = ["fit", "--recipe", str(tiny_recipe), "--run", "run", "--stage", "images", *SHORT]
    assert main(words) == 0
    straight = read_weights(RunFolder(Path("run")).weights("images"), "raw")
    RunFolder(Path("run")).weights("images").unlink()
    for checkpoint in RunFolder(Path("run")).checkpoints("images"):
        flip(shard_of(checkpoint))
    assert main(words) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert (
        said.count("is passed over:") == 2 and "stage images has no whole checkpoint left, so it begins again" in said
    )
    for name, value in read_weights(RunFolder(Path("run")).weights("images"), "raw").items():
        assert torch.equal(value, straight[name]), name


def test_a_run_goes_on_from_the_one_before_as_if_nothing_had_been(tiny_recipe: Path, tmp_path: Path, monkeypatch):
    """And nothing is unpickled on the way."""
    straight = RunFolder(fit(tiny_recipe, SHORT, run=tmp_path / "straight"))
    fit(tiny_recipe, [*SHORT, "stages.clips.train.steps=4"], run=tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    flip(shard_of(folder.checkpoint("clips", 4)))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something is unpickled")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr("torch.load", refuse)
    fit(tiny_recipe, SHORT, run=folder.path)
    about = read_run(folder.about)
    assert [one["step"] for one in (about["history"][-1], about["sessions"][-1])] == [3, 3], "the damaged one's is 4"
    for copy in ("raw", "averaged"):
        for name, value in read_weights(straight.weights("clips"), copy).items():
            assert torch.equal(value, read_weights(folder.weights("clips"), copy)[name]), name
    ends = [Checkpoint(one.checkpoints("clips")[-1]) for one in (straight, folder)]
    for name in ends[0].tensors:
        assert torch.equal(ends[0].read(name), ends[1].read(name)), name
    assert ends[0].state == ends[1].state


def test_the_earlier_form_is_passed_over_where_it_is_damaged(tmp_path: Path):
    folder = RunFolder(shutil.copytree(Path(__file__).parent / "tools" / "old_run", tmp_path / "run"))
    (old,) = folder.checkpoints("videos")
    assert newest_intact(folder, "videos") == (old, [])
    data = old.read_bytes()
    half = len(data) // 2
    for broken in (b"", data[:half], data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]):
        old.write_bytes(broken)
        found, lines = newest_intact(folder, "videos")
        assert found is None and f"{old} is passed over: " in lines[0], lines
