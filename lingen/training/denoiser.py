"""The LightningModule of the denoiser: what one training step does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lingen import flow
from lingen.data.batch import Batch
from lingen.frozen import is_trained
from lingen.model import Text
from lingen.recipe.registry import LOSSES
from lingen.text import with_frame_rate
from lingen.training.base import Trained
from lingen.training.modules import TextToVideo
from lingen.training.named import SquaredError
from lingen.training.sharding import shard_denoiser

TIME_BINS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Edges of the bins of the logged loss: narrow at low times, where clips are decided and training is sparse (ours)."""


class Inputs(NamedTuple):
    """The tensors that a training step reads, on its device."""

    latents: Tensor
    noise: Tensor
    times: Tensor
    text: tuple[tuple[Tensor, ...], ...]
    """Of each encoder tokens and mask; of one that is trained along what its `read_ids` gives."""

    def tensors(self) -> list[Tensor]:
        return [*self[:3], *(one for part in self.text for one in part)]

    def copy(self) -> Inputs:
        text = tuple(tuple(map(torch.clone, part)) for part in self.text)
        return Inputs(self.latents.clone(), self.noise.clone(), self.times.clone(), text)


class LinGenModule(TextToVideo, Trained):
    """A `TextToVideo` in training: the loss of flow matching (Movie Gen, 2410.13720, section 3.1.2),
    an optimiser, averaged weights.

    A step's randomness is a function of (seed, stage, slot), see `Batch.slots`.

    Args:
        recipe: a loaded stage."""

    @cached_property
    def loss(self) -> nn.Module:
        """`train.loss`; no child of the module, so that clips are made where it is not installed."""
        made: nn.Module = LOSSES.build(self.recipe.train.loss)
        return made.to(self.device)

    def own_parts(self) -> Iterable[nn.Module]:
        """The blocks: where they are sharded, ranks wait for each other's weights before each of them."""
        return cast(Iterable[nn.Module], self.model.blocks)

    def shard(self, mesh: DeviceMesh, device: torch.device, low: torch.dtype | None) -> None:
        """See `lingen.training.sharding.shard_denoiser`; frozen parts stay whole on every rank."""
        shard_denoiser(self.model, filter(is_trained, self.text), mesh, device, low)

    def losses(self, batch: Batch, purpose: str) -> tuple[Tensor, Tensor]:
        """`train.loss` of the velocity of each sample; in validation its squared error, whatever is trained with.

        Args:
            batch: one kind of samples.
            purpose: names the stream of random numbers: a stage's name, or ``validation`` (always the same times and
                noise, no text left out).
        Returns:
            losses [b] and times [b], float32 (float64 where the model is)."""
        clips, captions = self.draw(batch, purpose)
        text = self.encode_text(captions, batch.fps, batch.text, batch.null)
        loss = SquaredError() if purpose == "validation" else self.loss
        return self.losses_of(*clips, text, loss), clips[2]

    def draw(self, batch: Batch, purpose: str) -> tuple[tuple[Tensor, Tensor, Tensor], list[str]]:
        """Latents and noise [b c t h w], times [b] and captions, some left out; arguments as for `losses`."""
        dtype = torch.promote_types(self.model.patchify.weight.dtype, torch.float32)
        latents = self.encode_clips(batch.clips).to(dtype)
        seed, training = (self.recipe.seed, purpose), self.times_of(latents.shape[2:])
        draws = flow.sample_draws(latents.shape[1:], batch.slots, seed, training, pinned=latents.is_cuda)
        drop = draws.uniform < (0.0 if purpose == "validation" else self.recipe.train.text_drop)
        pairs = zip(batch.captions, drop.tolist(), strict=True)
        captions = ["" if left_out else caption for caption, left_out in pairs]
        return (latents, sent(draws.noise, latents), sent(draws.times, latents)), captions

    def losses_of(self, latents: Tensor, noise: Tensor, times: Tensor, text: Text, loss: Any) -> Tensor:
        """The losses [b] of `losses`: a function of tensors alone."""
        velocity = self.model(flow.interpolate(noise, latents, times), times, text).to(latents.dtype)
        return cast(Tensor, loss(velocity, flow.target(noise, latents), times))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        size = batch.clips.shape[2:]
        latents = size if batch.clips.is_floating_point() else self.latent_size(size)
        tokens = len(batch.keys) * math.prod(self.model.grid_of(latents))
        if self.graphs is not None:
            return self.graphs.step(batch, batch_idx, tokens)
        losses, times = self.losses(batch, self.recipe.stage or "main")
        self.note(batch, losses, tokens)
        self.measure(batch.kind, losses, times)
        return losses.mean()

    def read(self, batch: Batch) -> Inputs:
        """What a training step reads of a batch, where the step is a function of tensors alone."""
        clips, captions = self.draw(batch, self.recipe.stage or "main")
        prefix = batch.fps if self.recipe.data.fps_prefix else 0.0
        text = tuple(
            tuple(
                sent(one, clips[0], one.dtype)
                for one in cast(Any, encoder).read_ids([with_frame_rate(caption, prefix) for caption in captions])
            )
            if is_trained(encoder)
            else self.encode_with(number, captions, batch.fps, batch.text.get(number), batch.null.get(number))
            for number, encoder in enumerate(self.text)
        )
        return Inputs(*clips, text)

    def losses_at(self, kind: str, inputs: Inputs) -> Tensor:
        """The losses [b] of a training step of what `read` gave, measured."""
        text = tuple(
            cast(Any, encoder).embed(*one) if is_trained(encoder) else one
            for encoder, one in zip(self.text, inputs.text, strict=True)
        )
        losses = self.losses_of(*inputs[:3], cast(Text, text), self.loss)
        self.measure(kind, losses, inputs.times)
        return losses

    def measure(self, kind: str, losses: Tensor, times: Tensor) -> None:
        """Losses [b] of samples of a kind at times [b] go into the next row."""
        self.meter.add("loss", losses)
        self.meter.add(f"loss/{kind}", losses)
        for name, picked in bins_of(times):
            self.meter.add(f"loss/{name}", losses, picked)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses, times = self.losses(batch, "validation")
        own = (batch.slots >= 0).to(losses.device)
        self.validation_meter.add("validation/loss", losses, own)
        self.validation_meter.add(f"validation/loss/{batch.kind}", losses, own)
        for name, picked in bins_of(times):
            self.validation_meter.add(f"validation/loss/{name}", losses, own & picked)


def sent(values: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the CPU on the device of another tensor, in its dtype or the one that is named; nothing waits."""
    if like.is_cuda and not values.is_cuda:
        values = values.pin_memory()
    return values.to(like.device, dtype or like.dtype, non_blocking=True)


def bins_of(times: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Which times [b] lie in each bin, by its name in the log."""
    for low, high in zip(TIME_BINS, TIME_BINS[1:], strict=False):
        yield f"time_{low:g}_{high:g}", (times >= low) & (times < high)
