"""Parts of one's own in training: optimiser, decay of the learning rate, loss, callbacks."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lingen.cli import main
from lingen.launch.status import read_rows
from lingen.plan.loading import load_for_training
from lingen.recipe import load_curriculum, load_stages
from lingen.recipe.errors import RecipeError
from lingen.recipe.reading import shipped_folder
from lingen.recipe.registry import AUTOENCODERS, DECAYS, LOSSES, MIXERS, SCANS, TEXT_ENCODERS, Registry
from lingen.run import fit
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.intact import Checkpoint
from lingen.testing import check_autoencoder, check_mixer, check_scan, check_text_encoder
from lingen.training.dry_run import step_memory
from lingen.training.named import Muon
from lingen.training.weights import load_denoiser
from lingen.weights import read_weights
from tests.helpers.closeness import assert_close
from tests.helpers.commands import ROOT, lingen_command, run_python
from tests.helpers.ranks import steps_of_ranks

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
        state["count"] = state.get("count", 0) + 1
        rows = p.grad.flatten(1).mean(1) if p.ndim > 1 else p.grad.mean()
        state["rows"] = state.get("rows", 0) + rows
        p.add_(p.grad + state["rows"].mean(), alpha=-group["lr"] / state["count"])


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


class LogsRank(Callback):
    def on_train_batch_end(self, trainer, module, *_):
        module.log("rank/number", float(trainer.global_rank))
        if trainer.global_rank == 1:
            module.log("rank/second", trainer.global_step)


class Logs(Callback):
    def on_train_batch_end(self, trainer, module, *_):
        module.log("weights/norm", trainer.global_step)
        module.log("hidden", 1.0, logger=False)

    def on_validation_epoch_end(self, trainer, module):
        module.log("weights/held_out", torch.tensor(7.0))

    def on_train_epoch_end(self, trainer, module):
        self.log("weights/last", 3.0)


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


@pytest.mark.parametrize("name", ["muon", "torch.optim:NAdam", "parts_to_name:Rows"])
def test_a_stopped_run_goes_on_bit_for_bit(parts: Path, tiny_recipe: Path, name: str):
    """Whatever the optimiser keeps: momentum, products, tensors of a shape of their own, whole numbers."""
    words = [*LAST, f"train.optimizer={name}", "train.lr=1e-3", "train.warmup=2", "train.decay={name: wsd, share: 0.5}"]
    whole = fit(tiny_recipe, words, run="whole")
    fit(tiny_recipe, [*words, "stages.clips.train.steps=3"], run="parted")
    parted = fit(tiny_recipe, words, run="parted")
    held, other = tensors_after(whole), tensors_after(parted)
    assert held.keys() == other.keys() and all(torch.equal(held[key], other[key]) for key in held)
    moved = read_weights(RunFolder(whole).weights("clips"), "raw")["model.patchify.weight"]
    assert not torch.equal(moved, read_weights(RunFolder(whole).weights("images"), "raw")["model.patchify.weight"])


def test_all_four_train_and_are_not_needed_afterwards(parts: Path, tiny_recipe: Path, capsys):
    """A callback's state comes back; settings of all are checked and filled in; clips need none of them."""
    words = [*LAST, "stages.clips.train.steps=2", "train.optimizer={name: parts_to_name:Sign, bonus: 2}"]
    words += ["train.decay={name: parts_to_name:linear, end: 1}", "train.loss=parts_to_name:L1", "train.loss.gain=3"]
    words += ["trainer.callbacks={name: parts_to_name:Count, path: seen.txt}", "train.log_every=1"]
    run = fit(tiny_recipe, words, run="run")
    fit(tiny_recipe, [*words, "stages.clips.train.steps=3"], run="run")
    assert (parts / "seen.txt").read_text().splitlines() == ["images 1", "clips 2", "clips 3"]
    held = (run / "recipe.yaml").read_text()
    assert "{name: 'parts_to_name:Sign', bonus: 2}" in held and "path: seen.txt" in held and "every: 1" in held
    (parts / "parts_to_name.py").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(__import__("sys").modules, "parts_to_name")
        assert load_denoiser(run).recipe.train.loss["name"] == "parts_to_name:L1"
        with pytest.raises(RecipeError, match="Cannot load 'parts_to_name:Sign'"):
            load_for_training(run / "recipe.yaml")


