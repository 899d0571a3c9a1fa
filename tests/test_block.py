"""The block in parts where no gradient is wanted, and how many blocks are computed again in the backward pass."""

import logging
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import lingen
import lingen.model
from lingen.blocks import block as block_file
from lingen.blocks.block import Block
from lingen.blocks.recompute import AT_WORK, activation_bytes, kept_by_blocks
from lingen.kernels.kept import ALL, INPUT, NARROW, PRODUCTS
from lingen.model import LinGen
from lingen.plan.forecast import plan
from lingen.plan.memory_tracker import MemoryTracker
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
    text, mask = random(2, 7, 16), torch.rand(2, 1, 7) > 0.3
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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixer", ["attention", "mate", "linear_attention"])
def test_whatever_is_kept_the_gradients_are_those_of_everything(mixer, precision, monkeypatch):
    settings = {"state_dim": 4, "head_dim": 8, "window": (2, 2, 2)} if mixer == "mate" else {}
    torch.manual_seed(0)
    model = LinGen(replace(CONFIG, mixer={"name": mixer, **settings}, gate_init=1.0))
    torch.nn.init.normal_(model.unpatchify.weight)
    inputs = torch.randn(2, 3, 4, 6, 10), torch.tensor([0.3, 0.7]), ((torch.randn(2, 4, 5), torch.ones(2, 4) > 0),)
    flops, grads = {}, {}
    for levels in ([ALL] * 3, [PRODUCTS] * 3, [NARROW] * 3, [INPUT] * 3, [INPUT, NARROW, ALL]):
        monkeypatch.setattr(model, "_levels", lambda _, levels=levels: levels)
        model.zero_grad()
        low = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
        with low, FlopCounterMode(display=False) as counter:
            loss = model(*inputs).square().sum()
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops[tuple(levels)] = counter.get_total_flops() / forward
        grads[tuple(levels)] = {name: parameter.grad for name, parameter in model.named_parameters()}
    first, *others = grads.values()
    for other in others:
        for name, want in first.items():
            assert torch.equal(want, other[name]), name
    assert sorted(flops.values()) == [flops[(level,) * 3] for level in (ALL, PRODUCTS)] + sorted(
        [flops[(NARROW,) * 3], flops[(INPUT, NARROW, ALL)]]
    ) + [flops[(INPUT,) * 3]]


def test_a_second_backward_pass_computes_again_what_the_first_one_used_up():
    torch.manual_seed(0)
    block = Block(CONFIG, {"name": "attention"}, 0)
    x = torch.randn(2, 4, 3, 5, 16, requires_grad=True)
    rest = torch.randn(4, 3, 5, 16), torch.randn(2, 1, 6, 16), torch.randn(2, 7, 16), torch.ones(2, 1, 7) > 0
    (want,) = torch.autograd.grad(block(x, *rest).square().sum(), x)
    loss = block(x, *rest, PRODUCTS).square().sum()
    for _ in range(2):
        (found,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(found, want)


def test_a_block_that_keeps_products_lets_go_of_the_rest():
    """What lives between the passes: of the results of weights alone, beside the input."""
    torch.manual_seed(0)
    block = Block(CONFIG, {"name": "attention"}, 0)
    rest = torch.randn(4, 3, 5, 16), torch.randn(2, 1, 6, 16), torch.randn(2, 7, 16), torch.ones(2, 1, 7) > 0
    sizes = {}
    for level in (INPUT, NARROW, PRODUCTS, ALL):
        with FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker() as tracker:
            x = torch.randn(2, 4, 3, 5, 16, requires_grad=True)
            before = tracker.total
            out = block(x, *rest, level)
            sizes[level] = (tracker.total - before - out.nbytes) / (120 * 16)
            del out, x
    # queries, results of the attentions and of the feed-forward; keys and values, gate and up, which are four times
    # as wide as a token; and those of seven text tokens instead of sixty
    assert sizes[INPUT] < 1 < sizes[NARROW] == pytest.approx(4 * 4, abs=1.5)
    assert sizes[PRODUCTS] == pytest.approx(4 * (4 + 3 + 8), abs=2.5) and sizes[PRODUCTS] < sizes[ALL]


def test_a_number_of_gib_is_kept_to_from_the_last_block_on(caplog):
    caplog.set_level(logging.INFO, logger="lingen")
    lingen.model._say.cache_clear()  # other tests may have built the same
    inputs = torch.randn(2, 3, 4, 6, 10), torch.tensor([0.3, 0.7]), ((torch.randn(2, 4, 5), torch.ones(2, 4) > 0),)
    for want in ([INPUT, INPUT, ALL], [INPUT, NARROW, ALL], [PRODUCTS, PRODUCTS, ALL], [ALL, ALL, ALL]):
        gib = activation_bytes(CONFIG, 120, want, False) / 2**30
        torch.manual_seed(0)
        model, calls = LinGen(replace(CONFIG, checkpointing=gib * 1.0001, gate_init=1.0)), []
        for index, block in enumerate(model.blocks):
            block.mixer.register_forward_hook(lambda *_, index=index, calls=calls: calls.append(index))
        model(*inputs).square().sum().backward()
        again = [index for index in reversed(range(3)) if want[index] < ALL]
        assert calls == [0, 1, 2, *again]
        counts = [want.count(level) for level in (INPUT, NARROW, PRODUCTS, ALL)]
        told = "{} blocks keep their input alone, {} also narrow products, {} all products and {} everything"
        assert any(told.format(*counts) in message for message in caplog.messages)
        with torch.no_grad():
            calls.clear()
            model(*inputs)
            assert calls == [0, 1, 2]


def test_the_forecast_of_activations():
    mixed = replace(CONFIG, mixer=["mate", {"name": "attention"}, {"name": "my_file:Mine"}])
    mate, attention, mine = (
        activation_bytes(replace(mixed, depth=1, mixer=[m]), 10, [ALL], False) / AT_WORK for m in mixed.mixer
    )
    assert mine == mate > attention
    entry = 4 * 16 * 10  # a block's input, float32
    everything, last, inputs = ([ALL] * 3, [INPUT, INPUT, ALL], [INPUT] * 3)
    found = [activation_bytes(mixed, 10, levels, False) for levels in (everything, last, inputs)]
    work = AT_WORK * mate
    assert found == pytest.approx([mate + attention + work, 2 * entry + work, 3 * entry + work], abs=2)
    assert activation_bytes(mixed, 10, everything, True) < found[0]
    assert activation_bytes(mixed, 20, last, False) == pytest.approx(2 * found[1], abs=2)
    for target, levels in [(found[0] + 1, everything), (found[1] + 1, last), (1, last)]:
        assert kept_by_blocks(replace(mixed, checkpointing=target / 2**30), 10, False) == levels
    assert [kept_by_blocks(replace(mixed, checkpointing=c), 10, False) for c in (False, True)] == [everything, inputs]
    targets = [found[1] + (found[0] - found[1]) * share / 50 for share in range(51)]
    chosen = [kept_by_blocks(replace(mixed, checkpointing=target / 2**30), 10, False) for target in targets]
    assert all(a <= b for before, after in pairwise(chosen) for a, b in zip(before, after, strict=True))
    assert all(max(levels[:-1]) - min(levels[:-1]) <= 1 and levels[0] <= levels[1] for levels in chosen)
    assert all(
        activation_bytes(mixed, 10, levels, False) <= target + 1 for levels, target in zip(chosen, targets, strict=True)
    )


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
