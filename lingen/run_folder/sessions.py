"""The sessions of a run, in its run.json: each start of training, and how it ended. Imports no torch.

A session that left no word, because its process was killed, gets one from the next one, or from the script of
`lingen submit`: from what the lock says of its owner and from the signs of life of its ranks."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
from collections.abc import Iterator, Mapping
from typing import Any

from lingen.files import write_json
from lingen.provenance import time_now
from lingen.ranks import heartbeat
from lingen.ranks.signals import REQUEUE
from lingen.ranks.slurm import held_back
from lingen.recipe.text import decode_json
from lingen.run_folder.folder import RunFolder

FINISHED = "finished"
KILLED_WORD = "killed: "
"""Start of how a session ended that left no word."""
IN_VAIN = 3
"""Sessions in a row that may be killed at the same step until the script gives up [ours]."""

Session = dict[str, Any]


def read_sessions(folder: RunFolder) -> list[Session]:
    """Of a run folder, the oldest first; none of a run of an earlier version."""
    return list(_read(folder).get("sessions", []))


def _read(folder: RunFolder) -> dict[str, Any]:
    return dict(decode_json(folder.about.read_bytes()))


def _write(folder: RunFolder, sessions: list[Session], **more: Any) -> None:
    write_json(folder.about, _read(folder) | {"sessions": sessions} | more)


@contextlib.contextmanager
def session(
    folder: RunFolder, *, stage: str, step: int, ranks: int, was: str | None, flop: Mapping[str, float]
) -> Iterator[str]:
    """Inside the block run.json says that the run is being trained, and after it how that ended. Gives the mark of the
    session.

    Args:
        stage, step: that is trained first, and from where.
        was: why the owner before counts as dead, where there was one.
        flop: of an optimiser step of a rank in each stage, by which `lingen status` tells how long the run takes."""
    before = read_sessions(folder)
    if before and before[-1]["how"] in (None, heartbeat.LOST_WORD):
        before[-1] |= {"how": killed(folder, before[-1], before[-1]["how"] or was or "it left no word")}
    mark = secrets.token_hex(4)
    began: Session = {
        "mark": mark, "began": time_now(), "host": heartbeat.host_name(), "ranks": ranks,
        "job": os.environ.get("SLURM_JOB_ID"), "restart": os.environ.get("SLURM_RESTART_COUNT"),
        "stage": stage, "step": step, "ended": None, "how": None,
    }  # fmt: skip
    _write(folder, [*before, began], flop_a_step=_read(folder).get("flop_a_step", {}) | dict(flop))
    how = FINISHED
    try:
        yield mark
    except BaseException as error:
        how = heartbeat.word_of(error)
        if how.startswith(heartbeat.OTHER_WORD):
            how = heartbeat.FAILED_WORD + how.removeprefix(heartbeat.OTHER_WORD)
        raise
    finally:
        with contextlib.suppress(OSError, ValueError):  # what ended the run is told, not this
            now = {"ended": time_now(), "how": how}
            _write(folder, [one | now if one["mark"] == mark else one for one in read_sessions(folder)])


def killed(folder: RunFolder, one: Session, why: str) -> str:
    """How a session ended that left no word: the word of a rank that failed, or `why`, the ranks that were silent
    first, and its nodes that SLURM holds back."""
    beats = heartbeat.read_heartbeats(folder.ranks, one["mark"])
    failed = [(str(beat.ended).removeprefix(heartbeat.FAILED_WORD), beat) for beat in _failed(beats)]
    for word, beat in failed:
        if not word.startswith(heartbeat.HUNG):
            return f"{heartbeat.FAILED_WORD}rank {beat.rank} on {beat.host}: {word}"
    for word, _ in failed:  # of whoever wrote it
        return f"{KILLED_WORD}{word}"
    # Ranks whose last sign is clearly older than that of others, or that left no word where others did.
    youngest = min((beat.age_seconds for beat in beats), default=0.0)
    late = [beat for beat in beats if beat.age_seconds > youngest + 2 * heartbeat.BEAT]
    wordless = [beat for beat in beats if beat.ended is None]
    suspects = late or (wordless if len(wordless) < len(beats) else [])
    told = ", ".join(f"rank {beat.rank} on {beat.host}" for beat in suspects[:4])
    more = f" and {len(suspects) - 4} more" if len(suspects) > 4 else ""
    held = held_back(beat.host for beat in beats) if one["job"] else ""
    silent = f"; silent first: {told}{more}" if suspects else ""
    return f"{KILLED_WORD}{why}{silent}" + (f"; {held}" if held else "")


def _failed(beats: list[heartbeat.Heartbeat]) -> list[heartbeat.Heartbeat]:
    return [beat for beat in beats if beat.ended is not None and beat.ended.startswith(heartbeat.FAILED_WORD)]


def worth_another_start(folder: RunFolder, code: int) -> tuple[bool, str]:
    """Whether a run is worth another start whose ranks have ended so, and why: it is where a signal stopped them, some
    were killed, or they only lost each other, unless the starts before went no further. A session that left no word
    gets one.

    Args:
        code: exit code of srun, above 128 that number and the number of the signal that killed a rank."""
    names = {one.value: one.name for one in signal.Signals}
    ended = f"exit code {code}" + (f" ({names.get(code - 128, f'signal {code - 128}')})" if code > 128 else "")
    sessions = read_sessions(folder) if folder.about.is_file() else []
    job = (os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT"))
    if not sessions or (sessions[-1]["job"], sessions[-1]["restart"]) != job:
        return code != 1, f"{ended}, before it trained"
    last = sessions[-1]
    # srun ends the others by SIGTERM where one fails or loses its node: rank 0 may say that this stopped it.
    beats = heartbeat.read_heartbeats(folder.ranks, last["mark"])
    lost = held_back(beat.host for beat in beats if beat.ended is None) if last["job"] else ""
    if last["how"] is None or last["how"].startswith(heartbeat.LOST_WORD) or _failed(beats) or lost:
        # None was killed: a rank that was stopped may leave before another one is done, which then finds it gone.
        ends = [beat.ended for beat in beats if code == REQUEUE and not lost]
        stopped = [word for word in ends if str(word).startswith(heartbeat.STOPPED_WORD)]
        how = killed(folder, last, ended) if _failed(beats) or not stopped else stopped[0]
        last |= {"ended": time_now(), "how": how}
        _write(folder, sessions)
    how, tail = str(last["how"]), sessions[-IN_VAIN:]
    in_vain = len({(one["stage"], one["step"]) for one in tail}) == 1
    if len(tail) == IN_VAIN and in_vain and all(str(one["how"]).startswith(KILLED_WORD) for one in tail):
        return False, f"{how}; the last {IN_VAIN} starts went no further than step {last['step']}"
    return not how.startswith(heartbeat.FAILED_WORD), how


def unfit_nodes(folder: RunFolder) -> str:
    """Names of the nodes that the preflight of the last session refused, with commas between."""
    how = str(read_sessions(folder)[-1]["how"]) if folder.about.is_file() else ""
    return how.removeprefix(heartbeat.UNFIT_WORD).partition(":")[0] if how.startswith(heartbeat.UNFIT_WORD) else ""
