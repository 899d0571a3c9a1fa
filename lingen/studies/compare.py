"""Runs side by side, by what their folders record: unfinished ones, those of other recipes or versions, moved ones."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from lingen.launch.status import read_rows, status_of
from lingen.plan.forecast import flop_a_step, plan
from lingen.plan.loading import load_curriculum
from lingen.ranks.launch import ranks_here
from lingen.recipe.errors import RecipeError, did_you_mean
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.record import told
from lingen.run_folder.sessions import read_sessions
from lingen.tables import as_cell

DEFAULT_METRICS = ("validation/loss", "loss")
"""The first that all runs have twice, and where they are compared, else the last."""

Curve = list[tuple[float, float, str, int]]
"""Place, in steps or FLOPs of the whole run, value, which may be NaN, stage, and the step in that."""


class Compared(NamedTuple):
    """What a run folder tells for a comparison."""

    folder: RunFolder
    stages: list[str]
    about: dict[str, Any]
    """For people and JSON: run, state, trained parameters, those without text encoders, steps, flop, tokens, seconds of
    training itself, gpu_hours; None or NaN: not known."""
    settings: dict[str, str]
    """Dotted key -> value as recipe.yaml has it, then versions, commit and what was changed on the way."""
    scores: dict[str, Any]
    points: Sequence[tuple[float, float, dict[str, str]]]
    """Steps and FLOPs up to each row of metrics.csv, and the row."""

    def curve(self, metric: str, axis: str) -> Curve:
        """The metric over ``steps`` or ``flops``."""
        rows = [(flop if axis == "flops" else step, row.get(metric), row) for step, flop, row in self.points]
        return [(x, float(y), row["stage"], int(row["step"])) for x, y, row in rows if y and math.isfinite(x)]


def read_compared(paths: Sequence[str | Path]) -> list[Compared]:
    """Run folders; one that is none stands for those in it. RecipeError where there is no run."""
    folders = dict[Path, None]()
    for path in map(Path, paths):
        inside = [path] if (path / "run.json").is_file() else sorted(one.parent for one in path.glob("*/run.json"))
        if not inside:
            raise RecipeError(f"{path} is no run folder, and holds none.")
        folders |= dict.fromkeys(inside)
    is_short = len({path.resolve().name for path in folders}) == len(folders)
    return [_read(RunFolder(path), path.resolve().name if is_short else str(path)) for path in folders]


def _read(folder: RunFolder, name: str) -> Compared:
    status, about = status_of(folder.path), json.loads(folder.about.read_text(encoding="utf-8"))
    changes = [f"{one['stage']} {one['step']}: {told(one['changes'])}" for one in about.get("history", ())]
    recipe = yaml.safe_load(folder.recipe.read_text(encoding="utf-8")) if folder.recipe.is_file() else {}
    settings = dict(leaves(recipe)) | {name: as_cell(about.get(name)) for name in ("commit", "versions")}
    settings["changed on the way"] = "; ".join(one for one in changes if not one.endswith(": "))
    scores = json.loads(folder.score.read_text(encoding="utf-8"))["sampled"] if folder.score.is_file() else {}
    ranks = next((one["ranks"] for one in reversed(read_sessions(folder))), 1)
    each, parameters, less = {key: ranks * flop for key, flop in about.get("flop_a_step", {}).items()}, None, None
    with suppress(RecipeError):  # of another version, or its parts are not here
        for one in load_curriculum(folder.recipe).stages:
            forecast = plan(one)
            parameters, less = forecast.trained, forecast.trained - forecast.parameters.get("text encoders", 0)
            each.setdefault(str(one.stage), ranks_here(one) * flop_a_step(one, forecast))
    points, stage, last, steps, flop, seconds, tokens = [], "", 0, 0, 0.0, 0.0, 0.0
    for row in read_rows(folder):
        stage, last = row["stage"], last if row["stage"] == stage else 0
        more, rate = int(row["step"]) - last, float(row.get("steps_per_second") or 0)
        took = more / rate if rate > 0 else 0.0
        last, steps, seconds = last + more, steps + more, seconds + took
        flop += more * (each.get(stage) or math.nan)
        tokens += took * float(row.get("tokens_per_second") or 0)
        points.append((steps, flop, row))
    hours = math.nan if settings.get("trainer.accelerator") == "cpu" else seconds * ranks / 3600
    told_of = {"run": name, "state": status.state, "parameters": parameters, "without_text_encoders": less,
               "steps": steps, "flop": flop, "tokens": tokens, "seconds": seconds, "gpu_hours": hours}  # fmt: skip
    scores = {key: one for key, one in scores.items() if isinstance(one, dict) and "share" in one}
    return Compared(folder, list(status.stages), told_of, settings, scores, points)


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and value of each setting in a recipe, whatever version wrote it."""
    if isinstance(node, dict):
        for word, value in node.items():
            yield from leaves(value, f"{key}.{word}")
    else:
        yield key[1:], as_cell(node)


