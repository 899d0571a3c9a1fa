"""Bytes that tensors hold while a program runs, also where nothing is computed: what a GPU would give out."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRAIN = 512
"""Bytes that CUDA's caching allocator rounds each tensor up to."""
COLLECTIVE = ("c10d", "_c10d_functional", "fsdp")
"""Namespaces of operations whose arguments and results are buffers of collectives."""


class MemoryTracker(TorchDispatchMode):
    """Counts what is held at each operation inside of the block: every storage once, from the operation that makes it
    until nothing refers to it, or it is resized to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        """Number of a storage -> its bytes, now."""
        self.buffers: set[int] = set()
        """Numbers of the storages that a collective reads or writes."""
        self._numbers: dict[int, int] = {}
        """Address of a storage, which another one may have later, -> its number, which is its own."""
        self._count = count()
        self.total, self.most = 0, 0
        self.at_most: dict[int, int] = {}
        """`held` where it was most, since `restart`."""

    def __enter__(self) -> MemoryTracker:
        resize = torch.UntypedStorage.resize_

        def watched(storage: torch.UntypedStorage, size: int) -> Any:
            done = resize(storage, size)
            if (number := self._numbers.get(storage._cdata)) is not None:
                self.buffers.add(number)  # FSDP frees and fills its gathered weights so
                self._hold(number, storage.nbytes())
            return done

        self._patch = patch.object(torch.UntypedStorage, "resize_", watched)
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # seen once more as an operation on its part
        out = func(*args, **(kwargs or {}))
        made = [one for one in tree_leaves(out) if isinstance(one, FakeTensor)]
        for storage in (tensor.untyped_storage() for tensor in made):
            if storage._cdata not in self._numbers:
                number = self._numbers[storage._cdata] = next(self._count)
                self.held[number] = 0
                weakref.finalize(storage, self._free, storage._cdata)
                self._hold(number, storage.nbytes())
        if func.namespace in COLLECTIVE:
            self.buffers |= self.numbers([*made, *tree_leaves((args, kwargs))])
        return out

    def numbers(self, tensors: Iterable[Any]) -> set[int]:
        """Of the storages in which tensors lie, of sharded ones their parts here; what is no tensor is left out."""
        places = (part_here(one).untyped_storage()._cdata for one in tensors if isinstance(one, Tensor))
        return {self._numbers[place] for place in places if place in self._numbers}

    def _hold(self, number: int, size: int) -> None:
        size = math.ceil(size / GRAIN) * GRAIN
        self.total += size - self.held[number]
        self.held[number] = size
        if self.total > self.most:
            self.most, self.at_most = self.total, dict(self.held)

    def _free(self, place: int) -> None:
        self.total -= self.held.pop(self._numbers.pop(place))

    def forget(self, tensors: Iterable[Any]) -> None:
        """These hold nothing: they stand for others."""
        for number in self.numbers(tensors):
            self._hold(number, 0)

    def restart(self) -> None:
        """The most is from now on."""
        self.most, self.at_most = self.total, dict(self.held)


@torch.no_grad()
def part_here(tensor: Tensor) -> Tensor:
    """What this rank holds of it, plain, in the same memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
