"""The backward pass of the scan in Triton: gradients of b, c and of the weights w; that of x is by `_scan_mix`. And the
scan, and its states alone, with a gradient. The formulas stand in `lingen.kernels.scan_triton`, the names of the
kernels' arguments in `lingen.kernels`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lingen.kernels.scan_triton import Scan, ScanSizes, scan_forward

# Tuned on an H100 at heads of 64 and a state of 128.
LAUNCH = {"pairs": {"num_stages": 2}, "inter": {"num_warps": 4, "num_stages": 2}}


@triton.jit
def _scan_pairs(
    x, dy, pairs, steps, logs, dpairs, by_row, by_column, own, rows, heads, per_group, x_row, dy_row, split,
    E: tl.constexpr, E_PADDED: tl.constexpr, HALF: tl.constexpr, SIDE: tl.constexpr, DIRECTIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of c b^T, summed over heads, and of the weights w, per head summed over rows and over columns. SIDE 0:
    the two blocks on the diagonal (`by_row` and `by_column` are added to); 1: the block of later rows and earlier
    columns; 2: the other one. The diagonal, which would cancel in the sums, is only in `own` = dy_i x_i."""
    CHUNK: tl.constexpr = 2 * HALF
    groups = heads // per_group
    chunk, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if SIDE == 0:
        half = chunk % 2
        chunk = chunk // 2
        row_half, column_half = half, half
    elif SIDE == 1:
        row_half, column_half = 1, 0
    else:
        row_half, column_half = 0, 1
    group, part = part // split, part % split
    i = row_half * HALF + tl.arange(0, HALF)
    j = column_half * HALF + tl.arange(0, HALF)
    e = tl.arange(0, E_PADDED)
    e_ok = (e < E)[None, :]
    start = batch.to(tl.int64) * rows + chunk * CHUNK
    at = i[:, None] * CHUNK + j[None, :]
    products = tl.load(pairs + (start * groups + group * CHUNK) * CHUNK + at).to(tl.float32)
    below, above, same = i[:, None] > j[None, :], i[:, None] < j[None, :], i[:, None] == j[None, :]
    acc = tl.zeros((HALF, HALF), tl.float32)
    share = tl.cdiv(per_group, split)
    end = tl.minimum(per_group, (part + 1) * share)
    for number in range(part * share, end):
        head = group * per_group + number
        grads = tl.load(dy + (start + i)[:, None] * dy_row + head * E + e[None, :], mask=e_ok, other=0.0)
        values = tl.load(x + (start + j)[:, None] * x_row + head * E + e[None, :], mask=e_ok, other=0.0)
        first = (batch * DIRECTIONS * heads + head).to(tl.int64) * rows + chunk * CHUNK
        second = first + heads * rows
        met = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        if SIDE == 0:
            log = tl.load(logs + first + i)[:, None] - tl.load(logs + first + j)[None, :]
            step_f = tl.load(steps + first + j)[None, :]
            if DIRECTIONS == 2:
                log_g = tl.load(logs + second + i)[:, None] - tl.load(logs + second + j)[None, :]
                step_g = tl.load(steps + second + j)[None, :]
                met = met * tl.exp2(tl.where(above, log_g, log))
                acc += met * tl.where(below, step_f, tl.where(above, step_g, step_f + step_g))
            else:
                met = met * tl.exp2(tl.where(above, float("-inf"), log))
                acc += met * step_f
            place = (batch * heads + head).to(tl.int64) * rows + chunk * CHUNK + i
            tl.store(own + place[:, None], tl.sum(tl.where(same, met, 0.0), 1, keep_dims=True))
            met = met * products
            lower = tl.where(below, met, 0.0)
            at_row, at_column = first + i[:, None], first + j[None, :]
            tl.store(by_row + at_row, tl.load(by_row + at_row) + tl.sum(lower * step_f, 1, keep_dims=True))
            tl.store(by_column + at_column, tl.load(by_column + at_column) + tl.sum(lower, 0, keep_dims=True))
            if DIRECTIONS == 2:
                upper = tl.where(above, met, 0.0)
                at_row, at_column = second + i[:, None], second + j[None, :]
                tl.store(by_row + at_row, tl.load(by_row + at_row) + tl.sum(upper * step_g, 1, keep_dims=True))
                tl.store(by_column + at_column, tl.load(by_column + at_column) + tl.sum(upper, 0, keep_dims=True))
        else:
            line = first if SIDE == 1 else second
            edge = tl.load(logs + line + (HALF - 1 if SIDE == 1 else HALF))
            step = tl.load(steps + line + j)[None, :]
            met = met * tl.exp2(tl.load(logs + line + i) - edge)[:, None]
            met = met * tl.exp2(edge - tl.load(logs + line + j))[None, :]
            acc += met * step
            met = met * products
            # keep_dims: for sums that are vectors, Triton would first convert the whole tile to another layout.
            tl.store(by_row + line + i[:, None], tl.sum(met * step, 1, keep_dims=True))
            tl.store(by_column + line + j[None, :], tl.sum(met, 0, keep_dims=True))
    batches = tl.num_programs(2)
    dpairs += ((part * batches * rows + start) * groups + group * CHUNK) * CHUNK
    tl.store(dpairs + at, acc)


