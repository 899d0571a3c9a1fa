"""The operations of `lingen.kernels` at the sizes of a layer: inputs, call, FLOPs. A new one is an entry of CASES."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lingen.blocks.layers import clamp, head_count
from lingen.blocks.scan import permutation
from lingen.blocks.temporal_swin import window_padding
from lingen.kernels.conv import conv_silu
from lingen.kernels.cross_attention import TextKeys, cross_attention
from lingen.kernels.gated_norm import gated_norm
from lingen.kernels.modulate import modulate
from lingen.kernels.pool import pool
from lingen.kernels.scan import rows_of, scan
from lingen.kernels.swiglu import swiglu
from lingen.kernels.window_attention import window_attention
from lingen.recipe.sections import Triple

Inputs = dict[str, Tensor]
Normal = Callable[..., Tensor]
"""Makes a tensor of random numbers, where and in the precision that is measured."""
ORDER = "twh"
"""Scan order of the operations that have one: that of layer 1, which is not the order in memory."""


@dataclass(frozen=True)
class LayerSizes:
    """A layer on a grid, batch 1; numbers that are no arguments are those of LinGen-4B's recipe."""

    grid: Triple
    dim: int
    state_dim: int = 128
    head_dim: int = 64
    chunk: int = 256
    window: Triple = (8, 4, 4)
    review: Triple = (2, 2, 2)
    text: int = 513

    @property
    def n(self) -> int:
        return math.prod(self.grid)

    @property
    def inner(self) -> int:
        return 2 * self.dim

    @property
    def heads(self) -> int:
        """Heads of the scan."""
        return self.inner // self.head_dim

    @property
    def num_heads(self) -> int:
        """Heads of the attentions."""
        return head_count(self.dim, None)

    @property
    def channels(self) -> int:
        """x | B | C"""
        return self.inner + 2 * self.state_dim

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward."""
        return max(64, 64 * round(2.7 * self.dim / 64))


@dataclass(frozen=True)
class Case:
    """One operation."""

    name: str
    make: Callable[[LayerSizes, Normal], Inputs]
    """Every input, also one that the operation makes of another input: a compiler does not see how it is made."""
    call: Callable[[Inputs, LayerSizes, str], Any]
    """(inputs, sizes, kernel) -> outputs."""
    flops: Callable[[LayerSizes], float] = lambda sizes: 0.0
    """FLOPs of the matrix products in a forward; elementwise work is bounded by its bytes."""
    backward: float = 2.0
    """FLOPs of the backward as a multiple of the forward's."""
    twins: tuple[str, ...] = ("triton", "reference")
    exact: str = "reference"
    """The twin that is run in float64 to compare with."""


def _plain(operation: Callable[..., Any], **settings: Any) -> Callable[[Inputs, LayerSizes, str], Any]:
    """The call of an operation that takes the inputs by their names."""
    return lambda inputs, sizes, kernel: operation(**inputs, **settings, kernel=kernel)


def _row(sizes: LayerSizes, normal: Normal) -> tuple[Tensor, ...]:
    """z | x, B, C | dt as slices of one projection, as the layer has them."""
    row = normal(1, sizes.n, sizes.inner + sizes.channels + sizes.heads)
    return row.split([sizes.inner, sizes.channels, sizes.heads], -1)


def _order(sizes: LayerSizes, like: Tensor) -> Inputs:
    return {"index": permutation(ORDER, sizes.grid, like.device)[0]}


def _make_scan(sizes: LayerSizes, normal: Normal) -> Inputs:
    _, u, dt = _row(sizes, normal)
    heads = normal(2, sizes.heads).float()
    state = 0.1 * normal(1, 2, sizes.heads, sizes.head_dim, sizes.state_dim).float()
    made = {"u": u.contiguous(), "dt": dt, "a": -(1 + 15 * torch.sigmoid(heads)), "d": torch.ones_like(heads)}
    return made | {"dt_bias": -4 + heads, "state": state} | _order(sizes, u)


def _scan(inputs: Inputs, sizes: LayerSizes, kernel: str) -> Tensor:
    u, *more = (inputs[name] for name in ("u", "dt", "a", "d", "dt_bias", "index", "state"))
    missing = rows_of(sizes.n, kernel, u.dtype) - sizes.n
    u = F.pad(u, (0, 0, 0, missing)) if missing else u  # in the layer, the conv writes these zeros
    return scan(u, *more, state_dim=sizes.state_dim, kernel=kernel)[:, : sizes.n]


def _scan_flops(sizes: LayerSizes) -> float:
    """Both directions share C B^T and the product inside of a chunk; states are made and used for each."""
    inside = 2 * sizes.chunk * (sizes.state_dim + sizes.inner)
    return sizes.n * (inside + 2 * 4 * sizes.state_dim * sizes.inner)


