"""A denoiser over several ranks with FSDP2 (`fully_shard`; arXiv 2304.11277): what its units are, what stays float32,
and the norm of gradients of which each rank holds a part."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lingen.blocks.layers import is_float32
from lingen.model import LinGen


def shard_denoiser(
    model: LinGen, encoders: Iterable[nn.Module], mesh: DeviceMesh, device: torch.device, low: torch.dtype | None
) -> None:
    """Splits a denoiser, and the text encoders that are trained along, over the ranks of a mesh, in place. All ranks
    start from the weights of the first.

    Units, each gathered when it runs: every block, the rest of the denoiser, every text encoder. The modules of all
    blocks that train in float32 (`lingen.blocks.layers.is_float32`) are one unit more, so that they cost one
    collective: it is gathered before the model runs and kept until its backward pass is over.

    Args:
        model, encoders: whole, on any device.
        mesh: of one axis, or of two (replicas, shards).
        device: of this rank; a unit is moved there whole and leaves its shard.
        low: the dtype that blocks are gathered in; None for their own. Gradients are summed in float32 then."""
    own = MixedPrecisionPolicy(cast_forward_inputs=False)
    lowered = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False) if low else own
    group = cast(list[nn.Module], [part for part in model.blocks.modules() if is_float32(part, training=True)])
    if group:
        _start_alike(group, device)
        fully_shard(group, mesh=mesh, reshard_after_forward=False, mp_policy=own)
        _unhook(group[0])
    for block in model.blocks:
        _start_alike([block], device)
        fully_shard(block, mesh=mesh, mp_policy=lowered)
    _start_alike([model], device)
    # Before FSDP's own looks at it: a change in place of a view takes away the hook that gathers the weights again.
    model.register_forward_hook(lambda _model, _inputs, out: out if out._base is None else out.clone())
    fully_shard(model, mesh=mesh, mp_policy=own)
    model.register_forward_pre_hook(lambda *_: _unshard_group(model))
    model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else _reshard(model))
    for encoder in encoders:
        _start_alike([encoder], device)
        fully_shard(encoder, mesh=mesh, mp_policy=own, reshard_after_forward=True)
        register_fsdp_forward_method(encoder, "encode")


def _start_alike(unit: list[nn.Module], device: torch.device) -> None:
    """Moves what is not sharded yet to the device, with the first rank's values."""
    for tensor in chain.from_iterable(chain(part.parameters(), part.buffers()) for part in unit):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device).contiguous()
            dist.broadcast(tensor.data, 0)


def _unhook(part: nn.Module) -> None:
    """Takes FSDP's forward hooks off a unit of several modules. They take it for complete when each has run, while
    norms are read without being called, and recomputed blocks run twice: it would be resharded too early, and its
    gradients lost (docs/upstream.md). Without them gradients are reduced at the end of the root's backward pass."""
    state: Any = cast(FSDPModule, part)._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()


def _group_of(model: LinGen) -> FSDPModule | None:
    """A module of the unit in float32; what is asked of one is done for all."""
    parts = (part for part in model.blocks.modules() if is_float32(part, training=True))
    return next((part for part in parts if isinstance(part, FSDPModule)), None)


def _unshard_group(model: LinGen) -> None:
    group = _group_of(model)
    if group is not None:
        group.unshard()


def _reshard(model: LinGen) -> None:
    """Frees what is kept for a backward pass: after a forward without one, weights may change (averaged ones come and
    go), and the gathered ones would be stale."""
    for unit in (model, _group_of(model)):
        if isinstance(unit, FSDPModule):
            unit.reshard()


@contextmanager
def whole_float32(model: LinGen) -> Iterator[None]:
    """Inside the block the modules of a sharded model that stay float32 hold whole parameters; all ranks enter it."""
    _unshard_group(model)
    try:
        yield
    finally:
        _reshard(model)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scales gradients down to a common norm of at most `limit`; returns the norm before, on all ranks the same.

    Args:
        parameters: all whole, or all sharded alike; those without a gradient do not count."""
    held = [p for p in parameters if p.grad is not None]
    shards = [p.grad for p in held if isinstance(p.grad, DTensor)]
    if not shards:
        return torch.nn.utils.clip_grad_norm_(held, limit)
    local = [shard.to_local() for shard in shards]
    square = torch.nn.utils.get_total_norm(local).double().square()
    mesh = shards[0].device_mesh
    dist.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))  # replicas hold the same
    norm = square.sqrt().to(local[0].dtype)
    torch._foreach_mul_(local, (limit / (norm + 1e-6)).clamp(max=1))  # as clip_grad_norm_ does
    return norm
