"""The denoiser: shapes, conditions, positions, and what its start promises."""

import pytest
import torch

from lingen import flow
from lingen.blocks.block import mixers_of
from lingen.blocks.positions import Positions, resize_tables, sin_cos
from lingen.kernels.kept import ALL, INPUT
from lingen.model import LinGen, seen_by_frames, token_grid
from lingen.recipe.errors import SettingError
from lingen.recipe.sections import LinGenConfig
from tests.helpers.closeness import assert_close
from tests.helpers.commands import run_python

MATE = {"name": "mate", "state_dim": 8, "head_dim": 8, "window": (2, 2, 2)}
ATTENTION = {"name": "attention"}
AUTOENCODER_CHANNELS, TEXT_DIMS = 3, (5, 7)


def config(**changes):
    tiny = dict(
        dim=16, depth=2, mixer=ATTENTION, channels=AUTOENCODER_CHANNELS, text_dims=TEXT_DIMS, max_grid=(4, 3, 5)
    )
    return LinGenConfig(**tiny | changes)


def build(perturb=0.1, **changes):
    """A small model in float64 whose zeros are perturbed, so that every path counts."""
    torch.manual_seed(0)
    model = LinGen(config(**changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(perturb * torch.randn_like(parameter))
    return model


def inputs(size=(4, 6, 10), rows=2, text_dims=TEXT_DIMS, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    text = tuple((randn(rows, n, w), torch.ones(rows, n, dtype=torch.bool)) for n, w in zip((4, 3), text_dims))  # noqa: B905
    return randn(rows, 3, *size), torch.linspace(0.3, 0.7, rows, dtype=torch.float64), text


@pytest.mark.parametrize("mixer", [MATE, ATTENTION])
@pytest.mark.parametrize(
    ("size", "patch"),
    [
        ((4, 6, 10), (1, 2, 2)),
        ((1, 2, 6), (1, 2, 2)),
        ((1, 6, 4), (2, 2, 2)),
        ((6, 6, 6), (3, 1, 2)),
        ((5, 3, 1), (1, 1, 1)),
    ],
)
@pytest.mark.parametrize("per_frame", [False, True])
def test_velocity_has_the_shape_of_the_latents(mixer, size, patch, per_frame):
    model = build(mixer=mixer, patch=patch)
    latents, time, text = inputs(size)
    velocity = model(latents, time[:, None].expand(-1, size[0]) if per_frame else time, text)
    assert velocity.shape == latents.shape and velocity.dtype == latents.dtype
    assert torch.isfinite(velocity).all() and (velocity != 0).all()


def test_patches_lie_where_they_came_from():
    """With layers that only copy, cutting and joining are each other's inverse."""
    model = build(perturb=0, dim=24, patch=(1, 2, 2), depth=1, channels=3)
    model.blocks = torch.nn.ModuleList()
    with torch.no_grad():
        model.patchify.weight.copy_(torch.eye(24, 12))
        model.patchify.bias.zero_()
        model.unpatchify.weight.copy_(torch.eye(12, 24))
        model.time.out.weight.zero_()
        model.time.out.bias.zero_()
    latents, time, text = inputs()
    patches = latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))
    rms = (patches.square().sum((1, 4, 6), keepdim=True) / 24).sqrt()
    want = (patches / rms).flatten(5, 6).flatten(3, 4)
    torch.testing.assert_close(model(latents, time, text), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixer", [MATE, ATTENTION])
def test_a_large_recipe_starts_at_zero_velocity_and_blind_to_the_text(mixer):
    model = build(perturb=0, mixer=mixer)
    latents, time, text = inputs()
    assert not model(latents, time, text).any()
    assert not any(block.cross_attention.out_proj.weight.any() for block in model.blocks)
    stream = torch.randn(2, 4, 3, 5, 16, dtype=torch.float64)
    modulation, (tokens, parts) = torch.zeros(2, 1, 6, 16).double(), model.text(text, 2)
    assert torch.equal(
        model.blocks[0](stream, torch.zeros(4, 3, 5, 16).double(), modulation, tokens, parts[:, None] != 0), stream
    )


def test_gates_start_at_gate_init_and_shifts_and_scales_at_zero():
    model = LinGen(config(gate_init=1.0))
    for block in model.blocks:
        assert torch.equal(block.modulation.weight, torch.tensor([0.0, 0, 1, 0, 0, 1])[:, None].expand(6, 16))
        assert block.cross_attention.out_proj.weight.any()
    assert not model.time.modulation.weight.any() and not model.unpatchify.weight.any()


def test_a_block_is_what_figure_2_draws():
    block, x = build().blocks[0], torch.randn(2, 4, 3, 5, 16, dtype=torch.float64)
    positions, shared = torch.randn(4, 3, 5, 16).double(), torch.randn(2, 4, 6, 16).double()
    text, mask = torch.randn(2, 7, 16).double(), torch.ones(2, 1, 7, dtype=torch.bool)
    rows = [(shared + block.modulation.weight)[:, :, i, None, None] for i in range(6)]
    y = x + rows[2] * block.mixer((block.mixer_norm(x) + positions) * (1 + rows[1]) + rows[0])
    y = y + block.cross_attention.attend(block.text_norm(y), block.cross_attention.keys(text, mask))
    y = y + rows[5] * block.ffn(block.ffn_norm(y) * (1 + rows[4]) + rows[3])
    torch.testing.assert_close(block(x, positions, shared, text, mask), y)


@pytest.mark.parametrize("changes", [{"mixer": MATE}, {"mixer": ATTENTION, "pool_text": True, "predict": "clip"}])
def test_gradients_reach_every_parameter(changes):
    model = build(**changes)
    latents, time, text = inputs((5, 6, 10))  # beyond the table of t, too
    text = tuple((tokens, mask.clone()) for tokens, mask in text)
    for _, mask in text:
        mask[0] = False  # a row that uses the null token
    (model(latents, time, text) * torch.randn_like(latents)).sum().backward()
    silent = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()
    ]
    assert silent == []


def test_each_frame_attends_to_its_own_part_of_the_text():
    torch.manual_seed(0)
    attention = build(gate_init=1.0).blocks[0].cross_attention
    x, text = torch.randn(2, 6, 2, 3, 16).double(), torch.randn(2, 5, 16).double()
    parts = torch.tensor([[1, 1, 2, 3, 0], [0, -1, 1, 1, 2]])
    seen, phase = seen_by_frames(parts, 6)
    shown = [[[0, 1], [0, 1], [2], [2], [3], [3]], [[1, 2, 3]] * 3 + [[1, 4]] * 3]
    assert [[row.nonzero().flatten().tolist() for row in clip] for clip in seen] == shown
    torch.testing.assert_close(phase, torch.tensor([[1, 3, 1, 3, 1, 3], [2 / 3, 2, 10 / 3] * 2]) / 4)
    whole = attention.attend(x, attention.keys(text, seen))
    for clip in range(2):
        for frame, words in enumerate(shown[clip]):
            own = text[clip : clip + 1, words]
            keys = attention.keys(own, torch.ones(1, 1, len(words), dtype=torch.bool))
            alone = attention.attend(x[clip : clip + 1, frame : frame + 1], keys)
            torch.testing.assert_close(whole[clip : clip + 1, frame : frame + 1], alone)


@pytest.mark.parametrize("pool_text", [False, True])
@pytest.mark.parametrize("level", [ALL, INPUT])
def test_parts_of_one_text_tell_what_a_text_of_one_part_tells_but_their_order(pool_text, level):
    """With one part everything is as without parts, but for the phase; an encoder without parts speaks to all frames;
    words of a part change the frames of other parts only by way of the mixers."""
    plain = build(pool_text=pool_text, checkpointing=level < ALL)
    model = LinGen(config(pool_text=pool_text, checkpointing=level < ALL, text_parts=True)).double()
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["phase.weight", "phase.bias"] and not model.phase.weight.any()
    latents, time, (first, second) = inputs()
    want = plain(latents, time, (first, second))
    assert_close("no parts", want, model(latents, time, (first, second)), 1e-12)
    one = torch.ones(2, 4, dtype=torch.long)
    assert_close("one part", want, model(latents, time, ((first[0], one), second)), 1e-12)
    for block in (*model.blocks, *plain.blocks):  # nothing passes from frame to frame
        torch.nn.init.zeros_(block.mixer.out_proj.weight)
    two = (first[0], torch.tensor([[1, 1, 2, 2], [1, 2, 2, 2]]))
    found = model(latents, time, (two, second))
    changed = first[0].clone()
    changed[:, 3] += 1
    other = model(latents, time, ((changed, two[1]), second))
    assert_close("frames of the first part", found[:, :, :2], other[:, :, :2], 1e-12)
    assert (found - other)[:, :, 2:].abs().amax((1, 2, 3, 4)).min() > 1e-6
    other.square().sum().backward()
    assert (
        all(p.grad is not None and p.grad.isfinite().all() for p in model.phase.parameters())
        and model.phase.bias.grad.any()
    )


@pytest.mark.parametrize("pool_text", [False, True])
def test_masked_text_changes_nothing_whatever_it_holds(pool_text):
    model = build(pool_text=pool_text)
    latents, time, text = inputs()
    want = model(latents, time, text)
    for garbage in (0.0, 1e6, float("nan"), float("inf")):
        padded = tuple(
            (torch.cat([tokens, torch.full_like(tokens[:, :2], garbage)], 1), torch.nn.functional.pad(mask, (0, 2)))
            for tokens, mask in text
        )
        got = model(latents, time, padded)
        assert_close("velocity", want, got, 1e-12)
        model.zero_grad()
        got.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("pool_text", [False, True])
def test_the_null_token_speaks_only_where_there_is_no_text(pool_text):
    model = build(pool_text=pool_text)
    latents, time, text = inputs()
    text = tuple((tokens, mask.clone()) for tokens, mask in text)
    for _, mask in text:
        mask[0] = False
    before = model(latents, time, text)
    with torch.no_grad():
        model.text.null.add_(1)
    after = model(latents, time, text)
    assert_close("with text", before[1], after[1], 1e-12)
    assert (after[0] - before[0]).abs().max() > 1e-6
    empty = tuple((torch.zeros_like(tokens[:, :1]), torch.zeros_like(mask[:, :1])) for tokens, mask in text)
    assert_close("without text", after[0], model(latents, time, empty)[0], 1e-12)


def test_text_of_either_encoder_is_heard_also_where_the_other_has_none():
    model = build()
    latents, time, (first, second) = inputs()
    silent = (second[0], torch.zeros_like(second[1]))
    outs = [
        model(latents, time, text) for text in ((first, second), (first, silent), ((first[0] + 1, first[1]), silent))
    ]
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(outs, outs[1:], strict=False))


