"""Triton twin of `lingen.kernels.swiglu`: both halves are read once and the result is written once. Names, beside those
of `lingen.kernels`: half, width of the result; BLOCK, columns of a program; scales, those of the rows of an 8-bit
result, else None."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lingen.kernels.fp8 import FLOAT8, Quantized
from lingen.kernels.fp8_triton import as_rows, row_to_fp8

TUNING = {"forward": (8192, 16), "backward": (8192, 16), "quantized": (1 << 20, 16)}
"""Most columns of a program, and its warps. 8-bit rows need their largest value, so one program has the whole row."""
_LANES = 256  # columns of a warp, where a row is narrow


@triton.jit
def _swiglu_forward(gate_up, gate_up_row, y, scales, half, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < half
    source = gate_up + row * gate_up_row + columns
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    if scales is not None:
        out, scale = row_to_fp8(out)
        tl.store(scales + row, scale)
    tl.store(y + row * half + columns, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(gate_up, gate_up_row, dy, dy_row, d_gate_up, half, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < half
    source = gate_up + row * gate_up_row + columns
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * dy_row + columns, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    target = d_gate_up + row * (2 * half) + columns
    d_gate = grad * up * share * (1 + gate * (1 - share))
    tl.store(target, d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
    tl.store(target + half, (grad * gate * share).to(d_gate_up.dtype.element_ty), mask=inside)


def forward(gate_up: Tensor, dtype: torch.dtype) -> Tensor | Quantized:
    """gate_up [*rows 2h] -> [*rows h]."""
    rows, half = as_rows(gate_up), gate_up.shape[-1] // 2
    y = torch.empty(*gate_up.shape[:-1], half, dtype=dtype, device=gate_up.device)
    scale = None
    if dtype == FLOAT8:
        scale = torch.empty(*gate_up.shape[:-1], 1, dtype=torch.float32, device=gate_up.device)
    grid, options = _grid(rows, half, "forward" if scale is None else "quantized")
    if len(rows):
        _swiglu_forward[grid](rows, rows.stride(0), y, scale, half, **options)
    return y if scale is None else Quantized(y, scale)


def backward(dy: Tensor, gate_up: Tensor, dtype: torch.dtype) -> tuple[Tensor]:
    """Gradient of gate_up, contiguous, in its dtype."""
    rows, grads, half = as_rows(gate_up), as_rows(dy), dy.shape[-1]
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    grid, options = _grid(rows, half, "backward")
    if len(rows):
        _swiglu_backward[grid](rows, rows.stride(0), grads, grads.stride(0), out, half, **options)
    return (out,)


def _grid(rows: Tensor, half: int, kind: str) -> tuple[tuple[int, int], dict[str, int]]:
    most, warps = TUNING[kind]
    block = min(most, triton.next_power_of_2(half))
    options = {"BLOCK": block, "num_warps": min(warps, max(1, block // _LANES))}
    return (len(rows), triton.cdiv(half, block)), options
