"""The complexity receipt: FLOPs, time and memory of one layer of each mixer, from short clips to long ones."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lingen.bench.build import built, dtype_name, kernel_of, name_of, precision_of
from lingen.bench.findings import Split, findings
from lingen.bench.flops import Component, Grid, flops
from lingen.bench.parts import by_part
from lingen.bench.results import GIB, Results, Row, Say
from lingen.bench.timing import (
    Work,
    allocated,
    forward,
    forward_backward,
    interleaved,
    milliseconds,
    or_none,
    peak_bytes,
    saved_bytes,
)
from lingen.blocks.layers import grid_of
from lingen.recipe.registry import MIXERS, RecipeError

GRIDS: tuple[Grid, ...] = (
    (34, 16, 16), (34, 32, 32), (68, 32, 32), (34, 64, 64), (136, 32, 32), (272, 32, 32),
)  # fmt: skip
"""256x256 for 17 s, 512x512 for 17, 34, 68 and 136 s, 1024x1024 for 17 s: 8,704 to 278,528 tokens."""

QUICK_GRIDS: tuple[Grid, ...] = ((32, 8, 8), (64, 8, 8), (128, 8, 8), (256, 8, 8))
"""A clip that grows longer at one size, for a CPU: 2,048 to 16,384 tokens."""

ONCE_TFLOP = 500
"""Work above this is run once, without a warm-up: a second or more on the fastest GPU."""


def label(grid: Grid) -> str:
    """Pixels and seconds of a grid at 8x8x8 compression, patches of 1x2x2 and 16 frames a second (LinGen)."""
    return f"{16 * grid[1]}x{16 * grid[2]} {grid[0] / 2:g} s"


def scaling(
    mixers: Sequence[Component],
    dim: int,
    grids: Sequence[Grid],
    device: torch.device,
    out: Path,
    say: Say,
    budget: float = 0.5,
    commit: str | None = None,
) -> Row:
    """Measures every mixer on every grid, smallest first, and fits exponents; `scaling.json` grows row by row.

    Args:
        out: folder of scaling.json.
        budget: seconds for each number.
    Returns:
        what the file holds: the head, rows, and ``fits: {mixer: {flops | time | memory: {exponent, low, high}}}`` of
        the forward; what else is in it is said at `findings`.
    """
    if len({math.prod(grid) for grid in grids}) < 3:
        raise RecipeError(f"An exponent needs at least three sizes, got {[list(grid) for grid in grids]}.")
    memory = "activation peak above weights" if device.type == "cuda" else "activations kept for the backward pass"
    results = Results(out / "scaling.json", {"dim": dim, "batch": 1, "memory": memory}, device, say, commit)
    splits = measure(mixers, dim, grids, device, results, budget)
    # FLOPs are counted without computing: on the real grids, whatever was measured.
    results.data |= findings(results.data["rows"], mixers, dim, GRIDS, splits)
    results.write()
    return results.data


def measure(
    mixers: Sequence[Component], dim: int, grids: Sequence[Grid], device: torch.device, results: Results, budget: float
) -> dict[str, list[tuple[int, Split]]]:
    """A row for each mixer and grid. Returns mixer -> (tokens, milliseconds of the parts) for each grid."""
    dtype = precision_of(device)
    layers = {name_of(one): built(partial(MIXERS.build, one, dim, 1), device, dtype) for one in mixers}
    _warm_up(layers, torch.randn(1, *min(grids, key=math.prod), dim, device=device, dtype=dtype))
    weights = allocated(device)
    splits: dict[str, list[tuple[int, Split]]] = defaultdict(list)
    for grid in sorted(grids, key=math.prod):
        results.say(f"{label(grid)}: {math.prod(grid):,} tokens")
        tflop = {name_of(one): flops(one, grid, dim) / 1e12 for one in mixers}
        x = torch.randn(1, *grid, dim, device=device, dtype=dtype)
        for row, split in _on_grid(layers, tflop, x, weights, budget):
            results.add(row)
            splits[row["mixer"]] += [(row["tokens"], split)] if split else []
    return splits


def _warm_up(layers: Mapping[str, nn.Module], x: Tensor) -> None:
    """Compiles kernels and lets the libraries take their workspace, which else counts as memory of the first size."""
    for layer in layers.values():
        forward(layer, [x])()
        forward_backward(layer, [x.detach().requires_grad_()], layer.parameters(), torch.randn_like(x))()


def _on_grid(
    layers: Mapping[str, nn.Module], tflop: Mapping[str, float], x: Tensor, weights: int, budget: float
) -> list[tuple[Row, Split | None]]:
    """A row for each mixer, and the forward's time by part where it is short enough to be run again."""
    device, grid = x.device, grid_of(x)
    sampling = {name: forward(layer, [x]) for name, layer in layers.items()}
    long = {name for name in layers if tflop[name] > ONCE_TFLOP}
    ms, peaks = _times_and_peaks(sampling, long, device, budget)
    splits = {name: by_part(sampling[name], device, 3) for name in layers if ms[name] and name not in long}
    x, seed = x.requires_grad_(), torch.randn_like(x)
    training = {name: forward_backward(layer, [x], layer.parameters(), seed) for name, layer in layers.items()}
    long = {name for name in layers if 3 * tflop[name] > ONCE_TFLOP}
    train_ms, train_peaks = _times_and_peaks(training, long, device, budget)
    if device.type != "cuda":
        peaks = {name: saved_bytes(layer, [x], layer.parameters()) for name, layer in layers.items()}
    rows: list[Row] = [
        {
            "name": label(grid), "mixer": name, "kernel": kernel_of(layer), "dtype": dtype_name(x.dtype),
            "tokens": math.prod(grid), "ms": ms[name], "gib": _above(weights, peaks[name]), "tflop": tflop[name],
            "train_ms": train_ms[name], "train_gib": _above(weights, train_peaks[name]),
            "parameters": sum(p.numel() for p in layer.parameters()), "grid": list(grid),
        }
        for name, layer in layers.items()
    ]  # fmt: skip
    return [(row, splits.get(row["mixer"])) for row in rows]


def _times_and_peaks(
    works: Mapping[str, Work], long: set[str], device: torch.device, budget: float
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Median milliseconds, and peak bytes on CUDA; None where the memory is too small. `long` work runs once."""
    first: dict[str, float] = {}

    def probe(name: str) -> float:
        def timed() -> None:
            first[name] = milliseconds(works[name], device)

        if device.type == "cuda":
            return peak_bytes(timed, device)
        timed()
        return 0

    peaks = {name: or_none(partial(probe, name)) for name in works}
    # A CPU compiles nothing, so that a first run counts where it was long.
    counts = {name for name in works if name in long or (device.type != "cuda" and first[name] > 1e3 * budget)}
    again = {name: work for name, work in works.items() if peaks[name] is not None and name not in counts}
    times = interleaved(again, device, budget, warm=False)
    ms = {name: statistics.median(times[name]) if name in times else first.get(name) for name in works}
    return ms, {name: peak or None for name, peak in peaks.items()}


def _above(weights: int, peak: float | None) -> float | None:
    """GiB of a peak above the weights."""
    return None if peak is None else (peak - weights) / GIB
