"""Parts of one's own in training: optimiser, decay of the learning rate, loss, callbacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lingen.run import fit
from lingen.training.folder import RunFolder
from lingen.training.intact import Checkpoint
from lingen.weights import read_weights

PARTS = """\
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn


class Sign(torch.optim.Optimizer):
    def __init__(self, params, lr, weight_decay=0.0, betas=(0.9, 0.99), bonus=1.0):
        super().__init__(params, {"bonus": bonus})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(group, p, self.state[p])
        return loss

    def move(self, group, p, state):
        first, second = group["betas"]
        state.setdefault("mean", torch.zeros_like(p))
        state["count"] = state.get("count", 0) + 1
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(state["mean"].lerp(p.grad, 1 - first).sign(), alpha=-group["lr"] * group["bonus"] / state["count"])
        state["mean"].lerp_(p.grad, 1 - second)


class Rows(Sign):
    def move(self, group, p, state):
        state["mean"] = state.get("mean", 0) + p.grad.flatten(1).mean(1) if p.ndim > 1 else p.grad.mean()
        p.add_(p.grad, alpha=-group["lr"])


class Hidden(Sign):
    count = 0

    def move(self, group, p, state):
        self.count += 1
        p.add_(p.grad, alpha=-group["lr"] / self.count)


class Lists(Sign):
    def move(self, group, p, state):
        state["past"] = [p.grad]
        p.add_(p.grad, alpha=-group["lr"])


class Idle(Sign):
    def move(self, group, p, state):
        pass


def linear(step, steps, *, end: float = 0.0):
    return 1 - (1 - end) * step / max(1, steps)


def negative(step, steps):
    return -1.0


class L1(nn.Module):
    def __init__(self, *, gain: float = 1.0):
        super().__init__()
        self.gain = gain

    def forward(self, velocity, target, time):
        return self.gain * (velocity - target).abs().flatten(1).mean(1)


class Total(L1):
    def forward(self, velocity, target, time):
        return super().forward(velocity, target, time).mean()


class Detached(L1):
    def forward(self, velocity, target, time):
        return super().forward(velocity.detach(), target, time)


class Together(L1):
    def forward(self, velocity, target, time):
        losses = super().forward(velocity, target, time)
        return losses / losses.detach().mean()


class Learned(L1):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Count(Callback):
    def __init__(self, path, every=1):
        self.path, self.every, self.seen = path, every, 0

    def on_train_batch_end(self, *_):
        self.seen += 1

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]

    def on_train_end(self, trainer, module):
        with open(self.path, "a") as file:
            print(module.recipe.stage, self.seen, file=file)


class Tensors(Callback):
    def state_dict(self):
        return {"seen": torch.zeros(2)}


class Raises(Callback):
    def on_train_batch_end(self, *_):
        raise ValueError("not today")


class Stops(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = True
"""
LAST = ["stages.images.train.steps=1"]
"""So that the second stage is the one that is tried."""


@pytest.fixture
def parts(here: Path) -> Path:
    (here / "parts_to_name.py").write_text(PARTS)
    return here


def tensors_after(run: Path, stage: str = "clips") -> dict[str, torch.Tensor]:
    """What the newest checkpoint of a stage holds."""
    held = Checkpoint(RunFolder(run).checkpoints(stage)[-1])
    return {name: held.read(name) for name in held.tensors}


OPTIMIZERS = ["adamw", "muon", "parts_to_name:Sign", "torch.optim:SGD", "torch.optim:NAdam", "parts_to_name:Rows"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stopped_run_goes_on_bit_for_bit(parts: Path, tiny_recipe: Path, name: str):
    """Whatever the optimiser keeps: momentum, plain counts, tensors of a shape of their own."""
    words = [*LAST, f"train.optimizer={name}", "train.lr=1e-3", "train.warmup=2", "train.decay={name: wsd, share: 0.5}"]
    if name.startswith("torch"):
        words += ["train.weight_decay=0"]
    if name.endswith("SGD"):
        words += ["train.optimizer.momentum=0.9"]
    whole = fit(tiny_recipe, words, run="whole")
    fit(tiny_recipe, [*words, "stages.clips.train.steps=3"], run="parted")
    parted = fit(tiny_recipe, words, run="parted")
    held, other = tensors_after(whole), tensors_after(parted)
    assert held.keys() == other.keys() and all(torch.equal(held[key], other[key]) for key in held)
    moved = read_weights(RunFolder(whole).weights("clips"), "raw")["model.patchify.weight"]
    assert not torch.equal(moved, read_weights(RunFolder(whole).weights("images"), "raw")["model.patchify.weight"])
