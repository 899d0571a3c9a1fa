"""Where things are measured, how precisely, and for how long."""

from typing import NamedTuple

import torch

from lingen.kernels.choice import best_device, keep_memory
from lingen.recipe.errors import RecipeError

PRECISIONS = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}
"""Of a command's --precision; 8-bit products stand in a model of 16 bits."""
FP8 = "float8_e4m3fn"
"""What the dtype of a row is called where the large products are in 8 bits."""


class Place(NamedTuple):
    """Device, precision, and seconds for each number: what takes longer runs once."""

    device: torch.device
    dtype: torch.dtype
    budget: float

    @property
    def sixteen_bit(self) -> bool:
        return self.dtype.itemsize == 2

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


def place_of(device: str | None, precision: str | None = None, budget: float | None = None) -> Place:
    """The place that is asked for; by default the GPU where there is one, in bfloat16, else the CPU in float32.
    RecipeError for a device that is not here, or on which nothing is measured."""
    if device and device.partition(":")[0] not in ("cpu", "cuda"):
        raise RecipeError(f"There is no device '{device}' to measure on; say cpu or cuda.")
    found = best_device(device)
    keep_memory(found)  # as sampling does
    dtype, seconds = (torch.bfloat16, 0.5) if found.type == "cuda" else (torch.float32, 0.1)
    return Place(found, PRECISIONS[precision] if precision else dtype, budget or seconds)


def device_name(device: torch.device) -> str:
    """``NVIDIA H100 80GB HBM3``, or the CPU with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16``"""
    return str(dtype).removeprefix("torch.")
