"""``lingen bench model``: the whole denoiser with random weights. 100 forwards, memory, parts, a real sampling, the
paper's table."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingen import flow
from lingen.kernels.fp8 import Fp8Linear, to_fp8
from lingen.model import LinGen, Text
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import AUTOENCODERS
from lingen.recipe.sections import LinGenConfig, Recipe, Triple
from lingen.recipe.sizes import grids_of

from .build import denoiser, name_of, sample_inputs, tflop_of
from .paper import FORWARDS, VARIANTS
from .parts import milliseconds_by_part
from .place import FP8, Place, dtype_name
from .results import Fields, Results
from .timing import Cost, costs, forward_work, free


@dataclass(frozen=True)
class ModelBench:
    """One denoiser on one grid, batch 1: what the measurements below share."""

    config: LinGenConfig
    grid: Triple
    place: Place
    fp8: bool
    results: Results

    @property
    def mixer(self) -> str:
        """The mixer's name, or those of a hybrid."""
        mixers = self.config.mixer if isinstance(self.config.mixer, list) else [self.config.mixer]
        return "+".join(map(name_of, mixers))

    @property
    def tflop(self) -> float:
        """Of a forward."""
        return tflop_of(self.config, self.grid, self.place)

    def make(self) -> LinGen:
        """The denoiser, its large products in 8 bits where that is asked for."""
        model = denoiser(self.config, self.place)
        if self.fp8:
            to_fp8(model)
        return model

    def inputs(self, batch: int = 1) -> tuple[Tensor, Tensor, Text]:
        return sample_inputs(self.config, self.grid, self.place.device, batch)

    def add(self, name: str, ms: float | None, **more: object) -> Fields:
        """A row of the result file; `more` wins."""
        dtype = FP8 if self.fp8 else dtype_name(self.place.dtype)
        own = {"name": name, "mixer": self.mixer, "kernel": "auto", "dtype": dtype, "tokens": math.prod(self.grid)}
        own |= {"ms": ms, "grid": list(self.grid), "dim": self.config.dim, "depth": self.config.depth}
        return self.results.add(own | more)

    def add_forward(self, cost: Cost, batch: int = 1, **more: object) -> Fields:
        """A row named `forward`, with the seconds that 100 of them take for each clip."""
        seconds, tflop = cost.ms / batch * FORWARDS / 1e3, batch * self.tflop
        own = {"gib": cost.gib, "tflop": tflop, "batch": batch, "runs": cost.runs, "seconds_per_100": seconds}
        return self.add("forward", cost.ms, **own | more)


def bench_model(
    recipe: Recipe,
    grids: Sequence[Triple],
    place: Place,
    results: Results,
    *,
    fp8: bool = False,
    twins: Callable[[ModelBench, LinGen, float | None], None] | None = None,
    run50: bool = False,
    variants: Sequence[LinGenConfig] = (),
    fp8_quality: bool = False,
) -> None:
    """Everything that is asked for, one grid after the other, into one result file: what is compared is of one run.

    Args:
        fp8: whether the large products are in 8 bits.
        twins: measures others in the same rounds; takes this bench, LinGen, and the GiB of its forward.
        run50: one real sampling.
        variants: those of the paper's latency table, in the order of `VARIANTS`.
        fp8_quality: how far 8-bit products are from 16 bits.
    """
    bench = ModelBench(recipe.model, grids[0], place, fp8, results)
    results.say(f"building {bench.mixer}: width {recipe.model.dim}, {recipe.model.depth} layers")
    model = bench.make()
    for grid in grids:
        one = replace(bench, grid=grid)
        forwards = bench_forward(one, model)
        if twins is not None:
            twins(one, model, forwards[1].get("gib"))
            free(place.device)
        if run50:
            bench_sampling(one, model, recipe, forwards)
        bench_variants(one, model, variants)
        if fp8_quality:
            bench_quality(one)
            free(place.device)


def video_grid(recipe: Recipe) -> Triple:
    """Tokens of the stage's clips. RecipeError for a recipe whose stages differ."""
    if recipe.stages:
        raise RecipeError(f"Name the size: --grid 34x32x32, or --stage with one of {', '.join(recipe.stages)}.")
    with torch.device("meta"):
        strides = tuple(AUTOENCODERS.build(recipe.autoencoder).strides)
    grids = grids_of(recipe.data, strides, recipe.model.patch)
    return grids.get("video") or next(iter(grids.values()))


