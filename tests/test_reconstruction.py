"""`lingen eval tae` and what it measures: known errors have known numbers, and pieces do not change them."""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from lingen.autoencoder.ways import tiles_of, ways_of
from lingen.cli import main
from lingen.frozen import Missing
from lingen.media import as_frames, beside, error_frames
from lingen.metrics.autoencoder import PAPER, pairs
from lingen.metrics.reconstruction import (
    Comparison,
    Quality,
    average,
    bicubic,
    bicubic_shape,
    mse_to_psnr,
)
from lingen.recipe import load_recipe, to_yaml
from lingen.recipe.errors import SettingError
from lingen.recipe.registry import AUTOENCODERS
from lingen.weights import write_tensors

HALVES_HERE = f"{__name__}:Halves"


def film(frames: int = 6, height: int = 24, width: int = 32, seed: int = 0) -> Tensor:
    """A soft pattern that moves, in -0.8..0.8."""
    phase = torch.rand(3, generator=torch.Generator().manual_seed(seed)) * 6
    t, y, x = torch.meshgrid(*(torch.arange(n).float() for n in (frames, height, width)), indexing="ij")
    return torch.stack([torch.sin(0.2 * x + 0.15 * y + 0.4 * t + p) for p in phase])[None] * 0.8


def compare(clip: Tensor, rebuilt: Tensor, pieces: int | None = None, perceptual: nn.Module | None = None) -> Quality:
    comparison = Comparison(perceptual)
    for pair in zip(*(video.split(pieces or video.shape[2], 2) for video in (clip, rebuilt)), strict=True):
        comparison.add(*pair)
    return comparison.result()


def approximately(numbers: dict[str, float | None]) -> dict[str, Any]:
    return {
        name: None if value is None else pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in numbers.items()
    }


def test_an_even_error_of_a_tenth_is_20_db_and_does_not_flicker():
    quality = compare(film(), film() + 0.2)  # a tenth in 0..1
    assert quality.psnr == pytest.approx(20, abs=1e-4)
    assert quality.flicker == pytest.approx(0, abs=1e-6) and quality.error_flicker == pytest.approx(0, abs=1e-6)
    assert quality.perceptual is None


def test_equal_clips_have_the_most():
    quality = compare(film(), film())
    assert quality == Quality(100.0, quality.ssim, None, 0.0, 0.0, 0.0) and quality.ssim == pytest.approx(1)


def test_flicker_is_that_of_its_formula():
    clip = film(20)
    rebuilt = clip + 0.1 * (-1.0) ** torch.arange(20)[None, None, :, None, None]
    quality = compare(clip, rebuilt)
    x, y = ((video[0].double().numpy() + 1) / 2 for video in (clip, rebuilt))
    before, after = (np.abs(np.diff(each, axis=1)).mean() for each in (x, y))
    assert quality.flicker == pytest.approx(after - before, rel=1e-4) and quality.flicker > 0.01
    assert quality.flicker_share == pytest.approx((after - before) / before, rel=1e-4)
    assert quality.error_flicker == pytest.approx(0.1, rel=1e-4)  # +0.05 and -0.05 in turn
    assert quality.psnr == pytest.approx(-10 * math.log10(((x - y) ** 2).mean()), rel=1e-5)
    still = compare(clip[:, :, :1].expand(-1, -1, 4, -1, -1), rebuilt[:, :, :4])
    assert still.flicker_share is None and still.flicker > 0
    dull = compare(clip, clip.mean(2, keepdim=True).expand_as(clip))
    assert dull.flicker_share == pytest.approx(-1)


def test_an_image_has_no_flicker():
    quality = compare(film(1), film(1) * 0.9)
    assert (quality.flicker, quality.flicker_share, quality.error_flicker) == (None, None, None)
    assert average([quality, compare(film(), film())])["flicker"] == 0


def test_ssim_is_torchmetrics_over_all_frames():
    from torchmetrics.functional.image import structural_similarity_index_measure

    clip, rebuilt = film(20), film(20) * 0.7
    frames = [(video[0].movedim(1, 0) + 1) / 2 for video in (rebuilt, clip)]
    expected = float(structural_similarity_index_measure(*frames, data_range=1.0))
    assert compare(clip, rebuilt).ssim == pytest.approx(expected, abs=1e-5) and expected < 0.99