@triton.jit
def _scan_inter(
    v, k, other, dpairs, steps, logs, states, out, by_token, rows, heads, per_group, v_row, k_row, out_row,
    row_stride, column_stride,
    E: tl.constexpr, S: tl.constexpr, E_PADDED: tl.constexpr, S_PADDED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, DIRECTIONS: tl.constexpr, OF_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of c, or with OF_B of b: what comes through the states, summed over heads, plus dpairs (transposed)
    times b (or c). by_token: for each direction and head, k times what comes through its state, with OF_B before the
    step counts."""
    tile, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles: tl.constexpr = CHUNK // BLOCK
    chunk, tile = tile // tiles, tile % tiles
    chunks, groups = rows // CHUNK, heads // per_group
    group = part
    i = tile * BLOCK + tl.arange(0, BLOCK)
    e, s = tl.arange(0, E_PADDED), tl.arange(0, S_PADDED)
    start = batch.to(tl.int64) * rows + chunk * CHUNK
    s_ok, e_ok = (s < S)[None, :], (e < E)[None, :]
    at = (start + i)[:, None] * k_row + group * S + s[None, :]
    keys = tl.load(k + at, mask=s_ok, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK, S_PADDED), tl.float32)
    for number in range(per_group):
        head = group * per_group + number
        values = tl.load(v + (start + i)[:, None] * v_row + head * E + e[None, :], mask=e_ok, other=0.0)
        for way in tl.static_range(DIRECTIONS):
            line = ((batch * DIRECTIONS + way) * heads + head).to(tl.int64) * rows + chunk * CHUNK
            base = (((batch * chunks + chunk) * DIRECTIONS + way) * heads + head).to(tl.int64) * (S * E)
            state = tl.load(states + base + e[:, None] + s[None, :] * E, mask=(e < E)[:, None] & s_ok, other=0.0)
            log = tl.load(logs + line + i)
            if OF_B:
                log = tl.load(logs + line + (0 if way == 1 else CHUNK - 1)) - log
            met = tl.dot(values, state.to(values.dtype), input_precision=PRECISION) * tl.exp2(log)[:, None]
            tl.store(by_token + line + i, tl.sum(met * keys, 1))
            acc += met * tl.load(steps + line + i)[:, None] if OF_B else met
    dpairs += (start * groups + group * CHUNK) * CHUNK
    for begin in range(0, CHUNK, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        weights = tl.load(dpairs + i[:, None] * row_stride + j[None, :] * column_stride)
        met = tl.load(other + (start + j)[:, None] * k_row + group * S + s[None, :], mask=s_ok, other=0.0)
        acc = tl.dot(weights.to(met.dtype), met, acc, input_precision=PRECISION)
    tl.store(out + (start + i)[:, None] * out_row + group * S + s[None, :], acc.to(out.dtype.element_ty), mask=s_ok)


def _pairs_backward(scan: Scan, dy: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the products [b chunks g q q] and, by row and by column, of the weights [b r k rows]; dy x."""
    sizes, half = scan.sizes, scan.chunk // 2
    split = max(1, min(4, scan.per_group // 8))
    dpairs = torch.empty(split, *pairs.shape, device=dy.device, dtype=torch.float32)
    by_row, by_column = torch.zeros_like(scan.steps), torch.zeros_like(scan.steps)
    own = torch.empty_like(scan.steps[:, 0])
    if sizes.ways == 1:
        dpairs[..., :half, half:] = 0
    for side in (1, 2, 0) if sizes.ways == 2 else (1, 0):
        _scan_pairs[scan.chunks * (2 if side == 0 else 1), sizes.groups * split, scan.batch](
            scan.x, dy, pairs, scan.steps, scan.logs, dpairs, by_row, by_column, own, scan.rows, sizes.heads,
            scan.per_group, scan.x.stride(1), dy.stride(1), split,
            E=scan.shape["E"], E_PADDED=scan.shape["E_PADDED"], SIDE=side, **scan.of_halves, **LAUNCH["pairs"],
        )  # fmt: skip
    return dpairs.sum(0).to(dy.dtype), by_row, by_column, own


def _inter_backward(scan: Scan, v: Tensor, states: Tensor, dpairs: Tensor, out: Tensor, of_b: bool) -> Tensor:
    """Gradient of c, or of b, into `out`; and of the weights that the states meet, [b r k rows]."""
    by_token = torch.empty_like(scan.steps)
    block = min(64, scan.chunk)
    k, other = (scan.b, scan.c) if of_b else (scan.c, scan.b)
    _scan_inter[scan.rows // block, scan.sizes.groups, scan.batch](
        v, k, other, dpairs, scan.steps, scan.logs, states, out, by_token, scan.rows, scan.sizes.heads,
        scan.per_group, v.stride(1), k.stride(1), out.stride(1),
        *((1, scan.chunk) if of_b else (scan.chunk, 1)),
        CHUNK=scan.chunk, BLOCK=block, OF_B=of_b, **scan.shape, **scan.common, **scan.fitting(LAUNCH["inter"]),
    )  # fmt: skip
    return by_token


def scan_backward(
    scan: Scan, dy: Tensor, a: Tensor, d: Tensor, begin: Tensor | None, index: Tensor | None, ddt: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, of a [r k], of d [k], of the bias [r k], and of begin; that of the raw steps is written to `ddt`
    [b n k], in raster order. dy [b rows k*e] in scan order, zeros behind the last token. States are computed again."""
    du = torch.empty_like(scan.u)
    dx, db, dc = du.split(scan.sizes.parts, -1)
    states, _, _ = scan.states(scan.x, scan.b, begin)
    pairs = scan.products(scan.c, scan.b)
    dpairs, by_row, by_column, own = _pairs_backward(scan, dy, pairs)
    row = _inter_backward(scan, dy, states, dpairs, dc, of_b=False)
    adjoint, dbegin, met = scan.states(dy, scan.c, None, forward=states)
    column = _inter_backward(scan, scan.x, adjoint, dpairs, db, of_b=True)
    scan.mix(dy, scan.b, scan.products(scan.b, scan.c), adjoint, d, dx, adjoint=True)

    # On the diagonal the decay is 1 and only the step counts.
    diagonal = pairs.diagonal(dim1=-2, dim2=-1).transpose(1, 2).flatten(2).repeat_interleave(scan.per_group, 1)
    through_steps = column + by_column + (own * diagonal)[:, None]
    decays = _of_decays(scan, by_row + row, scan.steps * by_column, scan.steps * column, met)
    # softplus' = sigmoid = 1 - exp(-softplus)
    raw = (through_steps + a[..., None] * decays) * -torch.expm1(-scan.steps)
    in_order = raw.sum(1)[..., : ddt.shape[1]].mT
    if index is None:
        ddt.copy_(in_order)
    else:
        ddt[:, index] = in_order.to(ddt.dtype)
    return du, (decays * scan.steps).sum((0, 3)), own.sum((0, 2)), raw.sum((0, 3)), dbegin


def _of_decays(scan: Scan, rows: Tensor, inside: Tensor, later: Tensor, met: Tensor) -> Tensor:
    """Gradients of dt a of each token [b r k rows]: sums over the pairs of a row from it on with a column before it.

    Args:
        rows: sums over what each row reads.
        inside, later: sums over what of each column its own chunk reads, and later chunks.
        met: of each chunk, over what passes all of it."""
    rows, inside, later = (part.unflatten(-1, (scan.chunks, -1)) for part in (rows, inside, later))
    # Pairs that lie on one side of the token are in both terms of a difference, with the same rounding in both. That
    # is why `later` has its own total: one from states in 16 bits would leave their rounding where little is left.
    change = rows - inside - later
    sums = change.cumsum(-1)
    suffix = sums[..., -1:] - sums + change
    decays = torch.stack([suffix[:, 0], *(sums[:, way] for way in range(1, scan.sizes.ways))], 1)
    return (decays + (later.sum(-1) + met)[..., None]).flatten(-2)


def fused_scan(
    u: Tensor, dt: Tensor, a: Tensor, d: Tensor, bias: Tensor, index: Tensor | None, begin: Tensor | None,
    sizes: ScanSizes, chunk: int,
) -> Tensor:  # fmt: skip
    """`lingen.kernels.scan.scan` with kernel="triton"."""
    return scan_forward(Scan(u, dt, a, bias, index, sizes, chunk), d.sum(0), begin)


def fused_scan_gradients(
    dy: Tensor, u: Tensor, dt: Tensor, a: Tensor, d: Tensor, bias: Tensor, index: Tensor | None, begin: Tensor | None,
    sizes: ScanSizes, chunk: int,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Those of `fused_scan`, in the order of its arguments; all but these is computed again."""
    scan, ddt = Scan(u, dt, a, bias, index, sizes, chunk), torch.empty(dt.shape, device=dt.device, dtype=dt.dtype)
    du, da, dd, dbias, dbegin = scan_backward(scan, dy.contiguous(), a, d.sum(0), begin, index, ddt)
    return du, ddt, da, dd.expand_as(d), dbias, None, None if begin is None else dbegin
