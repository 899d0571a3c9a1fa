"""The gradient of a Triton twin, whose forward and backward passes are plain functions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FromInputs(torch.autograd.Function):
    """`run(*inputs)`, of whose inputs alone, and the gradient of its result, `back(grad, *inputs)` computes the
    gradients of the first of them, in order: nothing but the inputs is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], back: Callable[..., tuple[Any, ...]], *inputs: Any) -> Any:
        ctx.back, ctx.others = back, [None if isinstance(one, Tensor) else one for one in inputs]
        ctx.save_for_backward(*(one if isinstance(one, Tensor) else None for one in inputs))
        return run(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        pairs = zip(ctx.saved_tensors, ctx.others, strict=True)
        found = ctx.back(grad, *(other if saved is None else saved for saved, other in pairs))
        return None, None, *found, *[None] * (len(ctx.others) - len(found))


def channels_last(x: Tensor) -> Tensor:
    """Itself where the last axis is contiguous; else, as where autograd expanded it or axes were permuted, a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
