"""An ablation: variants of a recipe against it, paired by seed, by a metric that is named beforehand."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lingen.evaluation.statistics import holm
from lingen.files import write_json
from lingen.plan.forecast import PEAK_FLOPS, flop_a_step, plan
from lingen.plan.loading import load_curriculum
from lingen.ranks.launch import ranks_here
from lingen.recipe.errors import RecipeError, no_such
from lingen.run_folder.identity import described, other_course, other_identity
from lingen.studies.compare import Curve, read_at, read_compared
from lingen.studies.grid import GridRun, values_of

BASELINE = "baseline"
VARIANTS = {
    "no_te": "model.mixer.te=null", "no_ma": "model.mixer.ma=null", "no_review": "model.mixer.review=null",
    "no_rms": "model.mixer.scan=thw", "zigzag": "model.mixer.scan=zigzag", "attention": "model.mixer=attention",
    "hybrid_layers": "model.mixer=[mate, mate, mate, attention]", "no_images": "",
}  # fmt: skip
"""What each changes, but for the depth of `attention` and the stages of `no_images`, which the recipe decides."""
DRAWN_BY = ("stage", "seed", "data.", "time.", "samples.", "train.accumulate", "train.text_drop", "autoencoder")
"""Starts of the settings that decide the order of samples, their times and their noise."""

Runs = dict[tuple[str, int], GridRun]
"""By variant and seed."""


def variant_of(text: str, recipe: str, fixed: Sequence[str]) -> tuple[str, list[str]]:
    """``no_te``, or ``mine:key=value,key=value`` -> name and overrides. RecipeError for an unknown name."""
    name, colon, own = text.partition(":")
    if not colon and name not in VARIANTS:
        raise RecipeError(no_such("variant", name, [*VARIANTS, "NAME:key=value,key=value of yours"]))
    if colon or name not in ("attention", "no_images"):
        return name, values_of(own or VARIANTS[name])
    if name == "no_images":
        stages = load_curriculum(recipe, fixed).stages
        return name, [f"stages.{one.stage}.data.mix.image=0" for one in stages if one.data.mix.video]
    shallow = [[VARIANTS[name], f"model.depth={depth}"] for depth in (1, 2)]
    last = [load_curriculum(recipe, [*fixed, *words]).stages[-1] for words in ([], *shallow)]
    whole, one, two = (flop_a_step(stage, plan(stage)) for stage in last)  # linear in the depth
    return name, [VARIANTS[name], f"model.depth={max(1, round(1 + (whole - one) / (two - one)))}"]


def validating(recipe: str, fixed: Sequence[str], metric: str) -> list[str]:
    """The override by which a loss of held-out samples is a curve, where the recipe reads it at the ends of stages
    alone. RecipeError where there are none."""
    last = load_curriculum(recipe, fixed).stages[-1]
    if not metric.startswith("validation/") or last.train.validate_every:
        return []
    if not (last.data.validation.image or last.data.validation.video or last.data.synthetic):
        raise RecipeError(f"There are no held-out samples for {metric}: name data.validation, or another --metric.")
    return [f"train.validate_every={max(1, last.train.steps // 10)}"]


def put_down(out: Path, metric: str) -> None:
    """Notes the metric before the first run. RecipeError where another one was noted."""
    path = out / "metric.json"
    if path.is_file() and (noted := json.loads(path.read_text(encoding="utf-8"))) != metric:
        raise RecipeError(f"{path} names {noted} as the metric of this study; for another one name another --out.")
    write_json(path, metric)


def forecast_lines(runs: Runs, metric: str) -> Iterator[str]:
    """What the study costs, what it could show, as far as runs that are there tell it, and which are not paired."""
    made = read_compared([run.folder.path for run in runs.values() if run.folder.about.is_file()])
    stages = [one for run in runs.values() for one in run.curriculum.stages]
    flop = sum(one.train.steps * flop_a_step(one, plan(one)) * ranks_here(one) for one in stages)
    done, seconds = (sum(one.about[what] for one in made) for what in ("flop", "seconds"))
    here = f"{flop * seconds / done / 3600:.2g} hours" if done > 0 else "a time that is unknown before a first run"
    hours = flop / (0.4 * PEAK_FLOPS["H100"] * 3600)
    yield f"{len(runs)} runs, {flop:.3g} FLOP; training takes {here} here, {hours:.2g} hours of an H100 at 40%."
    seeds = len({seed for _, seed in runs})
    found = [row for row in effects_of(runs, metric, "steps") if row["detectable"]]
    sizes = [detectable(seeds) * row["detectable"] / detectable(row["n"]) for row in found]
    told = f"{max(sizes):.3g}" if sizes else "unknown before two seeds of a variant are there"
    apart = "standard deviations of a paired difference"
    spreads = f"{detectable(seeds):.3g} {apart}" if seeds > 1 else "one seed shows none"
    yield f"Smallest effect on {metric} that it could show (5%, power 80%): {told}; {spreads}."
    yield "All variants take the recipe's learning rate, whichever of them that was found for."
    for (name, seed), run in runs.items():
        if seed == 0 and (other := drawn_otherwise(runs[BASELINE, 0], run)):
            yield f"{name} sees other samples, times or noise than the baseline, by {', '.join(other)}."


def drawn_otherwise(base: GridRun, other: GridRun) -> list[str]:
    """Settings of `DRAWN_BY` in which two runs differ; none: they are paired."""
    one, two = (described(run.curriculum.stages) for run in (base, other))
    keys = [key for key, _, _ in other_identity(one, two).values()]
    keys += [key for name in one if name in two for key in other_course(one[name].course, two[name].course)]
    return sorted({key for key in keys if key.startswith(DRAWN_BY)})


def detectable(seeds: int) -> float:
    """The smallest effect that a paired t-test at 5% finds in four of five studies, in standard deviations of a
    difference (noncentral t)."""
    from scipy import optimize, stats

    limit = stats.t.ppf(0.975, seeds - 1)
    return float(optimize.brentq(lambda d: stats.nct.sf(limit, seeds - 1, d * seeds**0.5) - 0.8, 0.01, 50))


def effects_of(runs: Runs, metric: str, axis: str) -> list[dict[str, Any]]:
    """For each variant the mean difference to the baseline of the same seed, as far as all runs are, its 95% interval
    (Student's t), Holm's p, and what may be said. A pair without two finite numbers is lost."""
    from scipy import stats

    there = {key: run.folder.path for key, run in runs.items() if run.folder.about.is_file()}
    made = zip(there, read_compared(list(there.values())), strict=True)
    curves: dict[tuple[str, int], Curve] = {key: one.curve(metric, axis) for key, one in made}
    place = min((curve[-1][0] for curve in curves.values() if curve), default=math.nan)
    at, rows = {key: read_at(curve, place)[0] for key, curve in curves.items()}, list[dict[str, Any]]()
    for name in dict.fromkeys(name for name, _ in runs if name != BASELINE):
        pairs = [(at.get(key), at.get((BASELINE, key[1]))) for key in runs if key[0] == name]
        apart = np.array([one - base for one, base in pairs if one is not None and base is not None])
        row = dict[str, Any].fromkeys(("variant", "at", "place", "value", "interval", "n", "lost", "p", "detectable"))
        row |= {"variant": name, "at": axis, "n": len(apart), "lost": len(pairs) - len(apart)}
        if len(apart):
            row |= {"place": place, "value": float(apart.mean())}
        if len(apart) > 1 and apart.std() > 0:
            test: Any = stats.ttest_1samp(apart, 0.0)
            row |= {"interval": [*map(float, test.confidence_interval())], "p": float(test.pvalue)}
            row |= {"detectable": detectable(len(apart)) * float(apart.std(ddof=1))}
        rows.append(row)
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p"] = p
    return [row | {"says": "differs" if (row["p"] or 1) < 0.05 else "not shown at this scale"} for row in rows]
