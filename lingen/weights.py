"""Files of weights: safetensors with a recipe inside, written, read and found; no module is known here, and torch is
imported where tensors are read or written alone: a wrong path is told at once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from safetensors import SafetensorError, safe_open

from lingen.files import check_target, whole_file
from lingen.recipe.errors import RecipeError
from lingen.recipe.text import decode_json

if TYPE_CHECKING:
    from torch import Tensor

V = TypeVar("V")
Copy = Literal["averaged", "raw"]
"""The two copies in a file: training continues from the raw one, the averaged one is for sampling."""
OF_TRAINING = ("recipe", "stage", "step")
"""Metadata that tells how weights were trained; an autoencoder of known sizes does without."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""What a recipe calls the precision of weights -> its name in torch."""
STORED_TYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.bool": "BOOL",
}  # fmt: skip
"""A type of torch in words -> what safetensors calls it."""
TORCH = (b"PK", b"\x80")
"""How a file that torch.save wrote begins: a ZIP, whose end tells of the rest, or long ago a bare pickle, of which
nothing is told."""
_MOVED = (
    (re.compile(r"\.(a_log|d|dt_bias)$"), r".memory.\1"),
    (re.compile(r"(\bblocks\.\d+\.modulation)$"), r"\1.weight"),
)
"""Names of the denoiser's tensors in files of earlier versions -> what they are now."""
_BACK = (
    (re.compile(r"\.memory\.(a_log|d|dt_bias)$"), r".\1"),
    (re.compile(r"(\bblocks\.\d+\.modulation)\.weight$"), r"\1"),
)
"""The way back."""


class WeightsError(RecipeError):
    """Raised where a path holds no weights of lingen; `what` is the sentence without the path, with the cure."""

    def __init__(self, path: str | Path, what: str):
        super().__init__(f"{path}: {what}")
        self.what = what


class Lacking(ValueError):
    """Raised where a folder is not what an encoder needs.

    Args:
        what: the fault as half a sentence, which the message completes.
        cure: what helps; None: the right files.
        elsewhere: the right files belong in another folder, since this one holds something else."""

    def __init__(self, what: str, cure: str | None = None, *, elsewhere: bool = False):
        super().__init__(what)
        self.cure, self.elsewhere = cure, elsewhere


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping. Lacking where there is none."""
    if not path.is_file():
        raise Lacking(f"it holds no {path.name}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Lacking(f"its {path.name} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise Lacking(f"its {path.name} is no mapping")
    return found


def weight_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of weights in a folder: the first of these names, or all that it tells, where it is an index. Lacking
    where there is none."""
    first = next((folder / name for name in names if (folder / name).is_file()), None)
    if first is None:
        raise Lacking(f"it holds no weights ({', '.join(names)})")
    if first.suffix != ".json":
        return [first]
    told = read_json(first).get("weight_map")
    if not isinstance(told, dict) or not all(isinstance(name, str) for name in told.values()):
        raise Lacking(f"its {first.name} does not say which tensor is in which file")
    return [folder / name for name in sorted({*told.values()})]


def check_file(file: Path) -> None:
    """Lacking where a file of published weights is missing or incomplete; reads its header."""
    if not file.is_file():
        raise Lacking(f"its {file.name} is missing")
    with file.open("rb") as opened:
        start = opened.read(8)
    if start == b"version ":
        raise Lacking(f"its {file.name} is Git LFS's note of a file, not the file", "fetch it with `git lfs pull`")
    if file.suffix == ".safetensors":
        try:
            safe_open(str(file), "np")  # holds the file's size to what its header tells
        except (OSError, SafetensorError) as error:
            raise Lacking(f"its {file.name} is cut off or no safetensors file") from error
    elif not start.startswith(TORCH):
        raise Lacking(f"its {file.name} holds no weights: neither safetensors nor what torch.save writes")
    elif start.startswith(b"PK") and not zipfile.is_zipfile(file):
        raise Lacking(f"its {file.name} is cut off or damaged")


def export_weights(source: str | Path, out: str | Path, precision: str = "bf16") -> Path:
    """Writes only what is needed to use a finished stage: the averaged copy, without a discriminator. RecipeError where
    there are no weights at `source`, or `out` cannot be written.

    Args:
        source: a run folder or a weights file.
        out: a .safetensors file.
        precision: ``bf16`` or ``fp32`` of everything of two or more axes; the rest stays as it is."""
    out = check_target(out, ".safetensors")
    path = find_weights(source)
    metadata = read_metadata(path, OF_TRAINING)
    kept = {name: v for name, v in read_weights(path, "averaged").items() if not name.startswith("discriminator.")}
    if precision == "bf16":
        kept = {name: v.bfloat16() if v.ndim > 1 and v.is_floating_point() else v for name, v in kept.items()}
    write_tensors(out, {f"averaged.{name}": value for name, value in kept.items()}, metadata)
    return out


