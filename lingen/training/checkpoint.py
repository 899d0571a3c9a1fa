"""What a checkpoint holds, put together from a Trainer and its module, and given back to another one.

Tensors are called ``raw.NAME`` (what is trained), ``averaged.NAME``, and after what the optimiser calls them, as
``exp_avg.NAME``. Everything else is plain values, see `state_of`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lingen.recipe.errors import RecipeError
from lingen.run_folder.intact import BrokenError, Checkpoint
from lingen.run_folder.storage import fill_rows
from lingen.training.earlier import EarlierCheckpoint
from lingen.training.state import OptimizerState, load_state_by_name, state_by_name

if TYPE_CHECKING:
    from lingen.training.base import Trained

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter, of its size."""
COPIES = ("raw", "averaged")
"""What tensors of a checkpoint are called that the optimiser does not keep."""


Stored = Checkpoint | EarlierCheckpoint
"""A checkpoint to read from, whatever its form."""


def open_checkpoint(path: Path, module: Trained) -> Stored:
    """A checkpoint of this or of the earlier form. RecipeError where it cannot be read.

    Args:
        module: its names tell whose moments a checkpoint of the earlier form holds."""
    try:
        return Checkpoint(path) if path.is_dir() else EarlierCheckpoint(path, module)
    except BrokenError as error:
        raise RecipeError(f"{path} cannot be gone on from: {error}.") from error


def tensors_of(module: Trained, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by name: no copies, and only this rank's part of what ranks share."""
    held = _copies_of(module)
    for name, values in state_by_name(module, optimizer).items():
        held |= {f"{key}.{name}": value for key, value in values.items() if isinstance(value, Tensor)}
    return held


def planned_tensors(module: Trained) -> dict[str, Tensor]:
    """Tensors of the names and sizes that a checkpoint will have once AdamW has moved every parameter. Where another
    optimiser keeps more, checkpoints are written while training waits."""
    held = _copies_of(module)
    for moment in MOMENTS:
        held |= {f"{moment}.{name}": value for name, value in module.trained_parameters().items()}
    return held


def _copies_of(module: Trained) -> dict[str, Tensor]:
    averaged = module.average.weights() if module.average is not None else {}
    copies = zip(COPIES, (module.trained_state(), averaged), strict=True)
    return {f"{copy}.{name}": value for copy, state in copies for name, value in state.items()}


def state_of(trainer: lightning.Trainer, module: Trained) -> dict[str, Any]:
    """What is no tensor, as plain values: the place in the stage, the schedule, the order of samples, the counts of the
    average, the optimiser, the ledger and of steps thrown away in a row, what steps are compared with, the scale of
    gradients in float16. The optimiser's settings are for whoever looks: a run goes on with those of its recipe."""
    counts = {
        name: {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        for name, values in state_by_name(module, trainer.optimizers[0]).items()
    }
    return {
        "step": trainer.global_step,
        "loops": trainer.fit_loop.state_dict(),
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "data": trainer.datamodule.state_dict(),  # type: ignore[attr-defined]
        "callbacks": {one.state_key: state for one in trainer.callbacks if (state := _plain_state(one))},  # type: ignore[attr-defined]
        "precision": trainer.precision_plugin.state_dict(),
        "optimizer": counts,
        "settings": [{key: one[key] for key in one if key != "params"} for one in trainer.optimizers[0].param_groups],
        "bad_steps": module.bad_steps,
        "spikes": module.spikes.state_dict(),
        "average_updates": module.average.updates if module.average is not None else 0,
    }


def _plain_state(callback: Callback) -> dict[str, Any]:
    """A callback's state. RecipeError where it is more than a checkpoint holds."""
    try:
        json.dumps(state := callback.state_dict())
    except TypeError as error:
        raise RecipeError(f"state_dict of the callback {type(callback).__name__}: {error}.") from error
    return state


def restore(stored: Stored, trainer: lightning.Trainer, module: Trained) -> None:
    """Gives a Trainer and its module what a checkpoint holds, once the strategy has set both up.

    Raises:
        RecipeError: the checkpoint is of another model.
        DataError: the shards hold other samples now."""
    state = stored.state
    if module.average is not None:
        module.average.updates = state["average_updates"]
    for name, target in _copies_of(module).items():
        if name not in stored.tensors or stored.shape(name) != target.shape:
            there = list(stored.shape(name)) if name in stored.tensors else "nothing"
            raise RecipeError(
                f"The checkpoint of step {state['step']} is of another model: for {name} it holds {there}, and this "
                f"recipe's has {list(target.shape)}. Use the recipe that it was trained with."
            )
        fill_rows(target, stored, name)
    load_state_by_name(module, trainer.optimizers[0], moments_of(stored, module))
    module.bad_steps = state["bad_steps"]
    module.spikes.load_state_dict(state.get("spikes", {}))
    if state["precision"]:
        trainer.precision_plugin.load_state_dict(state["precision"])
    trainer.datamodule.load_state_dict(state["data"])  # type: ignore[attr-defined]
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if one.state_key in state["callbacks"]:
            one.load_state_dict(state["callbacks"][one.state_key])
    trainer.fit_loop.load_state_dict(in_batches(state["loops"], state["step"], module.recipe.train.accumulate))
    for config, schedule in zip(trainer.lr_scheduler_configs, state["schedules"], strict=True):
        config.scheduler.load_state_dict(schedule)


def moments_of(stored: Stored, module: Trained) -> OptimizerState:
    """What the optimiser keeps, read as this rank holds each parameter, and in its type; names that the module lacks,
    and parameters of another shape, are left out."""
    parameters, found = module.trained_parameters(), OptimizerState()
    kept: dict[str, dict[str, str]] = {name: {} for name in stored.state["optimizer"]}
    for tensor in stored.tensors:
        key, _, name = tensor.partition(".")
        if key not in COPIES and name in kept:
            kept[name][key] = tensor
    for name, counts in stored.state["optimizer"].items():
        like = parameters.get(name)
        if like is None or stored.shape(f"raw.{name}") != like.shape:
            continue
        found[name] = counts | {key: _read_for(like, stored, tensor) for key, tensor in kept[name].items()}
    return found


def _read_for(parameter: Tensor, stored: Stored, name: str) -> Tensor:
    """What an optimiser keeps of a parameter: as that is held here, or, where it has a shape of its own, whole."""
    if stored.shape(name) != parameter.shape:
        return stored.read(name).to(parameter.device)
    value = torch.empty_like(parameter, requires_grad=False)
    fill_rows(value, stored, name)
    return value


def in_batches(loops: dict[str, Any], step: int, accumulate: int) -> dict[str, Any]:
    """The progress of a fit loop, counted in batches of which this many are accumulated: Lightning asks the number of
    batches whether a step is complete, and when to validate."""
    progress = loops["epoch_loop.batch_progress"]
    missing = step * accumulate - progress["current"]["processed"]
    counted = {
        of: progress[of] | {key: progress[of][key] + missing for key in ("ready", "started", "processed", "completed")}
        for of in ("current", "total")
    }
    return loops | {"epoch_loop.batch_progress": progress | counted}
