"""A dry run of a training step: the real module, sharding, kernels and optimiser of one rank, on tensors without
numbers and among ranks that are not there. What it allocates is the memory that the step takes on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lingen.autoencoder.perceptual import NoDistance, Trunk, VGG16Distance
from lingen.frozen import is_trained
from lingen.kernels.choice import memory_here, unlaunched
from lingen.plan.forecast import Plan, largest_batch, rough_memory, stage_grids, text_tokens
from lingen.plan.memory_tracker import MemoryTracker, part_here
from lingen.plan.practice import build_optimizer
from lingen.plan.trial import denoiser_on_meta
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import Recipe, Triple
from lingen.recipe.sizes import ranks_of
from lingen.training.autoencoder import AutoencoderModule
from lingen.training.average import AveragedWeights
from lingen.training.base import Trained
from lingen.training.denoiser import LinGenModule
from lingen.training.strategy import Sharded, strategy_of

TRUE_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}
"""First half of a precision that ends in `-true`."""


SHALLOW = 3
"""Cycles of blocks of the shallower one of two models."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank in training."""

    weights: int
    """What is trained."""
    gradients: int
    optimizer: int
    average: int
    activations: int
    """Kept for the backward pass and made in it, when forward and backward take most."""
    buffers: int
    """Frozen parts; and what is gathered and reduced then, the optimiser's work space, or what a clip or a validation
    takes, whichever is most."""
    peak: int
    """The most at one time; less than the sum of the others, since gradients come as activations go."""


def step_memory(recipe: Recipe, nodes: int = 1, each: int = 1, rank: int = 0) -> Memory:
    """The memory of a rank that trains a loaded stage with its largest batch, `each` ranks on so many nodes.

    Blocks are alike, and each takes as much as the next: of a deep model two shallow ones are run, and what their
    difference takes is added for each of the blocks that are left out.

    Raises:
        RecipeError: a part, a third party's mixer say, does not run without numbers; or this process is one of several
            ranks, and cannot be another."""
    depths = _depths(recipe) if recipe.subject.encoded else [0]
    found = []
    for depth in depths:
        shallow = dataclasses.replace(recipe.model, depth=depth) if depth else recipe.model
        try:
            found.append(_dry_run(dataclasses.replace(recipe, model=shallow), nodes, each, rank))
        except Exception as error:  # a third party's part may fail in any way
            told = f"a step cannot be tried without numbers ({type(error).__name__}: {' '.join(str(error).split())})"
            raise RecipeError(f"stage {recipe.stage or 'main'}: {told}.") from error
    times = (recipe.model.depth - depths[0]) // (depths[-1] - depths[0]) if len(depths) > 1 else 0
    took = {name: size + times * (found[-1][name] - size) for name, size in found[0].items()}
    phase = max(("forward", "backward"), key=lambda one: took[one])
    work = max(took["work"], took["clips"])
    lasting = {kind: took[kind] for kind in ("weights", "gradients", "optimizer", "average")}
    return Memory(
        **lasting,
        activations=took[f"{phase} activations"],
        buffers=took["frozen"] + took["copies"] + max(took[f"{phase} gathered"], work),
        peak=took["copies"] + max(took[phase], sum(lasting.values()) + took["frozen"] + work),
    )


def _depths(recipe: Recipe) -> list[int]:
    """The depths of the dry run: two that differ by a cycle of mixers, or all of it, where blocks are not alike."""
    config = recipe.model
    cycle = len(config.mixer) if isinstance(config.mixer, list) else 1
    least = SHALLOW * cycle + config.depth % cycle
    blocks = list(cast(Any, denoiser_on_meta(recipe)).blocks)
    shapes = [[tuple(parameter.shape) for parameter in block.parameters()] for block in blocks]
    is_alike = shapes[cycle:] == shapes[:-cycle] and isinstance(config.checkpointing, bool)
    return [least, least + cycle] if is_alike and config.depth > least + cycle else [config.depth]