def bench_forward(bench: ModelBench, model: LinGen) -> dict[int, Fields]:
    """Rows of the forward at batch 1 and 2 (guidance in one pass), and of its parts. Returns batch -> its row."""
    tokens = math.prod(bench.grid)
    bench.results.say(f"{bench.mixer}, {bench.config.depth} layers, {tokens:,} tokens: first forward")
    with torch.no_grad():
        finite = bool(model(*bench.inputs()).isfinite().all())
    works = {str(batch): forward_work(model, bench.inputs(batch)) for batch in (1, 2)}
    found = costs(works, bench.place, cold=["1"])
    rows = {int(batch): bench.add_forward(cost, int(batch), finite=finite) for batch, cost in found.items()}
    parts = milliseconds_by_part(works["1"], bench.place.device)
    for part, took in parts.items():
        bench.add("part", took, part=part, share=took / sum(parts.values()))
    return rows


def bench_sampling(bench: ModelBench, model: LinGen, recipe: Recipe, forwards: dict[int, Fields]) -> None:
    """One real sampling with guidance, in the faster of two ways: one pass of batch 2, or two of batch 1."""
    settings = recipe.sample
    times = flow.Times(recipe.time, math.prod(bench.grid)).schedule(settings).to(bench.place.device)
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
            bench.results.say(f"  {done} of {steps} steps")

    @torch.no_grad()
    def sample() -> None:
        flow.solve(velocity, latents, times, settings.solver, progress)

    cost = costs({"sampling": sample}, bench.place._replace(budget=0), cold=["sampling"])["sampling"]
    passes = "one of batch 2" if together else "two of batch 1"
    about = {"steps": settings.steps, "guidance": settings.guidance, "passes": passes, "seconds": cost.ms / 1e3}
    bench.add("sampling", cost.ms, gib=cost.gib, **about)


def bench_variants(bench: ModelBench, model: LinGen, configs: Sequence[LinGenConfig]) -> None:
    """The paper's latency table: each variant in the same rounds as the default one; nothing without configs."""
    for variant, config in zip(VARIANTS, configs, strict=False):
        bench.results.say(f"variant: {variant.name}")
        other = replace(bench, config=config).make() if variant.overrides else model
        works = {"default": forward_work(model, bench.inputs()), "variant": forward_work(other, bench.inputs())}
        ms = {name: cost.ms for name, cost in costs(works, bench.place).items()}
        seconds = {"seconds_per_100": ms["variant"] * FORWARDS / 1e3, "paper_seconds": variant.paper_seconds}
        bench.add("variant", ms["variant"], variant=variant.name, default_ms=ms["default"], **seconds)
        del other, works
        free(bench.place.device)


def bench_quality(bench: ModelBench) -> None:
    """How far the denoiser in 8 bits is from its twin in 16, with random weights: each layer, and the velocity."""
    bench.results.say("quality of 8-bit products")
    plain = denoiser(bench.config, bench.place)
    low = copy.deepcopy(plain)
    names = to_fp8(low)
    if not names:
        bench.results.say("  no layer is wide enough to multiply in 8 bits")
        return
    layers, error, cosine = quality(plain, low, *bench.inputs())
    worst = max(layers, key=lambda name: layers[name])
    errors = {"error": error, "worst_layer": worst, "worst_layer_error": layers[worst]}
    bench.add("fp8 quality", None, dtype=FP8, layers=len(names), cosine=cosine, **errors, weights="random")


@torch.no_grad()
def quality(plain: nn.Module, low: nn.Module, *inputs: object) -> tuple[dict[str, float], float, float]:
    """How far `low`, which is `plain` after `to_fp8`, is from it on these inputs: the relative RMS error of each
    layer's output on what the plain model gives it, that of the model's output, and the cosine of both outputs."""
    twins = {name: layer for name, layer in low.named_modules() if isinstance(layer, Fp8Linear)}
    layers: dict[str, float] = {}

    def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def compare(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            layers[name] = _relative(twins[name](*arguments), output)

        return layer.register_forward_hook(compare)

    handles = [watch(name, layer) for name, layer in plain.named_modules() if name in twins]
    try:
        want, got = plain(*inputs).double(), low(*inputs).double()
    finally:
        for handle in handles:
            handle.remove()
    return layers, _relative(got, want), F.cosine_similarity(got.flatten(), want.flatten(), 0).item()


def _relative(got: Tensor, want: Tensor) -> float:
    error = (got.double() - want.double()).square().mean()
    return (error / want.double().square().mean().clamp(min=1e-24)).sqrt().item()