MISTAKES = [
    ("train: {optimizer: adamx}", "There is no optimiser called 'adamx'. Did you mean 'adamw'? Known: adamw, muon."),
    (
        "train: {optimizer: {name: muon, momentum: 2}}",
        "Expected a number from 0 to 1, got 2. (at stages.",
    ),
    ("train: {optimizer: {name: muon, lr: 1}}", "'lr' is not set here but by train.lr."),
    ("train: {optimizer: {name: 'torch.optim:SGD', lr: 1}}", "'lr' is not set here but by train.lr."),
    ("train: {optimizer: {name: 'torch.optim:SGD', momentom: 1}}", "Did you mean 'momentum'?"),
    ("train: {optimizer: 'torch.optim:Rprop', weight_decay: 0.1}", "it takes no `weight_decay`, so train.weight_decay"),
    (
        "train: {optimizer: 'torch.optim:SGD', betas: [0.8, 0.9]}",
        "it takes no `betas`, so train.betas would do nothing",
    ),
    ("train: {optimizer: 'torch.optim:LBFGS', weight_decay: 0}", "it fails: "),
    ("train: {optimizer: parts_to_name:Hidden}", "it keeps something outside of `state[parameter]`"),
    ("train: {optimizer: parts_to_name:Lists}", "it keeps 'past' (list)"),
    ("train: {optimizer: parts_to_name:Idle}", "after two steps a parameter is as it was"),
    ("trainer: {strategy: fsdp}, train: {optimizer: muon}", "set trainer.strategy=ddp or train.optimizer=adamw."),
    ("trainer: {strategy: fsdp}, train: {optimizer: parts_to_name:Rows}", "of another shape than its parameter"),
    ("train: {decay: cosin}", "There is no decay called 'cosin'. Did you mean 'cosine'?"),
    ("train: {decay: {name: wsd, share: 2}}", "Expected a number from 0.001 to 1, got 2."),
    ("train: {decay: parts_to_name:negative}", "at start, middle and end it gives [-1.0, -1.0, -1.0]"),
    ("train: {loss: null}", "There is no loss named here. Known: huber, mse."),
    ("train: {loss: {name: mse, by_time: [1, -1]}}", "Expected at least 0, got -1. (at "),
    ("train: {loss: parts_to_name:Total}", "forward gives []; expected [2]."),
    ("train: {loss: parts_to_name:Detached}", "the velocity's gradient is not there"),
    ("train: {loss: parts_to_name:Together}", "the loss of a sample is another one beside other samples"),
    ("train: {loss: parts_to_name:Learned}", "a loss is a module without parameters"),
    ("trainer: {callbacks: parts_to_name:Count}", "'Count' needs 'path'"),
    ("trainer: {callbacks: parts_to_name:L1}", "expected a callback of Lightning's"),
    ("trainer: {callbacks: parts_to_name:ModelCheckpoint}", "checkpoints and progress are lingen's own"),
    ("trainer: {callbacks: parts_to_name:Tensors}", "it fails: TypeError: Object of type Tensor is not JSON"),
]


@pytest.mark.parametrize(("setting", "told"), MISTAKES, ids=[setting for setting, _ in MISTAKES])
def test_a_mistake_is_one_line_with_its_place(parts: Path, setting: str, told: str):
    """In the second stage, before anything trains."""
    lines = ["data: {synthetic: shapes, frames: 4, size: [16, 16]}", "trainer: {accelerator: cpu, logger: false}"]
    lines += ["model: {dim: 16, depth: 1, patch: [1, 4, 4], mixer: {name: attention, num_heads: 2}}"]
    (parts / "r.yaml").write_text("\n".join([*lines, f"stages: {{one: {{data: {{frames: 1}}}}, two: {{{setting}}}}}"]))
    with pytest.raises(RecipeError) as error:
        load_for_training("r.yaml")
    (problem,) = error.value.problems
    assert problem.startswith("r.yaml:4: ") and told in problem and "(at stages.two.train" in problem, problem


def test_moments_of_another_optimiser_are_not_handed_over(parts: Path, tiny_recipe: Path):
    words = ["stages.clips.train.optimizer=muon", "stages.clips.train.keep_optimizer=true"]
    with pytest.raises(RecipeError, match="The stage before trains with another optimiser: its moments do not fit"):
        load_curriculum(tiny_recipe, words)


