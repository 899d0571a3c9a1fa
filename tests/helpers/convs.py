"""What tests of convolutions share: a watch over the one call that torch gets wrong on some CPUs."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PaddedShortClips(TorchDispatchMode):
    """Lists the convolutions of one or two frames that torch was asked to pad along time: clip and weight, as shapes.

    In bfloat16 these are wrong on CPUs (docs/upstream.md); they are found here on any machine, in any dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[list[int], list[int]]] = []
        self.convolutions = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.convolution.default:
            x, weight, _, _, padding = args[:5]
            self.convolutions += 1
            if x.ndim == 5 and x.shape[2] < 3 and padding[0]:
                self.found.append((list(x.shape), list(weight.shape)))
        return function(*args, **(kwargs or {}))
