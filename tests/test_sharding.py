"""Strategies that shard: `fit` refuses those it knows, and what lacks elements is never written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lingen.cli import main
from lingen.recipe import load_for_training, load_recipe, stages_of, to_yaml
from lingen.recipe.errors import RecipeError
from lingen.run import fit
from lingen.training.denoiser import LinGenModule
from lingen.training.folder import RunFolder
from lingen.training.weights import save_weights
from lingen.weights import IncompleteError, read_weights

WRITER = '''
"""Two gloo ranks shard a module, each way, and write its weights."""
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from lingen.training.average import AveragedWeights
from lingen.training.denoiser import LinGenModule
from lingen.recipe import load_recipe, to_yaml
from lingen.weights import IncompleteError
from lingen.training.weights import save_weights

rank, recipe = int(sys.argv[1]), load_recipe(sys.argv[2], stage="images")
dist.init_process_group("gloo", init_method=f"file://{Path('meet').absolute()}", rank=rank, world_size=2)
for shard in (
    lambda module: FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu")),
    fully_shard,
):
    module = LinGenModule(recipe)
    held = shard(module)
    module.average = AveragedWeights(module.trained_parameters(), 0.9)
    for write in (
        lambda: save_weights(Path(f"weights-{rank}.safetensors"), module, to_yaml(recipe), 1),
    ):
        try:
            write()
        except IncompleteError as error:
            print(error)
dist.barrier()
'''
NAMES = ["fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_3_offload", "model_parallel", "xla_fsdp", "FSDP"]
LACKS = (
    r"This rank does not hold the whole of \d+ of \d+ tensors \(such as [\w.]+, declared as \[[\d, ]+\]\), so nothing"
)


# refused before anything is built


def test_the_main_recipe_is_refused_and_its_place_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(RecipeError, match=r"t2v_68s.yaml:\d+: strategy 'fsdp'.*set trainer.strategy=ddp") as caught:
        fit("t2v_68s", run=tmp_path / "run")
    assert len(caught.value.problems) == 1
    assert main(["fit", "--recipe", "t2v_68s", "--run", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.strip() == str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_that_shards_is_refused(tiny_recipe: Path, tmp_path: Path, name: str):
    with pytest.raises(RecipeError, match=rf"^command line: strategy '{name}' .*\(at trainer.strategy\)$"):
        fit(tiny_recipe, [f"trainer.strategy={name}"], run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_the_stages_that_are_trained_are_looked_at(tiny_recipe: Path, tmp_path: Path):
    overrides = ["stages.clips.trainer.strategy=fsdp"]
    with pytest.raises(RecipeError, match=r"\(at stages.clips.trainer.strategy\)$"):
        fit(tiny_recipe, overrides, run=tmp_path / "run")
    folder = RunFolder(
        fit(tiny_recipe, [*overrides, "stages.images.train.steps=1"], run=tmp_path / "run", stage="images")
    )
    assert folder.finished_steps("images") == 1


def test_what_keeps_the_model_whole_is_not_refused(tiny_recipe: Path):
    for name in ("auto", "ddp", "ddp_find_unused_parameters_true", "single_device"):
        load_for_training(tiny_recipe, [f"trainer.strategy={name}"])
    load_for_training("t2v_68s", ["trainer.strategy=ddp"])


def test_the_main_recipe_loads_as_it_is():
    assert load_recipe("t2v_68s", stage="quality").trainer["strategy"] == "fsdp"
    assert len(stages_of("t2v_68s")) == 6


# nothing that lacks elements is written


def test_an_emptied_tensor_is_not_written(tiny_recipe: Path, tmp_path: Path):
    recipe = load_recipe(tiny_recipe, stage="images")
    module, path = LinGenModule(recipe), tmp_path / "weights.safetensors"
    save_weights(path, module, to_yaml(recipe), 1)
    assert read_weights(path, "raw").keys() == module.shapes.keys()
    path.unlink()
    weight = module.model.patchify.weight
    for part in (weight.detach()[:0], weight.detach()[:-1], weight.detach().flatten()):
        module.model.patchify.weight.data = part
        with pytest.raises(IncompleteError, match=LACKS) as caught:
            save_weights(path, module, to_yaml(recipe), 1)
        assert "such as model.patchify.weight" in str(caught.value)
        module.model.patchify.weight.data = weight.detach().new_zeros(module.shapes["model.patchify.weight"])
    del module.model.patchify.bias
    with pytest.raises(IncompleteError, match=r"such as model.patchify.bias"):
        save_weights(path, module, to_yaml(recipe), 1)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.slow
def test_two_ranks_of_shards_write_no_weights(tiny_recipe: Path, tmp_path: Path):
    words = [sys.executable, "-c", WRITER]
    ranks = [
        subprocess.Popen(
            [*words, str(rank), str(tiny_recipe)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=300)
        assert rank.returncode == 0, err
        assert len(re.findall(LACKS, out)) == len(out.splitlines()) == 2, out
    assert not list(tmp_path.glob("weights*"))