class Mean(nn.Module):
    """A distance: the mean absolute difference."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean((1, 2, 3))


class Absent(Mean):
    def missing(self) -> list[Missing]:
        return [Missing("absent", "nowhere", "Put it somewhere.")]


@settings(max_examples=10, deadline=None)
@given(pieces=st.integers(1, 30), frames=st.integers(1, 20))
def test_pieces_change_nothing(pieces, frames):
    clip, rebuilt = film(frames), film(frames, seed=1)
    one, other = compare(clip, rebuilt, None, Mean()), compare(clip, rebuilt, pieces, Mean())
    assert vars(one) == approximately(vars(other))
    assert one.perceptual == pytest.approx(float((clip - rebuilt).abs().mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("clip", "rebuilt", "message"),
    [
        (film(4), film(5), "are compared"),
        (film(4).expand(2, -1, -1, -1, -1), film(4).expand(2, -1, -1, -1, -1), "One clip"),
        (film(4, 10), film(4, 10), "11 x 11"),
        (film(4), film(4) * torch.nan, "NaN"),
    ],
)
def test_what_cannot_be_compared_is_said(clip, rebuilt, message):
    with pytest.raises(ValueError, match=message):
        compare(clip, rebuilt)


def test_psnr_has_an_end():
    assert mse_to_psnr(0.0) == 100 and mse_to_psnr(1.0) == 0 and mse_to_psnr(1e-3) == pytest.approx(30)


@settings(max_examples=50, deadline=None)
@given(
    t=st.integers(1, 100),
    h=st.integers(4, 32).map(lambda n: n * 8),
    w=st.integers(4, 32).map(lambda n: n * 8),
    strides=st.sampled_from([(8, 8, 8, 16), (4, 8, 8, 8), (1, 8, 8, 4)]),
    in_time=st.booleans(),
)
def test_the_small_clip_holds_as_many_numbers_as_the_latents(t, h, w, strides, in_time):
    numbers = strides[3] * math.ceil(t / strides[0]) * (h // strides[1]) * (w // strides[2])
    frames, height, width = bicubic_shape((t, h, w), numbers, in_time=in_time)
    assert 1 <= frames <= t and 1 <= height <= h and 1 <= width <= w and (in_time or frames == t)
    assert abs(3 * frames * height * width - numbers) <= 1.5 * frames * height + 1e-9 or width == 1


def test_shapes_of_movie_gens_compression():
    """16 channels of 8 x 8 x 8: a 96th of the numbers; 96 ** (1/3) = 4.58."""
    numbers = 16 * 34 * 64 * 64
    assert bicubic_shape((272, 512, 512), numbers, in_time=True) == (59, 112, 112)
    assert bicubic_shape((272, 512, 512), numbers, in_time=False) == (272, 52, 53)


def test_a_smooth_clip_survives_being_small_and_noise_does_not():
    noise = torch.rand(1, 3, 12, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    smooth = film(12, 32, 32)
    for shape in ((12, 16, 16), (6, 16, 16)):
        rebuilt = {name: torch.cat([*bicubic([clip], shape)], 2) for name, clip in (("s", smooth), ("n", noise))}
        assert rebuilt["s"].shape == smooth.shape
        assert compare(smooth, rebuilt["s"]).psnr > 25 > 15 > compare(noise, rebuilt["n"]).psnr
    flat = torch.full((1, 3, 7, 16, 16), 0.25)
    torch.testing.assert_close(torch.cat([*bicubic([flat], (3, 5, 6))], 2), flat)
    same = torch.cat([*bicubic([smooth], smooth.shape[2:])], 2)
    torch.testing.assert_close(same, smooth, rtol=0, atol=1e-5)
    in_pieces = torch.cat([*bicubic(smooth.split(5, 2), (6, 16, 16), piece=3)], 2)
    torch.testing.assert_close(in_pieces, rebuilt["s"])


def test_streams_of_other_pieces_are_walked_together():
    clip = film(20)
    longer = torch.cat([clip, clip[:, :, :4]], 2)
    for sizes in ((7, 3), (3, 7), (20, 24), (20, 1)):
        walked = list(pairs(iter(clip.split(sizes[0], 2)), iter(longer.split(sizes[1], 2))))
        assert all(a.shape == b.shape and torch.equal(a, b) for a, b in walked)
        assert sum(a.shape[2] for a, _ in walked) == 20
    with pytest.raises(ValueError, match="fewer frames"):
        list(pairs(iter([longer]), iter([clip])))


def test_frames_for_files():
    one, other = as_frames(film(2)), as_frames(film(2) + 0.1)
    assert one.shape == (2, 24, 32, 3) and one.dtype == np.uint8
    error = error_frames(one, other)
    assert error.dtype == np.uint8 and np.median(error) == pytest.approx(4 * 0.05 * 255, abs=4)
    assert error_frames(other * 0, other * 0 + 255).max() == 255
    frames = list(beside(one, other))
    assert len(frames) == 2 and frames[0].shape == (96, 256, 3)


# the command


class Halves(nn.Module):
    """Every second row, column and frame, with streams of its own; a bright clip gives NaN where `broken`."""

    strides, channels = (2, 2, 2), 3

    def __init__(self, *, path: str | None = None, alone: bool = False, broken: bool = False):
        super().__init__()
        self.path, self.first_frame_alone, self.broken = path, alone, broken

    def missing(self) -> list[Missing]:
        there = self.path is None or Path(self.path).is_file()
        return [] if there else [Missing("halves", str(self.path), "Put the file there.")]

    def encode(self, video: Tensor) -> Tensor:
        return video[:, :, ::2, ::2, ::2] / (0 if self.broken else 1)

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents, scale_factor=2)

    def encode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        yield self.encode(torch.cat(list(pieces), 2))

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        yield from map(self.decode, latents.split(1, 2))


RECIPE = """
model: {{dim: 16, depth: 1, mixer: attention, patch: [1, 2, 2]}}
autoencoder: "{autoencoder}"
text: {{name: words, dim: 8, buckets: 64}}
data:
  shards: {{image: "{folder}/image-*.tar", video: "{folder}/video-*.tar"}}
  validation: {{video: "{folder}/video-00001.tar"}}
  mix: {{image: {images}, video: 1}}
  frames: 4
  size: [16, 16]
  fps: 8
  workers: 0
