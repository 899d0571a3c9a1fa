"""What torch.compile makes of the yardsticks, in a process of its own: the types that tests check are unreadable to it.

``python -m tests.helpers.compiled twins|block|cuda``, from the repository.
"""

import sys
from functools import partial

import torch

from lingen.blocks.block import Block
from lingen.cli.bench import yardstick
from lingen.recipe.sections import LinGenConfig

KERNELS = yardstick("kernels")
built, compiled = yardstick("build").built, yardstick("build").compiled
CPU = yardstick("place").Place(torch.device("cpu"), torch.float32, 0.1)


def twins():
    """Each plain twin as one graph; prints the operations."""
    for case in KERNELS.CASES:
        if "reference" in case.twins:
            sizes = KERNELS.sizes_of((2, 3, 4), 32)
            inputs = KERNELS.made(case, sizes, CPU)
            torch.compiler.reset()
            run = partial(case.call, sizes=sizes, kernel="reference")
            outputs = run(inputs), torch.compile(run, fullgraph=True, backend="eager")(inputs)
            torch.testing.assert_close(*outputs)
            print(case.name)


def block(dim, grid, place, compiler, limit):
    """A stock block's output and gradients, compiled or not."""
    mixer = {"name": "mate", "state_dim": 16, "head_dim": 16, "window": (2, 2, 2)}
    config = LinGenConfig(dim=dim, depth=2, mixer=mixer, channels=4, text_dims=(6,), max_grid=grid, gate_init=1.0)
    ours = built(partial(Block, config, mixer, 1), place)
    plain, inputs = yardstick("plain").PlainBlock(ours), yardstick("training").block_inputs(dim, grid, place)
    inputs = [u.detach().requires_grad_(u.is_floating_point()) for u in inputs]
    names = ["x", "positions", "modulation", "text", *(name for name, _ in ours.named_parameters())]
    wanted = [u for u in (*inputs, *ours.parameters()) if u.requires_grad]
    seed = torch.randn_like(inputs[0])
    found = [torch.autograd.grad(run(*inputs), wanted, seed) for run in (plain, compiler(plain))]
    for name, want, got in zip(names, *found, strict=True):
        error = ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item()
        print(f"{name}: {error:.1e}")
        assert got.shape == want.shape and error < limit, (name, got.shape, want.shape)


if __name__ == "__main__":
    if sys.argv[1] == "twins":
        twins()
    elif sys.argv[1] == "block":
        block(16, (2, 3, 4), CPU, partial(torch.compile, backend="aot_eager"), 1e-5)
    else:  # a size at which inductor would fuse sums over rows with sums over columns
        block(1280, (17, 16, 16), CPU._replace(device=torch.device("cuda")), compiled, 1e-2)
