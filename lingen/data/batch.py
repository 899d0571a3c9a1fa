"""What the datamodule gives to the LightningModule: tensors and strings, nothing else."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Progress = Callable[[int, int], None]
"""Called with how many clips, samples, steps, files or shards are done, and how many there are."""


def no_progress(done: int, total: int) -> None:
    """Shows none."""


class Drop(NamedTuple):
    """Something that cannot be used."""

    where: str
    """``shard:key`` of a sample, or a shard."""
    reason: str
    """``reason: detail``"""
    source: str = ""
    """Where the sample came from."""


class Batch(NamedTuple):
    """One rank's samples of one kind and shape."""

    kind: str
    """``image`` or ``video``"""
    step: int
    """Optimiser step within the stage that this batch belongs to."""
    clips: Tensor
    """uint8 [b 3 t h w]; of encoded shards latents [b c t h w], floating point. An image has t = 1."""
    captions: list[str]
    fps: float
    """Frames per second of the clips; 0 for images."""
    keys: list[str]
    """``shard:key`` of each sample."""
    sources: list[str]
    """Where each sample came from."""
    slots: Tensor
    """int64 [b]: the number of each sample in the stage's stream of all ranks and kinds. Noise and times follow
    from it, so that training does not depend on how samples are spread over ranks. -1: a held-out sample that comes
    again, only so that every rank has as many."""
    drops: list[Drop]
    """Samples that belong to this batch but could not be used, and were replaced."""
    retries: list[str]
    """``shard:key`` of samples for each further attempt that it took to read them."""
    text: dict[int, tuple[Tensor, Tensor]]
    """Of encoded shards: number of a text encoder -> tokens [b n w] and their mask [b n]. Encoders that are not in it
    read the captions."""
    null: dict[int, tuple[Tensor, Tensor]] = {}
    """The same for no text at this frame rate, which replaces a caption that is left out. An encoder that is not in it,
    because a sample was encoded without it, is run."""
