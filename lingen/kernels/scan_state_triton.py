"""The states that a scan leaves, by the scan's own first two kernels: no outputs are computed."""

# mypy: disable-error-code="no-untyped-def"

import torch

from lingen.kernels.scan import state_by_product
from lingen.kernels.scan_triton import Scan, step_sums


class FusedState(torch.autograd.Function):
    """`lingen.kernels.scan.scan_state` with kernel="triton"; the gradient is that of its plain twin, recomputed."""

    @staticmethod
    def forward(ctx, u, dt, a, bias, index, sizes, chunk):
        ctx.save_for_backward(u, dt, a, bias, index)
        ctx.sizes = sizes
        a, bias = a.contiguous(), bias.contiguous()
        scan = Scan(u, step_sums(dt, a, bias, index, u.shape[1], chunk, turns=False), ctx.sizes, chunk)
        _, end, _ = scan.states(scan.x, scan.b, None)
        return end.mT.contiguous()

    @staticmethod
    def backward(ctx, grad):
        *parts, index = ctx.saved_tensors
        parts = [part.detach().requires_grad_() for part in parts]
        with torch.enable_grad():
            u, dt, a, bias = parts
            state = state_by_product(u, dt, a, bias, index, ctx.sizes.groups, ctx.sizes.state)
        return *torch.autograd.grad(state, parts, grad), None, None, None
