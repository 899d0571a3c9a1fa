"""What the datamodule hands to the LightningModule: tensors and strings, nothing else."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Drop(NamedTuple):
    """A sample that could not be used."""

    where: str
    """``shard:key``"""
    reason: str


class Batch(NamedTuple):
    """One rank's samples of one kind."""

    kind: str
    """``image`` or ``video``"""
    step: int
    """Optimiser step within the stage that this batch belongs to."""
    clips: Tensor
    """uint8 [b 3 t h w]; an image has t = 1."""
    captions: list[str]
    fps: float
    """Frames per second of the clips; 0 for images."""
    keys: list[str]
    """``shard:key`` of each sample."""
    slots: Tensor
    """int64 [b]: the number of each sample in the stage's stream of all ranks and kinds. Noise and times follow
    from it, so that training does not depend on how samples are spread over ranks."""
    drops: list[Drop]
    """Samples that should have stood here and were replaced."""
