"""Everything of Mamba2 between its two projections as one function in Triton: review, conv, scan, gated norm.

The projection is read where it lies and its gradient is written where it belongs, slice by slice, so that autograd
neither splits nor concatenates the widest tensor of a layer. Why only the state of the review is computed:
docs/facts.md, "Review tokens"."""

from typing import NamedTuple

import torch
from torch import Tensor

from lingen.kernels.conv_triton import conv_silu_backward, conv_silu_forward
from lingen.kernels.gated_norm_triton import gated_norm_backward, gated_norm_forward
from lingen.kernels.kept import kept
from lingen.kernels.pool_triton import pool_backward, pool_forward
from lingen.kernels.scan import chunk_of, rows_of, state_gradients
from lingen.kernels.scan_backward_triton import scan_backward
from lingen.kernels.scan_triton import Scan, ScanSizes, scan_forward
from lingen.recipe.sections import Triple


class Weights(NamedTuple):
    """Parameters, in the order of `Mamba2Core`'s arguments."""

    conv: Tensor
    """[c m]"""
    conv_bias: Tensor
    """[c]"""
    a: Tensor
    """[r k], negative."""
    d: Tensor
    """[r k]"""
    dt_bias: Tensor
    """[r k]"""
    norm: Tensor
    """[k e]"""


class Mamba2Plan(NamedTuple):
    """What does not change from one clip to the next.

    order and review_order: raster row of each position of the scan, over the grid and over the pooled grid; None for
    raster order. review: pooling size, or None. review_ways: directions that read the review first, 0 without one.
    before, segment, review_segment: see `conv_silu`; the latter over the pooled grid. norm_groups, eps: of the gated
    norm."""

    sizes: ScanSizes
    order: Tensor | None
    review: Triple | None
    review_order: Tensor | None
    review_ways: int
    before: int
    segment: int
    review_segment: int
    norm_groups: int
    eps: float

    def slices(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, x | b | c and dt of [b n channels], of its pooled streams, where z is empty, or of a gradient."""
        streams = [sum(self.sizes.parts), self.sizes.heads]
        z, xbc, dt = projected.split([projected.shape[-1] - sum(streams), *streams], -1)
        return z, xbc, dt


def forward(
    projected: Tensor, weights: Weights, plan: Mamba2Plan, quantize: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The normed result [b n k*e] in raster order; the scales of its rows where it is quantized; the scan's result.
    projected: [b t h w z | x | b | c | dt], dt raw."""
    z, xbc, dt = plan.slices(projected.flatten(1, 3))

    def scanned() -> Tensor:
        return scan_forward(_scan(xbc, dt, weights, plan), weights.d.sum(0), _review(projected, weights, plan))

    y = kept(scanned)
    out, scale = gated_norm_forward(
        y, z, weights.norm, plan.order, groups=plan.norm_groups, eps=plan.eps, quantize=quantize
    )
    return out, scale, y


def _scan(xbc: Tensor, dt: Tensor, weights: Weights, plan: Mamba2Plan, review: bool = False) -> Scan:
    """The scan over the conv's result. Over the review tokens, every direction reads forwards."""
    n, sizes, index, segment = dt.shape[1], plan.sizes, plan.order, plan.segment
    if review:
        sizes = sizes._replace(ways=plan.review_ways, turns=False)
        index, segment = plan.review_order, plan.review_segment
    rows = rows_of(n, "triton", xbc.dtype)
    u = conv_silu_forward(xbc, weights.conv, weights.conv_bias, index, before=plan.before, segment=segment, rows=rows)
    a, bias = weights.a[: sizes.ways], weights.dt_bias[: sizes.ways]
    return Scan(u, dt, a, bias, index, sizes, chunk_of(n, xbc.dtype, sizes.width * sizes.state))


def _review(projected: Tensor, weights: Weights, plan: Mamba2Plan) -> Tensor | None:
    """States [b r k s e] that the review leaves; a direction that does not read it first starts from zero."""
    if plan.review is None:
        return None
    _, xbc, dt = plan.slices(_pooled(projected, plan))
    scan = _scan(xbc, dt, weights, plan, review=True)
    _, end, _ = scan.states(scan.x, scan.b, None)
    missing = plan.sizes.ways - plan.review_ways
    return torch.cat([end, torch.zeros_like(end)], 1) if missing else end


def _pooled(projected: Tensor, plan: Mamba2Plan) -> Tensor:
    """Pooled streams, without z: [b n2 channels]."""
    assert plan.review is not None
    inner = plan.sizes.heads * plan.sizes.width
    return pool_forward(projected[..., inner:], plan.review).flatten(1, 3)


class Mamba2Core(torch.autograd.Function):
    """`forward` with a gradient; saves the projection and the scan's result, and recomputes the rest."""

    @staticmethod
    def forward(ctx, projected, plan, *weights):
        out, _, y = forward(projected, Weights(*weights), plan, quantize=False)
        ctx.save_for_backward(projected, y, *weights)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx, grad):
        projected, y, *saved = ctx.saved_tensors
        weights, plan = Weights(*saved), ctx.plan
        z, xbc, dt = plan.slices(projected.flatten(1, 3))
        dprojected = torch.empty(projected.shape, device=projected.device, dtype=projected.dtype)
        dz, dxbc, ddt = plan.slices(dprojected.flatten(1, 3))
        dy, dnorm = gated_norm_backward(
            grad.contiguous(), y, z, weights.norm, plan.order, groups=plan.norm_groups, eps=plan.eps, dz_out=dz
        )
        scan = _scan(xbc, dt, weights, plan)
        begin = _review(projected, weights, plan)
        du, da, dd, ddt_bias, dbegin = scan_backward(scan, dy, weights.a, weights.d.sum(0), begin, plan.order, ddt)
        dconv, dconv_bias = conv_silu_backward(
            du, xbc, weights.conv, weights.conv_bias, plan.order, before=plan.before, segment=plan.segment,
            out=dxbc,
        )  # fmt: skip
        grads = Weights(dconv, dconv_bias, da, dd.expand_as(weights.d), ddt_bias, dnorm)
        if plan.review is not None:
            grads = _review_backward(projected, weights, plan, dbegin, dprojected, grads)
        return dprojected, None, *grads


