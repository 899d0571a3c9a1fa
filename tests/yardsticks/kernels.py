"""``lingen bench kernels``: each kernel against its twins and its roofline, and how exact it is."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lingen.kernels.choice import interpreted
from lingen.kernels.ssd import chunk_scan
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import Triple

from .build import compiled
from .cases import CASES, Case, Inputs, LayerSizes
from .place import Place, dtype_name
from .results import Fields, Results, Say
from .timing import Work, costs, forward_work

ODD_GRID: Triple = (9, 7, 5)
"""The grid on which errors are measured: no size is a power of two, and windows and the last chunk are not full."""
READY_LIMIT = 90.0
"""Seconds after which a twin is left out if it has not run once, forward and backward, compilation included."""


def ceilings(place: Place) -> Fields:
    """What this machine reaches: TFLOP/s of a square matrix product, GB/s of a copy, read and written bytes counted."""
    size = 8192 if place.cuda else 512
    make = partial(torch.randn, device=place.device, dtype=place.dtype)
    a, b = make(size, size), make(size, size)
    big = make(8 * size, size)  # 1 GiB in 16 bits
    other = torch.empty_like(big)
    found = costs({"product": lambda: a @ b, "copy": lambda: other.copy_(big)}, place)
    tflops, gb = 2e-9 * size**3 / found["product"].ms, 2e-6 * big.nbytes / found["copy"].ms
    return {"name": "ceilings", "dtype": dtype_name(place.dtype), "tflops": tflops, "gb_per_s": gb}


def check_names(names: Sequence[str]) -> None:
    """RecipeError for an operation that does not exist."""
    known = [case.name for case in CASES]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RecipeError(f"There is no operation called '{unknown[0]}'. Known: {', '.join(known)}.")


def bench_kernels(grids: Sequence[Triple], dim: int, place: Place, results: Results, only: Sequence[str] = ()) -> None:
    """A row for each case, twin and grid.

    Args:
        only: names of cases; by default all.
    """
    top = results.add(ceilings(place))
    for case in CASES:
        if only and case.name not in only:
            continue
        results.say(f"{case.name}: errors of {', '.join(case.twins)}")
        found = {twin: errors(case, twin, dim, place, results.say) for twin in case.twins}
        accurate = {twin: row for twin, row in found.items() if row is not None}
        for grid in grids if accurate else ():
            torch.compiler.reset()  # torch.compile allows only few recompilations of a function
            for twin, row in _times(case, list(accurate), sizes_of(grid, dim), top, place, results.say):
                results.add(row | accurate[twin])


def sizes_of(grid: Triple, dim: int) -> LayerSizes:
    """Of LinGen-4B, or smaller ones where the layer is narrower than a state."""
    return LayerSizes(grid, dim) if dim >= 256 else LayerSizes(grid, dim, state_dim=16, head_dim=16, text=24)


def made(case: Case, sizes: LayerSizes, place: Place) -> Inputs:
    torch.manual_seed(0)
    normal = partial(torch.randn, device=place.device, dtype=place.dtype)
    # A slice of a wider tensor stays one: detached, it is a leaf with the strides of the slice.
    return {name: u.detach().requires_grad_(u.is_floating_point()) for name, u in case.make(sizes, normal).items()}


def _wanting(inputs: Inputs) -> Inputs:
    """The inputs that get gradients."""
    return {name: u for name, u in inputs.items() if u.requires_grad}


def _times(
    case: Case, twins: Sequence[str], sizes: LayerSizes, top: Fields, place: Place, say: Say
) -> list[tuple[str, Fields]]:
    """Times of all twins in the same rounds, and the least possible time: every input read and every output written
    once, or all matrix products at the measured peak; in the backward pass gradients are read and written, too."""
    inputs = made(case, sizes, place)
    with torch.no_grad():
        outputs = _several(case.call(inputs, sizes, twins[0]))
    seeds = [torch.randn_like(one) for one in outputs]
    runs = {twin: _run(case, twin, sizes, place) for twin in twins}
    works = {twin: (forward_work(run, [inputs]), _backward(run, inputs, seeds)) for twin, run in runs.items()}
    able = [twin for twin in twins if is_ready(f"{case.name}, {sizes.n} tokens: {twin}", works[twin], say)]
    alone, both = (costs({twin: works[twin][i] for twin in able}, place) for i in (0, 1))
    read, changed, written = (sum(u.nbytes for u in us) for us in (inputs.values(), _wanting(inputs).values(), outputs))
    tflop = case.flops(sizes) / 1e12
    floors = [
        max(count / top["gb_per_s"] / 1e6, 1e3 * work / top["tflops"])
        for count, work in ((read + written, tflop), (read + changed + written, case.backward * tflop))
    ]
    about = {
        "name": case.name, "dtype": dtype_name(place.dtype), "tokens": sizes.n, "tflop": tflop,
        "gb": (read + written) / 1e9, "floor_ms": floors[0], "backward_floor_ms": floors[1], "grid": list(sizes.grid),
        "dim": sizes.dim,
    }  # fmt: skip
    rows = []
    for twin in (twin for twin in able if twin in alone and twin in both):
        kernel, ms = f"{twin}, compiled" if _is_compiled(twin, place) else twin, alone[twin].ms
        own = {"kernel": kernel, "ms": ms, "of_roofline": floors[0] / ms, "backward_ms": max(both[twin].ms - ms, 0.0)}
        rows.append((twin, about | own))
    return rows


def _several(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def is_ready(name: str, works: Sequence[Work], say: Say, limit: float = READY_LIMIT) -> bool:
    """Runs each once. A twin that cannot run, or takes too long to compile, is left out with a message, so that the
    others are measured."""
    start = time.perf_counter()
    try:
        with _at_most(limit):
            for work in works:
                work()
    except Exception as why_not:  # compilers fail in many ways, and a plain twin may want more memory than there is
        say(f"{name} is left out: {type(why_not).__name__}: {str(why_not)[:200]}")
        return False
    say(f"{name} is ready after {time.perf_counter() - start:.1f} s")
    return True


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """TimeoutError inside a block that takes longer, on systems with SIGALRM."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: object) -> None:
        raise TimeoutError(f"it was not ready after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _is_compiled(twin: str, place: Place) -> bool:
    """Plain twins are compiled on CUDA, but for the scan's, whose graph takes a compiler five times as long."""
    return twin in ("reference", "sdpa") and place.cuda


def _run(case: Case, twin: str, sizes: LayerSizes, place: Place) -> Any:
    """inputs -> outputs with one twin."""

    def run(inputs: Inputs) -> Any:
        return case.call(inputs, sizes, twin)

    return compiled(run) if _is_compiled(twin, place) else run


def _backward(run: Any, inputs: Inputs, seeds: Sequence[Tensor]) -> Work:
    wanted = list(_wanting(inputs).values())

    def work() -> None:
        torch.autograd.grad(_several(run(inputs)), wanted, seeds, allow_unused=True)

    return work


def errors(case: Case, twin: str, dim: int, place: Place, say: Say) -> Fields | None:
    """Relative RMS against float64 on an odd grid, of the outputs and of each gradient; None where it cannot run."""
    if twin == "triton" and not place.cuda and not interpreted():
        say(f"{case.name}: triton runs on CUDA, not on {place.device}")
        return None
    sizes = sizes_of(ODD_GRID, dim)
    inputs = made(case, sizes, place)
    exact = inputs | {name: u.detach().double().requires_grad_() for name, u in _wanting(inputs).items()}
    try:
        if twin == "stock":
            chunk_scan()
        got = _gradients(case, twin, inputs, sizes)
    except (ValueError, ImportError) as why_not:
        say(f"{case.name}: {twin} is left out: {str(why_not).splitlines()[0]}")
        return None
    want = _gradients(case, case.exact, exact, sizes)
    off = {name: _relative(got[name], want[name]) for name in want}
    outputs = [off.pop(name) for name in list(off) if name.startswith("output")]
    return {"error": max(outputs), "gradient_errors": off, "error_grid": list(ODD_GRID)}


def _gradients(case: Case, twin: str, inputs: Inputs, sizes: LayerSizes) -> dict[str, Tensor]:
    """Outputs, and gradients by the inputs' names, for seeds that are the same in every precision."""
    outputs = _several(case.call(inputs, sizes, twin))
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(one.shape, generator=generator).bfloat16().to(one.device, one.dtype) for one in outputs]
    wanting = _wanting(inputs)
    gradients = torch.autograd.grad(outputs, list(wanting.values()), seeds)
    return {f"output {i}": one for i, one in enumerate(outputs)} | dict(zip(wanting, gradients, strict=True))


def _relative(got: Tensor, want: Tensor) -> float:
    error = (got.double() - want.double()).square().mean().sqrt()
    return (error / want.double().square().mean().sqrt().clamp(min=1e-12)).item()
