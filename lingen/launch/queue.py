"""What SLURM says of a job."""

import shutil
import subprocess

ANSWER = 10.0
"""Seconds that SLURM has to answer."""


def waiting(job: str | None) -> str | None:
    """``job 7 waits (BeginTime)`` where a job stands in the queue; None where it does not, or nobody here knows."""
    if not job or shutil.which("squeue") is None:
        return None
    try:
        command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T %r"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER, check=False).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"job {job} waits in the queue ({' '.join(told[1:])})" if told[:1] == ["PENDING"] else None
