"""Flow matching: the path, its target, times, schedules, solvers, guidance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingen import flow
from lingen.recipe.sections import TimeConfig

LOGIT_NORMAL = TimeConfig()
UNIFORM = TimeConfig(distribution="uniform")


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


def test_auto_shift_is_one_at_17_seconds_of_256p_and_4_at_68_seconds_of_512p():
    assert flow.resolve_shift("auto", 8704) == 1
    assert flow.resolve_shift("auto", 139_264) == 4
    assert flow.resolve_shift(2.5, 7) == 2.5


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
    time = flow.sample_times(40_000, config, 1.0, torch.Generator().manual_seed(0))
    assert time.dtype == torch.float32
    assert abs((time < 0.25).float().mean() - below) < 0.01
    shifted = flow.sample_times(40_000, config, 3.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(shifted, flow.shift_time(time, 3.0))


def test_mean_and_std_of_the_normal():
    config = TimeConfig(mean=1.0, std=0.5)
    normal = torch.logit(flow.sample_times(10_000, config, 1.0, torch.Generator().manual_seed(0)).double())
    assert abs(normal.mean() - 1) < 0.02 and abs(normal.std() - 0.5) < 0.02


def test_what_a_sample_draws_depends_on_its_slot_alone():
    every = flow.sample_draws((2, 3, 4, 4), torch.arange(6), (7, "t2v"), LOGIT_NORMAL, 2.0)
    parts = [
        flow.sample_draws((2, 3, 4, 4), slots, (7, "t2v"), LOGIT_NORMAL, 2.0) for slots in torch.arange(6).view(3, 2)
    ]
    for whole, pieces in zip(every, zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(pieces))
    assert every.noise.shape == (6, 2, 3, 4, 4) and every.times.shape == every.uniform.shape == (6,)
    assert len({*every.times.tolist(), *every.uniform.tolist(), *every.noise[:, 0, 0, 0, 0].tolist()}) == 18


@pytest.mark.parametrize("stream", [(8, "t2v"), (7, "t2i")])
def test_another_seed_or_stage_draws_other_numbers(stream):
    first = flow.sample_draws((2, 1, 2, 2), torch.arange(2), (7, "t2v"), LOGIT_NORMAL, 1.0)
    other = flow.sample_draws((2, 1, 2, 2), torch.arange(2), stream, LOGIT_NORMAL, 1.0)
    assert all((a != b).all() for a, b in zip(first, other, strict=True))


def test_noise_is_standard_normal_and_independent_of_the_drop():
    draws = flow.sample_draws((1, 1, 2, 2), torch.arange(3000), (0, "x"), LOGIT_NORMAL, 1.0)
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
def test_linear_quadratic_is_the_published_formula(steps, emulated_steps):
    times = flow.schedule(steps, "linear_quadratic", emulated_steps, 1.0)
    torch.testing.assert_close(times, torch.tensor(published(steps, emulated_steps)), rtol=1e-6, atol=1e-7)


@given(st.integers(1, 300), st.sampled_from(["linear_quadratic", "uniform"]), st.integers(1, 1000), st.floats(0.2, 8))
@settings(deadline=None)
def test_every_schedule_rises_from_0_to_1_exactly(steps, kind, emulated_steps, shift):
    times = flow.schedule(steps, kind, emulated_steps, shift)
    assert len(times) == steps + 1 and times[0] == 0 and times[-1] == 1
    assert (times.diff() > 0).all()


def test_a_schedule_is_shifted_as_the_training_times_are():
    times = flow.schedule(4, "uniform", 250, 3.0)
    torch.testing.assert_close(times, flow.shift_time(torch.linspace(0, 1, 5), 3.0))


def test_no_steps_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        flow.schedule(0, "uniform", 250, 1.0)
    with pytest.raises(ValueError, match="no schedule called 'cosine'.*linear_quadratic, uniform"):
        flow.schedule(4, "cosine", 250, 1.0)
    with pytest.raises(ValueError, match="no solver called 'rk4'.*euler, heun"):
        flow.solve(lambda x, t: x, randn(1, 2), torch.linspace(0, 1, 3), "rk4")


@pytest.mark.parametrize(("emulated_steps", "share"), [(1000, 0.4), (250, 0.1)])
@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_share_of_steps_at_times_that_training_hardly_saw(emulated_steps, share, shift):
    times = flow.schedule(50, "linear_quadratic", emulated_steps, shift)
    assert flow.untrained_share(times, LOGIT_NORMAL, shift) == pytest.approx(share)
    assert flow.untrained_share(times, UNIFORM, shift) == 0


def test_a_narrow_distribution_leaves_most_times_untrained():
    times = flow.schedule(100, "uniform", 250, 1.0)
    assert flow.untrained_share(times, TimeConfig(std=0.1), 1.0) > 0.7


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("kind", ["linear_quadratic", "uniform"])
def test_the_exact_velocity_of_a_point_leads_to_it(solver, kind):
    """Where all data are one clip, the velocity at (x, t) is known, and the path to it is a straight line."""
    clip, noise = randn(1, 3, 2, 4, 4), randn(2, 3, 2, 4, 4, seed=1)
    s = flow.SIGMA_MIN

    def velocity(x, time):
        x0 = (x - time.double() * clip) / (1 - (1 - s) * time.double())
        return flow.target(x0, clip.expand_as(x0))

    out = flow.solve(velocity, noise, flow.schedule(9, kind, 250, 2.0), solver)
    torch.testing.assert_close(out, clip + s * noise, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_the_solver(solver, order):
    """dx/dt = -2 t x from x = 1 ends at 1 / e: half the step, error down by 2 ** order."""

    def error(steps):
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        return abs(flow.solve(lambda x, t: -2 * t * x, torch.ones(1).double(), times, solver).item() - math.exp(-1))

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