def _review_backward(
    projected: Tensor, weights: Weights, plan: Mamba2Plan, dbegin: Tensor, dprojected: Tensor, grads: Weights
) -> Weights:
    """Adds what the review's states pass on to the gradients of the projection and of the weights."""
    assert plan.review is not None
    pooled = _pooled(projected, plan)
    _, xbc, dt = plan.slices(pooled)
    rows, ways, sizes = dt.shape[1], plan.review_ways, plan.sizes
    conv = (weights.conv, weights.conv_bias, plan.review_order)
    before, segment = plan.before, plan.review_segment
    u = conv_silu_forward(xbc, *conv, before=before, segment=segment, rows=rows)
    du, ddt, da, ddt_bias = state_gradients(
        dbegin[:, :ways].mT, u, dt, weights.a[:ways], weights.dt_bias[:ways], plan.review_order,
        sizes.groups, sizes.state,
    )  # fmt: skip
    dpooled = torch.empty_like(pooled)
    _, dxbc, ddt_out = plan.slices(dpooled)
    ddt_out.copy_(ddt)
    dconv, dconv_bias = conv_silu_backward(du, xbc, *conv, before=before, segment=segment, out=dxbc)
    inner = sizes.heads * sizes.width
    streams = dprojected[..., inner:]
    grid = [-(-n // min(n, size)) for n, size in zip(projected.shape[1:4], plan.review, strict=True)]
    pool_backward(dpooled.unflatten(1, grid), plan.review, out=streams, add=True)
    grads.a[:ways] += da
    grads.dt_bias[:ways] += ddt_bias
    return grads._replace(conv=grads.conv + dconv, conv_bias=grads.conv_bias + dconv_bias)
