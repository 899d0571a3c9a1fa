"""Each kernel against its twins and against its roofline, forward and backward, and how exact it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lingen.bench.branches import Place
from lingen.bench.build import dtype_name
from lingen.bench.cases import CASES, Case, Inputs, Sizes
from lingen.bench.flops import Grid
from lingen.bench.results import Results, Row, Say
from lingen.bench.stock import chunk_scan
from lingen.bench.timing import Work, forward, medians
from lingen.kernels.choice import interpreted
from lingen.registry import RecipeError

ODD_GRID: Grid = (7, 5, 3)
"""No size of it is a power of two; here errors are measured."""


def ceilings(place: Place, size: int = 8192) -> Row:
    """What this machine reaches: TFLOP/s of a square matrix product, GB/s of a copy, read and written bytes counted."""
    make = partial(torch.randn, device=place.device, dtype=place.dtype)
    a, b = make(size, size), make(size, size)
    big = make(8 * size, size)  # 1 GiB in 16 bits
    other = torch.empty_like(big)
    ms = medians({"product": lambda: a @ b, "copy": lambda: other.copy_(big)}, place.device, place.budget)
    return {
        "name": "ceilings", "dtype": dtype_name(place.dtype), "tflops": 2e-9 * size**3 / ms["product"],
        "gb_per_s": 2e-6 * big.nbytes / ms["copy"],
    }  # fmt: skip


def bench_kernels(
    grids: Sequence[Grid], dim: int, place: Place, results: Results, only: Sequence[str] = (), square: int = 8192
) -> None:
    """A row for each case, twin and grid.

    Args:
        only: names of cases; by default all.
        square: width of the matrix product that tells the ceiling.
    """
    unknown = sorted(set(only) - {case.name for case in CASES})
    if unknown:
        known = ", ".join(case.name for case in CASES)
        raise RecipeError(f"There is no operation called '{unknown[0]}'. Known: {known}.")
    top = results.add(ceilings(place, square))
    for case in CASES:
        if only and case.name not in only:
            continue
        twins = {twin: errors(case, twin, dim, place, results) for twin in case.twins}
        for grid in grids:
            torch.compiler.reset()
            sizes = _sizes(grid, dim)
            inputs = _made(case, sizes, place)
            running = [twin for twin in twins if twins[twin] is not None]
            for row in _times(case, running, inputs, sizes, top, place, results.say) if running else ():
                results.add(row | (twins[row["kernel"].partition(",")[0]] or {}))


def _sizes(grid: Grid, dim: int) -> Sizes:
    """Of LinGen-4B, or smaller ones where the layer is narrower than a state."""
    return Sizes(grid, dim) if dim >= 256 else Sizes(grid, dim, state_dim=16, head_dim=16, text=24)


def _made(case: Case, sizes: Sizes, place: Place) -> Inputs:
    torch.manual_seed(0)
    normal = partial(torch.randn, device=place.device, dtype=place.dtype)
    # A slice of a wider tensor stays one: detached, it is a leaf with the strides of the slice.
    return {name: u.detach().requires_grad_() for name, u in case.make(sizes, normal).items()}


def _times(
    case: Case, twins: Sequence[str], inputs: Inputs, sizes: Sizes, top: Row, place: Place, say: Say
) -> list[Row]:
    """Of all twins in the same rounds. The floor is that every input is read once and every output written once, or
    that the matrix products are done at the ceiling; in the backward pass the gradients are read and written, too."""
    runs = {f"{twin}{_compiled(twin, place)}": _run(case, twin, sizes, place) for twin in twins}
    with torch.no_grad():
        outputs = case.call(inputs, sizes, twins[0])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [torch.randn_like(one) for one in outputs]
    backwards = {name: _backward(run, inputs, seeds) for name, run in runs.items()}
    able = {name: run for name, run in runs.items() if _able(f"{case.name}: {name}", backwards[name], say)}
    ms = medians({name: forward(run, [inputs]) for name, run in able.items()}, place.device, place.budget)
    both = medians({name: backwards[name] for name in able}, place.device, place.budget)
    read, written = sum(_bytes(u) for u in inputs.values()), sum(_bytes(one) for one in outputs)
    tflop = case.flops(sizes) / 1e12
    floors = [
        max(count / top["gb_per_s"] / 1e6, 1e3 * work / top["tflops"])
        for count, work in ((read + written, tflop), (2 * read + written, case.backward * tflop))
    ]
    return [
        {
            "name": case.name, "kernel": name, "dtype": dtype_name(place.dtype), "tokens": sizes.n, "ms": ms[name],
            "tflop": tflop, "gb": (read + written) / 1e9, "floor_ms": floors[0], "of_roofline": floors[0] / ms[name],
            "backward_ms": max(both[name] - ms[name], 0.0), "backward_floor_ms": floors[1], "grid": list(sizes.grid),
            "dim": sizes.dim,
        }
        for name in able
    ]  # fmt: skip


def _able(name: str, work: Work, say: Say) -> bool:
    """Runs it once. One that cannot run is left out, and said so: the others are worth their time."""
    try:
        work()
    except Exception as why_not:  # compilers fail in many ways, and a plain twin may want more memory than there is
        say(f"{name} is left out: {type(why_not).__name__}: {str(why_not)[:200]}")
        return False
    return True


def _compiled(twin: str, place: Place) -> str:
    return ", compiled" if twin not in ("triton", "stock") and place.device.type == "cuda" else ""


def _run(case: Case, twin: str, sizes: Sizes, place: Place) -> Any:
    """inputs -> outputs with one twin; a plain one compiled, on CUDA."""

    def run(inputs: Inputs) -> Any:
        return case.call(inputs, sizes, twin)

    return torch.compile(run, dynamic=False) if _compiled(twin, place) else run


def _backward(run: Any, inputs: Inputs, seeds: Sequence[Tensor]) -> Work:
    wanted = list(inputs.values())

    def work() -> None:
        out = run(inputs)
        torch.autograd.grad(out if isinstance(out, tuple) else (out,), wanted, seeds, allow_unused=True)

    return work


def _bytes(u: Tensor) -> int:
    """Of the numbers themselves, not of what they are a slice of."""
    return u.numel() * u.element_size()


def errors(case: Case, twin: str, dim: int, place: Place, results: Results) -> Row | None:
    """Relative RMS against float64 on an odd grid, of the outputs and of each gradient; None where it cannot run."""
    sizes = _sizes(ODD_GRID, dim)
    if twin == "triton" and place.device.type != "cuda" and not interpreted():
        results.say(f"{case.name}: triton runs on CUDA, not on {place.device}")
        return None
    inputs = _made(case, sizes, place)
    exact = {name: u.detach().double().requires_grad_() for name, u in inputs.items()}
    try:
        if twin == "stock":
            chunk_scan()
        got = _gradients(case, twin, inputs, sizes)
    except (ValueError, ImportError) as why_not:
        results.say(f"{case.name}: {twin} is left out: {str(why_not).splitlines()[0]}")
        return None
    want = _gradients(case, case.exact, exact, sizes)
    off = {name: _relative(got[name], want[name]) for name in want}
    outputs = [off.pop(name) for name in list(off) if name.startswith("output")]
    return {"error": max(outputs), "gradient_errors": off, "error_grid": list(ODD_GRID)}


def _gradients(case: Case, twin: str, inputs: Inputs, sizes: Sizes) -> dict[str, Tensor]:
    """Outputs, and gradients by the inputs' names, for seeds that are the same in every precision."""
    out = case.call(inputs, sizes, twin)
    outputs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(one.shape, generator=generator).bfloat16().to(one.device, one.dtype) for one in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), seeds)
    return {f"output {i}": one for i, one in enumerate(outputs)} | dict(zip(inputs, gradients, strict=True))


def _relative(got: Tensor, want: Tensor) -> float:
    error = (got.double() - want.double()).square().mean().sqrt()
    return (error / want.double().square().mean().sqrt().clamp(min=1e-12)).item()
