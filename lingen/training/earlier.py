"""Checkpoints of earlier versions: one file of torch's for a step. They are read, and never written."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lingen.run_folder.intact import BrokenError
from lingen.weights import names_now

if TYPE_CHECKING:
    from lingen.training.base import Trained


class EarlierCheckpoint:
    """One of these files, under the names of today's checkpoints. Only plain values and tensors are unpickled.

    Args:
        path: ``step-00000500.ckpt``.
        module: its groups tell the order in which AdamW counted its parameters.
    Raises:
        BrokenError: it is none, or holds an optimiser of other parameters."""

    def __init__(self, path: Path, module: Trained):
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            optimizer, average = held["optimizer_states"][0], held["average"]
            own = module.trained_state()
            raw, averaged = names_now(held["state_dict"], own), names_now(average["weights"], own)
            self.tensors: dict[str, Tensor] = {f"raw.{name}": value for name, value in raw.items()}
            known = {id(parameter): name for name, parameter in module.trained_parameters().items()}
            grouped = [{known[id(p)] for p in group["params"]} for group in module.parameter_groups()]
            names = [name for group in grouped for name in raw if name in group]  # as AdamW's groups held them
        except (KeyError, IndexError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            raise BrokenError(f"it is no checkpoint of an earlier lingen ({error})") from error
        if len(names) != sum(len(group["params"]) for group in optimizer["param_groups"]):
            raise BrokenError("its optimiser moves other parameters than this recipe's")
        self.tensors |= {f"averaged.{name}": value for name, value in averaged.items()}
        counts: dict[str, dict[str, float]] = {}
        for number, values in optimizer["state"].items():
            name = names[number]
            counts[name] = {"step": float(values["step"])}
            self.tensors |= {f"{key}.{name}": value for key, value in values.items() if key != "step"}
        self.state = _state(held, counts)

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor."""
        return self.tensors[name].shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Some rows, on the CPU."""
        value = self.tensors[name]
        return value[start:stop] if value.ndim else value


def _state(held: dict[str, Any], counts: dict[str, dict[str, float]]) -> dict[str, Any]:
    """As `checkpoint.state_of` makes it."""
    return {
        "step": held["global_step"], "loops": held["loops"]["fit_loop"], "schedules": held["lr_schedulers"],
        "data": held["ClipData"], "callbacks": held["callbacks"], "precision": held.get("MixedPrecision", {}),
        "optimizer": counts, "bad_steps": held.get("bad_steps", 0), "average_updates": held["average"]["updates"],
    }  # fmt: skip
