"""The block in parts where no gradient is wanted, and how many blocks are computed again in the backward pass."""

import logging
from dataclasses import replace

import pytest
import torch

import lingen
import lingen.model
from lingen.blocks import block as block_file
from lingen.blocks.block import Block
from lingen.blocks.recompute import activation_bytes, recomputed_blocks
from lingen.model import LinGen
from lingen.plan.forecast import plan
from lingen.recipe.errors import SettingError
from lingen.recipe.sections import LinGenConfig

CONFIG = LinGenConfig(dim=16, depth=3, mixer={"name": "attention"}, channels=3, text_dims=(5,), max_grid=(4, 3, 5))


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("mixer", ["attention", "temporal_swin"])
def test_parts_give_what_the_whole_gives_and_leave_the_callers_tensor_alone(mixer, frames, monkeypatch):
    torch.manual_seed(0)
    block = Block(CONFIG, {"name": mixer}, 0).double()
    for parameter in block.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x, positions, modulation = random(2, 4, 3, 5, 16), random(4, 3, 5, 16), random(2, frames, 6, 16)
    text, mask = random(2, 7, 16), torch.rand(2, 7) > 0.3
    given, want = x.clone(), block(x, positions, modulation, text, mask)
    sizes = []
    block.ffn.register_forward_hook(lambda _, arguments, __: sizes.append(arguments[0][..., 0].numel()))
    with torch.no_grad():
        torch.testing.assert_close(block(x, positions, modulation, text, mask), want)
        monkeypatch.setattr(block_file, "PART_MULTIPLE", 16)
        monkeypatch.setattr(block_file, "PART_BYTES", 3 * 64 * 8 * 50)  # of float64, for the hidden width of 64
        torch.testing.assert_close(block(x, positions, modulation, text, mask), want)
    assert torch.equal(x, given)
    # 60 tokens a clip in parts of 48; a row of modulation for each frame keeps them together.
    assert sizes == [120, *([48, 12, 48, 12] if frames == 1 else [120])]


def build(checkpointing):
    torch.manual_seed(0)
    model = LinGen(replace(CONFIG, checkpointing=checkpointing, gate_init=1.0))
    torch.nn.init.normal_(model.unpatchify.weight)
    return model


def gib(recomputed, tokens):
    return activation_bytes(CONFIG, tokens, recomputed, False) / 2**30


def test_a_number_of_gib_recomputes_the_first_blocks_that_it_takes(caplog):
    caplog.set_level(logging.INFO, logger="lingen")
    lingen.model._say.cache_clear()  # other tests may have built the same
    inputs = torch.randn(2, 3, 4, 6, 10), torch.tensor([0.3, 0.7]), ((torch.randn(2, 4, 5), torch.ones(2, 4) > 0),)
    tokens = 2 * 4 * 3 * 5
    grads = []
    for recomputed in (0, 1, 2):
        model, calls = build(gib(recomputed, tokens) * 1.0001), []
        for index, block in enumerate(model.blocks):
            block.mixer.register_forward_hook(lambda *_, index=index, calls=calls: calls.append(index))
        model(*inputs).square().sum().backward()
        assert calls == [0, 1, 2, *reversed(range(recomputed))]
        grads.append([parameter.grad for parameter in model.parameters()])
        assert any(f"the first {recomputed} of 3 blocks are recomputed" in message for message in caplog.messages)
        with torch.no_grad():
            calls.clear()
            model(*inputs)
            assert calls == [0, 1, 2]
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


def test_the_forecast_of_activations():
    mixed = replace(CONFIG, mixer=["mate", {"name": "attention"}, {"name": "my_file:Mine"}])
    mate, attention, mine = (activation_bytes(replace(mixed, depth=1, mixer=[m]), 10, 0, False) for m in mixed.mixer)
    assert mine == mate > attention
    entry = 4 * 16 * 10  # a block's input, float32
    found = [activation_bytes(mixed, 10, k, False) for k in range(4)]
    assert found == [2 * mate + attention, mate + attention + entry, mate + 2 * entry, mate + 3 * entry]
    assert activation_bytes(mixed, 10, 0, True) < found[0] and activation_bytes(mixed, 20, 1, False) == 2 * found[1]
    for target, recomputed in [(found[0], 0), (found[1], 1), (found[1] - 1, 2), (1, 2)]:
        assert recomputed_blocks(replace(mixed, checkpointing=target / 2**30), 10, False) == recomputed
    assert [recomputed_blocks(replace(mixed, checkpointing=c), 10, False) for c in (False, True)] == [0, 3]


def test_the_plan_tells_what_recomputing_costs():
    kept, all_, some = (
        plan(lingen.load_recipe("quickstart_cpu", [f"model.checkpointing={c}"], stage="videos"))
        for c in ("false", "true", "0.05")
    )
    assert kept.training_flops["video"] == 3 * kept.flops["video"]
    assert all_.training_flops["video"] == 4 * kept.flops["video"]
    assert kept.training_flops["video"] < some.training_flops["video"] < all_.training_flops["video"]
    # An image batch needs less, so fewer of its blocks are recomputed.
    assert some.training_flops["image"] == kept.training_flops["image"]


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_target_of_nothing_is_refused(value):
    with pytest.raises(SettingError, match="Expected a number above 0 or true or false, got") as error:
        LinGen(replace(CONFIG, checkpointing=value))
    assert error.value.setting == "checkpointing"
