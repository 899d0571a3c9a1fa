"""silu(rms_norm(x) + bias) over channels: the autoencoder's step before every convolution."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lingen.kernels.choice import choose
from lingen.kernels.gradients import FromInputs


def norm_silu(
    x: Float[Tensor, "*rows d"],
    weight: Float[Tensor, "d"],
    bias: Float[Tensor, "d"],
    eps: float = 1e-6,
    *,
    kernel: str = "auto",
) -> Float[Tensor, "*rows d"]:
    """silu(x / sqrt(mean(x^2) + eps) * weight + bias), computed in float32 at least, in x's dtype. RecipeError for a
    kernel that cannot run. `kernel`: "reference" (plain PyTorch) or "triton", which keeps nothing but `x` for the
    backward pass and gives a program many of these short rows (PyTorch's norm gives it one)."""
    if choose("norm and SiLU", kernel, x) == "triton":
        from lingen.kernels.norm_silu_triton import backward, forward

        return FromInputs.apply(forward, backward, x, weight, bias, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps) + bias.to(wide.dtype)
    return F.silu(normed, inplace=True).to(x.dtype)