train: {{steps: 1}}
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_shards: Path) -> Any:
    def write(autoencoder: str = HALVES_HERE, images: int = 0) -> str:
        path = tmp_path / "r.yaml"
        path.write_text(RECIPE.format(folder=tiny_shards, autoencoder=autoencoder, images=images))
        return str(path)

    return write


def evaluated(recipe: str, out: Path, *words: str) -> dict[str, Any]:
    assert main(["eval", "tae", "--recipe", recipe, "--out", str(out), *words]) == 0
    return json.loads((out / "metrics.json").read_text())


def test_pixels_lose_nothing(recipe, tmp_path, capsys):
    result = evaluated(recipe("pixels", images=1), tmp_path / "out", "--clips", "3", "--json")
    assert json.loads(capsys.readouterr().out) == result
    assert [(row["kind"], row["what"]) for row in result["rows"]] == [("video", "pixels"), ("image", "pixels")]
    assert all(row["psnr"] == 100 and row["ssim"] == pytest.approx(1) for row in result["rows"])
    assert [len(result["clips"]), result["way"], result["paper"]] == [6, "whole", PAPER]
    assert "video: 3 held-out clips (data.validation.video)" in result["notes"]
    assert any("image: 3 clips to train on: no held-out" in note for note in result["notes"])
    with Image.open(tmp_path / "out" / "side_by_side.png") as picture:
        assert picture.height == 18 * (96 + 16)  # 6 clips, 3 rows each
    with av.open(str(tmp_path / "out" / "side_by_side.mp4")) as film:
        assert len(list(film.decode(video=0))) == 4 and film.streams.video[0].width == 192


def test_the_numbers_are_those_of_the_clips(recipe, tmp_path, capsys):
    from lingen.data.datamodule import ClipData
    from lingen.recipe import load_stages

    result = evaluated(recipe(), tmp_path / "out", "--clips", "5", f"reconstruction.features.name={__name__}:Mean")
    shown = capsys.readouterr().out
    stage = load_stages(recipe(), ["train.validation_samples=5"])[0]
    clips = torch.cat([batch.clips for batch in ClipData(stage).val_dataloader()]).float() / 127.5 - 1
    rebuilt = [nn.functional.interpolate(clip[None][:, :, ::2, ::2, ::2], scale_factor=2) for clip in clips]
    expected = average([compare(clip[None], other, None, Mean()) for clip, other in zip(clips, rebuilt, strict=True)])
    rows = {row["what"]: row for row in result["rows"]}
    assert list(rows) == [HALVES_HERE, "bicubic, space", "bicubic, space and time"]
    ours = rows[HALVES_HERE]
    assert {name: ours[name] for name in expected} == approximately(expected)
    assert ours["numbers"] == 1 / 8 and rows["bicubic, space"]["numbers"] == pytest.approx(1 / 8, rel=0.1)
    assert 10 < ours["psnr"] < rows["bicubic, space"]["psnr"] < 50  # every second pixel is a poor average
    assert result["latents"]["video"]["std"] == pytest.approx(float(clips.std()), rel=0.1)
    assert f"{ours['psnr']:.2f}" in shown and "Movie Gen's TAE" in shown and "32.25" in shown


