"""What a recipe names for training alone, tried on a few numbers: optimiser, decay, loss, callbacks."""

from __future__ import annotations

import inspect
import json
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lingen.plan.contract import error_told, unlike
from lingen.recipe.registry import CALLBACKS, DECAYS, LOSSES, OPTIMIZERS, Registry
from lingen.recipe.sections import Recipe, TrainConfig


def build_optimizer(settings: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """`train.optimizer` over groups of parameters that have all of their settings."""
    offered = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    made: torch.optim.Optimizer = OPTIMIZERS.build(settings.optimizer, groups, **offered)
    return made


def note_of_warmup(recipe: Recipe) -> str | None:
    """A sentence where a stage ends amid its warm-up."""
    told, train = f"warning: stage {recipe.stage} ends amid its warm-up", recipe.train
    reached = f"at {train.steps / max(1, train.warmup):.0%} of train.lr; lower train.warmup={train.warmup}"
    return f"{told} (train.steps={train.steps}), {reached}." if train.warmup > train.steps else None


def fault_in_training(registry: Registry, component: dict[str, Any], recipe: Recipe) -> str | None:
    """What a part owes and does not do, as a sentence; None where it keeps its contract."""
    checks = {OPTIMIZERS: _of_optimizer, DECAYS: _of_decay, LOSSES: _of_loss, CALLBACKS: _of_callback}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return checks[registry](component, recipe)
    except Exception as error:  # a third party's part may raise anything
        return f"it fails: {error_told(error)}"


def _of_optimizer(component: dict[str, Any], recipe: Recipe) -> str | None:
    """Its third step has to be the same from what a checkpoint holds of the first two."""
    settings, takes = recipe.train, inspect.signature(OPTIMIZERS[component["name"]]).parameters
    sharded = str(recipe.trainer.get("strategy")).lower() in ("fsdp", "hsdp")
    if OPTIMIZERS.origin(component["name"]) == "lingen":
        told = "it needs whole matrices; set trainer.strategy=ddp or train.optimizer=adamw."
        return told if sharded and component["name"] == "muon" else None
    asked = {"lr": True, "weight_decay": settings.weight_decay > 0, "betas": settings.betas != TrainConfig.betas}
    if idle := [key for key, is_asked in asked.items() if is_asked and key not in takes]:
        return f"it takes no `{idle[0]}`, so train.{idle[0]} would do nothing; leave that out, or at 0."
    own, again = ([nn.Parameter(torch.ones(shape)) for shape in ((4, 6), (2, 3, 4), (6,), ())] for _ in range(2))
    group = {"decays": True, "lr": 1e-2, "betas": settings.betas, "weight_decay": settings.weight_decay}
    one, other = (build_optimizer(settings, [{**group, "params": params}]) for params in (own, again))
    _step(own, one, 1)
    _step(own, one, 2)
    if any(bool((p == 1).all() or not p.isfinite().all()) for p in own):
        return "after two steps a parameter is as it was, or no number."
    for mine, theirs in zip(own, again, strict=True):
        theirs.data.copy_(mine)
        other.state[theirs] = deepcopy(one.state[mine])
        for key, value in one.state[mine].items():
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            if not (value is None or isinstance(value, int | float) or is_float):
                return f"it keeps {key!r} ({type(value).__name__}); a checkpoint holds tensors of floats, and numbers."
            if sharded and is_float and value.ndim and value.shape != mine.shape:
                return f"it keeps {key!r} of another shape than its parameter; set trainer.strategy=ddp."
    _step(own, one, 3)
    _step(again, other, 3)
    same = all(map(torch.equal, own, again))
    return None if same else "it keeps something outside of `state[parameter]`, which a checkpoint does not hold."


def _step(own: list[nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for one in own:
        one.grad = torch.randn(one.shape)
    optimizer.step()


def _of_decay(component: dict[str, Any], recipe: Recipe) -> str | None:
    steps = max(0, recipe.train.steps - recipe.train.warmup)
    factors = [DECAYS.build(component, step, steps) for step in (0, steps // 2, steps)]
    fits = all(isinstance(one, int | float) and 0 <= one < float("inf") for one in factors)
    return None if fits else f"at start, middle and end it gives {factors}; expected numbers from 0 on."


def _of_loss(component: dict[str, Any], recipe: Recipe) -> str | None:
    if not recipe.subject.encoded:
        default = component["name"] == "mse" and not component.get("by_time")
        return None if default else "an autoencoder's losses stand in `reconstruction`; leave train.loss out."
    loss = LOSSES.build(component)
    if not isinstance(loss, nn.Module) or any(True for _ in loss.parameters()):
        return "a loss is a module without parameters, which a checkpoint would not hold."
    velocity, target, time = torch.randn(2, 4, 3, 2, 2).requires_grad_(), torch.randn(2, 4, 3, 2, 2), torch.rand(2)
    value = loss(velocity, target, time)
    if fault := unlike(value, (2,), torch.float32, "forward gives"):
        return fault
    if not (value.isfinite() & (value >= 0)).all():
        return f"forward gives {value.tolist()}; expected numbers from 0 on."
    if not value.requires_grad or not torch.autograd.grad(value.sum(), velocity)[0].isfinite().all():
        return "the velocity's gradient is not there, or no number; look for detach or no_grad."
    alone = torch.allclose(loss(velocity[1:], target[1:], time[1:]), value[1:])
    return None if alone else "the loss of a sample is another one beside other samples."


def _of_callback(component: dict[str, Any], recipe: Recipe) -> str | None:
    from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar

    made = CALLBACKS.build(component)
    if not isinstance(made, Callback) or isinstance(made, Checkpoint | ProgressBar):
        return "expected a callback of Lightning's; checkpoints and progress are lingen's own."
    json.dumps(made.state_dict())  # as checkpoints hold it
    return None
