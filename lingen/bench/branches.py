"""MATE's branches without their projections, and whole layers in training, against the same of stock parts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lingen.bench.build import TEXT_TOKENS, built, dtype_name
from lingen.bench.flops import Grid, model_flops
from lingen.bench.plain import PlainBlock
from lingen.bench.results import GIB, Results, Row, device_name
from lingen.bench.stock import StockMamba2, StockSwin
from lingen.bench.targets import MA, TESA
from lingen.bench.timing import Work, forward, forward_backward, interleaved, or_none, peak_bytes, saved_bytes
from lingen.blocks.block import Block
from lingen.plan.forecast import peak_flops
from lingen.recipe.registry import MIXERS
from lingen.recipe.sections import LinGenConfig

Made = TypeVar("Made")


class Place(NamedTuple):
    """Where and how precisely things are measured, and for how many seconds each."""

    device: torch.device
    dtype: torch.dtype
    budget: float


Runs = Mapping[str, Callable[..., Tensor]]
"""kernel -> what it computes with."""


class Core(nn.Module):
    """A mixer without its two projections, as a function of what the first one gives."""

    def __init__(self, mixer: Any):
        super().__init__()
        self.mixer, self.inner = mixer, mixer.out_proj.in_features
        mixer.in_proj, mixer.out_proj = _Given(), nn.Identity()

    def forward(self, projected: Tensor) -> Tensor:
        """[b t h w in_proj's width] -> [b t h w out_proj's width]."""
        self.mixer.in_proj.projected = projected
        out: Tensor = self.mixer(projected[..., : self.inner])  # only its grid is looked at
        return out


class _Given(nn.Module):
    projected: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.projected


def bench_branches(
    mate: dict[str, Any], dim: int, grids: Sequence[Grid], place: Place, results: Results, layer: int = 1
) -> None:
    """Rows of ours (kernel auto) and of stock parts (compiled) for the MA-branch and a shifted TESA, in equal rounds.

    Args:
        mate: the mixer, whose settings are those of its branches.
        layer: an odd one shifts its windows; 1 reads the grid in the order twh.
    """
    for grid in grids:
        torch.compiler.reset()
        for name, branch, stock in ((MA, "ma", StockMamba2), (TESA, "te", StockSwin)):
            results.say(f"{name}, {grid[0]}x{grid[1]}x{grid[2]} tokens")
            other = {"ma": "te", "te": "ma"}[branch]
            make = partial(MIXERS.build, {**mate, other: None}, dim, layer)
            ours = getattr(built(make, place.device, place.dtype), branch)
            x = torch.randn(1, *grid, ours.in_proj.out_features, device=place.device, dtype=place.dtype)
            works: Runs = {"stock": _yardstick(stock(ours).core, place.device), "auto": Core(ours)}
            for kernel, row in _compared(works, [x], list(ours.parameters()), place).items():
                results.add({"name": name, "mixer": branch, "kernel": kernel, "dim": dim, "layer": layer} | row)


def compiled(run: Callable[..., Made]) -> Callable[..., Made]:
    """`run` under torch.compile, for sizes that stay, forward and backward.

    Without the fusion of sums over rows with sums over columns: torch 2.11 forgets the outer axes of a gradient
    [1 1 d] there, which autograd refuses (pytorch issue 178080), and writes others nowhere (issue 193061).
    """
    made: Callable[..., Made] = torch.compile(run, dynamic=False, options={"triton.mix_order_reduction": False})
    return made


def _yardstick(run: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    return compiled(run) if device.type == "cuda" else run


def _compared(runs: Runs, inputs: Sequence[Tensor], weights: Iterable[Tensor], place: Place) -> dict[str, Row]:
    """Forward, and forward and backward, of several ways to compute the same, in rounds; fields of a row for each."""
    device, weights = place.device, list(weights)
    wanting = [u.detach().requires_grad_(u.is_floating_point()) for u in inputs]
    with torch.no_grad():
        seed = torch.randn_like(next(iter(runs.values()))(*inputs))
    sampling = {name: forward(run, inputs) for name, run in runs.items()}
    training = {name: forward_backward(run, wanting, weights, seed) for name, run in runs.items()}
    ms, train_ms = (
        {name: statistics.median(times) for name, times in interleaved(works, device, place.budget).items()}
        for works in (sampling, training)
    )
    n = math.prod(inputs[0].shape[1:4])
    return {
        name: {
            "dtype": dtype_name(place.dtype), "tokens": n, "ms": ms[name], "train_ms": train_ms[name],
            "gib": _gib(sampling[name], device), "train_gib": _gib(training[name], device),
            "kept_gib": saved_bytes(run, wanting, weights) / GIB if name == "auto" else None,
            "grid": list(inputs[0].shape[1:4]),
        }
        for name, run in runs.items()
    }  # fmt: skip


def _gib(work: Work, device: torch.device) -> float | None:
    """Peak of allocated memory, all that lies there included; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = or_none(lambda: peak_bytes(work, device))
    return None if peak is None else peak / GIB


