"""Triton twin of `lingen.kernels.fp8.quantize`, and `row_to_fp8`, with which other kernels quantise a row they hold."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lingen.kernels.gradients import channels_last

WARPS = 8
"""Warps of a program, which takes one row."""


@triton.jit
def row_to_fp8(y):
    """A row in float32 (zeros beyond its end) -> 8-bit values and its scale; `SMALLEST_ROW` and 448 as in the twin."""
    scale = tl.maximum(tl.max(tl.abs(y), 0), 1e-12) / 448.0
    return (y / scale).to(tl.float8e4nv), scale


@triton.jit
def _fp8_quantize(x, x_row, values, scales, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    y = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    value, scale = row_to_fp8(y)
    tl.store(values + row * width + columns, value, mask=inside)
    tl.store(scales + row, scale)


def as_rows(x: Tensor) -> Tensor:
    """x as [n d], a view where one stride leads from row to row and columns lie side by side, else a copy."""
    return channels_last(x.reshape(-1, x.shape[-1]))


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [*rows d] -> float8_e4m3fn values of x's shape and float32 scales [*rows 1]; x is read once."""
    rows = as_rows(x)
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if len(rows):
        block = triton.next_power_of_2(rows.shape[1])
        _fp8_quantize[(len(rows),)](rows, rows.stride(0), values, scale, rows.shape[1], block, num_warps=WARPS)
    return values, scale
