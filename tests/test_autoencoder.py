"""What every built-in autoencoder keeps to, and the one without weights."""

import pytest
import torch

from lingen.autoencoder.pixels import Pixels
from lingen.recipe.errors import SettingError
from lingen.recipe.registry import AUTOENCODERS


@pytest.mark.parametrize(("name", "sizes"), [("pixels", ((1, 1, 1), 3)), ("tae", ((8, 8, 8), 16))])
def test_each_says_its_sizes_without_touching_the_disk(name, sizes):
    with torch.device("meta"):
        autoencoder = AUTOENCODERS.build(name)
    assert (autoencoder.strides, autoencoder.channels) == sizes


@pytest.mark.parametrize("frames", [1, 5])
def test_pixels_are_the_latents(frames):
    video = torch.rand(2, 3, frames, 4, 6) * 2 - 1
    pixels = Pixels(scale=2.0)
    latents = pixels.encode(video)
    assert torch.equal(latents, 2 * video) and torch.equal(pixels.decode(latents), video)
    assert torch.equal(Pixels().encode(video), video)


def test_settings_come_from_a_recipe():
    tae = AUTOENCODERS.build(
        {"name": "tae", "path": "nowhere.safetensors", "strides": [4, 8, 8], "channels": 8, "width": 8}
    )
    assert (tae.strides, tae.channels, tae.path) == ((4, 8, 8), 8, "nowhere.safetensors")
    assert tae.missing()[0].path == "nowhere.safetensors"


def test_senseless_settings_are_named():
    with pytest.raises(SettingError) as error:
        AUTOENCODERS.build({"name": "pixels", "scale": 0.0})
    assert error.value.setting == "scale"
