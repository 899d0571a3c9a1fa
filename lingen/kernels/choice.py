"""Which twin of an operation runs, and on which device: what is asked for, else the fastest one, logged once."""

import ctypes
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from lingen.recipe.errors import RecipeError

log = logging.getLogger("lingen")

_USUAL = ("reference", ("auto", "reference", "triton"))
TWINS = {
    "scan": ("chunked", ("auto", "reference", "chunked", "triton", "stock")),
    "window attention": ("sdpa", ("auto", "reference", "triton", "sdpa", "flash")),
    "8-bit product": ("reference", ("auto", "reference", "scaled_mm")), "cross-attention": _USUAL, "conv": _USUAL,
    "gated norm": _USUAL, "modulation": _USUAL, "pool": _USUAL, "swiglu": _USUAL, "norm and SiLU": _USUAL,
    "quantization": _USUAL,
}  # fmt: skip
"""Operation, as messages call it -> what "auto" takes where Triton's twin does not run, and what `kernel` may be."""
_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLANNED: ContextVar[str] = ContextVar("planned for", default="cpu")
_UNLAUNCHED: ContextVar[bool] = ContextVar("kernels are not launched", default=False)
_HAS_TRITON = find_spec("triton") is not None  # at import: inside of a call, torch.compile would warn


def choose(operation: str, kernel: str, x: Tensor, too_large: str = "", plain: str = "") -> str:
    """The twin to run: `kernel` itself, or for "auto" "triton" where it runs on `x` and else the plain one of `TWINS`.

    Where nothing is computed, on the meta device and in FakeTensorMode, the plain one stands for "triton", but in a
    block of `unlaunched` "triton" is itself. RecipeError for an unknown kernel, or "triton" where it cannot run.

    Args:
        operation: of `TWINS`.
        x: a tensor of the operation; its device and dtype decide.
        too_large: a sentence for why the Triton twin does not take these sizes; empty where it does.
        plain: in the place of the table's."""
    usual, known = TWINS[operation]
    plain = plain or usual
    if too_large:
        if kernel == "triton":
            raise RecipeError(too_large)
        known = tuple(twin for twin in known if twin != "triton")
    if kernel not in known:
        raise RecipeError(f"There is no {operation} kernel called {kernel!r}. Known: {', '.join(known)}.")
    if kernel in ("auto", "triton") and not holds_numbers(x):
        return "triton" if "triton" in known and is_unlaunched(x) else plain
    if kernel == "triton" and (why_not := _why_no_triton(x)):
        raise RecipeError(f"kernel='triton' of the {operation} cannot run: {why_not} kernel='auto' takes another.")
    if kernel != "auto":
        return kernel
    chosen = "triton" if "triton" in known and x.is_cuda and not _why_no_triton(x) else plain
    if not torch.compiler.is_compiling():
        _say(operation, chosen, x.device.type)
    return chosen


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU (TRITON_INTERPRET=1): for tests, never for "auto"."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def full_precision(x: Tensor) -> torch.autocast:
    """A block in which autocast does not lower the precision of what is computed on `x`."""
    kind = x.device.type
    return torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False)


def holds_numbers(x: Tensor) -> bool:
    """Whether something is computed on `x`: not on the meta device, nor in FakeTensorMode."""
    return not (x.is_meta or isinstance(x, FakeTensor))


@contextmanager
def planned_for(device: str) -> Iterator[None]:
    """In the block tensors on the meta device stand for tensors on this type of device: a kernel whose twins multiply
    differently does there what it would do on that device, so that it can be counted."""
    token = _PLANNED.set(device)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def stands_for_cuda(x: Tensor) -> bool:
    """Whether `x` is on the meta device in a block of `planned_for("cuda")`."""
    return x.is_meta and _PLANNED.get() == "cuda"


@contextmanager
def unlaunched() -> Iterator[None]:
    """In the block a fake tensor stands for one on a GPU: what has a Triton kernel allocates, keeps and frees what it
    would there, and launches nothing. Where Triton is not installed, the plain twins run as ever."""
    if not has_triton():
        yield
        return
    from triton.runtime.jit import KernelInterface

    token = _UNLAUNCHED.set(True)
    try:
        with patch.object(KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **kwargs: None):
            yield
    finally:
        _UNLAUNCHED.reset(token)


def is_unlaunched(x: Tensor) -> bool:
    """Whether kernels run on `x` without being launched, in a block of `unlaunched`."""
    return _UNLAUNCHED.get() and x.dtype in _TRITON_TYPES


def device_type(x: Tensor) -> str:
    """Type of the device that `x` is on, or stands for in a block of `unlaunched`."""
    return "cuda" if is_unlaunched(x) and not holds_numbers(x) else x.device.type


def _why_no_triton(x: Tensor) -> str | None:
    if not has_triton():
        return "Triton is not installed."
    if not (x.is_cuda or (interpreted() and x.device.type == "cpu")):
        return f"the tensors are on {x.device}, not on CUDA."
    if x.dtype not in _TRITON_TYPES:
        return f"it computes in float32, bfloat16 or float16, not {x.dtype}."
    return None


def has_triton() -> bool:
    """Whether Triton is installed (it is not on Windows and macOS)."""
    return _HAS_TRITON


@lru_cache
def _say(operation: str, chosen: str, device: str) -> None:
    log.info("%s: kernel=auto runs '%s' on %s", operation, chosen, device)


def best_device(name: str | None = None) -> torch.device:
    """The device of that name; without one the GPU where there is one, else the CPU. RecipeError where there is no
    device of that name here."""
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def memory_here(device: torch.device | None = None) -> int:
    """Bytes of memory of a device, which others may use in part; of the CPU (the default) what this machine, or the
    control group that a container gives it, has."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(there, int(text)) if text.isdecimal() else there


def keep_memory(device: torch.device) -> None:
    """For sampling on the CPU: glibc keeps memory that is freed for the next tensor. Otherwise it goes back to the
    system, which clears its pages and maps them anew at each use: half of the time of a long clip. The most that is
    held at a time grows by up to a third. What MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_MAX_ set stays; with another C
    library or allocator nothing happens."""
    if device.type == "cpu":
        for variable, (number, value) in _MALLOC.items():
            with suppress(AttributeError, OSError, TypeError):
                if variable not in os.environ:
                    ctypes.CDLL(None).mallopt(number, value)


_MALLOC = {"MALLOC_TRIM_THRESHOLD_": (-1, -1), "MALLOC_MMAP_MAX_": (-4, 0)}
"""Variables of glibc's malloc -> the number of each in malloc.h, and the value that keeps everything."""
