"""The main recipe, shrunken, on two nodes of a real SLURM: signalled at moments of chance, one rank alone or all, and
started again until it is through. Weights and used samples have to be those of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tests.helpers.commands import ROOT, lingen_command
from tests.helpers.slurm import Cluster, slurm
from tests.helpers.small_t2v import write_small_t2v
from tests.soak.kill import RECORDER, SECONDS, Report, differences, notes_of, weights_of

STAGES = ("t2i_256", "t2v_256_17s", "t2v_512_17s", "t2v_512_34s", "t2v_512_68s", "quality")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
WHO = ("one rank", "all ranks")
REQUEUE = 75
"""Exit code of a run that wants to go on."""


def preempt(folder: Path, seed: int, times: int) -> Report:
    """Signals `times` times in all, in as many runs as that takes; `Report.kills` counts them by who got one.

    Args:
        folder: is made; holds weights, shards, the undisturbed run and the last disturbed one.
    """
    folder.mkdir(parents=True)
    (folder / "recorder.py").write_text(RECORDER)
    write_small_t2v(folder)
    report, chance = Report(), Random(seed)
    with slurm(nodes=2) as cluster:
        began = time.monotonic()
        code, told = _end(_begin(cluster, folder, "straight"))
        if code != 0:
            report.failures.append(f"the undisturbed run ended with {code}: {told}")
            return report
        length = time.monotonic() - began
        wanted = weights_of(folder / "straight", STAGES), notes_of(folder)
        while report.kills.total() < times and not report.failures:
            shutil.rmtree(folder / "killed", ignore_errors=True)
            for notes in folder.glob("notes-*"):
                notes.unlink()
            _one_run(cluster, folder, chance, length, times, report)
            if not report.failures:
                report.finished += 1
                report.failures += differences(folder, STAGES, *wanted)
    return report


def _one_run(cluster: Cluster, folder: Path, chance: Random, length: float, times: int, report: Report) -> None:
    """One run to its end, with a signal in each of its starts, as long as there are any to be had."""
    while True:
        process, sent = _begin(cluster, folder, "killed"), False
        if report.kills.total() < times:
            who, moment = chance.choice(WHO), chance.uniform(0.05, 0.9) * length
            sent = _signalled(process, who, moment, chance)
            report.kills[who] += sent
        code, told = _end(process)
        if code == 0:
            return
        if code != REQUEUE or not sent or "Traceback" in told:
            report.failures.append(f"after {dict(report.kills)} a start ended with {code}: {told}")
            return


def _begin(cluster: Cluster, folder: Path, run: str) -> subprocess.Popen[str]:
    words = lingen_command("fit", "--recipe", "small.yaml", "--run", run, "--import", "recorder")
    paths = os.pathsep.join([str(folder), str(ROOT)])
    return cluster.begin("srun", "-N2", "-n2", f"--chdir={folder}", *words, PYTHONPATH=paths)


def _end(process: subprocess.Popen[str]) -> tuple[int | None, str]:
    """Exit code, and what was said; None where it had to be ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        told = process.communicate(timeout=5 * SECONDS)[1]
        return process.returncode, told[-3000:]
    process.kill()
    return None, process.communicate()[1][-3000:]


def _signalled(process: subprocess.Popen[str], who: str, moment: float, chance: Random) -> bool:
    """Sends the signal after so many seconds; False where all is over before."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    number = chance.choice(SIGNALS)
    while process.poll() is None:
        ranks = sorted(_ranks())
        if len(ranks) == 2:
            for pid in ranks if who == "all ranks" else [chance.choice(ranks)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            return True
        time.sleep(0.05)
    return False


def _ranks() -> Iterator[int]:
    """The tasks of SLURM that train here and listen to signals, without the processes that these have made."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            is_task = b"SLURM_PROCID=" in (folder / "environ").read_bytes() and b"killed" in words
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            is_fork = (Path("/proc") / parent / "cmdline").read_bytes().split(b"\0") == words
            caught = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("SigCgt"))
            listens = int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1
            if is_task and not is_fork and listens and words[0] != b"srun":
                yield int(folder.name)
