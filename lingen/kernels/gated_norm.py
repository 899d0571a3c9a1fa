"""Gated RMS norm from scan order back into raster order: Mamba2's step after its scan."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lingen.kernels.choice import choose
from lingen.kernels.fp8 import FLOAT8, check_no_gradient
from lingen.kernels.gradients import FromInputs, channels_last

WIDEST_ROW = 8192


def gated_norm(
    y: Float[Tensor, "b rows c"],
    z: Float[Tensor, "b n c"],
    weight: Float[Tensor, "c"],
    index: Int[Tensor, "n"] | None = None,
    *,
    groups: int = 1,
    eps: float = 1e-5,
    quantize: bool = False,
    kernel: str = "auto",
) -> Float[Tensor, "b n c"] | tuple[Float[Tensor, "b n c"], Float[Tensor, "b n"]]:
    """out_{index[p]} = rms_norm(y_p silu(z_{index[p]})) weight, over each of `groups` equal parts of the last axis, as
    in Mamba2 (arXiv 2405.21060, section 7).

    Args:
        y: result of the scan, in scan order; rows behind the n tokens are ignored.
        z: gates in raster order; a slice of a wider projection is read where it lies.
        index: raster row of each position of the sequence, a bijection; None for raster order.
        eps: added to the mean square, above 0.
        quantize: for products in float8, without gradients: (values in float8_e4m3fn, a float32 scale for each row),
            values * scale being the result.
        kernel: "auto", "reference" or "triton".

    Computed in float32 at least; contiguous, in raster order and in y's dtype. Raises ValueError for sizes that do not
    fit, a gradient of a quantized result, and a kernel that cannot run."""
    (b, rows, c), n = y.shape, z.shape[1]
    if n == 0 or z.shape != (b, n, c) or weight.shape != (c,) or rows < n:
        got = [list(x.shape) for x in (y, z, weight)]
        raise ValueError(f"gated_norm needs y [b rows c], z [b n c] and weight [c] with rows >= n >= 1, but got {got}.")
    if index is not None and index.shape != (n,):
        raise ValueError(f"gated_norm needs an index of the {n} tokens of z, not of {list(index.shape)}.")
    if groups < 1 or c % groups:
        raise ValueError(f"groups={groups} does not divide the {c} channels of the gated norm.")
    if eps <= 0:
        raise ValueError(f"eps={eps} of the gated norm must be above 0.")
    check_no_gradient(FLOAT8 if quantize else None, y, z, weight)
    wide = f"kernel='triton' of the gated norm takes up to {WIDEST_ROW} channels, not {c}." if c > WIDEST_ROW else ""
    if choose("gated norm", kernel, y, wide) == "reference":
        dtype = torch.promote_types(y.dtype, torch.float32)
        first = y[:, :n]
        raster = first if index is None else first.index_select(1, index.argsort())
        gated = (raster.to(dtype) * F.silu(z.to(dtype))).unflatten(-1, (groups, -1))
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
        out = normed.flatten(-2) * weight.to(dtype)
        if not quantize:
            return out.to(y.dtype)
        largest = torch.finfo(torch.float8_e4m3fn).max
        row = (out.abs().amax(-1) / largest).clamp_min(1e-12)
        return (out / row[..., None]).clamp(-largest, largest).to(torch.float8_e4m3fn), row.float()
    y, z = channels_last(y), channels_last(z)
    from lingen.kernels.gated_norm_triton import gated_norm_forward, gated_norm_gradients

    if quantize:
        values, scale = gated_norm_forward(y, z, weight, index, groups, eps, quantize=True)
        assert scale is not None
        return values, scale
    return FromInputs.apply(
        lambda *inputs: gated_norm_forward(*inputs)[0], gated_norm_gradients, y, z, weight, index, groups, eps
    )