def test_a_model_without_text_encoders_runs_on_the_null_token():
    model = build(text_dims=(), pool_text=True)
    latents, time, _ = inputs()
    assert torch.isfinite(model(latents, time, ())).all()


@pytest.mark.parametrize("mixer", [MATE, ATTENTION])
def test_samples_do_not_see_each_other(mixer):
    model = build(mixer=mixer, pool_text=True)
    latents, time, text = inputs(rows=3)
    together = model(latents, time, text)
    for row in range(3):
        one = slice(row, row + 1)
        alone = model(latents[one], time[one], tuple((tokens[one], mask[one]) for tokens, mask in text))
        assert_close(f"clip {row}", alone, together[one], 1e-12)


@pytest.mark.parametrize("predict", ["velocity", "clip"])
def test_one_time_for_all_frames_is_the_time_of_the_clip(predict):
    model = build(predict=predict, patch=(2, 2, 2))
    latents, time, text = inputs()
    per_frame = time[:, None].expand(-1, 4)
    torch.testing.assert_close(model(latents, per_frame, text), model(latents, time, text))
    mixed = per_frame + torch.tensor([0.1, -0.1, 0.0, 0.0])
    if predict == "velocity":  # each token takes the mean of its frames' times
        torch.testing.assert_close(model(latents, mixed, text), model(latents, time, text))
    later = per_frame + torch.tensor([0.0, 0.0, 0.1, 0.1])
    assert (model(latents, later, text) - model(latents, time, text)).abs().max() > 1e-6


