"""Draws the pictures of docs/concepts from the modules themselves: ``python -m tests.tools.draw_concepts``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import nn

from lingen.blocks.mamba2 import Mamba2
from lingen.blocks.mate import MATE
from lingen.blocks.scan import order_of, permutation
from lingen.blocks.temporal_swin import TemporalSwin, window_padding
from lingen.data.synthetic import captions, draw_clip
from lingen.flow import Times
from lingen.kernels.pool import pool
from lingen.recipe.sections import SampleConfig, TimeConfig, Triple

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.collections import LineCollection  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "concepts"
SCANS = [
    ("rotary_major", 0, "layer 0"),
    ("rotary_major", 1, "layer 1"),
    ("rotary_major", 2, "layer 2"),
    ("rotary_major", 3, "layer 3"),
    ("rotary_major_folded", 2, "layer 2"),
    ("rotary_major_folded", 3, "layer 3"),
    ("zigzag", 0, "every layer"),
    ("hilbert", 0, "every layer"),
]
LOWER = 0.8
"""Rows by which a frame is drawn below the one before."""
SETTINGS = {"state_dim": 16, "head_dim": 16}


def scan_orders() -> Figure:
    """The way of each scan order through three frames of 4 x 4 tokens."""
    grid = (3, 4, 4)
    figure, axes = plt.subplots(4, 2, figsize=(9, 9), layout="constrained")
    for axis, (name, layer, told) in zip(axes.flat, SCANS, strict=True):
        order = order_of(name, layer)
        index, _ = permutation(order, grid, torch.device("cpu"))
        t, h, w = np.unravel_index(index.numpy(), grid)
        points = np.stack([t * (grid[2] + 1) + w, h + LOWER * t], 1)
        for frame in range(grid[0]):
            corner = (frame * (grid[2] + 1) - 0.5, LOWER * frame - 0.5)
            axis.add_patch(plt.Rectangle(corner, grid[2], grid[1], fill=False, color="0.75"))
        lines = LineCollection(np.stack([points[:-1], points[1:]], 1), cmap="viridis", linewidths=1.6)
        lines.set_array(np.arange(len(points) - 1))
        axis.add_collection(lines)
        axis.scatter(*points.T, c=np.arange(len(points)), cmap="viridis", s=12, zorder=3)
        axis.set(aspect="equal", xlim=(-1, 14), ylim=(grid[1] + LOWER * (grid[0] - 1), -1), xticks=[], yticks=[])
        axis.axis("off")
        read = order if isinstance(order, str) else getattr(order, "__name__", "")
        axis.set_title(f"{name}, {told}" + (f": {read}" if read != name else ""), fontsize=10)
    figure.suptitle(
        "Three frames side by side, each lower than the one before; read from dark to bright",
        fontsize=10,
    )
    return figure


def windows() -> Figure:
    """The windows of two layers on a grid that they do not divide."""
    grid, window = (8, 10, 10), (4, 4, 4)
    figure, axes = plt.subplots(2, 2, figsize=(6.4, 6.8), layout="constrained")
    for row, layer in zip(axes, (0, 1), strict=True):
        mixer = TemporalSwin(16, layer, window=window)
        tile = mixer.tile(grid)
        number = _window_numbers(grid, tile, window_padding(grid, tile, mixer.shifted))
        for axis, plane, (down, right) in zip(row, (number[0], number[:, 0]), ("hw", "tw"), strict=True):
            axis.imshow(plane % 2 + 2 * (plane // 100 % 2), cmap="Pastel1", vmin=0, vmax=8)
            for y, x in np.ndindex(plane.shape):
                for other, edge in (((y, x + 1), ([x + 0.5] * 2, [y - 0.5, y + 0.5])),
                                    ((y + 1, x), ([x - 0.5, x + 0.5], [y + 0.5] * 2))):  # fmt: skip
                    inside = other[0] < plane.shape[0] and other[1] < plane.shape[1]
                    is_edge = inside and plane[other] != plane[y, x]
                    axis.plot(*edge, color="0.15" if is_edge else "0.85", linewidth=1.8 if is_edge else 0.4)
            axis.set(xlabel=right, ylabel=down, xticks=[], yticks=[])
            axis.set_title(f"layer {layer}: {down} and {right}", fontsize=10)
    figure.suptitle(f"Windows of {list(window)} tokens on a grid of {list(grid)}", fontsize=10)
    return figure


def _window_numbers(grid: Triple, tile: Triple, padding: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Which window each token is in: 100 for a step down the first shown axis, 1 for a step along the second."""
    t, h, w = ((np.arange(n) + before) // size for n, size, (before, _) in zip(grid, tile, padding, strict=True))
    return 100 * (t[:, None, None] + h[None, :, None]) + w[None, None, :]


def review_tokens() -> Figure:
    """A clip and what its review tokens are: the means of 2 x 2 x 2 of its tokens (here: of its pixels)."""
    caption = next(one for one in captions("train", "video") if "moves right" in one)
    clip = draw_clip(caption, (16, 16), 4, np.random.default_rng(3))
    pooled = pool(torch.from_numpy(np.asarray(clip)).double()[None], (2, 2, 2))[0].round().to(torch.uint8).numpy()
    figure, axes = plt.subplots(1, 6, figsize=(9, 2.3), layout="constrained", width_ratios=[1] * 6)
    rows = [*(("review", frame) for frame in pooled), *(("clip", frame) for frame in clip)]
    for place, (axis, (what, frame)) in enumerate(zip(axes, rows, strict=True)):
        axis.imshow(frame)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{what}, {frame.shape[0]} x {frame.shape[1]}", fontsize=9)
        axis.set_xlabel("read first" if place == 0 else "then the clip" if place == len(pooled) else "", fontsize=9)
    figure.suptitle(
        f"{pooled[..., 0].size} review tokens before {np.asarray(clip)[..., 0].size} of the clip", fontsize=10
    )
    return figure


def reach() -> Figure:
    """How much the token in the middle depends on each other one, by the gradient of real modules."""
    columns: list[tuple[str, Callable[[int], nn.Module], int]] = [
        ("temporal_swin, 1 layer", lambda layer: TemporalSwin(32, layer, window=(4, 4, 4)), 1),
        ("temporal_swin, 2 layers", lambda layer: TemporalSwin(32, layer, window=(4, 4, 4)), 2),
        ("mamba2, no review", lambda layer: Mamba2(32, layer, review=None, **SETTINGS), 1),
        ("mamba2, review", lambda layer: Mamba2(32, layer, **SETTINGS), 1),
        ("mate, 4 layers", lambda layer: MATE(32, layer, window=(4, 4, 4), **SETTINGS), 4),
    ]
    figure, axes = plt.subplots(2, len(columns), figsize=(11, 5), layout="constrained")
    for column, (name, build, depth) in zip(axes.T, columns, strict=True):
        share = _reach([build(layer) for layer in range(depth)], (12, 12, 12))
        for axis, plane, (down, right) in zip(column, (share[6], share[:, 6]), ("hw", "tw"), strict=True):
            shown = axis.imshow(plane, cmap="magma", vmin=-6, vmax=0)
            axis.scatter([6], [6], marker="x", color="#1f77ff")
            axis.set(xticks=[], yticks=[], xlabel=right, ylabel=down)
        column[0].set_title(name, fontsize=10)
    figure.colorbar(shown, ax=axes, shrink=0.8, label="gradient, logarithm to base 10, 0: the largest")
    return figure


def _reach(layers: list[nn.Module], grid: Triple) -> np.ndarray:
    """Logarithm of the gradient norm of the middle token's output by every input token; at least -6."""
    torch.manual_seed(0)
    x = torch.randn(1, *grid, 32, requires_grad=True)
    y = x
    for layer in layers:
        y = y + layer(y)
    (y - x)[0, 6, 6, 6].sum().backward()
    assert x.grad is not None
    size = x.grad[0].norm(dim=-1)
    return np.log10((size / size.max()).clamp(min=1e-6).numpy())


def times() -> Figure:
    """Density of training times by tokens, and where a solver of 50 steps asks."""
    time = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7, 5), layout="constrained", sharex=True, height_ratios=[3, 1.3]
    )
    for tokens in (256, 8_704, 139_264):
        law = Times(TimeConfig(), tokens)
        top.plot(time, law.density(time), label=f"{tokens:,} tokens: shift {law.shift:.2g}")
    top.plot(time, Times(TimeConfig(shift=1.0), 256).density(time), color="0.5", linestyle=":", label="shift 1")
    top.set(ylabel="density of training times", ylim=(0, None))
    top.legend(frameon=False)
    schedules = [("linear_quadratic", 139_264), ("uniform", 139_264), ("uniform", 256)]
    for row, (schedule, tokens) in enumerate(schedules):
        asked = Times(TimeConfig(), tokens).schedule(SampleConfig(steps=50, schedule=schedule))
        bottom.plot(asked, [-row] * len(asked), "|", markersize=10)
    names = [f"{schedule}, {tokens:,}" for schedule, tokens in schedules]
    bottom.set(yticks=[0, -1, -2], yticklabels=names, xlabel="time: 0 is noise, 1 is the clip", ylim=(-2.6, 0.6))
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "scan_orders": scan_orders,
    "windows": windows,
    "review_tokens": review_tokens,
    "reach": reach,
    "times": times,
}


def draw(folder: Path) -> list[Path]:
    """Every picture as a PNG in the folder; returns their paths."""
    made = []
    for name, picture in PICTURES.items():
        torch.manual_seed(0)
        figure = picture()
        made.append(folder / f"{name}.png")
        figure.savefig(made[-1], dpi=110, metadata={"Software": None})
        plt.close(figure)
    return made


if __name__ == "__main__":
    print(*draw(Path(sys.argv[1]) if sys.argv[1:] else FOLDER), sep="\n")
