"""What training an autoencoder will take: counted on the meta device, where nothing is computed."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from lingen.autoencoder import TrainableAutoencoder
from lingen.frozen import on_meta
from lingen.plan.forecast import Plan, bytes_of_a_number, stage_grids
from lingen.recipe.registry import AUTOENCODERS
from lingen.recipe.sections import Recipe


def plan_autoencoder(recipe: Recipe) -> Plan:
    """Forecast of a stage that trains its autoencoder; what the losses and their networks take is not in it."""
    autoencoder = on_meta(AUTOENCODERS, recipe.autoencoder)
    grids = stage_grids(recipe)
    frames = {kind: 1 if kind == "image" else recipe.data.frames for kind in grids}
    counted = {kind: _count(autoencoder, (length, *recipe.data.size)) for kind, length in frames.items()}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in autoencoder.named_children()}
    return Plan(
        stage=recipe.stage or "main", grids=grids, parameters={name: size for name, size in sizes.items() if size},
        frozen=0, held=bytes_of_a_number(recipe), flops=counted,
        training_flops={kind: 3 * flops for kind, flops in counted.items()},
    )  # fmt: skip


def _count(autoencoder: TrainableAutoencoder, size: tuple[int, int, int]) -> float:
    """FLOPs of encoding and decoding a clip of (frames, height, width)."""
    with FlopCounterMode(display=False) as counter:
        autoencoder.reconstruct(autoencoder.posterior(torch.empty(1, 3, *size, device="meta"))[0])
    return float(counter.get_total_flops())
