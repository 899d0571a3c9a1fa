"""TEmporal Swin Attention: attention inside small fixed 3D windows (LinGen, arXiv 2412.09856, Figure 2)."""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lingen.blocks.layers import RMSNorm, clamp, grid_of, head_count
from lingen.kernels.fp8 import Quantized, as_its, wants_fp8
from lingen.kernels.window_attention import Padding, window_attention
from lingen.recipe.bounds import FREE, IDENTITY, AtLeast
from lingen.recipe.sections import Triple
from lingen.recipe.signature import checked


@checked
class TemporalSwin(nn.Module):
    """Attention inside windows of (t, h, w) tokens that shift by half a window on every other layer; linear in tokens.

    A window is clamped to the grid in each axis, and a clamped axis is not shifted. Nothing wraps around: an edge of
    the clip is an edge of a window. RMS-normed queries and keys, 3D rotary embedding inside the window. Window, shift
    and their sources: docs/facts.md, "TESA" and "TESA at the edges". Raises SettingError."""

    adds_onto = True
    wants_fp8 = as_its("in_proj")

    def __init__(
        self,
        dim: int,
        layer: int,
        *,
        window: Annotated[tuple[int, int, int], AtLeast(1), IDENTITY] = (8, 4, 4),
        num_heads: Annotated[int | None, AtLeast(1), IDENTITY] = None,
        kernel: Annotated[Literal["auto", "reference", "triton", "sdpa", "flash"], FREE] = "auto",
    ):
        super().__init__()
        self.window = window
        self.shifted = layer % 2 == 1
        self.num_heads = head_count(dim, num_heads)
        self.kernel = kernel
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = RMSNorm(dim // self.num_heads)
        self.k_norm = RMSNorm(dim // self.num_heads)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def tile(self, grid: Triple) -> Triple:
        """The window on a grid, no larger than it in any axis."""
        return clamp(self.window, grid)

    def forward(
        self, x: Float[Tensor, "b t h w d"] | Quantized, onto: Float[Tensor, "b t h w d"] | None = None
    ) -> Float[Tensor, "b t h w d"]:
        """Attends to x; the result is added to `onto`, whose memory may be overwritten where autograd is off."""
        qkv = self.in_proj(x)
        grid = grid_of(qkv)
        tile = self.tile(grid)
        out = window_attention(
            qkv, self.q_norm.weight, self.k_norm.weight, window=tile,
            padding=window_padding(grid, tile, self.shifted), num_heads=self.num_heads, eps=self.q_norm.eps,
            kernel=self.kernel,
        )  # fmt: skip
        if onto is None:
            return self.out_proj(out)
        if onto.dtype != out.dtype or wants_fp8(self.out_proj):
            return onto + self.out_proj(out)
        return project_onto(onto, out, self.out_proj.weight)


def window_padding(grid: Triple, window: Triple, shifted: bool) -> Padding:
    """Tokens to add before and after each axis so that windows tile it; at most one window less one on either side.
    Without shift they are split over both sides, so that no edge is left with a sliver. The shift moves all borders by
    half a window, by padding more in front: a roll would let the last frames see the first."""

    def of_axis(n: int, size: int) -> tuple[int, int]:
        before = (-n % size) // 2
        if shifted and size < n:
            before = (before + size // 2) % size
        return before, -(n + before) % size

    t, h, w = map(of_axis, grid, window)
    return t, h, w


def project_onto(
    onto: Float[Tensor, "*tokens d"], x: Float[Tensor, "*tokens e"], weight: Float[Tensor, "d e"]
) -> Float[Tensor, "*tokens d"]:
    """onto + x weight^T, summed inside the matrix product; without autograd into the memory of `onto`. `onto` has x's
    dtype, and the weight is cast to it."""
    into, rows, weight = onto.flatten(0, -2), x.flatten(0, -2), weight.to(x.dtype).mT
    # addmm copies `onto` first, which costs as much as the sum.
    in_place = not torch.is_grad_enabled() and onto.is_contiguous()
    return (into.addmm_(rows, weight) if in_place else torch.addmm(into, rows, weight)).view(onto.shape)
