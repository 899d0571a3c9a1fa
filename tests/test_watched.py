"""Shapes are checked while testing: the hook is there, and it changes nothing else."""

import sys

import jaxtyping
import pytest
import torch

from lingen.autoencoder.losses import l1
from lingen.flow import interpolate
from lingen.kernels.pool import pool
from tests.helpers.shapes import watched


@pytest.mark.parametrize("call", [
    lambda: l1(torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 3, 2, 4, 5)),
    lambda: interpolate(torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 3, 2, 4, 5), torch.zeros(1)),
    lambda: pool(torch.zeros(3, 4, 5, 8), (2, 2, 2)),
])  # fmt: skip
def test_a_wrong_shape_is_an_error(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_every_module_that_writes_shapes_is_watched():
    loaded = [name for name in watched() if name in sys.modules]
    assert {"lingen.autoencoder.losses", "lingen.flow", "lingen.kernels.pool"} <= set(loaded)
    assert all(type(sys.modules[name].__spec__.loader).__name__ == "_JaxtypingLoader" for name in loaded)
