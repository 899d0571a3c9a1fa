"""An optimiser's state by name: the same steps follow, whatever the order of the parameters."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from lingen.training.state import load_state_by_name, state_by_name

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95)}


def layers() -> nn.Module:
    made = nn.ModuleDict({"one": nn.Linear(3, 4), "other": nn.Linear(3, 2, bias=False), "still": nn.Linear(2, 2)})
    made.register_parameter("gate", nn.Parameter(torch.zeros(())))
    return made


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if not name.startswith("still"):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = layers()
    optimizer = torch.optim.AdamW(module.parameters(), **SETTINGS)
    step(module, optimizer, 1)
    step(module, optimizer, 2)
    return module, optimizer


def test_what_goes_on_by_name_makes_the_same_steps():
    module, optimizer = trained()
    state = state_by_name(module, optimizer)
    assert state.keys() == {"gate", "one.weight", "one.bias", "other.weight"}  # nothing moved the others yet
    for name in ("one.bias", "gate"):
        assert {key: type(value) for key, value in state[name].items()} == {
            "step": float,
            "exp_avg": torch.Tensor,
            "exp_avg_sq": torch.Tensor,
        }
    again = layers()
    again.load_state_dict(module.state_dict())
    groups = [{"params": [p]} for p in reversed(list(again.parameters()))]
    other = torch.optim.AdamW(groups, **SETTINGS)
    load_state_by_name(again, other, deepcopy(state))
    for where in ((module, optimizer), (again, other)):
        step(*where, 3)
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert state_by_name(again, other)["other.weight"]["step"] == 3
    assert state["other.weight"]["step"] == 2
