"""The complexity receipt as files to read: a table of every number, a page, and plots."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lingen.bench.findings import says, table
from lingen.bench.results import Row
from lingen.bench.targets import PAPER_SIZES


def write_receipt(result: dict[str, Any], out: Path) -> list[Path]:
    """scaling.csv, .png and .md beside scaling.json. Returns the paths of all four."""
    from lingen.bench.plots import plot_scaling

    files = [out / f"scaling.{kind}" for kind in ("json", "csv", "png", "md")]
    write_csv(result["rows"], files[1])
    plot_scaling(result, files[2])
    files[3].write_text(page(result), encoding="utf-8")
    return files


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """The rows of a result file as a table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(field for row in rows for field in row)))
        writer.writeheader()
        writer.writerows(rows)


def page(result: dict[str, Any]) -> str:
    """The receipt in Markdown."""
    sure = [f"- {says(one)}" for one in result["faster_than_linear"] if one["sure"]] or ["None."]
    perhaps = [f"- {says(one)}" for one in result["faster_than_linear"] if not one["sure"]] or ["None."]
    formula = ", ".join(f"{name} {off:.2%}" for name, off in result["formula"].items() if off is not None)
    sections = [
        "# Complexity receipt",
        f"One layer of each mixer at width {result['dim']}, batch {result['batch']}; forward unless training is named. "
        f"{source(result)}. Memory: {result['memory']}. Intervals: 95%.",
        "![Time, memory and FLOPs over tokens](scaling.png)",
        as_markdown(table(result)),
        "## Measured",
        as_markdown(measured(result["rows"])),
        "## Parts that grow faster than tokens^1.05",
        "\n".join(sure),
        "Exponents above it whose interval reaches down to it, so that noise may explain them:",
        "\n".join(perhaps),
        "## Time of the parts",
        as_markdown(parts(result["parts"])),
        "## Beside the paper",
        "Here one layer of attention over one of mate; in the paper (arXiv 2412.09856) the whole DiT-4B over "
        "LinGen-4B, whose layers have cross-attention and an FFN besides.",
        as_markdown(beside_the_paper(result["rows"])),
        f"FLOPs are counted from the matrix products executed. Largest distance from the closed formula: {formula}.",
    ]
    return "\n\n".join(sections) + "\n"


def source(result: Row) -> str:
    """Where numbers come from: device, date, commit and command."""
    commit = f"commit {result['commit'][:12]}, " if result.get("commit") else ""
    return f"{result['device']}, {result['date']}, {commit}`{result['command']}`"


def measured(rows: Sequence[Row]) -> list[list[str]]:
    """Every row: size, tokens, mixer, milliseconds and GiB of the forward and of training, TFLOP."""
    head = ["size", "tokens", "mixer", "parameters", "TFLOP", "ms", "GiB", "training ms", "training GiB"]
    return [head] + [
        [
            row["name"], f"{row['tokens']:,}", row["mixer"], f"{row['parameters'] / 1e6:.3g} M", number(row["tflop"]),
            *(number(row.get(field)) for field in ("ms", "gib", "train_ms", "train_gib")),
        ]
        for row in rows
    ]  # fmt: skip


def parts(fits: dict[str, dict[str, Row]]) -> list[list[str]]:
    """Exponent of each part's time, and its share of the time on the largest grid."""
    return [["mixer", "part", "time ~ n^", "share"]] + [
        [mixer, part, f"{fit['exponent']:.2f} ({fit['low']:.2f} to {fit['high']:.2f})", f"{fit['share']:.0%}"]
        for mixer, own in fits.items()
        for part, fit in own.items()
    ]


def beside_the_paper(rows: Sequence[Row]) -> list[list[str]]:
    """Ratios of attention to mate on the paper's sizes, next to the paper's of its whole models."""
    lines = [["size", "time, ours", "FLOPs, ours", "latency, paper", "FLOPs, paper"]]
    for size, paper in PAPER_SIZES.items():
        pair = [
            next((row for row in rows if (row["name"], row["mixer"]) == (size, m)), {}) for m in ("attention", "mate")
        ]
        ours = [f"{pair[0][f] / pair[1][f]:.1f}x" if all(row.get(f) for row in pair) else "" for f in ("ms", "tflop")]
        lines.append([size, *ours, f"{paper.latency_ratio}x", f"{paper.flops_ratio}x" if paper.flops_ratio else ""])
    return lines


def number(value: float | None) -> str:
    """Three digits, or nothing."""
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def as_markdown(lines: Iterable[Sequence[str]]) -> str:
    """Rows of cells, the head first, as a table."""
    head, *rest = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + " --- |" * (head.count(" | ") + 1), *rest])
