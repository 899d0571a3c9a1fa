"""An optimiser's state by the names of parameters, whole or in shards, so that it does not hang on their order."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lingen.ranks.heartbeat import sign

OptimizerState = dict[str, dict[str, Any]]
"""Name of a parameter -> what its optimiser keeps for it: tensors (AdamW's `exp_avg` and `exp_avg_sq`; DTensors where
the parameter is one) and plain values. `step` is a float where the optimiser has a tensor."""


def state_by_name(module: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerState:
    """The state of every parameter that has one; tensors are the optimiser's own, no copies.

    Args:
        module: names the parameters; a LightningModule, whatever wraps it.
        optimizer: as torch makes it."""
    named = ((name, optimizer.state.get(parameter)) for name, parameter in module.named_parameters())
    # A count as a number. A tensor of a parameter without axes has none either, so that the name has to tell.
    return {
        name: {key: float(one) if key == "step" and isinstance(one, Tensor) else one for key, one in held.items()}
        for name, held in named
        if held
    }


def load_state_by_name(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Gives an optimiser the state of parameters that it moves; its settings, and what it keeps of others, stay.

    Args:
        module, optimizer: as for `state_by_name`.
        state: as `state_by_name` gives it; the optimiser goes on in these tensors."""
    moved = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    own = dict(module.named_parameters())
    for name, held in state.items():
        parameter, group = own[name], moved[id(own[name])]
        optimizer.state[parameter] = {key: _held(key, value, parameter, group) for key, value in held.items()}


def whole_of(value: Tensor) -> Tensor:
    """A tensor of which each rank may hold a part, as a plain one; all ranks ask for it at once."""
    sign()  # a model has many
    return value.full_tensor() if isinstance(value, DTensor) else value


def _held(key: str, value: Any, parameter: Tensor, group: dict[str, Any]) -> Any:
    """A value as an optimiser keeps it: a count in float32 on the CPU unless it is read by a kernel."""
    if key != "step" or not isinstance(value, float):
        return value
    on_device = group.get("capturable") or group.get("fused")
    return torch.tensor(value, dtype=torch.float32, device=parameter.device if on_device else "cpu")
