"""Layers that look along time, a clip at once or piece by piece with the same result.

A layer that looks r frames ahead gives its results r frames late, and keeps what it will look back at: a long clip runs
through the network once, without seams and without computing anything twice. Wan's video autoencoder (arXiv 2503.20314,
section 4.1) keeps frames between pieces in this way for causal layers; looking ahead as well, where a residual sum
waits for its delayed part, is ours. Everything works on the grid tensor [b t h w d]."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lingen.blocks.layers import RMSNorm, head_count, undecayed
from lingen.kernels.norm_silu import norm_silu
from lingen.recipe.sections import Triple

LARGEST_IMAGE = 2**31 - 1
"""Elements of one image that cuDNN can count; PyTorch has slow convolutions of its own for larger ones."""

Grid = Float[Tensor, "b t h w d"]
Ready = Float[Tensor, "b _t h w d"]
"""A grid of as many frames as have all that they need."""


class Stream:
    """What the temporal layers hold between the pieces of one clip; its size does not grow with the clip. The last
    piece must hold a frame at least. A whole clip is a stream of one piece: `Stream(last=True)`."""

    def __init__(self, *, last: bool = False):
        self.last = last
        """Whether the current piece ends the clip: then layers return all that they hold."""
        self.held: dict[nn.Module, Tensor] = {}

    def take(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The frames that a layer held, followed by x."""
        held = self.held.pop(layer, None)
        return x if held is None else torch.cat([held, x], 1)

    def keep(self, layer: nn.Module, x: Tensor) -> None:
        """Keeps a copy of x for the next piece: a view would keep the whole piece in memory."""
        if not self.last:
            self.held[layer] = x.clone()

    def add(self, layer: nn.Module, x: Tensor, late: Tensor) -> Tensor:
        """x + late, where the frames of `late` arrive later than those of x: frames of x are held until then."""
        x = self.take(layer, x)
        self.keep(layer, x[:, late.shape[1] :])
        return add(x if x.shape[1] == late.shape[1] else x[:, : late.shape[1]], late)


def regroup(pieces: Iterable[Tensor], size: int, first: int | None = None) -> Iterator[tuple[Tensor, bool]]:
    """Pieces [b c _t h w] of any lengths -> pieces of `size` frames, and whether each is the last, which has 1..size.
    `first`: of the first one, where it is another number. ValueError where there are no frames at all."""
    held: Tensor | None = None
    wanted = first or size
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece], 2)
        while held.shape[2] > wanted:
            yield held[:, :, :wanted], False
            held, wanted = held[:, :, wanted:], size
    if held is None or not held.shape[2]:
        raise ValueError("A clip must have one frame or more.")
    yield held, True


def add(x: Tensor, update: Tensor) -> Tensor:
    """The sum; without gradients in the place of `update`. With them, writing into what is a view would cost a copy."""
    return x + update if torch.is_grad_enabled() else update.add_(x)


class _Ends(torch.autograd.Function):
    """A clip [b t h w d] with its first frame `before` times more in front of it and its last one `after` times behind.
    One autograd function, because the backward pass of two slices would fill two whole clips with zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, before: int, after: int) -> Tensor:
        ctx.before, ctx.frames = before, x.shape[1]
        return torch.cat([x[:, :1]] * before + [x] + [x[:, -1:]] * after, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        before, inside, after = grads[0].split([ctx.before, ctx.frames, grads[0].shape[1] - ctx.before - ctx.frames], 1)
        grad = inside.clone()
        grad[:, :1] += before.sum(1, keepdim=True)
        grad[:, -1:] += after.sum(1, keepdim=True)
        return grad, None, None


class Activation(nn.Module):
    """silu(rms_norm(x) + bias) over channels, as in Wan's autoencoder: neither frames nor positions depend on each
    other. The only biases between two convolutions are here, where they cost no pass over the clip."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Grid) -> Grid:
        return norm_silu(x, self.weight, self.bias)


class ClipConv(nn.Conv3d):
    """Convolution of a clip, or of an image as a clip of one frame: 3 taps along time, a zero padded to every side.

    An image meets the middle tap alone. Where fewer than 3 frames, rows or columns come, padding is not left to torch:
    in bfloat16 on CPUs it then gives values or gradients that nobody computed (docs/upstream.md).

    Args:
        size: taps along h and along w.
        stride: along t, h and w."""

    def __init__(self, in_dim: int, out_dim: int, size: int, stride: Triple = (1, 1, 1), *, bias: bool = True):
        super().__init__(in_dim, out_dim, (3, size, size), stride, padding=1, bias=bias)

    def forward(self, x: Float[Tensor, "b d t h w"]) -> Float[Tensor, "b e _t _h _w"]:  # type: ignore[override]
        if x.shape[2] == 1:
            y = F.conv2d(x[:, :, 0], self.weight[:, :, 1], self.bias, self.stride[1:], padding=1)  # type: ignore[arg-type]
            return y.unsqueeze(2)
        if min(x.shape[2:]) < 3:
            return F.conv3d(F.pad(x, (1,) * 6), self.weight, self.bias, self.stride)  # type: ignore[arg-type]
        return super().forward(x)


