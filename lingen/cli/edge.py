"""The edge of the command line: what went wrong with files and memory is one line with the file and the cure."""

import argparse
import errno
import os
import re
import sys
from typing import Any

from lingen.ranks.environment import here, is_lost_rank

CURES = {
    errno.ENOSPC: "The disk is full: free some space, or name another place",
    errno.EDQUOT: "Your share of the disk is used up: free some space, or name another place",
    errno.EFBIG: "The file is larger than this place or your limits allow (`ulimit -f`): name another place",
    errno.EROFS: "The place is read-only: name another one",
    errno.EACCES: "This user may not: change the permissions, or name another place",
    errno.EPERM: "This user may not: change the permissions, or name another place",
    errno.ENOENT: "It is not there: correct the path",
    errno.ENOTDIR: "A file stands where a folder is expected: correct the path",
    errno.EISDIR: "A folder stands where a file is expected: correct the path",
    errno.EMFILE: "Too many files are open: raise `ulimit -n`",
    errno.EIO: "The disk does not read or write: look at it, or name another place",
}  # fmt: skip
"""Error numbers of the operating system -> what helps."""
ALLOCATIONS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
"""Words in errors of torch that mean that memory ran out."""
LOADER_ENDED = r"DataLoader worker \(pid.*?\) (exited unexpectedly|is killed by signal: .*)"
"""What torch says where a process that reads samples was killed."""
LESS_MEMORY = {
    "fit": "lower data.batch and raise train.accumulate instead, set model.checkpointing=true, or take a smaller size",
    "sample": "take a smaller --size or fewer --seconds, or sample.guidance_batch=false in the recipe",
    "decode": "take --stream tiled, or a smaller --tile",
}
"""Command -> what helps where memory ran out."""


class TellsOfTorch:
    """A finder for `sys.meta_path` that finds nothing: it says when torch is imported, which takes its time."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name == "torch":
            print("loading PyTorch ...", file=sys.stderr, flush=True)


def line_of(error: BaseException, args: argparse.Namespace | None) -> str | None:
    """One line for an error of files, of memory or of a killed loader process, with the cure; None for any other error.
    `args`: of the command; its `out` or `run` names the place where the error does not."""
    by_torch = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in ALLOCATIONS)
    if by_torch or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        command = getattr(args, "command", "")
        cure = LESS_MEMORY.get(command, "give it less at a time, or a machine with more memory")
        said = " ".join(str(error).split(". ")[0].split())[:160].rstrip(".") or type(error).__name__
        return f"Out of memory ({said}): {cure}."
    if is_lost_rank(error):
        told = "Another rank has ended, so the run ends. What that one said, and its launcher, tell why."
        return told if here().rank == 0 and here().by != "lingen" else ""  # whoever started that rank tells
    if isinstance(error, RuntimeError) and (found := re.match(LOADER_ENDED, str(error))):
        return (
            f"A loader process has ended ({found[0]}), killed perhaps because the machine's memory or /dev/shm "
            "ran out: lower data.workers. The same command goes on from the last checkpoint."
        )
    if isinstance(error, OSError) and error.errno is not None:
        named = error.filename or getattr(args, "out", None) or getattr(args, "run", None)
        what = error.strerror or os.strerror(error.errno)
        cure = CURES.get(error.errno, "Look at the file, or name another one")
        place = f"{named[:300]}{'...' * (len(named) > 300)}: " if isinstance(named, str) else ""
        return f"{place}{what}. {cure}."
    return None
