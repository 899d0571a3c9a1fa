"""Weights: what a run writes, what is exported, and what accepts them."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lingen.autoencoder.diffusers_vae import DiffusersVAE
from lingen.autoencoder.tae import TAE
from lingen.cli import main
from lingen.data.fingerprint import frozen_settings
from lingen.recipe import load_curriculum, load_recipe
from lingen.recipe.errors import RecipeError
from lingen.recipe.signature import settings_of
from lingen.run import Reporter, fit, fit_curriculum
from lingen.run_folder.folder import RunFolder
from lingen.sampling.clips import generate
from lingen.training.autoencoder import AutoencoderModule
from lingen.training.begin import hand_over, start_of
from lingen.training.denoiser import LinGenModule
from lingen.training.weights import load_denoiser, load_into
from lingen.weights import export_weights, find_weights, names_now, read_metadata, read_weights, write_tensors
from tests.helpers.commands import run_command

SIZES = "strides: [2, 4, 4], channels: 4, width: 8, blocks: 1"
TAE_RECIPE = """
trains: autoencoder
autoencoder: {{name: tae, {sizes}}}
data:
  shards: {{image: "{folder}/image-*.tar", video: "{folder}/video-*.tar"}}
  mix: {{image: 1, video: 1}}
  frames: 4
  size: [16, 16]
  fps: 8
  workers: 0
train: {{steps: 2, lr: 1e-3, ema: 0.5, log_every: 1}}
reconstruction: {{features: none, discriminator_width: 4, discriminator_layers: 1}}
trainer: {{accelerator: cpu, devices: 1, logger: false}}
stages:
  plain: {{reconstruction: {{adversarial: 0.0}}}}
  critic: {{reconstruction: {{adversarial: 0.5, discriminator_start: 0, adversarial_start: 0}}}}
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(path: Path) -> list[str]:
    with safe_open(str(path), "pt") as file:
        return list(file.keys())


class Heard(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def tae_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    path = tmp_path_factory.mktemp("tae") / "tae.yaml"
    path.write_text(TAE_RECIPE.format(folder=tiny_shards, sizes=SIZES))
    return path


@pytest.fixture(scope="module")
def tae_run(tae_recipe: Path) -> Path:
    """Without a critic, then with one."""
    return fit(tae_recipe, run=tae_recipe.parent / "run")


# a run's


@pytest.mark.slow
def test_two_ranks_train_an_autoencoder_and_show_what_it_does(tae_recipe: Path, tmp_path: Path):
    words = ["--stage", "plain", "trainer.devices=2", "trainer.strategy=ddp", "train.sample_every=1"]
    done = run_command("fit", "--recipe", str(tae_recipe), "--run", str(tmp_path / "run"), *words)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("run/samples/plain-*/sheet.png"))) == 2


def test_a_stage_with_a_critic_starts_from_one_without_and_the_other_way_round(tae_recipe: Path, tae_run: Path):
    plain, critic = (RunFolder(tae_run).weights(stage) for stage in ("plain", "critic"))
    assert not [name for name in names(plain) if "discriminator" in name]
    assert [name for name in names(critic) if name.startswith("raw.discriminator.")]
    for source, stage in ((plain, "critic"), (critic, "plain")):
        module = AutoencoderModule(load_recipe(tae_recipe, stage=stage))
        weights = read_weights(source, "raw")
        load_into(module, weights, source)
        for name, value in module.autoencoder.state_dict().items():
            assert torch.equal(value, weights[f"autoencoder.{name}"]), name
    weights.pop("autoencoder.mean")
    with pytest.raises(RecipeError, match=r"1 missing \(such as autoencoder.mean\)"):
        load_into(module, weights, critic)


