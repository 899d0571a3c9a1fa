"""Bidirectional Mamba2 over a scan of the grid, with review tokens as its initial state: the core of the MA-branch."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lingen.blocks.layers import RMSNorm, grid_of, stays_float32, trains_in_float32, undecayed
from lingen.blocks.scan import column_length, order_of, permutation
from lingen.kernels.choice import holds_numbers, is_unlaunched
from lingen.kernels.conv import MOST_TAPS, conv_silu
from lingen.kernels.fp8 import Quantized, as_its, wants_fp8
from lingen.kernels.gated_norm import gated_norm
from lingen.kernels.pool import pool, windows_of
from lingen.kernels.scan import rows_of, scan, scan_kernel, scan_state
from lingen.recipe.bounds import FREE, IDENTITY, Above, AtLeast, Between
from lingen.recipe.errors import SettingError
from lingen.recipe.sections import Triple
from lingen.recipe.signature import checked


@checked
class Mamba2(nn.Module):
    """Mamba2 (arXiv 2405.21060) along a scan of the grid, in both directions, review tokens first; linear in tokens.

    Projections are shared by the directions; A, D and dt bias are per direction [ours]. The directions are summed
    before the gated norm. Review tokens (LinGen, arXiv 2412.09856) are the mean-pooled grid, read before the clip: as
    their outputs are thrown away, only the state they leave is computed, and as pooling commutes with the projection,
    the projected streams are pooled. The conv starts fresh on either. Defaults are mamba_ssm's. SettingError.

    Settings:
        scan: name in SCANS (or 'module:attr'); a cycle gives each layer its own order.
        state_dim, head_dim, groups, expand: sizes as in mamba_ssm (d_state, headdim, ngroups, expand).
        dt_min, dt_max: range of the initial time steps, with which a head also writes: lower them and it writes less.
        long_heads: share of the heads that begin with a long memory, as `ScanMemory.draw` says; 0 is mamba_ssm's start.
        a_min, a_max: the decay A begins log-uniform in [a_min, 1] in long heads, and uniform in [1, a_max] in the
            others. A head forgets after about 1 / (dt A) tokens (docs/model.md, "Memory of the scan").
        norm: the gated norm is "shared" by the heads of a group, or "per_head", so that no head drowns another [ours].
        conv: "shared" is one conv, centred; "per_direction" one for each, causal in its direction.
        conv_width: tokens that the conv sees.
        conv_ends: "masked": in orders that read column by column in time, the conv does not join a column's last frame
            to the next one's first (one frame is read as "joined"); the state goes on. docs/model.md, "Order of time".
        review: tokens that are pooled into one, along t, h, w; null for no review.
        review_reverse: "front": the reverse direction, too, reads the review first; "plain" flips everything, so that
            it reads the review last and gains nothing from it.
        bidirectional: false is the causal Mamba2 of other implementations.
        kernel: of `lingen.kernels.scan`. The scan order costs nothing with "triton": the conv reads the grid in scan
            order, and the gated norm writes it back."""

    wants_fp8 = as_its("in_proj")

    def __init__(
        self,
        dim: int,
        layer: int,
        *,
        scan: Annotated[str, IDENTITY] = "rotary_major",
        state_dim: Annotated[int, AtLeast(1), IDENTITY] = 128,
        head_dim: Annotated[int, AtLeast(1), IDENTITY] = 64,
        groups: Annotated[int, AtLeast(1), IDENTITY] = 1,
        expand: Annotated[int, AtLeast(1), IDENTITY] = 2,
        dt_min: Annotated[float, Above(0), IDENTITY] = 1e-3,
        dt_max: Annotated[float, IDENTITY] = 0.1,
        long_heads: Annotated[float, Between(0, 1), IDENTITY] = 0.25,
        a_min: Annotated[float, Between(1e-6, 1), IDENTITY] = 1e-2,
        a_max: Annotated[float, Above(1), IDENTITY] = 16.0,
        norm: Annotated[Literal["shared", "per_head"], IDENTITY] = "shared",
        conv: Annotated[Literal["shared", "per_direction"], IDENTITY] = "shared",
        conv_width: Annotated[int, Between(1, MOST_TAPS), IDENTITY] = 4,
        conv_ends: Annotated[Literal["joined", "masked"], IDENTITY] = "joined",
        review: Annotated[tuple[int, int, int] | None, AtLeast(1), IDENTITY] = (2, 2, 2),
        review_reverse: Annotated[Literal["front", "plain"], IDENTITY] = "front",
        bidirectional: Annotated[bool, IDENTITY] = True,
        kernel: Annotated[Literal["auto", "reference", "chunked", "triton", "stock"], FREE] = "auto",
    ):
        super().__init__()
        inner = expand * dim
        heads, channels = inner // head_dim, inner + 2 * groups * state_dim
        if inner % head_dim:
            message = f"head_dim={head_dim} does not divide expand * width = {expand} * {dim} = {inner}."
            raise SettingError("head_dim", message)
        if heads % groups:
            raise SettingError("groups", f"groups={groups} does not divide the {heads} heads.")
        if dt_min > dt_max:
            raise SettingError("dt_min", f"dt_min={dt_min} must be at most dt_max={dt_max}.")
        self.order = order_of(scan, layer)
        self.review, self.masked = review, conv_ends == "masked"
        self.review_reverse, self.kernel = review_reverse, kernel
        self.groups, self.state_dim, self.head_dim = groups, state_dim, head_dim
        self.directions = 2 if bidirectional else 1
        self.centred = bidirectional and conv == "shared"

        self.sizes = (inner, channels, heads)  # z | x, B, C | dt
        self.memory = ScanMemory(self.directions, heads)
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        convolved = channels if self.centred else self.directions * channels
        self.conv1d = trains_in_float32(nn.Conv1d(convolved, convolved, conv_width, groups=convolved))
        self.memory.draw(dt_min, dt_max, long_heads, a_min, a_max)
        self.norm, self.norm_groups = RMSNorm(inner, eps=1e-5), heads if norm == "per_head" else groups
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Float[Tensor, "b t h w d"] | Quantized) -> Float[Tensor, "b t h w d"]:
        projected = self.in_proj(x)
        grid = grid_of(projected)
        z, streams = projected.split([self.sizes[0], sum(self.sizes[1:])], -1)
        kernel = scan_kernel(self.kernel, streams, self.head_dim, self.state_dim)
        launches = holds_numbers(projected) or is_unlaunched(projected)
        fused = "triton" if kernel == "triton" and launches else "reference"
        if fused == "triton" and (self.centred or self.directions == 1):
            return self._fused(projected)
        state = None
        if self.review is not None:
            state = self._review_state(pool(streams, self.review, kernel=fused), kernel, fused)
        index, y = self._index(grid, projected.device), self._scan(streams, state, kernel, fused)
        norm, low = self.norm, wants_fp8(self.out_proj)
        out = gated_norm(
            y, z.flatten(1, 3), norm.weight, index, groups=self.norm_groups, eps=norm.eps, quantize=low, kernel=fused
        )
        if isinstance(out, tuple):
            return self.out_proj(Quantized(out[0].unflatten(1, grid), out[1].unflatten(1, (*grid, 1))))
        return self.out_proj(out.unflatten(1, grid))

    def _fused(self, projected: Float[Tensor, "b t h w c"]) -> Float[Tensor, "b t h w d"]:
        """Everything between the projections in Triton."""
        from lingen.kernels.mamba2_triton import Mamba2Core, Mamba2Plan, Weights, forward
        from lingen.kernels.scan_triton import ScanSizes

        grid, device = grid_of(projected), projected.device
        sizes = ScanSizes(self.sizes[2], self.head_dim, self.groups, self.state_dim, self.directions)
        review_index, review_segment, ways = None, 0, 0
        if self.review is not None:
            _, windows = windows_of(projected, self.review)
            review_index, review_segment = self._index(windows, device), self._segment(windows)
            ways = self.directions if self.review_reverse == "front" else 1
        plan = Mamba2Plan(
            sizes, self._index(grid, device), self.review, review_index, ways, self._before, self._segment(grid),
            review_segment, self.norm_groups, self.norm.eps,
        )  # fmt: skip
        bias = self.conv1d.bias
        assert bias is not None
        a, d, dt_bias = self.memory()
        weights = Weights(self.conv1d.weight.squeeze(1), bias, a, d, dt_bias, self.norm.weight)
        if torch.is_grad_enabled():
            return self.out_proj(Mamba2Core.apply(projected, plan, *weights).unflatten(1, grid))
        out, scale, _ = forward(projected, weights, plan, quantize=wants_fp8(self.out_proj))
        out = out.unflatten(1, grid)
        return self.out_proj(out if scale is None else Quantized(out, scale.unflatten(1, (*grid, 1))))

    @property
    def _before(self) -> int:
        """Taps of the conv in the past: it is centred, or causal."""
        width = self.conv1d.kernel_size[0]
        return width // 2 if self.centred else width - 1

    def horizon(self) -> Float[Tensor, ""]:
        """See `ScanMemory.horizon`."""
        return self.memory.horizon()

    def _index(self, grid: Triple, device: torch.device) -> Int[Tensor, "n"] | None:
        """Raster row of each position of the sequence; None where the scan is raster order itself."""
        return None if self.order == "thw" else permutation(self.order, grid, device)[0]

    def _segment(self, grid: Triple) -> int:
        """Positions that the conv keeps together, see `conv_silu`."""
        return column_length(self.order, grid) if self.masked else 0

    def _scan(
        self, streams: Float[Tensor, "b t h w c"], state: Float[Tensor, "b r k e s"] | None, kernel: str, fused: str
    ) -> Float[Tensor, "b rows f"]:
        """Conv and scan, all directions summed, in scan order."""
        n, (a, d, dt_bias) = streams.shape[1:4].numel(), self.memory()
        sides = []
        for ways, order, u, dt in self._convolved(streams, self.directions, kernel, fused, turns=True):
            start = None if state is None else state[:, ways]
            sides.append(scan(
                u, dt, a[ways], d[ways], dt_bias[ways], order, start,
                groups=self.groups, state_dim=self.state_dim, kernel=kernel,
            ))  # fmt: skip
        return sides[0] if len(sides) == 1 else sides[0][:, :n] + sides[1][:, :n].flip(1)

    def _review_state(self, streams: Float[Tensor, "b t h w c"], kernel: str, fused: str) -> Float[Tensor, "b r k e s"]:
        """What the directions remember of the review tokens, which all of them read forwards."""
        reading, (a, _, dt_bias) = self.directions if self.review_reverse == "front" else 1, self.memory()
        sizes = {"groups": self.groups, "state_dim": self.state_dim}
        states = [
            scan_state(u, dt, a[ways], dt_bias[ways], order, **sizes, kernel=kernel)
            for ways, order, u, dt in self._convolved(streams, reading, kernel, fused, turns=False)
        ]
        state = torch.cat(states, 1)
        return torch.cat([state, torch.zeros_like(state)], 1) if reading < self.directions else state

    def _convolved(
        self, streams: Float[Tensor, "b t h w c"], ways: int, kernel: str, fused: str, *, turns: bool
    ) -> Iterator[tuple[slice, Int[Tensor, "n"] | None, Float[Tensor, "b rows c"], Float[Tensor, "b n k"]]]:
        """What each scan reads: its directions, their order, the streams after the depthwise conv along it and SiLU,
        and dt. A centred conv serves all directions at once; of causal ones each has its own, and with `turns` the
        second one has the reversed sequence."""
        grid, channels = grid_of(streams), self.sizes[1]
        index, segment = self._index(grid, streams.device), self._segment(grid)
        xbc, dt = streams.flatten(1, 3).split(self.sizes[1:], -1)
        rows = rows_of(dt.shape[1], kernel, xbc.dtype)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        assert bias is not None
        for one in [slice(0, ways)] if self.centred else [slice(way, way + 1) for way in range(ways)]:
            order = index
            if turns and one.start == 1:
                order = (torch.arange(dt.shape[1], device=dt.device) if index is None else index).flip(0)
            mine = slice(one.start * channels, (one.start + 1) * channels)
            yield one, order, conv_silu(
                xbc, weight[mine], bias[mine], order, before=self._before, segment=segment, rows=rows, kernel=fused
            ), dt  # fmt: skip


@stays_float32
class ScanMemory(nn.Module):
    """What sets how long each head of a scan remembers, for which bfloat16 is too coarse: always float32, also where
    the rest of a block is gathered in bfloat16 (`lingen.training.sharding`).

    `forward` gives A, D and dt bias [r k]."""

    def __init__(self, directions: int, heads: int):
        super().__init__()
        each = torch.empty(directions, heads, dtype=torch.float32)
        self.a_log, self.d, self.dt_bias = (undecayed(nn.Parameter(torch.ones_like(each))) for _ in range(3))

    @torch.no_grad()
    def draw(self, dt_min: float, dt_max: float, long_heads: float, a_min: float, a_max: float) -> None:
        """A from U(1, a_max), log dt uniform between the two, D 1 (arXiv 2405.21060); and in long heads log A uniform
        between those of a_min and 1 [ours], from the same random numbers.

        Long are the nearest whole number to `long_heads` of all k heads, the same ones in both directions, spread
        evenly over them and so over the groups of B and C: of every four heads the last one for 0.25."""
        a, heads = self.a_log.uniform_(1, a_max), self.a_log.shape[1]
        count = int(long_heads * heads + 0.5)
        is_long = torch.arange(1, heads + 1, device=a.device) * count % heads < count
        share = (a - 1) / (a_max - 1)
        a.copy_(torch.where(is_long, math.log(a_min) * share, a.log()))
        log_dt = self.dt_bias.uniform_(math.log(dt_min), math.log(dt_max))
        log_dt.exp_().expm1_().log_()  # inverse of softplus

    def forward(self) -> tuple[Float[Tensor, "r k"], Float[Tensor, "r k"], Float[Tensor, "r k"]]:
        dtype = torch.promote_types(self.a_log.dtype, torch.float32)
        return -self.a_log.to(dtype).exp(), self.d, self.dt_bias

    @torch.no_grad()
    def horizon(self) -> Float[Tensor, ""]:
        """Reach in tokens, at the biases' time steps: the mean over all heads of 1 / (dt A), after which a head has
        forgotten all but 1/e, weighted by dt, with which it writes; that is sum(1 / A) / sum(dt). It is what is left
        of a write, sum(dt exp(-lag dt A)), integrated over the lag and divided by its start [ours]."""
        return (-self.a_log.float()).exp().sum() / F.softplus(self.dt_bias.float()).sum()
