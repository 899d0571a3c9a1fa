"""State space duality: the selective scan of Mamba2 (arXiv 2405.21060) as a recurrence and as matrix products.

For each head, with the state h [e s] and the token i:

    h_i = exp(dt_i a) h_{i-1} + dt_i x_i b_i^T        y_i = h_i c_i + d x_i

`ssd` is causal. Time runs along n; a caller who wants the other direction flips. Work and memory are linear in n."""

import importlib
import sys
import types
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lingen.kernels.choice import full_precision, holds_numbers
from lingen.recipe.errors import RecipeError

SSD_KERNELS = ("auto", "reference", "chunked", "stock")

# Chunk states above this number are passed on group by group, so that no matrix is larger than this in either axis.
_GROUP = 64
# mamba_ssm's chunks must be powers of two; 256 is what it is tuned for.
_STOCK_CHUNK = 256


def ssd(
    x: Float[Tensor, "b n k e"],
    dt: Float[Tensor, "b n k"],
    a: Float[Tensor, "k"],
    b: Float[Tensor, "b n g s"],
    c: Float[Tensor, "b n g s"],
    d: Float[Tensor, "k"] | None = None,
    dt_bias: Float[Tensor, "k"] | None = None,
    initial_state: Float[Tensor, "b k e s"] | None = None,
    *,
    kernel: str = "auto",
    chunk: int = 64,
) -> Float[Tensor, "b n k e"]:
    """The causal scan of Mamba2 (arXiv 2405.21060, eq. 1-3 with section 6's chunks).

    `a` is negative (not its logarithm). `dt` >= 0 is used as given; with `dt_bias` it is softplus(dt + dt_bias). Head i
    reads group i // (k / g) of `b` and `c`. In float32 (float64 for float64), also under autocast; y in x's dtype.

    kernel: "reference" is the recurrence, token by token; "chunked" matrix products over chunks of at most `chunk`
    tokens; "stock" is mamba_ssm on CUDA; "auto" is "chunked". `lingen.kernels.scan` has a Triton kernel. Where
    nothing is computed and products are counted, all of them are "chunked", "stock" in chunks of its own length.
    Raises ValueError for an unknown or unavailable kernel and for shapes that do not fit."""
    if x.shape[1] == 0 or chunk < 1:
        raise ValueError(f"ssd needs at least one token and a chunk of at least 1, not {x.shape[1]} and {chunk}.")
    if x.shape[2] % b.shape[2]:
        raise ValueError(f"{b.shape[2]} groups do not divide {x.shape[2]} heads.")
    run = {"auto": _chunked, "chunked": _chunked, "reference": _reference, "stock": _stock}.get(kernel)
    if run is None:
        raise ValueError(f"There is no SSD kernel called {kernel!r}. Known: {', '.join(SSD_KERNELS)}.")
    if not holds_numbers(x):
        run, chunk = _chunked, _STOCK_CHUNK if kernel == "stock" else chunk
    dtype = torch.promote_types(x.dtype, torch.float32)
    with full_precision(x):
        dt, a = dt.to(dtype), a.to(dtype)
        dt = dt if dt_bias is None else F.softplus(dt + dt_bias.to(dtype))
        state = None if initial_state is None else initial_state.to(dtype)
        y = run(x, dt, a, b, c, state, chunk)
        if d is not None:
            # Of whole rows, whose gradient is summed faster than that of [k 1].
            rows, each = x.flatten(2).to(y.dtype), d.to(y.dtype).repeat_interleave(x.shape[3])
            y = torch.addcmul(y.flatten(2), rows, each).view(x.shape)
    return y.to(x.dtype)


def _reference(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, chunk: int) -> Tensor:
    """The definition, one token at a time."""
    per_group = x.shape[2] // b.shape[2]
    x, b, c = (u.to(dt.dtype) for u in (x, b.repeat_interleave(per_group, 2), c.repeat_interleave(per_group, 2)))
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], b.shape[-1]) if state is None else state
    outputs = []
    for i in range(x.shape[1]):
        fresh = (dt[:, i, :, None] * x[:, i])[..., None] * b[:, i, :, None, :]
        state = (dt[:, i] * a).exp()[..., None, None] * state + fresh
        outputs.append((state * c[:, i, :, None, :]).sum(-1))
    return torch.stack(outputs, 1)