def test_an_autoencoders_weights_make_no_clips(tae_run: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(RecipeError, match="holds the weights of an autoencoder"):
        load_denoiser(tae_run)
    assert main(["sample", "--run", str(tae_run), "--prompt", "x"]) == 2
    assert f"Train a denoiser with autoencoder.path={tae_run}" in capsys.readouterr().err


def test_what_to_do_with_a_finished_autoencoder_is_said(
    tae_recipe: Path, tae_run: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["fit", "--recipe", str(tae_recipe), "--run", str(tae_run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"lingen eval tae --run {tae_run}"


# files


def test_weights_are_for_whom_the_umask_says(tae_run: Path, tmp_path: Path):
    for stage in ("plain", "critic"):
        assert mode(RunFolder(tae_run).weights(stage)) == mode(tae_run / "run.json")
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "new" / "x.safetensors", {"x": torch.zeros(2, 3).t()}, {"format": "lingen"})
        exported = export_weights(tae_run, tmp_path / "new" / "y.safetensors")
    finally:
        os.umask(before)
    assert mode(tmp_path / "new" / "x.safetensors") == mode(exported) == 0o640
    assert sorted(one.name for one in (tmp_path / "new").iterdir()) == ["x.safetensors", "y.safetensors"]


# export


def test_only_what_is_used_is_exported_and_bf16_halves_it(tae_run: Path, tmp_path: Path):
    whole = export_weights(tae_run, tmp_path / "fp32.safetensors", "fp32")
    half = export_weights(tae_run, tmp_path / "bf16.safetensors")
    averaged = read_weights(find_weights(tae_run), "averaged")
    kept = {name: value for name, value in averaged.items() if not name.startswith("discriminator.")}
    assert len(kept) < len(averaged) and sorted(names(whole)) == sorted(f"averaged.{name}" for name in kept)
    assert names(half) == names(whole) and read_metadata(half) == read_metadata(find_weights(tae_run))
    for name, value in read_weights(whole, "averaged").items():
        assert torch.equal(value, averaged[name]), name
    halves = read_weights(half, "averaged")
    for name, value in halves.items():
        assert value.dtype == (torch.bfloat16 if value.ndim > 1 else torch.float32), name
    torch.testing.assert_close({n: v.float() for n, v in halves.items()}, kept, rtol=2**-8, atol=1e-8)
    sizes = [sum(v.nbytes for v in read_weights(path, "averaged").values()) for path in (half, whole)]
    assert sizes[0] / sizes[1] == pytest.approx(0.5, abs=0.05)


def test_an_exported_autoencoder_is_a_path(tae_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "tae.safetensors"
    assert main(["export", str(tae_run), "--out", str(out), "--precision", "fp32"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    settings = {"strides": (2, 4, 4), "channels": 4, "width": 8, "blocks": 1}
    given, exported = (TAE(path=str(path), **settings) for path in (tae_run, out))
    halved = TAE(path=str(export_weights(tae_run, tmp_path / "half.safetensors")), **settings)
    clip = torch.rand(1, 3, 4, 16, 16)
    with torch.no_grad():
        latents = given.encode(clip)
        assert exported.missing() == halved.missing() == []
        assert torch.equal(exported.encode(clip), latents)
        torch.testing.assert_close(halved.encode(clip), latents, rtol=1e-5, atol=0.05)
        assert halved.mean.dtype == torch.float32


def test_an_exported_denoiser_samples_and_starts_a_training(tiny_run: Path, tmp_path: Path):
    out = export_weights(tiny_run, tmp_path / "out.safetensors")
    assert next(generate(out, "a red square")).shape == (4, 8, 8, 3)
    stage = load_recipe(tiny_run / "recipe.yaml", [f"init={out}"], stage="images")
    module, heard = LinGenModule(stage), Heard()
    start = start_of(RunFolder(tmp_path / "fresh"), [stage], 0, heard.say)
    assert start is not None
    hand_over(module, start, heard.say)
    assert heard.said == [f"stage images starts from {out}"]
    averaged = read_weights(find_weights(tiny_run), "averaged")
    for name, value in module.trained_state().items():
        wanted = averaged[name].bfloat16() if averaged[name].ndim > 1 else averaged[name]
        assert torch.equal(value, wanted.float()), name


def test_weights_are_read_whatever_the_trainer_of_their_recipe(tiny_run: Path, tmp_path: Path):
    path, other, own = find_weights(tiny_run), tmp_path / "other.safetensors", tmp_path / "own.yaml"
    metadata = read_metadata(path)
    told = metadata["recipe"].replace("\ntrainer: {", "\ntrainer: {of_another_version: 1, ")
    assert told != metadata["recipe"]
    own.write_text(told)
    with pytest.raises(RecipeError, match="of_another_version"):
        load_recipe(own)
    with safe_open(path, "pt") as held:
        save_file({name: held.get_tensor(name) for name in held.keys()}, other, metadata | {"recipe": told})
    one, same = (load_denoiser(each).trained_state() for each in (path, other))
    assert all(torch.equal(value, same[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("out", "said"), [("foo.txt", "foo.txt does not end with .safetensors"), ("", "is a folder; name a file to write")]
)
def test_a_place_where_nothing_is_exported(
    tae_run: Path, tmp_path: Path, out: str, said: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["export", str(tae_run), "--out", str(tmp_path / out)]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path: Path):
    (tmp_path / "x.safetensors").mkdir()
    for name, metadata in (("y.safetensors", {"a": 1}), ("x.safetensors", {"a": "1"})):
        with pytest.raises((TypeError, OSError)):
            write_tensors(tmp_path / name, {"x": torch.zeros(2)}, metadata)  # type: ignore[arg-type]
    assert [one.name for one in tmp_path.iterdir()] == ["x.safetensors"]


# what samples depend on


def test_settings_that_change_no_latents_are_not_in_the_fingerprint(tae_run: Path, tiny_recipe: Path):
    def settings(**changes: object) -> Any:
        component = {"name": "tae", "path": str(tae_run), "strides": [2, 4, 4], "channels": 4, "width": 8, **changes}
        recipe = load_recipe(tiny_recipe, [f"autoencoder={component}", "data.size=[64, 64]"], stage="clips")
        return frozen_settings(recipe)["autoencoder"]

    assert settings(chunk=5, checkpointing=True) == settings()
    assert settings(blocks=1) != settings() != settings(reach=1)
    assert set(DiffusersVAE.without_effect) < set(settings_of(DiffusersVAE))


def test_a_run_says_what_it_starts_from_and_goes_on_without_it(tae_recipe: Path, tae_run: Path, tmp_path: Path):
    source = tmp_path / "start.safetensors"
    export_weights(tae_run, source, "fp32")
    overrides, heard = [f"autoencoder.path={source}", "stages.plain.train.steps=1"], Heard()
    fit_curriculum(load_curriculum(tae_recipe, overrides), run=tmp_path / "run", stage="plain", reporter=heard)
    assert f"stage plain starts from {source}" in heard.said
    source.unlink()
    fit(tae_recipe, [overrides[0]], run=tmp_path / "run", stage="plain")  # from its checkpoint
    assert RunFolder(tmp_path / "run").finished_steps("plain") == 2
    with pytest.raises(RecipeError, match="missing: tae"):
        fit(tae_recipe, overrides, run=tmp_path / "other", stage="plain")


def test_a_run_of_another_critic_is_another_run(tae_recipe: Path, tae_run: Path):
    with pytest.raises(RecipeError, match="reconstruction.discriminator_width is 8 here and 4 there"):
        fit(tae_recipe, ["reconstruction.discriminator_width=8"], run=tae_run)
    with pytest.raises(RecipeError, match="autoencoder.width is 16 here and 8 there"):
        fit(tae_recipe, ["autoencoder.width=16"], run=tae_run)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sample.tile=[30,30]", r"\(at sample.tile\)"),
        ("reconstruction.discriminator_layers=5", r"Frames of 16x16 .* \(at reconstruction.discriminator_layers\)"),
        ("stages.critic.train.keep_optimizer=true", r"the critic.*\(at stages.critic.train.keep_optimizer\)"),
    ],
)
def test_what_would_fail_late_fails_when_the_recipe_is_loaded(tae_recipe: Path, override: str, said: str):
    with pytest.raises(RecipeError, match=said):
        load_recipe(tae_recipe, [override])


def test_names_of_earlier_versions_are_read_and_others_left_alone():
    own = ["model.blocks.0.mixer.ma.memory.d", "model.blocks.0.modulation.weight", "model.modulation", "text.0.d"]
    held = {"model.blocks.0.mixer.ma.d": 1, "model.blocks.0.modulation": 2, "model.modulation": 3, "text.0.d": 4}
    assert names_now(held, own) == dict(zip(own, (1, 2, 3, 4), strict=True))
    assert names_now(names_now(held, own), own) == names_now(held, own)
    theirs = {"model.blocks.0.mixer.d": 1}  # of a mixer that has no memory of its own
    assert names_now(theirs, ["model.blocks.0.mixer.d"]) == names_now(theirs, []) == theirs
