"""What numbers and weights were made with: versions and the commit."""

import importlib.metadata
import platform
import subprocess
import time


def version_of(package: str) -> str | None:
    """The version of an installed package; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of the libraries on which a run's numbers depend."""
    names = ("lingen", "torch", "lightning", "webdataset", "av", "mamba-ssm", "flash-attn", "triton")
    found = {name: version_of(name) for name in names}
    return {"python": platform.python_version()} | {name: one for name, one in found.items() if one is not None}


def time_now() -> str:
    """The time with its zone, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def git_commit() -> str | None:
    """The commit of the current folder's checkout, with ``+`` for uncommitted changes; None outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
