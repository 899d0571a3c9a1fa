"""Tiles: the whole frame, whatever its size; faded, never torn; exact in time, and no more memory for a longer clip."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lingen_yardsticks.build import draw_weights
from torch import Tensor, nn

from lingen.autoencoder.tae import TAE
from lingen.autoencoder.ways import Tiles, _spread, _trapezoid, _weights, decode_tiled, encode_tiled


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


@settings(max_examples=12, deadline=None)
@given(
    strides=st.sampled_from(STRIDES),
    frames=st.integers(1, 40),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
)
@torch.no_grad()
def test_any_size_gives_its_latents_and_its_frames_whatever_the_pieces(strides, frames, rows, columns, sizes):
    autoencoder = Tiny(strides).double()
    video = clip(frames, rows * 8, columns * 8, b=2).double()
    tiles = Tiles((4, 3), (1, 1))
    one = joined(encode_tiled(autoencoder, [video], tiles))
    assert one.shape == autoencoder.encode(video).shape
    assert torch.equal(one, joined(encode_tiled(autoencoder, cut(video, sizes), tiles)))
    back = joined(decode_tiled(autoencoder, one, tiles))
    assert back.shape == autoencoder.decode(one).shape and torch.isfinite(back).all()


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
    """The network reaches one latent beyond its own, the tiles share three."""
    autoencoder = Tiny(strides).double()
    latents = torch.randn(1, 4, 100 // strides[0], 10, 9, generator=torch.Generator().manual_seed(1)).double()
    whole, tiled = autoencoder.decode(latents), joined(decode_tiled(autoencoder, latents, Tiles((6, 4), (3, 3))))
    good = (
        far_from_edges(80, [8 * s for s in _spread(10, 6, 3).starts], 48, 8)[:, None]
        & far_from_edges(72, [8 * s for s in _spread(9, 4, 3).starts], 32, 8)
    ).expand(whole.shape[2], -1, -1)
    difference = (whole - tiled).abs().amax((0, 1))
    assert 0.02 < good.float().mean() < 1
    assert difference[good].max() < 1e-12
    assert difference[~good].max() > 1e-4  # the edges are really there, and the test sees them


@torch.no_grad()
def test_a_network_that_reaches_nowhere_is_the_same_everywhere():
    autoencoder = Tiny((4, 8, 8)).double()
    autoencoder.mix = nn.Conv3d(4, 4, 1).double()
    video = clip(21, 80, 72).double()
    tiles = Tiles((4, 3), (2, 2))
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
def test_tiles_are_faded_linearly():
    """Tiles that decode to constants: what comes out is the line between them."""
    autoencoder = Tiny((1, 1, 1))
    numbers = iter(range(10))
    autoencoder.decode = lambda latents: torch.full((1, 3, *latents.shape[2:]), float(next(numbers)))
    decoded = joined(decode_tiled(autoencoder, torch.zeros(1, 4, 1, 1, 12), Tiles((1, 8), (0, 4))))
    expected = torch.tensor([0, 0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1])
    torch.testing.assert_close(decoded[0, 0, 0, 0], expected)


@pytest.mark.parametrize("tiles", [Tiles((6, 6), (2, 2)), None])
@pytest.mark.parametrize(("frames", "size"), [(1, 16), (7, 32), (32, 48)])
@torch.no_grad()
def test_a_frame_no_larger_than_a_tile_is_one_call_and_untouched(frames, size, tiles):
    autoencoder = Tiny()
    latents = joined(encode_tiled(autoencoder, [clip(frames, size, size)], tiles))
    decoded = joined(decode_tiled(autoencoder, latents, tiles))
    assert len(autoencoder.calls) == 2
    assert torch.equal(latents, autoencoder.encode(clip(frames, size, size)))
    assert torch.equal(decoded, autoencoder.decode(latents))


class Streaming(Tiny):
    """Takes and gives as many frames at a time as a latent has; nothing reaches beyond them."""

    def encode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        for piece in pieces:
            yield self.encode(piece)

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        for latent in latents.split(1, 2):
            yield self.decode(latent)


@torch.no_grad()
def test_memory_does_not_grow_with_the_length():
    """Pieces that are alive at once: those that went in, and those that came out and were dropped by the reader."""

    def peak(frames: int) -> int:
        autoencoder, alive, most = Streaming((4, 8, 8)), set(), 0

        def watched(tensor: Tensor) -> Tensor:
            alive.add(id(tensor))
            weakref.finalize(tensor, alive.discard, id(tensor))
            return tensor

        def pieces() -> Iterator[Tensor]:
            for _ in range(0, frames, 4):
                yield watched(torch.full((1, 3, 4, 32, 32), 0.1))

        made = 0
        for latents in encode_tiled(autoencoder, pieces(), Tiles((3, 3), (1, 1))):
            watched(latents)
            made += latents.shape[2]
            most = max(most, len(alive))
            del latents
        assert made == frames // 4 and {shape[2] for shape in autoencoder.calls} == {4}
        return most

    assert peak(400) == peak(80) <= 4


@torch.no_grad()
def test_half_precision_is_faded_in_full_and_stays_half():
    autoencoder = Tiny((4, 8, 8)).bfloat16()
    tiled = joined(decode_tiled(autoencoder, torch.randn(1, 4, 20, 6, 6).bfloat16(), Tiles((4, 4), (1, 1))))
    assert tiled.dtype == torch.bfloat16 and torch.isfinite(tiled).all()


def test_no_frames_are_said():
    with pytest.raises(ValueError, match="no frames"):
        encode_tiled(Tiny(), [], None)


@pytest.mark.parametrize("frames", [1, 19, 40])
@torch.no_grad()
def test_tiles_of_the_temporal_autoencoder_are_exact_in_time(frames):
    """Piece by piece in step, the tiles give what each of them gives for the whole clip at once."""
    torch.manual_seed(0)
    autoencoder = TAE(strides=(4, 8, 8), channels=4, width=8, blocks=1).double().eval()
    draw_weights(autoencoder)
    video = clip(frames, 32, 24).double()
    tiles = Tiles((2, 2), (1, 1))
    latents = joined(encode_tiled(autoencoder, video.split(7, 2), tiles))
    decoded = list(decode_tiled(autoencoder, latents, tiles))
    assert frames < 20 or len(decoded) > 1
    at_once = Tiny((4, 8, 8))  # without streams
    at_once.encode = lambda part: autoencoder.posterior(part)[0]
    at_once.decode = autoencoder.reconstruct
    torch.testing.assert_close(latents, joined(encode_tiled(at_once, [video], tiles)), rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.cat(decoded, 2), joined(decode_tiled(at_once, latents, tiles)), rtol=0, atol=1e-11)