def _chunked(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, chunk: int) -> Tensor:
    """Inside a chunk the quadratic form, between chunks the states (arXiv 2405.21060, section 6)."""
    n, groups = x.shape[1], b.shape[2]
    count = -(-n // chunk)
    length = -(-n // count)  # chunks of equal length need the least padding
    # A token with dt = 0 neither decays a state nor adds to it, so padding changes nothing.
    dt, x, b, c = (_to_chunks(u, count, length) for u in (dt, x.to(dt.dtype), b.to(dt.dtype), c.to(dt.dtype)))
    x = x * dt.unsqueeze(-1)
    logs = _sums((dt * a).transpose(2, 3))  # [b count k l], never positive
    b, c = b.transpose(2, 3), c.transpose(2, 3)  # [b count g l s]

    y = _Decayed.apply(logs, c @ b.mT, x.transpose(2, 3))  # [b count k l e]
    starts = None if state is None else state[:, None]
    if count > 1:
        to_end = (logs[..., -1:] - logs).to(x.dtype).exp().transpose(2, 3)
        of_group = (x * to_end.unsqueeze(-1)).unflatten(3, (groups, -1)).flatten(4, 5)  # [b count l g (k/g e)]
        added = of_group.permute(0, 1, 3, 4, 2) @ b  # the sum over l of x b^T, all heads of a group in one product
        added = added.unflatten(3, (-1, x.shape[-1])).flatten(2, 3)  # [b count k e s]
        starts, _ = _pass_on(added, logs[..., -1], state)
    if starts is not None:
        carried = c @ starts.unflatten(2, (groups, -1)).flatten(3, 4).mT  # [b count g l (k/g e)]
        carried = carried.unflatten(-1, (-1, x.shape[-1])).transpose(3, 4).flatten(2, 3)
        y = torch.addcmul(y, carried, logs.to(x.dtype).exp().unsqueeze(-1))
    return y.transpose(2, 3).flatten(1, 2)[:, :n]


def _to_chunks(u: Tensor, count: int, length: int) -> Tensor:
    """[b n ...] -> [b count length ...], zeros behind the end."""
    padding = count * length - u.shape[1]
    u = F.pad(u, (0, 0) * (u.ndim - 2) + (0, padding)) if padding else u
    return u.unflatten(1, (count, length))


def _sums(logs: Float[Tensor, "*any l"]) -> Float[Tensor, "*any l"]:
    """Running sums, in float64 where the device has it: what is used is their small differences, and after one long
    step a float32 sum has no digits left for the short ones."""
    return logs.cumsum(-1, dtype=logs.dtype if logs.device.type == "mps" else torch.float64)


class _Decayed(torch.autograd.Function):
    """y_i = sum over j <= i of exp(sums_i - sums_j) scores_ij x_j, in fewer passes over [l l] than autograd makes.

    sums [b c k l], scores [b c g l l] or None for ones, x [b c k l e]."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, scores: Tensor | None, x: Tensor) -> Tensor:
        # In two numbers of x's dtype: differences of whole tables in float64 take three times as long.
        high, trains = sums.to(x.dtype), any(ctx.needs_input_grad)
        low = (sums - high).to(x.dtype)
        decay = high.unsqueeze(-1) - high.unsqueeze(-2)
        decay.add_(low.unsqueeze(-1)).sub_(low.unsqueeze(-2)).exp_().tril_()  # which also clears what overflowed
        both = decay
        if scores is not None:
            of_groups = _of_groups(decay, scores)
            both = (of_groups.mul if trains else of_groups.mul_)(scores.unsqueeze(3)).flatten(2, 3)
        if trains:
            ctx.save_for_backward(decay, both, scores, x)
        ctx.dtype = sums.dtype
        return both @ x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        decay, both, scores, x = ctx.saved_tensors
        of_both = grad @ x.mT
        of_scores = None if scores is None else _of_groups(of_both * decay, scores).sum(3)
        of_logs = of_both.mul_(both)
        return (of_logs.sum(-1) - of_logs.sum(-2)).to(ctx.dtype), of_scores, both.mT @ grad


def _of_groups(of_heads: Float[Tensor, "b c k *any"], like: Float[Tensor, "b c g *any"]) -> Tensor:
    """[b c g k/g ...]"""
    return of_heads.unflatten(2, (like.shape[2], -1))


def _later(logs: Float[Tensor, "*any n k"]) -> Float[Tensor, "*any n k"]:
    """Sum over all later positions. From the end, where the decay is near 1, so that what counts keeps its digits."""
    return F.pad(logs[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))


def _pass_on(added: Tensor, logs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """States before each chunk and after the last one. added [b c k e s] is what each chunk adds, logs [b c k] its
    total log decay, state [b k e s] the start or None. More chunks than a group holds are treated as chunks of chunks,
    so the products stay linear in their number."""
    count = added.shape[1]
    if count > _GROUP:
        groups = -(-count // _GROUP)
        added, logs = _to_chunks(added, groups, _GROUP), _to_chunks(logs, groups, _GROUP)
        sums = torch.einsum("bgck,bgckes->bgkes", _later(logs).to(added.dtype).exp(), added)
        starts, final = _pass_on(sums, logs.sum(2), state)
        inside, _ = _pass_on(added.flatten(0, 1), logs.flatten(0, 1), starts.flatten(0, 1))
        return inside.unflatten(0, (-1, groups)).flatten(1, 2)[:, :count], final
    first = torch.zeros_like(added[:, :1]) if state is None else state[:, None]
    # Row i of the triangle: the start decayed by chunks 0..i-1 and every earlier chunk's addition.
    sums = _sums(F.pad(logs, (0, 0, 1, 0)).transpose(1, 2))[:, None]  # [b 1 k c+1]
    states = torch.cat([first, added], 1).transpose(1, 2).flatten(3)[:, None]
    states = _Decayed.apply(sums, None, states)[:, 0].unflatten(-1, added.shape[-2:]).transpose(1, 2)
    return states[:, :-1], states[:, -1]


def _stock(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, chunk: int) -> Tensor:
    scan = chunk_scan()
    if not x.is_cuda:
        raise RecipeError(f"kernel='stock' runs on CUDA, but the tokens are on {x.device}.")
    y: Tensor = scan(x, dt, a, b.to(x.dtype), c.to(x.dtype), chunk_size=_STOCK_CHUNK, initial_states=state)
    return y


@lru_cache
def chunk_scan() -> Callable[..., Any]:
    """`mamba_chunk_scan_combined` of mamba_ssm, also where it was built without its CUDA extension. Raises RecipeError
    where mamba_ssm is not installed."""
    path = "mamba_ssm.ops.triton.ssd_combined"
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        spec = find_spec("mamba_ssm")
        if spec is None or spec.submodule_search_locations is None:
            raise RecipeError(f"kernel='stock' needs mamba_ssm ({error}): pip install mamba-ssm.") from error
        # Its __init__ asks for the extension, which only Mamba 1 uses: the package is entered past it.
        package = types.ModuleType("mamba_ssm")
        package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
        sys.modules["mamba_ssm"] = package
        module = importlib.import_module(path)
    scan: Callable[..., Any] = module.mamba_chunk_scan_combined
    return scan
