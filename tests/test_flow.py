"""Flow matching: the path, its target, times, schedules, solvers, guidance."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingen import flow
from lingen.recipe.reading import shipped_recipes
from lingen.recipe.sections import SampleConfig, TimeConfig
from tests.yardsticks.times import kept, kept_by_recipe, late, late_share, stacked

LOGIT_NORMAL = TimeConfig(shift=1.0)
UNIFORM = TimeConfig(distribution="uniform", shift=1.0)


def times(config: TimeConfig = LOGIT_NORMAL, shift: float | None = None, tokens: int = 1) -> flow.Times:
    return flow.Times(config if shift is None else replace(config, shift=shift), tokens)


def schedule(steps: int, kind: str, emulated_steps: int = 250, shift: float = 1.0) -> torch.Tensor:
    return times(shift=shift).schedule(SampleConfig(steps=steps, schedule=kind, emulated_steps=emulated_steps))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_path_starts_at_noise_ends_at_data_and_its_slope_is_the_target():
    noise, data = randn(3, 2, 4, 2, 2), randn(3, 2, 4, 2, 2, seed=1)
    assert torch.equal(flow.interpolate(noise, data, torch.zeros(3).double()), noise)
    torch.testing.assert_close(flow.interpolate(noise, data, torch.ones(3).double()), data + 1e-5 * noise)
    time = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    slope = (flow.interpolate(noise, data, time + 1e-3) - flow.interpolate(noise, data, time)) / 1e-3
    torch.testing.assert_close(slope, flow.target(noise, data), rtol=1e-9, atol=1e-9)


def test_a_time_for_each_frame_mixes_each_frame_by_itself():
    noise, data = randn(2, 3, 4, 2, 2), randn(2, 3, 4, 2, 2, seed=1)
    time = torch.rand(2, 4, dtype=torch.float64)
    mixed = flow.interpolate(noise, data, time)
    for frame in range(4):
        alone = flow.interpolate(noise[:, :, frame], data[:, :, frame], time[:, frame])
        assert torch.equal(mixed[:, :, frame], alone)


def test_auto_shift_goes_through_its_anchors_and_never_below_1():
    shifts = [times(TimeConfig(), tokens=tokens).shift for tokens in (1, 36, 256, 4096, 34_816, 139_264, 10**9)]
    assert shifts == sorted(shifts) and shifts[0] >= 1
    assert (shifts[2], shifts[5]) == pytest.approx((flow.IMAGE_ANCHOR[1], flow.VIDEO_ANCHOR[1]))
    assert times(shift=2.5, tokens=7).shift == 2.5
    of_t2v_68s = [times(TimeConfig(), tokens=tokens).shift for tokens in (256, 1024, 8704, 34_816, 69_632, 139_264)]
    assert of_t2v_68s == pytest.approx([3.0, 3.4, 4.0, 4.5, 4.7, 5.0], abs=0.05)  # as its recipe says


@given(st.floats(0, 1), st.floats(0.1, 10))
def test_a_shift_above_one_moves_towards_noise_and_its_inverse_undoes_it(time, shift):
    time = torch.tensor(time, dtype=torch.float64)
    shifted = flow.shift_time(time, shift)
    assert 0 <= shifted <= 1
    assert shifted <= time + 1e-12 if shift >= 1 else shifted >= time - 1e-12
    torch.testing.assert_close(flow.shift_time(shifted, 1 / shift), time, rtol=1e-9, atol=1e-9)


def test_shift_of_three_at_one_half():
    assert flow.shift_time(torch.tensor(0.5), 3.0) == 0.25


@pytest.mark.parametrize(("config", "below"), [(LOGIT_NORMAL, 0.1359), (UNIFORM, 0.25)])
def test_training_times_have_the_quantiles_of_their_distribution(config, below):
    """P(sigmoid(n) < 1/4) = P(n < -log 3) = 0.136; 40,000 draws have a standard error of 0.002."""
    time = times(config).draw(40_000, torch.Generator().manual_seed(0))
    assert time.dtype == torch.float32
    assert abs((time < 0.25).float().mean() - below) < 0.01
    shifted = times(config, 3.0).draw(40_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(shifted, flow.shift_time(time, 3.0))


def test_mean_and_std_of_the_normal():
    config = TimeConfig(mean=1.0, std=0.5)
    normal = torch.logit(times(config, 1.0).draw(10_000, torch.Generator().manual_seed(0)).double())
    assert abs(normal.mean() - 1) < 0.02 and abs(normal.std() - 0.5) < 0.02


def test_noise_that_threads_draw_is_that_of_each_sample_alone():
    shape, slots = (2, 16, 128, 128), torch.arange(5)
    assert len(slots) * math.prod(shape) > flow.MANY > math.prod(shape)
    every = flow.sample_draws(shape, slots, (7, "t2v"), times())
    for number, alone in (
        (number, flow.sample_draws(shape, slots[number:][:1], (7, "t2v"), times())) for number in slots
    ):
        assert all(torch.equal(whole[number], one[0]) for whole, one in zip(every, alone, strict=True))


def test_what_a_sample_draws_depends_on_its_slot_alone():
    every = flow.sample_draws((2, 3, 4, 4), torch.arange(6), (7, "t2v"), times(shift=2.0))
    parts = [
        flow.sample_draws((2, 3, 4, 4), slots, (7, "t2v"), times(shift=2.0)) for slots in torch.arange(6).view(3, 2)
    ]
    for whole, pieces in zip(every, zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(pieces))
    assert every.noise.shape == (6, 2, 3, 4, 4) and every.times.shape == every.uniform.shape == (6,)
    assert len({*every.times.tolist(), *every.uniform.tolist(), *every.noise[:, 0, 0, 0, 0].tolist()}) == 18


@pytest.mark.parametrize("stream", [(8, "t2v"), (7, "t2i")])
def test_another_seed_or_stage_draws_other_numbers(stream):
    first = flow.sample_draws((2, 1, 2, 2), torch.arange(2), (7, "t2v"), times())
    other = flow.sample_draws((2, 1, 2, 2), torch.arange(2), stream, times())
    assert all((a != b).all() for a, b in zip(first, other, strict=True))


def test_noise_is_standard_normal_and_independent_of_the_drop():
    draws = flow.sample_draws((1, 1, 2, 2), torch.arange(3000), (0, "x"), times())
    assert abs(draws.noise.mean()) < 0.04 and abs(draws.noise.std() - 1) < 0.03
    assert abs((draws.uniform < 0.1).float().mean() - 0.1) < 0.02
    pairs = torch.stack([draws.uniform, draws.times, draws.noise[:, 0, 0, 0, 0]])
    assert (torch.corrcoef(pairs) - torch.eye(3)).abs().max() < 0.07


def published(steps, emulated_steps):
    """Movie Gen's linear-quadratic schedule, coefficient by coefficient."""
    s, half = steps, steps // 2
    tau, q = half / emulated_steps, s - half
    d = half - tau * s
    a, b, c = d / (half * q**2), tau / half - 2 * d / q**2, d * half / q**2
    return [i * tau / half if i <= half else a * i**2 + b * i + c for i in range(s + 1)]


