"""`lingen plan`: a step without numbers holds what real ranks hold, and what it advises makes a stage fit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lingen.cli import main
from lingen.launch import resources
from lingen.plan.forecast import flop_a_step, plan
from lingen.plan.memory_tracker import part_here
from lingen.recipe import load_recipe, load_stages
from lingen.training import dry_run
from lingen.training.denoiser import LinGenModule
from lingen.training.dry_run import step_memory
from tests.helpers.ranks import run_ranks
from tests.helpers.small_t2v import write_small_t2v

KINDS = {"weights", "gradients", "optimizer", "average"}
ASKED = {"stage", "steps", "tokens", "parameters", "flop", "memory", "gpu_hours", "disk"}
STAGE = "t2v_256_17s"
QUICK = ["model.mixer=attention", "sample.prompts=[]", "data.validation.video=null"]
TWO_RANKS = ["trainer.num_nodes=1", "trainer.devices=2", "sample.prompts=[]"]


def held_by(module: LinGenModule, gradients: list[Any]) -> dict[str, int]:
    """Bytes by kind of a rank that has just made a step, of the gradients that it had."""
    trained = list(module.trained_parameters().values())
    states = module.trainer.optimizers[0].state.values()
    assert module.average is not None
    kinds: dict[str, list[Any]] = {
        "weights": trained,
        "gradients": gradients,
        "optimizer": [value for state in states for name, value in state.items() if name != "step"],
        "average": list(module.average.weights().values()),
    }
    return {kind: sum(part_here(one).nbytes for one in tensors) for kind, tensors in kinds.items()}


def train(recipe: str, run: str) -> None:
    """As one of the ranks: trains a stage and prints what it holds after each step."""
    from lingen.run import fit

    step, look, gradients = LinGenModule.optimizer_step, LinGenModule.on_before_optimizer_step, list[Any]()

    def noted(self: LinGenModule, *args: Any) -> None:
        look(self, *args)
        gradients[:] = [parameter.grad for parameter in self.trained_parameters().values()]

    def told(self: LinGenModule, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        print("held", json.dumps(held_by(self, gradients)), flush=True)

    with mock.patch.multiple(LinGenModule, optimizer_step=told, on_before_optimizer_step=noted):
        fit(recipe, TWO_RANKS, run=run, stage=STAGE)


@pytest.mark.slow
def test_ranks_hold_what_the_dry_run_tells(tmp_path: Path):
    recipe = write_small_t2v(tmp_path)
    with contextlib.chdir(tmp_path):
        said = run_ranks(["-m", "tests.test_plan", str(recipe), str(tmp_path / "run")], 2)
        stage = load_recipe(recipe, TWO_RANKS, stage=STAGE)
        for rank, text in enumerate(said):
            found = [json.loads(line.split(" ", 1)[1]) for line in text.splitlines() if line.startswith("held ")]
            memory = step_memory(stage, 1, 2, rank)
            assert len(found) == stage.train.steps
            assert all(one == {kind: getattr(memory, kind) for kind in KINDS} for one in found), (rank, found, memory)


def test_every_rank_of_many_has_its_rows(tiny_recipe: Path):
    """Rows that do not divide: the first ranks hold the most; together they hold the model once."""
    recipe = load_recipe(tiny_recipe, [*QUICK, "trainer.strategy=fsdp"], stage="images")
    ranks = [step_memory(recipe, 1, 3, rank).weights for rank in range(3)]
    assert sum(ranks) == 4 * plan(recipe).trained and max(ranks) == ranks[0] > ranks[-1]


def test_a_block_keeps_what_its_kernels_save(tiny_recipe: Path):
    """In numbers a token and unit of width, in float32, where z, x, b, c, dt are 4.53 of them and the feed-forward 2.75
    wide. The plain twins keep several times as much."""
    pytest.importorskip("triton")
    mixer = ["model.mixer.state_dim=64", "model.mixer.head_dim=64", "model.mixer.window=[4, 4, 4]"]
    words = ["trainer.accelerator=gpu", "model.dim=256", "model.patch=[1, 2, 2]", "data.size=[64, 64]", *mixer]
    kept = []
    for depth in (3, 4):
        recipe = load_recipe(tiny_recipe, [*words, f"model.depth={depth}"], stage="clips")
        kept.append(step_memory(recipe).activations)
    mamba = 4.53 + 2 + 2  # the projection, what the scan gives, what the gated norm gives
    attention = 3 + 1  # of windows: queries, keys and values; what it gives
    normed = 1 + 1 + 1 + 1 + 1 + 1  # three norms' inputs and outputs
    others = 1 + 1 + 1 + 1 + 3 * 2.75  # both updates that are gated; queries and result of cross-attention; SwiGLU
    want = 4 * (mamba + attention + normed + others)
    assert (kept[1] - kept[0]) / (2 * 4 * 32 * 32 * 256) == pytest.approx(want, rel=0.02)


def test_a_deep_model_takes_what_shallow_ones_tell(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = load_recipe(tiny_recipe, [*QUICK, "trainer.strategy=fsdp", "model.depth=5"], stage="images")
    told = step_memory(recipe, 1, 2)
    monkeypatch.setattr(dry_run, "SHALLOW", 5)
    found = step_memory(recipe, 1, 2)
    for kind, size in dataclasses.asdict(found).items():
        assert getattr(told, kind) == pytest.approx(size, rel=0.01), kind


def test_the_switch_that_makes_a_stage_fit_is_named(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch):
    """GPUs that are a little larger than what a switch leaves, and so too small without it."""
    monkeypatch.setattr(resources, "USABLE", 1.0)
    plain, less = (
        load_recipe(tiny_recipe, [*QUICK, f"model.checkpointing={on}"], stage="clips") for on in ("false", "true")
    )
    shared = dataclasses.replace(less, trainer=less.trainer | {"strategy": "fsdp"})
    for recipe, ranks, words in (
        (less, 1, "model.checkpointing=true"),
        (shared, 2, "model.checkpointing=true trainer.strategy=fsdp"),
        (shared, 4, "model.checkpointing=true trainer.strategy=fsdp --gpus 4"),
    ):
        room = step_memory(recipe, 1, ranks).peak + 1
        monkeypatch.setitem(resources.GPUS, "small", ("H100", room / 2**30))
        had = min(ranks, 2)
        told = resources.what_fits(plain, resources.Cluster(1, had, "small"), step_memory(plain, 1, had))
        assert told.startswith(f"with {words} it does: "), told
    monkeypatch.setitem(resources.GPUS, "small", ("H100", 1e-6))
    monkeypatch.setattr(resources, "MOST_RANKS", 1)
    told = resources.what_fits(plain, resources.Cluster(1, 2, "small"), step_memory(plain, 1, 2))
    assert "no switch makes it fit, the least is" in told and "; or take --gpu rtx-4090" in told


def test_flops_are_counted_by_samples_where_the_mix_is(tiny_recipe: Path):
    words = ["model.mixer=attention", "data.mix={image: 1, video: 10}", "data.batch={image: 6, video: 2}"]
    recipe = load_recipe(tiny_recipe, [*words, "data.mix_by=samples"], stage="clips")
    forecast = plan(recipe)
    assert forecast.training_flops["image"] != forecast.training_flops["video"]
    a_round = 6 * forecast.training_flops["image"] + 30 * 2 * forecast.training_flops["video"]  # 6 images, 60 clips
    assert flop_a_step(recipe, forecast) == pytest.approx(a_round / 31)


def test_json_names_what_the_issue_asks_for(capsys: pytest.CaptureFixture[str], tiny_recipe: Path):
    assert main(["plan", "--recipe", str(tiny_recipe), "--gpus", "2", "--gpu", "h200", "--json", *QUICK[1:]]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["stage"] for one in told["stages"]] == ["images", "clips"]
    for one in told["stages"]:
        assert one.keys() >= ASKED and one["fits"] and one["advice"] is None and one["ranks"] == 2
        memory = one["memory"]
        assert memory.keys() == {*KINDS, "activations", "buffers", "peak"}
        assert max(memory.values()) == memory["peak"] <= sum(memory.values()) - memory["peak"]
        assert all(isinstance(size, int) and size > 0 for size in memory.values())
        assert one["flop"] > 0 and one["gpu_hours"] == pytest.approx(one["flop"] / (989e12 * 0.4) / 3600)


def test_hours_that_mean_nothing_are_left_out_or_told_to_be_a_floor(
    capsys: pytest.CaptureFixture[str], tiny_recipe: Path
):
    asked = ["plan", "--recipe", str(tiny_recipe), "--stage", "images"]
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "GPU hours" not in told and "no hours: the recipe trains on a CPU; memory in GiB of a rank" in told
    assert main([*asked, "trainer.accelerator=auto"]) == 0
    told = capsys.readouterr().out
    assert told.count("> ") == 3 and "> is a floor: steps of so few FLOP wait for launches and data" in told
    assert main([*asked, "trainer.accelerator=auto", "--mfu", "1e-9"]) == 0
    told = capsys.readouterr().out
    assert "GPU hours" in told and "> " not in told


def test_a_gpu_that_is_not_known_is_told_with_the_nearest(capsys: pytest.CaptureFixture[str], tiny_recipe: Path):
    assert main(["plan", "--recipe", str(tiny_recipe), "--gpu", "h10-80"]) == 2
    told = capsys.readouterr().err
    assert "invalid choice: 'h10-80'" in told and "Did you mean 'h100-80'?" in told and "PyTorch" not in told
    assert main(["plan", "--recipe", str(tiny_recipe), "--mfu", "40"]) == 2
    assert "--mfu is a share" in capsys.readouterr().err
    assert main(["plan", "--recipe", "t2v_68s", "--gpus", "12"]) == 2
    assert "12 GPUs do not fill nodes of 8" in capsys.readouterr().err


def test_a_mixer_that_needs_numbers_is_told(capsys: pytest.CaptureFixture[str], tiny_recipe: Path):
    assert main(["plan", "--recipe", str(tiny_recipe), "model.mixer=tests.test_flops:Stubborn"]) == 2
    assert "stage images: a step cannot be tried without numbers (" in capsys.readouterr().err


if __name__ == "__main__":
    train(*sys.argv[1:])


def test_a_stage_that_ends_amid_its_warm_up_is_said(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]):
    told = "warning: stage clips ends amid its warm-up (train.steps=6), at 50% of train.lr; lower train.warmup=12."
    assert main(["show", "--recipe", str(tiny_recipe), "stages.clips.train.warmup=12"]) == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [told] and told not in shown.out
    assert main(["show", "--recipe", str(tiny_recipe), "stages.clips.train.warmup=6"]) == 0
    assert "warm-up" not in capsys.readouterr().err


def test_a_plan_says_where_it_is(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--recipe", str(tiny_recipe), "--json"]) == 0
    told = capsys.readouterr()
    stages = ["stage 1/2 images", "stage 2/2 clips"]
    assert told.err.splitlines() == [f"{one}: a step without numbers" for one in stages]
    assert len(json.loads(told.out)["stages"]) == 2


def rows_of(page: str, mark: str) -> dict[str, list[str]]:
    """Cells behind the first of each row of a table that a comment marks in docs/PAGE."""
    text = (Path(__file__).parents[1] / "docs" / page).read_text().partition(f"<!-- made: {mark} -->\n")[2]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.partition("\n\n")[0].splitlines()[2:]]
    return {name: rest for name, *rest in cells}


def test_the_tables_of_data_and_of_lost_hours_are_computed():
    """docs/plan.md and docs/cluster.md, which say for t2v_68s on 128 GPUs what `lingen plan` says."""
    shown, lost = rows_of("plan.md", "samples shown"), rows_of("cluster.md", "lost hours")
    for recipe in load_stages("t2v_68s"):
        name, forecast = str(recipe.stage), plan(recipe)
        samples, latents, text = resources.data_of(recipe, forecast, 128).values()
        images, clips = (samples.get(kind, 0) for kind in ("image", "video"))
        each = [f"{latents[kind] / 1e6:.3g}" if kind in latents else "" for kind in ("image", "video")]
        total = sum(samples[kind] * latents[kind] for kind in samples) / 1e12
        assert shown.pop(name) == [f"{images:,}", f"{clips:,}", *each, f"{total:.1f}"], name
        assert f"{text / 1e6:.1f} MB" == "5.1 MB" and recipe.train.checkpoint_every == 500
        seconds = flop_a_step(recipe, forecast) / (989e12 * 0.4)
        hours = 500 * seconds / 3600
        assert lost.pop(name) == [f"{seconds:.3g}", f"{hours:.3g}", f"{128 * hours:.3g}"], name
        assert f"{forecast.checkpoint / 1e9:.1f}" == "66.3"
    assert not shown and not lost


def test_a_batch_that_is_too_large_is_told_with_the_largest_that_fits(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(resources, "USABLE", 1.0)
    monkeypatch.setattr(resources, "MOST_RANKS", 1)
    words = [*QUICK, "model.checkpointing=true", "trainer.strategy=fsdp"]
    many, fewer = (load_recipe(tiny_recipe, [*words, f"data.batch.video={n}"], stage="clips") for n in (24, 12))
    room = step_memory(fewer).peak * 1.02
    monkeypatch.setitem(resources.GPUS, "small", ("H100", room / 2**30))
    told = resources.what_fits(many, resources.Cluster(1, 1, "small"), step_memory(many))
    assert re.search(r"with data.batch.video=1[123] it does: ", told), told


def test_fewer_ranks_are_told_with_what_keeps_the_samples(capsys: pytest.CaptureFixture[str], tiny_recipe: Path):
    asked = ["plan", "--recipe", str(tiny_recipe), "--gpus", "1", "trainer.devices=2", *QUICK]
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "the recipe asks for 2 ranks; on 1 a step has 0.5 times the samples" in told
    assert "train.accumulate=2 keeps them" in told and "GiB of disk in all" in told
    assert main([*asked, "train.accumulate=2"]) == 0
    assert "times the samples" not in capsys.readouterr().out
