"""The built-in autoencoder, and the one that is only planned with so far."""

import pytest
import torch

from lingen.autoencoder.pixels import Pixels
from lingen.registry import AUTOENCODERS, RecipeError, SettingError


@pytest.mark.parametrize("name", ["pixels", "tae"])
def test_each_says_its_sizes_without_touching_the_disk(name):
    with torch.device("meta"):
        autoencoder = AUTOENCODERS.build(name)
    assert (autoencoder.strides, autoencoder.channels) == {"pixels": ((1, 1, 1), 3), "tae": ((8, 8, 8), 16)}[name]


@pytest.mark.parametrize("frames", [1, 5])
def test_pixels_are_the_latents(frames):
    video = torch.rand(2, 3, frames, 4, 6) * 2 - 1
    pixels = Pixels(scale=2.0)
    latents = pixels.encode(video)
    assert torch.equal(latents, 2 * video) and torch.equal(pixels.decode(latents), video)
    assert torch.equal(Pixels().encode(video), video)


def test_tae_takes_other_sizes():
    tae = AUTOENCODERS.build({"name": "tae", "path": "nowhere.safetensors", "strides": [4, 8, 8], "channels": 8})
    assert (tae.strides, tae.channels, tae.path) == ((4, 8, 8), 8, "nowhere.safetensors")


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_running_tae_says_what_to_use_meanwhile(method):
    with pytest.raises(RecipeError, match="'tae' can be planned with but not run.*'autoencoder: pixels'"):
        getattr(AUTOENCODERS.build("tae"), method)(torch.zeros(1, 3, 1, 8, 8))


@pytest.mark.parametrize(
    ("component", "setting"),
    [
        ({"name": "tae", "strides": [8, 0, 8]}, "strides"),
        ({"name": "tae", "channels": 0}, "channels"),
        ({"name": "pixels", "scale": 0.0}, "scale"),
    ],
)
def test_senseless_settings_are_named(component, setting):
    with pytest.raises(SettingError) as error:
        AUTOENCODERS.build(component)
    assert error.value.setting == setting
