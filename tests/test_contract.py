"""Parts of others are tried before anything trains: what breaks its contract is named by the recipe's line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lingen
from lingen.cli import main
from lingen.plan.loading import load_for_training
from lingen.recipe import load_curriculum

PARTS = """\
import torch
from torch import nn


class Mixer(nn.Module):
    def __init__(self, dim, layer):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Good(Mixer):
    def forward(self, x):
        return x * self.weight


class LooksAtNumbers(Mixer):
    def forward(self, x):
        return x * self.weight if x.sum().item() > -1e9 else x


class Shorter(Mixer):
    def forward(self, x):
        return x[:, :, :, 1:] * self.weight


class Half(Mixer):
    def forward(self, x):
        return (x * self.weight).half()


class Fails(Mixer):
    def forward(self, x):
        return x @ self.weight.view(-1, 1) @ x


class Detaches(Mixer):
    def forward(self, x):
        return x.detach() * self.weight.detach()


class OnCuda(Mixer):
    def forward(self, x):
        if not x.is_cuda:
            raise ValueError("a pointer that Triton cannot read")
        return x * self.weight


class SaysSo(OnCuda):
    cuda_only = True


class SeesOthers(Mixer):
    def forward(self, x):
        return self.weight * (x - x.mean(0, keepdim=True))


class TakesAll(Mixer):
    def __init__(self, dim, layer, **kwargs):
        super().__init__(dim, layer)

    forward = Good.forward


class OneGrid(Mixer):
    def __init__(self, dim, layer):
        super().__init__(dim, layer)
        self.position = nn.Parameter(torch.zeros(2, 4, 4, dim))

    def forward(self, x):
        return x * self.weight + self.position


class NotANumber(Mixer):
    def forward(self, x):
        return (x * self.weight).sqrt()


class SteepAtZero(Mixer):
    def forward(self, x):
        return x * self.weight + (0 * x).sqrt()


def first_only(t, h, w):
    return torch.zeros(t * h * w, dtype=torch.long)


def no_return(t, h, w):
    torch.arange(t * h * w)


def floats(t, h, w):
    return torch.arange(t * h * w).float()


def not_when_long(t, h, w):
    order = torch.arange(t * h * w)
    return order if t <= 2 else order.clamp(min=1)


class Text(nn.Module):
    dim = 4

    def encode(self, texts):
        return torch.zeros(len(texts), 3, 4), torch.ones(len(texts), 3, dtype=torch.bool)


class Silent(nn.Module):
    dim = 4


class Narrow(Text):
    def encode(self, texts):
        return torch.zeros(len(texts), 3, 5), torch.ones(len(texts), 3, dtype=torch.bool)


class Floats(Text):
    def encode(self, texts):
        return torch.zeros(len(texts), 3, 4), torch.ones(len(texts), 3)


class Parts(Text):
    trainable, parts, first = True, True, 1

    def encode(self, texts):
        numbers = torch.tensor([self.first, self.first + 1, 0])
        return torch.zeros(len(texts), 3, 4), numbers.where(torch.tensor([[bool(text)] for text in texts]), 0)


class FromTwoOn(Parts):
    first = 2


class NoNumbers(Text):
    trainable = parts = True


class FrozenParts(Parts):
    trainable = False


class Flat(nn.Module):
    channels, strides = 3, (1, 1, 1)

    def encode(self, video):
        return video

    def decode(self, latents):
        return latents


class NoStrides(nn.Module):
    channels = 3
    encode = decode = Flat.encode


class Doubles(Flat):
    def encode(self, video):
        return torch.cat([video, video], 1)


class Grows(Flat):
    def decode(self, latents):
        return latents.repeat_interleave(2, 3)
