"""Window attention in Triton: each program reads one head of one window from the grid and writes it back there.

A window's tokens are found by a list of their rows in the clip, so that padding, shift and windows that stick out of
the grid are nothing but a mask, and no layer recompiles.

The backward pass recomputes everything from q, k and v. A token lies in one window, so its gradient has one writer;
the gains' gradients are one partial sum for each program, added up in a fixed order: the same input, the same bits.
Windows of one block (128 tokens of a head of 128 in bfloat16) are read once in either direction. Larger ones go block
by block with a running softmax; their backward pass is two kernels, first by queries, then by keys. The names of the
kernels' arguments stand in `heads_triton`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lingen.kernels.fp8_triton import as_rows
from lingen.kernels.heads_triton import halves, store_whole, turned, turned_back, whole

_LOG2E = tl.constexpr(1.4426950408889634)
# Numbers that change from grid to grid: no reason to compile again.
_SIZES = ["tokens", "windows", "heads"]

# Tokens of a block at most, by the bytes of a number, and bytes of its rows in one head at most: the most that an H100
# holds in registers. Float32 has no tensor cores here and would unroll into too much code.
BLOCK = {2: 128, 4: 32}
BLOCK_BYTES = 32 * 1024
# Numbers in a block from which on it takes eight warps instead of four.
EIGHT_WARPS = 128 * 128
# Registers of a thread that let two programs of eight warps share a processor: one loads while the other computes.
REGISTERS = 128


def forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, num_heads: int, eps: float,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What the heads give, [b t h w d] in qkv's dtype; written into `out` where it is given (last axis contiguous)."""
    out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3) if out is None else out
    grid, sizes, launch = _launch(qkv, q_weight, rows, num_heads, halved=False)
    if grid[1] == 1 and launch["num_warps"] == 8:
        launch["maxnreg"] = REGISTERS
    x, y = as_rows(qkv), out.view(-1, out.shape[-1])
    _window_forward[grid](x, y, rows, cos, sin, q_weight, k_weight, x.stride(0), y.stride(0), *sizes, eps, **launch)
    return out


