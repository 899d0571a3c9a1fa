"""Mean pooling of the grid to review tokens, the small overview that the scan reads first. Source: LinGen, arXiv
2412.09856, Figure 2; what is known and what is ours is in docs/facts.md, "Review tokens"."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from lingen.kernels.choice import choose
from lingen.kernels.gradients import channels_last

# One number each for t, h and w.
Size = tuple[int, int, int]


def pool(x: Float[Tensor, "b t h w c"], size: Size, *, kernel: str = "auto") -> Float[Tensor, "b t2 h2 w2 c"]:
    """Mean over windows of `size` tokens (t, h, w), without parameters; ceil(tokens / size) windows in each axis. The
    size is clamped to the grid; a partial window at the far edge is averaged over its real tokens only. A slice of a
    wider projection is read where it lies. Computed in float32 at least; contiguous, in x's dtype. kernel: auto,
    reference, triton. Raises ValueError for a size below 1 and for a kernel that cannot run."""
    if min(size) < 1 or x.numel() == 0:
        raise ValueError(f"pool needs windows and a grid of 1 or more, not {list(size)} and {list(x.shape)}.")
    if choose("pool", kernel, x) == "reference":
        pooled = x.to(torch.promote_types(x.dtype, torch.float32))
        for axis, tokens in enumerate(size, start=1):
            pooled = _mean_along(pooled, axis, min(tokens, x.shape[axis]))
        return pooled.to(x.dtype).contiguous()
    from lingen.kernels.pool_triton import PoolFunction

    return PoolFunction.apply(channels_last(x), size)


def windows_of(x: Float[Tensor, "b t h w c"], size: Size) -> tuple[Size, Size]:
    """The size of a window, clamped to the grid, and the number of windows, along t, h and w."""
    grid = x.shape[1:4]
    t, h, w = map(min, size, grid)
    return (t, h, w), (-(-grid[0] // t), -(-grid[1] // h), -(-grid[2] // w))


def _mean_along(x: Tensor, axis: int, size: int) -> Tensor:
    missing = -x.shape[axis] % size
    if missing == 0:
        return x if size == 1 else x.unflatten(axis, (-1, size)).mean(axis + 1)
    windows = pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, missing)).unflatten(axis, (-1, size))
    count = torch.full((windows.shape[axis],), size, device=x.device)
    count[-1] -= missing
    return windows.sum(axis + 1) / count.view(-1, *(1,) * (x.ndim - 1 - axis))
