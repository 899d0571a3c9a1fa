"""The scan of mamba_ssm, found and called in the form of ours."""

import importlib
import sys
import types
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lingen.recipe.errors import RecipeError

CHUNK = 256
"""Its chunks must be powers of two; this is what it is tuned for."""


@lru_cache
def chunk_scan() -> Callable[..., Any]:
    """`mamba_chunk_scan_combined` of mamba_ssm, also where it was built without its CUDA extension. Raises RecipeError
    where mamba_ssm is not installed."""
    path = "mamba_ssm.ops.triton.ssd_combined"
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        spec = find_spec("mamba_ssm")
        if spec is None or spec.submodule_search_locations is None:
            raise RecipeError(f"The stock scan needs mamba_ssm ({error}): pip install mamba-ssm.") from error
        # Its __init__ asks for the extension, which only Mamba 1 uses: the package is entered past it.
        package = types.ModuleType("mamba_ssm")
        package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
        sys.modules["mamba_ssm"] = package
        module = importlib.import_module(path)
    scan: Callable[..., Any] = module.mamba_chunk_scan_combined
    return scan


def stock_scan(
    u: Tensor, dt: Tensor, a: Tensor, d: Tensor, dt_bias: Tensor, index: Tensor | None, state: Tensor | None,
    *, groups: int = 1, state_dim: int,
) -> Tensor:  # fmt: skip
    """`lingen.kernels.scan.scan` by mamba_ssm on CUDA, once for each direction: arguments and result are the same."""
    if not u.is_cuda:
        raise RecipeError(f"The stock scan runs on CUDA, but the tokens are on {u.device}.")
    run, keys = chunk_scan(), groups * state_dim
    dt, outputs = (dt if index is None else dt[:, index]), []
    for way, (own_a, own_d, bias) in enumerate(zip(a, d, dt_bias, strict=True)):
        streams, steps = (part.flip(1) if way else part for part in (u, dt))
        x, b, c = streams.split([u.shape[-1] - 2 * keys, keys, keys], -1)
        x = x.unflatten(-1, (a.shape[1], -1))
        b, c = (part.unflatten(-1, (groups, -1)) for part in (b, c))
        begin = None if state is None else state[:, way].float()
        steps = F.softplus(steps.float() + bias.float())
        with torch.autocast(u.device.type, enabled=False):
            y = run(x, steps, own_a.float(), b, c, chunk_size=CHUNK, D=own_d.float(), initial_states=begin)
        outputs.append(y.flatten(2).flip(1) if way else y.flatten(2))
    return torch.stack(outputs).sum(0)
