"""Triton twin of `lingen.kernels.gated_norm`: forward and backward as plain functions.

A program holds a whole row in registers, as a tuple of pieces [groups lanes]: a width such as 5120 is no power of two,
and one padded to 8192 would waste a third of the lanes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lingen.kernels.fp8 import FLOAT8, LARGEST_FLOAT8
from lingen.kernels.gradients import channels_last

# PROGRAMS of the backward pass share the rows, and each sums a gradient of the weight of its own.
# 32 * num_warps threads with 4 lanes each read float32 weights and bfloat16 tokens alike, without a shuffle.
LAUNCH = {"forward": {"LANES": 1024, "num_warps": 8}, "backward": {"LANES": 1024, "num_warps": 4, "PROGRAMS": 1056}}
# Floor of a row's scale: a row of zeros is divided by it.
SMALLEST_SCALE = 1e-12


def gated_norm_forward(
    y: Tensor, z: Tensor, weight: Tensor, index: Tensor | None, groups: int, eps: float, quantize: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Result [b n c] of `gated_norm`, whose arguments these are, and the scales [b n] where it is quantized. `y` and
    `z` may be views with a contiguous last axis."""
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (y, z))
    b, n, c = z.shape
    out = torch.empty(b, n, c, dtype=FLOAT8 if quantize else y.dtype, device=y.device)
    scale = torch.empty(b, n, dtype=torch.float32, device=y.device) if quantize else None
    tiles, parts = _tiles(c, groups, LAUNCH["forward"], whole=quantize)
    _gated_norm_forward[(n, b, parts)](
        y, z, weight.contiguous(), index, out, scale, n, groups, c // groups, eps, 1 / LARGEST_FLOAT8, SMALLEST_SCALE,
        y.stride(0), y.stride(1), z.stride(0), z.stride(1),
        INDEXED=index is not None, QUANTIZE=quantize, **tiles,
    )  # fmt: skip
    return out, scale


