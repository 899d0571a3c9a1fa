"""The receipt's plots: time, memory and FLOPs over tokens, log-log, with the slopes in the legend."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, StrMethodFormatter

from .paper import FORWARDS, PAPER_DIM, PAPER_SIZES
from .results import Fields
from .tables import as_text

MIXER_COLOURS = {
    "attention": "#c0392b",
    "mate": "#1f5fa8",
    "mamba2": "#17a2a2",
    "temporal_swin": "#e08e0b",
    "linear_attention": "#7b4fb5",
}
"""Those of matplotlib for mixers of someone else."""

PANELS = (
    ("ms", "time", "Time of one forward, ms"),
    ("gib", "memory", "Memory, GiB"),
    ("tflop", "flops", "FLOPs of one forward, TFLOP"),
)
"""Field of the rows, name of its fit, title."""


def plot_scaling(result: Fields, path: Path) -> None:
    """Draws the three panels into a PNG."""
    figure = Figure(figsize=(15, 5.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (field, fit, title) in zip(figure.subplots(1, 3), PANELS, strict=True):
        _curves(axes, result, field, fit)
        if field == "ms":
            _paper(axes, result)
        _dress(axes, result, title)
    about = f"One layer of each mixer, width {result['dim']}, batch {result['batch']}"
    figure.suptitle(f"{about}  ·  {result['device']}  ·  {result['date']}", fontsize=12)
    figure.supxlabel(f"tokens (memory: {result['memory']})", fontsize=10)
    figure.savefig(path)


def _curves(axes: Axes, result: Fields, field: str, fit: str) -> None:
    for mixer, fits in result["fits"].items():
        rows = [row for row in result["rows"] if row["mixer"] == mixer and row.get(field)]
        points = sorted((row["tokens"], row[field]) for row in rows)
        label = f"{mixer}  ~ n^ {as_text(fits[fit])}" if fit in fits else mixer
        width = 2.4 if mixer in ("mate", "attention") else 1.5
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=label, color=MIXER_COLOURS.get(mixer), linewidth=width)


def _paper(axes: Axes, result: Fields) -> None:
    """Where attention takes as long as mate; the paper's latencies as milliseconds of one whole layer, at the width at
    which that says something."""
    at = result["crossover"].get("mate", {}).get("tokens")
    if at:
        axes.axvline(at, color=MIXER_COLOURS["mate"], linestyle=":", label=f"attention = mate at {at:,} tokens")
    if result["dim"] != PAPER_DIM:
        return
    for name, field, depth, mixer in (  # depths: ours
        ("DiT-4B", "dit_seconds", 38, "attention"),
        ("LinGen-4B", "lingen_seconds", 28, "mate"),
    ):
        points = [(size.tokens, 1e3 * getattr(size, field) / FORWARDS / depth) for size in PAPER_SIZES.values()]
        label = f"paper: {name}, a whole layer with FFN"
        axes.plot(*zip(*points, strict=True), "D", label=label, color=MIXER_COLOURS[mixer], markerfacecolor="none")


def _dress(axes: Axes, result: Fields, title: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["tokens"] for row in result["rows"]}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1000:.3g}k"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.minorticks_off()
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8.5, frameon=False, loc="upper left")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.42)  # room for the legend above the curves
