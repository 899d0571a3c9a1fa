"""What is counted on the meta device is what is multiplied: on the CPU, by the Triton kernels, and by formula."""

import logging
import math

import pytest
import torch
from lingen_yardsticks.mixer_flops import mixer_flops
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from lingen.model import LinGen
from lingen.plan import flops
from lingen.plan.flops import forward_flops
from lingen.plan.forecast import plan
from lingen.plan.loading import load_recipe
from lingen.recipe.registry import MIXERS
from lingen.recipe.sections import LinGenConfig
from tests.helpers.closed_forms import closed_form, triton_form

MATE = {"name": "mate", "state_dim": 16, "head_dim": 16, "window": (2, 2, 4)}
MAMBA = {"state_dim": 16, "head_dim": 16}


def config(**changes):
    return LinGenConfig(**dict(dim=32, depth=5, channels=3, text_dims=(5, 7), max_grid=(4, 4, 4)) | changes)


def executed(module, *inputs):
    """FLOPs of a real forward."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        module(*inputs)
    return counter.get_total_flops()


@pytest.fixture
def dots(monkeypatch):
    """FLOPs of the products that Triton's interpreter does."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available():
        pytest.skip("on a GPU the kernels are compiled, and nobody sees their products")
    found = []
    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        found.append(2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return dot(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"mixer": MATE, "pool_text": True, "predict": "clip"},
        {"mixer": [MATE, {"name": "attention"}, {"name": "linear_attention"}], "patch": (2, 2, 2)},
        {"mixer": {**MATE, "te": None, "scan": "hilbert", "conv": "per_direction", "branch_gate": "shared"}},
        {"mixer": {"name": f"{__name__}:Squares"}},
        {"mixer": {"name": "temporal_swin", "window": (2, 3, 3)}, "depth": 1, "text_dims": (), "checkpointing": True},
    ],
    ids=["clip", "hybrid", "one branch", "third party", "without text"],
)
@pytest.mark.parametrize("frames", [2, 6])
def test_counted_is_executed(changes, frames):
    model = LinGen(config(**changes))
    settings = model.config
    latents = torch.randn(1, 3, frames, 10, 12)
    text = tuple((torch.randn(1, n, w), torch.ones(1, n, dtype=torch.bool)) for n, w in zip((4, 3), settings.text_dims))  # noqa: B905
    model.config = config(**changes | {"checkpointing": False})
    want = executed(model, latents, torch.rand(1), text)
    assert forward_flops(settings, model.grid_of(latents.shape[2:]), [len(t[0]) for t, _ in text]) == want


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"review": None},
        {"bidirectional": False, "groups": 2},
        {"review_reverse": "plain", "conv": "per_direction", "scan": "hwt"},
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", [(5, 4, 4), (1, 3, 3)])
def test_counted_for_cuda_is_what_the_triton_kernels_multiply(settings, grid, dots):
    """80 tokens are two chunks of 64 in float32, which are what a GPU would take, and 9 are one of 32."""
    mixer = MIXERS.build({"name": "mamba2", "kernel": "triton", **MAMBA, **settings}, 32, 0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixer(torch.randn(1, *grid, 32))
    want = counter.get_total_flops() + sum(dots)
    for kernel in ("auto", "triton"):
        component = {"name": "mamba2", "kernel": kernel, **MAMBA, **settings}
        assert sum(mixer_flops(component, 32, 0, grid, device="cuda").values()) == want


@pytest.mark.parametrize("grid", [(34, 32, 32), (1, 16, 16), (1, 3, 3)])
def test_a_gpu_in_16_bits_takes_chunks_of_256(grid):
    for settings in ({}, {"review": None, "groups": 2}, {"bidirectional": False, "expand": 1}):
        found = mixer_flops({"name": "mamba2", **settings}, 128, 0, grid, sixteen_bit=True, device="cuda")
        if settings.get("bidirectional", True):
            assert sum(found.values()) == triton_form(settings, grid, 128)
        assert sum(found.values()) != closed_form({"name": "mamba2", **settings}, grid, 128)


@pytest.mark.parametrize("kernel", ["triton", "reference", "chunked", "sdpa"])
def test_a_kernel_that_cannot_run_here_is_counted_all_the_same(kernel):
    found = sum(mixer_flops({**MATE, "kernel": kernel}, 32, 0, (2, 4, 4), device="cuda").values())
    assert found > sum(mixer_flops({**MATE, "te": None}, 32, 0, (2, 4, 4), device="cuda").values())


class Squares(torch.nn.Module):
    """A third party's mixer whose products differ from layer to layer."""

    def __init__(self, dim, layer, *, width: int = 4):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(dim, width * (layer + 1)))

    def forward(self, x):
        return x @ self.weight @ self.weight.mT


@torch.library.custom_op("lingen_tests::gram", mutates_args=())
def gram(x: torch.Tensor) -> torch.Tensor:
    """x x^T by a kernel of someone's own, of which torch sees nothing."""
    return x @ x.mT


gram.register_fake(lambda x: x.new_empty(*x.shape[:-1], x.shape[-2]))
register_flop_formula(torch.ops.lingen_tests.gram)(lambda x, *_, out_shape=None, **__: 2 * math.prod(out_shape) * x[-1])


class OwnKernel(torch.nn.Module):
    def __init__(self, dim, layer):
        super().__init__()

    def forward(self, x):
        return x + gram(x.flatten(1, 3)).sum()


class Stubborn(torch.nn.Module):
    """Needs numbers."""

    def __init__(self, dim, layer):
        super().__init__()

    def forward(self, x):
        return x if x.sum().item() else x + 1


def test_a_third_partys_products_are_counted():
    grid, own = (2, 3, 4), {"name": f"{__name__}:Squares", "width": 3}
    assert mixer_flops(own, 32, 1, grid) == {"products": 2 * 2 * 24 * 32 * 6}


def test_a_third_partys_kernel_is_counted_by_its_formula():
    assert mixer_flops({"name": f"{__name__}:OwnKernel"}, 8, 0, (2, 3, 4)) == {"products": 2 * 24 * 24 * 8}


def test_what_cannot_be_counted_is_said_and_left_out(caplog):
    flops._warn.cache_clear()
    with caplog.at_level(logging.WARNING, "lingen"):
        found = plan(load_recipe("quickstart_cpu", [f"model.mixer={__name__}:Stubborn"], stage="videos"))
    assert found.flops == found.training_flops == {} and found.tokens["video"] == 36
    assert "FLOPs and MFU are unknown" in caplog.text and "item" in caplog.text


def test_a_plan_is_of_the_recipes_own_device_and_precision():
    cpu, single, half = (
        plan(load_recipe("quickstart_cpu", overrides, stage="videos")).flops["video"]
        for overrides in ([], ["trainer.accelerator=gpu"], ["trainer.accelerator=gpu", "trainer.precision=bf16-mixed"])
    )
    assert cpu < single == half  # one chunk of 36 tokens on the CPU, of 64 rows on a GPU whatever the precision
