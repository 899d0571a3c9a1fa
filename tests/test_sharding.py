"""Strategies: which of them train, and that several ranks train what one process trains."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lingen.cli import main
from lingen.recipe import load_for_training, load_recipe, stages_of
from lingen.recipe.errors import RecipeError
from lingen.run import fit
from lingen.training.folder import RunFolder
from lingen.weights import read_weights
from tests.helpers.commands import run_command
from tests.helpers.ranks import run_ranks

REFUSED = ["fsdp_cpu_offload", "deepspeed", "deepspeed_stage_3_offload", "model_parallel", "xla_fsdp"]


# refused before anything is built


@pytest.mark.parametrize("name", REFUSED)
def test_other_ways_to_shard_are_refused_with_the_cure(tiny_recipe: Path, tmp_path: Path, name: str):
    with pytest.raises(RecipeError, match=rf"^command line: strategy '{name}' .*fsdp.*\(at trainer.strategy\)$"):
        fit(tiny_recipe, [f"trainer.strategy={name}"], run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["fsdp", "hsdp"])
def test_an_autoencoder_is_not_sharded(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    words = ["fit", "--recipe", "tae_8x8x8", "--run", str(tmp_path / "run"), f"trainer.strategy={name}"]
    assert main(words) == 2
    assert "an autoencoder is whole on every rank. Set trainer.strategy=ddp." in capsys.readouterr().err


def test_only_the_stages_that_are_trained_are_looked_at(tiny_recipe: Path, tmp_path: Path):
    overrides = ["stages.clips.trainer.strategy=deepspeed"]
    with pytest.raises(RecipeError, match=r"\(at stages.clips.trainer.strategy\)$"):
        fit(tiny_recipe, overrides, run=tmp_path / "run")
    folder = RunFolder(
        fit(tiny_recipe, [*overrides, "stages.images.train.steps=1"], run=tmp_path / "run", stage="images")
    )
    assert folder.finished_steps("images") == 1


def test_what_lingen_trains_with_is_not_refused(tiny_recipe: Path):
    for name in ("auto", "ddp", "fsdp", "hsdp", "FSDP", "ddp_find_unused_parameters_true", "single_device"):
        load_for_training(tiny_recipe, [f"trainer.strategy={name}"])


def test_the_main_recipe_shards():
    assert load_for_training("t2v_68s").stages[0].trainer["strategy"] == "fsdp"
    assert load_recipe("t2v_68s", stage="quality").trainer["strategy"] == "fsdp"
    assert len(stages_of("t2v_68s")) == 6


# the same training


@pytest.mark.slow
def test_shards_that_are_gathered_in_bfloat16_are_sampled_on_a_cpu(tiny_recipe: Path, tmp_path: Path):
    """In training, under autocast as it trains; `lingen sample` takes whole weights, in float32."""
    run = tmp_path / "run"
    words = ["trainer.strategy=fsdp", "trainer.precision=bf16-mixed", "stages.images.train.steps=1"]
    ended = run_command("fit", "--recipe", str(tiny_recipe), "--run", str(run), "--stage", "images", *words)
    assert ended.returncode == 0, ended.stderr
    assert len(list(run.rglob("samples/*/*.mp4"))) == 1


@pytest.mark.slow
def test_two_ranks_of_shards_train_validate_and_sample_as_two_whole_ones(tiny_recipe: Path, tmp_path: Path):
    """Both stages, through the command line: weights, metrics and samples."""
    overrides = ["trainer.devices=2", "train.validate_every=3", "train.sample_every=2", "train.checkpoint_every=100"]
    for name in ("fsdp", "ddp"):
        words = ["--recipe", str(tiny_recipe), "--run", str(tmp_path / name), *overrides, f"trainer.strategy={name}"]
        run_ranks(["-m", "lingen", "fit", *words], 2)
    one, other = (RunFolder(tmp_path / name) for name in ("fsdp", "ddp"))
    for stage in ("images", "clips"):
        for copy in ("raw", "averaged"):
            want, got = (read_weights(folder.weights(stage), copy) for folder in (other, one))
            assert want.keys() == got.keys()
            assert max(float((want[key] - got[key]).abs().max()) for key in want) < 1e-6
    rows = [list(csv.DictReader(folder.metrics.open())) for folder in (one, other)]
    for mine, theirs in zip(*rows, strict=True):
        for key in mine.keys() - {"stage", "step", "tokens_per_second", "steps_per_second"}:
            assert float(mine[key] or 0) == pytest.approx(float(theirs[key] or 0), rel=1e-5), key
    samples = [sorted(path.relative_to(folder.path) for path in folder.path.rglob("*.mp4")) for folder in (one, other)]
    assert samples[0] == samples[1] and len(samples[0]) == 4