def test_the_ways_are_compared(recipe, tmp_path):
    words = ("--clips", "2", "--compare", "--frames", "5", "--size", "32x32")
    result = evaluated(recipe(), tmp_path / "out", *words)
    assert result["way"] == "exact" and result["data"]["video"]["size"] == [32, 32]
    assert list(result["compare"]) == ["video: exact against whole"]
    tiled = evaluated(recipe(), tmp_path / "out", *words, "--tile", "16x16")
    assert list(tiled["compare"]) == [
        "video: tiled against whole", "video: exact against whole", "video: exact against tiled",
    ]  # fmt: skip
    assert all(one["psnr"] > 90 and one["latents"] < 1e-6 for one in tiled["compare"].values())  # nothing reaches out
    assert tiled["rows"][0]["psnr"] == pytest.approx(result["rows"][0]["psnr"], abs=1e-3) and tiled["way"] == "tiled"


def run_of(recipe: str, folder: Path, *overrides: str) -> Path:
    """A run folder as `lingen fit` leaves it, of fresh weights (or those that come with the autoencoder)."""
    loaded = load_recipe(recipe, overrides)
    autoencoder = AUTOENCODERS.build(loaded.autoencoder)
    if getattr(autoencoder, "path", None):
        autoencoder.load()
    weights = {f"averaged.autoencoder.{name}": value for name, value in autoencoder.state_dict().items()}
    metadata = {"format": "lingen", "recipe": to_yaml(loaded), "stage": "main", "step": "1"}
    write_tensors(folder / "stages/main/weights.safetensors", weights, metadata)
    (folder / "recipe.yaml").write_text(to_yaml(loaded))
    (folder / "run.json").write_text(json.dumps({"stages": ["main"]}))
    return folder


TRAINS = ("trains=autoencoder", "reconstruction.adversarial=0", "data.size=[32,32]")


@pytest.mark.parametrize("name", ["tae", "tae_small"])
def test_a_run_is_judged_with_its_own_autoencoder(recipe, tmp_path, name):
    """Also one that went on from packaged weights; on its own clips, or those of another recipe."""
    sizes = () if name == "tae_small" else ("autoencoder.width=8", "autoencoder.blocks=1", "autoencoder.channels=4")
    run = run_of(recipe(name), tmp_path / "run", *TRAINS, *sizes)
    weights = str(run / "stages/main/weights.safetensors")
    words = ("--clips", "1", "--out", str(tmp_path / "out"))
    assert main(["eval", "tae", "--run", str(run), *words]) == 0
    own = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (own["autoencoder"]["name"], own["autoencoder"]["path"]) == ("tae", weights)
    assert own["autoencoder"]["width"] == (32 if name == "tae_small" else 8)
    other = evaluated(recipe("pixels"), tmp_path / "out", *words, "--checkpoint", weights, "--size", "32x32")
    assert other["autoencoder"]["path"] == weights
    assert other["rows"][0]["psnr"] == pytest.approx(own["rows"][0]["psnr"])
    if name == "tae_small":
        packaged = evaluated(recipe(name), tmp_path / "out", *words, "--size", "32x32")
        assert packaged["rows"][0]["psnr"] == pytest.approx(own["rows"][0]["psnr"])


def test_whose_autoencoder_is_meant_is_asked(recipe, tmp_path, capsys):
    run = run_of(recipe("tae_small"), tmp_path / "run", "data.size=[32,32]", "model.patch=[1,1,1]")
    assert main(["eval", "tae", "--run", str(run)]) == 2
    told = capsys.readouterr().err
    assert "no autoencoder of its own" in told and f"--recipe {run}/recipe.yaml" in told
    assert evaluated(f"{run}/recipe.yaml", tmp_path / "out", "--clips", "1")["autoencoder"]["name"] == "tae_small"
    assert main(["eval", "tae", "--run", str(run), "--autoencoder", "pixels"]) == 2
    assert "are two autoencoders" in capsys.readouterr().err


def test_any_autoencoder_on_the_clips_of_an_autoencoders_recipe(recipe, tmp_path):
    words = (*TRAINS, "sample.decode=exact", "--autoencoder", "pixels", "--clips", "1")
    assert evaluated(recipe("tae_small"), tmp_path / "out", *words)["rows"][0]["psnr"] == 100


