"""Full self-attention over all tokens of the clip: by a softmax, the DiT twin's mixer; and linear, that of SANA (arXiv
2410.10629), for comparison at equal width."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lingen.blocks.layers import RMSNorm, head_count
from lingen.kernels.attention import attention
from lingen.recipe.bounds import FREE, IDENTITY, AtLeast
from lingen.recipe.signature import checked

# Tokens in a block, which one product sums over. Blocks are added up in float32, and fill a GPU at batch 1.
_BLOCK = 256


@checked
class Attention(nn.Module):
    """Full bidirectional attention with RMS-normed queries and keys; quadratic in tokens.

    Positions come from the model's tables, so `layer` changes nothing. Raises SettingError."""

    def __init__(
        self,
        dim: int,
        layer: int,
        *,
        num_heads: Annotated[int | None, AtLeast(1), IDENTITY] = None,
        kernel: Annotated[Literal["auto", "sdpa", "cudnn", "flash"], FREE] = "auto",
    ):
        super().__init__()
        self.num_heads = head_count(dim, num_heads)
        self.kernel = kernel
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = RMSNorm(dim // self.num_heads)
        self.k_norm = RMSNorm(dim // self.num_heads)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b t h w d"]) -> Float[Tensor, "b t h w d"]:
        q, k, v = self.in_proj(x).flatten(1, 3).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        out = self.mix(self.q_norm(q), self.k_norm(k), v)
        return self.out_proj(out.flatten(2)).view_as(x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The values of each head, weighted: all are [b n k e]."""
        return attention(q, k, v, kernel=self.kernel)


@checked
class LinearAttention(Attention):
    """Full bidirectional attention whose weights are relu(q) relu(k)^T instead of a softmax; linear in tokens.

    The kernel and the order of the projections are SANA's (arXiv 2410.10629, section 2.2), the linear form with its
    normaliser is that of Katharopoulos et al. (arXiv 2006.16236, eq. 4-7). RMS-normed queries and keys, as in the other
    mixers. Positions come from the model's tables, so `layer` changes nothing. Raises SettingError."""

    def __init__(self, dim: int, layer: int, *, num_heads: Annotated[int | None, AtLeast(1), IDENTITY] = None):
        super().__init__(dim, layer, num_heads=num_heads)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return relu_attention(q, k, v)


def relu_attention(
    q: Float[Tensor, "b n k e"], k: Float[Tensor, "b n k e"], v: Float[Tensor, "b n k e"], eps: float = 1e-6
) -> Float[Tensor, "b n k e"]:
    """out_i = sum_j w_ij v_j / (sum_j w_ij + n eps) with w_ij = relu(q_i) . relu(k_j), in O(n e^2). A query without a
    positive channel gets zeros. Products in the inputs' dtype, their sums over the blocks of the sequence in float32 at
    least; the result is in v's dtype."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, k, v = (u.transpose(1, 2) for u in (F.relu(q), F.relu(k), v))  # [b k n e]
    n = k.shape[2]
    # Means instead of sums: the same quotient, and nothing overflows in 16 bits.
    total = k.mean(2, dtype=dtype)[..., None]
    memory = (_blocks(k).mT @ _blocks(v)).sum(2, dtype=dtype) / n
    out = (q @ memory.to(q.dtype)) / (q @ total.to(q.dtype) + eps)
    return out.transpose(1, 2).to(v.dtype)


def _blocks(u: Float[Tensor, "b k n e"]) -> Float[Tensor, "b k m l e"]:
    """Blocks of equal length, zeros behind the end: they add nothing to a sum."""
    count = -(-u.shape[2] // _BLOCK)
    length = -(-u.shape[2] // count)
    missing = count * length - u.shape[2]
    return (F.pad(u, (0, 0, 0, missing)) if missing else u).unflatten(2, (count, length))
