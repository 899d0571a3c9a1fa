"""Softmax attention over whole sequences or windows: torch's SDPA, or flash-attn where it is asked for."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lingen.kernels.choice import holds_numbers
from lingen.recipe.errors import RecipeError

ATTENTION_KERNELS = ("auto", "sdpa", "cudnn", "flash")

# cuDNN's is the fastest on a Hopper GPU; the others run what it does not support.
_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip


def attention(
    q: Float[Tensor, "b n k e"],
    k: Float[Tensor, "b n k e"],
    v: Float[Tensor, "b n k e"],
    real: Bool[Tensor, "b n"] | None = None,
    *,
    kernel: str = "auto",
) -> Float[Tensor, "b n k e"]:
    """softmax(q k^T / sqrt(e)) v, bidirectional. Keys where `real` is False are padding, to which nothing attends;
    each sequence must hold a real one. Outputs at padding are finite and otherwise undefined.

    kernel: "sdpa" is `F.scaled_dot_product_attention` with the backend that torch picks, "cudnn" the same with cuDNN's
    first; "flash" is flash-attn on CUDA. "auto" is "cudnn" for 16-bit tokens on CUDA, else "sdpa", which also stands
    for the others where nothing is computed.
    Raises ValueError for an unknown or unavailable kernel."""
    if kernel == "flash" and holds_numbers(q):
        return _flash(q, k, v, real)
    if kernel not in ATTENTION_KERNELS:
        raise ValueError(f"There is no attention kernel called {kernel!r}. Known: {', '.join(ATTENTION_KERNELS)}.")
    mask = None if real is None else real[:, None, None, :]
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))
    if (kernel == "cudnn" and holds_numbers(q)) or (kernel == "auto" and q.is_cuda and q.dtype.itemsize == 2):
        with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    except ImportError as error:
        raise RecipeError(f"kernel='flash' needs flash-attn ({error}): pip install flash-attn.") from error
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RecipeError(f"kernel='flash' computes in float16 or bfloat16, not {q.dtype}: use bf16-mixed precision.")
    if real is None:
        return flash_attn_func(q, k, v)
    # flash-attn has no mask: the real tokens are packed into sequences of unequal length.
    lengths = real.sum(1, dtype=torch.int32)
    ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = q.shape[1]
    packed = flash_attn_varlen_func(q[real], k[real], v[real], ends, ends, longest, longest)
    return torch.zeros_like(q).masked_scatter(real[..., None, None], packed)
