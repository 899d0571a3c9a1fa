"""The scan of Mamba2 in both directions at once, in Triton: four kernels that serve the forward and the backward pass.

A sequence is cut into chunks of `chunk` tokens. With the cumulative log decays inside a chunk, f_i = sum of dt a over
its tokens up to i (forward direction) and g_i = the same from i on (backward direction), both directions together are

    y_i = sum_j (c_i b_j) w_ij x_j,   w_ij = exp(f_i - f_j) dt_j (j <= i)  +  exp(g_i - g_j) dt'_j (j >= i)

inside a chunk, plus what the states carry in from either side (arXiv 2405.21060, section 6; both triangles in one
product as in Hydra, arXiv 2407.09941). The gradient with respect to x is the same sum with w transposed, so `_scan_mix`
computes both. Blocks off the diagonal take their decay as a factor of the row times one of the column, both at most 1;
only the blocks on the diagonal pay an exponential for each pair. Decays are kept as base-2 logarithms in float32.

Padding up to whole chunks holds zeros in x, b, c and dt: no kernel masks the sequence."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)

# Tuned on an H100 at heads of 64 and a state of 128.
LAUNCH = {
    "sums": {"num_warps": 8}, "states": {"num_warps": 4, "num_stages": 3}, "carry": {"num_warps": 2},
    "mix": {"num_stages": 2},
}  # fmt: skip
# Parts that the heads of a group are shared out to, so that there are programs enough to fill a GPU.
SPLIT = 8


@triton.jit
def _scan_sums(
    dt, a, bias, index, steps, logs, columns, n, rows, heads, stride_b, stride_n,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, INDEXED: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """softplus of the raw steps, their cumulative log2 decays in a chunk, and `columns`, logs less log2 of the step."""
    chunk, block, way = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    chunks = rows // CHUNK
    batch, chunk = chunk // chunks, chunk % chunks
    head = block * HEADS + tl.arange(0, HEADS)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    row = tl.load(index + place, mask=place < n, other=0) if INDEXED else place
    ok = (place < n)[:, None] & (head < heads)[None, :]
    at = batch.to(tl.int64) * stride_b + row.to(tl.int64)[:, None] * stride_n + head[None, :]
    raw = tl.load(dt + at, mask=ok, other=0.0).to(tl.float32)
    raw += tl.load(bias + way * heads + head, mask=head < heads, other=0.0)[None, :]
    small = tl.exp(-tl.abs(raw))
    one = 1.0 + small
    # log1p by Kahan's correction: a step of 1e-5 has no digits left in 1 + 1e-5.
    log1p = tl.where(one == 1.0, small, tl.log(one) * (small / tl.where(one == 1.0, 1.0, one - 1.0)))
    step = tl.where(ok, tl.maximum(raw, 0.0) + log1p, 0.0)
    log = step * (tl.load(a + way * heads + head, mask=head < heads, other=0.0) * _LOG2E)[None, :]
    prefix = tl.cumsum(log, 0)
    if REVERSED and way == 1:
        prefix = tl.sum(log, 0)[None, :] - prefix + log
    out = ((batch * tl.num_programs(2) + way) * heads + head[None, :]).to(tl.int64) * rows + place[:, None]
    ok = (head < heads)[None, :]
    tl.store(steps + out, step, mask=ok)
    tl.store(logs + out, prefix, mask=ok)
    # The floor keeps padding finite.
    tl.store(columns + out, prefix - tl.log2(tl.maximum(step, 1e-37)), mask=ok)


@triton.jit
def _scan_states(
    v, k, logs, columns, out, rows, heads, per_group, v_row, k_row,
    CHUNK: tl.constexpr, E: tl.constexpr, S: tl.constexpr, E_PADDED: tl.constexpr, S_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, DIRECTIONS: tl.constexpr, REVERSED: tl.constexpr, ADJOINT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the state [s e] of each direction: the sum of k^T (weight v)."""
    head, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    chunks = rows // CHUNK
    e, s = tl.arange(0, E_PADDED), tl.arange(0, S_PADDED)
    first = (batch * DIRECTIONS * heads + head).to(tl.int64) * rows + chunk * CHUNK
    second = first + heads * rows
    start = batch.to(tl.int64) * rows + chunk * CHUNK
    v += start * v_row + head * E
    k += start * k_row + (head // per_group) * S
    if not ADJOINT:
        end_f = tl.load(logs + first + CHUNK - 1)
        end_g = tl.load(logs + second + (0 if REVERSED else CHUNK - 1)) if DIRECTIONS == 2 else 0.0
    sum_f = tl.zeros((S_PADDED, E_PADDED), tl.float32)
    sum_g = tl.zeros((S_PADDED, E_PADDED), tl.float32)
    for begin in range(0, CHUNK, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        values = tl.load(v + j[:, None].to(tl.int64) * v_row + e[None, :], mask=(e < E)[None, :], other=0.0)
        keys = tl.load(k + j[:, None].to(tl.int64) * k_row + s[None, :], mask=(s < S)[None, :], other=0.0)
        keys = tl.trans(keys)
        weight = tl.exp2(tl.load(logs + first + j) if ADJOINT else end_f - tl.load(columns + first + j))
        weighted = values * weight.to(values.dtype)[:, None]
        sum_f = tl.dot(keys, weighted, sum_f, input_precision=PRECISION)
        if DIRECTIONS == 2:
            weight = tl.exp2(tl.load(logs + second + j) if ADJOINT else end_g - tl.load(columns + second + j))
            weighted = values * weight.to(values.dtype)[:, None]
            sum_g = tl.dot(keys, weighted, sum_g, input_precision=PRECISION)
    at = s[:, None] * E + e[None, :]
    ok = (s < S)[:, None] & (e < E)[None, :]
    base = ((batch * chunks + chunk) * DIRECTIONS * heads + head).to(tl.int64) * (S * E)
    tl.store(out + base + at, sum_f.to(out.dtype.element_ty), mask=ok)
    if DIRECTIONS == 2:
        tl.store(out + base + heads * (S * E) + at, sum_g.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _scan_carry(
    states, logs, begin, end, other, products, chunks, heads, size,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, DIRECTIONS: tl.constexpr, REVERSED: tl.constexpr, ADJOINT: tl.constexpr,
    HAS_BEGIN: tl.constexpr,
):  # fmt: skip
    """Passes the states from chunk to chunk, in place: what a chunk adds becomes what it starts from. The adjoint goes
    the other way. Its decayed state behind a chunk, times the forward pass's state before that chunk (`other`), is the
    gradient of the chunk's whole log decay through all that passes the whole chunk."""
    block, head, way = tl.program_id(0), tl.program_id(1), tl.program_id(2) % DIRECTIONS
    batch = tl.program_id(2) // DIRECTIONS
    offset = block * BLOCK + tl.arange(0, BLOCK)
    ok = offset < size
    line = ((batch * DIRECTIONS + way) * heads + head).to(tl.int64)
    state = tl.load(begin + line * size + offset, mask=ok, other=0.0) if HAS_BEGIN else tl.zeros((BLOCK,), tl.float32)
    descending = (REVERSED and way == 1) != ADJOINT
    last = tl.where(descending, 0, chunks - 1)
    stride = DIRECTIONS * heads * size
    chunk = tl.where(descending, chunks - 1, 0)
    at = ((batch * chunks + chunk).to(tl.int64) * DIRECTIONS * heads + way * heads + head) * size + offset
    step = tl.where(descending, -stride, stride)
    total = logs + line * chunks * CHUNK + tl.where(REVERSED and way == 1, 0, CHUNK - 1)
    added = tl.load(states + at, mask=ok, other=0.0).to(tl.float32)
    for _ in range(chunks):
        # The next chunk's states are on their way before this one's are written.
        fetched = tl.load(states + at + step, mask=ok & (chunk != last), other=0.0).to(tl.float32)
        tl.store(states + at, state.to(states.dtype.element_ty), mask=ok)
        passed = state * tl.exp2(tl.load(total + chunk * CHUNK))
        if ADJOINT:
            entered = tl.load(other + at, mask=ok, other=0.0).to(tl.float32)
            place = ((line * chunks) + chunk) * tl.num_programs(0) + block
            tl.store(products + place, tl.sum(entered * passed))
        state = passed + added
        added = fetched
        at += step
        chunk += tl.where(descending, -1, 1)
    tl.store(end + line * size + offset, state, mask=ok)


@triton.jit
def _side(
    v, keys, weights, logs, columns, state, line, i, far, e, e_ok, v_row,
    EDGE: tl.constexpr, ENTER: tl.constexpr, CROSSES: tl.constexpr, ADJOINT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One direction's share of half a chunk: what its state and, where it CROSSES the border, the other half bring.
    Also the logs whose sum, row + column, is the log of a pair's weight."""
    row = -tl.load(columns + line + i) if ADJOINT else tl.load(logs + line + i)
    column = tl.load(logs + line + i) if ADJOINT else -tl.load(columns + line + i)
    part = tl.dot(keys, state, input_precision=PRECISION)
    enter = tl.load(logs + line + ENTER) if ADJOINT else 0.0
    if CROSSES:
        edge = tl.load(logs + line + EDGE)
        edge = -edge if ADJOINT else edge
        scale = tl.exp2(edge + tl.load(logs + line + far) if ADJOINT else edge - tl.load(columns + line + far))
        values = tl.load(v + far.to(tl.int64)[:, None] * v_row + e[None, :], mask=e_ok[None, :], other=0.0)
        part = part * tl.exp2(edge + enter)
        part = tl.dot(weights, values * scale.to(values.dtype)[:, None], part, input_precision=PRECISION)
        part = part * tl.exp2(row - edge)[:, None]
    else:
        part = part * tl.exp2(row + enter)[:, None]
    return part, row, column


@triton.jit
def _half(
    v, k, pairs, steps, logs, columns, states, d, out, chunk, group, part, batch, rows, heads, per_group, share,
    v_row, k_row, out_row,
    E: tl.constexpr, S: tl.constexpr, E_PADDED: tl.constexpr, S_PADDED: tl.constexpr, HALF: tl.constexpr,
    SECOND: tl.constexpr, DIRECTIONS: tl.constexpr, ADJOINT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_scan_mix` for the first or the SECOND half of a chunk: what heads share is read once, then head after head."""
    CHUNK: tl.constexpr = 2 * HALF
    CROSSES: tl.constexpr = SECOND != ADJOINT
    e, s = tl.arange(0, E_PADDED), tl.arange(0, S_PADDED)
    near, other = (HALF if SECOND else 0), (0 if SECOND else HALF)
    i, far = near + tl.arange(0, HALF), other + tl.arange(0, HALF)
    start = batch.to(tl.int64) * rows + chunk * CHUNK
    v += start * v_row
    k += start * k_row + group * S
    pairs += (start * (heads // per_group) + group * CHUNK) * CHUNK
    e_ok = e < E
    keys = tl.load(k + i.to(tl.int64)[:, None] * k_row + s[None, :], mask=(s < S)[None, :], other=0.0)
    diagonal = tl.load(pairs + i[:, None] * CHUNK + i[None, :])
    across = tl.load(pairs + i[:, None] * CHUNK + far[None, :])
    itself = tl.load(pairs + i * CHUNK + i).to(tl.float32)
    in_first = i[:, None] <= i[None, :] if ADJOINT else i[:, None] >= i[None, :]
    state_ok = (s < S)[:, None] & e_ok[None, :]
    for number in range(part * share, tl.minimum(per_group, (part + 1) * share)):
        head = group * per_group + number
        first = (batch * DIRECTIONS * heads + head).to(tl.int64) * rows + chunk * CHUNK
        base = ((batch * (rows // CHUNK) + chunk) * DIRECTIONS * heads + head).to(tl.int64) * (S * E)
        at = base + s[:, None] * E + e[None, :]
        values = tl.load(v + head * E + i.to(tl.int64)[:, None] * v_row + e[None, :], mask=e_ok[None, :], other=0.0)
        state = tl.load(states + at, mask=state_ok, other=0.0)
        acc, row, column = _side(
            v + head * E, keys, across, logs, columns, state, first, i, far, e, e_ok, v_row,
            HALF - 1, CHUNK - 1, CROSSES, ADJOINT, PRECISION,
        )  # fmt: skip
        log = row[:, None] + column[None, :]
        own = tl.zeros((HALF,), tl.float32) + tl.load(d + head)
        if DIRECTIONS == 2:
            second = first + heads * rows
            state = tl.load(states + at + heads * (S * E), mask=state_ok, other=0.0)
            more, row, column = _side(
                v + head * E, keys, across, logs, columns, state, second, i, far, e, e_ok, v_row,
                HALF, 0, not CROSSES, ADJOINT, PRECISION,
            )  # fmt: skip
            acc += more
            log = tl.where(in_first, log, row[:, None] + column[None, :])
            # A token meets itself in both directions; the triangle of the first holds only one of them.
            own += itself * tl.load(steps + second + i)
        else:
            log = tl.where(in_first, log, float("-inf"))
        weights = diagonal * tl.exp2(log).to(diagonal.dtype)
        acc = tl.dot(weights, values, acc, input_precision=PRECISION)
        acc += values * own[:, None]
        place = out + (start + i)[:, None] * out_row + head * E + e[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=e_ok[None, :])


@triton.jit
def _scan_mix(
    v, k, pairs, steps, logs, columns, states, d, out, rows, heads, per_group, split, v_row, k_row, out_row,
    E: tl.constexpr, S: tl.constexpr, E_PADDED: tl.constexpr, S_PADDED: tl.constexpr, HALF: tl.constexpr,
    DIRECTIONS: tl.constexpr, ADJOINT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j pairs_ij w_ij v_j + k_i (states carried in from both sides) + d v_i, for half a chunk. Forward: v =
    x, k = c, pairs = c b^T, and w as above. Adjoint: v = dy, k = b, pairs = b c^T, w transposed, so that what came from
    before i comes from after it."""
    part, chunk, batch = tl.program_id(0), tl.program_id(1) // 2, tl.program_id(2)
    group, part = part // split, part % split
    share = tl.cdiv(per_group, split)
    if tl.program_id(1) % 2 == 0:
        _half(
            v, k, pairs, steps, logs, columns, states, d, out, chunk, group, part, batch, rows, heads, per_group, share,
            v_row, k_row, out_row, E, S, E_PADDED, S_PADDED, HALF, False, DIRECTIONS, ADJOINT, PRECISION,
        )  # fmt: skip
    else:
        _half(
            v, k, pairs, steps, logs, columns, states, d, out, chunk, group, part, batch, rows, heads, per_group, share,
            v_row, k_row, out_row, E, S, E_PADDED, S_PADDED, HALF, True, DIRECTIONS, ADJOINT, PRECISION,
        )  # fmt: skip


class ScanSizes(NamedTuple):
    """Sizes of a scan: `heads` of `width`, `groups` of b and c with `state` numbers each, `ways` directions; with
    `turns` the second one reads from the end."""

    heads: int
    width: int
    groups: int
    state: int
    ways: int
    turns: bool = True

    @property
    def parts(self) -> tuple[int, int, int]:
        """Channels of x, b and c in u."""
        return self.heads * self.width, self.groups * self.state, self.groups * self.state


class Scan:
    """One call of the scan: its streams, steps and sizes, from which all passes are launched.

    Args:
        u: x | b | c [b rows c] in scan order, zeros behind the last token.
        dt: raw steps [b n k] in raster order, of which position i of the scan reads row index[i].
        a, bias: of each direction [r k]."""

    def __init__(
        self, u: Tensor, dt: Tensor, a: Tensor, bias: Tensor, index: Tensor | None, sizes: ScanSizes, chunk: int
    ):
        self.u, self.sizes, self.chunk = u, sizes, chunk
        self.batch, self.rows, _ = u.shape
        self.chunks = self.rows // chunk
        # What `_scan_sums` writes, each [b r k rows], in scan order.
        self.steps = torch.empty(self.batch, len(a), sizes.heads, self.rows, device=dt.device, dtype=torch.float32)
        self.logs, self.columns = torch.empty_like(self.steps), torch.empty_like(self.steps)
        block = min(16, triton.next_power_of_2(sizes.heads))
        _scan_sums[self.batch * self.chunks, triton.cdiv(sizes.heads, block), len(a)](
            dt, a.contiguous(), bias.contiguous(), dt if index is None else index, self.steps, self.logs, self.columns,
            dt.shape[1], self.rows, sizes.heads, dt.stride(0), dt.stride(1),
            CHUNK=chunk, HEADS=block, INDEXED=index is not None, REVERSED=sizes.turns, **LAUNCH["sums"],
        )  # fmt: skip
        self.x, self.b, self.c = u.split(sizes.parts, -1)
        self.per_group = sizes.heads // sizes.groups
        self.shape = {
            "E": sizes.width,
            "S": sizes.state,
            "E_PADDED": max(16, triton.next_power_of_2(sizes.width)),
            "S_PADDED": max(16, triton.next_power_of_2(sizes.state)),
        }
        full = u.dtype == torch.float32
        self.common = {"DIRECTIONS": sizes.ways, "PRECISION": "ieee" if full else "tf32"}
        self.of_halves = self.common | {"HALF": chunk // 2, "num_warps": 8 if full else max(1, chunk // 32)}

    def fitting(self, launch: dict[str, int]) -> dict[str, int]:
        """`launch` with one stage where the states are larger: two do not fit into shared memory."""
        large = self.shape["E_PADDED"] * self.shape["S_PADDED"] > 8192
        return launch | {"num_stages": 1} if large else launch

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """left right^T inside each chunk: [b chunks g q q]."""
        left, right = (
            part.unflatten(-1, (self.sizes.groups, -1)).unflatten(1, (self.chunks, self.chunk)).transpose(2, 3)
            for part in (left, right)
        )
        return left @ right.mT

    def states(self, v: Tensor, k: Tensor, begin: Tensor | None, *, forward: Tensor | None = None):
        """States [b chunks r k s e] at the edge where each chunk is entered, and those that are left at the end. With
        `forward`, the states of the forward pass, it is the adjoint: also the products of both, [b r k chunks]."""
        sizes, adjoint = self.sizes, forward is not None
        states = v.new_empty(self.batch, self.chunks, sizes.ways, sizes.heads, sizes.state, sizes.width)
        _scan_states[sizes.heads, self.chunks, self.batch](
            v, k, self.logs, self.columns, states, self.rows, sizes.heads, self.per_group, v.stride(1), k.stride(1),
            CHUNK=self.chunk, BLOCK=min(64, self.chunk), REVERSED=sizes.turns, ADJOINT=adjoint,
            **self.shape, **self.common, **LAUNCH["states"],
        )  # fmt: skip
        size = sizes.state * sizes.width
        block = min(512, triton.next_power_of_2(size))
        blocks = triton.cdiv(size, block)
        end = torch.empty(states.shape[:1] + states.shape[2:], device=v.device, dtype=torch.float32)
        met = end.new_empty((self.batch, sizes.ways, sizes.heads, self.chunks, blocks) if adjoint else (1,))
        _scan_carry[blocks, sizes.heads, self.batch * sizes.ways](
            states, self.logs, end if begin is None else begin, end, states if forward is None else forward, met,
            self.chunks, sizes.heads, size,
            CHUNK=self.chunk, BLOCK=block, DIRECTIONS=sizes.ways, REVERSED=sizes.turns, ADJOINT=adjoint,
            HAS_BEGIN=begin is not None, **LAUNCH["carry"],
        )  # fmt: skip
        return states, end, met.sum(-1) if adjoint else None

    def mix(self, v: Tensor, k: Tensor, pairs: Tensor, states: Tensor, d: Tensor, out: Tensor, adjoint: bool) -> None:
        """`_scan_mix` over the whole sequence; d [k] is what a head adds of v itself."""
        split = min(self.per_group, SPLIT)
        _scan_mix[self.sizes.groups * split, 2 * self.chunks, self.batch](
            v, k, pairs, self.steps, self.logs, self.columns, states, d, out, self.rows, self.sizes.heads,
            self.per_group, split, v.stride(1), k.stride(1), out.stride(1),
            ADJOINT=adjoint, **self.shape, **self.of_halves, **self.fitting(LAUNCH["mix"]),
        )  # fmt: skip


def scan_forward(scan: Scan, d: Tensor, begin: Tensor | None) -> Tensor:
    """y [b rows k*e] in scan order; d [k] summed over directions, begin [b r k s e] float32."""
    y = torch.empty(scan.batch, scan.rows, scan.x.shape[-1], device=scan.u.device, dtype=scan.u.dtype)
    states, _, _ = scan.states(scan.x, scan.b, begin)
    scan.mix(scan.x, scan.c, scan.products(scan.c, scan.b), states, d, y, adjoint=False)
    return y


def end_states(
    u: Tensor, dt: Tensor, a: Tensor, bias: Tensor, index: Tensor | None, sizes: ScanSizes, chunk: int
) -> Tensor:
    """The states [b r k e s] that a scan leaves, float32; arguments as of `Scan`."""
    scan = Scan(u, dt, a, bias, index, sizes, chunk)
    return scan.states(scan.x, scan.b, None)[1].mT.contiguous()
