"""Tensors that follow from sizes alone: computed once and kept."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map

P = ParamSpec("P")
T = TypeVar("T")


def constants(maxsize: int = 64) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Keeps the last `maxsize` results of a function whose last argument is a device, given by position. What is kept
    holds numbers, whatever surrounds the first call: the function runs on the CPU outside of any device context, of
    inference mode and of FakeTensorMode, and puts its result on the device; in FakeTensorMode a fake of it."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @lru_cache(maxsize)
        def once(*arguments: Any) -> Any:
            with torch.device("cpu"), torch.inference_mode(False):
                return cast(Callable[..., Any], function)(*arguments)

        @wraps(function)
        def kept(*arguments: Any) -> Any:
            if torch.compiler.is_compiling():
                return once(*arguments)
            with unset_fake_temporarily() as fake:
                if fake is None:
                    return once(*arguments)
                real = once(*arguments[:-1], torch.device("cpu"))
            mode = cast(FakeTensorMode, fake)
            return tree_map(lambda x: mode.from_tensor(x).to(arguments[-1]), real)

        return cast(Callable[P, T], kept)

    return decorate
