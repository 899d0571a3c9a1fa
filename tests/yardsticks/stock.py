"""The yardstick: MATE's branches as one wires them from stock parts today, on the weights of ours.

mamba_ssm's scan called twice, torch's conv1d, copies for permutes, flips and review tokens; windows by padding, rolling
and partitioning, with torch's SDPA. They compute what `Mamba2` and `TemporalSwin` compute; a test holds them to it.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingen.blocks.layers import RMSNorm, clamp, grid_of
from lingen.blocks.mamba2 import Mamba2
from lingen.blocks.temporal_swin import TemporalSwin
from lingen.kernels.ssd import chunk_scan, ssd
from lingen.kernels.window_attention import rotary_table, rotate
from lingen.recipe.sections import Triple as Grid


@torch.compiler.disable
def one_direction(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, dt_bias: Tensor) -> Tensor:
    """mamba_ssm's causal scan on CUDA; elsewhere the plain one, so that the composition can be tested."""
    if not x.is_cuda:
        return ssd(x, dt, a, b, c, d, dt_bias)
    scan = chunk_scan()
    out: Tensor = scan(x, dt, a, b, c, chunk_size=256, D=d, dt_bias=dt_bias, dt_softplus=True)
    return out


class StockMamba2(nn.Module):
    """`Mamba2` with a shared conv, in both directions, and review tokens in front of each (or none).

    Raises ValueError for other settings.
    """

    def __init__(self, ours: Mamba2):
        super().__init__()
        if not ours.centred or (ours.review and ours.review_reverse != "front") or not isinstance(ours.order, str):
            raise ValueError(
                "The stock MA-branch has a shared conv, both directions, an axis order and review in front."
            )
        self.ours, self.order = ours, ours.order

    def forward(self, x: Tensor) -> Tensor:
        """[b t h w d] -> the same."""
        out: Tensor = self.ours.out_proj(self.core(self.ours.in_proj(x)))
        return out

    def core(self, projected: Tensor) -> Tensor:
        """What lies between the projections: [b t h w z|x|B|C|dt] -> [b t h w inner]."""
        ours, grid = self.ours, grid_of(projected)
        z, streams = projected.split([ours.sizes[0], sum(ours.sizes[1:])], -1)
        main = self._convolved(streams)
        front = [] if ours.review is None else [self._convolved(_pool(streams, ours.review))]
        length = sum(one.shape[1] for one in front)
        first = self._scan(torch.cat([*front, main], 1), 0)[:, length:]
        second = self._scan(torch.cat([*front, main.flip(1)], 1), 1)[:, length:].flip(1)
        sizes = [grid["thw".index(axis)] for axis in self.order]
        back = [1 + self.order.index(axis) for axis in "thw"]
        y = (first + second).unflatten(1, sizes).permute(0, *back, 4)
        gated = y.float() * F.silu(z.float())
        gated = gated.unflatten(-1, (ours.groups, -1))
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + ours.norm.eps)
        return (normed.flatten(-2) * ours.norm.weight).to(projected.dtype)

    def _convolved(self, streams: Tensor) -> Tensor:
        """Scan order, conv and SiLU; [b n x|B|C|dt]."""
        ours = self.ours
        axes = [1 + "thw".index(axis) for axis in self.order]
        xbc, dt = streams.permute(0, *axes, 4).flatten(1, 3).split(ours.sizes[1:], -1)
        conv = ours.conv1d
        u = F.conv1d(xbc.transpose(1, 2), conv.weight, conv.bias, padding=conv.kernel_size[0] // 2, groups=conv.groups)
        return torch.cat([F.silu(u[..., : xbc.shape[1]]).transpose(1, 2), dt], -1)

    def _scan(self, streams: Tensor, way: int) -> Tensor:
        ours = self.ours
        states = ours.groups * ours.state_dim
        x, b, c, dt = streams.split([ours.sizes[0], states, states, ours.sizes[2]], -1)
        x, b, c = x.unflatten(-1, (-1, ours.head_dim)), *(u.unflatten(-1, (ours.groups, -1)) for u in (b, c))
        a = -ours.memory.a_log[way].float().exp()
        return one_direction(x, dt, a, b, c, ours.memory.d[way], ours.memory.dt_bias[way]).flatten(2)


def _pool(x: Tensor, kernel: Grid) -> Tensor:
    """Means over windows, partial ones at the far edges included."""
    channels_first = x.permute(0, 4, 1, 2, 3)
    pooled = F.avg_pool3d(channels_first, clamp(kernel, grid_of(x)), ceil_mode=True, count_include_pad=False)
    return pooled.permute(0, 2, 3, 4, 1)


class StockSwin(nn.Module):
    """`TemporalSwin` by padding, rolling, partitioning and SDPA with a mask, as in Swin (arXiv 2103.14030)."""

    def __init__(self, ours: TemporalSwin):
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        """[b t h w d] -> the same."""
        out: Tensor = self.ours.out_proj(self.core(self.ours.in_proj(x)))
        return out

    def core(self, qkv: Tensor) -> Tensor:
        """What lies between the projections: [b t h w 3 d] -> [b t h w d]."""
        ours, grid = self.ours, grid_of(qkv)
        window = clamp(ours.window, grid)
        steps = (size - size // 2 if ours.shifted and size < n else 0 for n, size in zip(grid, window, strict=True))
        shift = tuple(steps)
        pads = [((-n % size) // 2, -n % size - (-n % size) // 2) for n, size in zip(grid, window, strict=True)]
        before = tuple(first for first, _ in pads)
        x = F.pad(qkv, (0, 0, *pads[2], *pads[1], *pads[0])) if any(map(sum, pads)) else qkv
        if any(shift):
            x = x.roll([-one for one in shift], (1, 2, 3))
        padded = grid_of(x)
        q, k, v = _partition(x, window).unflatten(-1, (3, ours.num_heads, -1)).unbind(2)
        table, mask = _kept(grid, window, shift, before, padded, q)
        q, k = (rotate(rms_norm(u, norm), table) for u, norm in ((q, ours.q_norm), (k, ours.k_norm)))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        y = _merge(out.transpose(1, 2).flatten(2), window, padded, len(x))
        if any(shift):
            y = y.roll(list(shift), (1, 2, 3))
        return y[:, *(slice(first, first + n) for first, n in zip(before, grid, strict=True))]


@torch.compiler.disable
def _kept(
    grid: Grid, window: Grid, shift: tuple[int, ...], before: tuple[int, ...], padded: Grid, q: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """Rotary table and mask [m 1 n n], from their caches: a compiler would compute them anew in each call."""
    mask = region_mask(grid, window, shift, before, padded, q.device)
    batch = len(q) * window[0] * window[1] * window[2] // math.prod(padded)
    mask = None if mask is None else mask.repeat(batch, 1, 1)[:, None]
    return rotary_table(window, q.shape[-1], torch.float32, q.device), mask


@lru_cache(maxsize=16)
def region_mask(
    grid: Grid, window: Grid, shift: tuple[int, ...], before: tuple[int, ...], padded: Grid, device: torch.device
) -> Tensor | None:
    """[windows n n]: whether a token sees another: both lie on the same side of every edge of the clip, none of the
    seen ones is padding; None where every token of a window sees every other."""
    if not any(shift) and padded == grid:
        return None
    regions = torch.zeros(padded, dtype=torch.long)
    real = torch.zeros(padded, dtype=torch.bool)
    real[tuple(slice(first, first + n) for first, n in zip(before, grid, strict=True))] = True
    for axis, (size, step) in enumerate(zip(padded, shift, strict=True)):
        # Rolled, the first `step` tokens share the last window with the end of the clip.
        side = (torch.arange(size) < step).long().view([-1 if i == axis else 1 for i in range(3)])
        regions = regions * 2 + side
    rolled = [u.roll([-one for one in shift], (0, 1, 2)) for u in (regions, real)]
    region, seen = (_partition(u[None, ..., None], window).squeeze(-1) for u in rolled)
    mask = (region[:, :, None] == region[:, None]) & seen[:, None]
    # Padding sees its own kind, lest a softmax has nothing to sum over; its output is cut off.
    mask |= ~seen[:, :, None] & ~seen[:, None]
    return mask.to(device)


def _partition(x: Tensor, window: Grid) -> Tensor:
    x = x.unflatten(3, (-1, window[2])).unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, window[0] * window[1] * window[2], x.shape[-1])


def _merge(x: Tensor, window: Grid, padded: Grid, batch: int) -> Tensor:
    counts = [n // size for n, size in zip(padded, window, strict=True)]
    x = x.view(batch, *counts, *window, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(batch, *padded, -1)


def rms_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    """A norm of ours by torch's own."""
    return F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)
