"""Scan orders: in which sequence a mixer reads the tokens of a [t h w] grid.

An entry of SCANS is an axis string (slowest axis first, so "thw" is raster order; a kernel can take it as strides), a
function `(t, h, w) -> LongTensor [t*h*w]` (the flat raster index of each position in the sequence), or a cycle: a
tuple of entries, of which layer i takes number i % len."""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from lingen.kernels.constants import constants
from lingen.recipe.errors import RecipeError, SettingError
from lingen.recipe.registry import SCANS
from lingen.recipe.sections import Triple

ScanOrder = str | Callable[[int, int, int], Tensor]
ScanEntry = ScanOrder | tuple[Any, ...]

AXES = ("thw", "twh", "htw", "hwt", "wth", "wht")

# Rotary-major scan of LinGen (arXiv 2412.09856): spatial rows, spatial columns, temporal rows, temporal columns. A
# shifted window alternates with the same layer index, so "twh" and "wht" always meet shifted windows.
ROTARY_MAJOR = ("thw", "twh", "hwt", "wht")


def zigzag(t: int, h: int, w: int) -> Int[Tensor, "n"]:
    """Boustrophedon over rows and frames: consecutive tokens are always neighbours in the grid."""
    raster = torch.arange(t * h * w).view(t, h, w)
    raster[:, 1::2] = raster[:, 1::2].flip(2)
    raster[1::2] = raster[1::2].flip(1, 2)
    return raster.flatten()


def hwt_folded(t: int, h: int, w: int) -> Int[Tensor, "n"]:
    """'hwt', every second column backwards in time: each goes on at the frame where the one before it ended [ours]."""
    return _folded("hwt", (t, h, w))


def wht_folded(t: int, h: int, w: int) -> Int[Tensor, "n"]:
    """'wht', every second column backwards in time, as in `hwt_folded`."""
    return _folded("wht", (t, h, w))


def _folded(order: str, grid: Triple) -> Int[Tensor, "n"]:
    columns = _raster_index(order, grid).view(-1, grid[0])
    columns[1::2] = columns[1::2].flip(1)
    return columns.flatten()


# The paper's cycle, but in its temporal orders no clip's end is joined to a clip's start.
ROTARY_MAJOR_FOLDED = ("thw", "twh", hwt_folded, wht_folded)

_IN_COLUMNS = ("hwt", "wht", hwt_folded, wht_folded)


def column_length(order: ScanOrder, grid: Triple) -> int:
    """Tokens of a column where `order` reads the grid column by column, each from one end of time to the other; 0 for
    other orders, and for one frame, whose columns have nothing between their ends."""
    return grid[0] if order in _IN_COLUMNS and grid[0] > 1 else 0


def hilbert(t: int, h: int, w: int) -> Int[Tensor, "n"]:
    """Hilbert curve of the enclosing cube with the tokens outside of the grid left out (Skilling 2004)."""
    bits = max(1, (max(t, h, w) - 1).bit_length())
    x = list(torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).unbind(1))
    for bit in reversed(range(1, bits)):
        low = (1 << bit) - 1
        for i in range(3):
            is_set = (x[i] >> bit & 1).bool()
            swap = (x[0] ^ x[i]) & low
            first = torch.where(is_set, x[0] ^ low, x[0] ^ swap)
            x[i] = first if i == 0 else torch.where(is_set, x[i], x[i] ^ swap)
            x[0] = first
    x[1] = x[1] ^ x[0]
    x[2] = x[2] ^ x[1]
    flips = torch.zeros_like(x[2])
    for bit in range(1, bits):
        flips = torch.where((x[2] >> bit & 1).bool(), flips ^ ((1 << bit) - 1), flips)
    key = torch.zeros_like(flips)
    for bit in reversed(range(bits)):
        for axis in x:
            key = key << 1 | ((axis ^ flips) >> bit & 1)
    return key.argsort()


TRIED = 2, 3, 4
"""The grid on which an order is tried before a mixer takes it."""


def order_of(scan: str | ScanEntry, layer: int) -> ScanOrder:
    """The order that `layer` takes from an entry or from the name of one. Raises SettingError for an unknown name and
    for what is not a scan order, and where a function gives no bijection or another one at each call."""
    entry: Any = scan
    for _ in range(8):  # a cycle may hold names and cycles, nested at most 8 deep
        if entry in AXES or callable(entry):
            order = cast(ScanOrder, entry)
            permutation(order, TRIED, torch.device("cpu"))  # refuses what is no bijection
            return order
        if isinstance(entry, str):
            try:
                entry = SCANS[entry]
            except RecipeError as error:
                raise SettingError("scan", str(error)) from error
        elif isinstance(entry, (tuple, list)) and entry:
            entry = entry[layer % len(entry)]
        else:
            break
    raise SettingError("scan", f"scan={scan!r} is no scan order: neither an axis string nor a function nor a cycle.")


@constants(maxsize=128)
def permutation(order: ScanOrder, grid: Triple, device: torch.device) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"]]:
    """Raster index of each position in the sequence, and the position of each raster index. Kept per device."""
    if device.type == "meta":
        index = torch.empty(grid[0] * grid[1] * grid[2], dtype=torch.int64, device=device)
        return index, index
    index = _raster_index(order, grid)
    return index.to(device), index.argsort().to(device)


def _raster_index(order: ScanOrder, grid: Triple) -> Int[Tensor, "n"]:
    raster = torch.arange(grid[0] * grid[1] * grid[2])
    if isinstance(order, str):
        return raster.view(grid).permute(*map("thw".index, order)).flatten()
    name = getattr(order, "__name__", repr(order))
    try:
        index = order(*grid)
    except Exception as error:  # a third party's function may raise anything
        told = f"Scan order '{name}' raises {type(error).__name__} on a {grid} grid: {error}"
        raise SettingError("scan", told) from error
    if not isinstance(index, Tensor) or index.is_floating_point():
        what = str(index.dtype) if isinstance(index, Tensor) else type(index).__name__
        raise SettingError("scan", f"Scan order '{name}' gives {what}, not a tensor of whole numbers.")
    if index.shape != raster.shape or not torch.equal(index.long().sort().values, raster):
        told = f"does not visit each of the {len(raster)} tokens of a {grid} grid once"
        raise SettingError("scan", f"Scan order '{name}' {told}.")
    if grid == TRIED and not torch.equal(index, order(*grid)):
        told = "another order at each call: ranks, a resumed run and sampling would differ; give it a seed"
        raise SettingError("scan", f"Scan order '{name}' gives {told}.")
    return index.long()


def adjacency(scan: str | ScanEntry, grid: Triple, layer: int = 0) -> tuple[float, float, float]:
    """Mean distance in the sequence between tokens that are neighbours in t, in h and in w (0 where an axis is 1)."""
    _, inverse = permutation(order_of(scan, layer), grid, torch.device("cpu"))
    position = inverse.view(grid).double()
    steps = (position.diff(dim=axis).abs() for axis in range(3))
    t, h, w = (float(along.mean()) if along.numel() else 0.0 for along in steps)
    return t, h, w
