"""The whole denoiser with random weights: 100 forwards, memory, parts, a real sampling, the paper's table."""

from __future__ import annotations

import copy
import gc
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lingen import flow
from lingen.bench.build import TEXT_TOKENS, denoiser, dtype_name, name_of, sample_inputs
from lingen.bench.flops import Grid, model_flops
from lingen.bench.parts import by_part
from lingen.bench.results import GIB, Results, Row, Say
from lingen.bench.targets import FORWARDS, FP8, Variant
from lingen.bench.timing import Work, allocated, forward, interleaved, milliseconds, or_none, peak_bytes
from lingen.kernels.fp8 import quality, to_fp8
from lingen.model import LinGen, Text
from lingen.recipe.sections import LinGenConfig, Recipe


@dataclass(frozen=True)
class ModelBench:
    """One denoiser on one grid, batch 1: what the measurements below share."""

    config: LinGenConfig
    grid: Grid
    device: torch.device
    dtype: torch.dtype
    fp8: bool
    results: Results
    say: Say
    budget: float = 3.0
    """Seconds for each number; what takes longer runs once."""

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def mixer(self) -> str:
        """The mixer's name, or those of a hybrid."""
        mixers = self.config.mixer if isinstance(self.config.mixer, list) else [self.config.mixer]
        return "+".join(map(name_of, mixers))

    def make(self) -> LinGen:
        """The denoiser, its large products in 8 bits where that is asked for."""
        model = denoiser(self.config, self.device, self.dtype)
        if self.fp8:
            to_fp8(model)
        return model

    def inputs(self, batch: int = 1) -> tuple[Tensor, Tensor, Text]:
        return sample_inputs(self.config, self.grid, self.device, batch)

    def row(self, name: str, ms: float | None, **more: object) -> Row:
        """A row of the result file; `more` wins."""
        own = {
            "name": name, "mixer": self.mixer, "kernel": "auto", "dtype": FP8 if self.fp8 else dtype_name(self.dtype),
            "tokens": self.tokens, "ms": ms, "grid": list(self.grid), "dim": self.config.dim,
            "depth": self.config.depth,
        }  # fmt: skip
        return own | more

    def forward_row(self, ms: float | None, **more: object) -> Row:
        """A row named `forward`, with the seconds that 100 of them take."""
        seconds = None if ms is None else ms * FORWARDS / 1e3
        return self.row("forward", ms, batch=1, seconds_per_100=seconds) | more


def bench_forward(bench: ModelBench, model: LinGen, split: bool = True) -> dict[int, Row]:
    """Rows of the forward at batch 1 and 2 (guidance in one pass), and of its parts. Returns batch -> its row."""
    bench.say(f"{bench.mixer}, {bench.config.depth} layers, {bench.tokens:,} tokens: first forward")
    works = {batch: forward(model, bench.inputs(batch)) for batch in (1, 2)}
    finite = bool(_output(model, bench.inputs()).isfinite().all())
    peaks = {batch: or_none(partial(_peak, work, bench.device)) for batch, work in works.items()}
    able = {str(batch): work for batch, work in works.items() if peaks[batch] is not None}
    times = interleaved(able, bench.device, bench.budget, warm=False)
    ms = {int(batch): statistics.median(own) for batch, own in times.items()}
    tflop = model_flops(bench.config, bench.grid, TEXT_TOKENS) / 1e12
    rows = {
        batch: bench.results.add(
            bench.forward_row(
                ms[batch], gib=peaks[batch] or None, tflop=batch * tflop, batch=batch, finite=finite,
                runs=len(times[str(batch)]), seconds_per_100=ms[batch] / batch * FORWARDS / 1e3,
            )
        )
        for batch in ms
    }  # fmt: skip
    if split:
        parts = by_part(works[1], bench.device)
        for part, took in parts.items():
            bench.results.add(bench.row("part", took, part=part, share=took / sum(parts.values())))
    return rows


