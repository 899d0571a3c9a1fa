"""The receipt's plots: time, memory and FLOPs over tokens, log-log, with the slopes in the legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lingen.bench.targets import PAPER_DIM, PAPER_SIZES

COLOURS = {
    "attention": "#c0392b",
    "mate": "#1f5fa8",
    "mamba2": "#17a2a2",
    "temporal_swin": "#e08e0b",
    "linear_attention": "#7b4fb5",
}
OTHERS = ("#444444", "#2e8b57", "#d6679f", "#8c6d31")
"""For mixers of someone else, in turn."""

PANELS = (
    ("ms", "time", "Time of one forward, ms"),
    ("gib", "memory", "Memory, GiB"),
    ("tflop", "flops", "FLOPs of one forward, TFLOP"),
)
"""Field of the rows, name of its fit, title."""


def plot_scaling(result: dict[str, Any], path: Path) -> None:
    """Draws the three panels into a PNG."""
    figure = Figure(figsize=(15, 5.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (field, fit, title) in zip(figure.subplots(1, 3), PANELS, strict=True):
        _panel(axes, result, field, fit)
        axes.set_title(title, fontsize=11)
    figure.suptitle(
        f"One layer of each mixer, width {result['dim']}, batch {result['batch']}  ·  {result['device']}  ·  "
        f"{result['date']}",
        fontsize=12,
    )
    figure.supxlabel(f"tokens (memory: {result['memory']})", fontsize=10)
    figure.savefig(path)


def _panel(axes: Axes, result: dict[str, Any], field: str, fit: str) -> None:
    others = iter(OTHERS * len(result["fits"]))
    for mixer, fits in result["fits"].items():
        points = sorted(
            (row["tokens"], row[field]) for row in result["rows"] if row["mixer"] == mixer and row.get(field)
        )
        if not points:
            continue
        tokens, costs = zip(*points, strict=True)
        colour = COLOURS.get(mixer) or next(others)
        main = mixer in ("mate", "attention")
        axes.plot(
            tokens, costs, marker="o", markersize=5, color=colour, linewidth=2.4 if main else 1.5,
            label=_legend(mixer, fits.get(fit)), zorder=3 if main else 2,
        )  # fmt: skip
    if field == "ms":
        _paper(axes, result)
        _crossover(axes, result)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _ticks(axes, sorted({row["tokens"] for row in result["rows"]}))
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8.5, frameon=False, loc="upper left")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.42)  # room for the legend above the curves


def _legend(mixer: str, fit: dict[str, float] | None) -> str:
    if fit is None:
        return mixer
    return f"{mixer}  $n^{{{fit['exponent']:.2f}}}$  ({fit['low']:.2f} to {fit['high']:.2f})"


def _paper(axes: Axes, result: dict[str, Any]) -> None:
    """The paper's latencies as milliseconds of one whole layer, at the width at which that says something."""
    if result["dim"] != PAPER_DIM:
        return
    for name, field, mixer in (("DiT-4B", "dit_layer_ms", "attention"), ("LinGen-4B", "lingen_layer_ms", "mate")):
        tokens = [size.tokens for size in PAPER_SIZES.values()]
        axes.plot(
            tokens, [getattr(size, field) for size in PAPER_SIZES.values()], linestyle="none", marker="D", markersize=6,
            markerfacecolor="none", color=COLOURS[mixer], label=f"paper: {name}, a whole layer with FFN", zorder=4,
        )  # fmt: skip


def _crossover(axes: Axes, result: dict[str, Any]) -> None:
    at = result["crossover"].get("mate", {}).get("tokens")
    if at:
        axes.axvline(at, ymax=0.55, color=COLOURS["mate"], linestyle=":", linewidth=1.2)
        tokens = [row["tokens"] for row in result["rows"]]
        left = at**2 > min(tokens) * max(tokens)  # where there is room
        axes.annotate(
            f"attention = mate\nat {at:,} tokens", (at, 0.02), xycoords=("data", "axes fraction"), fontsize=8.5,
            xytext=(-5 if left else 5, 0), textcoords="offset points", ha="right" if left else "left",
            color=COLOURS["mate"],
        )  # fmt: skip


def _ticks(axes: Axes, tokens: Sequence[int]) -> None:
    axes.set_xticks(tokens)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1000:.3g}k" if n >= 1000 else f"{n:g}"))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:.{_digits(y)}f}"))
    axes.tick_params(labelsize=9)


def _digits(value: float) -> int:
    return max(0, -math.floor(math.log10(value))) if value > 0 else 0
