"""The common part of all trainings: optimiser, averaged weights, the guard against non-finite steps, logging."""

from __future__ import annotations

import math
import time as clock
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lingen.data.batch import Batch
from lingen.data.ledger import is_cut
from lingen.plan.forecast import Plan, peak_flops, plan
from lingen.plan.practice import build_optimizer
from lingen.ranks.collectives import gather_objects, is_connected, is_first_rank, place, together
from lingen.recipe.registry import DECAYS
from lingen.recipe.sections import Recipe
from lingen.training.average import AveragedWeights
from lingen.training.checkpoint import moments_of, open_checkpoint, restore
from lingen.training.graph import StepGraphs, fused_here, graphs_of
from lingen.training.health import GoBack, NonFiniteError, Spike, SpikeWatch, Step, told_samples
from lingen.training.meter import Meter
from lingen.training.modules import StageModules
from lingen.training.pace import Pace, compared
from lingen.training.sharding import clip_gradients
from lingen.training.state import load_state_by_name


class Trained(StageModules, lightning.LightningModule):
    """Base of a stage's LightningModule. Subclasses define what is trained and the loss: `frozen_parts`,
    `training_step` and `validation_step`, which pass each batch to `note`.

    Args:
        recipe: a loaded stage."""

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.meter, self.validation_meter = Meter(), Meter()
        self.callbacks_meter = Meter()
        """What callbacks log; steps that are thrown away take nothing from it."""
        self.bad_steps = 0
        self.checkpoint: Path | None = None
        """What the stage goes on from, read when the strategy has set everything up."""
        self.moments_from: Path | None = None
        """A checkpoint of the stage before, whose moments the optimiser takes over, where the recipe keeps them."""
        self._seen: list[tuple[list[str], Tensor]] = []
        """Of each batch of this step, the samples and their losses."""
        self.spikes = SpikeWatch()
        self.graphs: StepGraphs | None = None
        """Where steps are CUDA graphs; it runs them in Lightning's stead."""
        self.rms: dict[str, Tensor] | None = None
        """Mean squares of the outputs of branches, where this step measures them (`lingen.training.rows.Rows`)."""
        self.pace = Pace()
        self.past: GoBack | None = None
        """The spike for which the stage goes on from an earlier step."""
        self.say: Callable[[str], None] = lambda text: None
        """Tells the user something; on rank 0."""
        self.write_row: Callable[[int, dict[str, float]], None] = lambda step, values: None
        """Writes a row of metrics.csv: the steps done, and values by name."""
        self.steps_before = 0
        """Steps of the stages before: loggers count those of the whole run."""
        self._started = (clock.perf_counter(), 0)
        self._plan: Plan | None = None
        self._lr = 0.0
        """Of the last step."""

    def begin(self) -> str:
        """Called at the start of a run without `init`; returns a description of the weights that it starts from."""
        return "random weights"

    def before_saving(self, data: Any) -> None:
        """Measures what it needs on the data module's samples, before the weights of a finished stage are written."""

    def own_parts(self) -> Iterable[nn.Module]:
        """Modules in whose forward pass this rank waits for no other one; they tell its pace."""
        return ()

    def shard(self, mesh: DeviceMesh, device: torch.device, low: torch.dtype | None) -> None:
        """Splits what is trained over the ranks of a mesh, see `lingen.training.sharding.shard_denoiser`."""
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.recipe.train, self.parameter_groups())
        for group in optimizer.param_groups if fused_here(self) else ():
            group |= {"fused": True, "foreach": False}
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def follow_recipe(self, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR) -> None:
        """Gives the schedule the rates of the recipe: it has just got those of the checkpoint, which may be others.
        Its place stays."""
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._lr_factor(scheduler.last_epoch)
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Weight decay applies to the weights of linear layers and convolutions, not to norms, biases, tables or a_log,
        as each says where it is made (`lingen.blocks.layers.undecayed`). Each group has all of its settings."""
        trained, its = self.trained_parameters().items(), self.recipe.train
        both = {decay: [p for name, p in trained if (name in self.decayed) == decay] for decay in (True, False)}
        return [
            {"params": own, "decays": decay, "weight_decay": its.weight_decay * decay, "lr": its.lr, "betas": its.betas}
            for decay, own in both.items()
        ]

    def _lr_factor(self, step: int) -> float:
        settings = self.recipe.train
        if step < settings.warmup:
            return (step + 1) / settings.warmup
        steps = max(0, settings.steps - settings.warmup)
        return float(DECAYS.build(settings.decay, min(step - settings.warmup, steps), steps))

    def clipped_together(self) -> Sequence[Iterable[nn.Parameter]]:
        """Sets of parameters, each of which has its gradient clipped as one; the first one's norm is logged."""
        return [self.trained_parameters().values()]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips the gradient; a step that is thrown away leaves none (`judge`)."""
        self.note_rate(optimizer)
        norms = self.clip()
        loss, *sizes = self._of_all_ranks(norms)
        self.pace.step()
        step, self._seen = self.step_of(self._seen, loss, sizes), []
        if self._overflows(step) or not self.judge(step):
            optimizer.zero_grad(set_to_none=True)

    def note_rate(self, optimizer: torch.optim.Optimizer) -> None:
        """For the next row. A fused AdamW takes the learning rate in float32, as a graph reads it."""
        self._lr = float(optimizer.param_groups[0]["lr"])
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"]).item() if group.get("fused") else group["lr"]

    def clip(self) -> list[Tensor]:
        """Clips the gradient; the norms before, of each set that is clipped together."""
        return [clip_gradients(parameters, self.recipe.train.clip_grad) for parameters in self.clipped_together()]

    def step_of(self, seen: list[tuple[list[str], Tensor]], loss: float, norms: Sequence[float]) -> Step:
        """The step that is being done, of batches like the one that was noted last."""
        return Step(self.global_step + 1, self._batch.kind, self.likeness(self._batch), seen, loss, norms)

    def judge(self, step: Step) -> bool:
        """Whether a step is kept. One that is not finite is thrown away, and one that spikes where `train.on_spike`
        says so; a few in a row, or all of a stage, stop the run."""
        is_finite = all(map(math.isfinite, (step.loss, *step.norms)))
        spike = self.spikes.look(step.like, step.loss, step.norms[0]) if is_finite else None
        if spike is not None:
            self.meter.count("spikes", is_first_rank())
        if spike is not None and spike.is_news:  # of several in a row only the first one is said
            done = f"train.on_spike={self.recipe.train.on_spike}"
            self.say(f"{self._where(step)} spikes: {spike}; {done}; {_samples(step)}")
        if not is_finite or (spike is not None and self.recipe.train.on_spike != "keep"):
            self._throw_away(step, spike)
            return False
        self.bad_steps = 0
        for name in ("grad_norm", f"grad_norm/{step.kind}"):
            self.meter.add(name, torch.tensor([step.norms[0]]))
        self.meter.keep()
        self.spikes.learn(step.like, step.loss, step.norms[0])
        return True

    def _overflows(self, step: Step) -> bool:
        """Whether only the scale of float16 was too high: Lightning's scaler leaves such a step out and halves it."""
        scaler = getattr(getattr(self._trainer, "precision_plugin", None), "scaler", None)
        if scaler is None or scaler.get_scale() <= 1 or not math.isfinite(step.loss) or math.isfinite(sum(step.norms)):
            return False
        self.meter.take()
        self.meter.count("overflows", is_first_rank())
        return True

    def likeness(self, batch: Batch) -> str:
        """Names the steps that one of this batch is like, in the size of its loss and its gradient."""
        return f"{batch.kind} {'x'.join(map(str, batch.clips.shape[2:]))}"

    def _of_all_ranks(self, norms: Sequence[Tensor]) -> list[float]:
        """The mean loss of the step's samples and the norms, the same on all ranks; for this a GPU is waited for."""
        sums = [losses.sum().to(norms[0]) for _, losses in self._seen]
        count = norms[0].new_full((), sum(len(losses) for _, losses in self._seen))
        on_one = (norm.to(count) for norm in norms)  # one without a gradient is the CPU's
        told = torch.stack([sum(sums[1:], sums[0]), count, *on_one])
        if is_connected():
            dist.all_reduce(told)
        total, count, *sums = told.tolist()
        return [total / count, *(one / place()[1] for one in sums)]

    def _throw_away(self, step: Step, spike: Spike | None) -> None:
        """Leaves the step out. GoBack where training goes on from an earlier one, NonFiniteError where it ends."""
        self.bad_steps += 1
        self.meter.take()
        self.meter.count("nonfinite_steps" if spike is None else "skipped_steps", is_first_rank())
        settings = self.recipe.train
        are_many = self.bad_steps >= min(settings.max_nonfinite, settings.steps)  # a shorter stage would be trained
        if settings.on_spike == "rollback" and (spike is not None or are_many):
            data, what = cast(Any, self.trainer).datamodule, f"{spike or 'not finite'}; {_samples(step)}"
            raise GoBack(step.number, data.taken(step.number), self.spikes.returns, f"{self._where(step)}: {what}")
        if are_many:
            what = "was not finite" if spike is None else "spiked"
            raise NonFiniteError(
                f"The loss or its gradient {what} in {self.bad_steps} steps in a row, up to {self._where(step)}; "
                f"{_samples(step)}. Lower train.lr, lengthen train.warmup, or look at these samples. Nothing of these "
                "steps was kept."
            )

    def _where(self, step: Step) -> str:
        return f"step {step.number} of stage '{self.recipe.stage or 'main'}'"

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.graphs is None:
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        if self.graphs is not None:
            closure()  # runs `training_step`, which does it all
            return
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        optimizer.zero_grad()  # here, not before the next backward pass: the next forward pass needs the memory
        if self.average is not None and self.bad_steps == 0:
            with cast(Any, self.trainer).profiler.profile("average"):
                self.average.update()

    def on_fit_start(self) -> None:
        self.average = AveragedWeights(self.trained_parameters(), self.recipe.train.ema)
        if self.checkpoint is not None:
            checkpoint = self.checkpoint
            together(lambda: restore(open_checkpoint(checkpoint, self), self.trainer, self))
        elif self.moments_from is not None:
            earlier = self.moments_from
            moments = together(lambda: moments_of(open_checkpoint(earlier, self), self))
            load_state_by_name(self, self.trainer.optimizers[0], moments)
        if self.past is not None:
            cast(Any, self.trainer).datamodule.go_past(self.past.taken)
            self.spikes.returns = self.past.returns
            self.meter.count("rollbacks", is_first_rank())

    def settle(self) -> None:
        """Judges the steps that a graph has done, and that nobody has looked at yet; errors as for `judge`."""
        if self.graphs is not None:
            self.graphs.settle()

    def note(self, batch: Batch, losses: Tensor, tokens: int) -> None:
        """Called with each training batch: what is counted of it goes into the next row.

        Args:
            losses: [b], of each sample: positive numbers by which steps are compared, or not finite.
            tokens: of the batch."""
        self._batch = batch
        self._seen.append((batch.keys, losses.detach()))
        of_model, of_hardware = self.flop_of_training(batch.kind)
        of_batch = {"mfu": of_model * len(batch.keys), "hfu": of_hardware * len(batch.keys)}
        for name, count in (counts(batch) | {"tokens": tokens} | of_batch).items():
            self.meter.count(name, count)

    def flop_of_training(self, kind: str) -> tuple[float, float]:
        """FLOPs of forward and backward of one sample: of the model, and with what is recomputed (`Plan`); 0 where they
        cannot be counted, and then there is neither MFU nor HFU."""
        if self._plan is None:
            self._plan = plan(self.recipe)
        return self._plan.model_flops.get(kind, 0.0), self._plan.training_flops.get(kind, 0.0)

    def log_row(self, values: dict[str, float]) -> None:
        """Hands values to metrics.csv, and to every logger under the stage's name and the steps of the whole run.

        Not through `self.log`, which would repeat a value at every step until it changes."""
        self.write_row(self.global_step, values)
        for logger in self.trainer.loggers:
            tagged = {f"{self.recipe.stage or 'main'}/{name}": value for name, value in values.items()}
            logger.log_metrics(tagged, step=self.steps_before + self.global_step)

    def log(  # type: ignore[override]
        self, name: str, value: Any, prog_bar: bool = False, logger: bool | None = None, *settings: Any, **named: Any
    ) -> None:
        """For callbacks. A number joins the next row as the mean since the row before, over ranks, too, whatever
        `on_epoch` and `sync_dist` say; `logger=False` keeps it to `Trainer.callback_metrics`."""
        super().log(name, value, prog_bar, False, *settings, **named)
        if logger is not False:
            self.callbacks_meter.add(name, torch.as_tensor(value).float().reshape(1).to(self.device))

    def on_train_epoch_end(self) -> None:
        if left := self.callbacks_meter.flush():
            self.log_row(left)

    def on_train_start(self) -> None:
        self.follow_recipe(self.trainer.optimizers[0], cast(Any, self.trainer.lr_scheduler_configs[0].scheduler))
        self._started = (clock.perf_counter(), self.global_step)
        self.graphs = graphs_of(self)
        parts = self.own_parts() if self.graphs is None else ()
        self.pace = Pace(parts, self.device.type == "cuda")

    def on_train_end(self) -> None:
        self.settle()
        self.graphs = None  # and the memory that they hold

    def collect_metrics(self) -> dict[str, float]:
        """Means since the last call, over all ranks; speed in tokens per second of all ranks together."""
        self.settle()
        values = self.callbacks_meter.flush() | self.meter.flush()
        seconds = clock.perf_counter() - self._started[0]
        values["lr"] = self._lr
        values["tokens_per_second"] = values.pop("tokens", 0.0) / seconds
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        for name in ("mfu", "hfu"):
            if (flop := values.pop(name, 0.0)) and peak is not None:
                values[name] = flop / seconds / (peak * self.trainer.world_size)
        values["steps_per_second"] = (self.global_step - self._started[1]) / seconds
        self._started = (clock.perf_counter(), self.global_step)
        ranks = gather_objects(self.pace.flush())
        if (slow := self.pace.slow_ranks(ranks)) is not None:
            self.say(slow)
        return values | compared(ranks)

    def on_validation_start(self) -> None:
        self._paused = clock.perf_counter()
        self._applied = self.averaged_weights()
        self._applied.__enter__()

    def on_validation_end(self) -> None:
        self._applied.__exit__(None, None, None)
        values = self.callbacks_meter.flush() | self.validation_meter.flush()
        self.log_row(values)
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        # validation is not training time
        self._started = (self._started[0] + clock.perf_counter() - self._paused, self._started[1])


def _samples(step: Step) -> str:
    own = [pair for keys, losses in step.seen for pair in zip(keys, losses.tolist(), strict=True)]
    return told_samples(gather_objects(own))


def counts(batch: Batch) -> dict[str, float]:
    """What the ledger counts of a batch, under the names of metrics.csv."""
    found = {"used": len(batch.keys), "dropped": len(batch.drops), "truncated": sum(map(is_cut, batch.drops))}
    return {f"data/{name}": count for name, count in {**found, "retried": len(batch.retries)}.items()}
