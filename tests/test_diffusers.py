"""Video autoencoders of diffusers: tiny models of the real classes, saved by diffusers and read back by lingen."""

import inspect
import json
import logging
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lingen.autoencoder.diffusers_known import KNOWN, UNFIT
from lingen.autoencoder.diffusers_vae import DiffusersVAE
from lingen.autoencoder.ways import decode_tiled, encode_tiled, tiles_of
from lingen.recipe.errors import RecipeError, SettingError
from lingen.recipe.registry import AUTOENCODERS
from lingen.recipe.sizes import check_frames
from tests.helpers.convs import PaddedShortClips

diffusers = pytest.importorskip("diffusers")

FOUR = dict(latents_mean=[0.1, 0.2, -0.3, 0.4], latents_std=[0.5, 2.0, 0.25, 4.0])
BLOCKS = dict(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2)
WAN = dict(base_dim=4, z_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1, **FOUR)
LTX = dict(latent_channels=4, layers_per_block=(1,) * 5, scaling_factor=0.5)
TINY = {
    "AutoencoderKLWan": WAN,
    "AutoencoderKLHunyuanVideo": dict(**BLOCKS, latent_channels=4, scaling_factor=0.5),
    "AutoencoderKLHunyuanVideo15": dict(
        block_out_channels=(32,) * 5, layers_per_block=1, latent_channels=4, scaling_factor=2.0
    ),
    "AutoencoderKLCogVideoX": dict(**BLOCKS, latent_channels=4, scaling_factor=2.0, shift_factor=0.2),
    "AutoencoderKLLTXVideo": dict(
        **LTX,
        block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4,
        decoder_layers_per_block=(1,) * 5,
    ),
    "AutoencoderKLLTX2Video": dict(
        **LTX,
        block_out_channels=(4, 8, 16, 32),
        decoder_block_out_channels=(8, 16, 32),
        decoder_layers_per_block=(1,) * 4,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    ),
    "AutoencoderKLCosmos": dict(
        latent_channels=4,
        encoder_block_out_channels=(4,) * 4,
        decode_block_out_channels=(4,) * 4,
        attention_resolutions=(8,),
        resolution=16,
        num_layers=1,
        latents_mean=[0.1, 0.2] * 4,  # its mean and deviation are those of each of two latent frames
        latents_std=[2.0, 0.5] * 4,
    ),
    "AutoencoderKLMochi": dict(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        latent_channels=4,
        layers_per_block=(1,) * 5,
        scaling_factor=0.25,
        **FOUR,
    ),
    "AutoencoderKLMagvit": dict(**BLOCKS, latent_channels=4, scaling_factor=0.5),
}
OTHERS = {
    "Kandinsky6SRVAE": dict(
        latent_channels=4,
        encoder_block_out_channels=(4,) * 5,
        decoder_block_out_channels=(4,) * 5,
        layers_per_block=1,
        scaling_factor=0.5,
    ),
    "AutoencoderKLQwenImage": WAN,
}
STRIDES = {**{name: model.strides for name, model in KNOWN.items()}, "Kandinsky6SRVAE": (4, 16, 16)}
STRIDES["AutoencoderKLQwenImage"] = (4, 8, 8)


def make(class_name: str, folder: Path, **changes):
    """A tiny model of a real class with drawn weights, saved by diffusers."""
    torch.manual_seed(0)
    vae = getattr(diffusers, class_name)(**{**TINY, **OTHERS}[class_name] | changes).eval()
    for name, buffer in vae.named_buffers():
        if name in FOUR:
            buffer.copy_(torch.tensor(FOUR[name]))
    vae.save_pretrained(folder)
    return vae


def adapter(of: str, folder: Path, **settings) -> DiffusersVAE:
    sizes = dict(channels=4, strides=list(STRIDES[of]))
    component = {"path": str(folder), "class_name": of, **sizes, **settings}
    return AUTOENCODERS.build({"name": "diffusers", **component})


