"""The complexity receipt: exponents, where attention is overtaken, parts that grow faster than the tokens; as fields of
the result file, a table, a page and plots."""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lingen.recipe.sections import Triple

from .build import MixerChoice, name_of
from .exponent import crossover, fit_exponent
from .mixer_flops import mixer_flops
from .paper import PAPER_SIZES
from .plots import plot_scaling
from .results import Fields
from .tables import Files, Table, as_markdown, every, ratio, row_of, source

LINEAR = 1.05
"""A cost that grows faster than tokens to this power is reported."""

SMALL_SHARE = 0.01
"""A part with less of the time on the largest grid is left out."""

FORWARD = {"flops": "tflop", "time": "ms", "memory": "gib"}
TRAINING = {"time": "train_ms", "memory": "train_gib"}
"""Name of a fit -> field of the rows that it fits."""

PartTimes = dict[str, float]
"""Part -> milliseconds."""


def findings(
    rows: Sequence[Fields],
    mixers: Sequence[MixerChoice],
    dim: int,
    grids: Sequence[Triple],
    splits: Mapping[str, Sequence[tuple[int, PartTimes]]],
) -> Fields:
    """All of it, from the rows of the result file, as further fields of it.

    Args:
        grids: on which FLOPs by part are counted.
        splits: mixer -> (tokens, its time by part) from the smallest grid to the largest.
    """
    of = {name_of(one): [row for row in rows if row["mixer"] == name_of(one)] for one in mixers}
    training = {name: fits_of(own, TRAINING) for name, own in of.items()}
    parts = {name: part_fits(splits.get(name, ())) for name in of}
    attention = of.get("attention")
    return {
        "fits": {name: fits_of(own, FORWARD) for name, own in of.items()},
        "training_fits": {name: fits for name, fits in training.items() if fits},
        "crossover": {name: meets(attention, own) for name, own in of.items() if attention and name != "attention"},
        "parts": parts,
        "faster_than_linear": by_time(parts) + by_flops(mixers, dim, grids),
    }


def _fit(points: Iterable[tuple[float, float | None]]) -> Fields | None:
    """Exponent and interval through (tokens, cost), as fields; None for fewer than three costs."""
    known = [(tokens, cost) for tokens, cost in points if cost]
    return fit_exponent(*zip(*known, strict=True))._asdict() if len(known) >= 3 else None


def fits_of(rows: Sequence[Fields], costs: Mapping[str, str]) -> dict[str, Fields]:
    """Name of a cost -> its fit over the rows that have the field; costs with fewer than three rows are left out."""
    fits = {cost: _fit((row["tokens"], row.get(field)) for row in rows) for cost, field in costs.items()}
    return {cost: fit for cost, fit in fits.items() if fit}


def meets(attention: Sequence[Fields], other: Sequence[Fields]) -> Fields:
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


def part_fits(splits: Sequence[tuple[int, PartTimes]]) -> dict[str, Fields]:
    """Part -> exponent of its time with interval, and its share of the time on the largest grid."""
    largest = splits[-1][1] if splits else {}
    found: dict[str, Fields] = {}
    for part, ms in largest.items():
        fit, share = _fit((tokens, split.get(part)) for tokens, split in splits), ms / sum(largest.values())
        if fit and share >= SMALL_SHARE:
            found[part] = fit | {"share": share}
    return found


def by_time(parts: Mapping[str, Mapping[str, Fields]]) -> list[Fields]:
    """Parts whose measured time grows faster than linearly."""
    return [
        _called_out(mixer, part, "time", fit)
        for mixer, fits in parts.items()
        for part, fit in fits.items()
        if fit["exponent"] > LINEAR
    ]


def by_flops(mixers: Sequence[MixerChoice], dim: int, grids: Sequence[Triple]) -> list[Fields]:
    """Parts whose counted FLOPs grow faster than linearly."""
    found = []
    for one in mixers:
        counts = {math.prod(grid): mixer_flops(one, dim, 1, grid) for grid in grids}
        largest = counts[max(counts)]
        for part, total in largest.items():
            fit = _fit((tokens, count[part]) for tokens, count in counts.items())
            share = total / sum(largest.values())
            if fit and fit["exponent"] > LINEAR and share >= SMALL_SHARE:
                found.append(_called_out(name_of(one), part, "FLOPs", fit | {"share": share}))
    return found


def _called_out(mixer: str, part: str, cost: str, fit: Fields) -> Fields:
    """A finding; it is not `sure` where the confidence interval reaches down to linear growth."""
    return {"mixer": mixer, "part": part, "cost": cost, **fit, "sure": fit["low"] > LINEAR}