@pytest.mark.slow
def test_what_a_callback_logs_on_several_ranks_or_on_one_is_their_mean(parts: Path, tiny_recipe: Path):
    batch = "stages.images.data.batch={image: 1, video: 1}"
    words = ["trainer.devices=2", "trainer.strategy=ddp", "train.log_every=2", batch, "train.steps=2"]
    command = lingen_command("fit", "--recipe", str(tiny_recipe), "--stage", "images", "--run", "run", *words,
                             "trainer.callbacks=parts_to_name:LogsRank")  # fmt: skip
    paths = os.pathsep.join([str(parts), str(ROOT)])
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"PYTHONPATH": paths})
    with Path("run/metrics.csv").open(newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if row["loss"])
    assert (float(row["rank/number"]), float(row["rank/second"])) == (0.5, 1.5)


def test_what_a_callback_logs_joins_the_rows(parts: Path, tiny_recipe: Path, capsys):
    """As means since the row before, and in TensorBoard under the stage and the steps of the whole run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["stages.clips.train.steps=4", "stages.clips.train.validate_every=4", "train.log_every=2"]
    run = fit(tiny_recipe, [*words, "trainer.logger=tensorboard", "trainer.callbacks=parts_to_name:Logs"], run="run")
    with (run / "metrics.csv").open(newline="") as file:
        rows = {(row["stage"], int(row["step"])): row for row in csv.DictReader(file)}
    norms = {place: float(row["weights/norm"]) for place, row in rows.items()}
    assert norms == {("images", 2): 1.5, ("clips", 2): 1.5, ("clips", 4): 3.5} and "hidden" not in rows["clips", 4]
    assert [rows["clips", 4][f"weights/{name}"] for name in ("held_out", "last")] == ["7.0", "3.0"]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("clips/weights/norm")] == [(4, 1.5), (6, 3.5)]
    assert not {"weights/norm", "hidden"} & {*events.Tags()["scalars"]}
    assert main(["compare", str(run), str(run), "--metric", "weights/norm"]) == 0
    assert "weights/norm" in capsys.readouterr().out


def test_fit_of_python_tells_how_it_goes(here: Path, tiny_recipe: Path, caplog, capsys):
    """Lines of the command; where nobody has set logging up, they are shown."""
    words = [*LAST, "stages.clips.train.steps=1"]
    with caplog.at_level("INFO", "lingen"):
        fit(tiny_recipe, words, run="run")
    assert {"run folder: run", "stage 2/2 clips: 1 steps"} <= {*caplog.messages}
    assert [line for line in caplog.messages if re.match(r"clips 1/1  loss \d", line)]
    code = f"import lingen; lingen.fit({str(tiny_recipe)!r}, {words!r}, run='other')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert "\nstage 2/2 clips: 1 steps\n" in done.stderr and not done.stdout


class Counted(Callback):
    """Counts steps; what it counted is in checkpoints, as a text that JSON holds, or as what it does not hold."""

    def __init__(self, kept: Any = int):
        self.count, self.kept = 0, kept

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count += 1
        pl_module.log("counted", float(self.count), False, True)

    def state_dict(self):
        return {"count": self.kept(self.count)}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


def test_a_callback_from_python_is_in_the_checkpoint_of_its_step(here: Path, tiny_recipe: Path):
    words = [*LAST, "stages.images.train.steps=2", "train.log_every=1"]
    run = fit(tiny_recipe, [*words, "stages.clips.train.steps=3"], run="run", callbacks=[Counted()])
    again = Counted()
    fit(tiny_recipe, [*words, "stages.clips.train.steps=4"], run="run", callbacks=[again])
    assert again.count == 6  # as many as the run has steps
    assert [row["counted"] for row in read_rows(RunFolder(run))] == ["1.0", "2.0", "3.0", "4.0", "5.0", "6.0"]
    with pytest.raises(RecipeError, match="state_dict of the callback Counted: .*Tensor is not JSON serializable"):
        fit(tiny_recipe, words, run="other", callbacks=[Counted(torch.tensor)])


def test_a_callback_that_ends_a_stage_ends_the_run(parts: Path, tiny_recipe: Path):
    with pytest.raises(RecipeError, match="A callback ended stage 'images' at step 1 of 2. Stages end by train.steps"):
        fit(tiny_recipe, ["trainer.callbacks=parts_to_name:Stops"], run="run")
    with pytest.raises(ValueError, match="not today"):
        fit(tiny_recipe, ["trainer.callbacks=parts_to_name:Raises"], run="other")


def test_decays():
    wsd = [DECAYS.build({"name": "wsd", "share": 0.5}, step, 8) for step in (0, 4, 5, 8)]
    assert wsd == [1, 1, 0.5, 0]
    assert [DECAYS.build("cosine", step, 2) for step in (0, 1, 2)] == [1, pytest.approx(0.5), 0]
    assert [DECAYS.build(name, 0, 0) for name in ("constant", "cosine", "wsd")] == [1, 1, 1]  # all is warm-up


def test_losses():
    velocity, target = torch.randn(3, 4, 2, 2, 2), torch.randn(3, 4, 2, 2, 2)
    time = torch.tensor([0.0, 0.75, 1.0])
    squared = (velocity - target).square().mean((1, 2, 3, 4))
    assert torch.equal(LOSSES.build("mse")(velocity, target, time), squared)
    by_time = LOSSES.build({"name": "mse", "by_time": [1, 3, 0]})(velocity, target, time)
    assert_close("by time", by_time, squared * torch.tensor([1, 1.5, 0]), 1e-6)
    wide = LOSSES.build({"name": "huber", "delta": 100})(velocity, target, time)
    assert_close("huber", wide, squared / 2, 1e-6)
    narrow = LOSSES.build({"name": "huber", "delta": 0.01})(velocity, target, time)
    assert (narrow < 0.011 * (velocity - target).abs().mean((1, 2, 3, 4))).all()


def test_muon_moves_matrices_and_adamw_the_rest(monkeypatch: pytest.MonkeyPatch):
    """Against torch's two optimisers, each over its own parameters; convolutions and what has no decay are AdamW's.
    torch's Muon knows bfloat16 alone, ours takes float32 on a CPU."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    shapes, steps = {"matrix": (4, 6), "conv": (2, 3, 4), "table": (5, 4), "bias": (6,)}, 3
    ours, theirs = ({name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()} for _ in range(2))
    shared = {"lr": 0.1, "betas": (0.8, 0.9)}
    groups = [{"params": [ours["matrix"], ours["conv"]], "decays": True, "weight_decay": 0.3, **shared}]
    groups += [{"params": [ours["table"], ours["bias"]], "decays": False, "weight_decay": 0.0, **shared}]
    optimizer = Muon(groups, momentum=0.9)
    muon = torch.optim.Muon([theirs["matrix"]], 0.1, 0.3, 0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [
            {"params": [theirs["conv"]], "weight_decay": 0.3},
            {"params": [theirs["table"], theirs["bias"]], "weight_decay": 0.0},
        ],
        **shared,
    )
    for _ in range(steps):
        for name, shape in shapes.items():
            ours[name].grad = torch.randn(shape)
            theirs[name].grad = ours[name].grad.clone()
        for one in (optimizer, muon, adamw):
            one.step()
    for name in shapes:
        assert_close(name, ours[name], theirs[name], 1e-6)
    assert optimizer.state[ours["matrix"]].keys() == {"momentum_buffer"}


