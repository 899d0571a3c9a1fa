"""``lingen bench training``: forward and backward of single layers, ours and of stock parts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lingen.blocks.block import Block
from lingen.plan.forecast import peak_flops
from lingen.recipe.sections import LinGenConfig, Triple

from .build import TEXT_LENGTH, built, compiled, tflop_of
from .place import Place, device_name, dtype_name
from .plain import PlainBlock
from .results import GIB, Fields, Results
from .timing import Operation, both_ways, saved_bytes

AVERAGED = ("mixer", "kernel", "dtype", "tokens", "dim", "grid")
"""Fields of a mean that are those of each of its layers."""


def bench_training(
    config: LinGenConfig,
    grids: Sequence[Triple],
    place: Place,
    results: Results,
    layers: Sequence[int] = (0, 1),
) -> None:
    """Forward and backward of single layers of the denoiser, ours and of stock parts, compiled; then their means, with
    the tokens a second of the full depth, and MFU on a GPU whose peak is known.

    Args:
        layers: which ones; even ones do not shift their windows, and each of four has its own scan order.
    """
    mixer = config.mixer[0] if isinstance(config.mixer, list) else config.mixer
    about = {"name": "layer", "mixer": mixer["name"], "dim": config.dim}
    for grid in grids:
        rows: dict[str, list[Fields]] = {}
        torch.compiler.reset()
        for layer in layers:
            block = built(partial(Block, replace(config, gate_init=1.0), mixer, layer), place)
            runs: dict[str, Operation] = {"stock": on_cuda_compiled(PlainBlock(block), place), "auto": block}
            results.say(f"layer {layer}, forward and backward")
            inputs = block_inputs(config.dim, grid, place)
            for kernel, row in compared(runs, inputs, block.parameters(), place).items():
                rows.setdefault(kernel, []).append(results.add(about | {"kernel": kernel, "layer": layer} | row))
        for own in rows.values():
            results.add(_mean(own, config, grid, place))


def on_cuda_compiled(run: Operation, place: Place) -> Operation:
    """Stock parts as one runs them: through torch.compile on a GPU, as they are on a CPU."""
    return compiled(run) if place.cuda else run


def compared(
    runs: Mapping[str, Operation], inputs: Sequence[Tensor], weights: Iterable[Tensor], place: Place
) -> dict[str, Fields]:
    """Forward, and forward and backward, of several ways to compute the same, in rounds; fields of a row for each."""
    weights = list(weights)
    with torch.no_grad():
        seed = torch.randn_like(next(iter(runs.values()))(*inputs))
    rows = both_ways({name: (run, weights) for name, run in runs.items()}, inputs, lambda: seed, place)
    grid = inputs[0].shape[1:4]
    about = {"dtype": dtype_name(place.dtype), "tokens": grid.numel(), "grid": list(grid)}
    rows["auto"]["kept_gib"] = saved_bytes(runs["auto"], inputs, weights) / GIB
    return {name: about | row for name, row in rows.items()}


def _mean(rows: Sequence[Fields], config: LinGenConfig, grid: Triple, place: Place) -> Fields:
    """Of the layers: the row of one in training, times the depth."""
    first, ms = rows[0], statistics.fmean(row["train_ms"] for row in rows)
    layers = [row["layer"] for row in rows]
    tflop = 3 * tflop_of(replace(config, depth=len(layers)), grid, place) / len(layers)
    kept = first["kept_gib"] * GIB / first["tokens"] / config.dim if "kept_gib" in first else None
    return {
        **{key: first[key] for key in AVERAGED},
        **{"name": "training", "ms": ms, "tflop": tflop, "layers": layers, "depth": config.depth},
        "tokens_per_second": 1e3 * first["tokens"] / ms / config.depth,
        **share_of_peak(1e15 * tflop / ms, place.device),
        "kept_bytes_per_number": kept,  # for each token and unit of width, as `lingen.plan.forecast` counts them
    }


def share_of_peak(rate: float, device: torch.device) -> Fields:
    """MFU and the peak that it refers to, for these FLOP/s; empty where the device's peak is not known."""
    peak = peak_flops(device_name(device))
    return {} if peak is None else {"mfu": rate / peak, "mfu_of": f"{peak / 1e12:g} TFLOP/s (dense bfloat16)"}


def block_inputs(dim: int, grid: Triple, place: Place) -> list[Tensor]:
    """A block's inputs: tokens, positions, modulation, text and its mask."""
    make = partial(torch.randn, device=place.device, dtype=place.dtype)
    modulation = torch.randn(1, 1, 6, dim, device=place.device) * 0.1
    mask = torch.ones(1, 1, TEXT_LENGTH + 1, dtype=torch.bool, device=place.device)
    return [make(1, *grid, dim), make(*grid, dim), modulation, make(1, TEXT_LENGTH + 1, dim), mask]