@pytest.mark.parametrize("steps", [2, 7, 20, 50])
@pytest.mark.parametrize("emulated_steps", [250, 1000])
@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_linear_quadratic_is_the_published_formula_whatever_the_shift_of_training(steps, emulated_steps, shift):
    found = schedule(steps, "linear_quadratic", emulated_steps, shift)
    torch.testing.assert_close(found, torch.tensor(published(steps, emulated_steps)), rtol=1e-6, atol=1e-7)


@given(st.integers(1, 300), st.sampled_from(["linear_quadratic", "uniform"]), st.integers(1, 1000), st.floats(0.2, 8))
@settings(deadline=None)
def test_every_schedule_rises_from_0_to_1_exactly(steps, kind, emulated_steps, shift):
    found = schedule(steps, kind, emulated_steps, shift)
    assert len(found) == steps + 1 and found[0] == 0 and found[-1] == 1
    assert (found.diff() > 0).all()


def test_a_uniform_schedule_is_shifted_as_the_training_times_are():
    torch.testing.assert_close(schedule(4, "uniform", shift=3.0), flow.shift_time(torch.linspace(0, 1, 5), 3.0))


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="no solver called 'rk4'.*euler, heun, ab2"):
        flow.solve(lambda x, t: x, randn(1, 2), torch.linspace(0, 1, 3), "rk4")


