"""Files of weights: safetensors with a recipe inside, written, read and found; no module is known here."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lingen.files import check_target, whole_file
from lingen.recipe.errors import RecipeError
from lingen.recipe.text import decode_json

Copy = Literal["averaged", "raw"]
"""The two copies in a file: training continues from the raw one, the averaged one is for sampling."""
OF_TRAINING = ("recipe", "stage", "step")
"""Metadata that tells how weights were trained; an autoencoder of known sizes does without."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What a recipe calls the precision of weights."""


class WeightsError(RecipeError):
    """Raised where a path holds no weights of lingen; `what` is the sentence without the path, with the cure."""

    def __init__(self, path: str | Path, what: str):
        super().__init__(f"{path}: {what}")
        self.what = what


class IncompleteError(RuntimeError):
    """Of what was to be written this process holds only a part; nothing was written."""


def check_whole(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Asked before anything is written: does this process hold every element of every tensor?

    Args:
        tensors: by name; what `shapes` does not name is not looked at.
        shapes: of all tensors, as the model declared them when it was built.
    Raises:
        IncompleteError: one is absent, a shard, or of another shape.
    """
    lacking = [name for name, shape in shapes.items() if not _is_whole(tensors.get(name), shape)]
    if lacking:
        raise IncompleteError(
            f"This rank does not hold the whole of {len(lacking)} of {len(shapes)} tensors (such as {lacking[0]}, "
            f"declared as {list(shapes[lacking[0]])}), so nothing was written. A strategy that splits the model over "
            "ranks cannot be saved yet: set trainer.strategy=ddp."
        )


def _is_whole(value: Tensor | None, shape: torch.Size) -> bool:
    """A DTensor and a ShardedTensor tell the shape of the whole, whatever part of it is here."""
    is_shard = hasattr(value, "full_tensor") or hasattr(value, "local_shards")
    return value is not None and not is_shard and value.shape == shape


def export_weights(source: str | Path, out: str | Path, precision: str = "bf16") -> Path:
    """Writes only what is needed to use a finished stage: the averaged copy, without a discriminator.

    Args:
        source: a run folder or a weights file.
        out: a .safetensors file.
        precision: ``bf16`` or ``fp32`` of everything of two or more axes; the rest stays as it is.
    Raises:
        RecipeError: no weights at `source`, or `out` cannot be written.
    """
    out = check_target(out, ".safetensors")
    path = find_weights(source)
    metadata = read_metadata(path, OF_TRAINING)
    kept = {name: v for name, v in read_weights(path, "averaged").items() if not name.startswith("discriminator.")}
    if precision == "bf16":
        kept = {name: v.bfloat16() if v.ndim > 1 and v.is_floating_point() else v for name, v in kept.items()}
    write_tensors(out, {f"averaged.{name}": value for name, value in kept.items()}, metadata)
    return out


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """64 hex digits of the names, types, shapes and numbers of tensors: the same whatever file or device holds them."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(cast(Any, value.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file in one step, with the umask's permissions: the library's own are for the user alone."""
    from safetensors.torch import save_file

    with whole_file(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, str(partial), metadata)
        partial.chmod(mode)


def read_metadata(path: Path, needed: Collection[str] = ()) -> dict[str, str]:
    """The metadata of a weights file. WeightsError for a file that lingen did not write, or without a `needed` key."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(path, f"it is cut off or no safetensors file ({error}).") from error
    except OSError as error:
        raise WeightsError(path, f"it cannot be read ({error.strerror or error}).") from error
    whole = metadata.keys() >= set(needed) and metadata.get("step", "0").isdecimal()
    if metadata.get("format") != "lingen" or not whole:
        raise WeightsError(
            path, "it holds no lingen weights (its metadata names no recipe). Use a file that `lingen fit` wrote."
        )
    return metadata


def read_weights(path: Path, copy: Copy) -> dict[str, Tensor]:
    """name -> tensor (CPU) of one copy."""
    from safetensors import safe_open

    prefix = f"{copy}."
    with safe_open(str(path), "pt") as file:
        return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def read_run(about: Path) -> dict[str, Any]:
    """What a run.json holds. WeightsError where it is broken or cannot be read."""
    try:
        held = decode_json(about.read_bytes())
        stages = held["stages"]
        if not isinstance(stages, list) or not all(isinstance(name, str) and "\0" not in name for name in stages):
            raise ValueError("its stages are to be names")
    except OSError as error:
        raise WeightsError(about, f"it cannot be read ({error.strerror or error}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            about, f"it is no record of a run ({error}). Bring the file back, or name another folder."
        ) from error
    return held


def find_weights(source: str | Path) -> Path:
    """A weights file, or that of the last finished stage of a run folder. WeightsError where there is none."""
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(path, "there is no run folder or weights file.")
    about = path / "run.json"
    if not about.is_file():
        raise WeightsError(
            path, "it is no run folder: it has no run.json. Name one that `lingen fit` made, or a .safetensors file."
        )
    stages = read_run(about)["stages"]
    finished = [file for stage in stages if os.path.isfile(file := path / "stages" / stage / "weights.safetensors")]
    if not finished:
        raise WeightsError(path, "no stage of it is finished yet. Go on with `lingen fit`.")
    return finished[-1]
