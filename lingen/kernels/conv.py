"""Depthwise conv along a scan and SiLU, from raster order into scan order: Mamba2's step before its scan."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lingen.kernels.choice import choose
from lingen.kernels.gradients import FromInputs, channels_last

MOST_TAPS = 8


def conv_silu(
    u: Float[Tensor, "b n c"],
    weight: Float[Tensor, "c m"],
    bias: Float[Tensor, "c"],
    index: Int[Tensor, "n"] | None = None,
    *,
    before: int,
    segment: int = 0,
    rows: int | None = None,
    kernel: str = "auto",
) -> Float[Tensor, "b rows c"]:
    """y_p = silu(bias + sum over taps m of weight_m u_{index[p + m - before]}), the conv of Mamba2 (arXiv 2405.21060).

    Args:
        u: tokens in raster order; a slice of a wider projection is read where it lies.
        index: raster row of each position of the sequence, a bijection; None for raster order.
        before: how many of the taps lie in the past: m - 1 is causal. Positions outside of the sequence count as zero.
        segment: positions between two ends that the conv does not reach across: beyond them, too, it counts zero. A
            divisor of n; 0 (the default): the sequence is one piece.
        rows: rows of the result, at least n (the default); those behind the sequence are zero.
        kernel: "auto", "reference" or "triton".

    Computed in float32 at least; contiguous, in scan order and in u's dtype. Raises ValueError for sizes that do not
    fit and for a kernel that cannot run."""
    (n, c), taps = u.shape[1:], weight.shape[1]
    rows = n if rows is None else rows
    if n == 0 or weight.shape[0] != c or bias.shape != (c,):
        shapes = [list(x.shape) for x in (u, weight, bias)]
        raise ValueError(f"conv_silu needs u [b n c], weight [c m] and bias [c] with n of 1 or more, not {shapes}.")
    if not 1 <= taps <= MOST_TAPS or not 0 <= before < taps:
        raise ValueError(f"conv_silu takes 1 to {MOST_TAPS} taps with 0 to m - 1 before, not {taps} with {before}.")
    if index is not None and index.shape != (n,):
        raise ValueError(f"conv_silu needs an index of the {n} tokens of u, not of {list(index.shape)}.")
    if segment < 0 or (segment and n % segment):
        raise ValueError(f"conv_silu cannot cut {n} tokens into segments of {segment}.")
    if rows < n:
        raise ValueError(f"conv_silu writes {n} tokens: rows={rows} is too few.")
    if choose("conv", kernel, u) == "reference":
        dtype = torch.promote_types(u.dtype, torch.float32)
        sequence = u if index is None else u.index_select(1, index)
        segment = segment or n
        padded = F.pad(sequence.to(dtype).unflatten(1, (-1, segment)), (0, 0, before, taps - 1 - before))
        pre = bias.to(dtype)
        for i, tap in enumerate(weight.to(dtype).unbind(1)):
            pre = torch.addcmul(pre, padded[:, :, i : i + segment], tap)
        return F.pad(F.silu(pre.flatten(1, 2)), (0, 0, 0, rows - n)).to(u.dtype)
    from lingen.kernels.conv_triton import conv_silu_forward, conv_silu_gradients

    u = channels_last(u)
    return FromInputs.apply(conv_silu_forward, conv_silu_gradients, u, weight, bias, index, before, segment, rows)