def test_neighbouring_sampling_times_are_told_apart_under_autocast():
    """bfloat16 would turn 1000 t into steps of 4, and times of the schedule differ by 1e-3."""
    model = LinGen(config())
    torch.nn.init.normal_(model.time.modulation.weight)
    times = torch.tensor([[0.900], [0.901]])
    exact = model.time(times, None)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model.time(times, None)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(exact, autocast, strict=True))
    assert (exact[1][0] - exact[1][1]).abs().max() > 1e-3


@pytest.mark.parametrize("low", ["autocast", "weights"])
@pytest.mark.parametrize("mixer", [MATE, ATTENTION])
def test_bfloat16_is_close_to_float32(mixer, low):
    model = build(mixer=mixer, pool_text=True).float()
    latents, time, text = inputs()
    latents, time, text = latents.float(), time.float(), tuple((tokens.float(), mask) for tokens, mask in text)
    want = model(latents, time, text)
    with torch.autocast("cpu", torch.bfloat16, enabled=low == "autocast"):
        got = (model.bfloat16() if low == "weights" else model)(latents, time, text)
    assert got.dtype == torch.float32
    assert (got - want).square().mean().sqrt() < 0.05 * want.square().mean().sqrt()


@pytest.mark.parametrize("gate_init", [0.0, 1.0])
def test_gradients_stay_finite_at_depth_24_in_bfloat16(gate_init):
    torch.manual_seed(0)
    model = LinGen(config(depth=24, mixer=MATE, gate_init=gate_init, checkpointing=True))
    torch.nn.init.normal_(model.unpatchify.weight, std=0.1)
    latents, time, text = inputs()
    text = tuple((tokens.float(), mask) for tokens, mask in text)
    with torch.autocast("cpu", torch.bfloat16):
        model(latents.float(), time.float(), text).square().mean().backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert all(norm < 1e3 for norm in norms.values()), max(norms, key=norms.get)