@pytest.mark.parametrize("config", [LOGIT_NORMAL, UNIFORM, TimeConfig(mean=0.5, std=0.7)])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_the_density_is_that_of_the_times_that_are_drawn(config, shift):
    """A histogram of 200,000 draws: at most 1.5% of them lie in another bin than the density says."""
    edges = torch.linspace(0, 1, 41, dtype=torch.float64)
    middles = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    share = times(config, shift).density(middles).view(40, 1000).mean(1) / 40
    drawn = times(config, shift).draw(200_000, torch.Generator().manual_seed(0)).double()
    counted = torch.histogram(drawn, edges)[0] / 200_000
    assert float(share.sum()) == pytest.approx(1, abs=2e-3)
    assert float((share - counted).abs().sum()) / 2 < 0.015


@pytest.mark.parametrize(("emulated_steps", "shift", "share"), [(1000, 1.0, 0.38), (250, 1.0, 0.08), (1000, 4.0, 0.08)])
def test_share_of_steps_at_times_that_training_hardly_saw(emulated_steps, shift, share):
    found = schedule(50, "linear_quadratic", emulated_steps, shift)
    assert times(shift=shift).untrained_share(found) == pytest.approx(share)
    assert times(UNIFORM, shift).untrained_share(found) == 0


def test_a_narrow_distribution_leaves_most_times_untrained():
    assert times(TimeConfig(std=0.1), 1.0).untrained_share(schedule(100, "uniform")) > 0.7


@pytest.mark.parametrize(
    ("kind", "shift", "solver", "wanted"),
    [
        ("uniform", 1.0, "euler", (0.962, 0.914)), ("uniform", 4.0, "euler", (0.891, 0.713)),
        ("linear_quadratic", 4.0, "euler", (0.891, 0.739)), ("uniform", 1.0, "ab2", (0.999, 0.987)),
        ("uniform", 4.0, "ab2", (0.989, 0.858)), ("linear_quadratic", 1.0, "ab2", (0.987, 0.879)),
    ],
)  # fmt: skip
def test_what_50_steps_keep_of_a_gaussian(kind, shift, solver, wanted):
    found = [kept(schedule(50, kind, shift=shift), solver, deviation) for deviation in (0.3, 0.1)]
    assert found == pytest.approx(list(wanted), abs=6e-4)


@pytest.mark.parametrize(("solver", "wanted"), [("euler", (0.668, 0.324)), ("ab2", (0.862, 0.434))])
def test_what_was_lost_where_schedule_and_shift_were_stacked(solver, wanted):
    """As docs/model.md has it: 37 of 50 steps start below t = 0.1, and the last one is 0.222 long."""
    times = stacked()
    assert (times[:-1] < 0.1).sum() == 37 and times.diff()[-1] == pytest.approx(0.222, abs=5e-4)
    assert [kept(times, solver, one) for one in (0.3, 0.1)] == pytest.approx(list(wanted), abs=6e-4)


