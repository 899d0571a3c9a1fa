"""The steps between a block's parts: residual sum, norm, positions, and the timestep's scale, shift and gate.

For each token, where gate, scale and shift are the rows of its frame (adaLN, DiT, arXiv 2212.09748, section 3.2):

    x_new = x + gate * update        normed = (x_new / rms(x_new) * weight + positions) * (1 + scale) + shift

Why positions enter here and not the stream: docs/facts.md, "Positional tables"."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lingen.kernels.choice import choose
from lingen.kernels.fp8 import FLOAT8, check_no_gradient, quantize


def modulate(
    x: Float[Tensor, "b t h w d"],
    *,
    update: Float[Tensor, "b t h w d"] | None = None,
    gate: Float[Tensor, "b f d"] | None = None,
    weight: Float[Tensor, "d"] | None = None,
    shift: Float[Tensor, "b f d"] | None = None,
    scale: Float[Tensor, "b f d"] | None = None,
    positions: Float[Tensor, "t h w d"] | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    out: Float[Tensor, "b t h w d"] | None = None,
    kernel: str = "auto",
) -> tuple[Any, Any]:
    """(x_new, normed), both [b t h w d], in one pass over memory; in float32 at least and rounded once, at the end.
    Without an update x_new means nothing, without a weight normed is None; what else is left out takes no part.
    RecipeError for a kernel that cannot run; ValueError for 8 bits with a gradient, and for f neither 1 nor t.

    Args:
        update: added to x, in x's dtype.
        gate, shift, scale: f is 1, or t for a row for each frame.
        weight: of the norm.
        dtype: of normed, by default that of x; float8_e4m3fn gives a `Quantized`, without gradients.
        out: where x_new is written, x itself allowed; only where no gradient is wanted.
        kernel: "reference" (plain PyTorch) or "triton". x may be a slice of something wider; rows at unequal distances
            are copied first."""
    operands = x, update, gate, weight, shift, scale, positions
    check_no_gradient(dtype, *operands)
    if out is not None and torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in operands):
        raise ValueError("A tensor that wants a gradient cannot be written over; leave `out` out.")
    frames = {y.shape[1] for y in operands if y is not None and y.ndim == 3}
    if frames - {1, x.shape[1]}:
        raise ValueError(f"The modulation has {max(frames)} frames and x has {x.shape[1]}; give one, or one for each.")
    if choose("modulation", kernel, x) == "triton":
        from lingen.kernels.modulate_triton import Operands, fused

        return fused(Operands(*operands), eps, dtype or x.dtype, out)
    x_new = x
    if update is not None:
        high = torch.promote_types(x.dtype, torch.float32)
        added = update if gate is None else update * gate[:, :, None, None]
        x_new = (x.to(high) + added.to(high)).to(x.dtype)
        x_new = x_new if out is None else out.copy_(x_new)
    if weight is None:
        return x_new, None
    wide = x_new.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    if positions is not None:
        y = y + positions
    if scale is not None:
        y = y * (1 + scale[:, :, None, None])
    if shift is not None:
        y = y + shift[:, :, None, None]
    return x_new, quantize(y, kernel="reference") if dtype == FLOAT8 else y.to(dtype or x.dtype)
