"""Principal components as an autoencoder."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lingen.autoencoder.pca import PCA, PCATheatre
from lingen.blocks.layers import cut_patches
from lingen.frozen import check_ready
from lingen.media import as_floats
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import AUTOENCODERS
from lingen.testing import check_autoencoder
from lingen.weights import write_tensors
from tests.helpers.closeness import assert_close

STRIDES = (2, 4, 4)


def clips(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Smooth random clips, uint8 [1 3 4 8 12]."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand(count, 3, 2, 3, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(rough, (4, 8, 12), mode="trilinear")
    return [*(255 * smooth).round().byte().split(1)]


@pytest.fixture(scope="module")
def fitted() -> PCA:
    return PCA.fit(clips(40), STRIDES, 24)


def save(pca: PCA, path: Path) -> Path:
    tensors = {f"averaged.autoencoder.{name}": value for name, value in pca.state_dict().items()}
    write_tensors(path, tensors, {"format": "lingen"})
    return path


def test_the_components_are_those_of_a_singular_value_decomposition(fitted):
    blocks = cut_patches(as_floats(torch.cat(clips(40))), STRIDES).reshape(-1, 96).double().numpy()
    _, values, rows = np.linalg.svd(blocks - blocks.mean(0), full_matrices=False)
    spread = torch.from_numpy(values[:24] / len(blocks) ** 0.5)
    overlap = (fitted.basis.double() @ torch.from_numpy(rows[:24]).T).abs()
    assert_close("components", overlap, torch.eye(24).double(), 1e-3)
    assert_close("spread", fitted.std.double(), (spread * spread.mean()).sqrt(), 1e-4)
    assert_close("mean", fitted.mean.double(), torch.from_numpy(blocks.mean(0)), 1e-5)


def test_latents_have_a_mean_square_of_one_and_details_less(fitted):
    latents = fitted.encode(as_floats(torch.cat(clips(40))))
    assert latents.shape == (40, 24, 2, 2, 3)
    assert abs(latents.square().mean().item() - 1) < 1e-3
    each = latents.square().mean((0, 2, 3, 4))
    assert (each.diff() < 1e-4).all() and each[0] > 4 * each[-1]


def test_all_components_keep_everything_and_fewer_keep_less(fitted):
    held = as_floats(torch.cat(clips(8, seed=1)))
    whole = PCA.fit(clips(40), STRIDES, 96)
    assert_close("clip", whole.decode(whole.encode(held)), held, 1e-4)
    errors = [(one.decode(one.encode(held)) - held).square().mean() for one in (fitted, PCA.fit(clips(40), STRIDES, 6))]
    assert 0 < errors[0] < errors[1] < held.var()


def test_the_last_block_repeats_its_last_frame_and_pieces_are_the_whole(fitted):
    video = as_floats(torch.cat(clips(2)))
    latents = fitted.encode(video[:, :, :3])
    longer = torch.cat([video[:, :, :3], video[:, :, 2:3]], 2)
    assert torch.equal(latents, fitted.encode(longer)) and fitted.decode(latents).shape == longer.shape
    pieces = torch.cat([fitted.encode(video[:, :, :2]), fitted.encode(video[:, :, 2:])], 2)
    assert_close("pieces", pieces, fitted.encode(video), 1e-6)


def test_under_autocast_latents_are_those_of_float32(fitted):
    video = as_floats(torch.cat(clips(2)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fitted.encode(video), fitted.encode(video).float())
        latents = fitted.encode(video)
    assert torch.equal(latents, fitted.encode(video))


def test_sizes_that_do_not_fit_are_refused(fitted):
    with pytest.raises(ValueError, match="'pca' cannot take frames of 8x10 pixels: .* multiples of 4 and 4"):
        fitted.encode(torch.zeros(1, 3, 2, 8, 10))


def test_weights_come_from_a_file_when_they_are_needed(fitted, tmp_path):
    path = save(fitted, tmp_path / "pca.safetensors")
    settings = {"path": str(path), "strides": list(STRIDES), "channels": 24}
    stored = AUTOENCODERS.build({"name": "pca", **settings})
    assert not stored.loaded
    video = as_floats(clips(1)[0])
    assert torch.equal(stored.encode(video), fitted.encode(video))
    check_autoencoder(PCA, **settings)


def test_what_is_missing_is_said_before_anything_runs(fitted, tmp_path):
    with pytest.raises(RecipeError, match=r"missing: pca -: set autoencoder.path to a file of .*PCA.fit found"):
        check_ready([PCA()])
    check_ready([fitted])
    path = save(fitted, tmp_path / "pca.safetensors")
    for settings, cure in (
        ({"channels": 25, "strides": STRIDES}, r"autoencoder.channels=24 \(not 25\)"),
        ({"channels": 24}, r'autoencoder.strides="blocks of 32 pixels" \(not "blocks of 256 pixels"\)'),
    ):
        with pytest.raises(RecipeError, match=rf"missing: pca .*pca.safetensors: its weights are .* Set {cure}"):
            check_ready([PCA(path=str(path), **settings)])
    with pytest.raises(RecipeError, match=r"missing: pca .*none.safetensors: "):
        check_ready([PCA(path=str(tmp_path / "none.safetensors"))])


def test_the_theatres_components_come_with_lingen():
    theatre = PCATheatre()
    check_ready([theatre])
    sky = torch.full((1, 3, 4, 16, 16), 0.25)
    assert (theatre.decode(theatre.encode(sky)) - sky).abs().max() < 0.05
    assert_close("orthogonal", theatre.basis.float() @ theatre.basis.float().T, torch.eye(80), 2e-2)
