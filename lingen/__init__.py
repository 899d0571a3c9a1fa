"""lingen: an open framework for LinGen (arXiv 2412.09856), text-to-video diffusion with linear cost.

The public names below are imported when they are first used, so that ``import lingen`` is instant."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lingen.data.datamodule import ClipData
    from lingen.media import save_video
    from lingen.model import LinGen
    from lingen.recipe import load_recipe, stages_of
    from lingen.recipe.errors import RecipeError
    from lingen.recipe.registry import AUTOENCODERS, MIXERS, SCANS, TEXT_ENCODERS
    from lingen.run import fit
    from lingen.sampling.clips import generate, sample_demo
    from lingen.sampling.pipeline import LinGenPipeline
    from lingen.sampling.precision import load_model
    from lingen.training.denoiser import LinGenModule
    from lingen.training.modules import TextToVideo

__version__ = "0.1.0"

__all__ = [
    "AUTOENCODERS", "ClipData", "LinGen", "LinGenModule", "LinGenPipeline", "MIXERS", "RecipeError", "SCANS",
    "TEXT_ENCODERS", "TextToVideo", "fit", "generate", "load_model", "load_recipe", "sample_demo", "save_video",
    "stages_of",
]  # fmt: skip

_HOMES = {
    "lingen.data.datamodule": ("ClipData",), "lingen.sampling.clips": ("generate", "sample_demo"),
    "lingen.sampling.precision": ("load_model",), "lingen.model": ("LinGen",), "lingen.run": ("fit",),
    "lingen.sampling.pipeline": ("LinGenPipeline",), "lingen.training.modules": ("TextToVideo",),
    "lingen.training.denoiser": ("LinGenModule",), "lingen.recipe": ("load_recipe", "stages_of"),
    "lingen.recipe.errors": ("RecipeError",),
    "lingen.recipe.registry": ("AUTOENCODERS", "MIXERS", "SCANS", "TEXT_ENCODERS"), "lingen.media": ("save_video",),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'lingen' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
