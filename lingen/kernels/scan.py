"""The scan of Mamba2 over a sequence, in one direction or in both at once (arXiv 2405.21060). The first direction is
the recurrence of `lingen.kernels.ssd`, and the second the same from the last token to the first, with a, d and dt bias
of its own; their y are summed."""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lingen.kernels.choice import choose, device_type, full_precision, holds_numbers, is_unlaunched, stands_for_cuda
from lingen.kernels.gradients import FromInputs
from lingen.kernels.kept import kept
from lingen.kernels.ssd import ssd

_WIDEST, _LARGEST_STATE = 128, 16_384


def scan_kernel(kernel: str, u: Tensor, width: int, state_dim: int) -> str:
    """The twin of `scan` that runs on streams like `u`; "auto" does not take Triton where a state is too large for it.
    Raises RecipeError for an unknown kernel, and for "triton" where it cannot run."""
    wide, deep = (max(16, 1 << (size - 1).bit_length()) for size in (width, state_dim))
    largest = _LARGEST_STATE // 2 if u.dtype == torch.float32 else _LARGEST_STATE
    fits = wide <= _WIDEST and wide * deep <= largest
    if fits and kernel in ("auto", "triton") and stands_for_cuda(u):
        return "triton"
    too_large = (
        f"kernel='triton' of the scan holds states of up to {largest} numbers a head (powers of two), in heads of "
        f"up to {_WIDEST}; this head has {width} x {state_dim}. kernel='auto' takes another."
    )
    return choose("scan", kernel, u, "" if fits else too_large)


def chunk_of(n: int, dtype: torch.dtype, numbers: int = _LARGEST_STATE) -> int:
    """Tokens in a chunk of the Triton kernel: 256, less where a state of so many numbers costs less than its pairs;
    64 in float32, which takes twice the shared memory and has no tensor cores here; less for short sequences."""
    longest = 64 if dtype == torch.float32 or numbers <= 1024 else 128 if numbers <= 4096 else 256
    return min(longest, max(32, 1 << (n - 1).bit_length()))