class TimeConv(nn.Conv3d):
    """Convolution along time, the ends padded by repeated frames (Movie Gen, arXiv 2410.13720, section 3.1.1).

    With stride 1 three taps, t frames -> t. With stride 2 four, t frames -> ceil(t / 2) (ours: symmetric about the two
    that become one, where three are not). With 2 phases three taps, t frames -> 2 t, even and odd ones by weights of
    their own, as in Wan: what repeating and three taps can do, at the same cost, and motion within a frame of latents.
    """

    def __init__(self, dim: int, stride: int = 1, phases: int = 1):
        super().__init__(dim, dim * phases, (stride + 2, 1, 1), (stride, 1, 1), bias=False)
        self.phases = phases

    def forward(self, x: Grid, stream: Stream) -> Ready:  # type: ignore[override]
        if not x.shape[1]:
            return x
        stride, held = self.stride[0], stream.held.pop(self, None)
        count = x.shape[1] + (1 if held is None else held.shape[1])
        after = 1 + (count - 1) % stride if stream.last else 0
        # x behind the frames before it and, at the end, before those that follow; how often the taps fit into it.
        padded = _Ends.apply(x, 1, after) if held is None else torch.cat([held, x, *[x[:, -1:]] * after], 1)
        frames = max(0, (padded.shape[1] - self.kernel_size[0]) // stride + 1)
        stream.keep(self, padded[:, frames * stride :])
        if not frames:
            return x[:, :0]
        y = self._convolved(padded.movedim(-1, 1)).movedim(1, -1)
        return y if self.phases == 1 else y.unflatten(-1, (self.phases, -1)).movedim(-2, 2).flatten(1, 2)

    def _convolved(self, x: Float[Tensor, "b d t h w"]) -> Float[Tensor, "b e _t h w"]:
        strips = x.tensor_split(math.ceil(x[0].numel() * self.phases / LARGEST_IMAGE), 3)
        done = [nn.Conv3d.forward(self, strip) for strip in strips]
        return done[0] if len(done) == 1 else torch.cat(done, 3)

    @torch.no_grad()
    def start_as(self, taps: list[float]) -> TimeConv:
        """Sets the weights so that each output channel is the weighted sum of its own frames."""
        same = torch.eye(self.in_channels).repeat(self.phases, 1)
        self.weight.copy_(same[:, :, None, None, None] * torch.tensor(taps)[:, None, None])
        return self


class TimeBlock(nn.Module):
    """Residual block along time; at the start x passes unchanged."""

    def __init__(self, dim: int):
        super().__init__()
        self.activation1, self.activation2 = Activation(dim), Activation(dim)
        self.conv1 = TimeConv(dim)
        self.conv2 = TimeConv(dim).start_as([0.0, 0.0, 0.0])

    def forward(self, x: Grid, stream: Stream) -> Ready:
        late = self.conv1(self.activation1(x), stream)
        return stream.add(self, x, self.conv2(self.activation2(late), stream))


class TimeAttention(nn.Module):
    """Attention of each position over its own past and future, `reach` frames each; at the start x passes unchanged.
    Movie Gen attends over a whole tile; a finite reach is what makes streaming exact (ours). A learned bias for each
    head and distance stands for the order of frames."""

    def __init__(self, dim: int, reach: int):
        super().__init__()
        self.reach, self.heads = reach, head_count(dim, None)
        self.norm = RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias = undecayed(nn.Parameter(torch.zeros(self.heads, 2 * reach + 1)))
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Grid, stream: Stream) -> Ready:
        new = self.qkv(self.norm(x))
        line = stream.take(self.qkv, new)
        # Frames with results are still held, as many as later frames look back at.
        done = max(0, line.shape[1] - new.shape[1] - self.reach)
        ready = max(done, line.shape[1] - (0 if stream.last else self.reach))
        stream.keep(self.qkv, line[:, max(0, ready - self.reach) :])
        q, k, v = line.unflatten(-1, (3, self.heads, -1)).permute(4, 0, 2, 3, 5, 1, 6)  # [b h w k t e]
        steps = torch.arange(line.shape[1], device=line.device)
        distance = steps - steps[done:ready, None]
        bias = self.bias[:, distance.clamp(-self.reach, self.reach) + self.reach]
        bias = bias.masked_fill(distance.abs() > self.reach, -torch.inf)
        q = q[..., done:ready, :] * q.shape[-1] ** -0.5
        weights = (q @ k.mT + bias).softmax(-1)
        return stream.add(self, x, self.out((weights.to(v.dtype) @ v).permute(0, 4, 1, 2, 3, 5).flatten(-2)))
