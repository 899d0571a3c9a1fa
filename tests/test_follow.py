"""Processes of ours end when the one that started them is killed, even by SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

LOADER = """
import sys, time
from lingen.data.datamodule import ClipData
from lingen.data.dataset import Clips
from lingen.recipe import load_recipe

read = Clips.__getitem__

def stuck(self, place):
    time.sleep(600 if place.step else 0)  # a disk that does not answer
    return read(self, place)

Clips.__getitem__ = stuck
data = ClipData(load_recipe(sys.argv[1], ["data.workers=3"], stage="clips"))
batches = iter(data.train_dataloader())
next(batches)
print(*(worker.pid for worker in batches._workers), flush=True)
sys.stdin.read()
"""
POOL = """
import os, sys, time
from lingen.prepare.workers import in_order

def work(item):
    time.sleep(0 if item == 0 else 600)
    return os.getpid()

if __name__ == "__main__":
    for _, pid in in_order(work, range(9), 2, lambda item: 0):
        print(pid, flush=True)
"""


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(("script", "count"), [(LOADER, 3), (POOL, 1)], ids=["loader", "pool"])
def test_they_end_with_their_parent(here: Path, tiny_recipe: Path, script: str, count: int):
    (here / "script.py").write_text(script)
    words = [sys.executable, "script.py", str(tiny_recipe)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == count and all(map(alive, workers))
        process.send_signal(signal.SIGKILL)
        process.wait()
    end = time.monotonic() + 15
    while any(map(alive, workers)):
        assert time.monotonic() < end, "orphans"
        time.sleep(0.1)
