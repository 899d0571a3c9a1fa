"""What training an autoencoder will take: counted on the meta device, where nothing is computed."""

from typing import cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lingen.autoencoder import TrainableAutoencoder
from lingen.frozen import on_meta
from lingen.plan.forecast import Plan
from lingen.recipe.registry import AUTOENCODERS
from lingen.recipe.sections import Recipe
from lingen.recipe.sizes import grids_of, patch_of


def plan_autoencoder(recipe: Recipe) -> Plan:
    """Forecast of a stage that trains its autoencoder; what the losses and their networks take is not in it."""
    autoencoder = on_meta(AUTOENCODERS, recipe.autoencoder)
    grids = grids_of(recipe.data, tuple(autoencoder.strides), patch_of(recipe))
    frames = {kind: 1 if kind == "image" else recipe.data.frames for kind in grids}
    counted = {kind: _count(autoencoder, (length, *recipe.data.size)) for kind, length in frames.items()}
    parameters = {
        name: size for name, part in autoencoder.named_children() if (size := sum(p.numel() for p in part.parameters()))
    }
    trained = sum(parameters.values())
    share = 0.5 if "16" in str(recipe.trainer.get("precision")) else 1.0  # activations are what 16 bits halve
    return Plan(
        stage=recipe.stage or "main",
        grids=grids,
        parameters=parameters,
        frozen=0,
        memory={
            "weights": 4 * trained,
            "averaged weights": 4 * trained,
            "gradients and optimiser": 12 * trained,
            "activations": int(share * max(getattr(recipe.data.batch, kind) * counted[kind][1] for kind in grids)),
        },
        flops={kind: flops for kind, (flops, _) in counted.items()},
        training_flops={kind: 3 * flops for kind, (flops, _) in counted.items()},
    )


def _count(autoencoder: TrainableAutoencoder, size: tuple[int, int, int]) -> tuple[float, int]:
    """FLOPs of encoding and decoding a clip of (frames, height, width), and the bytes that autograd keeps of it."""
    kept: dict[int, int] = {p.untyped_storage()._cdata: 0 for p in cast(nn.Module, autoencoder).parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage._cdata, storage.nbytes())
        held.append(tensor)  # a freed one's address may be another's
        return tensor

    held: list[torch.Tensor] = []
    video = torch.empty(1, 3, *size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        autoencoder.reconstruct(autoencoder.posterior(video)[0])
    return float(counter.get_total_flops()), sum(kept.values())