def rows_of(n: int, kernel: str, dtype: torch.dtype) -> int:
    """Rows that `scan` wants in `u` for n tokens: the Triton kernel works on whole chunks."""
    return -(-n // chunk_of(n, dtype)) * chunk_of(n, dtype) if kernel == "triton" else n


def scan(
    u: Float[Tensor, "b rows c"],
    dt: Float[Tensor, "b n k"],
    a: Float[Tensor, "r k"],
    d: Float[Tensor, "r k"],
    dt_bias: Float[Tensor, "r k"],
    index: Int[Tensor, "n"] | None = None,
    initial_state: Float[Tensor, "b r k e s"] | None = None,
    *,
    groups: int = 1,
    state_dim: int,
    kernel: str = "auto",
) -> Float[Tensor, "b rows f"]:
    """y of all directions summed, f = k e, in u's order and dtype. RecipeError for an unknown or unavailable kernel,
    ValueError for shapes that do not fit.

    Args:
        u: x | b | c side by side, k e + 2 g s channels, in scan order; `rows_of` tells how many rows, those behind
            the n-th are zero.
        dt: raw time steps in raster order (`softplus(dt + dt_bias)` is used); token i of the scan reads row index[i].
        a: negative, not its logarithm. One row: first direction only; two: both.
        initial_state: of each direction, where it enters the sequence.
        kernel: "triton" reads x, b, c and dt once for both directions; "chunked" is `ssd` on the sequence and on its
            flipped copy, "reference" the recurrence itself, "stock" mamba_ssm on CUDA. "auto" is "triton" on CUDA and
            else "chunked"."""
    n, heads = dt.shape[1:]
    width = (u.shape[2] - 2 * groups * state_dim) // heads
    kernel, chunk = scan_kernel(kernel, u, width, state_dim), chunk_of(n, u.dtype, width * state_dim)
    if u.shape[1] != rows_of(n, kernel, u.dtype):
        rows = rows_of(n, kernel, u.dtype)
        raise ValueError(f"u has {u.shape[1]} rows; {n} tokens take {rows} with kernel='{kernel}'.")
    if kernel == "triton" and not (holds_numbers(u) or is_unlaunched(u)):
        return kept(lambda: _products_of_triton(u, chunk, len(a), heads, groups, state_dim))
    if kernel == "triton":
        from lingen.kernels.scan_backward_triton import fused_scan, fused_scan_gradients
        from lingen.kernels.scan_triton import ScanSizes

        begin = None if initial_state is None else initial_state.float().mT.contiguous()
        sizes = ScanSizes(heads, width, groups, state_dim, len(a))
        inputs = u, dt, a.float(), d.float(), dt_bias.float(), index, begin, sizes, chunk
        return FromInputs.apply(fused_scan, fused_scan_gradients, *inputs)
    # One causal scan in which the second direction is further heads, whose streams are flipped.
    ways, dt = len(a), dt if index is None else dt[:, index]
    if ways == 2:
        u, dt = torch.stack([u, u.flip(1)], 2), torch.cat([dt, dt.flip(1)], -1)
    else:
        u = u[:, :, None]
    x, b, c = u.split([u.shape[-1] - 2 * groups * state_dim, groups * state_dim, groups * state_dim], -1)
    x = x.unflatten(-1, (a.shape[1], -1)).flatten(2, 3)
    b, c = (part.unflatten(-1, (groups, -1)).flatten(2, 3) for part in (b, c))
    begin = None if initial_state is None else initial_state.flatten(1, 2)
    y = ssd(x, dt, a.flatten(), b, c, d.flatten(), dt_bias.flatten(), begin, kernel=kernel)
    sides = y.flatten(2).chunk(ways, -1)
    return sides[0] if ways == 1 else sides[0] + sides[1].flip(1)


def _products_of_triton(u: Tensor, chunk: int, ways: int, heads: int, groups: int, state_dim: int) -> Tensor:
    """The matrix products of `scan_triton`, to be counted on the meta device; what they give has y's shape, no more. C
    B^T is shared by the directions. States are made and used by each; of the two halves of a chunk each meets itself
    once for all directions, and each direction takes one half to the other."""
    x, b, c = _in_chunks(u, chunk, heads, groups, state_dim)
    pairs = torch.einsum("zqgs,zrgs->zgqr", c, b)[:, :, None].expand(-1, -1, x.shape[3], -1, -1)
    states = [torch.einsum("zqgs,zqgme->zgmes", b, x) for _ in range(ways)]
    y = sum((torch.einsum("zqgs,zgmes->zqgme", c, state) for state in states), torch.zeros_like(x))
    half = chunk // 2
    first, second = slice(0, half), slice(half, chunk)
    for rows, columns in [(first, first), (second, second), (second, first), (first, second)][: 2 + ways]:
        part = torch.einsum("zgmqr,zrgme->zqgme", pairs[..., rows, columns], x[:, columns])
        y = y + F.pad(part, (0, 0) * 3 + (rows.start, chunk - rows.stop))
    return y.flatten(2).view(len(u), -1, y.shape[2:].numel())


def _in_chunks(u: Tensor, chunk: int, heads: int, groups: int, state_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [z q g m e], b and c [z q g s] of all chunks: z = b * chunks, m heads in each of g groups."""
    keys = groups * state_dim
    x, b, c = u.unflatten(1, (-1, chunk)).flatten(0, 1).split([u.shape[2] - 2 * keys, keys, keys], -1)
    x = x.unflatten(-1, (groups, heads // groups, -1))
    return x, b.unflatten(-1, (groups, -1)), c.unflatten(-1, (groups, -1))


def scan_state(
    u: Float[Tensor, "b rows c"],
    dt: Float[Tensor, "b n k"],
    a: Float[Tensor, "r k"],
    dt_bias: Float[Tensor, "r k"],
    index: Int[Tensor, "n"] | None = None,
    *,
    groups: int = 1,
    state_dim: int,
    kernel: str = "auto",
) -> Float[Tensor, "b r k e s"]:
    """The states at the end of the sequence, without any outputs; every direction reads the sequence forwards.
    Arguments as in `scan`. In float32 at least. kernel: "triton" runs the first half of the scan's kernels, every other
    name one matrix product. The gradient is always that of the product, whose factors are 16-bit where the streams are
    16-bit on CUDA."""
    width = (u.shape[2] - 2 * groups * state_dim) // dt.shape[2]
    kernel, chunk = scan_kernel(kernel, u, width, state_dim), chunk_of(dt.shape[1], u.dtype, width * state_dim)
    if kernel == "triton" and not (holds_numbers(u) or is_unlaunched(u)):
        x, b, _ = _in_chunks(u, chunk, dt.shape[2], groups, state_dim)
        states = torch.stack([torch.einsum("zqgs,zqgme->zgmes", b, x) for _ in a], 1).flatten(2, 3)
        return states.unflatten(0, (len(u), -1)).sum(1, dtype=torch.float32)
    if kernel == "triton":
        from lingen.kernels.scan_triton import ScanSizes, end_states

        sizes = ScanSizes(dt.shape[2], width, groups, state_dim, len(a), turns=False)
        run = partial(end_states, sizes=sizes, chunk=chunk)
        back = partial(state_gradients, groups=groups, state_dim=state_dim)
        return FromInputs.apply(run, back, u, dt, a.float(), dt_bias.float(), index)
    return state_by_product(u, dt, a, dt_bias, index, groups, state_dim)


def state_by_product(
    u: Tensor, dt: Tensor, a: Tensor, dt_bias: Tensor, index: Tensor | None, groups: int, state_dim: int
) -> Tensor:
    """`scan_state` in plain PyTorch; rows of u behind the last token are left out."""
    u = u[:, : dt.shape[1]]
    b, heads = u.shape[0], dt.shape[2]
    with full_precision(u):
        dtype = torch.promote_types(u.dtype, torch.float32)
        raw = (dt if index is None else dt[:, index]).to(dtype).mT[:, None]  # sums run along the last axis: faster
        steps = F.softplus(raw + dt_bias.to(dtype)[..., None])  # [b r k n]
        logs = steps * a.to(dtype)[..., None]
        # Summed from the end, where the decay is near 1, so that what counts keeps its digits.
        later = F.pad(logs[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))
        weight = (steps * later.exp()).permute(0, 3, 1, 2)  # [b n r k]
        product = u.dtype if device_type(u) == "cuda" else dtype
        x, keys, _ = u.to(product).split([u.shape[2] - 2 * groups * state_dim, *[groups * state_dim] * 2], -1)
        x = x.unflatten(-1, (1, heads, -1)) * weight.to(product).unsqueeze(-1)
        # All heads of a group in one product, read where they lie; few scans have more than one group.
        x, keys = x.unflatten(3, (groups, -1)), keys.unflatten(-1, (groups, -1))  # [b n r g k/g e], [b n g s]
        states = [x[:, :, :, g].flatten(2).mT @ keys[:, :, g] for g in range(groups)]
        state = torch.stack(states, 1).to(dtype).unflatten(2, (len(a), heads // groups, -1))
        return state.transpose(1, 2).reshape(b, len(a), heads, -1, state_dim)


def state_gradients(
    grad: Tensor, u: Tensor, dt: Tensor, a: Tensor, dt_bias: Tensor, index: Tensor | None, groups: int, state_dim: int
) -> tuple[Tensor, ...]:
    """Gradients of u, dt, a and dt_bias from that of `state_by_product`, which is computed again."""
    u, dt, a, dt_bias = (part.detach().requires_grad_() for part in (u, dt, a, dt_bias))
    with torch.enable_grad():
        state = state_by_product(u, dt, a, dt_bias, index, groups, state_dim)
    return torch.autograd.grad(state, (u, dt, a, dt_bias), grad)
