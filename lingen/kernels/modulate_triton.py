"""Triton twin of `lingen.kernels.modulate`: one kernel forward and one backward for its three functions.

A program takes a run of tokens of one frame, so that it reads the frame's modulation once. It sees a whole row at a
time: the norm is computed again in the backward pass, and nothing but the operands is kept for it. Sums over tokens are
kept in registers, written once a program and added up in a fixed order."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lingen.kernels.fp8 import FLOAT8, Quantized
from lingen.kernels.fp8_triton import row_to_fp8
from lingen.kernels.gradients import channels_last

TUNING = {"forward": (2112, 16, 3), "backward": (528, 16, 2)}
"""The most programs that share the tokens (16 and 4 for each multiprocessor of an H100), the warps of each, and the
tokens that it loads ahead."""
_LANES = 256  # channels of a warp, where a row is narrow; there are more programs then


@triton.jit
def _row(pointer, columns, inside):
    return tl.load(pointer + columns, mask=inside, other=0.0).to(tl.float32)


# Numbers that change from grid to grid and from part to part: no reason to compile again.
_SIZES = ["frames", "rows", "run"]


@triton.jit(do_not_specialize=_SIZES)
def _modulate_forward(
    x, x_clip, x_row, update, update_clip, update_row, gate, gate_clip, gate_frame, weight, shift, shift_clip,
    shift_frame, scale, scale_clip, scale_frame, positions, positions_row, x_new, y, y_scale,
    eps, width, frames, rows, run, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program takes `run` of the `rows` tokens of a frame; an operand that is None takes no part."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    clip = (tl.program_id(1) // frames).to(tl.int64)
    frame = tl.program_id(1) % frames
    first = frame.to(tl.int64) * rows + tl.program_id(0) * run
    count = tl.minimum(run, rows - tl.program_id(0) * run)
    out = (clip * frames * rows + first) * width
    x += clip * x_clip + first * x_row
    if update is not None:
        update += clip * update_clip + first * update_row
        x_new += out
        if gate is not None:
            gates = _row(gate + clip * gate_clip + frame * gate_frame, columns, inside)
    if weight is not None:
        gain = _row(weight, columns, inside)
        y += out
        if scale is not None:
            factor = 1 + _row(scale + clip * scale_clip + frame * scale_frame, columns, inside)
            gain *= factor
        if shift is not None:
            moved = _row(shift + clip * shift_clip + frame * shift_frame, columns, inside)
        if positions is not None:
            positions += first * positions_row
        if y_scale is not None:
            y_scale += clip * frames * rows + first
    for i in tl.range(0, count, num_stages=STAGES):
        stream = _row(x + i * x_row, columns, inside)
        if update is not None:
            added = _row(update + i * update_row, columns, inside)
            if gate is not None:
                added = added * gates
            rounded = (stream + added).to(x_new.dtype.element_ty)
            tl.store(x_new + i * width + columns, rounded, mask=inside)
            stream = rounded.to(tl.float32)
        if weight is not None:
            normed = stream * tl.rsqrt(tl.sum(stream * stream, 0) / width + eps) * gain
            if positions is not None:
                place = _row(positions + i * positions_row, columns, inside)
                normed += place * factor if scale is not None else place
            if shift is not None:
                normed += moved
            if y_scale is not None:
                values, size = row_to_fp8(tl.where(inside, normed, 0.0))
                tl.store(y_scale + i, size)
                tl.store(y + i * width + columns, values, mask=inside)
            else:
                tl.store(y + i * width + columns, normed.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _modulate_backward(
    x, x_clip, x_row, update, update_clip, update_row, gate, gate_clip, gate_frame, weight, scale, scale_clip,
    scale_frame, positions, positions_row, dx_new, dx_new_clip, dx_new_row, dy, dy_clip, dy_row,
    dx, d_update, d_positions, sums, eps, width, frames, rows, run, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`sums` [b f, programs, 4, d]: over a program's tokens of dy, dy x / rms(x), dy positions and dx update; from the
    first three follow the gradients of shift, weight and scale, and the last is that of the gate."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    clip = (tl.program_id(1) // frames).to(tl.int64)
    frame = tl.program_id(1) % frames
    first = frame.to(tl.int64) * rows + tl.program_id(0) * run
    count = tl.minimum(run, rows - tl.program_id(0) * run)
    out = (clip * frames * rows + first) * width
    of_shift = tl.zeros([BLOCK], tl.float32)
    of_norm = tl.zeros([BLOCK], tl.float32)
    of_positions = tl.zeros([BLOCK], tl.float32)
    of_gate = tl.zeros([BLOCK], tl.float32)
    if dx_new is not None:
        dx_new += clip * dx_new_clip + first * dx_new_row
    if d_update is not None:
        d_update += out
    if gate is not None:
        update += clip * update_clip + first * update_row
        gates = _row(gate + clip * gate_clip + frame * gate_frame, columns, inside)
    if weight is not None:
        x += clip * x_clip + first * x_row
        dy += clip * dy_clip + first * dy_row
        dx += out
        gain = _row(weight, columns, inside)
        if scale is not None:
            factor = 1 + _row(scale + clip * scale_clip + frame * scale_frame, columns, inside)
            gain *= factor
        if positions is not None:
            positions += first * positions_row
        if d_positions is not None:
            d_positions += out
    for i in tl.range(0, count, num_stages=STAGES):
        if weight is not None:
            grad = _row(dy + i * dy_row, columns, inside)
            stream = _row(x + i * x_row, columns, inside)
            inverse = tl.rsqrt(tl.sum(stream * stream, 0) / width + eps)
            normed = stream * inverse
            of_shift += grad
            of_norm += grad * normed
            if positions is not None:
                of_positions += grad * _row(positions + i * positions_row, columns, inside)
            if d_positions is not None:
                moved = grad * factor if scale is not None else grad
                tl.store(d_positions + i * width + columns, moved.to(d_positions.dtype.element_ty), mask=inside)
            grad *= gain
            total = inverse * (grad - normed * (tl.sum(grad * normed, 0) / width))
            if dx_new is not None:
                total += _row(dx_new + i * dx_new_row, columns, inside)
            tl.store(dx + i * width + columns, total.to(dx.dtype.element_ty), mask=inside)
        else:
            total = _row(dx_new + i * dx_new_row, columns, inside)
        if gate is not None:
            of_gate += total * _row(update + i * update_row, columns, inside)
            total *= gates
        if d_update is not None:
            tl.store(d_update + i * width + columns, total.to(d_update.dtype.element_ty), mask=inside)
    sums += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 4 * width + columns
    tl.store(sums, of_shift, mask=inside)
    tl.store(sums + width, of_norm, mask=inside)
    tl.store(sums + 2 * width, of_positions, mask=inside)
    tl.store(sums + 3 * width, of_gate, mask=inside)


class Operands(NamedTuple):
    """Operands of `lingen.kernels.modulate`'s functions, or their gradients; None for what takes no part. Without an
    update there is no x_new, without a weight no norm."""

    x: Tensor | None
    update: Tensor | None = None
    gate: Tensor | None = None
    weight: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    positions: Tensor | None = None


def fused(operands: Operands, eps: float, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Any, Any]:
    """(x_new or None, normed or None), as `lingen.kernels.modulate` defines them."""
    if torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands):
        return _Fused.apply(eps, dtype, *operands)
    return forward(operands, eps, dtype, out)


def forward(
    operands: Operands, eps: float, dtype: torch.dtype, out: Tensor | None = None
) -> tuple[Tensor | None, Tensor | Quantized | None]:
    """`fused` without autograd; x_new is written into `out` where it is given, x itself allowed."""
    x, update, gate, weight, shift, scale, positions = operands
    assert x is not None
    x_new = y = y_scale = None
    if update is not None:
        x_new = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None or not out.is_contiguous() else out
    if weight is not None:
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        y_scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device) if dtype == FLOAT8 else None
    grid, sizes, options = _split(operands, "forward")
    if x.numel():
        _modulate_forward[grid](
            *_of_tokens(x), *_of_tokens(update), *_of_frames(gate), weight, *_of_frames(shift), *_of_frames(scale),
            *_of_positions(positions), x_new, y, y_scale, eps, *sizes, **options,
        )  # fmt: skip
    if out is not None and x_new is not None and out is not x_new:
        x_new = out.copy_(x_new)
    return x_new, y if y is None or y_scale is None else Quantized(y, y_scale)


def backward(
    operands: Operands,
    eps: float,
    dx_new: Tensor | None,
    dy: Tensor | None,
    update_dtype: torch.dtype | None = None,
    wants_positions: bool = True,
) -> Operands:
    """Gradients of `forward`.

    Args:
        operands: x is what was normed, x_new where there was an update; the update is only needed with a gate.
        dx_new, dy: gradients of the two results.
        update_dtype: of the update's gradient; None: there was no update."""
    x, update, gate, weight, shift, scale, positions = operands
    assert x is not None
    grid, sizes, options = _split(operands, "backward")
    # Without a norm the gradient of x is that of x_new, and without a gate that of the update is, too.
    dx = dx_new if weight is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_update = d_positions = None
    if update_dtype is not None and (gate is not None or update_dtype != x.dtype):
        d_update = torch.empty(x.shape, dtype=update_dtype, device=x.device)
    if positions is not None and wants_positions:
        d_positions = torch.empty(x.shape, dtype=positions.dtype, device=x.device)
    sums = torch.empty(grid[1], grid[0], 4, x.shape[-1], dtype=torch.float32, device=x.device)
    if x.numel():
        _modulate_backward[grid](
            *_of_tokens(x), *_of_tokens(update), *_of_frames(gate), weight, *_of_frames(scale),
            *_of_positions(positions), *_of_tokens(dx_new), *_of_tokens(dy),
            dx, d_update, d_positions, sums, eps, *sizes, **options,
        )  # fmt: skip
    return _from_sums(operands, sums.sum(1).unflatten(0, (len(x), -1)))._replace(
        x=dx,
        update=None if update_dtype is None else dx if d_update is None else d_update,
        positions=None if d_positions is None else d_positions[0] if len(x) == 1 else d_positions.sum(0),
    )


