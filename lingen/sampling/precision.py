"""Weights as a module to use, and the precision that a denoiser samples in: float32, bfloat16 throughout, or bfloat16
with products in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lingen.blocks.layers import is_float32
from lingen.kernels.fp8 import SMALLEST_LAYER, Fp8Linear, to_fp8
from lingen.model import LinGen
from lingen.recipe.errors import RecipeError
from lingen.training.modules import TextToVideo
from lingen.training.weights import recipe_of, with_weights
from lingen.weights import find_weights

if TYPE_CHECKING:
    from lingen.training.base import Trained

FLOAT32_NAMES = ("modulation", "pool_text", "phase", "unpatchify")
"""Names of parameters and layers of the denoiser that stay float32 beside the modules that say so themselves
(`lingen.blocks.layers.stays_float32`): the last rows of modulation, which are added to a float32 row, and the small
layers that compute in float32."""


def set_precision(module: TextToVideo, precision: str) -> bool:
    """Puts a loaded module's denoiser into `sample.precision`, once and in place; says whether autocast is needed, too.

    A module in training is left alone: its weights are the optimiser's, so it samples as it trains, under autocast
    where the trainer's precision has bf16.
    Raises:
        RecipeError: for weights that are in lower precision already, for 8 bits on a GPU that has no such products, or
            where no layer is large enough for them."""
    is_low, on_cuda = "bf16" in str(module.recipe.trainer.get("precision", "")), module.device.type == "cuda"
    if module.average is not None:
        from torch.distributed.fsdp import FSDPModule

        # On a CPU as `lingen sample` does there, in float32, unless the weights are gathered in bfloat16.
        return is_low and (on_cuda or isinstance(module.model.blocks[0], FSDPModule))
    now = precision_of(module.model)
    if precision == "auto":
        precision = "bf16-true" if is_low and on_cuda and now == "32-true" else now
    if precision == now:
        return False
    if precision == "32-true" or now == "fp8":
        raise RecipeError(f"The weights are in {now} already; load them again for sample.precision={precision}.")
    lower(module.model, precision)
    return False


def precision_of(model: LinGen) -> str:
    """`sample.precision` that the model is in."""
    if any(isinstance(part, Fp8Linear) for part in model.modules()):
        return "fp8"
    return "bf16-true" if model.patchify.weight.dtype == torch.bfloat16 else "32-true"


def lower(model: LinGen, precision: str) -> None:
    """Casts the weights to bfloat16, in place, but for what stays float32; with "fp8" the large linear
    layers of the blocks become `Fp8Linear`. The stream takes the dtype of the weights."""
    device = model.patchify.weight.device
    if precision == "fp8" and not to_fp8(model.blocks):
        raise RecipeError(
            f"sample.precision=fp8 is for linear layers of {SMALLEST_LAYER:,} channels or more in and out; this model "
            "has none. Use sample.precision=bf16-true."
        )
    _cast(model)
    if device.type == "cuda":
        # Each new weight lies where a larger old one was: moved off the GPU and back, they leave no gaps.
        model.cpu()
        torch.cuda.empty_cache()
        model.to(device)


def _cast(part: nn.Module) -> None:
    for name, parameter in part.named_parameters(recurse=False):
        if name not in FLOAT32_NAMES:
            parameter.data = parameter.data.bfloat16()
    for name, child in part.named_children():
        if name not in FLOAT32_NAMES and not is_float32(child):
            _cast(child)


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
    weights = find_weights(path)
    recipe = recipe_of(weights)
    module: Trained = with_weights(recipe.subject.build_module(recipe), weights)
    if dtype == torch.bfloat16:
        if isinstance(module, TextToVideo):
            lower(module.model, "bf16-true")
        else:
            module.to(dtype)
    return module.to(device).eval()