@pytest.mark.slow
def test_a_dry_run_counts_what_the_optimiser_keeps():
    """Of a matrix Muon keeps one tensor, where AdamW keeps two."""
    (recipe,) = load_stages("quickstart_cpu", ["model.depth=1"])[:1]
    matrices = sum(p.numel() for p in _matrices(recipe))
    kept = {}
    for name in ("adamw", "muon"):
        train = dataclasses.replace(recipe.train, optimizer={"name": name})
        kept[name] = step_memory(dataclasses.replace(recipe, train=train)).optimizer
    assert kept["adamw"] - kept["muon"] == 4 * matrices


def _matrices(recipe):
    module = recipe.subject.build_module(recipe)
    return [p for name, p in module.trained_parameters().items() if p.ndim == 2 and name in module.decayed]


@pytest.mark.slow
def test_shards_of_an_optimiser_of_ones_own_go_on_bit_for_bit(parts: Path, tiny_recipe: Path):
    """Two ranks, each with its rows of what the optimiser keeps."""
    words = ["train.optimizer=parts_to_name:Sign", "trainer.strategy=fsdp", "train.lr=1e-3", "sample.prompts=[]"]
    trials = [
        {"recipe": str(tiny_recipe), "run": parts / run, "stage": "images"}
        | {"overrides": [*words, f"stages.images.train.steps={steps}"]}
        for run, steps in (("whole", 4), ("parted", 2), ("parted", 4))
    ]
    steps_of_ranks(trials, 2)
    held, other = (tensors_after(parts / run, "images") for run in ("whole", "parted"))
    assert held.keys() == other.keys() and "mean.model.patchify.weight" in held
    assert all(torch.equal(held[key], other[key]) for key in held)


