"""Encoder and decoder of the temporal autoencoder: an image autoencoder with temporal layers beside its spatial ones;
and the discriminator that it is trained against.

Movie Gen (arXiv 2410.13720, section 3.1.1) on the plan of latent diffusion's image autoencoder (arXiv 2112.10752).
Normalisation over channels alone is Wan's (arXiv 2503.20314). Between layers there is only the grid tensor [b t h w d],
which is a batch of channels-last images, b * t of them, in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lingen.autoencoder.temporal import Activation, ClipConv, Grid, Stream, TimeAttention, TimeBlock, TimeConv, add
from lingen.blocks.layers import RMSNorm, head_count
from lingen.recipe.errors import SettingError
from lingen.recipe.sections import Triple

MULTIPLIERS = (1, 2, 4)
"""Widths of the first levels, in units of the first; deeper ones stay at the last (latent diffusion's 1, 2, 4, 4)."""


@dataclass(frozen=True)
class NetworkSizes:
    """What a temporal autoencoder's weights depend on. Raises SettingError for strides or multipliers that do not fit.
    Bounds of single numbers stand where they are declared, in `TAE`."""

    strides: Triple
    channels: int
    width: int
    multipliers: tuple[int, ...] | None
    blocks: int
    attention: bool
    reach: int

    def __post_init__(self) -> None:
        if any(stride & (stride - 1) for stride in self.strides):
            raise SettingError("strides", f"strides={list(self.strides)} must be powers of two, such as [8, 8, 8].")
        given = self.multipliers
        halvings = len(self.scales)
        if given is not None and len(given) != halvings + 1:
            why = f"strides={list(self.strides)} take {halvings} halvings, and there is a level before each and one"
            text = f"multipliers={list(given)} must be {halvings + 1} numbers: {why} behind the last."
            raise SettingError("multipliers", f"{text} Leave it out for 1, 2, 4, 4, ...")

    @cached_property
    def scales(self) -> list[Triple]:
        """What each halving does to t, h and w, 1 or 2, from pixels to latents. Where the strides differ, space is
        halved first, because that saves most, and time last, as in Wan."""
        t, h, w = (stride.bit_length() - 1 for stride in self.strides)
        count = max(t, h, w)
        return [(1 + (i >= count - t), 1 + (i < h), 1 + (i < w)) for i in range(count)]

    @cached_property
    def widths(self) -> list[int]:
        """Channels of each level, from pixels to latents."""
        count = len(self.scales) + 1
        multipliers = self.multipliers or [MULTIPLIERS[min(i, len(MULTIPLIERS) - 1)] for i in range(count)]
        return [self.width * multiplier for multiplier in multipliers]


class SpaceConv(nn.Conv2d):
    """3 x 3 convolution of each frame, its edges padded by zeros; `scale` (1 or 2) divides h and w."""

    def __init__(self, in_dim: int, out_dim: int, scale: tuple[int, int] = (1, 1), *, bias: bool = False):
        super().__init__(in_dim, out_dim, 3, scale, padding=1, bias=bias)

    def forward(self, x: Grid, stream: Stream | None = None) -> Float[Tensor, "b t _h _w _d"]:  # type: ignore[override]
        return super().forward(x.flatten(0, 1).movedim(-1, 1)).movedim(1, -1).unflatten(0, x.shape[:2])


class SpaceBlock(nn.Module):
    """Residual block that treats each frame alone."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.activation1, self.activation2 = Activation(in_dim), Activation(out_dim)
        self.conv1, self.conv2 = SpaceConv(in_dim, out_dim), SpaceConv(out_dim, out_dim)
        self.skip = nn.Linear(in_dim, out_dim, bias=False) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Grid) -> Float[Tensor, "b t h w _d"]:
        return add(self.skip(x), self.conv2(self.activation2(self.conv1(self.activation1(x)))))


class SpaceAttention(nn.Module):
    """Attention over all positions of a frame, each frame alone."""

    def __init__(self, dim: int):
        super().__init__()
        self.heads = head_count(dim, None)
        self.norm = RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Grid) -> Grid:
        b, t, h, w, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(b * t, h * w, 3, self.heads, -1)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


class SpaceTime(nn.Module):
    """A layer that treats each frame alone, then one along time."""

    def __init__(self, space: nn.Module, time: nn.Module):
        super().__init__()
        self.space, self.time = space, time

    def forward(self, x: Grid, stream: Stream) -> Float[Tensor, "b _t h w _d"]:
        return self.time(self.space(x), stream)


def block(in_dim: int, out_dim: int) -> SpaceTime:
    """A residual block of each frame, then one along time."""
    return SpaceTime(SpaceBlock(in_dim, out_dim), TimeBlock(out_dim))


class Resample(nn.Module):
    """Halves space, then time, by convolutions with stride 2; the temporal one starts as the mean of two frames. Or it
    doubles them (`up`): space by repeating and convolving, then time by a convolution that starts as repeating."""

    def __init__(self, dim: int, scale: Triple, *, up: bool = False):
        super().__init__()
        self.repeats = scale[1:] if up else None
        self.space = SpaceConv(dim, dim, (1, 1) if up else scale[1:]) if max(scale[1:]) > 1 else None
        stride, phases, taps = (1, 2, [0.0, 1.0, 0.0]) if up else (2, 1, [0.0, 0.5, 0.5, 0.0])
        self.time = TimeConv(dim, stride, phases).start_as(taps) if scale[0] > 1 else None
        self.rate = scale[0] if up else 1 / scale[0]
        """Output frames for each input frame."""

    def forward(self, x: Grid, stream: Stream) -> Float[Tensor, "b _t _h _w d"]:
        if self.space is not None:
            x = self.space(repeat(x, self.repeats) if self.repeats else x)
        return x if self.time is None else self.time(x, stream)


def repeat(x: Grid, times: tuple[int, int]) -> Float[Tensor, "b t _h _w d"]:
    """Repeats every position `times` times along h and w, with one copy."""
    j, k = times
    return x[:, :, :, None, :, None].expand(-1, -1, -1, j, -1, k, -1).flatten(4, 5).flatten(2, 3)


def middle(dim: int, sizes: NetworkSizes) -> dict[str, SpaceTime]:
    """The layers between the last level of the encoder and the first of the decoder: blocks and attention."""
    both = SpaceTime(SpaceAttention(dim), TimeAttention(dim, sizes.reach)) if sizes.attention else None
    attention = {"middle_attention": both} if both else {}
    return {"middle_block0": block(dim, dim), **attention, "middle_block1": block(dim, dim)}


class Network(nn.Module):
    """Layers one after another, each called with (grid tensor, stream), then a last convolution.

    Args:
        layers: by name.
        last_dim: channels behind the last of them.
        out_dim: channels of the result.
        checkpointing: recompute residual blocks in the backward pass."""

    def __init__(self, layers: dict[str, nn.Module], last_dim: int, out_dim: int, checkpointing: bool):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.activation = Activation(last_dim)
        self.leave = SpaceConv(last_dim, out_dim, bias=True)
        self.checkpointing = checkpointing

    def forward(self, x: Float[Tensor, "b i t h w"]) -> Float[Tensor, "b o _t _h _w"]:
        """A whole clip."""
        grid, stream = self._grid(x), Stream(last=True)
        for layer in self.layers.values():
            if self.checkpointing and torch.is_grad_enabled() and isinstance(getattr(layer, "space", None), SpaceBlock):
                grid = checkpoint(layer, grid, stream, use_reentrant=False)
            else:
                grid = layer(grid, stream)
        return self._leave(grid)

    @torch.no_grad()
    def stream(
        self, piece: Float[Tensor, "b i t h w"], stream: Stream, most: int
    ) -> Iterator[Float[Tensor, "b o _t _h _w"]]:
        """The next piece of a clip -> the frames that are ready by now; at the clip's end, all that are left. `most`:
        frames that the first layer takes at once; later layers take as many as result from them. Where a layer returns
        more, as at the end of a clip, when it returns all that it held, later ones take that in several calls."""
        yield from self._stream(self._grid(piece), stream, most, list(self.layers.values()))

    def _stream(self, grid: Grid, stream: Stream, most: int, layers: list[nn.Module]) -> Iterator[Tensor]:
        for i, layer in enumerate(layers):
            if grid.shape[1] > most:
                pieces, last = grid.split(most, 1), stream.last
                for number, piece in enumerate(pieces, 1):
                    stream.last = last and number == len(pieces)
                    yield from self._stream(piece, stream, most, layers[i:])
                stream.last = last
                return
            grid = layer(grid, stream)
            if not grid.shape[1]:
                return
            most = max(1, round(most * getattr(layer, "rate", 1)))
        yield self._leave(grid)

    def _grid(self, x: Tensor) -> Grid:
        return x.to(self.leave.weight.dtype).movedim(1, -1).contiguous()

    def _leave(self, grid: Grid) -> Tensor:
        return self.leave(self.activation(grid)).movedim(-1, 1)


def encoder(sizes: NetworkSizes, checkpointing: bool = False) -> Network:
    """Video [b 3 t h w] -> mean and log variance of the latents [b 2*channels _t _h _w]; _t is ceil(t / stride)."""
    widths = sizes.widths
    layers: dict[str, nn.Module] = {"enter": SpaceConv(3, widths[0])}
    before = widths[0]
    for i, width in enumerate(widths):
        for j in range(sizes.blocks):
            layers[f"level{i}_block{j}"] = block(before, width)
            before = width
        if i < len(sizes.scales):
            layers[f"level{i}_down"] = Resample(width, sizes.scales[i])
    layers |= middle(before, sizes)
    return Network(layers, before, 2 * sizes.channels, checkpointing)


def decoder(sizes: NetworkSizes, checkpointing: bool = False) -> Network:
    """Latents [b channels t h w] -> video [b 3 _t _h _w]. Each level has one block more than the encoder's."""
    widths = sizes.widths
    before = widths[-1]
    layers: dict[str, nn.Module] = {"enter": SpaceConv(sizes.channels, before), **middle(before, sizes)}
    for i, width in reversed(list(enumerate(widths))):
        for j in range(sizes.blocks + 1):
            layers[f"level{i}_block{j}"] = block(before, width)
            before = width
        if i > 0:
            layers[f"level{i}_up"] = Resample(width, sizes.scales[i - 1], up=True)
    return Network(layers, before, 3, checkpointing)


SLOPE = 0.2
WIDEST_LAYER = 8
"""Largest width of a layer, in units of the first one's width."""


class Discriminator(nn.Module):
    """Scores overlapping pieces of a short clip: above 0 for real, below for reconstructed.

    PatchGAN (arXiv 1611.07004) over time too: layers halve height and width, all but the first one also the frames,
    rounded up, so that an image is a clip of one frame. Norms are over the channels of one position [ours]: unlike
    those over a batch, they let neither samples nor frames see each other. With 3 layers a score sees 54 x 54 pixels.

    Args:
        width: channels of the first layer.
        layers: how many halve height and width."""

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        widths = [width * min(2**layer, WIDEST_LAYER) for layer in range(layers + 1)]
        self.first = ClipConv(3, width, 4, (1, 2, 2))
        pairs = zip(widths[:-2], widths[1:-1], strict=True)
        self.halving = nn.ModuleList(ClipConv(a, b, 4, (2, 2, 2), bias=False) for a, b in pairs)
        self.middle = ClipConv(widths[-2], widths[-1], 3, bias=False)
        self.norms = nn.ModuleList(RMSNorm(width) for width in widths[1:])
        self.last = ClipConv(widths[-1], 1, 3)

    def forward(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 1 _t _h _w"]:
        """Pixels in -1..1 -> scores. Height and width are at least 2^layers."""
        x = F.leaky_relu(self.first(video), SLOPE)
        for conv, norm in zip([*self.halving, self.middle], self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x).movedim(1, -1)).movedim(-1, 1), SLOPE)
        return self.last(x)
