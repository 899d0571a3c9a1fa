"""Steps as CUDA graphs: on a GPU they are recorded and played, elsewhere the same function runs on the same buffers."""

from __future__ import annotations

import csv
import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lingen.recipe.errors import RecipeError
from lingen.run import NonFiniteError, Reporter, fit, fit_curriculum, load_for_training
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.intact import Checkpoint
from lingen.text.small import Words
from lingen.training import base
from lingen.training.graph import READ_EVERY, StepGraphs
from lingen.training.named import Muon

NAN = (
    'autoencoder={name: "tests.helpers.frozen:Pooling", nan_above: -0.62}', "model.patch=[1, 1, 1]",
    "train.max_nonfinite=99",
)  # fmt: skip
"""Some clips are too bright."""
BAD = [*NAN[:2], "autoencoder.nan_above=-2", "train.max_nonfinite=3", "train.log_every=50"]


@pytest.fixture
def words(device: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides for the device; without graphs AdamW is one kernel on the CPU, too."""
    monkeypatch.setattr(base, "fused_here", lambda module: True)
    told = ["train.log_every=5", "stages.images.train.steps=6", "sample.prompts=[]"]
    large = ["model.dim=64", "model.mixer={name: mate, state_dim: 16, head_dim: 32, window: [2, 2, 2]}"]
    return [*told, *large, "trainer.accelerator=gpu"] if device == "cuda" else told


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The keys of what was recorded."""
    keys: list[Any] = []
    record = StepGraphs._record

    def noted(self: StepGraphs, key: Any, *args: Any) -> None:
        record(self, key, *args)
        assert self._known[key] is not None
        keys.append(key)

    monkeypatch.setattr(StepGraphs, "_record", noted)
    return keys


def end_of(run: Path, stage: str = "clips") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain values of the newest checkpoint."""
    stored = Checkpoint(max((run / "stages" / stage).glob("step-*")))
    return {name: stored.read(name) for name in stored.tensors}, stored.state


def rows_of(run: Path) -> list[dict[str, str]]:
    """Without the times, and what is computed of them."""
    with RunFolder(run).metrics.open() as file:
        rows = list(csv.DictReader(file))
    return [
        {name: value for name, value in row.items() if not re.search("_per_second|^time/|^[mh]fu$", name)}
        for row in rows
    ]


def assert_same(one: Path, other: Path, *but: str) -> None:
    (tensors, state), (others, states) = end_of(one), end_of(other)
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    for name in state.keys() - {*but}:
        assert state[name] == states[name], name
    columns = [row.keys() for row in rows_of(one)]
    assert columns == [row.keys() for row in rows_of(other)]
    for row, its in zip(rows_of(one), rows_of(other), strict=True):
        assert {name: (value, its[name]) for name, value in row.items() if value != its[name]} == {}


@pytest.mark.parametrize(
    "more",
    [
        ["stages.clips.train.steps=24", "train.checkpoint_every=7"],
        ["stages.clips.train.steps=12", "train.accumulate=3", "train.ema={width: 0.1}", "trainer.precision=bf16-mixed"],
        ["stages.clips.train.steps=20", "model.checkpointing=true", "text=bytes", "train.log_every=50"],
        ["stages.clips.train.steps=24", "train.optimizer=muon", "trainer.precision=bf16-mixed"],
        ["stages.clips.train.steps=30", *NAN],
        ["stages.clips.train.steps=30", *NAN, "train.optimizer=muon"],
    ],
    ids=["plain", "accumulated", "recomputed", "muon", "not finite", "not finite, muon"],
)
def test_graphs_change_no_bit(
    more: list[str], words: list[str], tiny_recipe: Path, tmp_path: Path, recorded: list[Any]
):
    for how in ("off", "graph"):
        fit(tiny_recipe, [*words, *more, f"train.compile={how}"], run=tmp_path / how)
    assert len(recorded) >= 4
    assert_same(tmp_path / "off", tmp_path / "graph")
    if more[1:4] == [*NAN]:
        bad = sum(float(row["nonfinite_steps"] or 0) for row in rows_of(tmp_path / "graph"))
        updates = end_of(tmp_path / "graph")[1]["average_updates"]
        assert bad > 0 and 0 < updates < 30


def test_weights_move_outside_of_autocast(words: list[str], tiny_recipe: Path, tmp_path: Path, monkeypatch: Any):
    """Within it norms are of another dtype: Muon moved elsewhere in a graph."""
    seen, move = [], Muon._move

    def noted(self: Muon, matrices: list[Tensor], *args: Any) -> None:
        seen.append(torch.is_autocast_enabled(matrices[0].device.type))
        move(self, matrices, *args)

    monkeypatch.setattr(Muon, "_move", noted)
    more = ["train.optimizer=muon", "trainer.precision=bf16-mixed", "stages.clips.train.steps=2"]
    for how in ("off", "graph"):
        seen.clear()
        fit(tiny_recipe, [*words, *more, f"train.compile={how}"], run=tmp_path / how)
        assert {*seen} == {False}, how


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_with_and_without_graphs(optimizer: str, words: list[str], tiny_recipe: Path, tmp_path: Path):
    words = [*words, f"train.optimizer={optimizer}"]
    for how, later in (("off", "off"), ("graph", "off"), ("off", "graph"), ("graph", "graph")):
        for steps, compile in ((7, how), (16, later)):
            more = [f"stages.clips.train.steps={steps}", "train.checkpoint_every=4", f"train.compile={compile}"]
            fit(tiny_recipe, [*words, *more], run=tmp_path / f"{how} {later}")
        assert_same(tmp_path / "off off", tmp_path / f"{how} {later}")


class Told(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def train(recipe: Path, run: Path, words: list[str], *callbacks: Callback) -> list[str]:
    """What is said."""
    told = Told()
    fit_curriculum(load_for_training(recipe, words), run=run, reporter=told, callbacks=callbacks)
    return told.lines


@pytest.mark.parametrize("more", [[], ["train.on_spike=rollback"]])
def test_bad_steps_end_a_run_alike(more: list[str], words: list[str], tiny_recipe: Path, tmp_path: Path):
    said = []
    for how in ("off", "graph"):
        with pytest.raises(NonFiniteError) as error:
            train(tiny_recipe, tmp_path / how, [*words, *BAD, *more, f"train.compile={how}"])
        said.append(str(error.value))
    assert said[0] == said[1] and "samples whose loss was not finite" in said[0]


def test_steps_are_looked_at_in_time(words: list[str], tiny_recipe: Path, tmp_path: Path, monkeypatch: Any):
    most, settle = [], StepGraphs.settle

    def noted(self: StepGraphs) -> None:
        most.append(len(self._waiting))
        settle(self)

    monkeypatch.setattr(StepGraphs, "settle", noted)
    fit(
        tiny_recipe,
        [*words, "train.compile=graph", "train.log_every=99", "stages.images.train.steps=40"],
        run=tmp_path / "run",
    )
    assert max(most) == READ_EVERY


class Looks(Callback):
    def on_after_backward(self, trainer: Any, module: Any) -> None:
        """Looks at gradients."""


class Hooks(Callback):
    def on_fit_start(self, trainer: Any, module: Any) -> None:
        module.model.blocks[1].register_forward_hook(lambda *_: None)


class Reads(nn.Module):
    """Asks the device for a number."""

    def __init__(self, dim: int, layer: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.abs().max().item() < 1e30 else x


class Sealed(nn.Module):
    """Does not tell what it reads."""

    trainable = True

    def __init__(self, *, dim: int = 8):
        super().__init__()
        self.dim, self.words = dim, Words(dim=dim)

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        return self.words.encode(texts)


@pytest.mark.parametrize(
    ("more", "callbacks", "why"),
    [
        (["train.on_spike=skip"], [], "train.on_spike=skip looks at each step"),
        ([], [Looks()], "the callback Looks has `on_after_backward`"),
        (
            ['text={name: "tests.test_graph:Sealed"}'],
            [],
            "the trained text encoder tests.test_graph:Sealed has no `read_ids`",
        ),
        ([], [Hooks()], r"model\.blocks\.1 \(Block\) has a hook"),
    ],
)
def test_what_forbids_graphs_is_named(
    more: list[str], callbacks: list[Callback], why: str, words: list[str], tiny_recipe: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, device: str
):  # fmt: skip
    with pytest.raises(RecipeError, match=why):
        train(tiny_recipe, tmp_path / "graph", [*words, *more, "train.compile=graph"], *callbacks)
    said = train(tiny_recipe, tmp_path / "auto", [*words, *more], *callbacks)
    told = [bool(re.search(why, line)) for line in said if "CUDA graphs" in line]
    assert told == [True, True][: 2 * (device == "cuda")]


def test_auto_needs_a_gpu(device: str, words: list[str], tiny_recipe: Path, tmp_path: Path, recorded: list[Any]):
    fit(tiny_recipe, words, run=tmp_path / "run")
    assert bool(recorded) == (device == "cuda")


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@needs_cuda
def test_a_part_that_waits_for_the_gpu_is_named(words: list[str], tiny_recipe: Path, tmp_path: Path):
    mixer = 'model.mixer={name: "tests.test_graph:Reads"}'
    with pytest.raises(RecipeError, match=r"blocks\.0\.mixer \(Reads\) cannot be recorded"):
        train(tiny_recipe, tmp_path / "graph", [*words, mixer, "train.compile=graph"])
    said = train(tiny_recipe, tmp_path / "auto", [*words, mixer])
    assert sum("blocks.0.mixer (Reads) cannot be recorded" in line for line in said) == 2
    train(tiny_recipe, tmp_path / "off", [*words, mixer, "train.compile=off"])
    assert_same(tmp_path / "off", tmp_path / "auto")


@needs_cuda
def test_memory_returns(words: list[str], tiny_recipe: Path, tmp_path: Path):
    def held() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    sizes: list[int] = []
    for number in range(3):
        fit(tiny_recipe, [*words, "train.compile=graph"], run=tmp_path / str(number))
        sizes.append(held())
    assert sizes[2] <= sizes[0]


@needs_cuda
@pytest.mark.slow
def test_two_hundred_steps_change_no_bit(words: list[str], tiny_recipe: Path, tmp_path: Path):
    more = ["stages.clips.train.steps=200", "train.decay=cosine", "trainer.precision=bf16-mixed"]
    for how in ("off", "graph"):
        fit(tiny_recipe, [*words, *more, f"train.compile={how}"], run=tmp_path / how)
    assert_same(tmp_path / "off", tmp_path / "graph")
