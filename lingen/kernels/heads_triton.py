"""A block of a head's rows in Triton: loaded, RMS-normed and turned by the rotary embedding, and the way back.

A head is held as two halves, whose channels i and i + E // 2 the embedding turns together. Of an odd head the last
channel joins the first half, with an angle of 0."""

import triton
import triton.language as tl


@triton.jit
def whole(x, row, real, stride, E: tl.constexpr, FULL: tl.constexpr):
    c = tl.arange(0, FULL)
    return tl.load(x + row[:, None] * stride + c[None, :], mask=real[:, None] & (c < E)[None, :], other=0.0)


@triton.jit
def store_whole(x, y, row, real, stride, E: tl.constexpr, FULL: tl.constexpr):
    c = tl.arange(0, FULL)
    x += row[:, None] * stride + c[None, :]
    tl.store(x, y.to(x.dtype.element_ty), mask=real[:, None] & (c < E)[None, :])


@triton.jit
def _channels(E: tl.constexpr, HALF: tl.constexpr):
    """Lanes, their channels in the first half, which of those exist, and which have a partner in the second half."""
    c = tl.arange(0, HALF)
    first = c
    if E % 2 == 1:
        first = tl.where(c == E // 2, E - 1, c)
    return c, first, c < E - E // 2, c < E // 2


@triton.jit
def halves(x, row, real, stride, E: tl.constexpr, HALF: tl.constexpr):
    c, first, in_first, in_second = _channels(E, HALF)
    x += row[:, None] * stride
    a = tl.load(x + first[None, :], mask=real[:, None] & in_first[None, :], other=0.0)
    return a, tl.load(x + (c + E // 2)[None, :], mask=real[:, None] & in_second[None, :], other=0.0)


@triton.jit
def _vector(x, E: tl.constexpr, HALF: tl.constexpr):
    c, first, in_first, in_second = _channels(E, HALF)
    a = tl.load(x + first, mask=in_first, other=0.0)
    b = tl.load(x + c + E // 2, mask=in_second, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _angles(cos, sin, i, N: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr):
    pair = tl.arange(0, HALF)
    ok = (i < N)[:, None] & (pair < E // 2)[None, :]
    at = i[:, None] * (E // 2) + pair[None, :]
    c = tl.load(cos + at, mask=ok, other=1.0).to(tl.float32)
    return c, tl.load(sin + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _normed(a, b, eps, E: tl.constexpr):
    """Both halves of rows over their RMS, and one over that RMS."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / E + eps)[:, None]
    return a * r, b * r, r


@triton.jit
def turned(a, b, i, cos, sin, weight, eps, N: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr):
    """Both halves of the window's rows i, normed and turned, in the dtype they came in; zeros at padding."""
    dtype: tl.constexpr = a.dtype
    a, b, _ = _normed(a, b, eps, E)
    weight_a, weight_b = _vector(weight, E, HALF)
    c, s = _angles(cos, sin, i, N, E, HALF)
    a *= weight_a[None, :]
    b *= weight_b[None, :]
    return (a * c - b * s).to(dtype), (a * s + b * c).to(dtype)


@triton.jit
def turned_back(
    da, db, x, dx, dweight, row, real, stride, dstride, i, cos, sin, weight, eps,
    N: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the rows that `turned` took, and the block's part of the gain's."""
    a, b = halves(x, row, real, stride, E, HALF)
    a, b, r = _normed(a, b, eps, E)
    c, s = _angles(cos, sin, i, N, E, HALF)
    da, db = da * c + db * s, db * c - da * s
    channel, first, in_first, in_second = _channels(E, HALF)
    # keep_dims: for a sum that is a vector, Triton would first convert whole products to another layout.
    tl.store(dweight + first[None, :], tl.sum(da * a, 0, keep_dims=True), mask=in_first[None, :])
    tl.store(dweight + (channel + E // 2)[None, :], tl.sum(db * b, 0, keep_dims=True), mask=in_second[None, :])
    weight_a, weight_b = _vector(weight, E, HALF)
    da *= weight_a[None, :]
    db *= weight_b[None, :]
    along = (tl.sum(da * a, 1) + tl.sum(db * b, 1)) / E
    da = (da - a * along[:, None]) * r
    db = (db - b * along[:, None]) * r
    dx += row[:, None] * dstride
    dtype = dx.dtype.element_ty
    tl.store(dx + first[None, :], da.to(dtype), mask=real[:, None] & in_first[None, :])
    tl.store(dx + (channel + E // 2)[None, :], db.to(dtype), mask=real[:, None] & in_second[None, :])
