"""Full self-attention over all tokens of the clip: the DiT twin's mixer."""

from typing import Annotated, Literal

from jaxtyping import Float
from torch import Tensor, nn

from lingen.blocks.layers import RMSNorm, head_count
from lingen.kernels.attention import attention
from lingen.recipe.bounds import FREE, IDENTITY, AtLeast
from lingen.recipe.signature import checked


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
        out = attention(self.q_norm(q), self.k_norm(k), v, kernel=self.kernel)
        return self.out_proj(out.flatten(2)).view_as(x)
