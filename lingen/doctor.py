"""What a recipe or this machine lacks: `lingen doctor`. Parts are built on the meta device, no weights are read."""

import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lingen.autoencoder.perceptual import NoDistance
from lingen.data.acting import check_sprites
from lingen.data.locations import expand
from lingen.files import cache_folder
from lingen.frozen import Missing, missing_of
from lingen.kernels.choice import TWINS, best_device, choose, has_triton
from lingen.plan.loading import fault_of_strategy
from lingen.provenance import version_of
from lingen.recipe.errors import RecipeError
from lingen.recipe.reading import components_of
from lingen.recipe.registry import AUTOENCODERS, PERCEPTUAL, TEXT_ENCODERS
from lingen.recipe.sections import KINDS, Recipe
from lingen.recipe.signature import as_plain
from lingen.text.rewrite import Rewriter

LITTLE_DISK = 20.0
"""GB of free disk space below which there is a warning: a checkpoint of the largest recipe is larger (ours)."""
OPTIONAL = {
    "transformers": "frozen text encoders, rewriting and captioning", "diffusers": "its video autoencoders",
    "boto3": "shards at s3://", "gradio": "a page, lingen ui", "mamba-ssm": "kernel: stock of the scan, for comparison",
    "flash-attn": "kernel: flash of attention, for comparison", "statsmodels": "intervals of eval, ablate and study",
}  # fmt: skip
"""Packages that lingen runs without, and what they are for."""
MALWARE = ("2.6.2", "2.6.3")
"""Releases of lightning that steal credentials when they are imported (GHSA-w37p-236h-pfx3)."""


class Checkup(NamedTuple):
    """What the stages of a recipe need: each thing once."""

    missing: list[Missing]
    """Weights."""
    absent: list[Missing]
    """Shards; `name` is the setting."""
    ok: list[str]
    """Name and path of each part that needs weights and has them."""
    notes: list[str]
    """Settings that `lingen fit` refuses, though all else goes on with them."""


def examine(stages: Sequence[Recipe]) -> Checkup:
    """Looks on disk for what these stages name (frozen parts, `rewrite`, `init`, shards); notes what `fit` refuses."""
    missing = dict.fromkeys(one for recipe in stages for one in _lacks(recipe))
    absent = dict.fromkeys(one for recipe in stages for one in _shards(recipe))
    ok = dict.fromkeys(one for recipe in stages for one in _there(recipe))
    asked = [(recipe.trainer.get("strategy"), recipe.trains, recipe.trainer.get("precision")) for recipe in stages]
    strategies = dict.fromkeys(asked)
    notes = [f"`lingen fit` refuses this: {text}" for one in strategies if (text := fault_of_strategy(*one))]
    return Checkup(list(missing), list(absent), list(ok), notes)


def _lacks(recipe: Recipe) -> Iterator[Missing]:
    """Needed weights that are missing."""
    from lingen.training.inputs import missing_parts
    from lingen.weights import find_weights, read_metadata

    try:
        yield from missing_parts(recipe)
    except ValueError:  # shards that cannot be opened, of which `_shards` tells: are they encoded?
        yield from missing_of(recipe.subject.frozen_parts(recipe))
    unneeded = "(`lingen sample --rewrite` alone reads it: training does without.)"
    yield from (one._replace(cure=f"{one.cure} {unneeded}") for one in missing_of(_rewriters(recipe)))
    if (init := recipe.init) is not None:
        yield from _missed("init", init, lambda: read_metadata(find_weights(init)))


def _there(recipe: Recipe) -> Iterator[str]:
    """Parts that need files and have them."""
    named = [(component["name"], registry) for _, component, registry in components_of(as_plain(recipe))]
    read = (AUTOENCODERS, TEXT_ENCODERS, PERCEPTUAL)
    names = {registry[name]: name for name, registry in named if registry in read}
    for part in recipe.subject.frozen_parts(recipe) + _rewriters(recipe):
        if hasattr(part, "missing") and not isinstance(part, NoDistance) and not part.missing():
            name = names.get(type(part)) or getattr(part, "name", type(part).__name__)  # a rewriter stores its own name
            yield f"{name} {getattr(part, 'path', None) or ''}".rstrip()


