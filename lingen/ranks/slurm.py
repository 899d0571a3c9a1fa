"""What SLURM says of jobs and nodes."""

import subprocess
from collections.abc import Iterable

ANSWER = 10.0
"""Seconds that SLURM has to answer."""


def answer(*command: str) -> str:
    """What a command of SLURM prints; nothing where there is none here, or no answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def waiting(job: str | None) -> str | None:
    """``job 7 waits in the queue (BeginTime)``, or that it runs though it does not train; None where it is over, or
    nobody here knows."""
    told = answer("squeue", "--noheader", f"--jobs={job}", "--format=%T %r").split() if job else []
    if told[:1] == ["PENDING"]:
        return f"job {job} waits in the queue ({' '.join(told[1:])})"
    return f"job {job} runs in SLURM, and does not train now" if told[:1] in (["RUNNING"], ["CONFIGURING"]) else None


def held_back(nodes: Iterable[str]) -> str:
    """``n3 is down (disk)`` of those nodes that SLURM gives to no job, with the reason that somebody noted."""
    named = ",".join(sorted(set(nodes)))
    told = answer("sinfo", "--noheader", "--Node", f"--nodes={named}", "--format=%N|%T|%E") if named else ""
    each = dict.fromkeys(tuple(line.split("|", 2)) for line in told.splitlines() if line.count("|") >= 2)
    return ", ".join(f"{node} is {state} ({why})" for node, state, why in each if state.startswith(("d", "fail")))
