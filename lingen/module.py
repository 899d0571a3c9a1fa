"""The LightningModule: what one training step does."""

from __future__ import annotations

import math
import time as clock
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, cast

import lightning
import torch
from torch import Tensor, nn

from lingen import flow
from lingen.average import AveragedWeights
from lingen.config import Recipe
from lingen.data.batch import Batch
from lingen.data.ledger import is_cut
from lingen.meter import Meter
from lingen.model import LinGen
from lingen.plan import peak_flops, plan
from lingen.ranks import gather_objects
from lingen.registry import AUTOENCODERS, TEXT_ENCODERS
from lingen.text import TextEncoder, replace_rows, with_frame_rate

TIME_BINS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Edges of the bins of the logged loss: narrow at low times, where clips are decided and training is sparse (ours)."""


class NonFiniteError(RuntimeError):
    """Several optimiser steps in a row had a loss or a gradient that is not finite."""


class LinGenModule(lightning.LightningModule):
    """A denoiser with its neighbours: the loss of flow matching (Movie Gen, 2410.13720, section 3.1.2), AdamW, averaged
    weights.

    Trained parts are the denoiser and those text encoders that are `trainable`; everything else is frozen, runs without
    gradients and stays out of checkpoints. A step's randomness is a function of (seed, stage, slot), see `Batch.slots`.

    Args:
        recipe: a loaded stage.
    """

    strict_loading = False  # the frozen parts are not in a checkpoint

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        self.model = LinGen(recipe.model)
        self.text = nn.ModuleList(TEXT_ENCODERS.build(component) for component in recipe.text)
        self.autoencoder = AUTOENCODERS.build(recipe.autoencoder)
        for part in self.frozen_parts().values():
            part.requires_grad_(False).eval()
        self.average: AveragedWeights | None = None
        self.meter, self.validation_meter = Meter(), Meter()
        self.bad_steps = 0
        self.optimizer_state: dict[str, Any] | None = None
        """AdamW's moments of the stage before, where the recipe keeps them."""
        self._pending_average: dict[str, Any] | None = None
        self._flops: dict[str, float] | None = None
        self._started = (clock.perf_counter(), 0)

    # what is trained and what is not

    def frozen_parts(self) -> dict[str, nn.Module]:
        """Prefix -> the parts that are used as they are."""
        parts = {
            f"text.{i}.": encoder for i, encoder in enumerate(self.text) if not getattr(encoder, "trainable", False)
        }
        return {**parts, "autoencoder.": self.autoencoder}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter that the optimiser moves."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def trained_state(self) -> dict[str, Tensor]:
        """`state_dict` without the frozen parts."""
        frozen = tuple(self.frozen_parts())
        return {name: value for name, value in self.state_dict().items() if not name.startswith(frozen)}

    def train(self, mode: bool = True) -> LinGenModule:
        super().train(mode)
        for part in self.frozen_parts().values():
            part.eval()
        return self

    # one step

    def encode_clips(self, clips: Tensor) -> Tensor:
        """uint8 [b 3 t h w] -> latents [b c t h w]; what is latents already stays as it is."""
        if clips.is_floating_point():
            return clips
        with torch.no_grad():
            return self.autoencoder.encode(clips.float() / 127.5 - 1)

    def encode_text(
        self, captions: list[str], fps: float, stored: Mapping[int, tuple[Tensor, Tensor]] = MappingProxyType({})
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        """Captions -> one (tokens [b n w], mask [b n]) per encoder; fps 0 is an image. An empty caption is no text.

        Args:
            stored: number of an encoder -> what it made of these captions before; not read where a caption is empty.
        """
        prefix = fps if self.recipe.data.fps_prefix else 0.0
        texts = [with_frame_rate(caption, prefix) for caption in captions]
        empty = [number for number, caption in enumerate(captions) if not caption]
        encoded = []
        for number, encoder in enumerate(self.text):
            encode = cast(TextEncoder, encoder).encode
            with torch.set_grad_enabled(torch.is_grad_enabled() and getattr(encoder, "trainable", False)):
                if number not in stored:
                    encoded.append(encode(texts))
                else:
                    tokens, mask = stored[number]
                    kept = tokens.to(self.model.patchify.weight.dtype), mask
                    encoded.append(replace_rows(kept, empty, encode([texts[empty[0]]]) if empty else None))
        return tuple(encoded)

    def losses(self, batch: Batch, purpose: str) -> tuple[Tensor, Tensor]:
        """Squared error of the velocity of each sample.

        Args:
            batch: one kind of samples.
            purpose: names the stream of random numbers: a stage's name, or ``validation`` (always the same times and
                noise, no text left out).
        Returns:
            losses [b] and times [b], float32 (float64 where the model is).
        """
        dtype = torch.promote_types(self.model.patchify.weight.dtype, torch.float32)
        latents = self.encode_clips(batch.clips).to(dtype)
        shift = flow.resolve_shift(self.recipe.time.shift, math.prod(self.model.grid_of(latents.shape[2:])))
        draws = flow.draw(latents.shape[1:], batch.slots, (self.recipe.seed, purpose), self.recipe.time, shift)
        noise, times = draws.noise.to(latents), draws.times.to(latents)
        drop = draws.uniform < (0.0 if purpose == "validation" else self.recipe.train.text_drop)
        captions = [
            "" if left_out else caption for caption, left_out in zip(batch.captions, drop.tolist(), strict=True)
        ]
        text = self.encode_text(captions, batch.fps, batch.text)
        velocity = self.model(flow.interpolate(noise, latents, times), times, text)
        error = velocity.to(dtype) - flow.target(noise, latents)
        return error.square().flatten(1).mean(1), times

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses, times = self.losses(batch, self.recipe.stage or "main")
        loss = losses.mean()
        self._batch = batch
        for name, count in counts(batch).items():
            self.meter.count(name, count)
        self._record(losses.detach(), times, batch)
        return loss

    def _record(self, losses: Tensor, times: Tensor, batch: Batch) -> None:
        losses = losses[torch.isfinite(losses)]
        if len(losses) < len(times):
            return  # reported by the guard below
        self.meter.add("loss", losses)
        self.meter.add(f"loss/{batch.kind}", losses)
        for name, picked in by_time(losses, times):
            self.meter.add(name, picked)
        self.meter.count("flop", self.flop_of_training(batch.kind) * len(losses))
        size = batch.clips.shape[2:]
        latents = size if batch.clips.is_floating_point() else self.latent_size(size)
        self.meter.count("tokens", len(losses) * math.prod(self.model.grid_of(latents)))

    def flop_of_training(self, kind: str) -> float:
        """FLOPs of forward and backward of one sample, recomputed blocks included (`Plan.training_flops`)."""
        if self._flops is None:
            self._flops = plan(self.recipe).training_flops
        return self._flops[kind]

    def latent_size(self, clip: Any) -> tuple[int, int, int]:
        """(frames, height, width) of a clip -> (t, h, w) of its latents; a last partial group of frames is one more."""
        return tuple(math.ceil(n / stride) for n, stride in zip(clip, self.autoencoder.strides, strict=True))  # type: ignore[return-value]

    # optimisation

    def configure_optimizers(self) -> Any:
        settings = self.recipe.train
        optimizer = torch.optim.AdamW(self._parameter_groups(), lr=settings.lr, betas=settings.betas)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor),
                "interval": "step",
            },
        }

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Decay pulls at the weights of linear layers and convolutions, not at norms, biases, tables or a_log."""
        decayed = {
            id(layer.weight)
            for layer in self.modules()
            if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        }
        trained = self.trained_parameters().values()
        return [
            {"params": [p for p in trained if id(p) in decayed], "weight_decay": self.recipe.train.weight_decay},
            {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
        ]

    def _lr_factor(self, step: int) -> float:
        settings = self.recipe.train
        if step < settings.warmup:
            return (step + 1) / settings.warmup
        if settings.decay == "constant":
            return 1.0
        done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips the gradient; one that is not finite is thrown away, and a few in a row stop the run."""
        parameters = [p for p in self.trained_parameters().values() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.recipe.train.clip_grad)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if torch.isfinite(norm):
            self.bad_steps = 0
            self.meter.add("grad_norm", norm[None])
            self.meter.add(f"grad_norm/{self._batch.kind}", norm[None])
            return
        self.bad_steps += 1
        self.meter.count("nonfinite_steps", 1)
        optimizer.zero_grad(set_to_none=True)
        if self.bad_steps >= self.recipe.train.max_nonfinite:
            raise NonFiniteError(
                f"The loss or its gradient was not finite in {self.bad_steps} steps in a row, up to step "
                f"{self.global_step + 1} of stage '{self.recipe.stage or 'main'}'; samples of this rank's last batch: "
                f"{', '.join(self._batch.keys)}. Lower train.lr, lengthen train.warmup, or look at these samples. "
                "Nothing of these steps was kept."
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.average is not None and self.bad_steps == 0:
            self.average.update()

    # averaged weights, checkpoints

    def on_fit_start(self) -> None:
        self.average = AveragedWeights(self.trained_parameters(), self.recipe.train.ema)
        if self._pending_average is not None:
            self.average.load_state_dict(self._pending_average)
            self._pending_average = None
        if self.optimizer_state is not None:
            self.carry_optimizer(self.optimizer_state)

    def carry_optimizer(self, state: dict[str, Any]) -> None:
        """Takes over AdamW's moments; learning rate and decay stay those of this stage."""
        optimizer = self.trainer.optimizers[0]
        groups = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        optimizer.load_state_dict(state)
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group.update(own)
        self.optimizer_state = None

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Inside the block the parameters hold the averaged values; a module loaded for sampling holds only those."""
        return self.average.applied() if self.average is not None else nullcontext()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.trained_state()
        if self.average is not None:
            checkpoint["average"] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._pending_average = checkpoint.get("average")

    # what is logged

    def log_row(self, values: dict[str, float]) -> None:
        """Hands values to every logger under the number of optimiser steps done.

        Not through `self.log`, which would repeat a value at every step until it changes.
        """
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=self.global_step)

    def on_train_start(self) -> None:
        self._started = (clock.perf_counter(), self.global_step)

    def collect_metrics(self) -> dict[str, float]:
        """Means since the last call, over all ranks; speed in tokens per second of all ranks together."""
        values = self.meter.flush(gather_objects if self.trainer.world_size > 1 else None)
        seconds = clock.perf_counter() - self._started[0]
        values["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        values["tokens_per_second"] = values.pop("tokens", 0.0) / seconds
        rate = values.pop("flop", 0.0) / seconds
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        if peak is not None:
            values["mfu"] = rate / (peak * self.trainer.world_size)
        values["steps_per_second"] = (self.global_step - self._started[1]) / seconds
        self._started = (clock.perf_counter(), self.global_step)
        return values

    def on_validation_start(self) -> None:
        self._paused = clock.perf_counter()
        self._applied = self.averaged_weights()
        self._applied.__enter__()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses, times = self.losses(batch, "validation")
        self.validation_meter.add("validation/loss", losses)
        self.validation_meter.add(f"validation/loss/{batch.kind}", losses)
        for name, picked in by_time(losses, times):
            self.validation_meter.add(f"validation/{name}", picked)

    def on_validation_end(self) -> None:
        self._applied.__exit__(None, None, None)
        values = self.validation_meter.flush(gather_objects if self.trainer.world_size > 1 else None)
        self.log_row(values)
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        # validation is not training time
        self._started = (self._started[0] + clock.perf_counter() - self._paused, self._started[1])


def counts(batch: Batch) -> dict[str, int]:
    """What the ledger counts of a batch, under the names of metrics.csv."""
    return {
        "data/used": len(batch.keys),
        "data/dropped": len(batch.drops),
        "data/truncated": sum(map(is_cut, batch.drops)),
        "data/retried": len(batch.retries),
    }


def by_time(losses: Tensor, times: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The losses of each bin of times, under the name they are logged by."""
    for low, high in zip(TIME_BINS, TIME_BINS[1:], strict=False):
        yield f"loss/time_{low:g}_{high:g}", losses[(times >= low) & (times < high)]