def test_of_drawn_clips_only_those_that_are_looked_at_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("LINGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "r.yaml").write_text(
        "autoencoder: pixels\ntext: {name: words, dim: 8, buckets: 64}\nmodel: {dim: 16, depth: 1, mixer: attention}\n"
        "data: {synthetic: shapes, mix: {image: 0}, frames: 4, size: [16, 16], fps: 8}\n"
    )
    result = evaluated(str(tmp_path / "r.yaml"), tmp_path / "out", "--clips", "2")
    assert "video: 2 held-out clips (data.validation.video)" in result["notes"]
    keys = [key for shard in (tmp_path / "cache").rglob("video-*.tar") for key in tarfile.open(shard).getnames()]
    assert len([key for key in keys if key.endswith(".mp4")]) == 5  # one to train on, two of each held-out split


def test_results_do_not_go_into_a_file(recipe, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in ("file", "file/folder"):
        assert main(["eval", "tae", "--recipe", recipe(), "--out", str(tmp_path / out)]) == 2
        assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err


def test_a_distance_without_weights_is_left_out_and_said(recipe, tmp_path):
    features = f"reconstruction.features.name={__name__}:Absent"
    result = evaluated(recipe(), tmp_path / "out", "--clips", "1", features)
    assert result["rows"][0]["perceptual"] is None
    assert "no perceptual distance: absent nowhere: Put it somewhere." in result["notes"]


@pytest.mark.parametrize(
    ("tile", "strides", "size", "shared"),
    [
        ((64, 96), (8, 8, 8), (8, 12), (2, 2)),
        ((120, 120), (8, 8, 8), (15, 15), (3, 3)),
        ((256, 256), (4, 16, 16), (16, 16), (4, 4)),
        ((64, 64), (4, 16, 8), (4, 8), (1, 2)),
        ((6, 9), (1, 1, 1), (6, 9), (1, 1)),
    ],
)
def test_tiles_share_a_quarter(tile, strides, size, shared):
    assert tiles_of(tile, strides) == (size, shared)


def test_tiles_that_share_less_than_a_latent_are_refused():
    with pytest.raises(SettingError, match="take 64 pixels a side or more") as refused:
        tiles_of((48, 96), (8, 16, 16))
    assert refused.value.setting == "tile"


def test_ways():
    assert ways_of(Halves()) == ways_of(Halves(alone=True)) == ["exact", "tiled", "whole"]


HALVES = f"autoencoder={HALVES_HERE}"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--size", "17x16"], 2, "height of 17 pixels is no multiple of 2.*take 16 or 18"),
        (["--size", "16x8"], 2, "16x8 are too small to be compared"),
        ([HALVES, "autoencoder.path=no.safetensors"], 2, "missing: halves no.safetensors: Put the file there"),
        (["--autoencoder", "pixels", "--stream", "exact"], 2, "no streams of its own; take tiled or whole"),
        (
            [HALVES, "autoencoder.alone=true", "data.frames=5", "--frames", "4"],
            2,
            "4 frames do not fit; take 3 or 5 frames",
        ),
        (["--stream", "tiled", "--tile", "15x16"], 2, "tile=15x16: height and width must be multiples of 2"),
        (["--tile", "6x16"], 2, "tile=6x16 is too small.*take 8 pixels a side or more"),
        (["--tile", "16x16", "--stream", "exact"], 2, "--tile goes with --stream tiled, not with --stream exact"),
        (["--frames", "50"], 1, "short clip: 6 frames where 50"),
        ([HALVES, "autoencoder.broken=true"], 1, "NaN or infinity"),
        (["data.shards.video=no-*.tar"], 2, "no-"),
        (["--run", "a", "--checkpoint", "b"], 2, "either --run DIR or --checkpoint F"),
        (["--checkpoint", "no.safetensors"], 2, "no run folder or weights file"),
        (["--stage", "other"], 2, "other"),
        (["--autoencoder", "pixel"], 2, "Did you mean 'pixels'"),
        (["--size", "16"], 2, "no height x width"),
    ],
)
def test_mistakes_are_told_in_a_sentence(recipe, tmp_path, capsys, words, code, message):
    import re

    assert main(["eval", "tae", "--recipe", recipe(), "--out", str(tmp_path / "out"), *words]) == code
    told = capsys.readouterr().err
    assert re.search(message, told) and "Traceback" not in told
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_without_a_recipe(capsys, tmp_path):
    assert main(["eval", "tae"]) == 2
    assert "--recipe R, or --run DIR" in capsys.readouterr().err
    assert main(["eval", "tae", "--run", str(tmp_path / "none")]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_a_denoisers_patches_need_not_fill_the_clip(recipe, tmp_path):
    result = evaluated(recipe("pixels"), tmp_path / "out", "--clips", "1", "--size", "13x15", "--frames", "3")
    assert (result["data"]["video"]["size"], result["data"]["video"]["frames"]) == ([13, 15], 3)
    assert result["rows"][0]["psnr"] == 100