def test_checkpointing_changes_neither_output_nor_gradients():
    models = [build(mixer=MATE, checkpointing=checkpointing) for checkpointing in (False, True)]
    latents, time, text = inputs()
    outs = [model(latents, time, text) for model in models]
    assert torch.equal(*outs)
    for out in outs:
        out.square().sum().backward()
    assert_close("gradient of", *({name: p.grad for name, p in model.named_parameters()} for model in models), 1e-12)


def test_predicting_the_clip_returns_the_velocity_that_leads_to_it():
    """An untrained last layer puts out a clip of zeros: from x, the way there is -x, in the time that is left."""
    model = build(perturb=0, predict="clip")
    noise, time, text = inputs()
    time = torch.tensor([0.5, 0.99], dtype=torch.float64)
    latents = flow.interpolate(noise, torch.zeros_like(noise), time)
    velocity = model(latents, time, text)
    torch.testing.assert_close(velocity[0], flow.target(noise, torch.zeros_like(noise))[0], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(velocity[1], -latents[1] / 0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t, c: (x, t, c, "a frame"), "condition is reserved for image-to-video"),
        (lambda x, t, c: (x[:, :2], t, c), "latents have 2 channels; this model takes 3"),
        (lambda x, t, c: (x[..., 1:], t, c), r"width 9 is no multiple of the patch's 2 \(patch: \[1, 2, 2\]\)"),
        (lambda x, t, c: (x[..., 1:, :], t, c), "height 5 is no multiple of the patch's 2"),
        (lambda x, t, c: (x, t[:, None].expand(2, 3), c), r"time has shape \[2, 3\]; give \[2\], or \[2, 4\]"),
        (lambda x, t, c: (x, t, c[:1]), r"tokens of widths \[5\]; this model takes \[5, 7\]"),
        (lambda x, t, c: (x, t, tuple((a[:1], m[:1]) for a, m in c)), "text has 1 rows for 2 latents"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    # Without the checker of shapes, which would stop most of these before the model does.
    forward = LinGen.forward.__wrapped__ if hasattr(LinGen.forward, "__wrapped__") else LinGen.forward
    with pytest.raises(ValueError, match=message):
        forward(build(), *change(*inputs()))


def test_grid_of_counts_a_short_clip_as_one_token():
    assert token_grid((1, 8, 6), (4, 2, 2)) == (1, 4, 3)
    assert token_grid((8, 8, 6), (4, 2, 2)) == (2, 4, 3)
    with pytest.raises(ValueError, match="frames 6 is no multiple of the patch's 4"):
        token_grid((6, 8, 6), (4, 2, 2))


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"num_heads": 3}, "num_heads"),
        ({"patch": (1, 0, 2)}, "patch"),
        ({"mixer": MATE | {"window": (0, 1, 1)}}, "window"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, setting):
    with pytest.raises(SettingError) as error:
        LinGen(config(**changes))
    assert error.value.setting == setting