def _dry_run(recipe: Recipe, nodes: int, each: int, rank: int) -> dict[str, int]:
    """Bytes that a step takes, by what for and when."""
    strategy = strategy_of(recipe)
    with ExitStack() as held:
        mesh = None
        if isinstance(strategy, Sharded):
            held.enter_context(_absent_ranks(nodes * each, rank))
            mesh = strategy.mesh("cpu", nodes, each)
        with torch.device("meta"):
            module: Trained = recipe.subject.build_module(recipe)
            if isinstance(module, AutoencoderModule) and not isinstance(module.perceptual, NoDistance):
                module.perceptual = VGG16Distance()  # others have its network, too; its weights are not read
                module.perceptual.trunk = Trunk(ceil=True).requires_grad_(False)
        if (precision := str(recipe.trainer.get("precision"))).endswith("-true"):
            module.to(TRUE_DTYPES[precision.removesuffix("-true")])
        if isinstance(strategy, Sharded) and mesh is not None:
            module.shard(mesh, torch.device("meta"), strategy.low)
        held.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        tracker = held.enter_context(MemoryTracker())
        module.to_empty(device="cpu")  # which stands for a GPU
        took = _steps(module, tracker, is_alone=strategy == "auto" and nodes * each == 1)
    return took | {"copies": took["gradients"] if mesh is None and nodes * each > 1 else 0}  # DDP's, to be reduced