def _rewriters(recipe: Recipe) -> list[Any]:
    return [] if recipe.rewrite.path is None else [Rewriter(recipe.rewrite)]


def _missed(setting: str, named: Any, look: Callable[[], object]) -> Iterator[Missing]:
    """What a look at a file finds wrong."""
    try:
        look()
    except RecipeError as error:
        yield Missing(setting, named if isinstance(named, str) else " ".join(named), str(error))


def _shards(recipe: Recipe) -> Iterator[Missing]:
    data, drawn = recipe.data, recipe.data.synthetic or {}
    if drawn.get("name") == "theatre" and not (data.shards.image or data.shards.video):
        yield from _missed("data.synthetic", drawn["sprites"], lambda: check_sprites(drawn["sprites"]))
    for section in ("shards", "validation"):
        for kind in (kind for kind in KINDS if getattr(data.mix, kind)):
            named, setting = getattr(getattr(data, section), kind), f"data.{section}.{kind}"
            yield from _missed(setting, named, partial(expand, named, setting, data.remote.timeout))


class Line(NamedTuple):
    """One finding about this machine."""

    ok: bool
    """False: a warning; lingen runs all the same."""
    what: str
    told: str


def machine() -> Iterator[Line]:
    """What this machine has, one thing after the other. Imports no lightning, which may be malware."""
    import av

    yield Line(True, "python", platform.python_version())
    yield Line(True, "torch", f"{torch.__version__}, CPU threads: {torch.get_num_threads()}")
    yield _lightning()
    yield from _gpus()
    triton = str(version_of("triton")) if has_triton() else "not installed; kernels run on plain PyTorch"
    yield Line(has_triton() or not torch.cuda.is_available(), "triton", triton)
    yield Line(True, "kernels", _kernels())
    steps = "CUDA graphs where nothing forbids them" if torch.cuda.is_available() else "no CUDA graphs without a GPU"
    yield Line(True, "training steps", f"train.compile=auto: {steps}")
    h264, told = "libx264" in av.codecs_available, f"in PyAV {version_of('av')}"
    yield Line(h264, "libx264", told if h264 else f"not {told}: no MP4 can be written; pip install -U av")
    for name, folder in (("here", Path.cwd()), ("cache", cache_folder())):
        there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        free = shutil.disk_usage(there).free / 1e9
        yield Line(free >= LITTLE_DISK, f"disk ({name})", f"{free:,.0f} GB free at {folder}")
    for name, use in OPTIONAL.items():
        version = version_of(name)
        yield Line(version is not None, name, f"{version or 'not installed'}: {use}")


def _lightning() -> Line:
    version = version_of("lightning")
    if version not in MALWARE:
        return Line(version is not None, "lightning", version or "not installed; pip install lightning")
    cure = f"pip install -U 'lightning>=2.5,{','.join(f'!={one}' for one in MALWARE)}'"
    told = f"{version} is malware that steals credentials (GHSA-w37p-236h-pfx3): {cure}"
    return Line(False, "lightning", f"{told}, and replace every key and token that was on this machine")


def _gpus() -> Iterator[Line]:
    if not torch.cuda.is_available():
        why = "this torch is built without it" if torch.version.cuda is None else "no device, or no driver for it"
        yield Line(False, "cuda", f"{why}; everything runs on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(number))
        told = f"{about.name}, {free:.1f} of {total:.1f} GiB free, compute capability {about.major}.{about.minor}"
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Line(fast, f"cuda:{number}", told + ("" if fast else ", no bfloat16: set precision 16-mixed or 32-true"))


def _kernels() -> str:
    """The twins that `kernel: auto` takes here, and their operations."""
    beside = ("norm and SiLU", "quantization", "8-bit product")  # of autoencoders, and of sampling in 8 bits
    x = torch.empty(0, device=best_device(), dtype=torch.bfloat16)
    taken: dict[str, list[str]] = {}
    for operation in (one for one in TWINS if one not in beside):
        taken.setdefault(choose(operation, "auto", x), []).append(operation)
    return "auto takes " + "; ".join(f"{twin} for {', '.join(operations)}" for twin, operations in taken.items())
