"""An ablation: variants of a recipe against it, paired by seed, by a metric that is named beforehand."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lingen.files import write_json
from lingen.plan.forecast import PEAK_FLOPS, flop_a_step, plan
from lingen.plan.loading import load_curriculum
from lingen.ranks.launch import ranks_here
from lingen.recipe.errors import RecipeError, did_you_mean
from lingen.studies.compare import Compared, Curve, shown_number, value_at
from lingen.studies.grid import GridRun, values_of
from lingen.training.identity import described

Pair = tuple[str, int]
"""Variant and seed."""

BASELINE = "baseline"
VARIANTS = {
    "no_te": "model.mixer.te=null", "no_ma": "model.mixer.ma=null", "no_review": "model.mixer.review=null",
    "no_rms": "model.mixer.scan=thw", "zigzag": "model.mixer.scan=zigzag", "attention": "model.mixer=attention",
    "hybrid_layers": "model.mixer=[mate, mate, mate, attention]", "no_images": "",
}  # fmt: skip
"""What each changes, but for the depth of `attention` and the stages of `no_images`, which the recipe decides."""
DRAWN_BY = ("stage", "seed", "data.", "time.", "samples.", "train.accumulate", "train.text_drop", "autoencoder")
"""Starts of the settings that decide the order of samples, their times and their noise."""


def variant_of(text: str, recipe: str, fixed: Sequence[str]) -> tuple[str, list[str]]:
    """``no_te``, or ``mine:key=value,key=value`` -> name and overrides. RecipeError for an unknown name."""
    name, colon, own = text.partition(":")
    if not colon and name not in VARIANTS:
        known = f"{did_you_mean(name, VARIANTS)} Known: {', '.join(VARIANTS)}"
        raise RecipeError(f"There is no variant '{name}'.{known}; one of yours is NAME:key=value,key=value.")
    if colon or name not in ("attention", "no_images"):
        return name, values_of(own or VARIANTS[name])
    if name == "no_images":
        stages = load_curriculum(recipe, fixed).stages
        return name, [f"stages.{one.stage}.data.mix.image=0" for one in stages if one.data.mix.video]
    shallow = [[VARIANTS[name], f"model.depth={depth}"] for depth in (1, 2)]
    last = [load_curriculum(recipe, [*fixed, *words]).stages[-1] for words in ([], *shallow)]
    whole, one, two = (flop_a_step(stage, plan(stage)) for stage in last)  # linear in the depth
    return name, [VARIANTS[name], f"model.depth={max(1, round(1 + (whole - one) / (two - one)))}"]


def put_down(out: Path, metric: str) -> None:
    """Notes the metric before the first run. RecipeError where another one was noted."""
    path = out / "metric.json"
    if path.is_file() and (noted := json.loads(path.read_text(encoding="utf-8"))) != metric:
        raise RecipeError(f"{path} names {noted} as the metric of this study; for another one name another --out.")
    write_json(path, metric)


def differing_draws(base: GridRun, other: GridRun) -> list[str]:
    """Settings by which two runs see other samples, times or noise; none: they are paired."""
    values = [
        {(stage, key): value for stage, of in described(run.curriculum.stages).items()
         for key, value in (of.identity | of.course).items() if key.startswith(DRAWN_BY)}
        for run in (base, other)
    ]  # fmt: skip
    one, two = values
    return sorted({key[1] for key in one.keys() | two.keys() if one.get(key) != two.get(key)})


def told_before(runs: dict[Pair, GridRun], made: dict[Pair, Compared], metric: str) -> Iterator[str]:
    """What the study costs, what it could show, and which runs are not paired; by the runs that are there, if any."""
    stages = [one for run in runs.values() for one in run.curriculum.stages]
    flop = sum(one.train.steps * flop_a_step(one, plan(one)) * ranks_here(one) for one in stages)
    done, seconds = sum(one.flop for one in made.values()), sum(one.seconds for one in made.values())
    hours = flop / (0.4 * PEAK_FLOPS["H100"] * 3600)
    here = (
        f"{flop * seconds / done / 3600:.2g} hours as fast as so far"
        if done > 0
        else "here: unknown before a first run"
    )
    yield f"{len(runs)} runs, {flop:.3g} FLOP in all: {here}; {hours:.2g} hours of an H100 at 40% of its FLOP/s."
    seeds = len({seed for _, seed in runs})
    if seeds < 2:
        yield "One seed gives no interval and shows no effect. Take --seeds 3 or more."
        return
    known = [row for row in effects_of(curves_of(runs, made, metric, "steps")) if row["detectable"] is not None]
    sizes = [row["detectable"] / detectable(row["n"]) * detectable(seeds) for row in known]
    told = shown_number(max(sizes)) if sizes else "unknown before two seeds of a variant are there"
    yield f"Smallest effect on {metric} that {seeds} seeds could show (5%, power 80%): {told}, {detectable(seeds):.3g} " \
          "standard deviations of a paired difference."  # fmt: skip
    yield "All variants train with the learning rate of the recipe, whichever of them it was tuned for."
    for (name, seed), run in runs.items():
        if seed == 0 and (other := differing_draws(runs[BASELINE, 0], run)):
            yield f"{name} is not paired with the baseline sample by sample: {', '.join(other)} differ."


def detectable(seeds: int) -> float:
    """The smallest effect that a paired t-test at 5% finds in four of five studies, in standard deviations of a
    difference (noncentral t)."""
    from scipy import optimize, stats

    limit = stats.t.ppf(0.975, seeds - 1)
    return float(optimize.brentq(lambda d: stats.nct.sf(limit, seeds - 1, d * seeds**0.5) - 0.8, 0.01, 50))


def curves_of(runs: Iterable[Pair], made: dict[Pair, Compared], metric: str, axis: str) -> dict[Pair, Curve]:
    """The curve of each run; empty where it has none yet."""
    return {key: made[key].curve(metric, axis) if key in made else [] for key in runs}


def effects_of(curves: dict[Pair, Curve]) -> list[dict[str, Any]]:
    """For each variant the mean difference to the baseline of the same seed, as far as all curves reach, its 95%
    interval (Student's t), p by Holm over the variants, and what may be said. A pair without a finite number is lost."""
    from scipy import stats

    place = min((curve[-1][0] for curve in curves.values() if curve), default=math.nan)
    at, rows = {key: value_at(curve, place) for key, curve in curves.items()}, []
    for name in dict.fromkeys(name for name, _ in curves if name != BASELINE):
        pairs = [(at[key], at[BASELINE, key[1]]) for key in curves if key[0] == name]
        apart = np.array([one - base for one, base in pairs if one is not None and base is not None])
        row = {"subject": name, "place": place, "value": float(apart.mean()) if len(apart) else None, "interval": None,
               "n": len(apart), "lost": len(pairs) - len(apart), "p": None, "detectable": None}  # fmt: skip
        if len(apart) > 1:
            test: Any = stats.ttest_1samp(apart, 0.0)
            row |= {"interval": list(map(float, test.confidence_interval())), "p": float(test.pvalue)}
            row["detectable"] = detectable(len(apart)) * float(apart.std(ddof=1))
        rows.append(row)
    least, ordered = 0.0, sorted((row for row in rows if row["p"] is not None), key=lambda row: row["p"])
    for rank, row in enumerate(ordered):
        row["p"] = least = max(least, min(1.0, (len(ordered) - rank) * row["p"]))
    for row in rows:
        row["says"] = (
            "no pair of numbers" if row["p"] is None else "differs" if row["p"] < 0.05 else "not shown at this scale"
        )
    return rows


def effect_row(row: dict[str, Any], metric: str, axis: str) -> dict[str, str]:
    """Cells for people."""
    low, high = map(shown_number, row["interval"] or (None, None))
    return {
        "variant": row["subject"], f"{metric}, at equal {axis}": shown_number(row["value"]), "95%": f"{low} to {high}",
        "pairs": str(row["n"]) + (f" ({row['lost']} lost)" if row["lost"] else ""), "p (Holm)": shown_number(row["p"]),
        "would be shown": shown_number(row["detectable"]), "so": row["says"],
    }  # fmt: skip
