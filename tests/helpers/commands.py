"""The command line in a process of its own, and waiting for what such a process does."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""


def lingen_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "lingen", *words]


def run_command(
    *words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`lingen` with these words to its end, 300 seconds at most; its exit code is for the caller to read."""
    return subprocess.run(lingen_command(*words), capture_output=True, text=True, timeout=300, cwd=cwd, env=env)


def run_python(*words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """What an interpreter of its own prints; it must end well."""
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=300, cwd=cwd, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 120) -> None:
    """Until the condition holds; fails where the process ends before, or after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the process ended before it did what it was waited for"
        assert time.monotonic() < end, f"nothing came in {seconds} seconds"
        time.sleep(0.005)
