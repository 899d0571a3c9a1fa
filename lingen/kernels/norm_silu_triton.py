"""Triton twin of `lingen.kernels.norm_silu`: x is read once and the result is written once, many rows to a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lingen.kernels.fp8_triton import as_rows

TILE = {"forward": 4096, "backward": 2048}
"""Numbers that a program holds at a time: rows times the channels, padded to a power of two."""
WARPS = 4
PROGRAMS = 2048
"""The most programs that share the rows of the backward pass; each writes one row of sums for the weight's gradient."""


@triton.jit
def _norm_silu_forward(x, x_row, weight, bias, y, n, d, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None] & (columns < d)[None, :]
    value = tl.load(x + rows[:, None] * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + columns, mask=columns < d, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=columns < d, other=0.0).to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, 1) / d + eps)[:, None] * scale + shift
    tl.store(y + rows[:, None] * d + columns, (normed * tl.sigmoid(normed)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_silu_backward(
    x, x_row, weight, bias, dy, dy_row, dx, d_weights, n, d, eps, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    columns = tl.arange(0, COLUMNS)
    scale = tl.load(weight + columns, mask=columns < d, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=columns < d, other=0.0).to(tl.float32)
    d_scale = tl.zeros([COLUMNS], tl.float32)
    d_shift = tl.zeros([COLUMNS], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < n)[:, None] & (columns < d)[None, :]
        value = tl.load(x + rows[:, None] * x_row + columns, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + rows[:, None] * dy_row + columns, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, 1) / d + eps)[:, None]
        unit = value * inverse
        normed = unit * scale + shift
        share = tl.sigmoid(normed)
        grad = grad * share * (1 + normed * (1 - share))
        d_scale += tl.sum(grad * unit, 0)
        d_shift += tl.sum(grad, 0)
        grad = grad * scale
        grad = inverse * (grad - unit * (tl.sum(grad * unit, 1) / d)[:, None])
        tl.store(dx + rows[:, None] * d + columns, grad.to(dx.dtype.element_ty), mask=inside)
    target = d_weights + tl.program_id(0) * 2 * d + columns
    tl.store(target, d_scale, mask=columns < d)
    tl.store(target + d, d_shift, mask=columns < d)


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [*rows d] -> a contiguous result in x's dtype."""
    rows, y = as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    height, width = _tile(x.shape[-1], "forward")
    if len(rows):
        grid = (triton.cdiv(len(rows), height),)
        _norm_silu_forward[grid](
            rows, rows.stride(0), weight, bias, y, len(rows), x.shape[-1], eps,
            ROWS=height, COLUMNS=width, num_warps=WARPS,
        )  # fmt: skip
    return y


def backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, contiguous and in its dtype, of the weight and of the bias."""
    rows, grads = as_rows(x), as_rows(dy)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    height, width = _tile(x.shape[-1], "backward")
    tiles = triton.cdiv(len(rows), height)
    d_weights = torch.empty(min(tiles, PROGRAMS), 2, x.shape[-1], dtype=torch.float32, device=x.device)
    if tiles:
        _norm_silu_backward[(len(d_weights),)](
            rows, rows.stride(0), weight, bias, grads, grads.stride(0), dx, d_weights, len(rows), x.shape[-1], eps,
            tiles, ROWS=height, COLUMNS=width, num_warps=WARPS,
        )  # fmt: skip
    d_weight, d_bias = d_weights.sum(0)
    return dx, d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def _tile(d: int, kind: str) -> tuple[int, int]:
    """Rows and columns of a program's tile."""
    width = triton.next_power_of_2(d)
    return max(1, TILE[kind] // width), width
