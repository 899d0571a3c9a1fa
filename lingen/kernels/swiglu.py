"""The gate of a SwiGLU: silu(gate) * up from one projection of both (arXiv 2002.05202, eq. 6)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lingen.kernels.choice import choose
from lingen.kernels.fp8 import FLOAT8, Quantized, check_no_gradient, quantize
from lingen.kernels.gradients import FromInputs


def swiglu(
    gate_up: Float[Tensor, "*rows hidden"], *, dtype: torch.dtype | None = None, kernel: str = "auto"
) -> Float[Tensor, "*rows half"] | Quantized:
    """silu(first half) * second half of the last axis, in float32 at least. RecipeError for a kernel that cannot run.

    Args:
        dtype: of the result, by default that of `gate_up`; float8_e4m3fn gives a `Quantized`, without gradients.
        kernel: "reference" (plain PyTorch) or "triton", which keeps nothing but `gate_up` for the backward pass."""
    check_no_gradient(dtype, gate_up)
    if choose("swiglu", kernel, gate_up) == "triton":
        from lingen.kernels.swiglu_triton import backward, forward

        if torch.is_grad_enabled() and gate_up.requires_grad:
            return FromInputs.apply(forward, backward, gate_up, dtype or gate_up.dtype)
        return forward(gate_up, dtype or gate_up.dtype)
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    y = F.silu(gate) * up
    return quantize(y, kernel="reference") if dtype == FLOAT8 else y.to(dtype or gate_up.dtype)
