"""How close a reconstruction is to its clip: scores, a baseline with as many numbers, and pictures."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from lingen.autoencoder.ways import Video

MOST_PSNR = 100.0
"""Largest PSNR in dB, that of equal clips: float32 cannot tell smaller errors from none (ours)."""
LEAST_SIDE = 11
"""Pixels: SSIM looks through a window of 11 x 11."""
AT_ONCE = 8
"""Frames that are compared at once."""


@dataclass(frozen=True)
class Quality:
    """What a reconstruction x' of a clip x scores; frames are clamped to 0..1. Flicker's definitions are ours. None
    where there is nothing to measure: perceptual distance without its weights, flicker of a single frame."""

    psnr: float
    """dB: 10 log10(1 / mean squared error of all numbers of the clip), at most `MOST_PSNR`."""
    ssim: float
    """Structural similarity (Wang et al., 2004; window 11, sigma 1.5), a mean over frames."""
    perceptual: float | None
    """`lingen.autoencoder.perceptual`, a mean over frames."""
    flicker: float | None
    """F(x') - F(x), F being the mean of |x[t+1] - x[t]|. Above 0 it flickers more than the clip, below it is duller."""
    flicker_share: float | None
    """(F(x') - F(x)) / F(x); None where the clip stands still."""
    error_flicker: float | None
    """Root mean square of e[t+1] - e[t], e = x' - x: also what moves without F changing, such as crawling blocks."""


class Comparison:
    """Compares a clip with its reconstruction piece by piece; memory does not grow with the length.

    Args:
        perceptual: a distance of pairs of frames in -1..1, ``forward(a [n 3 h w], b) -> [n]``."""

    def __init__(self, perceptual: nn.Module | None = None):
        self.perceptual = perceptual
        self.frames = self.steps = 0
        self._sums: dict[str, float] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(self, clip: Video, rebuilt: Video) -> None:
        """The next frames of one clip, in -1..1. ValueError for other shapes, frames too small for SSIM, a
        reconstruction that is not finite."""
        if clip.shape != rebuilt.shape or len(clip) != 1:
            raise ValueError(f"One clip and its reconstruction are compared, got {[*clip.shape]}, {[*rebuilt.shape]}.")
        if min(clip.shape[3:]) < LEAST_SIDE:
            raise ValueError(f"SSIM needs frames of {LEAST_SIDE} x {LEAST_SIDE} or more, got {[*clip.shape[3:]]}.")
        if not torch.isfinite(rebuilt).all():
            raise ValueError("The reconstruction holds NaN or infinity.")
        for pair in zip(clip.split(AT_ONCE, 2), rebuilt.split(AT_ONCE, 2), strict=True):
            self._add(*((video[0].float().clamp(-1, 1) + 1).movedim(1, 0) / 2 for video in pair))

    def _add(self, clip: Tensor, rebuilt: Tensor) -> None:
        """Frames [t 3 h w] in 0..1."""
        self.frames += len(clip)
        self._sum("squares", (rebuilt - clip).square().mean((1, 2, 3)))
        ssim = structural_similarity_index_measure(rebuilt, clip, data_range=1.0, reduction="none")
        self._sum("ssim", ssim if isinstance(ssim, Tensor) else ssim[0])
        if self.perceptual is not None:
            self._sum("perceptual", self.perceptual(clip * 2 - 1, rebuilt * 2 - 1))
        if self._last is not None:
            clip, rebuilt = (torch.cat(pair) for pair in zip(self._last, (clip, rebuilt), strict=True))
        self._last = clip[-1:].clone(), rebuilt[-1:].clone()
        before, after = clip.diff(dim=0), rebuilt.diff(dim=0)
        self.steps += len(before)
        self._sum("motion", before.abs().mean((1, 2, 3)))
        self._sum("rebuilt_motion", after.abs().mean((1, 2, 3)))
        self._sum("error_motion", (after - before).square().mean((1, 2, 3)))

    def _sum(self, name: str, each: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(each.double().sum())

    def result(self) -> Quality:
        """ValueError where nothing was compared."""
        if not self.frames:
            raise ValueError("No frames were compared.")
        mean = {name: total / self.frames for name, total in self._sums.items()}
        scores = mse_to_psnr(mean["squares"]), mean["ssim"], mean.get("perceptual")
        if not self.steps:
            return Quality(*scores, None, None, None)
        before, after, error = (self._sums[f"{name}motion"] / self.steps for name in ("", "rebuilt_", "error_"))
        return Quality(*scores, after - before, (after - before) / before if before else None, math.sqrt(error))


def mse_to_psnr(squares: float) -> float:
    """Mean squared error of numbers in 0..1 -> dB, at most `MOST_PSNR`."""
    return -10 * math.log10(max(squares, 10 ** (-MOST_PSNR / 10)))


def average(qualities: Sequence[Quality]) -> dict[str, float | None]:
    """The mean of each number over clips, of those that have it."""
    rows = [asdict(quality) for quality in qualities]
    held = {name: [row[name] for row in rows if row[name] is not None] for name in Quality.__annotations__}
    return {name: math.fsum(values) / len(values) if values else None for name, values in held.items()}


def bicubic_shape(clip: Sequence[int], numbers: int, *, in_time: bool) -> tuple[int, int, int]:
    """(t, h, w) of a clip made small, whose 3 t h w numbers are as near to `numbers` as whole sizes come (ours).

    Args:
        clip: its t, h, w.
        numbers: to keep, those of the latents.
        in_time: the same factor in t, h and w; else all frames are kept, and each is smaller."""
    t, h, w = clip
    frames = max(1, min(t, round(t * (numbers / (3 * t * h * w)) ** (1 / 3)))) if in_time else t
    side = math.sqrt(numbers / (3 * frames * h * w))
    height = max(1, min(h, round(h * side)))
    return frames, height, max(1, min(w, round(numbers / (3 * frames * height))))


def bicubic(pieces: Iterable[Video], shape: Sequence[int], piece: int = AT_ONCE) -> Iterator[Video]:
    """A clip scaled down and up again: the loss of storing as few numbers as the latents have, without learning.

    Space: bicubic, antialiased on the way down. Time: means of frames on the way down, lines between them on the way
    up. Holds the small clip only.

    Args:
        pieces: of one clip.
        shape: t, h, w of the small clip.
        piece: frames in each piece that is given out."""
    small, size = list[Tensor](), (0, 0)
    for one in pieces:
        size = (one.shape[3], one.shape[4])
        small.append(_resize(one, (shape[1], shape[2])))
    clip = torch.cat(small, 2)
    frames = clip.shape[2]
    if shape[0] < frames:
        clip = F.adaptive_avg_pool3d(clip, (shape[0], shape[1], shape[2]))
        clip = F.interpolate(clip, (frames, shape[1], shape[2]), mode="trilinear")
    for one in clip.split(piece, 2):
        yield _resize(one, size)


def _resize(clip: Tensor, size: tuple[int, int]) -> Tensor:
    frames = clip.movedim(2, 1).flatten(0, 1)
    frames = F.interpolate(frames, size, mode="bicubic", antialias=size[0] <= clip.shape[3])
    return frames.unflatten(0, (len(clip), -1)).movedim(1, 2)
