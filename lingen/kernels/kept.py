"""What a block that is computed again in the backward pass keeps of its first computation."""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

INPUT, NARROW, PRODUCTS, ALL = range(4)
"""A block keeps its input; also results that cost most for their bytes, the Triton scan's and those of weights that are
no wider than what they sum over; the results of all weights; or everything, and nothing is computed again."""


class Results(TorchDispatchMode):
    """In the block the results that a level keeps are stored as they are computed, or, `again`, given as stored.

    They serve one backward pass: a second one through the same graph computes everything again."""

    def __init__(self, stored: deque[Tensor], level: int, again: bool):
        super().__init__()
        self.stored, self.level, self.again, self.inside = stored, level, again, False

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self.again:
            self.stored.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = partial(func, *args, **(kwargs or {}))
        if self.inside or func not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            return run()
        summed, width = args[-1].shape
        return self.of(run) if width <= summed or self.level > NARROW else run()

    def of(self, run: Callable[[], Tensor]) -> Tensor:
        """What `run` gives, or gave."""
        if self.again and self.stored:
            return self.stored.popleft()
        self.inside = True
        found = run()
        self.inside = False
        if not self.again:
            self.stored.append(found.detach())  # it gets a graph of its own each time
        return found


def kept(run: Callable[[], Tensor]) -> Tensor:
    """What `run` gives; where a block is computed again, what it gave: for what costs much, such as a scan."""
    here = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Results)]
    return here[-1].of(run) if here else run()


def twice(level: int) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For `torch.utils.checkpoint`: contexts of the first computation of a block, and of the second one."""
    if level in (INPUT, ALL):
        return nullcontext(), nullcontext()
    stored: deque[Tensor] = deque()
    return Results(stored, level, False), Results(stored, level, True)
