"""Scan orders are bijections, cycles cycle, and their adjacency shows what they are for."""

import itertools

import pytest
import torch

from lingen.blocks.scan import (
    AXES,
    ROTARY_MAJOR,
    adjacency,
    column_length,
    hilbert,
    order_of,
    permutation,
    zigzag,
)
from lingen.kernels.pool import pool
from lingen.recipe.errors import SettingError
from lingen.recipe.registry import SCANS

GRIDS = [(1, 1, 1), (1, 4, 6), (3, 5, 7), (4, 4, 4), (9, 2, 1)]
CPU = torch.device("cpu")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SCANS.names())
def test_there_and_back(name, grid):
    for layer in range(4):
        order = order_of(name, layer)
        index, inverse = permutation(order, grid, CPU)
        raster = torch.arange(index.numel())
        assert torch.equal(index.sort().values, raster) and torch.equal(index[inverse], raster)


def test_axis_strings_name_the_slowest_axis_first():
    want = [t * 15 + h * 5 + w for h, w, t in itertools.product(range(3), range(5), range(2))]
    assert permutation("hwt", (2, 3, 5), CPU)[0].tolist() == want
    assert set(AXES) <= set(SCANS.names())


def test_rotary_major_takes_turns():
    assert [order_of("rotary_major", layer) for layer in range(6)] == [*ROTARY_MAJOR, "thw", "twh"]


def test_cycles_hold_names_and_functions():
    mixed = ("hilbert", ("thw", zigzag), "rotary_major")
    assert [order_of(mixed, layer) for layer in range(6)] == [hilbert, zigzag, "hwt", hilbert, "thw", "twh"]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SCANS.names())
def test_columns_are_found_where_they_are(name, grid):
    for layer in range(4):
        order = order_of(name, layer)
        index = permutation(order, grid, CPU)[0]
        places = (index % (grid[1] * grid[2])).view(-1, grid[0])
        is_temporal = layer > 1 if name.startswith("rotary_major") else name in ("hwt", "wht")
        assert column_length(order, grid) == (grid[0] if is_temporal and grid[0] > 1 else 0)
        assert not is_temporal or (places == places[:, :1]).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_folded_columns_go_on_at_the_frame_where_the_last_one_ended(grid):
    for layer in (2, 3):
        folded, plain = (permutation(order_of(name, layer), grid, CPU)[0].view(-1, grid[0])
                         for name in ("rotary_major_folded", "rotary_major"))  # fmt: skip
        assert torch.equal(folded[::2], plain[::2]) and torch.equal(folded[1::2], plain[1::2].flip(1))
        frames = folded // (grid[1] * grid[2])
        assert torch.equal(frames[:-1, -1], frames[1:, 0])
        assert order_of("rotary_major_folded", layer - 2) == order_of("rotary_major", layer - 2)


def steps(name, grid):
    index = permutation(order_of(name, 0), grid, CPU)[0]
    places = torch.stack(torch.unravel_index(index, grid), 1)
    return places.diff(dim=0).abs().sum(1)


@pytest.mark.parametrize("grid", GRIDS[1:])
def test_zigzag_never_jumps(grid):
    assert (steps("zigzag", grid) == 1).all()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_hilbert_never_jumps_in_a_cube(size):
    assert (steps("hilbert", (size, size, size)) == 1).all()


def test_adjacency_of_raster_order():
    assert adjacency("thw", (3, 5, 7)) == (35.0, 7.0, 1.0)
    assert adjacency("wht", (3, 5, 7)) == (1.0, 3.0, 15.0)
    assert adjacency("rotary_major", (3, 5, 7), layer=3) == (1.0, 3.0, 15.0)
    assert adjacency("thw", (1, 1, 4)) == (0.0, 0.0, 1.0)
    # Hilbert treats the axes alike where raster order favours one.
    assert max(adjacency("hilbert", (8, 8, 8))) < 64.0


def test_permutations_are_real_on_meta_and_under_inference():
    with torch.device("meta"), torch.inference_mode():
        index, _ = permutation(order_of("hilbert", 0), (2, 3, 6), CPU)
    assert index.device == CPU and not index.is_inference() and index.sum() == sum(range(36))


def one_place(t, h, w):
    return torch.zeros(t * h * w, dtype=torch.long)


def too_short(t, h, w):
    return torch.arange(t * h)


@pytest.mark.parametrize("bad", [one_place, too_short, lambda t, h, w: torch.arange(t * h * w) + 1])
def test_no_bijection_is_named(bad):
    with pytest.raises(SettingError, match=f"Scan order '{bad.__name__}' does not visit each of the 24 tokens"):
        order_of(bad, 0)


def even(t, h, w):
    if t % 2:
        raise ValueError("odd")
    return torch.arange(t * h * w)


def test_an_order_that_raises_is_named_with_its_grid():
    with pytest.raises(SettingError, match=r"Scan order 'even' raises ValueError on a \(3, 2, 2\) grid: odd"):
        permutation(order_of(even, 0), (3, 2, 2), torch.device("cpu"))


def by_chance(t, h, w):
    return torch.randperm(t * h * w)


def test_an_order_of_its_own_at_each_call_is_refused():
    with pytest.raises(SettingError, match="Scan order 'by_chance' gives another order at each call"):
        order_of(by_chance, 0)


def late(t, h, w):
    return torch.arange(t * h * w) if t < 5 else torch.zeros(t * h * w).long()


def test_no_bijection_on_another_grid_is_named():
    with pytest.raises(SettingError, match="'late' does not visit each of the 12 tokens of a \\(6, 1, 2\\) grid once"):
        permutation(order_of(late, 0), (6, 1, 2), CPU)


def test_unknown_scans_are_settings():
    with pytest.raises(SettingError, match="Did you mean 'zigzag'") as caught:
        order_of("zigzig", 0)
    assert caught.value.setting == "scan"
    for nothing in ((), ((),)):
        with pytest.raises(SettingError, match="is no scan order"):
            order_of(nothing, 0)


@pytest.mark.parametrize("grid, kernel", [((4, 4, 6), (2, 2, 2)), ((1, 5, 7), (2, 2, 3)), ((3, 1, 2), (9, 1, 4))])
def test_pool_averages_real_tokens(grid, kernel):
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    got = pool(x, kernel)
    for t, h, w in itertools.product(*map(range, got.shape[1:4])):
        window = x[:, *(slice(i * k, (i + 1) * k) for i, k in zip((t, h, w), kernel, strict=True))]
        torch.testing.assert_close(got[:, t, h, w], window.mean((1, 2, 3)), rtol=1e-5, atol=1e-14)
    assert got.shape[1:4] == tuple(-(-n // min(n, k)) for n, k in zip(grid, kernel, strict=True))