def test_a_hybrid_counts_the_layers_of_each_mixer_by_its_name():
    mixers = [{"name": "mate", "window": (2, 2, 2)}, "attention", {"name": "mate"}]
    layers = mixers_of(config(mixer=mixers, depth=7))
    assert [layer for _, layer in layers] == [0, 0, 1, 2, 1, 3, 4]
    assert [component for component, _ in layers[:3]] == mixers


def test_a_hybrid_of_mate_and_attention_goes_through_every_order_and_shift():
    model = build(mixer=[MATE, ATTENTION], depth=8)
    mates = [block.mixer for block in model.blocks][::2]
    assert [mate.te.shifted for mate in mates] == [False, True, False, True]
    assert len({str(mate.ma.order) for mate in mates}) == 4


def test_positions_enter_the_mixer_and_never_the_stream():
    model = build()
    latents, time, text = inputs()
    with torch.no_grad():
        for block in model.blocks:  # shared modulation off, the mixer's gate shut
            block.modulation.weight[2] = 0
        model.time.modulation.weight.zero_()
        model.time.modulation.bias.zero_()
    shut = model(latents, time, text)
    with torch.no_grad():
        for table in model.positions.parameters():
            table.add_(torch.randn_like(table))
    assert torch.equal(model(latents, time, text), shut)
    with torch.no_grad():
        model.blocks[1].modulation.weight[2] = 1
    before = model(latents, time, text)
    with torch.no_grad():
        model.positions.h.add_(torch.randn_like(model.positions.h))
    assert not torch.allclose(model(latents, time, text), before)


def tables(t=5, h=8, w=8, dim=24, std=0.5):
    """Positions with learned tables, by which rows are told apart."""
    positions = Positions((t, h, w), dim, std)
    with torch.no_grad():
        for table in positions.parameters():
            table.add_(torch.randn_like(table))
    return positions


def whole(positions):
    return positions.t[:, None, None] + positions.h[:, None] + positions.w


def test_the_largest_grid_takes_the_tables_themselves():
    positions = tables()
    assert torch.equal(positions((5, 8, 8)), whole(positions))


def test_a_smaller_frame_of_the_same_shape_sees_the_whole_tables_interpolated():
    positions = tables()
    half = whole(positions).view(5, 4, 2, 4, 2, 24).mean((2, 4))
    torch.testing.assert_close(positions((5, 4, 4)), half)