def _output(model: LinGen, inputs: tuple[Tensor, Tensor, Text]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(*inputs)
    return out


def _peak(work: Work, device: torch.device) -> float:
    """GiB; 0 where it is not known, after a run all the same."""
    if device.type == "cuda":
        return peak_bytes(work, device) / GIB
    work()
    return 0.0


def bench_sampling(bench: ModelBench, model: LinGen, recipe: Recipe, forwards: dict[int, Row]) -> None:
    """One real sampling with guidance, in the faster of two ways: one pass of batch 2, or two of batch 1."""
    settings = recipe.sample
    shift = flow.resolve_shift(recipe.time.shift, bench.tokens)
    times = flow.schedule(settings.steps, settings.schedule, settings.emulated_steps, shift).to(bench.device)
    latents, _, text = bench.inputs()
    null = tuple((tokens, torch.zeros_like(mask)) for tokens, mask in text)  # no text at all, as guidance has it
    both = tuple(flow.stack_text(a, b) for a, b in zip(null, text, strict=True))
    together = 2 in forwards and forwards[2]["ms"] < 2 * forwards[1]["ms"]

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        if together:
            halves = model(x.repeat(2, 1, 1, 1, 1), time.expand(2), both).chunk(2)
        else:
            halves = tuple(model(x, time.expand(1), one) for one in (null, text))
        return flow.guided(halves[1], halves[0], settings.guidance, settings.guidance_rescale)

    def progress(done: int, steps: int) -> None:
        if done % 10 == 0:
            bench.say(f"  {done} of {steps} steps")

    @torch.no_grad()
    def sample() -> None:
        flow.solve(velocity, latents, times, settings.solver, progress)

    took: list[float] = []
    peak = _peak(lambda: took.append(milliseconds(sample, bench.device)), bench.device)
    bench.results.add(
        bench.row(
            "sampling", took[0], gib=peak or None, steps=settings.steps, guidance=settings.guidance,
            passes="one of batch 2" if together else "two of batch 1", seconds=took[0] / 1e3,
        )
    )  # fmt: skip


def bench_variants(bench: ModelBench, model: LinGen, variants: Sequence[tuple[Variant, LinGenConfig]]) -> None:
    """The paper's latency table: each variant in the same rounds as the default one."""
    inputs = bench.inputs()
    for variant, config in variants:
        bench.say(f"variant: {variant.name}")
        other = replace(bench, config=config).make() if variant.overrides else model
        works = {"default": forward(model, inputs), "variant": forward(other, inputs)}
        times = {name: statistics.median(own) for name, own in interleaved(works, bench.device, bench.budget).items()}
        bench.results.add(
            bench.row(
                "variant", times["variant"], variant=variant.name, default_ms=times["default"],
                seconds_per_100=times["variant"] * FORWARDS / 1e3, paper_seconds=variant.paper_seconds,
            )
        )  # fmt: skip
        del other, works
        free(bench.device)


def bench_quality(bench: ModelBench) -> None:
    """How far the denoiser in 8 bits is from its twin in 16, with random weights: each layer, and the velocity."""
    bench.say("quality of 8-bit products")
    plain = denoiser(bench.config, bench.device, bench.dtype)
    low = copy.deepcopy(plain)
    names = to_fp8(low)
    if not names:
        bench.say("  no layer is wide enough to multiply in 8 bits")
        return
    found = quality(plain, low, *bench.inputs())
    worst = max(found.layers, key=lambda name: found.layers[name])
    bench.results.add(
        bench.row(
            "fp8 quality", None, dtype=FP8, layers=len(names), cosine=found.cosine, error=found.error,
            worst_layer=worst, worst_layer_error=found.layers[worst], weights="random",
        )
    )  # fmt: skip


def free(device: torch.device) -> None:
    """Gives back the memory of what was just dropped."""
    gc.collect()
    if allocated(device):
        torch.cuda.empty_cache()
