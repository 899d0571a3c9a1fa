"""The complexity receipt: FLOPs, time and memory of one layer of each mixer, from short clips to long ones."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lingen.blocks.layers import grid_of
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import MIXERS
from lingen.recipe.sections import Triple

from .build import MixerChoice, built, kernel_of, name_of
from .mixer_flops import mixer_flops
from .parts import milliseconds_by_part
from .place import Place, dtype_name
from .receipt import PartTimes, findings
from .results import GIB, Fields, Results
from .timing import Operation, both_ways, forward_backward, forward_work, held, saved_bytes

GRIDS: tuple[Triple, ...] = (
    (34, 16, 16), (34, 32, 32), (68, 32, 32), (34, 64, 64), (136, 32, 32), (272, 32, 32),
)  # fmt: skip
"""256x256 for 17 s, 512x512 for 17, 34, 68 and 136 s, 1024x1024 for 17 s: 8,704 to 278,528 tokens."""

QUICK_GRIDS: tuple[Triple, ...] = ((32, 8, 8), (64, 8, 8), (128, 8, 8), (256, 8, 8))
"""A clip that grows longer at one size, for a CPU: 2,048 to 16,384 tokens."""

ONCE_TFLOP = 500
"""Work above this is run once, without a warm-up: a second or more on the fastest GPU."""


def label(grid: Triple) -> str:
    """Pixels and seconds of a grid at 8x8x8 compression, patches of 1x2x2 and 16 frames a second (LinGen)."""
    return f"{16 * grid[1]}x{16 * grid[2]} {grid[0] / 2:g} s"


def check_grids(grids: Sequence[Triple]) -> None:
    """RecipeError for too few of them."""
    if len({math.prod(grid) for grid in grids}) < 3:
        raise RecipeError(f"An exponent needs at least three sizes, got {[list(grid) for grid in grids]}.")


def scaling(mixers: Sequence[MixerChoice], dim: int, grids: Sequence[Triple], place: Place, results: Results) -> Fields:
    """Measures every mixer on every grid, smallest first, and fits exponents; the file grows row by row. Returns what
    the file holds: the head, rows, and ``fits: {mixer: {flops | time | memory: {exponent, low, high}}}`` of the
    forward; what else is in it is said at `findings`."""
    memory = "activation peak above weights" if place.cuda else "activations kept for the backward pass"
    results.data["memory"] = memory
    splits = measure_scaling(mixers, dim, grids, place, results)
    # FLOPs are counted without computing: on the real grids, whatever was measured.
    results.data |= findings(results.rows, mixers, dim, GRIDS, splits)
    results.write()
    return results.data


def measure_scaling(
    mixers: Sequence[MixerChoice], dim: int, grids: Sequence[Triple], place: Place, results: Results
) -> dict[str, list[tuple[int, PartTimes]]]:
    """A row for each mixer and grid. Returns mixer -> (tokens, milliseconds of the parts) for each grid."""
    layers = {name_of(one): built(partial(MIXERS.build, one, dim, 1), place) for one in mixers}
    normal = partial(torch.randn, device=place.device, dtype=place.dtype)
    # Compiles kernels and lets the libraries take their workspace, which else counts as memory of the first size.
    x = normal(1, *min(grids, key=math.prod), dim)
    for layer in layers.values():
        forward_work(layer, [x])()
        forward_backward(layer, [x.detach().requires_grad_()], layer.parameters(), torch.randn_like(x))()
    weights = held(place.device)
    splits: dict[str, list[tuple[int, PartTimes]]] = defaultdict(list)
    for grid in sorted(grids, key=math.prod):
        results.say(f"{label(grid)}: {math.prod(grid):,} tokens")
        of = {name_of(one): mixer_flops(one, dim, 1, grid, place.sixteen_bit, place.device.type) for one in mixers}
        tflop = {name: sum(flops.values()) / 1e12 for name, flops in of.items()}
        for row, split in _on_grid(layers, tflop, normal(1, *grid, dim), weights, place):
            results.add(row)
            splits[row["mixer"]] += [(row["tokens"], split)] if split else []
    return splits


def _on_grid(
    layers: Mapping[str, nn.Module], tflop: Mapping[str, float], x: Tensor, weights: float, place: Place
) -> list[tuple[Fields, PartTimes | None]]:
    """A row for each mixer, and the forward's time by part where it is short enough to be run again."""
    # A CPU compiles nothing, so that the first run counts.
    cold, cold_training = ({name for name in layers if not place.cuda or n * tflop[name] > ONCE_TFLOP} for n in (1, 3))
    runs: dict[str, tuple[Operation, list[nn.Parameter]]] = {
        name: (layer, list(layer.parameters())) for name, layer in layers.items()
    }
    rows = both_ways(runs, [x], partial(torch.randn_like, x), place, (cold, cold_training), weights)
    grid, found = grid_of(x), []
    for name, (layer, own) in runs.items():
        if not place.cuda:
            rows[name]["gib"] = saved_bytes(layer, [x], own) / GIB
        about = {
            "name": label(grid), "mixer": name, "kernel": kernel_of(layers[name]), "dtype": dtype_name(x.dtype),
            "tokens": math.prod(grid), "tflop": tflop[name], "parameters": sum(p.numel() for p in own),
            "grid": list(grid),
        }  # fmt: skip
        again = "ms" in rows[name] and tflop[name] <= ONCE_TFLOP
        found.append(
            (about | rows[name], milliseconds_by_part(forward_work(layer, [x]), place.device, 3) if again else None)
        )
    return found
