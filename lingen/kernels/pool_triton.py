"""Triton twin of `lingen.kernels.pool`: forward and backward as plain functions, and as one autograd Function.

A program takes a window with a block of channels: it adds up the tokens, or hands each its share of a gradient."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lingen.kernels.pool import Size, windows_of

# CHANNELS of a program, and the tokens that it loads AHEAD of its arithmetic.
LAUNCH = {"CHANNELS": 512, "AHEAD": 8, "num_warps": 2}


def pool_forward(x: Tensor, size: Size) -> Tensor:
    """Means [b t2 h2 w2 c] of `pool`, whose arguments these are; `x` may be a view with a contiguous last axis."""
    size, windows = windows_of(x, size)
    out = x.new_empty(x.shape[0], *windows, x.shape[-1])
    _launch(_pool_forward, x, out, x, size, windows)
    return out


def pool_backward(grad: Tensor, size: Size, out: Tensor, add: bool = False) -> None:
    """Gradient of `pool` from a contiguous grad [b t2 h2 w2 c], written into `out` [b t h w c], which may be a slice of
    a wider buffer, or added to what is there."""
    size, windows = windows_of(out, size)
    assert grad.shape == (out.shape[0], *windows, out.shape[-1]) and grad.is_contiguous()
    _launch(_pool_backward, grad, out, out, size, windows, ADD=add)


class PoolFunction(torch.autograd.Function):
    """Saves nothing but the shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Size) -> Tensor:
        ctx.shape, ctx.size = x.shape, size
        return pool_forward(x, size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx = grad.new_empty(ctx.shape)
        pool_backward(grad.contiguous(), ctx.size, dx)
        return dx, None


def _launch(
    kernel: Any, source: Tensor, target: Tensor, grid: Tensor, size: Size, windows: Size, **flags: bool
) -> None:
    """Runs a kernel over all windows of `grid`, the one of the two tensors that holds the tokens."""
    b, *tokens, c = grid.shape
    assert grid.stride(-1) == 1 or c == 1
    programs = windows[0] * windows[1] * windows[2] * triton.cdiv(c, LAUNCH["CHANNELS"])
    kernel[(programs, b)](
        source, target, *tokens, *windows, c, *grid.stride()[:-1], T=size[0], H=size[1], W=size[2], **flags, **LAUNCH
    )


@triton.jit
def _pool_forward(
    x, out, t, h, w, windows_t, windows_h, windows_w, c, stride_b, stride_t, stride_h, stride_w,
    T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    window, channel, first_t, first_h, first_w, share = _window(
        t, h, w, windows_t, windows_h, windows_w, c, T, H, W, CHANNELS
    )
    x += tl.program_id(1).to(tl.int64) * stride_b + channel
    total = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, T * H * W, AHEAD):
        for i in tl.static_range(AHEAD):
            at, real = _token(start + i, first_t, first_h, first_w, t, h, w, stride_t, stride_h, stride_w, T, H, W)
            total += tl.load(x + at, mask=real & (channel < c), other=0).to(tl.float32)
    tl.store(out + window * c + channel, (total * share).to(out.dtype.element_ty), mask=channel < c)


@triton.jit
def _pool_backward(
    grad, out, t, h, w, windows_t, windows_h, windows_w, c, stride_b, stride_t, stride_h, stride_w,
    T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, ADD: tl.constexpr,
    CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    window, channel, first_t, first_h, first_w, share = _window(
        t, h, w, windows_t, windows_h, windows_w, c, T, H, W, CHANNELS
    )
    out += tl.program_id(1).to(tl.int64) * stride_b + channel
    value = tl.load(grad + window * c + channel, mask=channel < c, other=0).to(tl.float32) * share
    for start in range(0, T * H * W, AHEAD):
        sums = ()
        for i in tl.static_range(AHEAD):  # all loads before the first store: none is moved across it
            at, real = _token(start + i, first_t, first_h, first_w, t, h, w, stride_t, stride_h, stride_w, T, H, W)
            if ADD:
                sums += (value + tl.load(out + at, mask=real & (channel < c), other=0).to(tl.float32),)
            else:
                sums += (value,)
        for i in tl.static_range(AHEAD):
            at, real = _token(start + i, first_t, first_h, first_w, t, h, w, stride_t, stride_h, stride_w, T, H, W)
            tl.store(out + at, sums[i].to(out.dtype.element_ty), mask=real & (channel < c))


@triton.jit
def _window(
    t, h, w, windows_t, windows_h, windows_w, c,
    T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """This program's row of pooled tokens, its channels, its window's first token and each real token's share."""
    # Channels first: programs that run together read whole rows.
    blocks = tl.cdiv(c, CHANNELS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    window = tl.program_id(0) // blocks
    first_t = window // (windows_h * windows_w) * T
    first_h, first_w = window // windows_w % windows_h * H, window % windows_w * W
    real = tl.minimum(T, t - first_t) * tl.minimum(H, h - first_h) * tl.minimum(W, w - first_w)
    row = tl.program_id(1).to(tl.int64) * windows_t * windows_h * windows_w + window
    return row, channel, first_t, first_h, first_w, 1.0 / real.to(tl.float32)


@triton.jit
def _token(
    k, first_t, first_h, first_w, t, h, w, stride_t, stride_h, stride_w,
    T: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Offset of the window's token k, and whether there is such a token in the grid."""
    at_t, at_h, at_w = first_t + k // (H * W), first_h + k // W % H, first_w + k % W
    real = (at_t < t) & (at_h < h) & (at_w < w) & (k < T * H * W)
    return at_t.to(tl.int64) * stride_t + at_h.to(tl.int64) * stride_h + at_w.to(tl.int64) * stride_w, real
