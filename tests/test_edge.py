"""At the command line's edge: files and memory that fail are one line with the file and the cure, and no traceback."""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lingen.cli import main
from lingen.cli.edge import line_of
from lingen.data.dataset import Clips
from lingen.media import encode_mp4
from lingen.recipe import load_for_training
from lingen.run import Reporter, fit, fit_curriculum
from tests.helpers.commands import ROOT

FULL = """
import resource, signal, sys
from lingen.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit is an error, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def with_full_disk(limit: int, *words: str) -> subprocess.CompletedProcess[str]:
    """The command where no file may be larger than `limit` bytes."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    full = [sys.executable, "-c", FULL, str(limit), *words]
    return subprocess.run(full, capture_output=True, text=True, timeout=300, env=env, check=False)


def test_a_full_disk_is_one_line_and_leaves_nothing_partial(here: Path, tiny_recipe: Path):
    done = with_full_disk(20_000, "fit", "--recipe", str(tiny_recipe), "--run", "run")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = " ".join(done.stderr.split())
    assert "run/stages/images/step-00000002: File too large. The file is larger than this place" in said
    assert not [path for path in (here / "run").rglob("*") if "partial" in path.name or "step-" in path.name]


def test_packing_onto_a_full_disk_is_one_line_and_leaves_nothing_partial(here: Path):
    """Shards of 30 kB are cut in processes of their own, and moved into one of more than 40 kB."""
    rng = np.random.default_rng(0)
    (here / "films").mkdir()
    for number in range(3):
        film = rng.integers(0, 255, (16, 64, 64, 3), dtype=np.uint8)
        (here / "films" / f"{number}.mp4").write_bytes(encode_mp4(film, 8, exact=True))
        (here / "films" / f"{number}.txt").write_text("noise")
    words = ["data", "pack", "--recipe", "footage_64", "--videos", "films", "--out", "out", "--processes", "2"]
    done = with_full_disk(40_000, *words, "data.frames=8", "data.size=[64,64]")
    lines = [line for line in done.stderr.splitlines() if "File too large" in line]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert "out/" in lines[0] and ".tar: File too large. The file is larger than this place" in lines[0]
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr
    assert not [path for path in (here / "out").rglob("*") if "partial" in path.name]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_line(here: Path, tiny_recipe: Path, capsys):
    (here / "closed").mkdir(mode=0o555)
    assert main(["fit", "--recipe", str(tiny_recipe), "--run", "closed/run"]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "closed" in line


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "No space left on device. The disk is full: free some space, or name another place."),
        (errno.EROFS, "Read-only file system. The place is read-only: name another one."),
        (errno.EACCES, "Permission denied. This user may not: change the permissions, or name another place."),
        (errno.ELOOP, f"{os.strerror(errno.ELOOP)}. Look at the file, or name another one."),
    ],
)
def test_an_error_of_the_system_names_file_and_cure(number: int, told: str):
    args = argparse.Namespace(command="fit", run="runs/x")
    assert line_of(OSError(number, os.strerror(number), "a/b.tar"), args) == f"a/b.tar: {told}"
    assert line_of(OSError(number, os.strerror(number)), args) == f"runs/x: {told}"


def test_a_full_disk_names_the_file_whoever_writes(tmp_path: Path):
    """Python, whose error names no file; safetensors, whose error is none of the operating system's."""
    script = f"""
import errno, resource, signal
from pathlib import Path
import torch
from lingen.files import whole_file
from lingen.weights import write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
folder = Path({str(tmp_path)!r})
def by_python():
    with whole_file(folder / "a.bin") as partial:
        partial.write_bytes(bytes(2000))
def by_safetensors():
    write_tensors(folder / "a.bin", {{"x": torch.zeros(2000)}}, {{}})
for write in (by_python, by_safetensors):
    try:
        write()
    except OSError as error:
        assert error.errno == errno.EFBIG and error.filename == str(folder / "a.bin"), (write, error)
    else:
        raise SystemExit("nothing was raised")
assert not list(folder.iterdir())
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr


def test_memory_that_ran_out_is_one_line(here: Path):
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    args = argparse.Namespace(command="fit")
    for one in (error.value, MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")):
        line = line_of(one, args)
        assert line is not None and line.startswith("Out of memory (") and "lower data.batch" in line
    assert line_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), args) is None


def test_lengths_without_end_and_models_that_are_not_there(here: Path, tiny_recipe: Path, capsys):
    fit(tiny_recipe, run="run", stage="images")
    words = ["sample", "--run", "run", "--prompt", "a", "--out", "a.mp4"]
    assert main([*words, "--seconds", "1000000000"]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "GiB" in one]
    assert line.startswith("A clip of 8,000,000,000 frames of 8x8 takes") and "Take fewer seconds" in line
    assert main(["data", "caption", "nowhere", "--model", "nope", "--out", "out"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path.name for path in here.iterdir() if path.suffix == ".mp4" or path.name == "out"] == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fti"], "There is no command called 'fti'. Did you mean 'fit'? Known: "),
        (["data", "chek"], "There is no command called 'data chek'. Did you mean 'data check'? Known: data "),
        (["qqqqq"], "There is no command called 'qqqqq'. Known: "),
    ],
)
def test_an_unknown_command_is_one_line(words: list[str], told: str, capsys):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)


def test_a_batch_beyond_the_memory_is_said_before_training(here: Path, tiny_recipe: Path):
    """With drawn clips, since so few in shards would starve; `fit` is stopped at its first word."""
    large = ["data.batch.video=100000000", "data.synthetic=shapes", "data.validation.video=[]"]
    large += ["data.shards.image=[]", "data.shards.video=[]"]

    class FirstWord(Exception):
        pass

    class Stops(Reporter):
        def say(self, text: str) -> None:
            raise FirstWord(text)

    with pytest.raises(FirstWord, match=r"stage clips: training takes about .* GiB of this machine; lower data.batch"):
        fit_curriculum(load_for_training(tiny_recipe, large), run="run", reporter=Stops())


def test_a_loader_process_that_is_killed_is_one_line(
    here: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def die(self: Clips, place: object) -> None:
        assert multiprocessing.parent_process() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Clips, "__getitem__", die)
    assert main(["fit", "--recipe", str(tiny_recipe), "--run", "run", "data.workers=1"]) == 1
    error = capsys.readouterr().err
    assert "A loader process has ended (DataLoader worker (pid" in error and "data.workers" in error.splitlines()[-1]
    assert "Traceback" not in error
