"""What SLURM says of a job."""

import shutil
import subprocess

ANSWER = 10.0
"""Seconds that SLURM has to answer."""


def answer(*command: str) -> str:
    """What a command of SLURM prints; nothing where there is none here, or no answer."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def waiting(job: str | None) -> str | None:
    """``job 7 waits (BeginTime)`` where a job stands in the queue; None where it does not, or nobody here knows."""
    told = answer("squeue", "--noheader", f"--jobs={job}", "--format=%T %r").split() if job else []
    return f"job {job} waits in the queue ({' '.join(told[1:])})" if told[:1] == ["PENDING"] else None