def _from_sums(operands: Operands, sums: Tensor) -> Operands:
    """Gradients of gate, weight, shift and scale from the sums [b f 4 d] of `_modulate_backward`."""
    _, _, gate, weight, shift, scale, positions = operands
    of_shift, of_norm, of_positions, of_gate = sums.unbind(2)
    of_weight = of_norm if scale is None else of_norm * (1 + scale)
    of_scale = of_positions if positions is not None else torch.zeros_like(of_norm)
    return Operands(
        x=None, gate=_like(of_gate, gate), weight=None if weight is None else of_weight.sum((0, 1)).to(weight.dtype),
        shift=_like(of_shift, shift), scale=None if weight is None else _like(of_scale + of_norm * weight, scale),
    )  # fmt: skip


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, dtype: torch.dtype, *operands: Tensor | None) -> Any:
        given = Operands(*operands)
        x_new, y = forward(given, eps, dtype)
        ctx.eps, ctx.update_dtype = eps, None if given.update is None else given.update.dtype
        kept_update = None if given.gate is None else given.update
        kept = given if x_new is None else given._replace(x=x_new, update=kept_update)
        ctx.save_for_backward(*kept)
        return x_new, y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        kept, (dx_new, dy) = Operands(*ctx.saved_tensors), grads
        found = backward(kept, ctx.eps, dx_new, dy, ctx.update_dtype, wants_positions=ctx.needs_input_grad[8])
        return None, None, *found


