"""Review tokens: a small overview of the clip that the scan reads first (LinGen, arXiv 2412.09856)."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad


def pool(x: Float[Tensor, "b t h w c"], kernel: tuple[int, int, int]) -> Float[Tensor, "b t2 h2 w2 c"]:
    """Mean over windows of `kernel` tokens (t, h, w), without parameters; ceil(size / kernel) windows in each axis.

    The kernel is clamped to the grid; a partial window at the far edge is averaged over its real tokens only.
    """
    for axis, size in enumerate(kernel, start=1):
        x = _pool_axis(x, axis, min(size, x.shape[axis]))
    return x


def _pool_axis(x: Tensor, axis: int, size: int) -> Tensor:
    missing = -x.shape[axis] % size
    if missing == 0:
        return x if size == 1 else x.unflatten(axis, (-1, size)).mean(axis + 1)
    windows = pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, missing)).unflatten(axis, (-1, size))
    count = torch.full((windows.shape[axis],), size, device=x.device)
    count[-1] -= missing
    return windows.sum(axis + 1) / count.view(-1, *(1,) * (x.ndim - 1 - axis))
