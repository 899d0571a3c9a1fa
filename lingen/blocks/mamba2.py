"""Bidirectional Mamba2 over a scan of the grid, with review tokens as its initial state: the core of the MA-branch."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lingen.blocks.layers import GatedRMSNorm, check_choice, check_sizes, grid_of
from lingen.blocks.review import pool
from lingen.blocks.scan import order_of, to_grid, to_sequence
from lingen.kernels import SSD_KERNELS, ssd, ssd_state
from lingen.registry import SettingError


class Mamba2(nn.Module):
    """Mamba2 (arXiv 2405.21060) along a scan of the grid, in both directions, review tokens first; linear in tokens.

    Projections are shared by the directions; A, D and dt bias are per direction [ours]. The directions are summed
    before the gated norm. Review tokens (LinGen, arXiv 2412.09856) are the mean-pooled grid, read before the clip: as
    their outputs are thrown away, only the state they leave is computed, and as pooling commutes with the projection,
    the projected streams are pooled. The conv starts fresh on either sequence. Defaults are mamba_ssm's. Raises
    SettingError.

    Settings:
        scan: name in SCANS (or 'module:attr'); a cycle gives each layer its own order.
        state_dim, head_dim, groups, expand: sizes as in mamba_ssm (d_state, headdim, ngroups, expand).
        dt_min, dt_max: range of the initial time steps. A head forgets after about 1 / (dt A) tokens with A in
            U(1, 16): for long clips take a small dt_min (`horizon` says what it gives).
        conv: "shared" is one conv, centred; "per_direction" one for each, causal in its direction.
        conv_width: tokens that the conv sees.
        review: tokens that are pooled into one, along t, h, w; null for no review.
        review_reverse: "front" lets the reverse direction read the review first, too; "plain" flips everything, so
            that it reads the review last, which is of no use to it.
        bidirectional: false is the causal Mamba2 of other implementations.
        kernel: of `lingen.kernels.ssd`.
    """

    def __init__(
        self,
        dim: int,
        layer: int,
        *,
        scan: str = "rotary_major",
        state_dim: int = 128,
        head_dim: int = 64,
        groups: int = 1,
        expand: int = 2,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        conv: Literal["shared", "per_direction"] = "shared",
        conv_width: int = 4,
        review: tuple[int, int, int] | None = (2, 2, 2),
        review_reverse: Literal["front", "plain"] = "front",
        bidirectional: bool = True,
        kernel: Literal["auto", "reference", "chunked", "stock"] = "auto",
    ):
        super().__init__()
        _check_sizes_of(dim, state_dim, head_dim, groups, expand, conv_width)
        if not 0 < dt_min <= dt_max:
            raise SettingError("dt_min", f"dt_min={dt_min} must be above 0 and at most dt_max={dt_max}.")
        if review is not None:
            check_sizes("review", review)
        check_choice("conv", conv, ("shared", "per_direction"))
        check_choice("review_reverse", review_reverse, ("front", "plain"))
        check_choice("kernel", kernel, SSD_KERNELS)
        self.order = order_of(scan, layer)
        self.review = review
        self.review_reverse, self.kernel = review_reverse, kernel
        self.groups, self.state_dim, self.head_dim = groups, state_dim, head_dim
        self.directions = 2 if bidirectional else 1
        self.centred = bidirectional and conv == "shared"

        inner = expand * dim
        heads, channels = inner // head_dim, inner + 2 * groups * state_dim
        self.sizes = (inner, channels, heads)  # z | x, B, C | dt
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        convolved = channels if self.centred else self.directions * channels
        self.conv1d = nn.Conv1d(convolved, convolved, conv_width, groups=convolved)
        # These three decide what is remembered and lose it in bfloat16: float32 whatever the default dtype.
        self.a_log = nn.Parameter(torch.empty(self.directions, heads, dtype=torch.float32).uniform_(1, 16).log())
        self.d = nn.Parameter(torch.ones(self.directions, heads, dtype=torch.float32))
        log_dt = torch.empty(self.directions, heads, dtype=torch.float32).uniform_(math.log(dt_min), math.log(dt_max))
        self.dt_bias = nn.Parameter(log_dt.exp().expm1().log())  # inverse of softplus
        self.norm = GatedRMSNorm(inner, groups)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Float[Tensor, "b t h w d"]) -> Float[Tensor, "b t h w d"]:
        z, streams = self.in_proj(x).split([self.sizes[0], sum(self.sizes[1:])], -1)
        state = None if self.review is None else self._review_state(pool(streams, self.review))
        xs, dt, b, c = self._operands(to_sequence(streams, self.order), flip=True)
        y = ssd(xs, dt, self._a(), b, c, self.d.flatten(), self.dt_bias.flatten(), state, kernel=self.kernel)
        assert isinstance(y, Tensor)
        sides = y.flatten(2).chunk(self.directions, -1)
        y = sides[0] if self.directions == 1 else sides[0] + sides[1].flip(1)
        return self.out_proj(self.norm(to_grid(y, self.order, grid_of(x)), z))

    def horizon(self) -> Float[Tensor, "r k"]:
        """Tokens after which a head has forgotten all but 1/e, per direction and head, at the bias's time step."""
        with torch.no_grad():
            return 1 / (F.softplus(self.dt_bias.float()) * self.a_log.float().exp())

    def _a(self) -> Float[Tensor, "k"]:
        return -self.a_log.to(torch.promote_types(self.a_log.dtype, torch.float32)).exp().flatten()

    def _review_state(self, streams: Float[Tensor, "b t h w c"]) -> Float[Tensor, "b k e s"]:
        """What both directions remember of the review tokens, which both read in the same order."""
        xs, dt, b, _ = self._operands(to_sequence(streams, self.order), flip=False)
        state = ssd_state(xs, dt, self._a(), b, self.dt_bias.flatten())
        if self.review_reverse == "front" or self.directions == 1:
            return state
        heads = self.sizes[2]
        return torch.cat([state[:, :heads], torch.zeros_like(state[:, heads:])], 1)

    def _operands(self, streams: Float[Tensor, "b n c"], flip: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, dt, B, C of the scan: the directions lie side by side on the axis of heads (of groups for B and C)."""
        inner, channels, heads = self.sizes
        convolved, dt = streams.split([channels, heads], -1)
        sides = self._conv(convolved, flip)
        parts = sides.split([inner, self.groups * self.state_dim, self.groups * self.state_dim], -1)
        widths = (self.head_dim, self.state_dim, self.state_dim)
        xs, b, c = (u.unflatten(-1, (-1, width)).flatten(2, 3) for u, width in zip(parts, widths, strict=True))
        dt = dt if self.directions == 1 else torch.cat([dt, dt.flip(1) if flip else dt], -1)
        return xs, dt, b, c

    def _conv(self, u: Float[Tensor, "b n c"], flip: bool) -> Float[Tensor, "b n r c"]:
        """Depthwise conv and SiLU; the second direction is flipped afterwards (centred conv) or before (causal)."""
        width = self.conv1d.kernel_size[0]
        before = width // 2 if self.centred else width - 1
        if self.directions == 2 and not self.centred:
            u = torch.cat([u, u.flip(1) if flip else u], -1)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        assert bias is not None
        u = F.silu(_depthwise(u, weight, bias, before))
        if self.centred:
            return torch.stack([u, u.flip(1) if flip else u], 2)
        return u.unflatten(-1, (self.directions, -1))


def _depthwise(
    u: Float[Tensor, "b n c"], weight: Float[Tensor, "c m"], bias: Float[Tensor, "c"], before: int
) -> Float[Tensor, "b n c"]:
    """Each channel's conv with `before` of its m taps in the past: m products, twice as fast on a CPU as conv1d and
    without its transposed copies."""
    n, taps = u.shape[1], weight.to(u.dtype).unbind(1)
    padded = F.pad(u, (0, 0, before, len(taps) - 1 - before))
    return sum((padded[:, i : i + n] * tap for i, tap in enumerate(taps)), bias.to(u.dtype))


def _check_sizes_of(dim: int, state_dim: int, head_dim: int, groups: int, expand: int, conv_width: int) -> None:
    sizes = {"state_dim": state_dim, "head_dim": head_dim, "groups": groups, "expand": expand, "conv_width": conv_width}
    for setting, value in sizes.items():
        if value < 1:
            raise SettingError(setting, f"{setting}={value} must be 1 or more.")
    inner = expand * dim
    if inner % head_dim:
        message = f"head_dim={head_dim} does not divide expand * width = {expand} * {dim} = {inner}."
        raise SettingError("head_dim", message)
    if (inner // head_dim) % groups:
        raise SettingError("groups", f"groups={groups} does not divide the {inner // head_dim} heads.")