"""


@pytest.fixture
def parts(here: Path) -> Path:
    (here / "parts_to_try.py").write_text(PARTS)
    return here


def recipe_with(folder: Path, section: str, text: str) -> str:
    """A small recipe whose fourth line is this section."""
    other = {"model": "model: {dim: 16, depth: 1, patch: [1, 4, 4], mixer: {name: attention, num_heads: 2}}"}
    lines = ["data: {synthetic: shapes, frames: 4, size: [16, 16]}", "trainer: {accelerator: cpu, logger: false}"]
    lines += ["stages: {one: {data: {frames: 1}}, two: {}}", text]
    lines += [line for name, line in other.items() if name != section]
    (folder / "r.yaml").write_text("\n".join(lines) + "\n")
    return "r.yaml"


def mixer(text: str) -> str:
    return f"model: {{dim: 16, depth: 2, patch: [1, 4, 4], mixer: {text}}}"


FAULTS = [
    ("model", mixer("parts_to_try:Shorter"), "forward gives [1, 2, 4, 3, 16]; expected [1, 2, 4, 4, 16]"),
    ("model", mixer("parts_to_try:Half"), "forward gives torch.float16; expected torch.float32"),
    ("model", mixer("parts_to_try:Fails"), "forward fails: RuntimeError: "),
    ("model", mixer("parts_to_try:Fails"), "(parts_to_try.py:33)"),
    ("model", mixer("parts_to_try:Detaches"), "gives a tensor without a gradient"),
    ("model", mixer("parts_to_try:SeesOthers"), "depends on the others of its batch"),
    ("model", mixer("parts_to_try:TakesAll"), "its `**kwargs` would take a key with a typing mistake"),
    ("model", mixer("parts_to_try:OneGrid"), "OneGrid': forward fails on the 4x4x4 tokens of a batch: "),
    (
        "model",
        mixer("{name: mamba2, head_dim: 8, scan: 'parts_to_try:no_return'}"),
        "'no_return' gives NoneType",
    ),
    ("model", mixer("{name: mamba2, head_dim: 8, scan: 'parts_to_try:floats'}"), "'floats' gives torch.float32"),
    ("model", mixer("parts_to_try:NotANumber"), "forward of normal numbers gives NaN or infinity"),
    ("model", mixer("parts_to_try:SteepAtZero"), "the gradient of its forward is NaN or infinite"),
    ("model", mixer("{name: mate, ma: null, te: 'parts_to_try:Shorter'}"), "expected [1, 2, 4, 4, 16]"),
    (
        "model",
        mixer("{name: mamba2, head_dim: 8, scan: 'parts_to_try:first_only'}"),
        "'first_only' does not visit each",
    ),
    ("model", mixer("{name: mamba2, head_dim: 8, scan: 'parts_to_try:not_when_long'}"), "of a (4, 4, 4) grid once"),
    ("text", "text: parts_to_try:Silent", "it has no method `encode`"),
    ("text", "text: parts_to_try:Narrow", "gives tokens [2, 3, 5]; expected [2, n, 4]"),
    ("text", "text: parts_to_try:Floats", "gives a mask torch.float32; expected torch.bool"),
    ("text", "text: parts_to_try:FromTwoOn", "numbers the parts of a text [2, 3]; expected 1, 2, ..., none left out"),
    ("text", "text: parts_to_try:FrozenParts", "it tells `parts` and is not `trainable`"),
    ("text", "text: parts_to_try:NoNumbers", "gives a mask torch.bool; expected torch.int64"),
    ("autoencoder", "autoencoder: parts_to_try:NoStrides", "its `strides` are three whole numbers (t, h, w)"),
    ("autoencoder", "autoencoder: parts_to_try:Doubles", "gives [1, 6, 1, 2, 2]; expected [1, 3, 1, 2, 2]"),
    ("autoencoder", "autoencoder: parts_to_try:Grows", "decode of [1, 3, 1, 2, 2] gives [1, 3, 1, 4, 2]"),
]


@pytest.mark.parametrize(("section", "text", "told"), FAULTS, ids=[f"{n}" for n in range(len(FAULTS))])
def test_a_part_that_breaks_its_contract_is_named_by_its_line(parts: Path, capsys, section: str, text: str, told: str):
    recipe = recipe_with(parts, section, text)
    for command in ("show", "doctor", "fit"):
        assert main([command, "--recipe", recipe]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("r.yaml:4: ") and told in lines[0], lines
    assert not (parts / "runs").exists()


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ("model", mixer("parts_to_try:Good")),
        ("model", mixer("parts_to_try:LooksAtNumbers")),
        ("text", "text: parts_to_try:Text"),
        ("text", "text: parts_to_try:Parts"),
        ("text", "text: [parts_to_try:Parts, parts_to_try:Text, bytes]"),
        ("autoencoder", "autoencoder: parts_to_try:Flat"),
    ],
)
def test_parts_that_keep_their_contract_pass(parts: Path, section: str, text: str):
    assert load_curriculum(recipe_with(parts, section, text)).names == ["one", "two"]


def test_a_mixer_that_runs_on_cuda_alone_says_so(parts: Path, capsys):
    told = recipe_with(parts, "model", mixer("{name: mate, te: 'parts_to_try:SaysSo', head_dim: 8}"))
    assert load_curriculum(told, ["trainer.accelerator=auto"]).names == ["one", "two"]
    assert main(["fit", "--recipe", told, "trainer.accelerator=cpu"]) == 2
    assert "The mixer 'mate': it runs on CUDA alone, but trainer.accelerator is cpu" in capsys.readouterr().err
    untold = recipe_with(parts, "model", mixer("parts_to_try:OnCuda"))
    assert main(["show", "--recipe", untold, "trainer.accelerator=auto"]) == (0 if torch.cuda.is_available() else 2)
    said = capsys.readouterr().err
    assert ("let its class say `cuda_only = True`" in said) != torch.cuda.is_available(), said


LOGGER = """\
class Plain:
    pass


