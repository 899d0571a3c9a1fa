"""What a run folder tells of its run: how far it is, whether it is alive, and why it stopped. Imports no torch."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from lingen.ranks.heartbeat import BEAT, FAILED_WORD, LOST_WORD, SILENT, Heartbeat, read_heartbeats
from lingen.ranks.slurm import waiting
from lingen.recipe.errors import RecipeError
from lingen.recipe.text import decode_json
from lingen.run_folder import lock
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.sessions import FINISHED, KILLED_WORD, killed, read_sessions

ROWS = 20
"""Rows of metrics.csv over which the speed is a mean."""
SLOWEST = 3
"""Ranks that are shown as the slowest, at least."""

Logged = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far a run is."""

    run: str
    state: str
    """new, waiting (in SLURM's queue), running, stopped, failed, dead or finished."""
    reason: str | None
    """Why it does not run; of one that was stopped or killed."""
    alive: bool = False
    stage: str | None = None
    """That is trained, or was last."""
    step: int = 0
    steps: int = 0
    stages: dict[str, dict[str, int]] = field(default_factory=dict)
    """Step and steps of each."""
    loss: float | None = None
    tokens_per_second: float | None = None
    """Of all ranks together."""
    eta_seconds: float | None = None
    """To the end of the stage, at the speed of its last rows."""
    eta_run_seconds: float | None = None
    """To the end of the last stage; None where the cost of a later stage is not known."""
    checkpoint: str | None = None
    """The last one: from there it goes on."""
    restarts: list[dict[str, str]] = field(default_factory=list)
    """Time of each start after the first, and the reason why the one before ended."""
    ranks: list[Heartbeat] = field(default_factory=list)
    """Of the last session."""

    def most_memory(self) -> str:
        """Of a rank, of a worker that loads for one, and on a GPU, in GiB and words; empty where none has told."""
        sizes = {
            "rank": [rank.memory.get("process", 0) for rank in self.ranks],
            "worker": [size for rank in self.ranks for size in rank.memory.get("workers", ())],
            "GPU": [rank.memory.get("gpu", 0) for rank in self.ranks],
        }
        return ", a ".join(f"{name} {max(of) / 2**30:.3g} GiB" for name, of in sizes.items() if any(of))

    def slowest(self) -> list[Heartbeat]:
        """Ranks that lag, 1% of all at least: those without a sign first, then those that have been waiting for data
        for long, then those that take longest for their own part of a step."""

        def lag(one: Heartbeat) -> tuple[float, ...]:
            silent, waits = one.age_seconds > 2 * BEAT, one.doing == "data" and one.doing_seconds > BEAT
            since = one.doing_seconds if waits else 0.0
            return (one.age_seconds if silent else 0.0, since, sum(one.pace or ()), one.data_share)

        return sorted(self.ranks, key=lag, reverse=True)[: max(SLOWEST, -(-len(self.ranks) // 100))]


def status_of(path: str | Path) -> Status:
    """Reads a run folder; writes nothing. RecipeError where it is none, or its record cannot be read."""
    folder = RunFolder(Path(path))
    if not folder.about.is_file():
        return _not_begun(folder)
    about = _about(folder)
    sessions = read_sessions(folder)
    last = sessions[-1] if sessions else {}
    beats = read_heartbeats(folder.ranks, last.get("mark")) if last else []
    logged = read_rows(folder)
    stages = _stages(folder, about, beats, logged)
    name = next((name for name, one in stages.items() if one["step"] < one["steps"] or not one["finished"]), None)
    stage = name or list(stages)[-1]
    step, steps = stages[stage]["step"], stages[stage]["steps"]
    rows = [row for row in logged if row["stage"] == stage and row.get("loss")]
    speed = _steps_per_second(rows)
    eta = (steps - step) / speed if speed else (0.0 if name is None else None)
    state, reason = _state(folder, last, beats, done=name is None)
    if state in ("stopped", "dead") and (queued := waiting(last.get("job"))):
        state, reason = "waiting", f"{queued}; {reason}"
    newest = [one for each in reversed(stages) for one in folder.checkpoints(each)[-1:]]
    return Status(
        run=str(folder.path), state=state, reason=reason, alive=state == "running", stage=stage, step=step, steps=steps,
        stages={each: {"step": one["step"], "steps": one["steps"]} for each, one in stages.items()},
        loss=_last(rows, "loss"), tokens_per_second=_last(rows, "tokens_per_second"), eta_seconds=eta,
        eta_run_seconds=_eta_run(about, stages, stage, eta, speed), checkpoint=str(newest[0]) if newest else None,
        restarts=[
            {"time": str(one["began"]), "reason": str(before["how"] or "it left no word")}
            for before, one in zip(sessions, sessions[1:], strict=False)
        ],
        ranks=beats,
    )  # fmt: skip


def _not_begun(folder: RunFolder) -> Status:
    """Of a run that was submitted and has not started."""
    submissions = sorted((folder.path / "submit").glob("*/submitted.json"))
    if not submissions:
        raise RecipeError(f"{folder.path} is no run folder: it holds no run.json. `lingen fit` and `submit` make one.")
    job = str(decode_json(submissions[-1].read_bytes()).get("job"))
    queued, log = waiting(job), submissions[-1].with_name(f"{job}.log")
    new = f"job {job} has not begun to train" + (f"; what it printed: {log}" if log.is_file() else "")
    return Status(run=str(folder.path), state="waiting" if queued else "new", reason=queued or new)


def _about(folder: RunFolder) -> dict[str, Any]:
    try:
        about = dict(decode_json(folder.about.read_bytes()))
        for name in about["stages"]:
            int(about["course"][name]["train.steps"])
    except KeyError as error:
        raise RecipeError(
            f"{folder.about} was written by an earlier version, which did not note {error}. Go on with the run once: "
            "`lingen fit --run` brings its record up to date."
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"{folder.about} is no record of a run that can be read ({error}).") from error
    return about


def _stages(
    folder: RunFolder, about: dict[str, Any], beats: list[Heartbeat], logged: list[Logged]
) -> dict[str, dict[str, int]]:
    """Step, steps and whether it is finished, of each stage."""
    # Until the first row of a session, rows of steps that are trained again stand there.
    is_old = not logged or folder.metrics.stat().st_mtime < folder.about.stat().st_mtime
    steps_of = {} if beats and is_old else {row["stage"]: int(row["step"]) for row in logged}
    found = {}
    for name in about["stages"]:
        steps, has_weights = int(about["course"][name]["train.steps"]), folder.weights(name).is_file()
        beaten = max((one.step for one in beats if one.stage == name), default=0)
        step = max(steps_of.get(name, 0), folder.last_step(name), beaten) or (steps if has_weights else 0)
        found[name] = {"step": min(step, steps), "steps": steps, "finished": int(has_weights and step >= steps)}
    return found


def read_rows(folder: RunFolder) -> list[Logged]:
    """Whole rows of metrics.csv; the last one may be being written."""
    if not folder.metrics.is_file():
        return []
    with folder.metrics.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if (row.get("step") or "").isdecimal()]


def _last(rows: list[Logged], name: str) -> float | None:
    return next((float(row[name]) for row in reversed(rows) if row.get(name)), None)


def _steps_per_second(rows: list[Logged]) -> float | None:
    """Mean over the last rows: the steps of a row by the seconds that they took."""
    steps, seconds = 0, 0.0
    for before, row in pairwise(rows[-ROWS - 1 :]):
        rate, more = float(row.get("steps_per_second") or 0), int(row["step"]) - int(before["step"])
        if rate > 0 and more > 0:
            steps, seconds = steps + more, seconds + more / rate
    return steps / seconds if steps else _last(rows, "steps_per_second")


def _eta_run(
    about: dict[str, Any], stages: dict[str, dict[str, int]], stage: str, eta: float | None, speed: float | None
) -> float | None:
    """Seconds to the end of the run: later stages cost by step what the forecast says, against this one."""
    later = [name for name in list(stages)[list(stages).index(stage) + 1 :] if not stages[name]["finished"]]
    if eta is None or not later:
        return eta
    flop = about.get("flop_a_step", {})
    if speed is None or not flop.get(stage) or not all(flop.get(name) for name in later):
        return None
    left = sum((stages[name]["steps"] - stages[name]["step"]) * flop[name] / flop[stage] for name in later)
    return eta + left / speed


def _state(folder: RunFolder, last: dict[str, Any], beats: list[Heartbeat], *, done: bool) -> tuple[str, str | None]:
    """What a run does, and why it does nothing."""
    how = last.get("how")
    if how is None and (owner := lock.owner_of(folder.path)) is not None:
        silent = [beat for beat in beats if beat.age_seconds > SILENT]
        death = lock.death_of(*owner)
        if death is None and not silent:
            return "running", None
        if death is not None:
            return _ended(killed(folder, last, death)) if last else ("dead", death)
        told = "; ".join(
            f"rank {one.rank} on {one.host} has given no sign for {one.age_seconds:.0f} s" for one in silent[:4]
        )
        return "dead", told
    if done:
        return "finished", None
    if how is None:
        return "dead", "it left no word"
    return _ended(killed(folder, last, how) if how.startswith(LOST_WORD) else how)


def _ended(how: str) -> tuple[str, str]:
    for state, start in (("failed", FAILED_WORD), ("dead", LOST_WORD), ("dead", KILLED_WORD)):
        if how.startswith(start):
            return state, how.removeprefix(FAILED_WORD)
    return "stopped", "there is more to train" if how == FINISHED else how