def gated_norm_backward(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, index: Tensor | None, *, groups: int, eps: float, dz_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `gated_norm` from grad [b n c]: (dy [b rows c], zero beyond n; dweight [c] in float32). The gradient
    of `z` is written into `dz_out` [b n c], which may be a slice of a wider buffer. Sums have a fixed order. `grad`,
    `y` and `z` may be views with a contiguous last axis."""
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (grad, y, z, dz_out))
    (b, rows, c), n = y.shape, z.shape[1]
    launch, parts = _tiles(c, groups, LAUNCH["backward"])
    programs = min(launch.pop("PROGRAMS"), b * rows)
    dy = torch.empty(b, rows, c, dtype=y.dtype, device=y.device)
    partial = torch.empty(programs, c, dtype=torch.float32, device=y.device)
    _gated_norm_backward[(programs, parts)](
        grad, y, z, weight.contiguous(), index, dy, dz_out, partial,
        triton.cdiv(b * rows, programs), b * rows, rows, n, groups, c // groups, eps,
        grad.stride(0), grad.stride(1), y.stride(0), y.stride(1), z.stride(0), z.stride(1),
        dz_out.stride(0), dz_out.stride(1), INDEXED=index is not None, **launch,
    )  # fmt: skip
    return dy, partial.sum(0)


def gated_norm_gradients(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, index: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, ...]:
    """Gradients of y, z and weight, in their dtypes."""
    dz, grad = z.new_empty(z.shape), channels_last(grad)
    dy, dweight = gated_norm_backward(grad, y, z, weight, index, groups=groups, eps=eps, dz_out=dz)
    return dy, dz, dweight.to(weight.dtype)


def _tiles(c: int, groups: int, launch: dict[str, int], whole: bool = False) -> tuple[dict[str, int], int]:
    """Launch parameters for rows of `groups` equal parts: powers of two around them, no more warps than lanes; and how
    many programs share a row, unless it has to be seen `whole`: narrow groups, such as heads, lie side by side then."""
    tall, width = triton.next_power_of_2(groups), c // groups
    if width == triton.next_power_of_2(width) and not whole:
        tall = min(tall, max(launch["LANES"] // width, 1))
    lanes = min(max(launch["LANES"] // tall, 1), triton.next_power_of_2(width))
    warps = min(launch["num_warps"], max(tall * lanes // 128, 1))
    tiles = {"GROUPS": tall, "LANES": lanes, "PIECES": triton.cdiv(width, lanes), "num_warps": warps}
    return launch | tiles, triton.cdiv(groups, tall)


@triton.jit
def _gated_norm_forward(
    y, z, weight, index, out, scale, n, groups, width, eps, step, smallest, y_batch, y_row, z_batch, z_row,
    INDEXED: tl.constexpr, QUANTIZE: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    position, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = (tl.load(index + position) if INDEXED else position).to(tl.int64)
    y += batch * y_batch + position.to(tl.int64) * y_row
    z += batch * z_batch + row * z_row
    out += (batch * n + row) * groups * width
    first = tl.program_id(2) * GROUPS
    y, z, weight, out = y + first * width, z + first * width, weight + first * width, out + first * width
    groups -= first
    # Summed lane by lane over the pieces first: one reduction for a row.
    results, squares = (), tl.zeros((GROUPS, LANES), tl.float32)
    for piece in tl.static_range(PIECES):
        channel, inside = _channels(piece, groups, width, GROUPS, LANES)
        gate = tl.load(z + channel, mask=inside, other=0).to(tl.float32)
        gated = tl.load(y + channel, mask=inside, other=0).to(tl.float32) * gate * tl.sigmoid(gate)
        squares += gated * gated
        results += (gated,)
    norm = tl.rsqrt(tl.sum(squares, 1) / width + eps)[:, None]

    normed, peaks = (), tl.zeros((GROUPS, LANES), tl.float32)
    for piece in tl.static_range(PIECES):
        channel, inside = _channels(piece, groups, width, GROUPS, LANES)
        result = results[piece] * norm * tl.load(weight + channel, mask=inside, other=0).to(tl.float32)
        if QUANTIZE:
            peaks = tl.maximum(peaks, tl.abs(result))
            normed += (result,)
        else:
            tl.store(out + channel, result.to(out.dtype.element_ty), mask=inside)
    if QUANTIZE:
        unit = tl.maximum(tl.max(tl.max(peaks, 1), 0) * step, smallest)
        tl.store(scale + batch * n + row, unit)
        inverse = 1.0 / unit
        for piece in tl.static_range(PIECES):
            channel, inside = _channels(piece, groups, width, GROUPS, LANES)
            tl.store(out + channel, (normed[piece] * inverse).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_norm_backward(
    grad, y, z, weight, index, dy, dz, partial, turns, total, rows, n, groups, width, eps,
    grad_batch, grad_row, y_batch, y_row, z_batch, z_row, dz_batch, dz_row,
    INDEXED: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    first, across = tl.program_id(1) * GROUPS, groups * width
    grad, y, z, weight = grad + first * width, y + first * width, z + first * width, weight + first * width
    dy, dz, partial = dy + first * width, dz + first * width, partial + first * width
    groups -= first
    weights, dweights = (), ()
    for piece in tl.static_range(PIECES):
        channel, inside = _channels(piece, groups, width, GROUPS, LANES)
        weights += (tl.load(weight + channel, mask=inside, other=0).to(tl.float32),)
        dweights += (tl.zeros((GROUPS, LANES), tl.float32),)
    for turn in range(turns):
        item = tl.program_id(0) + turn * tl.num_programs(0)
        batch, position = (item // rows).to(tl.int64), item % rows
        real = (item < total) & (position < n)
        row = (tl.load(index + position, mask=real, other=0) if INDEXED else position).to(tl.int64)
        at_y = y + batch * y_batch + position.to(tl.int64) * y_row
        at_z = z + batch * z_batch + row * z_row
        at_grad = grad + batch * grad_batch + row * grad_row
        squares, along = tl.zeros((GROUPS, LANES), tl.float32), tl.zeros((GROUPS, LANES), tl.float32)
        for piece in tl.static_range(PIECES):
            channel, inside = _channels(piece, groups, width, GROUPS, LANES)
            gate = tl.load(at_z + channel, mask=inside & real, other=0, cache_modifier=".ca").to(tl.float32)
            value = tl.load(at_y + channel, mask=inside & real, other=0, cache_modifier=".ca").to(tl.float32)
            slope = tl.load(at_grad + channel, mask=inside & real, other=0, cache_modifier=".ca").to(tl.float32)
            gated = value * gate * tl.sigmoid(gate)
            squares += gated * gated
            along += gated * weights[piece] * slope
        norm = tl.rsqrt(tl.sum(squares, 1) / width + eps)[:, None]
        # The gradient of the gated row loses its part along the row, which the norm takes out.
        pull = norm * norm * norm * (tl.sum(along, 1) / width)[:, None]

        at_dy = dy + item.to(tl.int64) * across
        at_dz = dz + batch * dz_batch + row * dz_row
        sums = ()
        for piece in tl.static_range(PIECES):
            channel, inside = _channels(piece, groups, width, GROUPS, LANES)
            # Read again, from the cache: another modifier keeps the compiler from holding the row in registers, which
            # would leave one program to a multiprocessor.
            gate = tl.load(at_z + channel, mask=inside & real, other=0).to(tl.float32)
            value = tl.load(at_y + channel, mask=inside & real, other=0).to(tl.float32)
            slope = tl.load(at_grad + channel, mask=inside & real, other=0).to(tl.float32)
            part = tl.sigmoid(gate)
            gated = value * gate * part
            inner = norm * weights[piece] * slope - pull * gated
            sums += (dweights[piece] + slope * gated * norm,)
            tl.store(at_dy + channel, (inner * gate * part).to(dy.dtype.element_ty), mask=inside & (item < total))
            opened = inner * value * part * (1 + gate * (1 - part))
            tl.store(at_dz + channel, opened.to(dz.dtype.element_ty), mask=inside & real)
        dweights = sums
    partial += tl.program_id(0).to(tl.int64) * across
    for piece in tl.static_range(PIECES):
        channel, inside = _channels(piece, groups, width, GROUPS, LANES)
        tl.store(partial + channel, dweights[piece], mask=inside)


@triton.jit
def _channels(piece: tl.constexpr, groups, width, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """Channels [groups lanes] of a piece, and which of them exist."""
    group = tl.arange(0, GROUPS)[:, None]
    lane = (piece * LANES + tl.arange(0, LANES))[None, :]
    return group * width + lane, (group < groups) & (lane < width)