def needs_more(where, project):
    return Plain()
"""


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("logger: nope", "There is no logger called 'nope'. Known: tensorboard, "),
        ("logger: [false_one]", "There is no logger called 'false_one'"),
        ("logger: {save_dir: x}", "A logger is a name, or has one"),
        ("logger: wandb", "The logger 'wandb' needs the package wandb, which is not installed"),
        ("logger: 'lightning.pytorch.loggers:CometLogger'", "needs the package comet_ml, which is not installed"),
        ("logger: 'loggers_to_try:Nowhere'", "Cannot load 'loggers_to_try:Nowhere': AttributeError"),
        ("logger: 'loggers_to_try:Plain'", "is no logger of Lightning: it has no method `log_metrics`"),
        ("logger: {name: 'loggers_to_try:needs_more', where: x}", "missing a required argument: 'project'"),
        ("strategy: dpd", "There is no strategy called 'dpd'. Did you mean 'ddp'? Known: auto, ddp,"),
        (
            "accelerator: cdua",
            "There is no accelerator called 'cdua'. Did you mean 'cuda'? Known: auto, cpu, cuda, gpu",
        ),
        ("profiler: fast", "There is no profiler called 'fast'. Known: advanced, pytorch, simple, xla"),
        ("precision: 17-mixed", "trainer.precision"),
        ("callbacks: [x:Y]", "Cannot load 'x:Y'"),
        ("callbacks: 5", "Callbacks are a list of components"),
        ("plugins: [x]", "'plugins' is not set here but by lingen's own"),
    ],
)
def test_what_the_trainer_does_not_have_is_named_by_its_line(here: Path, capsys, setting: str, told: str):
    """In the second stage, of which nothing is built before the first has trained."""
    (here / "loggers_to_try.py").write_text(LOGGER)
    lines = ["data: {synthetic: shapes, frames: 4, size: [16, 16]}", "trainer: {accelerator: cpu, logger: false}"]
    lines += ["stages:", "  one: {data: {frames: 1}}", "  two:", "    trainer:", f"      {setting}"]
    (here / "r.yaml").write_text("\n".join(lines) + "\n")
    for command in ("show", "doctor", "fit"):
        assert main([command, "--recipe", "r.yaml"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("r.yaml:7: ") and told in lines[0], lines
    assert not (here / "runs").exists()


def test_a_run_is_sampled_where_its_logger_is_not(here: Path):
    """Weights hold their recipe, with a logger that is installed only where they were trained."""
    recipe = lingen.load_recipe("quickstart_cpu", ["trainer.logger=wandb"])
    assert recipe.trainer["logger"] == "wandb"
    with pytest.raises(lingen.RecipeError, match="needs the package wandb"):
        load_for_training("quickstart_cpu", ["trainer.logger=wandb"])
