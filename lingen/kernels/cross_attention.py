"""Attention of the grid's tokens to the text's, with RMS-normed queries and keys."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from lingen.kernels.choice import choose
from lingen.kernels.window_attention import rms_norm, too_wide


class TextKeys(NamedTuple):
    """A text that one or several calls attend to: raw projections, maybe slices of wider ones."""

    k: Float[Tensor, "b m k e"]
    v: Float[Tensor, "b m k e"]
    mask: Bool[Tensor, "b m"]
    packed: tuple[Tensor, ...] | None = None
    """What the Triton kernel reads, prepared once by `text_keys`; without gradients."""

    def of(self, rows: slice) -> "TextKeys":
        """The text of these rows of the batch."""
        packed = None if self.packed is None else tuple(part[rows] for part in self.packed)
        return TextKeys(self.k[rows], self.v[rows], self.mask[rows], packed)


def text_keys(
    k: Float[Tensor, "b m k e"],
    v: Float[Tensor, "b m k e"],
    mask: Bool[Tensor, "b m"],
    k_weight: Float[Tensor, "e"],
    *,
    eps: float,
    kernel: str = "auto",
) -> TextKeys:
    """A text, in the queries' dtype, prepared for all calls of `cross_attention` where no gradient is wanted."""
    if torch.is_grad_enabled() or choose("cross-attention", kernel, k, too_wide(k.shape[-1])) != "triton":
        return TextKeys(k, v, mask)
    from lingen.kernels.cross_attention_triton import pack_text

    return TextKeys(k, v, mask, tuple(pack_text(k, v, mask, k_weight, eps, k.dtype)))


def cross_attention(
    q: Float[Tensor, "b n k e"],
    text: TextKeys,
    q_weight: Float[Tensor, "e"],
    k_weight: Float[Tensor, "e"],
    *,
    eps: float,
    kernel: str = "auto",
) -> Float[Tensor, "b n k e"]:
    """softmax(norm(q) norm(k)^T / sqrt(e)) v over the keys where `text.mask` is True; each row of it must hold a True.

    Both norms are RMSNorm over e (arXiv 1910.07467) with the gains `q_weight` and `k_weight`, and `eps` inside their
    roots. q is a raw projection, maybe a slice of a wider one. Linear in n; masked keys are free in "triton".

    kernel: "reference" is torch's SDPA on normed copies; "triton" norms inside; "auto" is "triton" on CUDA for heads
    of at most 256, else "reference". Raises RecipeError for a kernel that is unknown or cannot run."""
    k, v, mask, packed = text
    if packed is not None and q.dtype == k.dtype:
        from lingen.kernels.cross_attention_triton import Packed, forward

        return forward(q, Packed(*packed), q_weight, eps)[0]
    if choose("cross-attention", kernel, q, too_wide(q.shape[-1])) == "triton":
        from lingen.kernels.cross_attention_triton import CrossAttentionFunction

        return CrossAttentionFunction.apply(q, k, v, mask, q_weight, k_weight, eps)
    q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    q, k, v = (u.transpose(1, 2) for u in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]).transpose(1, 2)