def backward(
    grad: Tensor,
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, num_heads: int, eps: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv (written into `out` where it is given) and of the gains, from that of what the heads give."""
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format) if out is None else out
    grid, sizes, launch = _launch(qkv, q_weight, rows, num_heads, halved=True)
    programs, blocks = grid
    partial = q_weight.new_empty(programs * blocks, 2, q_weight.shape[0], dtype=torch.float32)
    x, dx, dy = as_rows(qkv), out.view(-1, out.shape[-1]), as_rows(grad)
    strides = x.stride(0), dx.stride(0), dy.stride(0)
    given = x, dx, dy, rows, cos, sin, q_weight, k_weight, partial
    if blocks == 1:
        _window_backward[grid](*given, *strides, *sizes, eps, **launch)
    else:
        softmax = torch.empty(programs, 2, rows.shape[1], dtype=torch.float32, device=qkv.device)
        for kernel in (_window_backward_queries, _window_backward_keys):
            kernel[grid](*given, softmax, *strides, *sizes, eps, **launch)
    q_grad, k_grad = partial.sum(0)
    return out, q_grad.to(q_weight.dtype), k_grad.to(k_weight.dtype)


def _launch(
    qkv: Tensor, q_weight: Tensor, rows: Tensor, num_heads: int, *, halved: bool
) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, int]]:
    """Programs (heads of windows, blocks of a window), run-time sizes, compile-time sizes. `halved`: blocks have half
    as many tokens where a window has several: the sums of one are held while others are read."""
    (windows, n), width, size = rows.shape, q_weight.shape[0], qkv.element_size()
    full = max(16, triton.next_power_of_2(width))
    half = max(16, triton.next_power_of_2(width - width // 2))
    block = max(16, min(BLOCK[size], BLOCK_BYTES // (full * size), triton.next_power_of_2(n)))
    block = max(16, block // 2) if halved and n > block else block
    warps = 8 if block * max(block, full) >= EIGHT_WARPS else 4
    grid = qkv.shape[0] * windows * num_heads, triton.cdiv(n, block)
    launch = {"N": n, "E": width, "TILE": block, "HALF": half, "FULL": full, "num_warps": warps, "num_stages": 1}
    return grid, (qkv.shape[1:-1].numel(), windows, num_heads), launch


@triton.jit
def _start(qkv, rows, tokens, windows, heads, N: tl.constexpr, E: tl.constexpr):
    """This program's head, its q, k and v in the first token of all, the first row of its clip, its window's rows."""
    window, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    q = qkv + head * E
    k, v = q + heads * E, q + 2 * heads * E
    return head, q, k, v, (window // windows).to(tl.int64) * tokens, rows + (window % windows) * N


@triton.jit
def _places(rows, i, first_row, N: tl.constexpr):
    """Rows of the window's tokens i, and which of them are no padding."""
    row = tl.load(rows + i, mask=i < N, other=-1)
    return first_row + row.to(tl.int64), row >= 0


@triton.jit
def _block_of(
    x, y, rows, i, first_row, cos, sin, weight, stride, y_stride, eps,
    N: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Of the window's tokens i: x, normed and turned, in halves; y as it is; their rows, and which are no padding."""
    row, real = _places(rows, i, first_row, N)
    a, b = halves(x, row, real, stride, E, HALF)
    whole_rows = whole(y, row, real, y_stride, E, FULL)
    a, b = turned(a, b, i, cos, sin, weight, eps, N, E, HALF)
    return a, b, whole_rows, row, real


@triton.jit
def _product(a, b, c, d):
    """a c + b d: the product of two rows of halves."""
    return tl.dot(b, d, tl.dot(a, c, input_precision="ieee"), input_precision="ieee")


@triton.jit(do_not_specialize=_SIZES)
def _window_forward(
    qkv, out, rows, cos, sin, q_weight, k_weight, stride, out_stride, tokens, windows, heads, eps,
    N: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    head, q, k, v, first_row, rows = _start(qkv, rows, tokens, windows, heads, N, E)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    row, real = _places(rows, i, first_row, N)
    qa, qb = halves(q, row, real, stride, E, HALF)
    qa, qb = turned(qa, qb, i, cos, sin, q_weight, eps, N, E, HALF)
    scale = _LOG2E * E**-0.5
    # Finite, as a whole block of keys may be padding.
    top = tl.full((TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    y = tl.zeros((TILE, FULL), tl.float32)
    for start in range(0, N, TILE):
        j = start + tl.arange(0, TILE)
        ka, kb, values, _, seen = _block_of(
            k, v, rows, j, first_row, cos, sin, k_weight, stride, stride, eps, N, E, HALF, FULL
        )  # fmt: skip
        scores = _product(qa, qb, tl.trans(ka), tl.trans(kb)) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        y = tl.dot(p.to(values.dtype), values, y * shrink[:, None], input_precision="ieee")
        top = new_top
    store_whole(out + head * E, y / total[:, None], row, real, out_stride, E, FULL)


@triton.jit(do_not_specialize=_SIZES)
def _window_backward(
    qkv, dqkv, dout, rows, cos, sin, q_weight, k_weight, partial, stride, dstride, dout_stride,
    tokens, windows, heads, eps,
    N: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Windows of one block."""
    head, q, k, v, first_row, rows = _start(qkv, rows, tokens, windows, heads, N, E)
    dq = dqkv + head * E
    dk, dv = dq + heads * E, dq + 2 * heads * E
    partial += tl.program_id(0).to(tl.int64) * 2 * E
    i = tl.arange(0, TILE)
    row, real = _places(rows, i, first_row, N)
    scale = E**-0.5
    # All loads first: they wait together.
    qa, qb = halves(q, row, real, stride, E, HALF)
    ka, kb = halves(k, row, real, stride, E, HALF)
    values = whole(v, row, real, stride, E, FULL)
    dy = whole(dout + head * E, row, real, dout_stride, E, FULL)
    qa, qb = turned(qa, qb, i, cos, sin, q_weight, eps, N, E, HALF)
    ka, kb = turned(ka, kb, i, cos, sin, k_weight, eps, N, E, HALF)
    scores = _product(qa, qb, tl.trans(ka), tl.trans(kb)) * (scale * _LOG2E)
    scores = tl.where(real[None, :], scores, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    dvalues = tl.dot(tl.trans(p.to(dy.dtype)), dy, input_precision="ieee")
    store_whole(dv, dvalues, row, real, dstride, E, FULL)
    dp = tl.dot(dy, tl.trans(values), input_precision="ieee")
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(qa.dtype)
    da, db = tl.dot(ds, ka, input_precision="ieee"), tl.dot(ds, kb, input_precision="ieee")
    turned_back(da, db, q, dq, partial, row, real, stride, dstride, i, cos, sin, q_weight, eps, N, E, HALF)
    ds = tl.trans(ds)
    da, db = tl.dot(ds, qa, input_precision="ieee"), tl.dot(ds, qb, input_precision="ieee")
    turned_back(
        da, db, k, dk, partial + E, row, real, stride, dstride, i, cos, sin, k_weight, eps, N, E, HALF
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _window_backward_queries(
    qkv, dqkv, dout, rows, cos, sin, q_weight, k_weight, partial, softmax, stride, dstride, dout_stride,
    tokens, windows, heads, eps,
    N: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """A block of queries against all keys, twice: for the softmax and its pull, which are kept, then for dq."""
    head, q, k, v, first_row, rows = _start(qkv, rows, tokens, windows, heads, N, E)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    row, real = _places(rows, i, first_row, N)
    qa, qb = halves(q, row, real, stride, E, HALF)
    qa, qb = turned(qa, qb, i, cos, sin, q_weight, eps, N, E, HALF)
    dy = whole(dout + head * E, row, real, dout_stride, E, FULL)
    scale = E**-0.5
    top = tl.full((TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    pull = tl.zeros((TILE,), tl.float32)
    for start in range(0, N, TILE):
        j = start + tl.arange(0, TILE)
        ka, kb, values, _, seen = _block_of(
            k, v, rows, j, first_row, cos, sin, k_weight, stride, stride, eps, N, E, HALF, FULL
        )  # fmt: skip
        scores = _product(qa, qb, tl.trans(ka), tl.trans(kb)) * (scale * _LOG2E)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        dp = tl.dot(dy, tl.trans(values), input_precision="ieee")
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        pull = pull * shrink + tl.sum(p * dp, 1)
        top = new_top
    top += tl.log2(total)
    pull = pull / total
    softmax += tl.program_id(0).to(tl.int64) * 2 * N + i
    tl.store(softmax, top, mask=i < N)
    tl.store(softmax + N, pull, mask=i < N)
    da = tl.zeros((TILE, HALF), tl.float32)
    db = tl.zeros((TILE, HALF), tl.float32)
    for start in range(0, N, TILE):
        j = start + tl.arange(0, TILE)
        ka, kb, values, _, seen = _block_of(
            k, v, rows, j, first_row, cos, sin, k_weight, stride, stride, eps, N, E, HALF, FULL
        )  # fmt: skip
        scores = _product(qa, qb, tl.trans(ka), tl.trans(kb)) * (scale * _LOG2E)
        p = tl.where(seen[None, :], tl.exp2(scores - top[:, None]), 0.0)
        dp = tl.dot(dy, tl.trans(values), input_precision="ieee")
        ds = (p * (dp - pull[:, None]) * scale).to(ka.dtype)
        da = tl.dot(ds, ka, da, input_precision="ieee")
        db = tl.dot(ds, kb, db, input_precision="ieee")
    partial += (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * 2 * E
    turned_back(
        da, db, q, dqkv + head * E, partial, row, real, stride, dstride, i, cos, sin, q_weight, eps, N, E, HALF
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _window_backward_keys(
    qkv, dqkv, dout, rows, cos, sin, q_weight, k_weight, partial, softmax, stride, dstride, dout_stride,
    tokens, windows, heads, eps,
    N: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """A block of keys against all queries; scores are held as [keys, queries]."""
    head, q, k, v, first_row, rows = _start(qkv, rows, tokens, windows, heads, N, E)
    dk, dv = dqkv + (heads + head) * E, dqkv + (2 * heads + head) * E
    softmax += tl.program_id(0).to(tl.int64) * 2 * N
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    ka, kb, values, row, real = _block_of(
        k, v, rows, j, first_row, cos, sin, k_weight, stride, stride, eps, N, E, HALF, FULL
    )  # fmt: skip
    scale = E**-0.5
    da = tl.zeros((TILE, HALF), tl.float32)
    db = tl.zeros((TILE, HALF), tl.float32)
    dvalues = tl.zeros((TILE, FULL), tl.float32)
    for start in range(0, N, TILE):
        i = start + tl.arange(0, TILE)
        qa, qb, dy, _, _ = _block_of(
            q, dout + head * E, rows, i, first_row, cos, sin, q_weight, stride, dout_stride, eps, N, E, HALF, FULL
        )  # fmt: skip
        top = tl.load(softmax + i, mask=i < N, other=0.0)
        pull = tl.load(softmax + N + i, mask=i < N, other=0.0)
        scores = _product(ka, kb, tl.trans(qa), tl.trans(qb)) * (scale * _LOG2E)
        p = tl.where(real[:, None], tl.exp2(scores - top[None, :]), 0.0)
        dvalues = tl.dot(p.to(dy.dtype), dy, dvalues, input_precision="ieee")
        dp = tl.dot(values, tl.trans(dy), input_precision="ieee")
        ds = (p * (dp - pull[None, :]) * scale).to(qa.dtype)
        da = tl.dot(ds, qa, da, input_precision="ieee")
        db = tl.dot(ds, qb, db, input_precision="ieee")
    store_whole(dv, dvalues, row, real, dstride, E, FULL)
    partial += (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * 2 * E
    turned_back(
        da, db, k, dk, partial + E, row, real, stride, dstride, j, cos, sin, k_weight, eps, N, E, HALF
    )  # fmt: skip
