"""The DiT twin of equal size: the same denoiser with full attention, in the same rounds as ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lingen.kernels.attention import ATTENTION_KERNELS
from lingen.model import LinGen
from lingen.recipe.sections import LinGenConfig

from .build import denoiser
from .model import ModelBench
from .plain import PlainDenoiser, blocks_of, run_block
from .targets import CUDNN, FLASH2
from .timing import Work, costs, forward_work

DIT_DEPTH = 38 / 28
"""Layers of a DiT for one of LinGen's, at equal parameters [ours]."""

LONG_TFLOP = 3000
"""A forward of more than this runs once, after one of its blocks has been warmed up."""

STOCK_MIXERS = ("mate", "mamba2", "temporal_swin")
"""Those that can be wired from stock parts."""


class Twin(NamedTuple):
    """A denoiser to time: its whole forward, a few of its blocks to warm up with, and what it is."""

    work: Work
    warm: Work
    config: LinGenConfig


def bench_twins(
    bench: ModelBench, model: LinGen, gib: float | None, depth: int | None = None, only: Sequence[str] = ()
) -> None:
    """Rows named `forward` of the twins, and of LinGen in the same rounds.

    Args:
        model: LinGen's.
        gib: what its forward takes, for its row.
        depth: of the DiT; by default 38 / 28 of LinGen's.
        only: words, one of which the names of the twins to run hold (``cudnn``, ``flash``, ``stock``, ``best``).
    """
    layers = depth or round(bench.config.depth * DIT_DEPTH)
    config = replace(bench.config, mixer={"name": "attention"}, depth=layers)
    bench.results.say(f"the DiT twin, {config.depth} layers")
    torch.compiler.reset()  # what was compiled for another grid would count as a recompilation, of which few are let be
    dit = denoiser(config, bench.place)
    twins = {
        name: twin
        for name, twin in stock_twins(bench, model, dit, config).items()
        if _holds(only, name) and _runs(bench, name, twin)
    }
    if _holds(only, "best"):
        name, work = best_kernel(bench, dit)
        twins[name] = Twin(work, work, config)
    bench.results.say("  all of them, in rounds")
    ours = forward_work(model, bench.inputs())
    everyone = {"": Twin(ours, ours, bench.config)} | twins
    benches = {name: replace(bench, config=twin.config, fp8=bench.fp8 and not name) for name, twin in everyone.items()}
    long = {name for name in twins if benches[name].tflop > LONG_TFLOP}
    works = {name: twin.work for name, twin in everyone.items()}
    for name, cost in costs(works, bench.place, cold=long).items():
        # All of them lie in memory: what one takes was measured alone, or not at all.
        own = {"kernel": name, "gib": None} if name else {"gib": gib}
        benches[name].add_forward(cost, rounds="with twins", **own)


def _runs(bench: ModelBench, name: str, twin: Twin) -> bool:
    """Warms a twin up. One that cannot run here is left out, and said so: the others are worth their time."""
    bench.results.say(f"  {name}: one block")
    try:
        twin.warm()
    except Exception as why_not:  # compilers fail in many ways
        bench.results.say(f"  {name} is left out: {type(why_not).__name__}: {str(why_not)[:300]}")
        return False
    return True


def _holds(words: Sequence[str], name: str) -> bool:
    return not words or any(word in name for word in words)


def stock_twins(bench: ModelBench, model: LinGen, dit: LinGen, config: LinGenConfig) -> dict[str, Twin]:
    """On CUDA the DiT with cuDNN's attention, compiled; with FlashAttention-2, eager; LinGen of stock parts, compiled.

    On a CPU the eager ones, with whatever attention torch has there. 8-bit weights have no stock twin.
    """
    inputs, plain = bench.inputs(), PlainDenoiser(dit)
    stock = None if bench.fp8 or bench.mixer not in STOCK_MIXERS else PlainDenoiser(model)
    if not bench.place.cuda:
        eager = {"sdpa, eager": Twin(*_pair(plain, inputs, 1), config)}
        return eager if stock is None else eager | {"stock, eager": Twin(*_pair(stock, inputs, 1), bench.config)}
    # One compiled function for all blocks of a model: they differ in their weights only, LinGen's also in order, shift.
    compiled = PlainDenoiser(dit, torch.compile(run_block, dynamic=False))
    twins = {
        CUDNN: Twin(*_pair(compiled, inputs, 1, SDPBackend.CUDNN_ATTENTION), config),
        FLASH2: Twin(*_pair(plain, inputs, 1, SDPBackend.FLASH_ATTENTION), config),
    }
    if stock is not None:
        stock.run = torch.compile(run_block, dynamic=False)
        twins["stock, compiled"] = Twin(*_pair(stock, inputs, 4), bench.config)
    return twins


def _pair(
    model: PlainDenoiser, inputs: tuple[Any, ...], warm_blocks: int, backend: SDPBackend | None = None
) -> tuple[Work, Work]:
    """The whole forward and that of a few blocks, with an SDPA backend where one is asked for."""

    def limited(work: Work) -> Work:
        # The attention to the text has a mask, which not every backend takes: the others are there for it.
        order = [backend, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH] if backend else []

        def run() -> None:
            if not order:
                work()
                return
            with sdpa_kernel(order, set_priority=True):
                work()

        return run

    def few() -> None:
        with blocks_of(model, list(model.blocks)[:warm_blocks]):
            forward_work(model, inputs)()

    return limited(forward_work(model, inputs)), limited(few)


def best_kernel(bench: ModelBench, twin: LinGen) -> tuple[str, Work]:
    """Our blocks with the attention kernel that is fastest in one of them, by its name: ``best: flash, eager``."""
    inputs = bench.inputs()

    def with_kernel(kernel: str, work: Callable[[], object]) -> None:
        for block in twin.blocks:
            block.mixer.kernel = kernel  # type: ignore[union-attr, assignment]
        work()

    def one_block(kernel: str) -> None:
        with blocks_of(twin, list(twin.blocks)[:1]):
            with_kernel(kernel, forward_work(twin, inputs))

    usable = {}
    for kernel in ATTENTION_KERNELS if bench.place.cuda else ("sdpa",):  # which there stands for all of them
        try:
            one_block(kernel)
        except (ValueError, RuntimeError, ImportError) as why_not:
            bench.results.say(f"  attention kernel {kernel}: {str(why_not).splitlines()[0]}")
            continue
        usable[kernel] = partial(one_block, kernel)
    ms = {kernel: cost.ms for kernel, cost in costs(usable, bench.place._replace(budget=0.2)).items()}
    bench.results.say("  one block: " + ", ".join(f"{kernel} {one:.1f} ms" for kernel, one in ms.items()))
    fastest = min(ms, key=lambda kernel: ms[kernel])
    return f"best: {fastest}, eager", partial(with_kernel, fastest, forward_work(twin, inputs))
