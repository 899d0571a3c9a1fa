"""Tiles: the whole clip, whatever the sizes; faded, never torn; and no more memory for a longer clip."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lingen.autoencoder.tae import TAE
from lingen.autoencoder.tiling import Tiles, _spread, _trapezoid, _weights, decode_tiled, encode_tiled
from lingen.recipe.errors import SettingError


class Tiny(nn.Module):
    """A real network of a few weights: blocks of pixels, and a convolution that reaches one latent each way."""

    def __init__(self, strides: tuple[int, int, int] = (8, 8, 8), channels: int = 4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.strides, self.channels = strides, channels
        self.down = nn.Conv3d(3, channels, strides, strides)
        self.mix = nn.Conv3d(channels, channels, 3, padding=1, padding_mode="replicate")
        self.up = nn.ConvTranspose3d(channels, 3, strides, strides)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        self.calls: list[tuple[int, ...]] = []

    def encode(self, video: Tensor) -> Tensor:
        self.calls.append(tuple(video.shape))
        missing = -video.shape[2] % self.strides[0]
        video = torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2)
        return self.mix(self.down(video)).tanh()

    def decode(self, latents: Tensor) -> Tensor:
        self.calls.append(tuple(latents.shape))
        return self.up(self.mix(latents).tanh())


STRIDES = [(8, 8, 8), (4, 8, 8), (1, 1, 1)]
TILES = Tiles(frames=32, overlap=16, size=(48, 32), size_overlap=16)


def clip(frames: int, height: int = 16, width: int = 16, b: int = 1) -> Tensor:
    return torch.rand(b, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def cut(video: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """The clip in pieces of these lengths, over and over."""
    start = number = 0
    while start < video.shape[2]:
        yield video[:, :, start : start + sizes[number % len(sizes)]]
        start, number = start + sizes[number % len(sizes)], number + 1


def joined(pieces: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(pieces), 2)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("frames", [1, 2, 7, 33, 100])
@torch.no_grad()
def test_any_length_gives_its_latents_and_its_frames(strides, frames):
    autoencoder = Tiny(strides)
    latents = joined(encode_tiled(autoencoder, [clip(frames)], Tiles()))
    assert latents.shape == autoencoder.encode(clip(frames)).shape
    decoded = joined(decode_tiled(autoencoder, latents, Tiles()))
    assert decoded.shape == autoencoder.decode(latents).shape
    assert torch.isfinite(decoded).all()


@settings(max_examples=12, deadline=None)
@given(
    strides=st.sampled_from(STRIDES),
    frames=st.integers(1, 90),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    batch=st.integers(2, 9),
    encoder_overlap=st.sampled_from([0, 8]),
)
@torch.no_grad()
def test_neither_the_pieces_nor_the_tiles_in_a_call_change_the_result(
    strides, frames, rows, columns, sizes, batch, encoder_overlap
):
    autoencoder = Tiny(strides).double()
    video = clip(frames, rows * 8, columns * 8, b=2).double()
    tiles = Tiles(frames=16, overlap=8, encoder_overlap=encoder_overlap, size=(32, 24), size_overlap=8)
    one = joined(encode_tiled(autoencoder, [video], tiles))
    other = joined(encode_tiled(autoencoder, cut(video, sizes), tiles, batch=batch))
    assert one.shape == autoencoder.encode(video).shape
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    back = joined(decode_tiled(autoencoder, one, tiles))
    assert back.shape == autoencoder.decode(one).shape
    torch.testing.assert_close(back, joined(decode_tiled(autoencoder, one, tiles, batch=batch)), rtol=0, atol=1e-12)


def far_from_edges(length: int, starts: list[int], tile: int, reach: int) -> Tensor:
    """Places of an axis that are `reach` or more from the inner edges of every tile that covers them."""
    good = torch.ones(length, dtype=torch.bool)
    for start in starts:
        if start > 0:
            good[start : start + reach] = False
        if start + tile < length:
            good[start + tile - reach : start + tile] = False
    return good


@pytest.mark.parametrize("strides", [(8, 8, 8), (4, 8, 8)])
@torch.no_grad()
def test_where_no_tile_ends_within_reach_it_is_the_untiled_clip(strides):
    """The network reaches one latent beyond its own, the tiles share two and more."""
    autoencoder = Tiny(strides).double()
    latents = torch.randn(1, 4, 100 // strides[0], 10, 9, generator=torch.Generator().manual_seed(1)).double()
    tiles = Tiles(frames=32, overlap=16, size=(48, 32), size_overlap=24)
    whole, tiled = autoencoder.decode(latents), joined(decode_tiled(autoencoder, latents, tiles))
    n, step = 32, 16
    starts = [0] + [s for s in range(step, whole.shape[2], step) if s + step < whole.shape[2]]
    good = (
        far_from_edges(whole.shape[2], starts, n, strides[0])[:, None, None]
        & far_from_edges(80, [8 * s for s in _spread(10, 6, 3)[0]], 48, 8)[:, None]
        & far_from_edges(72, [8 * s for s in _spread(9, 4, 3)[0]], 32, 8)
    )
    difference = (whole - tiled).abs().amax((0, 1))
    assert 0.02 < good.float().mean() < 1
    assert difference[good].max() < 1e-12
    assert difference[~good].max() > 1e-4  # the edges are really there, and the test sees them


@torch.no_grad()
def test_a_network_that_reaches_nowhere_is_the_same_everywhere():
    autoencoder = Tiny((4, 8, 8)).double()
    autoencoder.mix = nn.Conv3d(4, 4, 1).double()
    video = clip(77, 80, 72).double()
    tiles = Tiles(frames=16, overlap=12, encoder_overlap=8, size=(32, 24), size_overlap=16)
    latents = joined(encode_tiled(autoencoder, [video], tiles))
    torch.testing.assert_close(latents, autoencoder.encode(video), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        joined(decode_tiled(autoencoder, latents, tiles)), autoencoder.decode(latents), rtol=0, atol=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 60), length=st.integers(1, 20), overlap=st.integers(0, 19))
def test_weights_add_up_to_one_everywhere(size, length, overlap):
    starts, tile = _spread(size, length, min(overlap, length - 1))
    total = torch.zeros(size, dtype=torch.float64)
    for start, ramp in _weights(starts, tile, total):
        assert (ramp > 0).all()
        total[start : start + tile] += ramp
    torch.testing.assert_close(total, torch.ones_like(total))


def test_a_fade_is_linear_and_two_of_them_are_one():
    up, down = (_trapezoid(8, *ramp, torch.zeros(())) for ramp in ((4, 0), (0, 4)))
    assert up.tolist() == [0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1]
    assert (up[:4] + down[4:]).tolist() == [1] * 4


@torch.no_grad()
def test_time_is_faded_linearly():
    """Tiles that decode to constants: what comes out is the line between them."""
    autoencoder = Tiny((1, 1, 1))
    numbers = iter(range(10))
    autoencoder.decode = lambda latents: torch.full((1, 3, *latents.shape[2:]), float(next(numbers)))
    decoded = joined(decode_tiled(autoencoder, torch.zeros(1, 4, 12, 1, 1), Tiles(frames=8, overlap=4)))
    expected = torch.tensor([0, 0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1])
    torch.testing.assert_close(decoded[0, 0, :, 0, 0], expected)


@pytest.mark.parametrize(("frames", "size"), [(1, 16), (7, 32), (32, 48)])
@torch.no_grad()
def test_a_clip_no_larger_than_a_tile_is_one_call_and_untouched(frames, size):
    autoencoder = Tiny()
    tiles = Tiles(size=(48, 48), size_overlap=16)
    latents = joined(encode_tiled(autoencoder, [clip(frames, size, size)], tiles))
    decoded = joined(decode_tiled(autoencoder, latents, tiles))
    assert len(autoencoder.calls) == 2
    assert torch.equal(latents, autoencoder.encode(clip(frames, size, size)))
    assert torch.equal(decoded, autoencoder.decode(latents))


@torch.no_grad()
def test_the_calls_are_movie_gens_tiles():
    """Encoder: 32 frames side by side. Decoder: 32 frames that share 16."""
    autoencoder = Tiny()
    latents = joined(encode_tiled(autoencoder, [clip(100)]))
    assert [shape[2] for shape in autoencoder.calls] == [32, 32, 32, 4]
    autoencoder.calls.clear()
    joined(decode_tiled(autoencoder, latents))
    assert [shape[2] for shape in autoencoder.calls] == [4, 4, 4, 4, 4, 3]
    autoencoder.calls.clear()
    joined(decode_tiled(autoencoder, latents, batch=4))
    assert [shape[0] for shape in autoencoder.calls] == [4, 1, 1]


@torch.no_grad()
def test_memory_does_not_grow_with_the_length():
    """Frames that are alive at once: those that went in, and those that came out and were dropped by the reader."""
    autoencoder = Tiny((4, 8, 8))

    def peak(frames: int) -> int:
        alive, most = set(), 0

        def watched(tensor: Tensor) -> Tensor:
            alive.add(id(tensor))
            weakref.finalize(tensor, alive.discard, id(tensor))
            return tensor

        def pieces() -> Iterator[Tensor]:
            for start in range(0, frames, 4):
                yield watched(torch.full((1, 3, min(4, frames - start), 16, 16), 0.1))

        made = 0
        for latents in encode_tiled(autoencoder, pieces(), Tiles(encoder_overlap=16), batch=2):
            watched(latents)
            made += latents.shape[2]
            most = max(most, len(alive))
            del latents
        assert made == -(-frames // 4) and max(shape[2] for shape in autoencoder.calls) <= 32
        return most

    assert peak(600) == peak(200) <= 8


@torch.no_grad()
def test_half_precision_is_faded_in_full_and_stays_half():
    autoencoder = Tiny((4, 8, 8)).bfloat16()
    latents = torch.randn(1, 4, 20, 6, 6).bfloat16()
    tiles = Tiles(frames=16, overlap=8, size=(32, 32), size_overlap=8)
    tiled = joined(decode_tiled(autoencoder, latents, tiles))
    assert tiled.dtype == torch.bfloat16 and torch.isfinite(tiled).all()


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        ({"frames": 16, "overlap": 16}, "overlap"),
        ({"frames": 16, "overlap": 8, "encoder_overlap": 16}, "encoder_overlap"),
        ({"overlap": -1}, "overlap"),
        ({"frames": 0, "overlap": 0}, "frames"),
        ({"size": (64, 32), "size_overlap": 32}, "size_overlap"),
    ],
)
def test_senseless_tiles_are_refused(arguments, setting):
    with pytest.raises(SettingError) as error:
        Tiles(**arguments)
    assert error.value.setting == setting


@pytest.mark.parametrize(
    ("tiles", "setting"),
    [
        (Tiles(frames=36), "frames"),
        (Tiles(overlap=12), "overlap"),
        (Tiles(size=(36, 32), size_overlap=8), "size"),
        (Tiles(size=(32, 36), size_overlap=8), "size"),
        (Tiles(size=(32, 32), size_overlap=4), "size_overlap"),
    ],
)
def test_tiles_are_multiples_of_the_strides(tiles, setting):
    with pytest.raises(SettingError, match="multiple of the autoencoder's stride 8") as error:
        decode_tiled(Tiny(), torch.zeros(1, 4, 4, 2, 2), tiles)
    assert error.value.setting == setting


def test_what_cannot_be_tiled_is_said():
    with pytest.raises(ValueError, match="height of 12 pixels is no multiple"):
        joined(encode_tiled(Tiny(), [clip(4, 12, 16)]))
    with pytest.raises(ValueError, match="no frames"):
        joined(encode_tiled(Tiny(), []))
    with pytest.raises(ValueError, match="batch=0"):
        joined(encode_tiled(Tiny(), [clip(4)], batch=0))


@torch.no_grad()
def test_an_autoencoder_that_decodes_other_lengths_is_left_whole_in_time():
    causal = Tiny((4, 8, 8))
    decode = causal.decode
    causal.decode = lambda latents: decode(latents)[:, :, 3:]
    latents = torch.randn(1, 4, 10, 6, 6)
    with pytest.raises(ValueError, match=r"become 32 frames.*Tiles\(frames=None\)"):
        joined(decode_tiled(causal, latents))
    tiles = Tiles(frames=None, size=(32, 32), size_overlap=16)
    assert joined(decode_tiled(causal, latents, tiles)).shape == causal.decode(latents).shape


@pytest.mark.parametrize("frames", [1, 19, 40])
@torch.no_grad()
def test_the_temporal_autoencoder_in_tiles(frames):
    torch.manual_seed(0)
    autoencoder = TAE(strides=(4, 8, 8), channels=4, width=8, blocks=1, attention=False).eval()
    video = clip(frames, 32, 24)
    tiles = Tiles(frames=16, overlap=8, size=(16, 16), size_overlap=8)
    latents = joined(encode_tiled(autoencoder, video.split(7, 2), tiles))
    decoded = joined(decode_tiled(autoencoder, latents, tiles, batch=3))
    assert latents.shape == autoencoder.encode(video).shape
    assert decoded.shape == autoencoder.decode(latents).shape
    assert torch.isfinite(latents).all() and torch.isfinite(decoded).all()