def double(of: str, vae, folder: Path, **settings) -> DiffusersVAE:
    """The adapter, and the model beside it, in float64: tiny models amplify what rounding does to some of them."""
    vae.double()
    ours = adapter(of, folder, **settings)
    ours.dtype = torch.float64
    return ours


def clip(class_name: str, latent_frames: int, batch: int = 2) -> torch.Tensor:
    stride, height, width = STRIDES[class_name]
    shape = (batch, 3, 1 + stride * (latent_frames - 1), 2 * height, 2 * width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def direct(vae, video: torch.Tensor) -> torch.Tensor:
    """The class's own latents, clip by clip."""
    with torch.no_grad():
        return torch.cat([vae.encode(one).latent_dist.mode() for one in video.double().split(1)]).float()


def direct_decode(vae, latents: torch.Tensor, *time: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([vae.decode(one, *time).sample for one in latents.double().split(1)]).float()


def spread(vae, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of a class's latents, as its own pipeline reads them."""
    config, buffers = vae.config, dict(vae.named_buffers())
    mean = torch.as_tensor(
        buffers.get("latents_mean", config.get("latents_mean") or config.get("shift_factor") or 0.0)
    ).float()
    std = torch.as_tensor(buffers.get("latents_std", config.get("latents_std") or 1.0)).float()
    if mean.ndim:
        mean, std = (one.view(1, 4, -1, 1, 1)[:, :, :frames] for one in (mean, std))
    return mean, std / config.get("scaling_factor", 1.0)


def normal(vae, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the class's own pipeline would hand them to the denoiser."""
    mean, std = spread(vae, latents.shape[2])
    return (latents - mean) / std


def back(vae, latents: torch.Tensor) -> torch.Tensor:
    mean, std = spread(vae, latents.shape[2])
    return latents * std + mean


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Up to what is left of float64 after a cast to float32."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).square().mean().sqrt() < 1e-6 * theirs.square().mean().sqrt().clamp(min=1e-6)


def test_every_known_class_is_tried():
    assert set(TINY) == set(KNOWN)


@pytest.mark.parametrize("class_name", [*TINY, *OTHERS])
def test_it_is_the_class_itself_with_its_latents_brought_to_the_noise(class_name, tmp_path):
    vae = make(class_name, tmp_path)
    ours = double(class_name, vae, tmp_path)
    assert ours.missing() == []
    for frames in (1, 3 if class_name == "AutoencoderKLCogVideoX" else 2):
        video = clip(class_name, frames)
        own = direct(vae, video)
        latents = ours.encode(video)
        assert latents.shape == (2, 4, frames, 2, 2) and own.std() > 0
        same(latents, normal(vae, own))
        assert not torch.allclose(latents, own, rtol=1e-2)
        pixels = ours.decode(latents)
        assert pixels.shape == video.shape and pixels.dtype == latents.dtype == torch.float32
        same(pixels, direct_decode(vae, back(vae, latents)))
    # A checkpoint of the run does not hold it, and no optimiser moves it.
    assert not ours.state_dict() and not list(ours.parameters()) and not latents.requires_grad


@pytest.mark.parametrize("class_name", [*TINY, *OTHERS])
def test_no_class_leaves_the_padding_of_short_clips_to_torch(class_name, tmp_path):
    """They pad along time themselves, so the adapter has nothing to go around (docs/upstream.md)."""
    make(class_name, tmp_path)
    ours = adapter(class_name, tmp_path)
    with PaddedShortClips() as watch:
        for frames in (1, 3 if class_name == "AutoencoderKLCogVideoX" else 2):
            ours.decode(ours.encode(clip(class_name, frames, batch=1)))
    assert watch.convolutions > 20 and not watch.found


@pytest.mark.parametrize("class_name", KNOWN)
def test_the_sizes_without_settings_are_those_of_the_class(class_name):
    """Of the class's defaults, which are those of the public weights, and of a config that leaves all of them out."""
    signature = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    defaults = {name: one.default for name, one in signature.items() if one.default is not one.empty}
    channels = next(defaults[key] for key in ("latent_channels", "z_dim") if key in defaults)
    model, ours = KNOWN[class_name], DiffusersVAE(class_name=class_name)
    assert (ours.strides, ours.channels) == (model.strides, model.channels) and channels == model.channels
    if class_name != "AutoencoderKLLTX2Video":  # the weights' config states the ratios, which the defaults leave out
        assert model.sizes(defaults) == model.strides[:2]
        assert model.sizes({}) == model.strides[:2]
    assert model.sizes({"temporal_compression_ratio": 8, "spatial_compression_ratio": 32, **defaults}) is not None


@pytest.mark.parametrize(("frames", "nearest"), [(16, "13 or 17"), (2, "1 or 5"), (6, "5 or 9")])
def test_the_first_frame_stands_alone(frames, nearest, tmp_path):
    make("AutoencoderKLWan", tmp_path)
    ours = adapter("AutoencoderKLWan", tmp_path)
    assert ours.first_frame_alone
    with pytest.raises(ValueError, match=f"{frames} frames do not fit; take {nearest} frames"):
        ours.encode(torch.zeros(1, 3, frames, 8, 8))
    check_frames(17, ours)
    assert ours.frame_unit == 4
    with pytest.raises(ValueError, match="20x8 .*must be multiples of 8"):
        ours.encode(torch.zeros(1, 3, 5, 20, 8))


def test_cogvideox_comes_by_eight_frames():
    ours = DiffusersVAE(class_name="AutoencoderKLCogVideoX")
    for frames in (1, 9, 49):
        check_frames(frames, ours)
    with pytest.raises(ValueError, match="take 9 or 17 frames"):
        check_frames(13, ours)


@pytest.mark.parametrize(
    ("settings", "setting", "words"),
    [
        ({}, "strides", "'diffusers' needs strides.*AutoencoderKLWan"),
        ({"strides": (4, 8, 8)}, "channels", "needs channels"),
        ({"class_name": "AutoencoderKLWam"}, "strides", "Did you mean 'AutoencoderKLWan'"),
        ({"class_name": "AutoencoderKLWan", "strides": (4, 0, 8)}, "strides", "at least 1"),
        ({"class_name": "AutoencoderKLWan", "channels": 0}, "channels", "at least 1 or null, got 0"),
        ({"class_name": "AutoencoderKLWan", "scale": 0.0}, "scale", "above 0"),
        ({"class_name": "AutoencoderKLCosmos", "tiling": True}, "tiling", "does not work in tiles"),
        *(({"class_name": name}, "class_name", "cannot be used") for name in UNFIT),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, setting, words):
    with pytest.raises(SettingError, match=words) as error:
        DiffusersVAE(**settings)
    assert error.value.setting == setting


def _edit(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def _cut(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _index(folder: Path, told) -> None:
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": told}))


def _rename(folder: Path, name: str) -> None:
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / name)


@pytest.mark.parametrize(
    ("damage", "settings", "words"),
    [
        (None, {"path": None}, "does not say where.*'vae' of Wan-AI/Wan2.1-T2V-1.3B-Diffusers and set 'path'"),
        (None, {"path": "nowhere"}, "there is no nowhere.config.json. Download the folder 'vae' of Wan-AI"),
        (None, {"subfolder": "vae"}, "there is no .*vae.config.json"),
        (lambda f: (f / "config.json").write_text("{"), {}, "is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), {}, "names no class"),
        (None, {"class_name": "AutoencoderKLMochi"}, "holds a 'AutoencoderKLWan'.*Set class_name: AutoencoderKLWan"),
        (None, {"channels": 16}, "4 channels, the recipe 16. Set channels: 4"),
        (None, {"strides": [4, 16, 16]}, r"strides \[4, 8, 8\], the recipe \[4, 16, 16\]. Set strides: \[4, 8, 8\]"),
        (lambda f: _edit(f, _class_name="AutoencoderKL"), {"class_name": None}, "takes pictures"),
        (_cut, {}, "is cut off or no safetensors file. Download the folder 'vae'"),
        (lambda f: _index(f, []), {}, "index.json does not say which tensor is in which file. Download"),
        (
            lambda f: _rename(f, "diffusion_pytorch_model.bin"),
            {},
            r"safetensors\) \(there is diffusion_pytorch_model.bin",
        ),
    ],
)
def test_what_is_missing_is_said_before_a_run_and_by_the_run(damage, settings, words, tmp_path, monkeypatch):
    make("AutoencoderKLWan", tmp_path)
    if damage:
        damage(tmp_path)
    ours = adapter("AutoencoderKLWan", tmp_path, **settings)
    (found,) = ours.missing()
    assert (found.name, found.path) == ("diffusers", ours.path or "-")
    for method in (ours.encode, ours.decode):
        with pytest.raises(RecipeError, match=words) as error:
            method(torch.zeros(1, 3, 1, 8, 8))
        assert found.cure in error.value.problems[0]


def test_without_diffusers_it_says_how_to_install_it(tmp_path, monkeypatch):
    """Which also shows that a recipe is checked without importing it."""
    make("AutoencoderKLWan", tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for room in Path(inspect.getfile(DiffusersVAE)).parent.glob("diffusers_*.py"):
        runpy.run_path(str(room))
    with torch.device("meta"):
        ours = adapter("AutoencoderKLWan", tmp_path)
    (found,) = ours.missing()
    assert "pip install 'diffusers>=0.35'" in found.cure
    with pytest.raises(RecipeError, match="pip install"):
        ours.encode(torch.zeros(1, 3, 1, 8, 8))


def test_a_pipeline_and_weights_in_several_files(tmp_path):
    vae = make("AutoencoderKLWan", tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    video = clip("AutoencoderKLWan", 2)
    vae.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    whole = double("AutoencoderKLWan", vae, tmp_path)
    parts = double("AutoencoderKLWan", vae, tmp_path, subfolder="parts", class_name=None)
    for ours in (whole, parts):
        assert ours.missing() == []
        same(ours.encode(video), normal(vae, direct(vae, video)))
    next((tmp_path / "parts").glob("*-00002-of-*")).unlink()
    assert "00002-of-" in adapter("AutoencoderKLWan", tmp_path, subfolder="parts").missing()[0].cure


def test_weights_of_another_model_are_refused(tmp_path):
    """What diffusers itself would only warn of: it draws the weights that a file lacks."""
    make("AutoencoderKLWan", tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if name != "quant_conv.bias"}, file, {"format": "pt"})
    with pytest.raises(
        RecipeError, match="not those of its config.json .missing: quant_conv.bias.. Download them again"
    ):
        adapter("AutoencoderKLWan", tmp_path).encode(torch.zeros(1, 3, 1, 8, 8))
    save_file({**weights, "extra": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(RecipeError, match="unexpected: extra"):
        adapter("AutoencoderKLWan", tmp_path).encode(torch.zeros(1, 3, 1, 8, 8))
    _edit(tmp_path, base_dim=8)
    with pytest.raises(RecipeError, match="AutoencoderKLWan of diffusers cannot read .*size mismatch"):
        adapter("AutoencoderKLWan", tmp_path).encode(torch.zeros(1, 3, 1, 8, 8))


def test_a_class_that_diffusers_does_not_have(tmp_path):
    make("AutoencoderKLWan", tmp_path)
    _edit(tmp_path, _class_name="AutoencoderKLWann")
    ours = adapter("AutoencoderKLWan", tmp_path, class_name=None)
    with pytest.raises(RecipeError, match="has no model called 'AutoencoderKLWann'. Did you mean 'AutoencoderKLWan'"):
        ours.encode(torch.zeros(1, 3, 1, 8, 8))


def test_strides_that_no_config_states_are_compared_with_what_comes_out(tmp_path):
    make("Kandinsky6SRVAE", tmp_path)
    with pytest.raises(RecipeError, match=r"encode of Kandinsky6SRVAE gave .* strides \[4, 8, 8\].*not those of this"):
        adapter("Kandinsky6SRVAE", tmp_path, strides=[4, 8, 8]).encode(torch.zeros(1, 3, 1, 16, 16))
    with pytest.raises(RecipeError, match="decode of Kandinsky6SRVAE gave"):
        adapter("Kandinsky6SRVAE", tmp_path, first_frame_alone=False).decode(torch.zeros(1, 4, 2, 1, 1))


@pytest.mark.parametrize("class_name", ["AutoencoderKLWan", "AutoencoderKLMagvit"])
def test_tiles_are_the_class_s_own_clip_by_clip(class_name, tmp_path):
    vae = make(class_name, tmp_path)
    video = torch.randn(2, 3, 5, 16, 528)
    ours = double(class_name, vae, tmp_path, tiling=True)
    untiled = direct(vae, video)
    vae.enable_tiling()
    latents = ours.encode(video)
    same(latents, normal(vae, direct(vae, video)))
    assert not torch.allclose(latents, normal(vae, untiled), atol=1e-3)
    batches = set()
    vae, _, _ = ours._loaded[0]
    for part in (vae.encoder, vae.decoder):
        part.register_forward_pre_hook(lambda _, inputs: batches.add(len(inputs[0])))
    ours.encode(video)
    same(ours.decode(latents), direct_decode(vae, back(vae, latents)))
    assert batches == {1}


def test_ltx_tiles_time_too(tmp_path):
    make("AutoencoderKLLTXVideo", tmp_path)
    video = clip("AutoencoderKLLTXVideo", 6)
    latents = adapter("AutoencoderKLLTXVideo", tmp_path).encode(video)
    tiled = adapter("AutoencoderKLLTXVideo", tmp_path, tiling=True)
    assert tiled.encode(video).shape == latents.shape and tiled.decode(latents).shape == video.shape
    assert not torch.allclose(tiled.encode(video), latents, atol=1e-3)


@pytest.mark.parametrize(
    ("class_name", "where"), [("AutoencoderKLCosmos", None), ("Kandinsky6SRVAE", "Kandinsky6SRVAE")]
)
def test_tiles_that_a_class_does_not_have_are_refused(class_name, where, tmp_path):
    make(class_name, tmp_path)
    with pytest.raises(RecipeError, match=f"'{class_name}' of diffusers does not work in tiles"):
        adapter(class_name, tmp_path, class_name=where, tiling=True).encode(clip(class_name, 1))


def test_cosmos_knows_the_spread_of_so_many_frames(tmp_path):
    make("AutoencoderKLCosmos", tmp_path)
    with pytest.raises(ValueError, match="for 2 latent frames, not for 3: use shorter clips"):
        adapter("AutoencoderKLCosmos", tmp_path).encode(clip("AutoencoderKLCosmos", 3))


def test_ltx_decoder_that_denoises_gets_time_0(tmp_path):
    vae = make("AutoencoderKLLTXVideo", tmp_path, timestep_conditioning=True)
    ours = double("AutoencoderKLLTXVideo", vae, tmp_path)
    latents = ours.encode(clip("AutoencoderKLLTXVideo", 2))
    same(ours.decode(latents), direct_decode(vae, back(vae, latents), torch.zeros(1).double()))


def test_scale_is_a_factor_beside_the_config_s_own(tmp_path, caplog):
    make("AutoencoderKLWan", tmp_path)
    video = clip("AutoencoderKLWan", 2)
    once, twice = adapter("AutoencoderKLWan", tmp_path), adapter("AutoencoderKLWan", tmp_path, scale=2.0)
    latents = once.encode(video)
    assert torch.equal(twice.encode(video), 2 * latents) and torch.equal(
        twice.decode(2 * latents), once.decode(latents)
    )
    assert not caplog.records
    make("AutoencoderKLWan", tmp_path, latents_mean=None, latents_std=None)
    with caplog.at_level(logging.WARNING):
        adapter("AutoencoderKLWan", tmp_path).encode(video)
    assert "AutoencoderKLWan does not say how far its latents spread" in caplog.text


def test_its_precision_is_its_own(tmp_path):
    make("AutoencoderKLWan", tmp_path)
    video = clip("AutoencoderKLWan", 2)
    full, half = adapter("AutoencoderKLWan", tmp_path), adapter("AutoencoderKLWan", tmp_path, precision="bf16")
    latents = full.encode(video)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(full.encode(video), latents)
    full.bfloat16()
    assert torch.equal(full.encode(video), latents)
    rounded = half.encode(video)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, latents)
    torch.testing.assert_close(rounded, latents, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("size", [None, 2])
def test_wan_streams_the_same_numbers(size, tmp_path):
    """With Wan 2.2's patches, too."""
    patches = dict(patch_size=size, in_channels=12, out_channels=12, scale_factor_spatial=16, is_residual=True)
    vae = make("AutoencoderKLWan", tmp_path, **(patches if size else {}))
    ours = double("AutoencoderKLWan", vae, tmp_path, strides=[4, 8 * (size or 1), 8 * (size or 1)])
    video = torch.randn(2, 3, 13, 32, 16)
    latents = ours.encode(video)
    unread = adapter("AutoencoderKLWan", tmp_path, class_name=None, strides=ours.strides, channels=4)
    assert unread.streams and not unread._loaded  # config.json names the class
    assert ours.streams and latents.shape == (2, 4, 4, 4 // (size or 1), 2 // (size or 1))
    for lengths in ([13], [1] * 13, [2, 7, 4]):
        pieces = list(ours.encode_stream(iter(video.split(lengths, 2))))
        assert len(pieces) == 4
        same(torch.cat(pieces, 2), latents)
    decoded = list(ours.decode_stream(latents))
    assert [piece.shape[2] for piece in decoded] == [1, 4, 4, 4]
    same(torch.cat(decoded, 2), ours.decode(latents))
    with pytest.raises(ValueError, match="12 frames do not fit; take 9 or 13"):
        list(ours.encode_stream([video[:, :, :12]]))


@pytest.mark.parametrize("class_name", ["AutoencoderKLWan", "AutoencoderKLMagvit"])
def test_lingens_own_tiles_leave_time_whole(class_name, tmp_path):
    """Wan's come frame by frame, Magvit's at once; both are what each tile alone gives, cross-faded."""
    ours = double(class_name, make(class_name, tmp_path), tmp_path)
    at_once = SimpleNamespace(strides=ours.strides, channels=4, encode=ours.encode, decode=ours.decode)
    video = torch.randn(1, 3, 9, 64, 40, generator=torch.Generator().manual_seed(1))
    tiles = tiles_of((32, 32), ours.strides)
    latents = list(encode_tiled(ours, video.split(2, 2), tiles))
    decoded = list(decode_tiled(ours, torch.cat(latents, 2), tiles))
    assert len(latents) == len(decoded) == (3 if ours.streams else 1)
    assert ours.streams == (class_name == "AutoencoderKLWan")
    same(torch.cat(latents, 2), *encode_tiled(at_once, [video], tiles))
    same(torch.cat(decoded, 2), *decode_tiled(at_once, torch.cat(latents, 2), tiles))


def test_diffusers_own_tiles_do_not_stream():
    assert not DiffusersVAE(class_name="AutoencoderKLWan", tiling=True).streams
