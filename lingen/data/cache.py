"""Where lingen keeps what it made or fetched, and how a folder appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

BUILDING = ".lingen-building-"
"""Start of the name of a folder that is not finished; one that is a day old was left by a killed process."""


def cache_folder() -> Path:
    """``$LINGEN_CACHE``, else ``$XDG_CACHE_HOME/lingen``, else ``~/.cache/lingen``."""
    if own := os.environ.get("LINGEN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lingen"


def build_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """Fills a new folder beside `folder` and renames it in one step; a `folder` that exists is taken as it is."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{BUILDING}*"):
        if time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=BUILDING, dir=folder.parent))
    try:
        build(work)
        work.chmod(0o755)
        work.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder
