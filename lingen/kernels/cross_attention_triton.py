"""Cross-attention in Triton: many queries, a few hundred keys of which some are masked.

A small kernel norms the keys and lays those that are real in front, so that the large ones walk only over them. The
queries are normed where they are loaded. The backward pass takes the queries block by block for their own gradient;
for that of the keys they are split into a fixed number of parts, whose float32 sums are added up in order when the
keys go back to their places. No atomics: the same input, the same bits."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lingen.kernels.gradients import channels_last

_LOG2E = tl.constexpr(1.4426950408889634)
# Numbers that change from grid to grid and from text to text: no reason to compile again.
_SIZES = ["n", "m", "rows", "heads", "splits"]


# Queries and keys of a block, warps and stages of each kernel; for 16-bit heads of 128, less where they are wider. With
# these, next to nothing spills out of the registers of an H100 (as compiled for sm_90).
LAUNCH = {"forward": (64, 64, 4, 3), "backward_queries": (128, 64, 8, 2), "backward_keys": (64, 128, 8, 2)}
# Programs that the gradient of the keys is shared out to, at least: enough to fill a GPU.
PROGRAMS = 640
# Text tokens that one program of the small kernels takes.
_TEXT_BLOCK = 16


class Packed(NamedTuple):
    """Text as the kernels read it."""

    keys: Tensor
    """Normed, [b k rows full], real ones first, zeros behind."""
    values: Tensor
    """Likewise."""
    place: Tensor
    """Running count of real ones [b m], int32."""


class CrossAttentionFunction(torch.autograd.Function):
    """`cross_attention` of its Triton twin; saves what goes in, what comes out and the softmax's logarithms."""

    @staticmethod
    def forward(ctx, q, k, v, mask, q_weight, k_weight, eps):
        out, logs = forward(q, pack_text(k, v, mask, k_weight, eps, q.dtype), q_weight, eps)
        ctx.save_for_backward(q, k, v, mask, q_weight, k_weight, out, logs)
        ctx.settings = (eps,)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dq, dk, dv, dq_weight, dk_weight = backward(grad, *ctx.saved_tensors, *ctx.settings)
        return dq, dk, dv, None, dq_weight, dk_weight, None


def pack_text(k: Tensor, v: Tensor, mask: Tensor, k_weight: Tensor, eps: float, dtype: torch.dtype) -> Packed:
    """What `forward` reads of the text [b m k e], in the queries' dtype."""
    k, v = map(channels_last, (k, v))
    b, m, heads, width = k.shape
    block = max(keys for _, keys, _, _ in LAUNCH.values())
    rows, full = triton.cdiv(m, block) * block, max(16, triton.next_power_of_2(width))
    place = mask.cumsum(1, dtype=torch.int32)
    keys, values = k.new_empty(2, b, heads, rows, full, dtype=dtype)
    _cross_gather_keys[triton.cdiv(rows, _TEXT_BLOCK), heads, b](
        k, v, place, k_weight, keys, values, *k.stride()[:3], *v.stride()[:3], m, rows, heads, eps,
        E=width, FULL=full, BLOCK=_TEXT_BLOCK,
    )  # fmt: skip
    return Packed(keys, values, place)


