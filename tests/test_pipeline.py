"""A model as a folder by diffusers' conventions: its clips are those of the run, and what is wrong with it is said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import ExifTags, Image
from safetensors.torch import load_file

import lingen
from lingen.autoencoder.pca import PCA
from lingen.autoencoder.tae import TAE
from lingen.cli import main
from lingen.files import write_json
from lingen.media import save_video
from lingen.recipe.errors import RecipeError
from lingen.run import fit
from lingen.run_folder.folder import RunFolder
from lingen.sampling.files import sample_to_files
from lingen.sampling.pipeline import card_of
from lingen.weights import find_weights, read_metadata, write_tensors
from tests.helpers.tiny import as_theatre, write_recipe

SMALL = {
    "tae": "{name: tae, strides: [2, 4, 4], channels: 4, width: 8, blocks: 1, path: %s}",
    "pca": "{name: pca, strides: [2, 4, 4], channels: 4, path: %s}",
}
"""Autoencoders whose weights lie in a file."""


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    assert main(["export", str(tiny_run), "--to", "diffusers", str(out)]) == 0
    return out


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def frames_of(clip: list) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in clip])


def test_a_clip_has_the_bits_of_the_runs(tiny_run: Path, exported: Path, tmp_path: Path):
    pipeline = lingen.LinGenPipeline.from_pretrained(exported)
    found = pipeline("a red square", num_frames=6, height=16, width=8, num_inference_steps=3, guidance_scale=3, seed=7)
    told = {"seconds": 6 / 8, "size": (16, 8), "steps": 3, "guidance": 3, "seed": 7}
    want = next(lingen.generate(tiny_run, "a red square", **told))
    assert want.shape == (6, 16, 8, 3) and np.array_equal(frames_of(found.frames[0]), want) and found.fps == 8
    assert want.std() > 1
    (file,) = sample_to_files(tiny_run, ["a red square"], tmp_path / "x.mp4", **told)
    kept = load_file(file.with_suffix(".latents.safetensors"))["latents"]
    pixels = ((kept[None].clamp(-1, 1) + 1) * 127.5).round().byte()[0, :, :6].permute(1, 2, 3, 0).numpy()
    assert np.array_equal(pixels, want)


def test_defaults_lists_and_a_generator(tiny_run: Path, exported: Path):
    pipeline = lingen.LinGenPipeline.from_pretrained(exported).to("cpu")
    found = pipeline(["a", "b"], generator=torch.Generator().manual_seed(3), num_videos_per_prompt=2)
    want = list(lingen.generate(tiny_run, ["a", "b"], seed=3, repeat=2))
    assert np.array_equal(np.stack([frames_of(clip) for clip in found.frames]), np.stack(want))
    with pytest.raises(ValueError, match="Closest: 8x8"):
        pipeline("a", height=9)


def test_the_folder_is_as_diffusers_has_it(exported: Path, tiny_run: Path):
    files = {str(file.relative_to(exported)) for file in exported.rglob("*") if file.is_file()}
    weights = "diffusion_pytorch_model.safetensors"
    assert files == {
        "model_index.json", "README.md", "recipe.yaml", "denoiser/config.json", f"denoiser/{weights}",
        "autoencoder/config.json", "text_encoder/config.json", f"text_encoder/{weights}",
        "scheduler/scheduler_config.json",
    }  # fmt: skip
    index = json.loads((exported / "model_index.json").read_text())
    assert index["_class_name"] == "LinGenPipeline" and index["denoiser"] == ["lingen", "LinGen"]
    assert index["text_encoder"] == ["lingen", "Words"] and index["autoencoder"] == ["lingen", "Pixels"]
    own = {
        name.removeprefix("model.") for name in lingen.load_model(tiny_run).state_dict() if name.startswith("model.")
    }
    assert load_file(exported / "denoiser" / weights).keys() == own
    config = json.loads((exported / "denoiser" / "config.json").read_text())
    assert config["_class_name"] == "LinGen" and config["dim"] == 16
    assert (exported / "recipe.yaml").read_text() == RunFolder(tiny_run).recipe.read_text()


def test_it_can_be_half_as_large(tiny_run: Path, tmp_path: Path):
    words = ["export", str(tiny_run), "--to", "diffusers", str(tmp_path / "low")]
    assert main([*words, "--precision", "bf16"]) == 0
    held = load_file(tmp_path / "low" / "denoiser" / "diffusion_pytorch_model.safetensors")
    assert held["patchify.weight"].dtype == torch.bfloat16
    assert len(lingen.LinGenPipeline.from_pretrained(tmp_path / "low")("a").frames[0]) == 4


@pytest.mark.parametrize("name", SMALL)
def test_an_autoencoder_comes_along(name: str, tiny_shards: Path, tmp_path: Path):
    torch.manual_seed(1)
    noise = torch.randint(256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    small = TAE(strides=(2, 4, 4), channels=4, width=8, blocks=1) if name == "tae" else PCA.fit([noise], (2, 4, 4), 4)
    path = tmp_path / "small.safetensors"
    write_tensors(path, {f"averaged.autoencoder.{n}": v for n, v in small.state_dict().items()}, {"format": "lingen"})
    recipe = write_recipe(tmp_path / "r.yaml", tiny_shards)
    words = [f"autoencoder={SMALL[name] % json.dumps(str(path))}", "model.patch=[1,1,1]", "train.steps=1"]
    run = fit(recipe, [*words, "stages.images.train.steps=1", "stages.clips.train.steps=1"], run=tmp_path / "run")
    assert main(["export", str(run), "--to", "diffusers", str(tmp_path / "out")]) == 0
    want = next(lingen.generate(run, "a red square"))
    path.unlink()
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    found = lingen.LinGenPipeline.from_pretrained(moved)("a red square")
    assert np.array_equal(frames_of(found.frames[0]), want)
    (moved / "autoencoder" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"autoencoder/diffusion\S+: it cannot be read .* Copy the folder again"):
        lingen.LinGenPipeline.from_pretrained(moved)


@pytest.mark.parametrize(
    "name",
    ["model_index.json", "denoiser/config.json", "denoiser/diffusion_pytorch_model.safetensors",
     "autoencoder/config.json", "text_encoder/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"],
)  # fmt: skip
@pytest.mark.parametrize("how", ["missing", "cut", "empty"])
def test_what_is_missing_or_damaged_is_named_with_the_cure(folder: Path, name: str, how: str):
    file = folder / name
    data = file.read_bytes()
    file.unlink()
    if how != "missing":
        file.write_bytes(data[: len(data) // 2] if how == "cut" else b"")
    with pytest.raises(RecipeError) as caught:
        lingen.LinGenPipeline.from_pretrained(folder)
    assert name in str(caught.value) and "lingen export RUN --to diffusers DIR" in str(caught.value)


def test_other_folders_are_refused(folder: Path, tmp_path: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]):
    load = lingen.LinGenPipeline.from_pretrained
    with pytest.raises(RecipeError, match="no folder. Download a model: `hf download"):
        load(tmp_path / "nothing")
    index = folder / "model_index.json"
    held = json.loads(index.read_text())
    write_json(index, held | {"_lingen_form": 2, "_lingen_version": "9.0"})
    with pytest.raises(RecipeError, match="LinGenPipeline by lingen 9.0, in a form that .* install a later lingen"):
        load(folder)
    write_json(index, {"_class_name": "WanPipeline"})
    with pytest.raises(RecipeError, match="it is of a WanPipeline by"):
        load(folder)
    write_json(index, {name: one for name, one in held.items() if not name.startswith("text")})
    with pytest.raises(RecipeError, match="do not fit"):
        load(folder)
    write_json(index, held)
    write_json(folder / "denoiser" / "config.json", {"_class_name": "LinGen", "depht": 2})
    with pytest.raises(RecipeError, match="Key 'depht' not in 'LinGenConfig'. Did you mean 'depth'"):
        load(folder)
    assert main(["export", str(tiny_run), "--to", "diffusers", str(folder)]) == 2
    assert "Name a new or empty folder" in capsys.readouterr().err


def test_the_card_leaves_nothing_open(tiny_run: Path, exported: Path, tmp_path: Path):
    card = (exported / "README.md").read_text()
    assert not re.search(r"TODO|TBD|\{|None\b|nan", card)
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "text-to-video" and front["library_name"] == "lingen"
    used = json.loads(RunFolder(tiny_run).ledger.read_text())["sources"]
    for source, counts in used.items():
        assert f"| {'/'.join(Path(source).parts[-2:])} | {counts['used']:,} | not recorded |" in card
    assert used and "lingen fit --recipe recipe.yaml" in card and "Not recorded." in card  # no metrics
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    row = {"subject": "run", "metric": "motion", "value": 0.5, "interval": [0.25, 0.75], "n": 8, "floor": None}
    write_json(run / "eval" / "results.json", {"results": [row]})
    share = {"share": 0.875, "low": 0.7, "high": 0.95, "chance": 0.17}
    write_json(RunFolder(run).score, {"step": 6, "split": "report", "sampled": {"clips": 36, "colour": share}})
    weights = find_weights(run)
    card = card_of(lingen.load_model(run), weights, read_metadata(weights))
    assert "| colour | 0.875 | 0.17 | 0.7 to 0.95 | 36 |" in card
    assert "| motion (run) | 0.5 | - | 0.25 to 0.75 | 8 |" in card


def test_licences_beside_the_shards_stand_in_the_card(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    weights = find_weights(run)
    module = lingen.load_model(run)
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "video-00000.tar").write_bytes(b"")
    write_json(shards / "fetched.json", {"licences": ["imageio 2.9.0: BSD 2-clause", "other 1: GPL"]})
    write_json(RunFolder(run).ledger, {"sources": {"imageio 2.9.0": {"used": 1234}, "mine": {"used": 5}}})
    data = module.recipe.data
    object.__setattr__(data, "shards", type(data.shards)(video=str(shards / "video-*.tar")))
    card = card_of(module, weights, read_metadata(weights))
    assert "| imageio 2.9.0 | 1,234 | BSD 2-clause |" in card and "| mine | 5 | not recorded |" in card


@pytest.mark.parametrize("end", ["mp4", "gif", "webp"])
def test_files_say_that_ai_made_them(end: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prompt, out = "ein Käfer hüpft, 蜂", tmp_path / f"x.{end}"
    weights = as_theatre(tiny_run, tmp_path)
    words = ["demo", prompt, "--checkpoint", str(weights), "--seconds", "1", "--steps", "1", "--out", str(out)]
    assert main(words) == 0, capsys.readouterr().err
    want = f"generated by AI (lingen {lingen.__version__}); recipe: tiny; prompt: {prompt}"
    assert told_in(out) == want == told_in(out.with_suffix(".png"))


def told_in(path: Path) -> str:
    """What a file says of itself, as other programs read it."""
    if path.suffix == ".mp4":
        with av.open(str(path)) as file:
            return file.metadata.get("description", "")
    with Image.open(path) as picture:
        if path.suffix == ".png":
            return picture.text["Description"]
        if path.suffix == ".gif":
            return picture.info["comment"].decode()
        return picture.getexif()[ExifTags.Base.ImageDescription].encode("latin-1").decode()


def test_what_sample_writes_says_so_too(tiny_run: Path, tmp_path: Path):
    (file,) = sample_to_files(tiny_run, ["a red square"], tmp_path / "x.mp4", steps=1)
    want = f"generated by AI (lingen {lingen.__version__}); recipe: tiny; prompt: a red square"
    assert told_in(file) == want == told_in(file.with_suffix(".png"))
    for sheet in (tiny_run / "samples").rglob("sheet.png"):
        assert told_in(sheet) == want, "samples of a run"
    assert told_in(save_video(np.zeros((2, 8, 8, 3), np.uint8), tmp_path / "own.mp4", 8)) == "", "frames of a user"
