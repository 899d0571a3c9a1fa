"""What a scaling run shows: exponents, where attention is overtaken, and parts that grow faster than the tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lingen.bench.build import name_of
from lingen.bench.fit import crossover, fit_exponent
from lingen.bench.flops import Component, Grid, closed_form, counted
from lingen.bench.results import Row

LINEAR = 1.05
"""What grows faster than tokens to this power is called out."""

SMALL_SHARE = 0.01
"""A part with less of the time on the largest grid is left out."""

FORWARD = {"flops": "tflop", "time": "ms", "memory": "gib"}
TRAINING = {"time": "train_ms", "memory": "train_gib"}
"""Name of a fit -> field of the rows that it fits."""

Split = dict[str, float]
"""Part -> milliseconds."""


def findings(
    rows: Sequence[Row],
    mixers: Sequence[Component],
    dim: int,
    grids: Sequence[Grid],
    splits: Mapping[str, Sequence[tuple[int, Split]]],
) -> Row:
    """All of it, as fields of the result file.

    Args:
        rows: of the result file.
        grids: on which FLOPs by part are counted.
        splits: mixer -> (tokens, its time by part) from the smallest grid to the largest.
    """
    of = {name_of(one): [row for row in rows if row["mixer"] == name_of(one)] for one in mixers}
    training = {name: fits_of(own, TRAINING) for name, own in of.items()}
    parts = {name: part_fits(splits.get(name, ())) for name in of}
    return {
        "fits": {name: fits_of(own, FORWARD) for name, own in of.items()},
        "training_fits": {name: fits for name, fits in training.items() if fits},
        "crossover": {
            name: meets(of["attention"], own) for name, own in of.items() if "attention" in of and name != "attention"
        },
        "parts": parts,
        "faster_than_linear": by_time(parts) + by_flops(mixers, dim, grids),
        "formula": {name_of(one): deviation(one, dim, grids) for one in mixers},
    }


def fits_of(rows: Sequence[Row], costs: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Name of a cost -> its fit over the rows that have the field; costs with fewer than three rows are left out."""
    found = {}
    for cost, field in costs.items():
        known = [(row["tokens"], row[field]) for row in rows if row.get(field)]
        if len(known) >= 3:
            found[cost] = asdict(fit_exponent(*zip(*known, strict=True)))
    return found


def meets(attention: Sequence[Row], other: Sequence[Row]) -> Row:
    """Where attention starts to take longer than the other mixer, in tokens, and in words."""
    mine = {tuple(row["grid"]): row.get("ms") for row in other}
    both = [
        (row["tokens"], row["ms"], ms)
        for row in sorted(attention, key=lambda row: row["tokens"])
        if row.get("ms") and (ms := mine.get(tuple(row["grid"])))
    ]
    if not both:
        return {"says": "no size was measured for both"}
    tokens, steep, flat = zip(*both, strict=True)
    at = crossover(tokens, steep, flat)
    if at is not None:
        return {"tokens": round(at), "says": f"attention takes longer from {round(at):,} tokens on"}
    longer = steep[0] > flat[0]
    return {"says": f"attention takes {'longer' if longer else 'less'} at all sizes, from {tokens[0]:,} tokens on"}


def part_fits(splits: Sequence[tuple[int, Split]]) -> dict[str, Row]:
    """Part -> exponent of its time with interval, and its share of the time on the largest grid."""
    if len(splits) < 3:
        return {}
    largest = splits[-1][1]
    found: dict[str, Row] = {}
    for part, ms in largest.items():
        known = [(tokens, split[part]) for tokens, split in splits if split.get(part)]
        share = ms / sum(largest.values())
        if len(known) >= 3 and share >= SMALL_SHARE:
            found[part] = asdict(fit_exponent(*zip(*known, strict=True))) | {"share": share}
    return found


def by_time(parts: Mapping[str, Mapping[str, Row]]) -> list[Row]:
    """Parts whose measured time grows faster than linearly."""
    return [
        _called_out(mixer, part, "time", fit)
        for mixer, fits in parts.items()
        for part, fit in fits.items()
        if fit["exponent"] > LINEAR
    ]


def by_flops(mixers: Sequence[Component], dim: int, grids: Sequence[Grid]) -> list[Row]:
    """Parts whose counted FLOPs grow faster than linearly."""
    found = []
    for one in mixers:
        counts = {math.prod(grid): counted(one, grid, dim) for grid in grids}
        largest = counts[max(counts)]
        for part, total in largest.items():
            fit = asdict(fit_exponent(list(counts), [count[part] for count in counts.values()]))
            share = total / sum(largest.values())
            if fit["exponent"] > LINEAR and share >= SMALL_SHARE:
                found.append(_called_out(name_of(one), part, "FLOPs", fit | {"share": share}))
    return found


def _called_out(mixer: str, part: str, cost: str, fit: Row) -> Row:
    """Not sure where the interval reaches down to the line."""
    return {"mixer": mixer, "part": part, "cost": cost, **fit, "sure": fit["low"] > LINEAR}


def deviation(component: Component, dim: int, grids: Sequence[Grid]) -> float | None:
    """Largest relative distance of the counted FLOPs from the closed formula; None where there is no formula."""
    worst = 0.0
    for grid in grids:
        formula, count = closed_form(component, grid, dim), sum(counted(component, grid, dim).values())
        if formula is None:
            return None
        worst = max(worst, abs(count / formula - 1))
    return worst


def says(called_out: Row) -> str:
    """One of `faster_than_linear` as a sentence."""
    return (
        f"{called_out['mixer']}: {called_out['cost']} of {called_out['part']} ~ tokens^{called_out['exponent']:.2f} "
        f"({called_out['low']:.2f} to {called_out['high']:.2f}), {called_out['share']:.0%} of the mixer's on the "
        "largest grid"
    )


def table(result: dict[str, Any]) -> list[list[str]]:
    """Rows of cells: the exponents of each mixer with their intervals."""
    lines = [["mixer", "FLOPs ~ n^", "time ~ n^", "memory ~ n^", "time of training ~ n^", "against attention"]]
    for mixer, fits in result["fits"].items():
        training = result["training_fits"].get(mixer, {}).get("time")
        cells = [_interval(fits.get(cost)) for cost in FORWARD] + [_interval(training)]
        lines.append([mixer, *cells, result["crossover"].get(mixer, {}).get("says", "")])
    return lines


def _interval(fit: dict[str, float] | None) -> str:
    return f"{fit['exponent']:.2f} ({fit['low']:.2f} to {fit['high']:.2f})" if fit else ""
