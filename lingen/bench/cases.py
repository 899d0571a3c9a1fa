"""The operations of `lingen.kernels` at the sizes of a layer: inputs, call, FLOPs. A new one is an entry of CASES."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lingen.bench.flops import Grid
from lingen.blocks.layers import clamp, head_count
from lingen.blocks.scan import permutation
from lingen.blocks.temporal_swin import window_padding

Inputs = dict[str, Tensor]
ORDER = "twh"
"""Scan order of the operations that have one: of layer 1, not that of memory."""


@dataclass(frozen=True)
class Sizes:
    """A layer on a grid, batch 1; numbers that are no arguments are those of LinGen-4B's recipe."""

    grid: Grid
    dim: int
    state_dim: int = 128
    head_dim: int = 64
    chunk: int = 256
    window: Grid = (8, 4, 4)
    review: Grid = (2, 2, 2)
    text: int = 513

    @property
    def n(self) -> int:
        return math.prod(self.grid)

    @property
    def inner(self) -> int:
        return 2 * self.dim

    @property
    def heads(self) -> int:
        """Of the scan."""
        return self.inner // self.head_dim

    @property
    def num_heads(self) -> int:
        """Of the attentions."""
        return head_count(self.dim, None)

    @property
    def channels(self) -> int:
        """x | B | C"""
        return self.inner + 2 * self.state_dim

    @property
    def hidden(self) -> int:
        """Of the feed-forward."""
        return max(64, 64 * round(2.7 * self.dim / 64))


