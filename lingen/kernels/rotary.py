"""The 3D rotary embedding of a grid's tokens (axial form of arXiv 2104.09864)."""

import torch
from jaxtyping import Float
from torch import Tensor

from lingen.kernels.constants import constants
from lingen.recipe.sections import Triple

# Frequencies span positions 1..100, a window's length and not a text's [ours; RoFormer's 10,000 is for texts].
_ROTARY_BASE = 100.0


@constants(maxsize=64)
def rotary_table(
    grid: Triple, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "n 1 p"], Float[Tensor, "n 1 p"]]:
    """Cosines and sines of the 3D rotary embedding of a grid's tokens in raster order, for heads of `width`. The width
    // 2 pairs are shared out over t, h and w (t first where three does not divide them); an odd channel is not turned.
    Axial form of arXiv 2104.09864; the base is ours."""
    pairs = width // 2
    share = [pairs // 3 + (axis < pairs % 3) for axis in range(3)]
    angles = []
    for axis, m in enumerate(share):
        frequencies = _ROTARY_BASE ** (-torch.arange(m, dtype=torch.float64) / max(m, 1))
        angle = torch.arange(grid[axis], dtype=torch.float64)[:, None] * frequencies
        shape = [1, 1, 1, m]
        shape[axis] = grid[axis]
        angles.append(angle.view(shape).expand(*grid, m))
    angle = torch.cat(angles, -1).flatten(0, 2).unsqueeze(1)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotate(
    x: Float[Tensor, "b n k e"], table: tuple[Float[Tensor, "n 1 p"], Float[Tensor, "n 1 p"]]
) -> Float[Tensor, "b n k e"]:
    """Turns channel pairs (i, i + p) by the table's angles, in the table's dtype; returned in x's dtype."""
    cos, sin = table
    pairs = cos.shape[-1]
    first, second, rest = x.to(cos.dtype).split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], -1).to(x.dtype)
