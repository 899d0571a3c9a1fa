"""TEmporal Swin Attention: attention inside small fixed 3D windows (LinGen, arXiv 2412.09856, Figure 2)."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from lingen.blocks.layers import RMSNorm, check_choice, check_sizes, clamp, grid_of, head_count, rotary_table, rotate
from lingen.blocks.layers import Triple as Grid
from lingen.kernels import ATTENTION_KERNELS, attention

Padding = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


class TemporalSwin(nn.Module):
    """Attention inside windows of (t, h, w) tokens that shift by half a window on every other layer; linear in tokens.

    A window is clamped to the grid in each axis, and a clamped axis is not shifted. Nothing wraps around: an edge of
    the clip is an edge of a window. RMS-normed queries and keys, 3D rotary embedding inside the window. The size of
    the window is ours, the shift on alternate layers secondary (facts.md). Raises SettingError.
    """

    def __init__(
        self,
        dim: int,
        layer: int,
        *,
        window: tuple[int, int, int] = (8, 4, 4),
        num_heads: int | None = None,
        kernel: Literal["auto", "sdpa", "flash"] = "auto",
    ):
        super().__init__()
        check_sizes("window", window)
        check_choice("kernel", kernel, ATTENTION_KERNELS)
        self.window = window
        self.shifted = layer % 2 == 1
        self.num_heads = head_count(dim, num_heads)
        self.kernel = kernel
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = RMSNorm(dim // self.num_heads)
        self.k_norm = RMSNorm(dim // self.num_heads)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b t h w d"]) -> Float[Tensor, "b t h w d"]:
        grid = grid_of(x)
        window = clamp(self.window, grid)
        padding = window_padding(grid, window, self.shifted)
        windows = partition(self.in_proj(x), window, padding)
        q, k, v = windows.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        dtype = torch.promote_types(x.dtype, torch.float32)
        table = rotary_table(window, q.shape[-1], x.device, dtype)
        q, k = rotate(self.q_norm(q), table), rotate(self.k_norm(k), table)
        out = attention(q, k, v, real_keys(x, window, padding), kernel=self.kernel)
        return self.out_proj(merge(out.flatten(2), grid, window, padding))


def window_padding(grid: Grid, window: Grid, shifted: bool) -> Padding:
    """Tokens to add before and after each axis so that windows tile it; at most one window less one on either side.

    Without shift they are split on both sides, lest one edge be left with a sliver. The shift moves all borders by
    half a window, by padding more in front: a roll would let the last frames see the first.
    """

    def of_axis(n: int, size: int) -> tuple[int, int]:
        before = (-n % size) // 2
        if shifted and size < n:
            before = (before + size // 2) % size
        return before, -(n + before) % size

    t, h, w = map(of_axis, grid, window)
    return t, h, w


def partition(x: Shaped[Tensor, "b t h w c"], window: Grid, padding: Padding) -> Shaped[Tensor, "m n c"]:
    """Pads the grid and cuts it into windows: m = b * windows, n tokens each, both in raster order."""
    (t0, t1), (h0, h1), (w0, w1) = padding
    if any((t0, t1, h0, h1, w0, w1)):
        x = F.pad(x, (0, 0, w0, w1, h0, h1, t0, t1))
    x = x.unflatten(3, (-1, window[2])).unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)


def merge(x: Float[Tensor, "m n c"], grid: Grid, window: Grid, padding: Padding) -> Float[Tensor, "b t h w c"]:
    """Inverse of `partition`."""
    count = [(n + sum(pad)) // size for n, size, pad in zip(grid, window, padding, strict=True)]
    x = x.unflatten(1, window).unflatten(0, (-1, *count)).permute(0, 1, 4, 2, 5, 3, 6, 7)
    x = x.flatten(5, 6).flatten(3, 4).flatten(1, 2)
    for axis, (n, (before, _)) in enumerate(zip(grid, padding, strict=True), start=1):
        x = x.narrow(axis, before, n)
    return x


def real_keys(x: Float[Tensor, "b t h w d"], window: Grid, padding: Padding) -> Bool[Tensor, "m n"] | None:
    """Which tokens of each window are no padding; None where nothing is padded.

    Each window holds a real token, because padding is shorter than a window in every axis: no softmax over nothing.
    """
    if not any(map(sum, padding)):
        return None
    ones = torch.ones(1, *x.shape[1:4], 1, dtype=torch.bool, device=x.device)
    return partition(ones, window, padding).squeeze(-1).repeat(x.shape[0], 1)