def too_large(recipe: Recipe, forecast: Plan) -> str | None:
    """A sentence where a rank's training takes more memory than the GPU here has, by the dry run, or a denoiser's on a
    CPU more than this machine has, by a rule of thumb. None where it fits, and where this is one of several ranks
    already: `lingen plan` and the preflight look at those."""
    on_gpu = torch.cuda.is_available() and recipe.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    there = memory_here(torch.device("cuda", 0) if on_gpu else None)
    rough = rough_memory(recipe, forecast) if recipe.subject.encoded else None
    if dist.is_initialized() or (rough is None and not on_gpu):
        return None
    needed = rough or 0
    if on_gpu and (rough is None or 2 * rough > there):  # else a dry run is not worth its seconds
        nodes = int(recipe.trainer.get("num_nodes", 1))
        try:
            needed = step_memory(recipe, nodes, ranks_of(recipe, torch.cuda.device_count()) // nodes).peak
        except RecipeError:
            return None
    if needed <= there:
        return None
    batch = recipe.data.batch
    return (
        f"stage {recipe.stage or 'main'}: training takes about {needed / 2**30:.3g} GiB, more than the "
        f"{there / 2**30:.3g} GiB of {'the GPU' if on_gpu else 'this machine'}; lower data.batch ({batch.image} "
        f"images, {batch.video} videos) and raise train.accumulate instead, or see which switch `lingen plan` names."
    )


def _steps(module: Trained, tracker: MemoryTracker, is_alone: bool) -> dict[str, int]:
    """A step as any but the first: with moments."""
    on_cpu = module.recipe.trainer.get("accelerator") == "cpu"
    trained = module.trained_parameters()
    average = AveragedWeights({name: part_here(one) for name, one in trained.items()}, module.recipe.train.ema)
    optimizer = _optimizer_here(module, on_cpu, is_alone)
    optimizer.step()
    optimizer.zero_grad()  # as `Trained.optimizer_step` does
    kept = [pair for state in optimizer.state.values() for pair in state.items()]
    moments = [value for name, value in kept if name != "step" and isinstance(value, Tensor)]
    flat = [one for group in optimizer.param_groups for one in group["params"]]
    lasting = tracker.numbers([*module.parameters(), *module.buffers(), *moments, *average.weights().values()])
    tracker.forget(flat)  # the weights stand there already
    moments_here = {}

    tracker.restart()
    with nullcontext() if on_cpu else unlaunched():
        with _autocast(module.recipe):
            kind, grid = largest_batch(module.recipe)
            rows = int(getattr(module.recipe.data.batch, kind))
            if isinstance(module, LinGenModule):
                loss = _loss_of_velocity(module, rows, grid)
            else:
                loss = _loss_of_reconstruction(cast(AutoencoderModule, module), rows, kind)
        moments_here["forward"] = tracker.most, tracker.at_most
        tracker.restart()
        loss.backward()
    moments_here["backward"] = tracker.most, tracker.at_most
    gradients = [one.grad for one in trained.values()]
    lasting |= tracker.numbers([*gradients, *module.parameters()])  # rows that FSDP has filled up lie elsewhere
    took = {
        "weights": _bytes(trained.values()),
        "gradients": _bytes(gradients),
        "optimizer": _bytes(moments),
        "average": _bytes(average.weights().values()),
        "frozen": _bytes([*(one for one in module.parameters() if not one.requires_grad), *module.buffers()]),
    }
    for phase, (most, held) in moments_here.items():
        passing = {number: size for number, size in held.items() if number not in lasting}
        gathered = sum(size for number, size in passing.items() if number in tracker.buffers)
        took |= {phase: most, f"{phase} gathered": gathered}
        took[f"{phase} activations"] = sum(passing.values()) - gathered

    for one in flat:
        one.grad = torch.empty_like(one)
    tracker.restart()
    before = tracker.total
    optimizer.step()
    took["work"] = tracker.most - before
    del loss, gradients
    return took | {"clips": _clips(module, tracker, on_cpu)}


def _clips(module: Trained, tracker: MemoryTracker, on_cpu: bool) -> int:
    """Bytes beside what lasts while a clip is sampled, of which guidance makes two, or a batch is validated: the
    weights for which the averaged ones stand in, and a pass without gradients."""
    recipe = module.recipe
    samples = 2 * bool(recipe.sample.prompts or recipe.score.clips or recipe.train.evaluate_every)
    validated = recipe.data.validation.image or recipe.data.validation.video
    if not isinstance(module, LinGenModule) or not (samples or validated):
        return 0
    grids = stage_grids(recipe)
    tracker.restart()
    before = tracker.total
    with torch.no_grad(), nullcontext() if on_cpu else unlaunched(), _autocast(recipe):
        for kind, grid in grids.items():
            rows = int(getattr(recipe.data.batch, kind)) if validated else samples
            _loss_of_velocity(module, max(rows, samples), grid)
    return tracker.most - before + _bytes(module.trained_parameters().values())


def _optimizer_here(module: Trained, on_cpu: bool, is_alone: bool) -> torch.optim.Optimizer:
    """The recipe's optimiser over what this rank holds, with gradients; AdamW, which does not look at shapes, over as
    many numbers of each group, and as one kernel where `fused_here` makes it one: that needs no memory of its own."""
    settings, groups = module.recipe.train, []
    is_adamw = settings.optimizer["name"] == "adamw"
    for group in module.parameter_groups():
        held = [part_here(parameter) for parameter in group["params"]]
        if is_adamw:
            types = {one.dtype for one in held}
            held = [torch.cat([one.flatten() for one in held if one.dtype == dtype]) for dtype in types]
        own = [nn.Parameter(torch.empty_like(one)) for one in held]
        for one in own:
            one.grad = torch.empty_like(one)
        groups.append({**group, "params": own})
    if not is_adamw:
        return build_optimizer(settings, groups)
    fused = is_alone and not on_cpu and module.recipe.trainer.get("precision") != "16-mixed"
    return torch.optim.AdamW(groups, foreach=not (on_cpu or fused), fused=fused)


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    """Of what this rank holds of them."""
    return sum(part_here(one).nbytes for one in tensors if one is not None)


def _autocast(recipe: Recipe) -> AbstractContextManager[Any]:
    precision = str(recipe.trainer.get("precision"))
    low = torch.float16 if precision.startswith("16") else torch.bfloat16
    return torch.autocast("cpu", low) if precision.endswith("-mixed") or precision == "bf16" else nullcontext()


@contextmanager
def _absent_ranks(ranks: int, rank: int) -> Iterator[None]:
    """In the block this process is one of several ranks, of which the others answer at once and say nothing."""
    if dist.is_initialized():
        raise RuntimeError("One of several ranks cannot dry-run the step of another.")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # makes the backend "fake" known

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _loss_of_velocity(module: LinGenModule, rows: int, grid: Triple) -> Tensor:
    config = module.recipe.model
    size = [tokens * patch for tokens, patch in zip(grid, config.patch, strict=True)]
    latents, noise = (torch.empty(rows, config.channels, *size) for _ in range(2))
    text = []
    for number, (encoder, tokens) in enumerate(zip(module.text, text_tokens(module.recipe), strict=True)):
        if is_trained(encoder):
            text.append(module.encode_with(number, ["word " * tokens] * rows, module.recipe.data.fps))
        else:
            text.append((torch.empty(rows, tokens, config.text_dims[number]), torch.ones(rows, tokens).bool()))
    return module.losses_of(latents, noise, torch.empty(rows), tuple(text), module.loss).mean()


def _loss_of_reconstruction(module: AutoencoderModule, rows: int, kind: str) -> Tensor:
    data = module.recipe.data
    clips = torch.empty(rows, 3, 1 if kind == "image" else data.frames, *data.size)
    mean, logvar = module.posterior(clips)
    video = module.reconstruct(mean + (0.5 * logvar).exp() * torch.empty_like(mean), clips.shape[2])
    terms = {"kl": mean.sum(), "outlier": logvar.sum()}
    value, pull = module.compare(video, clips, torch.empty(rows), module.recipe.train.steps, terms)
    critic = module.criticise(video, clips, module.recipe.train.steps, terms)
    loss = value + (video * pull).sum() + sum(terms[name] for name in ("kl", "outlier"))
    return loss if critic is None else loss + critic
