"""The order of training: exact shares of the kinds, every sample once an epoch, ranks and resumes that agree."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from itertools import groupby, islice
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lingen.data import order
from lingen.data.order import Anchor, BatchOrder, Lane, RankBatch
from lingen.recipe.sections import KINDS, DataConfig, PerKind, Recipe, TrainConfig
from lingen.recipe.sizes import round_of

mixes = st.builds(PerKind, image=st.integers(0, 7), video=st.integers(0, 120)).filter(lambda m: m.image + m.video > 0)
lanes = st.lists(st.builds(Lane, samples=st.integers(1, 60), batch=st.integers(1, 4)), min_size=1, max_size=4)
kinds = st.fixed_dictionaries({"image": lanes, "video": lanes})
batches = st.builds(PerKind, image=st.integers(1, 40), video=st.integers(1, 40))
COUNTED = st.sampled_from(["steps", "samples"])
STREAM = (0, "main", "video")


@given(mixes, st.integers(0, 10**12))
def test_every_round_holds_the_exact_share_of_each_kind(mix: PerKind, start: int) -> None:
    kinds = Counter(order.kind_of(step, mix) for step in range(start, start + mix.image + mix.video))
    assert kinds == Counter(image=mix.image, video=mix.video)


def test_one_image_step_for_every_hundred_video_steps() -> None:
    kinds = [order.kind_of(step, PerKind(image=1, video=100)) for step in range(1010)]
    assert [step for step, kind in enumerate(kinds) if kind == "image"] == list(range(0, 1010, 101))


@given(mixes, st.integers(0, 10**6))
def test_the_rarer_kind_is_spread_evenly(mix: PerKind, start: int) -> None:
    rare, often = sorted(KINDS, key=lambda kind: getattr(mix, kind))
    assume(getattr(mix, rare) > 0)
    steps = [s for s in range(start, start + 3 * (mix.image + mix.video)) if order.kind_of(s, mix) == rare]
    gaps = {after - before for before, after in zip(steps, steps[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1


@given(mixes, st.integers(0, 300))
def test_count_before_counts(mix: PerKind, step: int) -> None:
    for kind in KINDS:
        assert order.count_before(kind, step, mix) == sum(order.kind_of(s, mix) == kind for s in range(step))


@given(mixes, batches, st.integers(0, 10**9), st.integers(1, 64))
def test_counted_by_samples_they_stand_as_the_mix_says_on_any_number_of_ranks(
    mix: PerKind, batch: PerKind, start: int, ranks: int
) -> None:
    steps = round_of(DataConfig(mix=mix, mix_by="samples", batch=batch))
    kinds = Counter(order.kind_of(step, steps) for step in range(start, start + steps.image + steps.video))
    assert kinds["image"] * batch.image * mix.video == kinds["video"] * batch.video * mix.image
    alone = PerKind(image=ranks * batch.image, video=ranks * batch.video)
    assert round_of(DataConfig(mix=mix, mix_by="samples", batch=alone)) == steps
    assert round_of(DataConfig(mix=mix, batch=batch)) == mix


def test_batches_of_34_images_are_rarer_by_samples() -> None:
    data = DataConfig(mix=PerKind(image=1, video=100), batch=PerKind(image=34, video=1))
    recipe = Recipe(data=data, train=TrainConfig(steps=20_000))
    assert order.steps_of(recipe) == {"image": 199, "video": 19_801}
    by_samples = replace(recipe, data=replace(data, mix_by="samples"))
    assert round_of(by_samples.data) == PerKind(image=1, video=3400)
    assert order.steps_of(by_samples) == {"image": 6, "video": 19_994}
    one_kind = replace(recipe, data=replace(data, mix=PerKind(image=0, video=100), mix_by="samples"))
    assert order.steps_of(one_kind) == {"video": 20_000}


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


# blocks


@given(st.integers(1, 700), st.integers(2, 40), st.integers(0, 3))
def test_an_epoch_in_blocks_visits_every_sample_once(size: int, block: int, epoch: int) -> None:
    drawn = [order.sample_at(n, size, STREAM, block) for n in range(epoch * size, (epoch + 1) * size)]
    assert {e for e, _ in drawn} == {epoch}
    assert sorted(index for _, index in drawn) == list(range(size))


def test_blocks_keep_neighbours_near_and_differ_from_epoch_to_epoch() -> None:
    size, block = 100_000, 32
    near = block * order.WINDOW
    epochs = [[order.sample_at(e * size + n, size, STREAM, block)[1] for n in range(near)] for e in range(2)]
    for drawn in epochs:
        assert len({index // block for index in drawn}) <= 2 * order.WINDOW + 1  # blocks begin anywhere
        assert max(drawn) - min(drawn) > size / 2
        assert drawn != sorted(drawn)
    assert len(set(epochs[0]) & set(epochs[1])) < near / 2


# all of it


def taken_by_all(ordered: BatchOrder, steps: range) -> list[RankBatch]:
    """What all ranks take in some steps: micro batch by micro batch, rank by rank."""
    return [
        ordered.place(step, micro, rank)
        for step in steps
        for micro in range(ordered.accumulate)
        for rank in range(ordered.world)
    ]


@settings(max_examples=50)
@given(mixes, kinds, st.integers(1, 3), st.integers(1, 4), st.integers(0, 1000))
def test_all_ranks_agree_on_kind_and_bucket(
    mix: PerKind, kinds: dict[str, list[Lane]], accumulate: int, world: int, start: int
) -> None:
    ordered = BatchOrder(kinds, mix, (0, "main"), accumulate=accumulate, world=world)
    for step in range(start, start + 10):
        places = taken_by_all(ordered, range(step, step + 1))
        assert len({(place.kind, place.bucket, len(place.numbers), len(place.slots)) for place in places}) == 1
        assert places[0].kind == order.kind_of(step, mix)
        assert len(places[0].numbers) == kinds[places[0].kind][places[0].bucket].batch


@settings(max_examples=50)
@given(mixes, kinds, st.integers(1, 3), st.integers(1, 3), st.integers(0, 40))
def test_every_number_and_slot_is_taken_once_and_in_order(
    mix: PerKind, kinds: dict[str, list[Lane]], accumulate: int, world: int, steps: int
) -> None:
    ordered = BatchOrder(kinds, mix, (0, "main"), accumulate=accumulate, world=world)
    places = taken_by_all(ordered, range(steps))
    slots = [slot for place in places for slot in place.slots]
    assert slots == list(range(len(slots)))
    for kind, of_kind in kinds.items():
        for bucket in range(len(of_kind)):
            numbers = [n for place in places if (place.kind, place.bucket) == (kind, bucket) for n in place.numbers]
            assert numbers == list(range(len(numbers))) and ordered.taken(steps)[kind][bucket] == len(numbers)


@settings(max_examples=40)
@given(lanes, st.integers(1, 3), st.integers(1, 4))
def test_an_epoch_of_all_buckets_visits_every_sample_once_up_to_less_than_a_step(
    of_kind: list[Lane], world: int, epochs: int
) -> None:
    ordered = BatchOrder({"video": of_kind}, PerKind(image=0, video=1), (0, "main"), world=world)
    steps = sum(epochs * lane.samples // (lane.batch * world) for lane in of_kind)
    assert steps == sum(int(epochs * lane.samples / (lane.batch * world)) for lane in of_kind)
    for lane, taken in zip(of_kind, ordered.taken(steps)["video"], strict=True):
        assert 0 <= epochs * lane.samples - taken < lane.batch * world  # carried over into the next epoch


def test_buckets_take_turns_in_proportion_and_shuffled() -> None:
    of_kind = [Lane(60_000, 4), Lane(30_000, 8), Lane(10_000, 2)]
    ordered = BatchOrder({"video": of_kind}, PerKind(image=0, video=1), (0, "main"), world=2)
    turns = [ordered.place(step).bucket for step in range(2000)]
    share = Counter(turns)
    steps = [lane.samples / lane.batch for lane in of_kind]
    for bucket, count in enumerate(steps):
        assert share[bucket] == pytest.approx(2000 * count / sum(steps), abs=20)
    assert max(len(list(run)) for _, run in groupby(turns)) < 25 and turns[:500] != turns[500:1000]
    other = BatchOrder({"video": of_kind}, PerKind(image=0, video=1), (1, "main"), world=2)
    assert [other.place(step).bucket for step in range(50)] != turns[:50]


@settings(max_examples=50)
@given(mixes, kinds, st.integers(1, 3), st.integers(0, 1000), st.sampled_from([(1, 2), (2, 2), (3, 4)]))
def test_ranks_share_what_one_rank_would_take(
    mix: PerKind, kinds: dict[str, list[Lane]], accumulate: int, step: int, case: tuple[int, int]
) -> None:
    scale, world = case
    small = {k: [Lane(lane.samples, scale * lane.batch) for lane in of] for k, of in kinds.items()}
    large = {k: [Lane(lane.samples, world * lane.batch) for lane in of] for k, of in small.items()}
    alone = BatchOrder(large, mix, (0, "main"), accumulate=accumulate)
    shared = BatchOrder(small, mix, (0, "main"), accumulate=accumulate, world=world)
    for micro in range(accumulate):
        one, parts = alone.place(step, micro), [shared.place(step, micro, rank) for rank in range(world)]
        assert {(part.kind, part.bucket) for part in parts} == {(one.kind, one.bucket)}
        assert [n for part in parts for n in part.numbers] == list(one.numbers)
        assert [n for part in parts for n in part.slots] == list(one.slots)


@settings(max_examples=60)
@given(
    mixes,
    kinds,
    st.lists(st.tuples(st.integers(0, 25), st.integers(1, 3), st.integers(1, 3), COUNTED), min_size=2, max_size=4),
)
def test_resuming_with_other_ranks_batches_and_counts_loses_and_repeats_nothing(
    mix: PerKind, kinds: dict[str, list[Lane]], parts: list[tuple[int, int, int, Any]]
) -> None:
    """Parts of a run: steps, ranks, batches of videos that are so many times as large, and what the mix counts."""
    places: list[RankBatch] = []
    step, anchor = 0, None
    for steps, world, scale, counted in parts:
        times = {"image": 1, "video": scale}
        scaled = {kind: [Lane(lane.samples, times[kind] * lane.batch) for lane in of] for kind, of in kinds.items()}
        batch = PerKind(**{kind: of[0].batch for kind, of in scaled.items()})
        steps_mix = round_of(DataConfig(mix=mix, mix_by=counted, batch=batch))
        ordered = BatchOrder(scaled, steps_mix, (0, "main"), world=world, anchor=anchor)
        places += taken_by_all(ordered, range(step, step + steps))
        step += steps
        anchor = Anchor(step, ordered.taken(step))
    assert [slot for place in places for slot in place.slots] == list(range(sum(len(p.slots) for p in places)))
    for kind, of_kind in kinds.items():
        for bucket, lane in enumerate(of_kind):
            numbers = [n for p in places if (p.kind, p.bucket) == (kind, bucket) for n in p.numbers]
            assert numbers == list(range(len(numbers)))
            samples = [order.sample_at(n, lane.samples, STREAM) for n in numbers]
            assert len(set(samples)) == len(samples)  # no sample twice in an epoch


@settings(max_examples=50)
@given(mixes, kinds, st.integers(1, 3), st.integers(0, 30))
def test_resuming_at_any_step_goes_on_where_it_stood(
    mix: PerKind, kinds: dict[str, list[Lane]], accumulate: int, resumed: int
) -> None:
    ordered = BatchOrder(kinds, mix, (0, "main"), accumulate=accumulate)
    whole = list(islice(ordered.places(0), 40 * accumulate))
    rest = list(
        islice(BatchOrder(kinds, mix, (0, "main"), accumulate=accumulate).places(resumed), (40 - resumed) * accumulate)
    )
    assert rest == whole[resumed * accumulate :]


@given(kinds, st.integers(0, 10**5))
def test_the_mixed_stream_holds_one_image_step_in_any_101(kinds: dict[str, list[Lane]], start: int) -> None:
    ordered = BatchOrder(kinds, PerKind(image=1, video=100), (0, "main"))
    assert Counter(ordered.place(s).kind for s in range(start, start + 101)) == {"image": 1, "video": 100}


def test_a_far_step_of_a_large_run_is_found_at_once() -> None:
    kinds = {"image": [Lane(10**8, 64)] * 5, "video": [Lane(10**7, 4)] * 12}
    ordered = BatchOrder(kinds, PerKind(image=1, video=100), (0, "main"), world=1024)
    begin = time.perf_counter()
    place = ordered.place(10**9, rank=1023)
    assert time.perf_counter() - begin < 0.5
    assert place.numbers[0] % 4 == 0 and len(place.numbers) == 4


# held-out samples


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 5))
def test_held_out_samples_are_all_seen_in_equally_many_batches(count: int, batch: int, world: int) -> None:
    shares = [order.held_out_places("video", count, batch, rank=rank, world=world) for rank in range(world)]
    assert len({tuple(len(place.numbers) for place in share) for share in shares}) == 1
    seen = Counter(n for share in shares for place in share for n in place.numbers)
    assert sorted(seen) == list(range(count)) and seen.total() - count < world


def test_one_rank_takes_held_out_samples_in_order() -> None:
    assert [list(p.numbers) for p in order.held_out_places("image", 5, 2)] == [[0, 1], [2, 3], [4]]
