"""Runs side by side, by what their folders record: unfinished ones, those of other recipes or versions, moved ones."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lingen.launch.status import read_rows, status_of
from lingen.plan.forecast import flop_a_step, plan
from lingen.plan.loading import load_curriculum
from lingen.ranks.launch import ranks_here
from lingen.recipe.errors import RecipeError
from lingen.tables import as_cell
from lingen.training.folder import RunFolder
from lingen.training.record import told
from lingen.training.sessions import read_sessions

VALIDATION, TRAINING = "validation/loss", "loss"
"""What is compared where no metric is named: the first that each run has twice."""

Curve = list[tuple[float, float]]
"""Place, in steps or FLOPs of the whole run, and value, which may be NaN."""


@dataclass(kw_only=True)
class Compared:
    """What a run folder tells for a comparison; None, and NaN in `points`: it is not known."""

    name: str
    folder: RunFolder
    state: str
    stages: list[str]
    settings: dict[str, str]
    """Dotted key -> value as the recipe has it, then versions, commit and what was changed on the way."""
    scores: dict[str, dict[str, float]]
    parameters: int | None = None
    steps: int = 0
    flop: float = 0.0
    seconds: float = 0.0
    """Of training itself."""
    tokens: float = 0.0
    gpu_hours: float | None = None
    points: list[tuple[int, float, dict[str, str]]] = field(default_factory=list)
    """Steps and FLOPs up to a row of metrics.csv, all stages in a row, and the row."""

    def curve(self, metric: str, axis: str) -> Curve:
        """The metric over ``steps`` or ``flops``."""
        points = [(flop if axis == "flops" else step, row.get(metric)) for step, flop, row in self.points]
        return [(place, float(value)) for place, value in points if value and math.isfinite(place)]


def read_compared(paths: Sequence[str | Path]) -> list[Compared]:
    """Run folders; one that is none stands for those in it. RecipeError where there is no run."""
    folders = list[Path]()
    for path in map(Path, paths):
        inside = [path] if (path / "run.json").is_file() else sorted(one.parent for one in path.glob("*/run.json"))
        if not inside:
            raise RecipeError(f"{path} is no run folder, and holds none.")
        folders += inside
    short = len({path.name for path in folders}) == len(folders)
    return [_read(path.resolve().name if short else str(path), RunFolder(path)) for path in dict.fromkeys(folders)]


def _read(name: str, folder: RunFolder) -> Compared:
    status, about = status_of(folder.path), json.loads(folder.about.read_text(encoding="utf-8"))
    changes = [
        f"{one['stage']} {one['step']}: {told(one['changes'])}" for one in about.get("history", ()) if one["changes"]
    ]
    scores = json.loads(folder.score.read_text(encoding="utf-8"))["sampled"] if folder.score.is_file() else {}
    run = Compared(
        name=name, folder=folder, state=status.state, stages=list(status.stages),
        settings=_settings(folder) | {"commit": str(about.get("commit")), "versions": as_cell(about.get("versions", {}))}
        | {"changed on the way": "; ".join(changes)},
        scores={key: one for key, one in scores.items() if isinstance(one, dict) and "share" in one},
    )  # fmt: skip
    ranks = next((one["ranks"] for one in reversed(read_sessions(folder))), 1)
    cost = {stage: ranks * flop for stage, flop in about.get("flop_a_step", {}).items()}
    with suppress(RecipeError):  # of another version, or its parts are not here
        for recipe in load_curriculum(folder.recipe).stages:
            forecast = plan(recipe)
            run.parameters = forecast.trained
            cost.setdefault(str(recipe.stage), ranks_here(recipe) * flop_a_step(recipe, forecast))
    stage, last = "", 0
    for row in read_rows(folder):
        stage, last = row["stage"], last if row["stage"] == stage else 0
        rate, more = float(row.get("steps_per_second") or 0), int(row["step"]) - last
        seconds = more / rate if rate > 0 else 0.0
        last, run.steps, run.seconds = last + more, run.steps + more, run.seconds + seconds
        run.flop += more * (cost.get(stage) or math.nan)
        run.tokens += seconds * float(row.get("tokens_per_second") or 0)
        run.points.append((run.steps, run.flop, row))
    run.gpu_hours = None if run.settings.get("trainer.accelerator") == "cpu" else run.seconds * ranks / 3600
    return run


def _settings(folder: RunFolder) -> dict[str, str]:
    """Dotted key -> value of recipe.yaml, whatever version wrote it."""

    def leaves(node: Any, key: str) -> Iterator[tuple[str, str]]:
        for word, value in node.items():
            yield from leaves(value, f"{key}{word}.") if isinstance(value, dict) else [(f"{key}{word}", as_cell(value))]

    try:
        return dict(leaves(yaml.safe_load(folder.recipe.read_text(encoding="utf-8")), ""))
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise RecipeError(f"{folder.recipe} cannot be read ({error}).") from error


def value_at(curve: Curve, place: float) -> float | None:
    """On a line between the neighbours; None outside of the curve, or where a neighbour is no finite number."""
    before, after = [one for one in curve if one[0] <= place], [one for one in curve if one[0] >= place]
    if not before or not after or not math.isfinite(before[-1][1] + after[0][1]):
        return None
    return float(np.interp(place, [before[-1][0], after[0][0]], [before[-1][1], after[0][1]]))


def compare_runs(runs: Sequence[Compared], metric: str | None, axis: str) -> dict[str, Any]:
    """Everything as plain values: at the furthest place that all runs with the metric reach. RecipeError for a metric
    that none has."""
    metric = metric or (VALIDATION if all(len(run.curve(VALIDATION, "steps")) > 1 for run in runs) else TRAINING)
    curves = [run.curve(metric, axis) for run in runs]
    place = min((curve[-1][0] for curve in curves if curve), default=None)
    known = {name for run in runs for *_, row in run.points for name, value in row.items() if value}
    if known and metric not in known:
        raise RecipeError(f"--metric {metric}: no run has it. Known: {', '.join(sorted(known - {'stage', 'step'}))}.")
    settings = {key: [run.settings.get(key, "-") for run in runs] for run in runs for key in run.settings}
    told_of = ("name", "state", "parameters", "steps", "flop", "tokens", "seconds", "gpu_hours", "scores")
    return {
        "metric": metric, "at": axis, "place": place,
        "differ": {key: values for key, values in settings.items() if len(set(values)) > 1},
        "runs": [
            {name: _finite(getattr(run, name)) for name in told_of}
            | {"value": None if place is None else value_at(curve, place), "curve": [(x, _finite(y)) for x, y in curve]}
            for run, curve in zip(runs, curves, strict=True)
        ],
    }  # fmt: skip


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tables_of(found: dict[str, Any]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows for people: of runs, and of settings that differ."""
    what, rows = f"{found['metric']} at {shown_number(found['place'])} {found['at']}", []
    for one in found["runs"]:
        bad = sum(value is None for _, value in one["curve"])
        rows.append(
            {key: shown_number(one[key]) for key in list(one)[:8]}
            | {what: shown_number(one["value"]) + (f" ({bad} rows are no finite number)" if bad else "")}
            | {key: f"{s['share']:.0%} ({s['low']:.0%} to {s['high']:.0%})" for key, s in one["scores"].items()}
        )
    names = [one["name"] for one in found["runs"]]
    return rows, [{"setting": key} | dict(zip(names, values, strict=True)) for key, values in found["differ"].items()]


def shown_number(value: Any) -> str:
    """In a cell; a text stays as it is."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
