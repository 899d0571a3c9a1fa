"""The precision of sampling, and guidance in one batch or in two passes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lingen
from lingen.kernels import fp8
from lingen.kernels.fp8 import Fp8Linear, Quantized
from lingen.recipe.errors import RecipeError
from lingen.sampling import clips as sampling
from lingen.sampling import precision
from lingen.sampling.clips import clip_size, encode_prompts, sample_latents, takes_of
from lingen.sampling.precision import lower, precision_of, set_precision
from lingen.training.average import AveragedWeights
from lingen.training.denoiser import LinGenModule
from tests.helpers.closeness import assert_close, relative_error
from tests.yardsticks.times import joined

PROMPTS = ["a red square", "a blue circle"]


@pytest.fixture
def module(tiny_recipe: Path) -> LinGenModule:
    """An untrained model whose zeros are perturbed, in eval."""
    torch.manual_seed(0)
    module = LinGenModule(lingen.load_recipe(tiny_recipe, ["model.dim=32"], stage="clips")).eval()
    for parameter in module.model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return module


def sample(module: LinGenModule, **settings: object) -> torch.Tensor:
    clip = clip_size(module)
    texts = joined(encode_prompts(module, PROMPTS, clip))
    return sample_latents(module, takes_of(PROMPTS), texts, clip, replace(module.recipe.sample, **settings))


def test_bfloat16_is_for_weights_that_only_multiply(module: LinGenModule):
    want = sample(module)
    assert precision_of(module.model) == "32-true"  # auto, on a CPU
    got = sample(module, precision="bf16-true")
    assert precision_of(module.model) == "bf16-true" and got.dtype == torch.float32
    assert 0 < relative_error(want, got) < 0.05
    kept = {name for name, parameter in module.model.named_parameters() if parameter.dtype == torch.float32}
    parts = {name.rpartition(".")[2] if "blocks" in name else name.partition(".")[0] for name in kept}
    assert parts == {"a_log", "d", "dt_bias", "weight", "modulation", "norm", "positions", "time", "unpatchify"}
    of_blocks = [name for name in kept if "blocks" in name and name.endswith("weight")]
    assert all("norm" in name or "modulation" in name for name in of_blocks)
    assert torch.equal(sample(module, precision="auto"), got)
    with pytest.raises(RecipeError, match="in bf16-true already; load them again for sample.precision=32-true"):
        sample(module, precision="32-true")


def test_a_model_in_training_keeps_its_weights(module: LinGenModule):
    module.average = AveragedWeights(module.trained_parameters(), 0.9)
    assert not set_precision(module, "fp8") and precision_of(module.model) == "32-true"


def test_the_trainers_bfloat16_decides_for_auto_on_cuda(module: LinGenModule, monkeypatch: pytest.MonkeyPatch):
    lowered: list[str] = []
    monkeypatch.setattr(precision, "lower", lambda model, wanted: lowered.append(wanted))
    monkeypatch.setattr(LinGenModule, "device", torch.device("cuda"))
    assert not set_precision(module, "auto") and not lowered
    module.recipe = replace(module.recipe, trainer={"precision": "bf16-mixed"})
    assert not set_precision(module, "auto") and lowered == ["bf16-true"]
    assert not set_precision(module, "32-true") and len(lowered) == 1
    module.average = AveragedWeights(module.trained_parameters(), 0.9)
    assert set_precision(module, "auto") and len(lowered) == 1


def test_eight_bits_from_the_norms_to_the_products(module: LinGenModule, monkeypatch: pytest.MonkeyPatch):
    want = sample(module, guidance=1.0)
    with pytest.raises(RecipeError, match="fp8 is for linear layers of 1,024 channels or more.*Use .*bf16-true"):
        sample(module, precision="fp8")
    monkeypatch.setattr(fp8, "SMALLEST_LAYER", 32)
    with torch.no_grad():
        lower(module.model, "fp8")
    block = module.model.blocks[0]
    assert isinstance(block.ffn.in_proj, Fp8Linear) and isinstance(block.cross_attention.q_proj, Fp8Linear)
    assert not isinstance(module.model.time.out, Fp8Linear)
    taken: dict[str, type] = {}
    for name in ("mixer", "ffn", "ffn.out_proj", "cross_attention.q_proj"):
        watch = lambda _, arguments, name=name: taken.__setitem__(name, type(arguments[0]))  # noqa: E731
        block.get_submodule(name).register_forward_pre_hook(watch)
    # As a mixer of someone else, which does not say so.
    monkeypatch.setattr(type(block.mixer), "wants_fp8", False, raising=False)
    got = sample(module, precision="fp8", guidance=1.0)
    assert taken == {"mixer": torch.Tensor} | dict.fromkeys(
        ("ffn", "ffn.out_proj", "cross_attention.q_proj"), Quantized
    )
    assert precision_of(module.model) == "fp8" and 0.001 < relative_error(want, got) < 0.1
    assert torch.equal(sample(module, precision="auto", guidance=1.0), got)
    with pytest.raises(RecipeError, match="in fp8 already"):
        sample(module, precision="bf16-true")


def test_guidance_in_one_batch_or_two_passes(module: LinGenModule, monkeypatch: pytest.MonkeyPatch):
    rows: list[int] = []
    module.model.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    one, two = sample(module, guidance_batch=True), sample(module, guidance_batch=False)
    assert rows == [4, 4, 2, 2, 2, 2]
    assert_close("latents", one, two, 1e-5)
    rows.clear()
    tokens = 2 * 2 * 2 * 2  # of two clips
    for limit, passes in ((tokens, [4, 4]), (tokens - 1, [2, 2, 2, 2])):
        monkeypatch.setattr(sampling, "GUIDANCE_TOKENS", limit)
        sample(module)
        assert rows == passes
        rows.clear()


def test_a_layer_of_someone_else_is_cast_as_a_whole():
    class Mixer(nn.Module):
        def __init__(self, dim: int, layer: int):
            super().__init__()
            self.norm, self.proj = nn.LayerNorm(dim), nn.Linear(dim, dim)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(self.norm(x))

    part = Mixer(16, 0)
    precision._cast(part)
    assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
    assert part(torch.randn(1, 2, 3, 4, 16).bfloat16()).dtype == torch.bfloat16