def test_another_aspect_ratio_is_a_centred_crop():
    positions = tables()
    torch.testing.assert_close(positions((5, 4, 8)), whole(positions)[:, 2:6])
    torch.testing.assert_close(positions((5, 8, 2)), whole(positions)[:, :, 3:5])
    torch.testing.assert_close(positions((1, 2, 4)), tables_mean_of_crop(positions))


def tables_mean_of_crop(positions):
    return whole(positions)[:1, 2:6].view(1, 2, 2, 4, 2, 24).mean((2, 4))


def test_time_is_counted_never_stretched_and_an_image_is_frame_zero():
    positions = tables()
    assert torch.equal(positions((3, 8, 8)), whole(positions)[:3])
    assert torch.equal(positions((1, 8, 8)), whole(positions)[:1])
    longer = positions((9, 8, 8))
    assert torch.equal(longer[:5], whole(positions))
    torch.testing.assert_close(longer[5:, 0, 0], sin_cos(range(5, 9), 24, 0, 0.5) + positions.h[0] + positions.w[0])


def test_the_start_has_the_asked_for_size_and_tells_all_tokens_apart():
    positions = Positions((9, 6, 6), 96, 0.5)((9, 6, 6)).detach()
    assert abs(positions.square().mean().sqrt() - 0.5) < 1e-3
    flat = positions.flatten(0, 2)
    assert (torch.cdist(flat, flat) + torch.eye(len(flat)) * 9).min() > 0.5
    assert torch.equal(sin_cos(range(2, 5), 12, 1, 0.5), sin_cos(range(5), 12, 1, 0.5)[2:])


@pytest.mark.parametrize("grid", [(7, 4, 4), (2, 8, 4), (5, 16, 12)])
def test_resized_tables_say_of_the_new_grid_what_the_old_ones_said(grid):
    old = tables()
    state = {f"positions.{name}": table for name, table in old.state_dict().items()} | {"norm.weight": torch.ones(3)}
    resized = resize_tables(state, LinGenConfig(dim=24, max_grid=grid))
    new = Positions(grid, 24, 0.5)
    new.load_state_dict({axis: resized[f"positions.{axis}"] for axis in "thw"})
    torch.testing.assert_close(new(grid), old(grid))
    assert resized["norm.weight"] is state["norm.weight"]
    assert resize_tables({"norm.weight": state["norm.weight"]}, LinGenConfig()).keys() == {"norm.weight"}


@pytest.mark.parametrize(("mixer", "depth"), [("mate", 28), ("attention", 38)])
def test_lingen_4b_and_its_dit_twin_have_four_billion_parameters(mixer, depth):
    with torch.device("meta"):
        model = LinGen(
            config(
                dim=2560,
                depth=depth,
                mixer={"name": mixer},
                channels=16,
                text_dims=(4096, 1472, 1280),
                max_grid=(136, 32, 32),
            )
        )
    numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}
    of = {part: sum(n for name, n in numbers.items() if f".{part}." in name) for part in ("cross_attention", "ffn")}
    assert abs(sum(numbers.values()) / 4.0e9 - 1) < 0.05
    assert of == {"cross_attention": depth * (4 * 2560**2 + 2 * 128), "ffn": depth * 3 * 2560 * 6912}


def test_the_model_needs_none_of_the_libraries_of_data_and_recipes():
    code = (
        "import sys, lingen.model, lingen.flow, lingen.text.small, lingen.autoencoder.pixels;"
        "print(*{'av', 'webdataset', 'omegaconf', 'lightning'} & {*sys.modules})"
    )
    assert run_python("-c", code).strip() == ""


def test_what_autocast_remembers_elsewhere_is_left_alone():
    """Inside of autocast the model forgets its weights' copies; outside of it nothing is switched off for others."""
    model = build()
    model(*inputs())
    assert torch.is_autocast_cache_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        model(*inputs())
        assert not torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled()
