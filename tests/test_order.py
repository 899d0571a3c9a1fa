"""The order of training: exact shares of the kinds, every sample once an epoch, ranks and resumes that agree."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lingen.config import DataConfig, PerKind
from lingen.data import order

mixes = st.builds(PerKind, image=st.integers(0, 7), video=st.integers(0, 120)).filter(lambda m: m.image + m.video > 0)
batches = st.builds(PerKind, image=st.integers(1, 5), video=st.integers(1, 3))
STREAM = (0, "main", "video")

settings.register_profile("patient", deadline=None)  # the cores may be busy with other things
settings.load_profile("patient")


@given(mixes, st.integers(0, 10**12))
def test_every_round_holds_the_exact_share_of_each_kind(mix: PerKind, start: int) -> None:
    kinds = Counter(order.kind_of(step, mix) for step in range(start, start + mix.image + mix.video))
    assert kinds == Counter(image=mix.image, video=mix.video)


def test_one_image_step_for_every_hundred_video_steps() -> None:
    kinds = [order.kind_of(step, PerKind(image=1, video=100)) for step in range(1010)]
    assert [step for step, kind in enumerate(kinds) if kind == "image"] == list(range(0, 1010, 101))


@given(mixes, st.integers(0, 10**6))
def test_the_rarer_kind_is_spread_evenly(mix: PerKind, start: int) -> None:
    rare, often = sorted(order.KINDS, key=lambda kind: getattr(mix, kind))
    assume(getattr(mix, rare) > 0)
    steps = [s for s in range(start, start + 3 * (mix.image + mix.video)) if order.kind_of(s, mix) == rare]
    gaps = {after - before for before, after in zip(steps, steps[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1


@given(mixes, st.integers(0, 300))
def test_count_before_counts(mix: PerKind, step: int) -> None:
    for kind in order.KINDS:
        assert order.count_before(kind, step, mix) == sum(order.kind_of(s, mix) == kind for s in range(step))


@pytest.mark.parametrize("mix", [PerKind(image=0, video=0), PerKind(image=-1, video=2)])
def test_an_impossible_mix_is_refused(mix: PerKind) -> None:
    with pytest.raises(ValueError, match="data.mix needs two numbers"):
        order.kind_of(0, mix)


@given(st.integers(1, 400), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(order.permute(i, size, key) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 5, 17])
def test_every_place_gets_every_sample_equally_often(size: int) -> None:
    trials = 3000
    seen = Counter(
        (i, order.sample_at(epoch * size + i, size, STREAM)[1]) for epoch in range(trials) for i in range(size)
    )
    chi_square = sum((seen[i, j] - trials / size) ** 2 for i in range(size) for j in range(size)) / (trials / size)
    freedom = (size - 1) ** 2
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


@given(st.integers(1, 60), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_visits_every_sample_once(size: int, epoch: int, seed: int) -> None:
    drawn = [order.sample_at(n, size, (seed, "main", "video")) for n in range(epoch * size, (epoch + 1) * size)]
    assert {e for e, _ in drawn} == {epoch}
    assert sorted(index for _, index in drawn) == list(range(size))


def test_epochs_seeds_stages_and_kinds_differ_and_runs_agree() -> None:
    def epoch(number: int, stream: tuple[object, ...]) -> list[int]:
        return [order.sample_at(number * 50 + i, 50, stream)[1] for i in range(50)]

    orders = [epoch(0, STREAM), epoch(1, STREAM), epoch(0, (1, "main", "video")), epoch(0, (0, "a", "video"))]
    orders.append(epoch(0, (0, "main", "image")))
    assert len({tuple(o) for o in orders}) == len(orders)
    assert orders[0][:5] == [10, 32, 13, 2, 24]  # another order would make resumed runs repeat and miss samples


def test_a_hundred_million_samples_cost_no_memory() -> None:
    size = 10**8
    found = {order.sample_at(n, size, STREAM)[1] for n in range(1000)}
    assert len(found) == 1000 and max(found) > 0.9 * size and min(found) < 0.1 * size


@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 1000))
def test_a_spare_is_some_sample_and_always_the_same(number: int, attempt: int, size: int) -> None:
    spare = order.spare_for(number, attempt, size, STREAM)
    assert 0 <= spare < size and spare == order.spare_for(number, attempt, size, STREAM)


@settings(max_examples=50)
@given(mixes, batches, st.integers(1, 3), st.integers(0, 1000), st.sampled_from([(1, 2), (2, 2), (3, 4)]))
def test_ranks_share_what_one_rank_would_take(
    mix: PerKind, batch: PerKind, accumulate: int, step: int, case: tuple[int, int]
) -> None:
    scale, world = case
    small = DataConfig(mix=mix, batch=PerKind(image=scale * batch.image, video=scale * batch.video))
    large = DataConfig(mix=mix, batch=PerKind(image=world * small.batch.image, video=world * small.batch.video))
    for micro in range(accumulate):
        alone = order.place_of(step, micro, large, accumulate=accumulate)
        parts = [order.place_of(step, micro, small, accumulate=accumulate, rank=r, world=world) for r in range(world)]
        assert {part.kind for part in parts} == {alone.kind}
        assert [n for part in parts for n in part.numbers] == list(alone.numbers)
        assert [n for part in parts for n in part.slots] == list(alone.slots)


@settings(max_examples=50)
@given(mixes, batches, st.integers(1, 3), st.integers(1, 3), st.integers(0, 40))
def test_every_number_and_slot_is_taken_once(
    mix: PerKind, batch: PerKind, accumulate: int, world: int, steps: int
) -> None:
    data = DataConfig(mix=mix, batch=batch)
    taken = [
        order.place_of(step, micro, data, accumulate=accumulate, rank=rank, world=world)
        for step in range(steps)
        for micro in range(accumulate)
        for rank in range(world)
    ]
    slots = [slot for place in taken for slot in place.slots]
    assert slots == list(range(len(slots)))
    for kind in order.KINDS:
        numbers = [n for place in taken if place.kind == kind for n in place.numbers]
        assert numbers == list(range(len(numbers)))


@given(mixes, batches, st.integers(1, 3), st.integers(0, 30))
def test_resuming_at_any_step_goes_on_where_it_stood(
    mix: PerKind, batch: PerKind, accumulate: int, resumed: int
) -> None:
    data = DataConfig(mix=mix, batch=batch)
    whole = list(islice(order.places(0, data, accumulate=accumulate), 40 * accumulate))
    rest = list(islice(order.places(resumed, data, accumulate=accumulate), (40 - resumed) * accumulate))
    assert [p._replace(first=False) for p in rest] == [p._replace(first=False) for p in whole[resumed * accumulate :]]
    assert rest[0].first and not any(place.first for place in rest[1:])


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 5))
def test_held_out_samples_are_all_seen_in_equally_many_batches(count: int, batch: int, world: int) -> None:
    shares = [order.held_out_places("video", count, batch, rank=rank, world=world) for rank in range(world)]
    assert len({tuple(len(place.numbers) for place in share) for share in shares}) == 1
    seen = Counter(n for share in shares for place in share for n in place.numbers)
    assert sorted(seen) == list(range(count)) and seen.total() - count < world


def test_one_rank_takes_held_out_samples_in_order() -> None:
    assert [list(p.numbers) for p in order.held_out_places("image", 5, 2)] == [[0, 1], [2, 3], [4]]