def forward(q: Tensor, packed: Packed, q_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What the heads give, [b n k e] in q's dtype, and the base-2 logarithms of the softmax's sums, [b k n]."""
    q = channels_last(q)
    (b, n, heads, _), m, rows = q.shape, packed.place.shape[1], packed.keys.shape[2]
    out, logs = q.new_empty(q.shape), torch.empty(b, heads, n, dtype=torch.float32, device=q.device)
    launch = _launch("forward", q, packed)
    _cross_forward[triton.cdiv(n, launch["QUERIES"]) * heads, b](
        q, *packed, q_weight, out, logs, *q.stride()[:3], n, m, rows, heads, eps, **launch
    )
    return out, logs


def backward(
    grad: Tensor,
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, q_weight: Tensor, k_weight: Tensor, out: Tensor, logs: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and the two gains, from that of `out` and from what `forward` gave."""
    q, k, v, grad = map(channels_last, (q, k, v, grad))
    packed = pack_text(k, v, mask, k_weight, eps, q.dtype)
    (b, n, heads, width), m, (_, _, rows, full) = q.shape, k.shape[1], packed.keys.shape
    given = q, *packed, q_weight, grad, logs
    strides = *q.stride()[:3], *grad.stride()[:3]

    launch = _launch("backward_queries", q, packed)
    blocks = triton.cdiv(n, launch["QUERIES"])
    dq, pull = q.new_empty(out.shape), torch.empty_like(logs)
    q_partial = logs.new_empty(b * blocks * heads, width)
    _cross_backward_queries[blocks * heads, b](
        *given, pull, out, dq, q_partial, *strides, n, m, rows, heads, eps, **launch
    )

    launch = _launch("backward_keys", q, packed)
    blocks, query_blocks = triton.cdiv(m, launch["KEYS"]), triton.cdiv(n, launch["QUERIES"])
    splits = min(query_blocks, triton.cdiv(PROGRAMS, blocks * heads * b))
    sums = logs.new_empty(splits, 2, *packed.keys.shape)
    _cross_backward_keys[heads, blocks * splits, b](
        *given, pull, sums, *strides, n, m, rows, heads, blocks, splits, eps, **launch
    )

    # The parts' sums are added up, and go back to the places of their tokens.
    dk, dv = k.new_empty(2, *k.shape)
    blocks = triton.cdiv(m, _TEXT_BLOCK)
    k_partial = sums.new_empty(b * blocks * heads, width)
    _cross_scatter_keys[blocks, heads, b](
        k, sums, packed.place, k_weight, dk, dv, k_partial, *k.stride()[:3], m, rows, heads, splits, eps,
        E=width, FULL=full, BLOCK=_TEXT_BLOCK,
    )  # fmt: skip
    return dq, dk, dv, q_partial.sum(0).to(q_weight.dtype), k_partial.sum(0).to(k_weight.dtype)


def _launch(kernel: str, q: Tensor, packed: Packed) -> dict[str, Any]:
    """Compile-time sizes of a kernel."""
    queries, keys, warps, stages = LAUNCH[kernel]
    full, size = packed.keys.shape[3], q.element_size()
    # Float32 has no tensor cores here: a number takes twice the room, and products are unrolled into long code.
    less = max(1, full * size // 256) * (2 if size == 4 else 1)
    queries, keys = (max(16, rows // less) for rows in (queries, keys))
    if size == 4:
        warps, stages = 4, 1
    sizes = {"E": q.shape[-1], "FULL": full, "QUERIES": queries, "KEYS": keys}
    return sizes | {"num_warps": warps, "num_stages": stages}


@triton.jit
def _places(place, j, m):
    """Where the text tokens j go, real ones first, and which are real; `place` counts those up to each token."""
    upto = tl.load(place + tl.minimum(j, m - 1))
    before = tl.load(place + tl.minimum(j, m) - 1, mask=j > 0, other=0)
    real = upto > before
    return tl.where(real, before, tl.load(place + m - 1) + j - upto), real


@triton.jit
def _normed(x, eps, E: tl.constexpr):
    """Rows over their RMS, in float32, and one over that RMS."""
    x = x.to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, 1) / E + eps)[:, None]
    return x * r, r


@triton.jit
def _normed_back(dx, x, r, weight, E: tl.constexpr):
    """Gradient of the rows x / r, from that of x * weight."""
    dx *= weight
    return (dx - x * (tl.sum(dx * x, 1) / E)[:, None]) * r


@triton.jit(do_not_specialize=_SIZES)
def _cross_gather_keys(
    k, v, place, k_weight, keys, values, k_b, k_m, k_k, v_b, v_m, v_k, m, rows, heads, eps,
    E: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = tl.arange(0, FULL)
    j = block * BLOCK + tl.arange(0, BLOCK)
    to, real = _places(place + b * m, j, m)
    ok = real[:, None] & (c < E)[None, :]
    x = tl.load(k + b * k_b + j[:, None] * k_m + head * k_k + c[None, :], mask=ok, other=0.0)
    y = tl.load(v + b * v_b + j[:, None] * v_m + head * v_k + c[None, :], mask=ok, other=0.0)
    x, _ = _normed(x, eps, E)
    x *= tl.load(k_weight + c, mask=c < E, other=0.0).to(tl.float32)[None, :]
    at = ((b * heads + head) * rows + to)[:, None] * FULL + c[None, :]
    tl.store(keys + at, x.to(keys.dtype.element_ty))
    tl.store(values + at, y.to(values.dtype.element_ty))


@triton.jit(do_not_specialize=_SIZES)
def _cross_forward(
    q, keys, values, place, q_weight, out, logs, q_b, q_n, q_k, n, m, rows, heads, eps,
    E: tl.constexpr, FULL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head, b = tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    i = (tl.program_id(0) // heads) * QUERIES + tl.arange(0, QUERIES)
    c = tl.arange(0, FULL)
    ok = (i < n)[:, None] & (c < E)[None, :]
    x = tl.load(q + b * q_b + i[:, None].to(tl.int64) * q_n + head * q_k + c[None, :], mask=ok, other=0.0)
    count = tl.load(place + b * m + m - 1)
    weight = tl.load(q_weight + c, mask=c < E, other=0.0).to(tl.float32)
    x, _ = _normed(x, eps, E)
    # The scale goes into the queries: one product fewer for each score.
    x = (x * (weight * (_LOG2E * E**-0.5))[None, :]).to(q.dtype.element_ty)
    line = b * heads + head
    j = tl.arange(0, KEYS)
    keys += line * rows * FULL + j[:, None] * FULL + c[None, :]
    values += line * rows * FULL + j[:, None] * FULL + c[None, :]
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    y = tl.zeros((QUERIES, FULL), tl.float32)
    for start in range(0, count, KEYS):
        scores = tl.dot(x, tl.trans(tl.load(keys + start * FULL)), input_precision="ieee")
        scores = tl.where((start + j < count)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        y = tl.dot(p.to(x.dtype), tl.load(values + start * FULL), y * shrink[:, None], input_precision="ieee")
        top = new_top
    out += ((b * n + i[:, None]) * heads + head) * E + c[None, :]
    tl.store(out, (y / total[:, None]).to(out.dtype.element_ty), mask=ok)
    tl.store(logs + line * n + i, top + tl.log2(total), mask=i < n)


@triton.jit(do_not_specialize=_SIZES)
def _cross_backward_queries(
    q, keys, values, place, q_weight, dout, logs, pull, out, dq, partial,
    q_b, q_n, q_k, d_b, d_n, d_k, n, m, rows, heads, eps,
    E: tl.constexpr, FULL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head, b = tl.program_id(0) % heads, tl.program_id(1).to(tl.int64)
    i = (tl.program_id(0) // heads) * QUERIES + tl.arange(0, QUERIES)
    c = tl.arange(0, FULL)
    ok = (i < n)[:, None] & (c < E)[None, :]
    row = i[:, None].to(tl.int64)
    q += b * q_b + row * q_n + head * q_k + c[None, :]
    x = tl.load(q, mask=ok, other=0.0)
    dy = tl.load(dout + b * d_b + row * d_n + head * d_k + c[None, :], mask=ok, other=0.0)
    at = ((b * n + row) * heads + head) * E + c[None, :]
    y = tl.load(out + at, mask=ok, other=0.0)
    count = tl.load(place + b * m + m - 1)
    line = b * heads + head
    log = tl.load(logs + line * n + i, mask=i < n, other=0.0)
    weight = tl.load(q_weight + c, mask=c < E, other=0.0).to(tl.float32)[None, :]
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(pull + line * n + i, delta, mask=i < n)
    x, _ = _normed(x, eps, E)
    x = (x * (weight * (_LOG2E * E**-0.5))).to(dq.dtype.element_ty)
    j = tl.arange(0, KEYS)
    keys += line * rows * FULL + j[:, None] * FULL + c[None, :]
    values += line * rows * FULL + j[:, None] * FULL + c[None, :]
    dx = tl.zeros((QUERIES, FULL), tl.float32)
    for start in range(0, count, KEYS):
        key = tl.load(keys + start * FULL)
        scores = tl.dot(x, tl.trans(key), input_precision="ieee")
        p = tl.where((start + j < count)[None, :], tl.exp2(scores - log[:, None]), 0.0)
        dp = tl.dot(dy, tl.trans(tl.load(values + start * FULL)), input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(key.dtype)
        dx = tl.dot(ds, key, dx, input_precision="ieee")
    dx *= E**-0.5
    x, r = _normed(tl.load(q, mask=ok, other=0.0), eps, E)
    # keep_dims: for a sum that is a vector, Triton would first convert the whole product to another layout.
    partial += (b * tl.num_programs(0) + tl.program_id(0)) * E + c[None, :]
    tl.store(partial, tl.sum(dx * x, 0, keep_dims=True), mask=(c < E)[None, :])
    tl.store(dq + at, _normed_back(dx, x, r, weight, E).to(dq.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=[*_SIZES, "blocks"])
def _cross_backward_keys(
    q, keys, values, place, q_weight, dout, logs, pull, sums,
    q_b, q_n, q_k, d_b, d_n, d_k, n, m, rows, heads, blocks, splits, eps,
    E: tl.constexpr, FULL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A block of keys against one part of the queries; scores are held as [keys, queries]."""
    head, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    block, split = tl.program_id(1) % blocks, tl.program_id(1) // blocks
    if block * KEYS >= tl.load(place + b * m + m - 1):
        return
    c = tl.arange(0, FULL)
    line = b * heads + head
    at = (line * rows + block * KEYS + tl.arange(0, KEYS)[:, None]) * FULL + c[None, :]
    key = tl.load(keys + at)
    value = tl.load(values + at)
    weight = tl.load(q_weight + c, mask=c < E, other=0.0).to(tl.float32)
    q += b * q_b + head * q_k + c[None, :]
    dout += b * d_b + head * d_k + c[None, :]
    dkey = tl.zeros((KEYS, FULL), tl.float32)
    dvalue = tl.zeros((KEYS, FULL), tl.float32)
    part = tl.cdiv(tl.cdiv(n, QUERIES), splits) * QUERIES
    for start in range(split * part, tl.minimum(n, (split + 1) * part), QUERIES):
        i = start + tl.arange(0, QUERIES)
        ok = (i < n)[:, None] & (c < E)[None, :]
        x = tl.load(q + i[:, None].to(tl.int64) * q_n, mask=ok, other=0.0)
        dy = tl.load(dout + i[:, None].to(tl.int64) * d_n, mask=ok, other=0.0)
        log = tl.load(logs + line * n + i, mask=i < n, other=0.0)
        delta = tl.load(pull + line * n + i, mask=i < n, other=0.0)
        x, _ = _normed(x, eps, E)
        x = (x * weight[None, :]).to(key.dtype)
        scores = tl.dot(key, tl.trans(x), input_precision="ieee") * (_LOG2E * E**-0.5)
        p = tl.exp2(scores - log[None, :])
        dvalue = tl.dot(p.to(dy.dtype), dy, dvalue, input_precision="ieee")
        dp = tl.dot(value, tl.trans(dy), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(x.dtype)
        dkey = tl.dot(ds, x, dkey, input_precision="ieee")
    size = tl.num_programs(2).to(tl.int64) * heads * rows * FULL
    sums += split * 2 * size + at
    tl.store(sums, dkey * E**-0.5)
    tl.store(sums + size, dvalue)


@triton.jit(do_not_specialize=_SIZES)
def _cross_scatter_keys(
    k, sums, place, k_weight, dk, dv, partial, k_b, k_m, k_k, m, rows, heads, splits, eps,
    E: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = tl.arange(0, FULL)
    j = block * BLOCK + tl.arange(0, BLOCK)
    source, real = _places(place + b * m, j, m)
    ok = real[:, None] & (c < E)[None, :]
    size = tl.num_programs(2).to(tl.int64) * heads * rows * FULL
    sums += ((b * heads + head) * rows + source)[:, None] * FULL + c[None, :]
    dx = tl.zeros((BLOCK, FULL), tl.float32)
    dy = tl.zeros((BLOCK, FULL), tl.float32)
    for _ in range(splits):
        dx += tl.load(sums, mask=ok, other=0.0)
        dy += tl.load(sums + size, mask=ok, other=0.0)
        sums += 2 * size
    x = tl.load(k + b * k_b + j[:, None] * k_m + head * k_k + c[None, :], mask=ok, other=0.0)
    x, r = _normed(x, eps, E)
    program = (b * tl.num_programs(0) + block) * heads + head
    tl.store(partial + program * E + c[None, :], tl.sum(dx * x, 0, keep_dims=True), mask=(c < E)[None, :])
    weight = tl.load(k_weight + c, mask=c < E, other=0.0).to(tl.float32)[None, :]
    at = ((b * m + j[:, None]) * heads + head) * E + c[None, :]
    inside = (j < m)[:, None] & (c < E)[None, :]
    tl.store(dk + at, _normed_back(dx, x, r, weight, E).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, dy.to(dv.dtype.element_ty), mask=inside)
