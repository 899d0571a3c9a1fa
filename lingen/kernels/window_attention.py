"""Attention inside the windows of a grid, from projected tokens to the heads' outputs, without copies in between; and
the 3D rotary embedding of a window's tokens."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, Shaped
from torch import Tensor

from lingen.kernels.attention import attention
from lingen.kernels.choice import choose, full_precision
from lingen.kernels.constants import constants
from lingen.kernels.gradients import FromInputs
from lingen.recipe.sections import Triple

# Tokens along t, h and w are a Triple; and padding before and after each of these axes.
Padding = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

# Frequencies span positions 1..100, a window's length and not a text's [ours; RoFormer's 10,000 is for texts].
_ROTARY_BASE = 100.0


def window_attention(
    qkv: Float[Tensor, "b t h w c"],
    q_weight: Float[Tensor, "e"],
    k_weight: Float[Tensor, "e"],
    *,
    window: Triple,
    padding: Padding,
    num_heads: int,
    eps: float,
    kernel: str = "auto",
) -> Float[Tensor, "b t h w c//3"]:
    """Bidirectional softmax attention among the tokens of each window, separately in each head.

    Queries and keys are RMS-normed (arXiv 1910.07467) in each head, then turned by the 3D rotary embedding of their
    place in the window; nothing attends to padding (docs/facts.md, "TESA at the edges"). Linear in tokens. RecipeError
    for a kernel that is unknown or cannot run.

    Args:
        qkv: queries, keys and values, each `num_heads` heads of e side by side; may be a slice of wider rows.
        q_weight, k_weight: gains of the two norms, with `eps` inside their roots.
        window: tokens of a window along t, h and w.
        padding: tokens missing before and after each axis, less than a window: with them the windows tile the grid.
        kernel: "triton" gathers the windows inside one kernel and saves only `qkv` for the backward pass; the others
            cut the grid into windows first: "reference" spells the softmax out, "sdpa" is torch's, "flash"
            flash-attn's. "auto" is "triton" on CUDA for heads of at most 256, else "sdpa"."""
    _, t, h, w, _ = qkv.shape
    width, grid = q_weight.shape[0], (t, h, w)
    rows = window_rows(grid, window, padding, qkv.device)
    chosen = choose("window attention", kernel, qkv, too_wide(width))
    if chosen == "triton":
        from lingen.kernels.window_attention_triton import backward, forward

        # Beside 16-bit tokens a float16 table is exact enough (2.4e-4 at most) and half as many bytes.
        table = rotary_table(window, width, torch.float32 if qkv.dtype == torch.float32 else torch.float16, qkv.device)
        return FromInputs.apply(forward, backward, qkv, q_weight, k_weight, *table, rows, num_heads, eps)
    table = rotary_table(window, width, torch.promote_types(qkv.dtype, torch.float32), qkv.device)
    q, k, v = partition(qkv, window, padding).unflatten(-1, (3, num_heads, -1)).unbind(2)
    q, k = rotate(rms_norm(q, q_weight, eps), table), rotate(rms_norm(k, k_weight, eps), table)
    real = (rows >= 0).repeat(qkv.shape[0], 1) if any(map(sum, padding)) else None
    if chosen != "reference":
        return merge(attention(q, k, v, real, kernel=chosen).flatten(2), grid, window, padding)
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    with full_precision(qkv):
        scores = torch.einsum("mike,mjke->mkij", q.to(dtype), k.to(dtype)) * width**-0.5
        if real is not None:
            scores = scores.masked_fill(~real[:, None, None, :], -torch.inf)
        out = torch.einsum("mkij,mjke->mike", scores.softmax(-1), v.to(dtype)).to(qkv.dtype)
    return merge(out.flatten(2), grid, window, padding)


def too_wide(width: int) -> str:
    """A sentence where heads of `width` are too wide for the Triton twins, which hold a block of a head's rows in
    registers; else nothing."""
    cure = "raise num_heads, or kernel='auto'."
    return f"kernel='triton' takes heads of at most 256, not {width}: {cure}" if width > 256 else ""


def rms_norm(x: Float[Tensor, "*any e"], weight: Float[Tensor, "e"], eps: float) -> Float[Tensor, "*any e"]:
    """x / rms(x) * weight over the last axis, computed in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)


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


@constants(maxsize=64)
def window_rows(grid: Triple, window: Triple, padding: Padding, device: torch.device) -> Int32[Tensor, "m n"]:
    """For each window the places of its tokens in the clip's raster order; -1 at padding. Each window holds a real
    token, because padding is shorter than a window in every axis: no softmax over nothing."""
    numbers = torch.arange(1, grid[0] * grid[1] * grid[2] + 1, dtype=torch.int32).view(1, *grid, 1)
    return (partition(numbers, window, padding).squeeze(-1) - 1).to(device)


def partition(x: Shaped[Tensor, "b t h w c"], window: Triple, padding: Padding) -> Shaped[Tensor, "m n c"]:
    """Pads the grid with zeros and cuts it into windows: m = b * windows, n tokens each, both in raster order."""
    (t0, t1), (h0, h1), (w0, w1) = padding
    if any((t0, t1, h0, h1, w0, w1)):
        x = F.pad(x, (0, 0, w0, w1, h0, h1, t0, t1))
    x = x.unflatten(3, (-1, window[2])).unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)


def merge(x: Float[Tensor, "m n c"], grid: Triple, window: Triple, padding: Padding) -> Float[Tensor, "b t h w c"]:
    """Inverse of `partition`."""
    count = [(n + sum(pad)) // size for n, size, pad in zip(grid, window, padding, strict=True)]
    x = x.unflatten(1, window).unflatten(0, (-1, *count)).permute(0, 1, 4, 2, 5, 3, 6, 7)
    x = x.flatten(5, 6).flatten(3, 4).flatten(1, 2)
    for axis, (n, (before, _)) in enumerate(zip(grid, padding, strict=True), start=1):
        x = x.narrow(axis, before, n)
    return x