def _split(operands: Operands, kind: str) -> tuple[tuple[int, int], tuple[int, int, int, int], dict[str, int]]:
    """How the tokens are shared out: programs; width, frames, tokens of a frame and of a program; launch parameters. A
    frame is all tokens of the clip where the modulation has one row for all."""
    assert operands.x is not None
    b, t, h, w, width = operands.x.shape
    modulation = (operands.gate, operands.shift, operands.scale)
    frames = max((rows.shape[1] for rows in modulation if rows is not None), default=1)
    rows = t * h * w // frames
    programs, most, stages = TUNING[kind]
    block = triton.next_power_of_2(width)
    warps = min(most, max(1, block // _LANES))
    run = max(1, triton.cdiv(b * t * h * w, programs * min(8, most // warps)))
    options = {"BLOCK": block, "STAGES": stages, "num_warps": warps}
    return (triton.cdiv(rows, run), b * frames), (width, frames, rows, run), options


def _of_tokens(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """[b t h w d] -> the tensor and its strides between clips and between tokens."""
    if x is None:
        return None, 0, 0
    rows = channels_last(x.reshape(len(x), -1, x.shape[-1]))
    return rows, rows.stride(0), rows.stride(1)


def _of_positions(positions: Tensor | None) -> tuple[Tensor | None, int]:
    """[t h w d] -> the tensor and its stride between tokens."""
    tokens, _, row = _of_tokens(None if positions is None else positions[None])
    return tokens, row


def _of_frames(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """[b f d] -> the tensor and its strides between clips and between frames, 0 where one row serves all frames."""
    if x is None:
        return None, 0, 0
    x = channels_last(x)
    return x, x.stride(0), x.stride(1) if x.shape[1] > 1 else 0


def _like(sums: Tensor, operand: Tensor | None) -> Tensor | None:
    """Sums [b f d] as the gradient of `operand`, which may have one row for all frames; None without an operand."""
    if operand is None:
        return None
    return (sums if operand.shape[1] > 1 else sums.sum(1, keepdim=True)).to(operand.dtype)
