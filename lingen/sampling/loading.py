"""Weights as a module to use: a denoiser with its autoencoder and text encoders, or an autoencoder."""

from pathlib import Path

import torch

from lingen.sampling.precision import lower
from lingen.training.base import Trained
from lingen.training.denoiser import LinGenModule
from lingen.training.weights import load_module


def load_model(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Trained:
    """The module of a run folder (its last finished stage), of what `lingen export` wrote, or of another weights file:
    built from the recipe inside, with the averaged weights, in eval mode.

    A `LinGenModule` (`.model` is the denoiser, beside `.text` and `.autoencoder`), which `lingen.generate` takes, too;
    of a run that `trains: autoencoder` an `AutoencoderModule` (`.autoencoder`). docs/sampling.md lists the keys of its
    state dict.

    Args:
        dtype: float32, or bfloat16: of a denoiser as `sample.precision: bf16-true` has it (norms, positions, times and
            a scan's memory stay float32), of an autoencoder throughout.
    Raises:
        RecipeError: no weights there, or weights that do not fit the recipe inside.
        ValueError: for another dtype."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"A model is loaded in torch.float32 or torch.bfloat16, got {dtype}.")
    module = load_module(path)
    if dtype == torch.bfloat16:
        if isinstance(module, LinGenModule):
            lower(module.model, "bf16-true")
        else:
            module.to(dtype)
    return module.to(device).eval()
