"""How the cost of a mixer grows with its tokens: FLOPs, time and memory, with fitted exponents."""

from __future__ import annotations

import csv
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lingen.folder import git_commit, versions
from lingen.registry import MIXERS

Grid = tuple[int, int, int]

QUICK_GRIDS: tuple[Grid, ...] = ((4, 8, 8), (8, 8, 8), (16, 8, 8), (32, 8, 8), (64, 8, 8))
"""A clip that grows longer at one size: 256 to 4,096 tokens."""


@dataclass(frozen=True)
class Row:
    """One mixer on one grid, forward and backward of one layer, batch 1."""

    mixer: str
    tokens: int
    gflop: float
    """Of the forward, counted from the matrix products executed."""
    ms: float
    """Median of forward and backward."""
    mib: float
    """Activations kept for the backward pass, each storage once, weights left out."""


@dataclass(frozen=True)
class Fit:
    """cost ~ tokens ** exponent, with a 95% confidence interval of the exponent."""

    exponent: float
    low: float
    high: float


def measure(component: str | dict[str, Any], grid: Grid, dim: int, repeats: int = 3) -> Row:
    """Counts and times one layer of a mixer on the CPU.

    Args:
        component: name or component of MIXERS.
        grid: tokens in t, h, w.
    """
    mixer = MIXERS.build(component, dim, 1)
    x = torch.randn(1, *grid, dim, requires_grad=True)
    name = component if isinstance(component, str) else component["name"]
    kept = saved_bytes(mixer, x)
    times = [seconds(lambda: mixer(x).sum().backward()) for _ in range(repeats)]
    return Row(name, math.prod(grid), flops(component, grid, dim) / 1e9, 1e3 * statistics.median(times), kept / 2**20)


def flops(component: str | dict[str, Any], grid: Grid, dim: int) -> int:
    """FLOPs of the matrix products of one forward, on the meta device: nothing is computed, any size is free."""
    with torch.device("meta"):
        mixer, x = MIXERS.build(component, dim, 1), torch.empty(1, *grid, dim)
    # Fused attention hides its products from the counter; the plain form has the same ones.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        mixer(x)
    return counter.get_total_flops()


def saved_bytes(mixer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward."""
    weights = {p.untyped_storage()._cdata for p in mixer.parameters()}
    sizes: dict[int, int] = {}

    def pack(kept: Tensor) -> Tensor:
        storage = kept.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        output = mixer(x)
    del output
    return sum(sizes.values())


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fit_exponent(tokens: Sequence[float], costs: Sequence[float]) -> Fit:
    """Least squares of log cost over log tokens; the interval is Student's t on the slope.

    Raises:
        ValueError: for fewer than three points.
    """
    if len(tokens) < 3:
        raise ValueError(f"An exponent needs at least three sizes, got {len(tokens)}.")
    x, y = [math.log(n) for n in tokens], [math.log(c) for c in costs]
    slope, intercept = statistics.linear_regression(x, y)
    residual = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    freedom = len(x) - 2
    error = math.sqrt(residual / freedom / spread) * student_t(freedom)
    return Fit(round(slope, 4), round(slope - error, 4), round(slope + error, 4))


def student_t(freedom: int) -> float:
    """97.5% quantile of Student's t (table up to 10, then the normal's with a first correction)."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.4 / freedom


def scaling(
    mixers: Sequence[str],
    dim: int = 64,
    grids: Sequence[Grid] = QUICK_GRIDS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures every mixer on every grid and fits exponents.

    Returns:
        device, versions, date, commit, rows, and ``fits: {mixer: {flops | time | memory: {exponent, low, high}}}``.
    """
    rows = []
    for number, (mixer, grid) in enumerate((m, g) for m in mixers for g in grids):
        rows.append(measure(mixer, grid, dim))
        if progress:
            progress(number + 1, len(mixers) * len(grids))
    fits = {mixer: fits_of([row for row in rows if row.mixer == mixer]) for mixer in mixers}
    return {
        "device": f"CPU, {torch.get_num_threads()} threads",
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "dim": dim,
        "rows": [asdict(row) for row in rows],
        "fits": fits,
    }


def fits_of(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    tokens = [row.tokens for row in rows]
    costs = {"flops": [r.gflop for r in rows], "time": [r.ms for r in rows], "memory": [r.mib for r in rows]}
    return {name: asdict(fit_exponent(tokens, values)) for name, values in costs.items()}


def write(result: dict[str, Any], out: Path) -> list[Path]:
    """scaling.json, .csv and .md in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"scaling.{kind}" for kind in ("json", "csv", "md")]
    files[0].write_text(json.dumps(result, indent=2))
    with files[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(result["rows"][0]))
        writer.writeheader()
        writer.writerows(result["rows"])
    lines = ["| mixer | FLOPs ~ n^ | time ~ n^ | memory ~ n^ |", "| --- | --- | --- | --- |"]
    for mixer, fits in result["fits"].items():
        cells = (
            f"{fits[k]['exponent']:.2f} ({fits[k]['low']:.2f} to {fits[k]['high']:.2f})"
            for k in ("flops", "time", "memory")
        )
        lines.append(f"| {mixer} | {' | '.join(cells)} |")
    files[2].write_text("\n".join(lines) + "\n")
    return files