def stretches_of(curve: Curve) -> list[Curve]:
    """The curve, cut where no line may be drawn from a row to the next: where a stage ends, and where the next is more
    steps on than the stage had gone [ours]."""
    ends = enumerate(pairwise((stage, step) for *_, stage, step in curve), 1)
    cuts = [n for n, ((stage, step), (after, further)) in ends if stage != after or further > 2 * step]
    return [curve[start:end] for start, end in pairwise([0, *cuts, len(curve)]) if end]


def read_at(curve: Curve, place: float) -> tuple[float | None, str]:
    """A curve at a place, on a line between the rows around it, and how it was read, for people. None where there is no
    line, or one of its ends is no finite number."""
    for piece in stretches_of(curve):
        places, values, stages, _ = zip(*piece, strict=True)
        if places[0] <= place <= places[-1]:
            value, how = float(np.interp(place, places, values)), ", between rows" * (place not in places)
            return value if math.isfinite(value) else None, f"stage {stages[0]}{how}"
    return None, "no row near"


def compare_runs(runs: Sequence[Compared], metric: str | None, axis: str) -> dict[str, Any]:
    """Everything as plain values; the metric is read as far as all runs that have it go. RecipeError: none has it."""
    known = {name for run in runs for *_, row in run.points for name, value in row.items() if value} - {"stage"}
    for name in [metric] if metric else DEFAULT_METRICS:
        curves = [run.curve(name, axis) if name in known else [] for run in runs]
        place = min((curve[-1][0] for curve in curves if curve), default=math.nan)
        read = [read_at(curve, place) for curve in curves]
        if all(len(curve) > 1 and value is not None for curve, (value, _) in zip(curves, read, strict=True)):
            break
    if known and name not in known:
        told = f"--metric {name}: no run has it.{did_you_mean(name, known)} Known: "
        raise RecipeError(f"{told}{', '.join(sorted(known - {'step'}))}.")
    settings = {key: [run.settings.get(key, "-") for run in runs] for run in runs for key in run.settings}
    differ = {key: values for key, values in settings.items() if len({*values}) > 1}
    rows = [
        {**{key: _plain(one) for key, one in run.about.items()}, "value": value, "read": how, "scores": run.scores,
         "curve": [(x, _plain(y)) for x, y, *_ in curve]}
        for run, curve, (value, how) in zip(runs, curves, read, strict=True)
    ]  # fmt: skip
    return {"metric": name, "at": axis, "place": _plain(place), "runs": rows, "differ": differ}


def _plain(value: Any) -> Any:
    """None in place of what JSON cannot say."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tables_of(found: dict[str, Any]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows for people: of runs, and of settings that differ."""
    what, rows = f"{found['metric']} at {cell_of(found['place'])} {found['at']}", []
    for one in found["runs"]:
        bad = sum(value is None for _, value in one["curve"])
        row = {key: cell_of(one[key]) for key in one if key not in ("value", "read", "scores", "curve")}
        row[what] = f"{cell_of(one['value'])} ({one['read']}{f'; {bad} rows are no finite number' if bad else ''})"
        rows.append(row | {key: cell_of([s["share"], s["low"], s["high"]]) for key, s in one["scores"].items()})
    names = [one["run"] for one in found["runs"]]
    return rows, [{"setting": key} | dict(zip(names, values, strict=True)) for key, values in found["differ"].items()]


def cell_of(value: Any) -> str:
    """A number, an interval, or a number with its interval; a text stays as it is."""
    if isinstance(value, list):
        return f"{cell_of(value[0])} " * (len(value) > 2) + f"[{cell_of(value[-2])}, {cell_of(value[-1])}]"
    if value is None or isinstance(value, str) or value != value:
        return value if value and isinstance(value, str) else "-"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}" if abs(value) < 1e10 else f"{value:.3g}"
