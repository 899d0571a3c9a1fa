"""Every convolution of critic, autoencoders and perceptual distances in bfloat16 beside float32, images included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lingen.autoencoder.network import Discriminator, SpaceConv
from lingen.autoencoder.perceptual import Trunk
from lingen.autoencoder.tae import TAE, TAESmall
from lingen.autoencoder.temporal import ClipConv, Stream, TimeConv
from tests.helpers.convs import PaddedShortClips

LIMIT = 0.01
"""Of the relative error in bfloat16, which keeps 8 bits: 0.002 is usual."""
JUNK = (0.0, 7.0, 49.0)
"""What memory holds that the allocator hands out next."""
CALLS = {
    ClipConv: lambda conv, clip: conv(clip),
    TimeConv: lambda conv, clip: conv(clip.movedim(1, -1), Stream(last=True)),
    SpaceConv: lambda conv, clip: conv(clip.movedim(1, -1)),
    nn.Conv2d: lambda conv, clip: conv(clip.movedim(2, 1).flatten(0, 1)),
}
"""How each kind of convolution is called with a clip [b d t h w]. A bare nn.Conv3d has no place here: see ClipConv."""


def different_convs() -> dict[str, nn.Module]:
    """All kinds and sizes of convolutions in them, on meta."""
    with torch.device("meta"):
        networks = {"critic": Discriminator(), "vgg16": Trunk(ceil=True), "tae_small": TAESmall(), "tae": TAE()}
    found: dict[str, nn.Module] = {}
    for name, network in networks.items():
        for place, module in network.named_modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                found.setdefault(f"{type(module).__name__}({module.extra_repr()})", module)
                assert type(module) in CALLS, f"{name}.{place} is a {type(module).__name__}"
    return found


CONVS = different_convs()


def drawn(conv: nn.Module) -> nn.Module:
    """The same with weights that bfloat16 holds exactly."""
    conv = copy.deepcopy(conv).to_empty(device="cpu").requires_grad_()
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_(std=0.1)
            parameter.copy_(parameter.bfloat16())
    return conv


def results(conv: nn.Module, clip: Tensor, pull: Tensor) -> dict[str, Tensor]:
    """What comes out and every gradient, by name; `pull` is the gradient that comes in."""
    clip = clip.clone().requires_grad_()
    conv.zero_grad()
    y = CALLS.get(type(conv), nn.Module.__call__)(conv, clip)
    y.backward(pull)
    return {"y": y.detach(), "clip": clip.grad, **{name: p.grad for name, p in conv.named_parameters()}}


def check(conv: nn.Module, size: tuple[int, int, int]):
    """Results and gradients in bfloat16, again and again, are those in float32."""
    clip = torch.randn(2, conv.in_channels, *size).bfloat16().to(memory_format=torch.channels_last_3d)
    pull = torch.randn_like(CALLS[type(conv)](conv, clip.float())).bfloat16()
    right = results(conv, clip.float(), pull.float())
    half = copy.deepcopy(conv).bfloat16()
    for fill in JUNK:
        junk = torch.full((200_000,), fill)
        del junk
        for name, value in results(half, clip, pull).items():
            assert value.dtype == torch.bfloat16 and value.shape == right[name].shape, name
            error = (value.float() - right[name]).norm() / right[name].norm()
            assert error < LIMIT, (name, fill, error.item())


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("kind", CONVS)
def test_in_bfloat16_as_in_float32(kind: str, frames: int):
    conv = drawn(CONVS[kind])
    side = 16 if conv.in_channels < 64 else 4
    check(conv, (frames, side, side))


SMALL = {
    "clip3": lambda: ClipConv(16, 32, 3),
    "clip4": lambda: ClipConv(16, 32, 4, (1, 2, 2)),
    "clip4_halving": lambda: ClipConv(16, 32, 4, (2, 2, 2)),
    "space": lambda: SpaceConv(16, 32),
    "space_halving": lambda: SpaceConv(16, 32, (2, 2)),
}


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@pytest.mark.parametrize("height,width", [(2, 2), (2, 4), (4, 2), (3, 3)])
@pytest.mark.parametrize("kind", SMALL)
def test_small_frames_too(kind: str, height: int, width: int, frames: int):
    check(drawn(SMALL[kind]()), (frames, height, width))


@pytest.mark.parametrize("shape", [(1, 9, 8), (2, 9, 8), (4, 2, 2), (3, 2, 5), (3, 5, 2)])
@pytest.mark.parametrize("taps,stride", [(3, (1, 1, 1)), (4, (1, 2, 2)), (4, (2, 2, 2))])
def test_a_short_clip_is_convolved_as_any_other(taps: int, stride: tuple[int, int, int], shape: tuple[int, int, int]):
    """Beside torch's own padding, which is right in float64: every gradient by name."""
    conv = ClipConv(3, 5, taps, stride).double()
    twin = nn.Conv3d(3, 5, (3, taps, taps), stride, 1).double()
    twin.load_state_dict(conv.state_dict())
    clip = torch.randn(2, 3, *shape, dtype=torch.float64)
    pull = torch.randn_like(twin(clip))
    ours = results(conv, clip, pull)
    for name, value in results(twin, clip, pull).items():
        torch.testing.assert_close(ours[name], value, msg=name)


@pytest.mark.parametrize("shape", [(2, 16, 16), (3, 16, 16), (9, 16, 16), (4, 2, 2)])
@pytest.mark.parametrize("taps,stride", [(3, (1, 1, 1)), (4, (1, 2, 2)), (4, (2, 2, 2))])
def test_in_float32_a_clip_is_convolved_as_torch_does_bit_for_bit(
    taps: int, stride: tuple[int, int, int], shape: tuple[int, int, int]
):
    conv = ClipConv(8, 16, taps, stride)
    clip = torch.randn(2, 8, *shape)
    assert torch.equal(conv(clip), nn.Conv3d.forward(conv, clip))


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_no_network_leaves_the_padding_of_short_clips_to_torch(frames: int):
    tae = TAE(strides=(4, 4, 4), channels=4, width=8, multipliers=(1, 1, 2), blocks=1)
    critic, trunk = Discriminator(4, 3), Trunk(ceil=True)
    clip = torch.randn(1, 3, frames, 16, 16)
    with PaddedShortClips() as watch:
        video = tae.reconstruct(tae.posterior(clip)[0])
        critic(clip)
        trunk.taps(video.flatten(0, 2).unflatten(0, (-1, 3)))
        with torch.no_grad():
            tae.decode(tae.encode(clip))
    assert watch.convolutions > 50 and not watch.found


def test_the_watch_sees_what_it_looks_for():
    with PaddedShortClips() as watch:
        nn.Conv3d(3, 4, 3, padding=1)(torch.randn(1, 3, 1, 8, 8))
        nn.Conv3d(3, 4, 3, padding=(0, 1, 1))(torch.randn(1, 3, 3, 8, 8))
    assert watch.found == [([1, 3, 1, 8, 8], [4, 3, 3, 3, 3])] and watch.convolutions == 2
