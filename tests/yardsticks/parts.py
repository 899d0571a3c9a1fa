"""The time of a piece of work by part: kernels on CUDA, operators on the CPU, grouped by their purpose."""

import ast
import os
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

import torch
from torch.autograd import DeviceType

from lingen import kernels

from .timing import Work

PATTERNS = (
    ("scan", r"_chunk_(scan|state|cumsum)|_state_passing|_bmm_chunk"),  # mamba_ssm's own names
    ("attention", r"flash|fmha|sdpa|scaled_dot_product|attention"),
    ("matrix products", r"gemm|nvjet|xmma|cutlass|splitk|cublas|wgmma|gemv|triton_tem|::(mm|bmm|addmm|_scaled_mm)$"),
    ("conv", r"conv|depthwise"),
    ("copies", r"copy|catarray|memcpy|memset|::cat$|index|gather|flip|roll|transpose|::clone|constant_pad|repeat|fill"),
    ("norms", r"norm|rms"),
    ("compiled elementwise", r"^triton_"),  # torch.compile's
)
"""Part -> patterns of the names of its kernels or operators; the first match counts, without one "elementwise"."""


def part_of_kernel(kernel: str) -> str:
    """The part that a CUDA kernel or an operator of torch belongs to: lingen's own by their files' names."""
    own = triton_kernels().get(kernel.split("(")[0])
    if own:
        return own
    found = (part for part, pattern in PATTERNS if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, "elementwise")


@lru_cache
def triton_kernels() -> dict[str, str]:
    """Name of each Triton function of `lingen.kernels` -> its operation; read from the sources, not imported. A name
    that occurs in several operations stands for all of them, because a profile holds names only."""
    owners: dict[str, list[str]] = {}
    for file in sorted(Path(*kernels.__path__).glob("*_triton.py")):
        operation = file.stem.removesuffix("_triton").removesuffix("_backward").replace("_", " ")
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in node.decorator_list):
                owners.setdefault(node.name, []).append(operation)
    return {name: " / ".join(dict.fromkeys(operations)) for name, operations in owners.items()}


def milliseconds_by_part(work: Work, device: torch.device, runs: int = 1) -> dict[str, float]:
    """Milliseconds of each part, most first: mean of the runs. A part's time is that of its CUDA kernels, on the CPU of
    its operators without those inside of them."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
        for _ in range(runs):
            work()
        if cuda:
            torch.cuda.synchronize(device)
    return {part: ms / runs for part, ms in profiled_milliseconds(profiled, cuda).items()}


def profiled_milliseconds(profiled: torch.profiler.profile, cuda: bool) -> dict[str, float]:
    """Milliseconds of each part in a profile that has ended, most first."""
    parts: Counter[str] = Counter()
    for event in profiled.key_averages():
        # Operators carry the time of the kernels that they launch: counting both would count twice.
        is_kernel = event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        if is_kernel or not cuda:
            microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
            parts[part_of_kernel(event.key)] += microseconds / 1e3
    return dict(parts.most_common())
