"""Whether the parts of a recipe keep their contracts, tried at tiny shapes before anything trains.

lingen's own parts are tested and left out; so are those that read weights when they are used."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingen.blocks.scan import permutation
from lingen.frozen import is_trained
from lingen.recipe.errors import SettingError
from lingen.recipe.registry import AUTOENCODERS, MIXERS, SCANS, TEXT_ENCODERS, Registry
from lingen.recipe.sections import Triple

TRIED_GRID = (2, 4, 4)
"""Tokens (t, h, w) on which a mixer is tried."""
TEXTS = ["a red ball rolls, then it rests", ""]


def broken_contract(registry: Registry, component: dict[str, Any], part: Any, *positional: Any) -> str | None:
    """What a part, built on the meta device, owes and does not do, as a sentence; None where it keeps its contract."""
    if _is_ours(part):
        return None
    made = type(part).__init__
    if made is not nn.Module.__init__ and any(p.kind is p.VAR_KEYWORD for p in signature(made).parameters.values()):
        return "its `**kwargs` would take a key with a typing mistake; name its settings, each after `*`."
    with suppress(_Unreadable):  # training on encoded shards may need no such file
        if registry is AUTOENCODERS:
            return _of_autoencoder(part, lambda: registry.build(component))
        if registry is TEXT_ENCODERS:
            return _of_text_encoder(part, lambda: registry.build(component))
        if registry is MIXERS:
            return _of_mixer(part, positional[0], lambda: registry.build(component, *positional))
    return None


class _Unreadable(Exception):
    """A part reads a file that is not here, so nothing can be said of it."""


def faults_of_scans(module: nn.Module, grids: list[Triple]) -> Iterator[str]:
    """A sentence for each scan order of others in a mixer that is no bijection on one of these grids."""
    orders = {getattr(part, "order", None) for part in module.modules()}
    for order in orders:
        if not callable(order) or getattr(order, "__module__", "").startswith("lingen."):
            continue
        for grid in dict.fromkeys(grids):
            try:
                permutation(order, grid, torch.device("cpu"))
            except SettingError as error:
                yield str(error)
                break


def fault_at_sizes(mixer: nn.Module, grids: list[Triple], dim: int) -> str | None:
    """A sentence where a mixer of others, which works on `TRIED_GRID`, fails on one of these grids, on meta."""
    for grid in [] if _is_ours(mixer) else dict.fromkeys((TRIED_GRID, *grids)):
        try:
            with torch.no_grad(), torch.device("meta"):
                mixer(torch.zeros(1, *grid, dim))
        except Exception as error:
            told = f"forward fails on the {'x'.join(map(str, grid))} tokens of a batch: {error_told(error)}"
            return None if grid == TRIED_GRID else told  # it works there, but looks at numbers
    return None


def has_scan_of_others(component: dict[str, Any]) -> bool:
    """Whether a mixer or one of its branches names a scan order that lingen does not bring."""
    inside = [value for value in component.values() if isinstance(value, dict)]
    scan = component.get("scan", "thw")
    return isinstance(scan, str) and SCANS.origin(scan) != "lingen" or any(map(has_scan_of_others, inside))


def _of_mixer(mixer: Any, dim: int, build: Callable[[], Any]) -> str | None:
    def fault_in(one: Any, again: Callable[[], Any]) -> str | None:
        output, fault = _tried(one, again, lambda part: part(torch.zeros(1, *TRIED_GRID, dim)), "forward")
        if fault and not torch.cuda.is_available():
            only = "If it runs on CUDA alone, let its class say `cuda_only = True`."
            return None if getattr(one, "cuda_only", False) else f"{fault} {only}"
        fault = fault or unlike(output, (1, *TRIED_GRID, dim), torch.float32, "forward gives")
        return fault or _untrainable(again, dim)

    if not type(mixer).__module__.startswith("lingen."):
        return fault_in(mixer, build)
    branches = {name: child for name, child in mixer.named_children() if not _is_ours(child)}
    found = (
        (name, fault_in(child, partial(lambda own: build().get_submodule(own), name)))
        for name, child in branches.items()
    )
    return next((f"its branch '{name}': {fault}" for name, fault in found if fault), None)


def _untrainable(build: Callable[[], Any], dim: int) -> str | None:
    """A sentence where a mixer, tried on numbers of two samples, lets no gradient through, or one from another sample,
    or makes of them what is no number."""
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            x = torch.randn(2, *TRIED_GRID, dim, requires_grad=True)
            output = build()(x)
            told = (output[1] * torch.randn_like(output[1])).sum()
            gradient = torch.autograd.grad(told, x, allow_unused=True)[0] if told.requires_grad else None
    except OSError as error:
        raise _Unreadable from error
    except Exception:  # it has kept its shape without numbers; it may need a GPU
        return None
    if not output.isfinite().all():
        return "forward of normal numbers gives NaN or infinity."
    if gradient is None:
        return "forward gives a tensor without a gradient, so nothing could be learned; look for detach or no_grad."
    if not gradient.isfinite().all():
        return "the gradient of its forward is NaN or infinite."
    others = "what forward gives for a sample depends on the others of its batch, which are there by chance."
    return others if gradient[0].any() else None


def _of_autoencoder(part: Any, build: Callable[[], Any]) -> str | None:
    lacks = [name for name in ("encode", "decode") if not callable(getattr(part, name, None))]
    if lacks:
        return f"it has no method `{lacks[0]}`."
    strides, channels = getattr(part, "strides", None), getattr(part, "channels", None)
    if not (isinstance(strides, (tuple, list)) and len(strides) == 3 and all(map(_is_count, strides))):
        return f"its `strides` are three whole numbers (t, h, w) of pixels per latent, got {strides!r}."
    if not isinstance(channels, int) or not _is_count(channels):
        return f"its `channels` is the whole number of latent channels, got {channels!r}."
    if hasattr(part, "missing"):
        return None
    size = (1, 2 * strides[1], 2 * strides[2])  # an image
    latents = (1, channels, 1, 2, 2)
    output, fault = _tried(part, build, lambda one: one.encode(torch.zeros(1, 3, *size)), "encode")
    fault = fault or unlike(output, latents, None, f"encode of {[1, 3, *size]} gives")
    if fault:
        return fault
    output, fault = _tried(part, build, lambda one: one.decode(torch.zeros(latents)), "decode")
    if fault or not isinstance(output, Tensor):
        return fault or f"decode gives {type(output).__name__}, not a tensor."
    frames = output.shape[2] if output.ndim == 5 and 1 <= output.shape[2] <= strides[0] else 1
    return unlike(output, (1, 3, frames, *size[1:]), None, f"decode of {list(latents)} gives")


def _of_text_encoder(part: Any, build: Callable[[], Any]) -> str | None:
    if not callable(getattr(part, "encode", None)):
        return "it has no method `encode`."
    dim = getattr(part, "dim", None)
    if not _is_count(dim):
        return f"its `dim` is the whole number of a token's width, got {dim!r}."
    if getattr(part, "parts", False) and not is_trained(part):
        return "it tells `parts` and is not `trainable`: shards that are encoded before training keep none."
    if hasattr(part, "missing"):
        return None
    output, fault = _tried(part, build, lambda one: one.encode(TEXTS), "encode", on_meta=False)
    if fault:
        return fault
    if not (isinstance(output, tuple) and len(output) == 2 and all(isinstance(one, Tensor) for one in output)):
        return f"encode gives {type(output).__name__}, not (tokens [b n w], mask [b n])."
    tokens, mask = output
    if tokens.ndim != 3 or tokens.shape[0] != len(TEXTS) or tokens.shape[1] < 1 or tokens.shape[2] != dim:
        return f"encode of {len(TEXTS)} texts gives tokens {list(tokens.shape)}; expected [{len(TEXTS)}, n, {dim}]."
    kind = torch.long if getattr(part, "parts", False) else torch.bool
    fault = unlike(mask, tuple(tokens.shape[:2]), kind, "encode gives a mask")
    for row in mask if kind == torch.long and fault is None else ():
        numbers = sorted({*row.tolist()} - {0})
        if numbers != [*range(1, len(numbers) + 1)]:
            return (
                f"encode numbers the parts of a text {numbers}; expected 1, 2, ..., none left out, and 0 for padding."
            )
    return fault


def _tried(
    part: Any, build: Callable[[], Any], run: Callable[[Any], Any], what: str, *, on_meta: bool = True
) -> tuple[Any, str | None]:
    """What a part gives, and a sentence where it fails: on the meta device, where that fails on the CPU, and where that
    fails, too, on the GPU, if there is one: layers of Triton kernels alone run nowhere else."""
    with torch.no_grad():
        if on_meta:
            with suppress(Exception), torch.device("meta"):  # it may look at numbers: it is tried where there are some
                return run(part), None
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            try:
                with torch.random.fork_rng(devices=[0] if device == "cuda" else []), torch.device(device):
                    return run(build()), None
            except OSError as error:
                raise _Unreadable from error
            except Exception as error:
                fault = f"{what} fails: {error_told(error)}"
    return None, fault


def unlike(output: Any, shape: tuple[int, ...], dtype: torch.dtype | None, what: str) -> str | None:
    if not isinstance(output, Tensor):
        return f"{what} {type(output).__name__}, not a tensor."
    if tuple(output.shape) != shape:
        return f"{what} {list(output.shape)}; expected {list(shape)}."
    if dtype is not None and output.dtype != dtype:
        return f"{what} {output.dtype}; expected {dtype}."
    return None


def _is_ours(part: Any) -> bool:
    """Whether nothing in a part comes from elsewhere, a branch of MATE for example."""
    modules = part.modules() if isinstance(part, nn.Module) else [part]
    return all(type(one).__module__.startswith(("lingen.", "torch.")) for one in modules)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def error_told(error: Exception) -> str:
    """The error, with the line of the part's own code that it comes from."""
    ours = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(ours)]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