Make = Callable[[Sizes, Callable[..., Tensor]], Inputs]
Call = Callable[[Inputs, Sizes, str], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One operation."""

    name: str
    make: Make
    """(sizes, a maker of random numbers) -> inputs by name; those in float dtypes get gradients. What is looked up,
    such as the scan order, is an input too: a compiler does not see how it is made."""
    call: Call
    """(inputs, sizes, kernel) -> outputs."""
    flops: Callable[[Sizes], float] = lambda sizes: 0.0
    """Of the forward's matrix products; elementwise work is bounded by its bytes."""
    backward: float = 2.0
    """FLOPs of the backward for one of the forward."""
    twins: tuple[str, ...] = ("triton", "reference")
    exact: str = "reference"
    """The twin that is run in float64 to compare with."""


def _row(sizes: Sizes, normal: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """z | x, B, C | dt as slices of one projection, as the layer has them."""
    row = normal(1, sizes.n, sizes.inner + sizes.channels + sizes.heads)
    return row.split([sizes.inner, sizes.channels, sizes.heads], -1)


def _order(sizes: Sizes, like: Tensor) -> Inputs:
    return {"index": permutation(ORDER, sizes.grid, like.device)[0]}


def _make_scan(sizes: Sizes, normal: Callable[..., Tensor]) -> Inputs:
    _, u, dt = _row(sizes, normal)
    heads = normal(2, sizes.heads).float()
    return {
        "u": u.contiguous(), "dt": dt, "a": -(1 + 15 * torch.sigmoid(heads)), "d": torch.ones_like(heads),
        "dt_bias": -4 + heads,
        "state": 0.1 * normal(1, 2, sizes.heads, sizes.head_dim, sizes.state_dim).float(),
    } | _order(sizes, u)  # fmt: skip


def _scan(inputs: Inputs, sizes: Sizes, kernel: str) -> Tensor:
    from lingen.kernels.scan import rows_of, scan

    u, (dt, a, d, dt_bias) = inputs["u"], (inputs[name] for name in ("dt", "a", "d", "dt_bias"))
    missing = rows_of(sizes.n, kernel, u.dtype) - sizes.n
    u = F.pad(u, (0, 0, 0, missing)) if missing else u  # in the layer, the conv writes these zeros
    y = scan(u, dt, a, d, dt_bias, inputs["index"], inputs["state"], state_dim=sizes.state_dim, kernel=kernel)
    return y[:, : sizes.n]


def _scan_flops(sizes: Sizes) -> float:
    """Both directions share C B^T and the product inside of a chunk; states are made and used for each."""
    inside = 2 * sizes.chunk * (sizes.state_dim + sizes.inner)
    return sizes.n * (inside + 2 * 4 * sizes.state_dim * sizes.inner)


def _make_conv(sizes: Sizes, normal: Callable[..., Tensor]) -> Inputs:
    u = _row(sizes, normal)[1]
    return {"u": u, "weight": normal(sizes.channels, 4), "bias": normal(sizes.channels)} | _order(sizes, u)


def _conv(inputs: Inputs, sizes: Sizes, kernel: str) -> Tensor:
    from lingen.kernels.conv import conv_silu

    return conv_silu(**inputs, before=2, kernel=kernel)  # type: ignore[arg-type]


def _make_gated_norm(sizes: Sizes, normal: Callable[..., Tensor]) -> Inputs:
    y = normal(1, sizes.n, sizes.inner)
    return {"y": y, "z": _row(sizes, normal)[0], "weight": 1 + normal(sizes.inner)} | _order(sizes, y)


def _gated_norm(inputs: Inputs, sizes: Sizes, kernel: str) -> Tensor:
    from lingen.kernels.gated_norm import gated_norm

    out = gated_norm(**inputs, kernel=kernel)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return out


def _make_pool(sizes: Sizes, normal: Callable[..., Tensor]) -> Inputs:
    row = normal(1, sizes.n, sizes.inner + sizes.channels + sizes.heads)
    return {"x": row[..., sizes.inner :].unflatten(1, sizes.grid)}


def _pool(inputs: Inputs, sizes: Sizes, kernel: str) -> Tensor:
    from lingen.kernels.pool import pool

    return pool(inputs["x"], sizes.review, kernel=kernel)


def _gains(sizes: Sizes, normal: Callable[..., Tensor]) -> Inputs:
    width = sizes.dim // sizes.num_heads
    return {"q_weight": 1 + 0.1 * normal(width), "k_weight": 1 + 0.1 * normal(width)}


def _make_window(sizes: Sizes, normal: Callable[..., Tensor]) -> Inputs:
    return {"qkv": normal(1, *sizes.grid, 3 * sizes.dim)} | _gains(sizes, normal)


def _window(inputs: Inputs, sizes: Sizes, kernel: str, shifted: bool) -> Tensor:
    from lingen.kernels.window_attention import window_attention

    window = clamp(sizes.window, sizes.grid)
    padding = window_padding(sizes.grid, window, shifted)
    return window_attention(
        **inputs, window=window, padding=padding, num_heads=sizes.num_heads, eps=1e-6, kernel=kernel
    )


def _make_cross(sizes: Sizes, normal: Callable[..., Tensor]) -> Inputs:
    heads = (sizes.num_heads, sizes.dim // sizes.num_heads)
    k, v = normal(1, sizes.text, 2, *heads).unbind(2)
    return {"q": normal(1, sizes.n, *heads), "k": k, "v": v} | _gains(sizes, normal)


def _cross(inputs: Inputs, sizes: Sizes, kernel: str) -> Tensor:
    from lingen.kernels.cross_attention import cross_attention

    mask = torch.ones(1, sizes.text, dtype=torch.bool, device=inputs["q"].device)
    return cross_attention(**inputs, mask=mask, eps=1e-6, kernel=kernel)


def _make_modulate(sizes: Sizes, normal: Callable[..., Tensor], names: str) -> Inputs:
    """x, update and positions for each token; gate, scale and shift for all."""
    made = {"x": normal(1, *sizes.grid, sizes.dim), "weight": 1 + 0.1 * normal(sizes.dim)}
    made |= {"update": normal(1, *sizes.grid, sizes.dim), "positions": normal(*sizes.grid, sizes.dim)}
    made |= {name: normal(1, 1, sizes.dim).float() for name in ("gate", "scale", "shift")}
    return {name: made[name] for name in names.split()}


def _norm_modulate(inputs: Inputs, sizes: Sizes, kernel: str) -> Tensor:
    from lingen.kernels.modulate import norm_modulate

    out = norm_modulate(**inputs, kernel=kernel)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return out


def _add_norm(inputs: Inputs, sizes: Sizes, kernel: str) -> tuple[Tensor, ...]:
    from lingen.kernels.modulate import add_norm

    x, out = add_norm(**inputs, kernel=kernel)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return x, out


def _gated_add(inputs: Inputs, sizes: Sizes, kernel: str) -> Tensor:
    from lingen.kernels.modulate import gated_add

    return gated_add(**inputs, kernel=kernel)  # type: ignore[arg-type]


def _make_swiglu(sizes: Sizes, normal: Callable[..., Tensor]) -> Inputs:
    return {"gate_up": normal(1, sizes.n, 2 * sizes.hidden)}


def _swiglu(inputs: Inputs, sizes: Sizes, kernel: str) -> Tensor:
    from lingen.kernels.swiglu import swiglu

    out = swiglu(inputs["gate_up"], kernel=kernel)
    assert isinstance(out, Tensor)
    return out


CASES = (
    Case("scan", _make_scan, _scan, _scan_flops, twins=("triton", "chunked", "stock")),
    Case("conv", _make_conv, _conv),
    Case("gated norm", _make_gated_norm, _gated_norm),
    Case("pool", _make_pool, _pool),
    *(
        Case(
            f"window attention{', shifted' if shifted else ''}", _make_window, partial(_window, shifted=shifted),
            lambda sizes: 4.0 * sizes.n * math.prod(clamp(sizes.window, sizes.grid)) * sizes.dim, 2.5,
            ("triton", "sdpa"),
        )
        for shifted in (False, True)
    ),
    Case("cross-attention", _make_cross, _cross, lambda sizes: 4.0 * sizes.n * sizes.text * sizes.dim, 2.5),
    Case("norm, modulate", partial(_make_modulate, names="x weight shift scale positions"), _norm_modulate),
    Case("add, norm, modulate", partial(_make_modulate, names="x update weight gate shift scale"), _add_norm),
    Case("gate, add", partial(_make_modulate, names="x update gate"), _gated_add),
    Case("swiglu", _make_swiglu, _swiglu),
)  # fmt: skip