def bench_training(
    config: LinGenConfig, grid: Grid, place: Place, results: Results, layers: Sequence[int] = (0, 1)
) -> None:
    """Forward and backward of single layers of the denoiser, ours and of stock parts, compiled; then their means, with
    the tokens a second of the full depth, and MFU on a GPU whose peak is known.

    Args:
        layers: which ones; even ones do not shift their windows, and each of four has its own scan order.
    """
    rows: dict[str, list[Row]] = {}
    mixer = config.mixer[0] if isinstance(config.mixer, list) else config.mixer
    torch.compiler.reset()
    for layer in layers:
        block = built(partial(Block, replace(config, gate_init=1.0), mixer, layer), place.device, place.dtype)
        inputs = block_inputs(config.dim, grid, place)
        runs: Runs = {"stock": _yardstick(PlainBlock(block), place.device), "auto": block}
        results.say(f"layer {layer}, forward and backward")
        for kernel, row in _compared(runs, inputs, block.parameters(), place).items():
            more = {"name": "layer", "mixer": mixer["name"], "kernel": kernel, "dim": config.dim, "layer": layer}
            rows.setdefault(kernel, []).append(results.add(more | row))
    tflop = model_flops(replace(config, depth=len(layers)), grid, TEXT_TOKENS) / len(layers) / 1e12
    for own in rows.values():
        ms, first = statistics.fmean(row["train_ms"] for row in own), own[0]
        results.add(
            {key: first[key] for key in ("mixer", "kernel", "dtype", "tokens", "dim", "grid")}
            | {
                "name": "training", "ms": ms, "tflop": 3 * tflop, "layers": list(layers), "depth": config.depth,
                "tokens_per_second": 1e3 * first["tokens"] / ms / config.depth,
                **_share_of_peak(3e15 * tflop / ms, place.device),
                "kept_bytes_per_number": _per_number(first, config.dim),
            }
        )  # fmt: skip


def _share_of_peak(rate: float, device: torch.device) -> Row:
    """MFU and of what, for so many FLOP/s; nothing where no peak of the device is known."""
    peak = peak_flops(device_name(device))
    return {} if peak is None else {"mfu": rate / peak, "mfu_of": f"{peak / 1e12:g} TFLOP/s (dense bfloat16)"}


def _per_number(row: Row, dim: int) -> float | None:
    """Bytes kept for the backward pass for each token and unit of width, as `lingen.plan.forecast` counts them."""
    return row["kept_gib"] * GIB / row["tokens"] / dim if "kept_gib" in row else None


def block_inputs(dim: int, grid: Grid, place: Place) -> list[Tensor]:
    """What a block takes: tokens, positions, modulation, text and its mask."""
    make = partial(torch.randn, device=place.device, dtype=place.dtype)
    modulation = torch.randn(1, 1, 6, dim, device=place.device) * 0.1
    mask = torch.ones(1, TEXT_TOKENS + 1, dtype=torch.bool, device=place.device)
    return [make(1, *grid, dim), make(*grid, dim), modulation, make(1, TEXT_TOKENS + 1, dim), mask]