# what a package of one's own is tested with


class Mixer(nn.Module):
    def __init__(self, dim: int, layer: int, *, gain: float = 1.0):
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x)


class Random(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn_like(x)


class AcrossSamples(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(0)


class Unused(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class OnlyClips(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :2]


def no_order(t: int, h: int, w: int) -> Tensor:
    return torch.zeros(t * h * w, dtype=torch.long)


class RandomText(nn.Module):
    dim = 4

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        return torch.randn(len(texts), 3, 4), torch.ones(len(texts), 3, dtype=torch.bool)


class OneFrame(nn.Module):
    strides, channels = (1, 1, 1), 3

    def encode(self, video: Tensor) -> Tensor:
        return video[:, :, :1]

    decode = encode


@pytest.mark.parametrize(
    ("check", "part", "told"),
    [
        (check_mixer, Random, "something else the second time"),
        (check_mixer, AcrossSamples, "depends? on the others of its batch"),
        (check_mixer, Unused, "No gradient reaches proj.weight, proj.bias"),
        (check_mixer, OnlyClips, r"A \(3, 5, 6\) grid gives"),
        (check_scan, no_order, "does not visit each"),
        (check_text_encoder, RandomText, "something else the second time"),
        (check_autoencoder, OneFrame, r"\[1, 3, 2, 2, 2\] gives \[1, 3, 1, 2, 2\]"),
    ],
)
def test_a_broken_contract_fails_its_check(check, part, told: str):
    with pytest.raises((AssertionError, RecipeError), match=told):
        check(part)


def test_settings_of_a_check_are_those_of_a_recipe():
    check_mixer(Mixer, dim=8, gain=2.0)
    with pytest.raises(AssertionError, match="Key 'gian' not in 'Mixer'. Did you mean 'gain'?"):
        check_mixer(Mixer, gian=2.0)


GROUPS: dict[str, Registry] = {
    "mixer": MIXERS,
    "scan": SCANS,
    "text": TEXT_ENCODERS,
    "autoencoder": AUTOENCODERS,
}


@pytest.mark.slow
def test_a_new_package_passes_its_test(here: Path, capsys):
    assert GROUPS.keys() == {path.name for path in shipped_folder("templates").iterdir() if path.is_dir()}
    for what, registry in GROUPS.items():
        assert main(["new", what, f"my_{what}"]) == 0
        assert f"pip install -e my_{what} && pytest my_{what}, then " in capsys.readouterr().out
        project = tomllib.loads((here / f"my_{what}" / "pyproject.toml").read_text())["project"]
        assert project["name"] == f"my_{what}" and list(project["entry-points"]) == [registry.group]
    assert "8 passed" in run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"my_{what}" for what in GROUPS))
    capsys.readouterr()
    assert main(["new", "mixer", "my_mixer"]) == main(["new", "scan", "No-Name"]) == 2
    there, named = capsys.readouterr().err.splitlines()
    assert "my_mixer is there already" in there and "small letters, digits and _" in named


@pytest.mark.slow
def test_the_examples_of_the_page_run(here: Path, tiny_recipe: Path, capsys):
    """docs/extend.md: its Python blocks are the files that they name, its commands run beside them."""
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    for text in re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S):
        (here / text.partition("\n")[0].removeprefix("# ")).write_text(text)
    commands = [
        line for text in re.findall(r"^```sh\n(.*?)^```$", page, flags=re.M | re.S) for line in text.splitlines()
    ]
    assert len(commands) >= 6
    for line in commands:
        words = shlex.split(line.replace("quickstart_cpu", str(tiny_recipe)))
        assert words[0] == "lingen" and main(words[1:]) == 0, (line, capsys.readouterr().err)
    assert (here / "mean_error.txt").read_text()
