"""Factorised learnable positions (Movie Gen, arXiv 2410.13720, section 3.1.3): tables for t, h and w, summed."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lingen.blocks.layers import stays_float32, undecayed
from lingen.recipe.sections import LinGenConfig, Triple

# Wavelengths from 6 to 630 tokens: neighbours differ, and nothing repeats within the longest clip or frame [ours].
_BASE = 100.0


@stays_float32
class Positions(nn.Module):
    """One rule for every grid; the tables are as large as the largest grid of all stages [ours].

    Frame: its longer side, measured in tables, takes the whole table, the other side the centred span of the same
    scale: a smaller frame of the same shape sees the whole tables interpolated, another aspect ratio a centred crop.
    Time: by frame number, never stretched; frames beyond the table go on as the sin-cos start does. An image is t = 0.

    Args:
        grid: sizes of the tables for t, h, w, in tokens.
        dim: width of a token.
        std: root mean square of the sum of the three tables at the start."""

    def __init__(self, grid: Triple, dim: int, std: float):
        super().__init__()
        self.std = std
        tables = (nn.Parameter(sin_cos(range(n), dim, axis, std)) for axis, n in enumerate(grid))
        self.t, self.h, self.w = map(undecayed, tables)

    def forward(self, grid: Triple) -> Float[Tensor, "t h w d"]:
        """Positions of a grid of tokens, in the tables' dtype, float32 at least."""
        t = extend(self.t, grid[0], self.std)
        h, w = resize_frame(self.h, self.w, grid[1:])
        return t[:, None, None] + h[:, None] + w


def sin_cos(rows: range, dim: int, axis: int, std: float) -> Float[Tensor, "n d"]:
    """The start of a table: sine and cosine in the axis's own third of the channels, zeros elsewhere. If the axes
    shared channels, the sum could not tell (t, h) = (3, 0) from (0, 3)."""
    share = [dim // 2 // 3 + (i < dim // 2 % 3) for i in range(3)]
    start, pairs = 2 * sum(share[:axis]), share[axis]
    frequencies = _BASE ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
    angle = torch.arange(rows.start, rows.stop, dtype=torch.float64)[:, None] * frequencies
    table = torch.zeros(len(rows), dim, dtype=torch.float64)
    table[:, start : start + 2 * pairs] = torch.cat([angle.sin(), angle.cos()], 1) * (std * 2**0.5)
    return table.to(torch.get_default_dtype())


def extend(table: Float[Tensor, "n d"], length: int, std: float) -> Float[Tensor, "t d"]:
    """The first `length` rows of the table for t, continued by its sin-cos start."""
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    n, dim = table.shape
    if length <= n:
        return table[:length]
    return torch.cat([table, sin_cos(range(n, length), dim, 0, std).to(table)])


def resize_frame(
    h: Float[Tensor, "H d"], w: Float[Tensor, "W d"], size: tuple[int, int]
) -> tuple[Float[Tensor, "h d"], Float[Tensor, "w d"]]:
    """The rows of a frame of `size` tokens: scale = max(h / H, w / W), and each axis takes the centred span of its
    table of length h / scale (w / scale), linearly interpolated."""
    scale = max(size[0] / h.shape[0], size[1] / w.shape[0])
    return _centred(h, size[0], scale), _centred(w, size[1], scale)


def _centred(table: Float[Tensor, "n d"], length: int, scale: float) -> Float[Tensor, "m d"]:
    """Row i lies at the centre of the i-th of `length` equal parts of the span; a span of all n rows is the table."""
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    n = table.shape[0]
    if length == n and scale == 1:
        return table
    at = (torch.arange(length, dtype=torch.float64, device=table.device) + 0.5 - length / 2) / scale + n / 2 - 0.5
    at = at.clamp(0, n - 1)
    low = at.floor().long()
    return torch.lerp(table[low], table[(low + 1).clamp(max=n - 1)], (at - low).to(table)[:, None])


def resize_tables(state_dict: Mapping[str, Tensor], config: LinGenConfig) -> dict[str, Tensor]:
    """Fits the positional tables of trained weights to `config.max_grid`; everything else is passed on as it is. The
    new tables for h and w are what the old ones give for a frame of the new size; t is cut or continued. Use it alike
    on the weights and on their averaged copy. Tables that are not there are left out."""
    state = dict(state_dict)
    t, h, w = (state.get(f"positions.{axis}") for axis in "thw")
    if t is None or h is None or w is None:
        return state
    t_new = extend(t, config.max_grid[0], config.position_std)
    h_new, w_new = resize_frame(h, w, config.max_grid[1:])
    for axis, old, new in (("t", t, t_new), ("h", h, h_new), ("w", w, w_new)):
        state[f"positions.{axis}"] = new.to(old.dtype)
    return state
