"""Kills training at moments of chance (everything, one rank, a loader worker) and gives the same command again, until
it is through: weights and used samples have to be those of a run that nobody disturbed, bit for bit.

The moments and the victims follow from the seed; what a machine is doing then does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from lingen.run_folder.folder import RunFolder
from lingen.weights import hash_tensors, read_weights
from tests.helpers.commands import lingen_command
from tests.helpers.tiny import write_recipe, write_shapes

RANKS = 2
STAGES = {"images": 4, "clips": 9}
"""Stage -> its steps."""
VICTIMS = ("everything", "a rank", "a loader worker")
SECONDS = 180
"""After which a start that was killed in part, or not at all, counts as one that does not end."""
RECORDER = '''
"""A plug-in that notes the samples of every batch that is trained on."""
import json, os
from lingen.training.denoiser import LinGenModule

train = LinGenModule.training_step

def note(self, batch, batch_idx):
    line = [self.recipe.stage, batch.step, self.global_rank, batch.kind, batch.slots.tolist(), list(batch.keys)]
    with open(f"notes-{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\\n")
    return train(self, batch, batch_idx)

LinGenModule.training_step = note
'''

Note = tuple[tuple[str, int, int], Any]
"""(stage, step, rank), and what was trained on there."""


@dataclass
class Report:
    """What the kills led to."""

    kills: Counter[str] = field(default_factory=Counter)
    """Victim -> how often."""
    finished: int = 0
    """Runs that were killed on their way and then went to their end."""
    failures: list[str] = field(default_factory=list)


def kill(folder: Path, seed: int, times: int, strategy: str = "ddp") -> Report:
    """Kills `times` times in all, in as many runs as that takes.

    Args:
        folder: is made; holds the shards, the undisturbed run and the last one that was killed.
        strategy: of the ranks.
    """
    folder.mkdir(parents=True)
    (folder / "recorder.py").write_text(RECORDER)
    write_recipe(folder / "tiny.yaml", write_shapes(folder / "shards"))
    report, chance, began = Report(), Random(seed), time.monotonic()
    start = Start(folder, "straight", strategy)
    if start.end() != 0:
        report.failures.append(f"the undisturbed run {start.told()}")
        return report
    length, wanted = time.monotonic() - began, (weights_of(folder / "straight", STAGES), notes_of(folder))
    while report.kills.total() < times and not report.failures:
        shutil.rmtree(folder / "killed", ignore_errors=True)
        for notes in folder.glob("notes-*"):
            notes.unlink()
        _one_run(folder, strategy, chance, length, times, report)
        if not report.failures:
            report.finished += 1
            report.failures += differences(folder, STAGES, *wanted)
    return report


def _one_run(folder: Path, strategy: str, chance: Random, length: float, times: int, report: Report) -> None:
    """One run to its end, with a kill in each of its starts, as long as there are any to be had."""
    while True:
        start, killed = Start(folder, "killed", strategy), False
        if report.kills.total() < times:
            victim, moment = chance.choice(VICTIMS), chance.uniform(0.1, 0.9) * length
            killed = start.kill(victim, moment, chance)
            report.kills[victim] += killed
        code = start.end()
        if code == 0:
            return
        if code is None or not killed or "Traceback" in start.log.read_text():
            report.failures.append(f"after {dict(report.kills)} a start {start.told()}")
            return


class Start:
    """One start of the command, in a session of its own."""

    def __init__(self, folder: Path, run: str, strategy: str):
        self.log, self.code = folder / "log.txt", None
        words = [
            "fit", "--recipe", "tiny.yaml", "--run", run, "--import", "recorder", f"trainer.devices={RANKS}",
            f"trainer.strategy={strategy}", "data.workers=1", "data.batch={image: 1, video: 1}",
            "train.checkpoint_every=2", "train.log_every=1",
            *(f"stages.{name}.train.steps={steps}" for name, steps in STAGES.items()),
        ]  # fmt: skip
        paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                lingen_command(*words), cwd=folder, env=os.environ | {"PYTHONPATH": paths}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def kill(self, victim: str, moment: float, chance: Random) -> bool:
        """Kills the victim after so many seconds, or as soon as there is one; False where all is over before."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(moment)
        while self.process.poll() is None:
            if victim == "everything":
                os.killpg(self.process.pid, signal.SIGKILL)
                return True
            ranks, workers = processes_of(self.process.pid)
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(chance.choice(ranks if victim == "a rank" else workers), signal.SIGKILL)
                return True
            time.sleep(0.05)
        return False

    def end(self) -> int | None:
        """The exit code; None where it had to be ended. Nothing is left of it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.code = self.process.wait(SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return self.code

    def told(self) -> str:
        what = f"did not end within {SECONDS} s" if self.code is None else f"ended with {self.code}"
        return f"{what}, and said: {self.log.read_text()[-2000:]}"


def processes_of(session: int) -> tuple[list[int], list[int]]:
    """The ranks of a session, and their loader workers: forks, which show the environment of the rank that made
    them."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _, parent, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session:
                parents[int(stat.parent.name)] = int(parent)
    workers = [pid for pid, parent in parents.items() if parent in parents and _started(pid) == _started(parent)]
    return sorted(set(parents) - set(workers)), sorted(workers)


def _started(pid: int) -> bytes:
    """The command and the environment that a process was started with."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def weights_of(run: Path, stages: Iterable[str]) -> dict[str, str]:
    """``stage copy`` -> hash of the finished weights."""
    folder = RunFolder(run)
    return {
        f"{stage} {copy}": hash_tensors(read_weights(folder.weights(stage), copy))
        for stage in stages
        for copy in ("raw", "averaged")
    }


def notes_of(folder: Path) -> list[Note]:
    """What every process noted; a line that a kill cut is no note."""
    found = []
    for file in folder.glob("notes-*.jsonl"):
        for line in file.read_text().splitlines():
            with contextlib.suppress(ValueError):
                stage, step, rank, *used = json.loads(line)
                found.append(((stage, step, rank), used))
    return found


def differences(folder: Path, stages: Iterable[str], weights: dict[str, str], notes: list[Note]) -> list[str]:
    """Where the run ``killed`` is not the run ``straight``, of which weights and notes are given. A step may be trained
    again, on the same samples."""
    wanted, differs = dict(notes), []
    found = notes_of(folder)
    differs += [
        f"{place} was trained on {used}, not on {wanted.get(place)}"
        for place, used in found
        if used != wanted.get(place)
    ]
    differs += [f"{place} was never trained" for place in wanted.keys() - dict(found).keys()]
    ledgers = [json.loads((folder / run / "ledger.json").read_text()) for run in ("straight", "killed")]
    differs += [f"the ledgers differ: {ledgers}"] if ledgers[0] != ledgers[1] else []
    other = weights_of(folder / "killed", stages)
    return differs + [f"the weights of {name} differ" for name in weights if other[name] != weights[name]]
