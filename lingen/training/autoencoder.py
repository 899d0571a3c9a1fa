"""The LightningModule of an autoencoder: reconstruction and adversarial losses in one backward pass."""

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lingen import flow
from lingen.autoencoder import losses
from lingen.autoencoder.network import Discriminator
from lingen.autoencoder.perceptual import NoDistance
from lingen.data.batch import Batch
from lingen.data.datamodule import ClipData
from lingen.media import as_floats
from lingen.plan.trial import features_of, trainable
from lingen.ranks.heartbeat import sign
from lingen.recipe.registry import AUTOENCODERS, PERCEPTUAL
from lingen.recipe.sections import Recipe
from lingen.training.base import Trained

FRAMES_AT_ONCE = 8
"""Frames of a clip that validation passes to the perceptual distance at once."""
STATISTICS_BATCHES = 32
"""Batches that the latents' mean and spread are measured on at the end of a stage."""


class AutoencoderModule(Trained):
    """A video autoencoder and its critic (losses: Movie Gen, arXiv 2410.13720, section 3.1.1; settings:
    `ReconstructionConfig`).

    One AdamW moves both, after one backward pass: the autoencoder's terms see the discriminator's weights as constants,
    the discriminator's term sees the reconstruction as one. A step's randomness is a function of (seed, stage, slot),
    see `Batch.slots`; whether the adversarial terms count depends on `Batch.step`. An autoencoder with a `path` starts
    from the weights there, else from fresh ones.

    Args:
        recipe: a loaded stage."""

    optional = ("discriminator.",)

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.settings = recipe.reconstruction
        self.autoencoder = trainable(AUTOENCODERS.build(recipe.autoencoder), recipe.autoencoder["name"])
        self.perceptual = PERCEPTUAL.build(features_of(recipe))
        self.discriminator: Discriminator | None = None
        if self.settings.adversarial:
            self.discriminator = Discriminator(self.settings.discriminator_width, self.settings.discriminator_layers)
        self.freeze_parts()

    def begin(self) -> str:
        """Reads the weights at the autoencoder's `path`, where it has one."""
        if self.autoencoder.path is None:
            return super().begin()
        self.autoencoder.load()
        return str(self.autoencoder.path)

    def own_parts(self) -> Iterable[nn.Module]:
        """Encoder and decoder."""
        return cast(nn.Module, self.autoencoder).children()

    def frozen_parts(self) -> dict[str, nn.Module]:
        """The perceptual distance."""
        return {"perceptual.": self.perceptual}

    # one step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch of clips, uint8 [b 3 t h w]; its gradient is that of all the terms."""
        clips = as_floats(batch.clips)
        mean, logvar = self.posterior(clips)
        stream = self.recipe.seed, self.recipe.stage or "main"
        draws = flow.sample_draws(mean.shape[1:], batch.slots, stream, flow.Times(self.recipe.time, tokens=1))
        latents = mean + (0.5 * logvar).exp() * draws.noise.to(mean)
        video = self.reconstruct(latents, clips.shape[2])

        terms = {
            "kl": losses.kl_divergence(mean, logvar).mean(),
            "outlier": losses.outlier_penalty(latents, self.settings.outlier_radius).mean(),
        }
        value, pull = self.compare(video, clips, draws.uniform, batch.step, terms)
        pulled = (video * pull).sum()  # its gradient is `pull` times that of the video
        loss = value + pulled - pulled.detach()
        loss = loss + self.settings.kl * terms["kl"] + self.settings.outlier * terms["outlier"]
        critic = self.criticise(video, clips, batch.step, terms)
        self._record(loss.detach(), terms, batch, math.prod(mean.shape[2:]))
        return loss if critic is None else loss + critic

    def posterior(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b 3 t h w] in -1..1 -> mean and log variance of the latents [b c _t _h _w], float32."""
        mean, logvar = self.autoencoder.posterior(clips)
        return mean.float(), logvar.float()

    def reconstruct(self, latents: Tensor, frames: int) -> Tensor:
        """Latents as the posterior has them -> pixels, float32, without surplus frames."""
        return self.autoencoder.reconstruct(latents)[:, :, :frames].float()

    def compare(
        self, video: Tensor, clips: Tensor, uniform: Tensor, step: int, terms: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The values of the terms that depend on the reconstruction [b 3 t h w], and their gradient with respect to it.

        The gradients are taken at the reconstruction, once for the terms that compare and once for the adversarial
        one: so their ratio at the decoder's last layer (`losses.adaptive_weight`) costs that layer's backward pass
        alone, and what the perceptual distance keeps is freed before the decoder's backward."""
        settings, seen = self.settings, video.detach().requires_grad_()
        terms["l1"] = losses.l1(seen, clips).mean()
        terms["perceptual"] = self.distance(seen, clips, uniform)
        value = settings.l1 * terms["l1"] + settings.perceptual * terms["perceptual"]
        (pull,) = torch.autograd.grad(value, seen)
        if not self._is_criticised(step):
            return value.detach(), pull
        terms["adversarial"] = self.fool(seen)
        (push,) = torch.autograd.grad(terms["adversarial"], seen)
        weight = settings.adversarial * self._adaptive_weight(video, pull, push, terms)
        return (value + weight * terms["adversarial"]).detach(), pull + weight * push

    def _is_criticised(self, step: int) -> bool:
        return self.discriminator is not None and step >= self.settings.adversarial_start

    def fool(self, video: Tensor) -> Tensor:
        """The adversarial term of the autoencoder; the discriminator's weights are constants in it."""
        assert self.discriminator is not None
        constants = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return losses.generator_loss(functional_call(self.discriminator, constants, (video,)).float())

    def criticise(self, video: Tensor, clips: Tensor, step: int, terms: dict[str, Tensor]) -> Tensor | None:
        """The discriminator's term; the reconstruction is a constant in it. Before its start, 0 times its
        weights, because data parallelism needs every parameter in the loss."""
        if self.discriminator is None:
            return None
        if step < self.settings.discriminator_start:
            return 0.0 * torch.stack([p.sum() for p in self.discriminator.parameters()]).sum()
        real, fake = self.discriminator(clips).float(), self.discriminator(video.detach()).float()
        terms["discriminator"] = losses.discriminator_loss(real, fake)
        return terms["discriminator"]

    def distance(self, video: Tensor, clips: Tensor, uniform: Tensor) -> Tensor:
        """The perceptual distance of a few frames of each clip, which is cut into as many equal parts; one frame of
        each.

        Args:
            uniform: [b] in [0, 1), the frame's position within each part."""
        frames = video.shape[2]
        count = min(self.settings.perceptual_frames or frames, frames)
        part = frames / count
        index = ((torch.arange(count) + uniform[:, None]) * part).long().clamp(max=frames - 1).to(video.device)
        samples = torch.arange(len(video), device=video.device)[:, None]
        a, b = (x.movedim(2, 1)[samples, index].flatten(0, 1) for x in (video, clips))  # [(b t) 3 h w]
        return self.perceptual(a, b).mean()

    def _adaptive_weight(self, video: Tensor, pull: Tensor, push: Tensor, terms: dict[str, Tensor]) -> Tensor:
        if not self.settings.adaptive_max:
            return torch.ones((), device=video.device)
        last = self.autoencoder.last_layer
        (pulled,) = torch.autograd.grad(video, last, pull, retain_graph=True)
        (pushed,) = torch.autograd.grad(video, last, push, retain_graph=True)
        terms["adaptive_weight"] = losses.adaptive_weight(pulled, pushed, self.settings.adaptive_max)
        return terms["adaptive_weight"]

    def _record(self, loss: Tensor, terms: dict[str, Tensor], batch: Batch, positions: int) -> None:
        """Into the next row: every term, by kind too; tokens are the latents' positions. Steps are compared by the mean
        absolute error: the adversarial term may be negative."""
        compared = torch.where(torch.isfinite(loss), terms["l1"].detach(), loss)
        self.note(batch, compared.expand(len(batch.keys)), len(batch.keys) * positions)
        for name, value in {"loss": loss, **{f"loss/{name}": value for name, value in terms.items()}}.items():
            for label in (name, f"{name}/{batch.kind}"):
                self.meter.add(label, value.detach().expand(len(batch.keys)))

    def likeness(self, batch: Batch) -> str:
        """With what it is trained against: the critic's opinion changes the gradient."""
        return super().likeness(batch) + " with a critic" * self._is_criticised(batch.step)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Reconstruction from the posterior's mean: L1, PSNR (dB) and perceptual distance of all frames."""
        clips = as_floats(batch.clips)
        video = self.reconstruct(self.posterior(clips)[0], clips.shape[2])
        found = {"l1": losses.l1(video, clips), "psnr": losses.psnr(video, clips)}
        found["loss"] = self.settings.l1 * found["l1"]
        if not isinstance(self.perceptual, NoDistance):
            found["perceptual"] = torch.stack([self._distance_of_all(*pair) for pair in zip(video, clips, strict=True)])
            found["loss"] = found["loss"] + self.settings.perceptual * found["perceptual"]
        own = (batch.slots >= 0).to(clips.device)
        for name, values in found.items():
            for label in (f"validation/{name}", f"validation/{name}/{batch.kind}"):
                self.validation_meter.add(label, values, own)

    def _distance_of_all(self, video: Tensor, clip: Tensor) -> Tensor:
        """Mean over the frames of one clip [3 t h w]."""
        pieces = zip(*(x.movedim(1, 0).split(FRAMES_AT_ONCE) for x in (video, clip)), strict=True)
        return torch.cat([self.perceptual(a, b) for a, b in pieces]).mean()

    # optimisation

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The autoencoder's groups, then the discriminator's with its own learning rate."""
        own, groups = {id(p) for p in self._critics()}, super().parameter_groups()
        rates = {False: self.recipe.train.lr, True: self.settings.discriminator_lr or self.recipe.train.lr}
        split = [
            {**group, "params": [p for p in group["params"] if (id(p) in own) == critics], "lr": rate}
            for critics, rate in rates.items()
            for group in groups
        ]
        return [group for group in split if group["params"]]

    def clipped_together(self) -> Sequence[Iterable[nn.Parameter]]:
        """The autoencoder's parameters and the discriminator's, clipped separately: neither's gradient shrinks the
        other's."""
        own = {id(p) for p in self._critics()}
        return [[p for p in self.trained_parameters().values() if id(p) not in own], self._critics()]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Before its start the discriminator does not change; weight decay is off, too."""
        if self._batch.step < self.settings.discriminator_start:
            for parameter in self._critics():
                parameter.grad = None
        super().on_before_optimizer_step(optimizer)

    def _critics(self) -> list[nn.Parameter]:
        return [] if self.discriminator is None else list(self.discriminator.parameters())

    # the latents' spread

    def before_saving(self, data: ClipData) -> None:
        """Measures the latents of the averaged weights on the training batches that would come next."""
        with self.averaged_weights():
            self.measure_latents(data.batches(self.global_step), STATISTICS_BATCHES)

    @torch.no_grad()
    def measure_latents(self, batches: Iterable[Batch], count: int) -> None:
        """Puts mean and standard deviation of each channel over the first `count` batches into the autoencoder's
        buffers `mean` and `std`, so that `encode` gives latents of a spread near 1, as the noise has.

        Over the posterior's means, of all positions alike, in float64. Raises ValueError where there is no batch."""
        total = square = torch.zeros((), dtype=torch.float64)
        positions = 0
        for batch in islice(batches, count):
            sign()
            mean = self.posterior(as_floats(batch.clips.to(self.device)))[0].double().cpu()
            total, square = total + mean.sum((0, 2, 3, 4)), square + mean.square().sum((0, 2, 3, 4))
            positions += mean[:, 0].numel()
        if positions == 0:
            raise ValueError("There is no batch to measure the latents' mean and spread on.")
        mean = total / positions
        std = (square / positions - mean.square()).clamp(min=1e-12).sqrt()
        for buffer, values in ((self.autoencoder.mean, mean), (self.autoencoder.std, std)):
            buffer.copy_(values.view_as(buffer))
