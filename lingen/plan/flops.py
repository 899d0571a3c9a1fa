"""FLOPs of a forward pass, counted on the meta device: nothing is computed, and any size is free.

What is counted are matrix products, 2 FLOPs for each multiplication and addition; elementwise work, below 1% at a real
width, is not. Nobody keeps a table beside the mixers: whatever a mixer multiplies is counted, a third party's included.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lingen.blocks.block import mixers_of
from lingen.kernels.choice import planned_for
from lingen.kernels.kept import ALL, INPUT, twice
from lingen.model import LinGen
from lingen.plan.trial import ModelKey
from lingen.recipe.registry import MIXERS
from lingen.recipe.sections import LinGenConfig, Triple

log = logging.getLogger("lingen")

INSIDE = frozenset(vars(nn.Module()))
"""Attributes that every module has: its parameters and children, which are looked at for themselves, and hooks."""


def forward_flops(
    config: LinGenConfig, grid: Triple, text_tokens: Sequence[int], sixteen_bit: bool = False, device: str = "cpu",
    level: int = INPUT,
) -> int | None:  # fmt: skip
    """FLOPs of a denoiser's forward for one sample; None, with a warning, where a mixer cannot run on meta.

    The model is counted with its first block, and every mixer that differs from the others for itself.

    Args:
        grid: tokens (t, h, w).
        text_tokens: of each text encoder.
        sixteen_bit: whether matrix products are done in 16 bits.
        device: type of the device that it is to run on; kernels multiply differently on "cuda".
        level: of `lingen.kernels.kept`, whose results are there already, as where a block is computed again."""
    try:
        key = ModelKey(replace(config, checkpointing=False))
        return 0 if level == ALL else _of_model(key, grid, tuple(text_tokens), sixteen_bit, device, level)
    except Exception as error:  # a third party's mixer may fail in any way
        _warn(f"{type(error).__name__}: {' '.join(str(error).split())}")
        return None


@lru_cache(maxsize=16)
def _built(key: ModelKey) -> tuple[LinGen, dict[str, tuple[nn.Module, int]]]:
    """The model with its first block alone, and each distinct mixer with the number of blocks that have it."""
    config = key.config
    with torch.device("meta"):
        model = LinGen(replace(config, depth=1))
        mixers = [MIXERS.build(component, config.dim, layer) for component, layer in mixers_of(config)]
    described = [(_description(mixer), mixer) for mixer in mixers]
    times = Counter(kind for kind, _ in described)
    return model, {kind: (mixer, times[kind]) for kind, mixer in described}


@lru_cache(maxsize=256)
def _of_model(
    key: ModelKey, grid: Triple, text_tokens: tuple[int, ...], sixteen_bit: bool, device: str, level: int
) -> int:
    config = key.config
    model, mixers = _built(key)
    size = [tokens * patch for tokens, patch in zip(grid, config.patch, strict=True)]

    def inputs(dtype: torch.dtype) -> tuple[Any, ...]:
        text = tuple(
            (torch.empty(1, n, width, dtype=dtype), torch.empty(1, n, dtype=torch.bool))
            for n, width in zip(text_tokens, config.text_dims, strict=True)
        )
        return torch.empty(1, config.channels, *size, dtype=dtype), torch.empty(1), text

    whole = flops_inside(model, inputs, sixteen_bit, device, level)
    block, first = whole.get("blocks.0", 0), whole.get("blocks.0.mixer", 0)

    def tokens(dtype: torch.dtype) -> tuple[Any, ...]:
        return (torch.empty(1, *grid, config.dim, dtype=dtype),)

    counted = ((flops_inside(mixer, tokens, sixteen_bit, device, level)[""], times) for mixer, times in mixers.values())
    return whole[""] - block + config.depth * (block - first) + sum(each * times for each, times in counted)


def flops_inside(
    module: nn.Module, inputs: Callable[[torch.dtype], tuple[Any, ...]], sixteen_bit: bool, device: str,
    level: int = INPUT,
) -> dict[str, int]:  # fmt: skip
    """FLOPs of the module and of all inside of it, by name; "" is the module itself."""
    dtype = torch.bfloat16 if sixteen_bit else torch.float32
    module = module.to(dtype)
    # Fused attention hides its products from the counter, and so do products in place, which only run without
    # autograd; the plain forms have the same ones.
    with torch.device("meta"), planned_for(device), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        given, (first, second) = inputs(dtype), twice(level)
        if level > INPUT:
            with first:
                module(*given)
        with FlopCounterMode(display=False) as counter, second:
            module(*given)
    # The counter puts the class of the root in front: ``MATE.ma.in_proj``.
    root = type(module).__name__
    named = {name: counts for name, counts in counter.get_flop_counts().items() if name not in ("Global", root)}
    inside = {name.removeprefix(root)[1:]: sum(counts.values()) for name, counts in named.items()}
    return {"": counter.get_total_flops()} | inside


def _description(mixer: nn.Module) -> str:
    """What two mixers must have in common for their FLOPs to be the same: classes, shapes and plain attributes."""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in (*mixer.named_parameters(), *mixer.named_buffers())]
    modules = [
        (name, type(module), sorted((key, repr(value)) for key, value in vars(module).items() if key not in INSIDE))
        for name, module in mixer.named_modules()
    ]
    return repr((shapes, modules))


@lru_cache
def _warn(reason: str) -> None:
    log.warning("FLOPs and MFU are unknown: a forward pass on the meta device failed (%s).", reason)
