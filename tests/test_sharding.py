"""Strategies: which of them train, and that several ranks train what one process trains."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lingen.cli import main
from lingen.recipe import load_for_training, load_recipe, stages_of
from lingen.recipe.errors import RecipeError
from lingen.run import fit
from lingen.run_folder.folder import RunFolder
from lingen.weights import read_weights
from tests.helpers.closeness import assert_close
from tests.helpers.commands import run_command
from tests.helpers.ranks import run_ranks
from tests.soak.ranks import Alone, Ranks, compare, differences

REFUSED = ["fsdp_cpu_offload", "deepspeed", "deepspeed_stage_3_offload", "model_parallel", "xla_fsdp"]


# refused before anything is built


@pytest.mark.parametrize("name", REFUSED)
def test_other_ways_to_shard_are_refused_with_the_cure(tiny_recipe: Path, tmp_path: Path, name: str):
    with pytest.raises(
        RecipeError, match=rf"^command line: There is no strategy called '{name}'.*fsdp.*\(at trainer.strategy\)$"
    ):
        fit(tiny_recipe, [f"trainer.strategy={name}"], run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["fsdp", "hsdp"])
def test_an_autoencoder_is_not_sharded(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    words = ["fit", "--recipe", "tae_8x8x8", "--run", str(tmp_path / "run"), f"trainer.strategy={name}"]
    assert main(words) == 2
    assert "an autoencoder is whole on every rank. Set trainer.strategy=ddp." in capsys.readouterr().err


def test_gradients_in_shards_are_not_scaled_by_each_rank(tiny_recipe: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match=r"does not go with precision 16-mixed.*trainer.precision=bf16-mixed"):
        load_for_training(tiny_recipe, ["trainer.strategy=fsdp", "trainer.precision=16-mixed"])


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
def test_ranks_of_shards_train_what_one_process_trains(tmp_path: Path):
    """All of it, on other counts, with DDP and for 20 steps: ``python -m tests.soak ranks``."""
    one, fsdp, hsdp = Alone(tmp_path / "ranks", steps=3), Ranks("fsdp", 4, 2), Ranks("hsdp", 4, 2)
    compared = [*compare(one, [(hsdp, "64-true"), (fsdp, "32-true"), (fsdp, "bf16-mixed")])]
    assert len(compared) == 3
    assert not [(str(each), found) for each, _, all_ in compared for found in all_ if found.is_too_large]
    assert not list(differences(one, one.found("64-true"), "64-true", one.run("64-true")))[0].size
    other = replace(one.found("64-true"), velocity={key: 1.001 * v for key, v in one.found("64-true").velocity.items()})
    assert next(differences(one, other, "64-true", one.run("64-true"))).is_too_large


@pytest.mark.slow
def test_two_ranks_of_shards_validate_and_sample_as_one_process(tiny_recipe: Path, tmp_path: Path):
    """Both stages, through the command line: weights, metrics and samples."""
    overrides = ["train.validate_every=3", "train.sample_every=2", "data.size=[16, 16]"]
    overrides += ["stages.clips.train.evaluate_every=4"]
    words = ["--recipe", str(tiny_recipe), "--run", str(tmp_path / "two"), *overrides]
    said = run_ranks(["-m", "lingen", "fit", *words, "trainer.devices=2", "trainer.strategy=fsdp"], 2)
    assert "8 samples were used" in said[0] and said[1] == ""
    fit(tiny_recipe, [*overrides, "data.batch={image: 4, video: 4}"], run=tmp_path / "one")
    one, two = (RunFolder(tmp_path / name) for name in ("one", "two"))
    for stage in ("images", "clips"):
        for copy in ("raw", "averaged"):
            want, got = (read_weights(folder.weights(stage), copy) for folder in (one, two))
            assert_close(f"{stage} {copy}", want, got, 1e-4)
    rows = [list(csv.DictReader(folder.metrics.open())) for folder in (one, two)]
    for want, got in zip(*rows, strict=True):
        timed = {"stage", "step", "tokens_per_second", "steps_per_second", *(key for key in want if "time/" in key)}
        for key in want.keys() - timed:
            assert float(got[key] or 0) == pytest.approx(float(want[key] or 0), rel=1e-3), key
    samples = [sorted(path.relative_to(folder.path) for path in folder.path.rglob("*.mp4")) for folder in (one, two)]
    assert samples[0] == samples[1] and len(samples[0]) == 4


# what goes wrong on one rank

BROKEN = '''
"""Two ranks: the first one's disk is full at the second tensor of the weights; in another run the second one's losses
are not finite in step 2 and after."""
import os, sys
import torch
from lingen.run import NonFiniteError, fit
from lingen import weights
from lingen.training.denoiser import LinGenModule
from lingen.ranks.environment import OtherRankError

write = weights.write_pieces

def full(path, tensors, pieces, metadata):
    next(pieces)
    raise OSError(28, "No space left on device", str(path))

weights.write_pieces = full
try:
    fit(sys.argv[1], sys.argv[3:], run=sys.argv[2] + "-full", stage="images")
except (OSError, OtherRankError) as error:
    print("full", type(error).__name__, error)
weights.write_pieces = write

losses, rank = LinGenModule.losses, os.environ["RANK"]

def broken(self, batch, purpose):
    values, times = losses(self, batch, purpose)
    if rank == "1" and batch.step >= 1:
        print("broken", *batch.keys)
        values = values * torch.nan
    return values, times

LinGenModule.losses = broken
try:
    fit(sys.argv[1], sys.argv[3:], run=sys.argv[2], stage="clips")
except NonFiniteError as error:
    print(error)
'''


@pytest.mark.slow
def test_all_ranks_stop_where_one_cannot_write_or_has_no_finite_loss(tiny_recipe: Path, tmp_path: Path):
    program = tmp_path / "broken.py"
    program.write_text(BROKEN)
    overrides = ["trainer.devices=2", "trainer.strategy=fsdp", "train.max_nonfinite=2"]
    said = run_ranks([str(program), str(tiny_recipe), str(tmp_path / "run"), *overrides], 2)
    full = [next(line for line in one.splitlines() if line.startswith("full")) for one in said]
    assert full[0].startswith("full OSError [Errno 28] No space left on device")
    assert full[1].startswith("full FirstRankError OSError: [Errno 28]")
    assert not list((tmp_path / "run-full").rglob("weights*")) and list((tmp_path / "run-full").rglob("step-*"))
    ends = [
        re.search(r"not finite in 2 steps in a row, up to step 3 .* whose loss was not finite: (.*?)\. L", one)
        for one in said
    ]
    assert ends[0] and ends[1] and ends[0][1] == ends[1][1]
    last = [line.split()[1:] for line in said[1].splitlines() if line.startswith("broken")][-1]
    assert ends[0][1] == ", ".join(f"{key} (rank 1)" for key in last)
