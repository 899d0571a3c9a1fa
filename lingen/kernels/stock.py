"""Where the parts of other libraries are found."""

import importlib
import sys
import types
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from lingen.recipe.errors import RecipeError


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
            raise RecipeError(f"kernel='stock' needs mamba_ssm ({error}): pip install 'lingen[cuda]'.") from error
        # Its __init__ asks for the extension, which only Mamba 1 uses: the package is entered past it.
        package = types.ModuleType("mamba_ssm")
        package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
        sys.modules["mamba_ssm"] = package
        module = importlib.import_module(path)
    scan: Callable[..., Any] = module.mamba_chunk_scan_combined
    return scan