def _make_conv(sizes: LayerSizes, normal: Normal) -> Inputs:
    u = _row(sizes, normal)[1]
    return {"u": u, "weight": normal(sizes.channels, 4), "bias": normal(sizes.channels)} | _order(sizes, u)


def _make_gated_norm(sizes: LayerSizes, normal: Normal) -> Inputs:
    y = normal(1, sizes.n, sizes.inner)
    return {"y": y, "z": _row(sizes, normal)[0], "weight": 1 + normal(sizes.inner)} | _order(sizes, y)


def _make_pool(sizes: LayerSizes, normal: Normal) -> Inputs:
    row = normal(1, sizes.n, sizes.inner + sizes.channels + sizes.heads)
    return {"x": row[..., sizes.inner :].unflatten(1, sizes.grid)}


def _gains(sizes: LayerSizes, normal: Normal) -> Inputs:
    width = sizes.dim // sizes.num_heads
    return {"q_weight": 1 + 0.1 * normal(width), "k_weight": 1 + 0.1 * normal(width)}


def _make_window(sizes: LayerSizes, normal: Normal) -> Inputs:
    return {"qkv": normal(1, *sizes.grid, 3 * sizes.dim)} | _gains(sizes, normal)


def _window(inputs: Inputs, sizes: LayerSizes, kernel: str, shifted: bool) -> Tensor:
    window = clamp(sizes.window, sizes.grid)
    padding, heads = window_padding(sizes.grid, window, shifted), sizes.num_heads
    return window_attention(**inputs, window=window, padding=padding, num_heads=heads, eps=1e-6, kernel=kernel)


def _make_cross(sizes: LayerSizes, normal: Normal) -> Inputs:
    heads = (sizes.num_heads, sizes.dim // sizes.num_heads)
    k, v = normal(1, sizes.text, 2, *heads).unbind(2)
    return {"q": normal(1, sizes.n, *heads), "k": k, "v": v} | _gains(sizes, normal)


def _cross(inputs: Inputs, sizes: LayerSizes, kernel: str) -> Tensor:
    mask = torch.ones(1, sizes.text, dtype=torch.bool, device=inputs["q"].device)
    q, k, v, *gains = inputs.values()
    return cross_attention(q, TextKeys(k, v, mask), *gains, eps=1e-6, kernel=kernel)


def _make_modulate(sizes: LayerSizes, normal: Normal, names: str) -> Inputs:
    """x, update and positions for each token; gate, scale and shift for all."""
    made = {"x": normal(1, *sizes.grid, sizes.dim), "weight": 1 + 0.1 * normal(sizes.dim)}
    made |= {"update": normal(1, *sizes.grid, sizes.dim), "positions": normal(*sizes.grid, sizes.dim)}
    made |= {name: normal(1, 1, sizes.dim).float() for name in ("gate", "scale", "shift")}
    return {name: made[name] for name in names.split()}


def _modulate(inputs: Inputs, sizes: LayerSizes, kernel: str) -> tuple[Tensor, ...]:
    """Of (x_new, normed) those that these operands have."""
    results = zip(modulate(**inputs, kernel=kernel), ("update", "weight"), strict=True)
    return tuple(result for result, operand in results if operand in inputs)


def _window_flops(sizes: LayerSizes) -> float:
    return 4.0 * sizes.n * math.prod(clamp(sizes.window, sizes.grid)) * sizes.dim


CASES = (
    Case("scan", _make_scan, _scan, _scan_flops, twins=("triton", "chunked", "stock")),
    Case("conv", _make_conv, _plain(conv_silu, before=2)),
    Case("gated norm", _make_gated_norm, _plain(gated_norm)),
    Case("pool", _make_pool, lambda inputs, sizes, kernel: pool(inputs["x"], sizes.review, kernel=kernel)),
    *(
        Case(name, _make_window, partial(_window, shifted=shifted), _window_flops, 2.5, ("triton", "sdpa"))
        for name, shifted in (("window attention", False), ("window attention, shifted", True))
    ),
    Case("cross-attention", _make_cross, _cross, lambda sizes: 4.0 * sizes.n * sizes.text * sizes.dim, 2.5),
    Case("norm, modulate", partial(_make_modulate, names="x weight shift scale positions"), _modulate),
    Case("add, norm, modulate", partial(_make_modulate, names="x update weight gate shift scale"), _modulate),
    Case("gate, add", partial(_make_modulate, names="x update gate"), _modulate),
    Case("swiglu", lambda sizes, normal: {"gate_up": normal(1, sizes.n, 2 * sizes.hidden)}, _plain(swiglu)),
)
