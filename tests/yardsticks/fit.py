"""``lingen bench fit``: a recipe's own training loop by part, with its data, its Trainer and the user's own parts.
Each kind of batch is trained for itself in a run folder that is thrown away: steps that nothing disturbs, then steps
whose parts are timed, and on a GPU steps under the profiler.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler, Profiler

from lingen.plan.forecast import peak_flops, plan
from lingen.recipe import load_for_training
from lingen.recipe.sections import KINDS, Recipe
from lingen.run import fit_curriculum

from .parts import profiled_milliseconds
from .place import device_name
from .results import GIB, Fields, Results

WARM = 3
"""Steps before anything is measured, in which kernels are compiled and the loader fills its queue; where steps become
graphs, those with a row of the log are recorded at their second turn."""
PARTS_OF_A_STEP = {
    "train_dataloader_next": "data",
    ".training_step": "forward",
    ".backward": "backward",
    ".optimizer_step": "optimizer",
    "average": "average",
    "[Callback]": "callbacks",
    "run_training_batch": "loop",
}
"""End or beginning of the name of one of Lightning's actions -> the part that it is; the first match counts. An action
inside of another one counts for itself alone; what is left between them is the loop's."""


class StepProfiler(Profiler):
    """Milliseconds of the parts of training steps, by the actions that Lightning and `Trained` name; the GPU is waited
    for at each one's beginning and end."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.times: dict[str, float] = {}
        self._device = device
        self._open: list[str] = []
        self._last = 0.0

    def start(self, action_name: str) -> None:
        self._turn()
        self._open.append(action_name)

    def stop(self, action_name: str) -> None:
        self._turn()
        if self._open:  # it may have begun before this profiler
            self._open.pop()

    def summary(self) -> str:
        return ""

    def _turn(self) -> None:
        """What has passed since the last turn belongs to the action that is open now."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._last:
            self.times[self._part()] = self.times.get(self._part(), 0.0) + 1e3 * (now - self._last)
        self._last = now

    def _part(self) -> str:
        for action in reversed(self._open):
            for name, part in PARTS_OF_A_STEP.items():
                if action.endswith(name) or action.startswith(name):
                    return part
        return "loop"


class LoopMeter(Callback):
    """Measures the steps of a Trainer after `warm` of them: `steps` undisturbed, `steps` by part, and on a GPU `steps`
    under torch's profiler."""

    def __init__(self, steps: int, warm: int):
        self.steps, self.warm = steps, warm
        self.found: Fields = {}
        self.device_name = ""
        self._phase, self._began = -1, 0.0
        self._parts: StepProfiler
        self._profile: torch.profiler.profile

    def row(self, recipe: Recipe, kind: str) -> Fields:
        """What was found, of a recipe that trains on one kind."""
        forecast, seconds = plan(recipe), self.found["ms"] / 1e3
        samples = getattr(recipe.data.batch, kind) * recipe.train.accumulate
        peak = peak_flops(self.device_name)
        flops = {"mfu": forecast.model_flops, "hfu": forecast.training_flops} if peak else {}
        shares = {name: samples * of[kind] / seconds / (peak or 1) for name, of in flops.items() if kind in of}
        tokens = samples * forecast.tokens[kind]
        return {"tokens": tokens, "tokens_per_second": tokens / seconds, **shares, **self.found}

    def on_train_batch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule, *args: Any) -> None:
        done, device = trainer.global_step - self.warm, module.device
        phase = done // self.steps
        if done < 0 or done % self.steps or phase == self._phase:  # another batch of the same step
            return
        self._phase = phase
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        self.device_name = device_name(device)
        if phase == 0 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if phase == 1:
            self.found["ms"] = 1e3 * (now - self._began) / self.steps
            self.found["gib"] = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
            graphs = cast(Any, module).graphs
            self.found["compile"] = "graph" if graphs is not None and graphs.records else "off"
            cast(Any, trainer).profiler = self._parts = StepProfiler(device)
        if phase == 2:
            self.found["parts"] = {
                part: ms / self.steps for part, ms in sorted(self._parts.times.items(), key=lambda one: -one[1])
            }
            cast(Any, trainer).profiler = PassThroughProfiler()
            if device.type == "cuda":
                self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self._profile.start()
        if phase == 3:
            self._profile.stop()
            self.found["busy"] = sum(profiled_milliseconds(self._profile, True).values()) / (1e3 * (now - self._began))
        self._began = time.perf_counter()


def bench_fit(recipe: str, overrides: Sequence[str], stage: str | None, steps: int, results: Results) -> None:
    """A row for each kind of sample that a stage trains on: milliseconds of a step, undisturbed and by part, tokens a
    second, MFU and HFU where the GPU's peak is known, GiB, whether steps were graphs (`compile`), and on a GPU the
    share of the time in which it computes.

    Args:
        stage: of the recipe; None is the last one. One rank of it is measured.
        steps: of each measurement.
    """
    asked = load_for_training(recipe, overrides, stage).chosen(stage)[-1]
    device = results.device
    on_gpu = device.type == "cuda" and asked.trainer.get("accelerator") != "cpu"
    phases = 3 if on_gpu else 2
    are_graphs = on_gpu and asked.train.compile != "off"
    warm = WARM + 2 * asked.train.log_every * are_graphs
    for kind in (kind for kind in KINDS if getattr(asked.data.mix, kind)):
        one = {
            "train.steps": phases * steps + warm, "train.warmup": 0, "train.keep_optimizer": "false", "init": "null",
            "train.checkpoint_every": 10**9, "train.sample_every": 0, "train.validate_every": 0,
            "sample.prompts": "[]", "score.clips": 0, "trainer.devices": 1, "trainer.num_nodes": 1,
            **{f"data.mix.{other}": int(other == kind) for other in KINDS},
        }  # fmt: skip
        within = f"stages.{asked.stage}." if asked.stage else ""
        curriculum = load_for_training(recipe, [*overrides, *(f"{within}{key}={one[key]}" for key in one)], stage)
        trained, meter = curriculum.chosen(asked.stage)[-1], LoopMeter(steps, warm)
        results.say(f"{kind}: {trained.train.steps} steps of stage {trained.stage or 'main'}")
        with tempfile.TemporaryDirectory() as folder:
            fit_curriculum(curriculum, run=Path(folder) / "run", stage=asked.stage, callbacks=[meter])
        results.add(
            {"name": "fit", "recipe": trained.name, "stage": trained.stage, "kind": kind, **meter.row(trained, kind)}
        )
