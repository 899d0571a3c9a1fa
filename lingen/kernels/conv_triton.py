"""Triton twin of `lingen.kernels.conv`: forward and backward as plain functions.

A program walks down a run of consecutive positions with a block of channels and keeps the last m rows in registers, in
a tuple: each row is read once, and in the backward pass the gradient of the pre-activation, whose exponential costs
more than its bytes, is recomputed once and not for each of the m rows that it goes to."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lingen.kernels.gradients import channels_last

# POSITIONS and CHANNELS of a program, and the rows that it loads AHEAD of its arithmetic (a divisor of POSITIONS).
LAUNCH = {
    "forward": {"POSITIONS": 64, "CHANNELS": 256, "AHEAD": 8, "num_warps": 2},
    "backward": {"POSITIONS": 256, "CHANNELS": 256, "AHEAD": 4, "num_warps": 2},
}
_FEW = 2048  # programs of the backward pass that leave a GPU half empty: each then takes a quarter of the positions


def conv_silu_forward(
    u: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None, before: int, segment: int, rows: int
) -> Tensor:
    """y [b rows c] of `conv_silu`, whose arguments these are; `u` may be a view with a contiguous last axis."""
    assert u.stride(-1) == 1 or u.shape[-1] == 1
    b, n, c = u.shape
    y = u.new_empty(b, rows, c)
    launch = LAUNCH["forward"]
    grid = (triton.cdiv(rows, launch["POSITIONS"]) * triton.cdiv(c, launch["CHANNELS"]), b)
    _conv_forward[grid](
        u, weight.contiguous(), bias, index, y, n, rows, c, before, u.stride(0), u.stride(1),
        TAPS=weight.shape[1], INDEXED=index is not None, SEGMENT=segment, **launch,
    )  # fmt: skip
    return y


def conv_silu_backward(
    grad: Tensor, u: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None, *, before: int, segment: int = 0,
    out: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `conv_silu` from grad [b rows c]: (dweight [c m], dbias [c]), float32, added in a fixed order. The
    gradient of `u` is written into `out` [b n c], which may be a slice of a wider buffer; it must not overlap `u`.
    `grad` and `u` may be views with a contiguous last axis; what grad holds behind n is ignored."""
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (grad, u, out))
    (b, n, c), taps = u.shape, weight.shape[1]
    launch = dict(LAUNCH["backward"])
    if b * n * c < _FEW * launch["POSITIONS"] * launch["CHANNELS"]:
        launch["POSITIONS"] = launch["AHEAD"] * max(1, launch["POSITIONS"] // (4 * launch["AHEAD"]))
    runs = triton.cdiv(n + before, launch["POSITIONS"])
    partial = torch.empty(b, runs, taps + 1, c, dtype=torch.float32, device=u.device)
    _conv_backward[(runs * triton.cdiv(c, launch["CHANNELS"]), b)](
        grad, u, weight.contiguous(), bias, index, out, partial, n, runs, c, before,
        grad.stride(0), grad.stride(1), u.stride(0), u.stride(1), out.stride(0), out.stride(1),
        TAPS=taps, INDEXED=index is not None, SEGMENT=segment, **launch,
    )  # fmt: skip
    total = partial.sum((0, 1))
    return total[:taps].T.contiguous(), total[taps]


def conv_silu_gradients(
    grad: Tensor, u: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None, before: int, segment: int, rows: int
) -> tuple[Tensor, ...]:
    """Gradients of u, weight and bias, in their dtypes; the pre-activation is computed again."""
    du = u.new_empty(u.shape)
    found = conv_silu_backward(channels_last(grad), u, weight, bias, index, before=before, segment=segment, out=du)
    return du, found[0].to(weight.dtype), found[1].to(bias.dtype)


@triton.jit
def _conv_forward(
    u, weight, bias, index, y, n, rows, c, before, u_batch, u_row,
    TAPS: tl.constexpr, INDEXED: tl.constexpr, SEGMENT: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    # Channels first: programs that run together read whole rows.
    blocks = tl.cdiv(c, CHANNELS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    batch = tl.program_id(1).to(tl.int64)
    inside = channel < c
    u += batch * u_batch
    y += batch * rows * c
    taps, shift = _parameters(weight, bias, channel, inside, TAPS)

    # Position p reads rows p - before .. p - before + m - 1. A window is as long as the taps; its oldest row is about
    # to be dropped.
    first = tl.program_id(0) // blocks * POSITIONS
    inputs = (shift,)
    for i in tl.static_range(TAPS - 1):
        inputs += (_row(u, index, first - before + i, n, u_row, channel, inside, INDEXED),)
    for step in range(0, POSITIONS, AHEAD):
        fresh = ()
        for i in tl.static_range(AHEAD):  # all loads before the first store: none is moved across it
            ahead = first + step + i - before + TAPS - 1
            fresh += (_row(u, index, ahead, n, u_row, channel, inside, INDEXED),)
        for i in tl.static_range(AHEAD):
            inputs = inputs[1:] + (fresh[i],)
            position = first + step + i
            pre = _conv(_near(inputs, position, before, TAPS, SEGMENT), taps, shift, TAPS)
            result = tl.where(position < n, pre * tl.sigmoid(pre), 0.0).to(y.dtype.element_ty)
            tl.store(y + position.to(tl.int64) * c + channel, result, mask=inside & (position < rows))


@triton.jit
def _conv_backward(
    grad, u, weight, bias, index, du, partial, n, runs, c, before,
    grad_batch, grad_row, u_batch, u_row, du_batch, du_row,
    TAPS: tl.constexpr, INDEXED: tl.constexpr, SEGMENT: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(c, CHANNELS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    run = tl.program_id(0) // blocks
    batch = tl.program_id(1).to(tl.int64)
    inside = channel < c
    u += batch * u_batch
    grad += batch * grad_batch
    du += batch * du_batch
    taps, shift = _parameters(weight, bias, channel, inside, TAPS)
    zero = tl.zeros((CHANNELS,), tl.float32)
    dbias, dtaps = zero, ()
    for _ in tl.static_range(TAPS):
        dtaps += (zero,)

    # As in the forward pass, but first come those positions of the run before that share a row with this run.
    first = run * POSITIONS
    early = first - (TAPS - 1)
    inputs, slopes = (zero,), (zero,)
    for i in tl.static_range(TAPS - 1):
        inputs += (_row(u, index, early - before + i, n, u_row, channel, inside, INDEXED),)
    for i in tl.static_range(TAPS - 1):
        inputs = inputs[1:] + (_row(u, index, early + i - before + TAPS - 1, n, u_row, channel, inside, INDEXED),)
        row = _row(grad, index, early + i, n, grad_row, channel, inside, False)
        near = _near(inputs, early + i, before, TAPS, SEGMENT)
        slopes += (_slope(row, near, taps, shift, TAPS),)

    for step in range(0, POSITIONS, AHEAD):
        fresh, grads, rows = (), (), ()
        for i in tl.static_range(AHEAD):
            done = first + step + i - before
            fresh += (_row(u, index, done + TAPS - 1, n, u_row, channel, inside, INDEXED),)
            grads += (_row(grad, index, done + before, n, grad_row, channel, inside, False),)
            rows += (_place(index, done, n, INDEXED),)
        for i in tl.static_range(AHEAD):
            inputs = inputs[1:] + (fresh[i],)
            done = first + step + i - before
            near = _near(inputs, done + before, before, TAPS, SEGMENT)
            slope = _slope(grads[i], near, taps, shift, TAPS)
            slopes = slopes[1:] + (slope,)
            heard = _near(slopes, done, TAPS - 1 - before, TAPS, SEGMENT)  # by which positions row `done` was
            result = zero
            sums = ()
            for tap in tl.static_range(TAPS):
                sums += (dtaps[tap] + slope * near[tap],)
                result += taps[tap] * heard[TAPS - 1 - tap]
            dtaps = sums
            dbias += slope
            real = inside & (done >= 0) & (done < n)
            tl.store(du + rows[i] * du_row + channel, result.to(du.dtype.element_ty), mask=real)

    partial += (batch * runs + run) * (TAPS + 1) * c + channel
    for tap in tl.static_range(TAPS):
        tl.store(partial + tap * c, dtaps[tap], mask=inside)
    tl.store(partial + TAPS * c, dbias, mask=inside)


@triton.jit
def _parameters(weight, bias, channel, inside, TAPS: tl.constexpr):
    """The taps, a tuple of rows of channels, and the bias."""
    taps = ()
    for tap in tl.static_range(TAPS):
        taps += (tl.load(weight + channel * TAPS + tap, mask=inside, other=0).to(tl.float32),)
    return taps, tl.load(bias + channel, mask=inside, other=0).to(tl.float32)


@triton.jit
def _place(index, position, n, INDEXED: tl.constexpr):
    """Row of a position, 0 for one outside of the sequence."""
    real = (position >= 0) & (position < n)
    return (tl.load(index + position, mask=real, other=0) if INDEXED else position).to(tl.int64)


@triton.jit
def _row(x, index, position, n, stride, channel, inside, INDEXED: tl.constexpr):
    """The channels of a position in float32, zero outside of the sequence."""
    real = inside & (position >= 0) & (position < n)
    return tl.load(x + _place(index, position, n, INDEXED) * stride + channel, mask=real, other=0).to(tl.float32)


@triton.jit
def _near(rows, position, before, TAPS: tl.constexpr, SEGMENT: tl.constexpr):
    """The rows from position - before on, zero where they lie beyond an end of the segment of `position`."""
    near = rows
    if SEGMENT > 0:
        first = position % SEGMENT - before  # place in the segment of the first of them
        near = ()
        for i in tl.static_range(TAPS):
            near += (tl.where((first + i >= 0) & (first + i < SEGMENT), rows[i], 0.0),)
    return near


@triton.jit
def _conv(inputs, taps, shift, TAPS: tl.constexpr):
    pre = shift
    for tap in tl.static_range(TAPS):
        pre += inputs[tap] * taps[tap]
    return pre


@triton.jit
def _slope(grad, inputs, taps, shift, TAPS: tl.constexpr):
    """Gradient of the pre-activation."""
    pre = _conv(inputs, taps, shift, TAPS)
    gate = tl.sigmoid(pre)
    return grad * gate * (1 + pre * (1 - gate))