def hash_tensors(tensors: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor] = lambda value: value) -> str:
    """64 hex digits of the names, types, shapes and numbers of tensors: the same whatever file or device holds them,
    and as in the first version, so that its clips can be made again. `whole`: gathers a tensor of which this rank holds
    a part."""
    digest = hashlib.sha256()
    for name, value in sorted((_first_name(name), value) for name, value in tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(_bytes_of(whole(value)))
    return digest.hexdigest()


def _first_name(name: str) -> str:
    """What a tensor was called before its name changed."""
    for pattern, first in _BACK:
        name = pattern.sub(first, name)
    return name


def names_now(held: Mapping[str, V], own: Collection[str]) -> dict[str, V]:
    """What a file holds by name, under the names of this version: one that is not among `own` takes a newer one that
    is."""
    found = {}
    for name, value in held.items():
        names = (name, *(pattern.sub(to, name) for pattern, to in _MOVED))
        found[next((one for one in names if one in own), name)] = value
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file in one step, with the umask's permissions."""
    write_pieces(path, tensors, file_order(tensors), metadata)


def file_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Names and tensors as they stand in a file: wide types first, so that each is aligned."""
    return sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def write_pieces(
    path: Path, tensors: Mapping[str, Tensor], pieces: Iterable[tuple[str, Tensor]], metadata: dict[str, str]
) -> None:
    """Writes a safetensors file in one step, one tensor after the other: memory holds one of them at a time.

    Args:
        tensors: tell types and shapes, and may be shards of what `pieces` gives.
        pieces: the same names, `file_order`, with whole tensors on any device.
        metadata: goes into the file's header. TypeError where it is not all text, which nobody could read."""
    if not all(isinstance(value, str) for value in metadata.values()):
        raise TypeError(f"The metadata of a weights file is text, not {metadata!r}.")
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(header_of(file_order(tensors), metadata))
        for _, tensor in pieces:
            file.write(_bytes_of(tensor))


def header_of(tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str]) -> bytes:
    """The beginning of a safetensors file that holds these tensors one behind the other."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        kind, shape = STORED_TYPES[str(tensor.dtype)], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    words = json.dumps(header, ensure_ascii=False).encode()
    words += b" " * (-len(words) % 8)
    return len(words).to_bytes(8, "little") + words


def _bytes_of(tensor: Tensor) -> Any:
    from torch import uint8

    return tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy()


def read_metadata(path: Path, needed: Collection[str] = ()) -> dict[str, str]:
    """The metadata of a weights file. WeightsError for a file that lingen did not write, or without a `needed` key."""
    try:
        with safe_open(str(path), "np") as file:  # "pt" would import torch
            metadata = dict(sorted((file.metadata() or {}).items()))  # they come in any order
    except SafetensorError as error:
        raise WeightsError(path, f"it is cut off or no safetensors file ({error}).") from error
    except OSError as error:
        raise WeightsError(path, f"it cannot be read ({error.strerror or error}).") from error
    whole = metadata.keys() >= set(needed) and metadata.get("step", "0").isdecimal()
    if metadata.get("format") != "lingen" or not whole:
        told = "it holds no lingen weights (its metadata names no recipe)."
        raise WeightsError(path, f"{told} Use a file that `lingen fit` wrote.")
    return metadata


def read_weights(path: Path, copy: Copy) -> dict[str, Tensor]:
    """name -> tensor (CPU) of one copy."""
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
        cure = "Bring the file back, or name another folder."
        raise WeightsError(about, f"it is no record of a run ({error}). {cure}") from error
    return held


BUILT_IN = {"theatre_128": Path(__file__).parent / "sampling" / "theatre" / "denoiser.safetensors"}
"""Recipe -> weights that come with lingen."""


def find_weights(source: str | Path) -> Path:
    """A weights file: itself, of a recipe whose weights come with lingen, in a folder of denoiser and autoencoder, or
    of the last finished stage of a run folder. WeightsError where there is none."""
    path = Path(source)
    file = path / "denoiser.safetensors" if path.is_dir() else BUILT_IN.get(str(source), path)
    for one in (path, file):
        if one.is_file():
            return one
    if file != path and not path.is_dir():
        cure = "Train some on a GPU: `lingen data fetch theatre` (340 MB), `lingen fit --recipe theatre_128`."
        cure += " On a laptop take `lingen fit --recipe quickstart_cpu` and `lingen sample`."
        raise WeightsError(path, f"this installation has no weights of it. {cure}")
    if not path.is_dir():
        raise WeightsError(path, "there is no run folder or weights file.")
    about = path / "run.json"
    if not about.is_file():
        if (path / "model_index.json").is_file():
            told = "it is a folder of `lingen export --to diffusers`. Load it with"
            raise WeightsError(path, f'{told} lingen.LinGenPipeline.from_pretrained("{path}").')
        cure = "Name one that `lingen fit` made, or a .safetensors file."
        raise WeightsError(path, f"it is no run folder: it has no run.json. {cure}")
    stages = read_run(about)["stages"]
    finished = [file for stage in stages if os.path.isfile(file := path / "stages" / stage / "weights.safetensors")]
    if not finished:
        raise WeightsError(path, "no stage of it is finished yet. Go on with `lingen fit`.")
    return finished[-1]