def says(called_out: Fields) -> str:
    """One of `faster_than_linear` as a sentence."""
    return (
        f"{called_out['mixer']}: {called_out['cost']} of {called_out['part']} ~ tokens^{called_out['exponent']:.2f} "
        f"({called_out['low']:.2f} to {called_out['high']:.2f}), {called_out['share']:.0%} of the mixer's on the "
        "largest grid"
    )


def _exponents(files: Files) -> Iterator[Fields]:
    """Of each mixer, in the last file that has them."""
    result = [file for file in files.values() if "fits" in file][-1:]
    for mixer, fits in result[0]["fits"].items() if result else ():
        training, met = result[0]["training_fits"].get(mixer, {}), result[0]["crossover"].get(mixer, {})
        yield {"mixer": mixer, **fits, "training": training.get("time"), "says": met.get("says")}


def _parts(files: Files) -> Iterator[Fields]:
    for file in files.values():
        for mixer, own in file["parts"].items():
            yield from ({"mixer": mixer, "part": part, "fit": fit, "share": fit["share"]} for part, fit in own.items())


def _beside_the_paper(files: Files) -> Iterator[Fields]:
    """Ratios of attention to mate on the paper's sizes, next to the paper's of its whole models."""
    for file in files.values():
        for size, paper in PAPER_SIZES.items():
            attention, mate = (row_of(file, name=size, mixer=mixer) for mixer in ("attention", "mate"))
            ours = [ratio(attention.get(field), mate.get(field)) for field in ("ms", "tflop")]
            times, flops = (one and f"{one:.1f}x" for one in ours)
            latency, of_flops = (one and f"{one}x" for one in (paper.latency_ratio, paper.flops_ratio))
            yield {"size": size, "ms": times, "tflop": flops, "latency": latency, "flops": of_flops}


EXPONENTS = Table(
    _exponents,
    "mixer | FLOPs ~ n^=flops | time ~ n^=time | memory ~ n^=memory | time of training ~ n^=training | "
    "against attention=says",
)
MEASURED = Table(
    every,
    "size=name | tokens | mixer | parameters=millions | TFLOP=tflop | ms | GiB=gib | training ms=train_ms | "
    "training GiB=train_gib",
    {"millions": lambda row: f"{row['parameters'] / 1e6:.3g} M"},
)
PARTS = Table(_parts, "mixer | part | time ~ n^=fit | share=share:.0%")
BESIDE_THE_PAPER = Table(
    _beside_the_paper, "size | time, ours=ms | FLOPs, ours=tflop | latency, paper=latency | FLOPs, paper=flops"
)


def write_receipt(result: Fields, out: Path) -> list[Path]:
    """scaling.csv, .png and .md beside scaling.json. Returns the paths of all four."""
    files = [out / f"scaling.{kind}" for kind in ("json", "csv", "png", "md")]
    with files[1].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(field for row in result["rows"] for field in row)))
        writer.writeheader()
        writer.writerows(result["rows"])
    plot_scaling(result, files[2])
    files[3].write_text(page(result), encoding="utf-8")
    return files


def page(result: Fields) -> str:
    """The receipt in Markdown."""
    sure, perhaps = (
        "\n".join(f"- {says(one)}" for one in result["faster_than_linear"] if one["sure"] == known) or "None."
        for known in (True, False)
    )
    tables = [as_markdown(one.lines({"": result})) for one in (EXPONENTS, MEASURED, PARTS, BESIDE_THE_PAPER)]
    sections = [
        "# Complexity receipt",
        f"One layer of each mixer at width {result['dim']}, batch {result['batch']}; forward unless training is named. "
        f"{source(result)}. Memory: {result['memory']}. Intervals: 95%.",
        "![Time, memory and FLOPs over tokens](scaling.png)",
        tables[0],
        "## Measured",
        tables[1],
        "## Parts that grow faster than tokens^1.05",
        sure,
        "Exponents above it whose interval reaches down to it, so that noise may explain them:",
        perhaps,
        "## Time of the parts",
        tables[2],
        "## Beside the paper",
        "Here one layer of attention over one of mate; in the paper (arXiv 2412.09856) the whole DiT-4B over "
        "LinGen-4B, whose layers have cross-attention and an FFN besides.",
        tables[3],
        "FLOPs are counted from the matrix products executed; a test holds the counts to closed formulas.",
    ]
    return "\n\n".join(sections) + "\n"
