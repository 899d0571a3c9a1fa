"""The sessions of a run, in its run.json: each start of training, and how it ended. Imports no torch.

A session that left no word, because its process was killed, gets one from the next one, or from the script of
`lingen submit`: from what the lock says of its owner and from the signs of life of its ranks.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Iterator
from typing import Any

from lingen.files import write_json
from lingen.recipe.text import decode_json
from lingen.training.folder import RunFolder
from lingen.training.heartbeat import BEAT, Beat, host_name, read_beats, word_of

FINISHED = "finished"
FAILED_WORD = "failed: "
"""Start of the word of an error, which would come again."""
IN_VAIN = 3
"""Sessions in a row that may be killed at the same step until the script gives up [ours]."""

Session = dict[str, Any]


def read_sessions(folder: RunFolder) -> list[Session]:
    """Of a run folder, the oldest first; none of a run of an earlier version."""
    return list(_read(folder).get("sessions", []))


def _read(folder: RunFolder) -> dict[str, Any]:
    return dict(decode_json(folder.about.read_bytes()))


def _write(folder: RunFolder, sessions: list[Session]) -> None:
    write_json(folder.about, _read(folder) | {"sessions": sessions})


@contextlib.contextmanager
def session(folder: RunFolder, *, stage: str, ranks: int, was: str | None) -> Iterator[str]:
    """Inside the block run.json says that the run is being trained, and after it how that ended. Gives the mark of the
    session.

    Args:
        stage: that is trained first.
        was: why the owner before counts as dead, where there was one.
    """
    before = read_sessions(folder)
    if before and before[-1]["how"] is None:
        before[-1] |= {"how": killed(folder, before[-1], was or "it left no word")}
    mark = secrets.token_hex(4)
    began: Session = {
        "mark": mark, "began": _now(), "host": host_name(), "ranks": ranks, "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT"), "stage": stage, "step": folder.last_step(stage),
        "ended": None, "how": None,
    }  # fmt: skip
    _write(folder, [*before, began])
    how = FINISHED
    try:
        yield mark
    except BaseException as error:
        how = word_of(error)
        raise
    finally:
        with contextlib.suppress(OSError, ValueError):  # what ended the run is told, not this
            _end(folder, mark, how)


def _end(folder: RunFolder, mark: str, how: str) -> None:
    now = {"ended": _now(), "how": how}
    _write(folder, [one | now if one["mark"] == mark else one for one in read_sessions(folder)])


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def killed(folder: RunFolder, one: Session, why: str) -> str:
    """How a session ended that left no word: the word of a rank that failed, or `why` and the ranks that were silent
    first."""
    beats = read_beats(folder.ranks, one["mark"])
    for beat in beats:
        if beat.ended is not None and beat.ended.startswith(FAILED_WORD):
            return f"{FAILED_WORD}rank {beat.rank} on {beat.host}: {beat.ended.removeprefix(FAILED_WORD)}"
    first = silent_first(beats)
    told = ", ".join(f"rank {beat.rank} on {beat.host}" for beat in first[:4])
    more = f" and {len(first) - 4} more" if len(first) > 4 else ""
    return f"killed: {why}" + (f"; silent before the others: {told}{more}" if first else "")


def silent_first(beats: list[Beat]) -> list[Beat]:
    """Ranks whose last sign is more than a beat older than that of the last one."""
    youngest = min((beat.age for beat in beats), default=0.0)
    return [beat for beat in beats if beat.age > youngest + 2 * BEAT]


def worth_another_start(folder: RunFolder, code: int) -> tuple[bool, str]:
    """Whether a run is worth another start whose ranks ended with a code above 128, and why. A session that left no
    word gets one.

    Args:
        code: exit code of srun: 128 and the number of the signal that killed a rank.
    """
    sessions = read_sessions(folder) if folder.about.is_file() else []
    if not sessions:
        return False, f"it ended with exit code {code} before it trained"
    last = sessions[-1]
    if last["how"] is None:
        last |= {"ended": _now(), "how": killed(folder, last, f"exit code {code} ({_name_of(code - 128)})")}
        _write(folder, sessions)
    how = str(last["how"])
    tail = sessions[-IN_VAIN:]
    if how.startswith(FAILED_WORD):
        return False, how
    if len(tail) == IN_VAIN and all(str(one["how"]).startswith("killed") for one in tail):
        if len({(one["stage"], one["step"]) for one in tail}) == 1:
            return False, f"{how}; the last {IN_VAIN} starts went no further than step {last['step']}"
    return True, how


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