@pytest.mark.parametrize("name", [name for name, path in shipped_recipes().items()])
def test_every_shipped_recipe_keeps_enough_of_a_gaussian(name):
    """The floor of docs/model.md, for every stage at its longest clips; an autoencoder has no sampling times."""
    assert all(share >= 0.85 for share in kept_by_recipe(name).values()), kept_by_recipe(name)


def test_no_recipe_that_predicts_clips_spends_its_loss_on_times_close_to_the_data():
    """Where `shift: auto` was the root of tokens / 8,704, footage_64 spent 81% of it above 0.9 (docs/model.md)."""
    assert late_share(times(shift=math.sqrt(256 / 8704))) == pytest.approx(0.812, abs=1e-3)
    shares = {(row["recipe"], row["stage"]): float(row["share"].rstrip("%")) for row in late()}
    assert len(shares) >= 6 and shares["footage_64", "short"] == 2.9
    assert max(shares.values()) < 10


@pytest.mark.parametrize("solver", flow.SOLVERS)
@pytest.mark.parametrize("kind", ["linear_quadratic", "uniform"])
def test_the_exact_velocity_of_a_point_leads_to_it(solver, kind):
    """Where all data are one clip, the velocity at (x, t) is known, and the path to it is a straight line."""
    clip, noise = randn(1, 3, 2, 4, 4), randn(2, 3, 2, 4, 4, seed=1)
    s = flow.SIGMA_MIN

    def velocity(x, time):
        x0 = (x - time.double() * clip) / (1 - (1 - s) * time.double())
        return flow.target(x0, clip.expand_as(x0))

    out = flow.solve(velocity, noise, schedule(9, kind, shift=2.0), solver)
    torch.testing.assert_close(out, clip + s * noise, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_order_of_the_solver(solver, order):
    """dx/dt = -2 t x from x = 1 ends at 1 / e: half the step, error down by 2 ** order."""

    def error(steps):
        at = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        return abs(flow.solve(lambda x, t: -2 * t * x, torch.ones(1).double(), at, solver).item() - math.exp(-1))

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.1)


def test_progress_counts_the_steps():
    seen = []
    flow.solve(
        lambda x, t: x, randn(1, 2), torch.linspace(0, 1, 4), "heun", lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_guidance_extrapolates_from_no_text_through_the_text():
    conditional, unconditional = randn(2, 3, 2, 4, 4), randn(2, 3, 2, 4, 4, seed=1)
    assert torch.equal(flow.guided(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(flow.guided(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(flow.guided(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional)


def test_rescaling_brings_each_sample_back_to_the_spread_of_the_conditional_velocity():
    conditional, unconditional = randn(2, 3, 2, 4, 4), randn(2, 3, 2, 4, 4, seed=1)
    plain, full = (flow.guided(conditional, unconditional, 7.5, rescale) for rescale in (0.0, 1.0))
    assert (plain.std((1, 2, 3, 4)) > 4 * conditional.std((1, 2, 3, 4))).all()
    torch.testing.assert_close(full.std((1, 2, 3, 4)), conditional.std((1, 2, 3, 4)))
    torch.testing.assert_close(flow.guided(conditional, unconditional, 7.5, 0.25), 0.25 * full + 0.75 * plain)
    zero = torch.zeros_like(conditional)
    assert torch.equal(flow.guided(zero, zero, 7.5, 1.0), zero)


def test_stacked_texts_keep_their_tokens_and_mask_the_padding():
    long, short = (
        (randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)),
        (randn(2, 1, 4), torch.zeros(2, 1, dtype=torch.bool)),
    )
    for first, second in ((short, long), (long, short)):
        tokens, mask = flow.stack_text(first, second)
        assert tokens.shape == (4, 5, 4) and mask.shape == (4, 5)
        for rows, (own, own_mask) in zip((slice(0, 2), slice(2, 4)), (first, second), strict=True):
            n = own.shape[1]
            assert torch.equal(tokens[rows, :n], own) and torch.equal(mask[rows, :n], own_mask)
            assert not mask[rows, n:].any()
