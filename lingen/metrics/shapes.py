"""The judge of the shapes data set: which colour, shape and motion does a clip show? Image processing, no learning. It
looks at how far a pixel lies from the background towards the object's colour (0..1, `_coverage`), so that soft or noisy
clips of a small model are judged by the same measures as drawn ones. All thresholds are ours."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Complex, Float, UInt8

from lingen.data.synthetic import COLOURS, MOTIONS, SHAPES, parse_caption

EMPTY = 0.15
"""A clip whose farthest pixels lie closer to the background than this (RGB distance; white to black: 1.7) is empty."""
GREY = 0.12
"""Below this chroma an object has no colour."""
TRIANGLE, SQUARE = 0.25, 0.15
"""Least threefold and fourfold symmetry: at 24x24 triangles have 0.5-0.65, squares 0.28-0.43, the others below 0.07."""
MOVE, GROW, TURN = 0.43, 1.2, np.pi
"""Size of each motion over a whole clip: sides travelled, log of the area ratio, radians."""
STILL = 0.3
"""Below this share of a whole motion nothing moves."""


class Verdict(NamedTuple):
    """What a clip shows; None where it shows nothing of that sort (a grey object, an image's motion, an empty clip)."""

    colour: str | None
    shape: str | None
    motion: str | None
    empty: bool


@dataclass(frozen=True)
class Rate:
    """A share with its 95% interval over captions (`clustered_interval`), and what guessing would give."""

    share: float
    low: float
    high: float
    chance: float


@dataclass(frozen=True)
class Score:
    """How often sampled clips show what their captions say."""

    clips: int
    empty: int
    captions: int
    """How many different ones."""
    diversity: float | None
    """How far two clips of one caption are apart (`diversity_of`)."""
    colour: Rate
    shape: Rate
    motion: Rate
    all: Rate
    """Colour, shape and motion right together."""


def score_clips(clips: Sequence[UInt8[np.ndarray, "t h w 3"]], captions: Sequence[str]) -> Score:
    """Judges each clip against its caption. A caption without a motion (an image's) is right with any. ValueError for
    no clips, another number of captions than clips, or a caption of another data set."""
    if len(clips) != len(captions) or not clips:
        raise ValueError(f"A caption for each clip is needed, got {len(clips)} clips and {len(captions)} captions.")
    verdicts = [judge(clip) for clip in clips]
    asked = [parse_caption(caption) for caption in captions]
    both = zip(verdicts, asked, strict=True)
    told = [(v.colour == a.colour, v.shape == a.shape, not v.empty and a.motion in (None, v.motion)) for v, a in both]
    right = np.array(told)
    same = [[number for number, text in enumerate(captions) if text == one] for one in dict.fromkeys(captions)]
    chances = (1 / len(COLOURS), 1 / len(SHAPES), 1 / len(MOTIONS) if any(a.motion for a in asked) else 1.0)
    colour, shape, motion = (_rate(column, same, chance) for column, chance in zip(right.T, chances, strict=True))
    together = _rate(np.all(right, axis=1), same, float(np.prod(chances)))
    apart = diversity_of([[clips[number] for number in numbers] for numbers in same])
    return Score(len(clips), sum(v.empty for v in verdicts), len(same), apart, colour, shape, motion, together)


def diversity_of(groups: Sequence[Sequence[UInt8[np.ndarray, "t h w 3"]]]) -> float | None:
    """Root mean square of the difference of two clips' pixels (0..1), over all pairs within a group, then over the
    groups [ours]; None where no group has two clips. 0: each caption has one clip, many times."""
    found = []
    for group in groups:
        pixels = [np.asarray(clip).astype(np.float32) / 255 for clip in group]
        found += [[np.mean((a - b) ** 2) for a, b in itertools.combinations(pixels, 2)]] if len(group) > 1 else []
    return float(np.sqrt(np.mean([np.mean(group) for group in found]))) if found else None


def wilson(right: float, total: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a share (Wilson 1927): sound for few samples and near 0 and 1, unlike share +- z sd."""
    if total < 1:
        raise ValueError("A share needs at least one sample.")
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_interval(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """95% interval of a share whose samples come in clusters, here the clips of a caption: for what it would be over
    other captions, too.

    Wilson's interval on the effective number of samples, share (1 - share) / variance of the share between m clusters,
    with Student's t of m - 1 degrees instead of 1.96 (Korn and Graubard 1998; Dean and Pagano 2015). The variance is
    estimated with two clusters added, one all right and one all wrong, in the manner of Agresti and Coull 1998 [ours]:
    else it is 0 where all are right, and coverage falls to 86% for 12 clusters near 0 and 1. So it is never below 95%,
    and too wide where clusters are large and alike.

    Args:
        counts: of each cluster (right, samples)."""
    right, total, m = sum(one for one, _ in counts), sum(n for _, n in counts), len(counts)
    means = np.array([one / n for one, n in counts] + [0.0, 1.0])
    effective = means.mean() * (1 - means.mean()) / (means.var(ddof=1) / m)
    effective = min(max(1.0, float(effective)), total)
    return wilson(right / total * effective, effective, student(m - 1))


def student(degrees: int) -> float:
    """The 97.5% quantile of Student's t, to 0.004 (Abramowitz and Stegun 26.7.5); of at least 1 degree of freedom."""
    d = max(1, degrees)
    terms = 2.3722712787051083, 2.8224987053284156, 2.5558497911596096, 1.5895341454947804
    series = 1.959964 + sum(term / d**power for power, term in enumerate(terms, 1))
    return {1: 12.706, 2: 4.303}.get(d, series)


def _rate(right: Any, same: Sequence[Sequence[int]], chance: float) -> Rate:
    low, high = clustered_interval([(int(right[numbers].sum()), len(numbers)) for numbers in same])
    return Rate(float(right.mean()), low, high, chance)


def judge(clip: UInt8[np.ndarray, "t h w 3"]) -> Verdict:
    """What a clip of one shape on a plain background shows; t = 1 for an image."""
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3:
        raise ValueError(f"A clip is uint8 [t h w 3], got {clip.dtype} {list(clip.shape)}.")
    found = _coverage(clip / 255.0)
    if found is None:
        return Verdict(None, None, None, True)
    cover, colour, light = found
    return Verdict(_colour(colour), _shape(cover), _motion(cover, light), False)


def _coverage(
    clip: Float[np.ndarray, "t h w 3"],
) -> tuple[Float[np.ndarray, "t h w"], Float[np.ndarray, " 3"], Float[np.ndarray, "t h w"]] | None:
    """How much of each pixel the object covers, the object's colour, and the light on each pixel; None if empty."""
    strips = (clip[:, :2], clip[:, -2:], clip[:, :, :2], clip[:, :, -2:])
    away = clip - np.median(np.concatenate([strip.reshape(-1, 3) for strip in strips]), axis=0)
    distance = _smooth(np.linalg.norm(away, axis=-1))
    peak = np.quantile(distance, 0.99)
    core = distance > 0.6 * peak
    if peak < EMPTY or core.mean() > 1 / 3:
        return None
    towards = np.median(away[core], axis=0)
    cover = _main_blob(np.clip(1.25 * (away @ towards) / (towards @ towards), 0, 1))
    colour = np.median(clip[core], axis=0)
    return cover, colour, clip @ (colour / max(colour @ colour, 1e-6))


def _smooth(image: Float[np.ndarray, "t h w"]) -> Float[np.ndarray, "t h w"]:
    """A 3x3 mean."""
    t, h, w = image.shape
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    return np.sum([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0) / 9


def _main_blob(cover: Float[np.ndarray, "t h w"]) -> Float[np.ndarray, "t h w"]:
    """Keeps, in each frame, the region around the best covered pixel that is connected by pixels covered by a third."""
    solid = _smooth(cover)
    frames = solid.reshape(len(cover), -1)
    keep = (np.arange(frames.shape[1]) == frames.argmax(1)[:, None]).reshape(cover.shape)
    size = 0
    while size < (size := keep.sum()):
        keep = (_smooth(keep.astype(float)) > 0) & (solid > 1 / 3) | keep
    return cover * (_smooth(keep.astype(float)) > 0)


def _colour(rgb: Float[np.ndarray, " 3"]) -> str | None:
    """The nearest hue."""
    hues = {name: _chroma(np.array(value)) for name, value in COLOURS.items()}
    chroma = _chroma(rgb)
    if abs(chroma) < GREY:
        return None
    return max(hues, key=lambda name: (chroma * hues[name].conjugate()).real / abs(hues[name]))


def _chroma(rgb: Float[np.ndarray, " 3"]) -> complex:
    """Colour as a complex number: hue is its angle, chroma its length."""
    r, g, b = rgb
    return complex(r - (g + b) / 2, sqrt(3) / 2 * (g - b))


def _offsets(
    cover: Float[np.ndarray, "t h w"],
) -> tuple[Complex[np.ndarray, "t h w"], Float[np.ndarray, " t"], Complex[np.ndarray, " t"]]:
    """Each pixel's place relative to the object's centre (x + iy, y upwards), the object's area, and its centre."""
    _, h, w = cover.shape
    rows, columns = np.mgrid[0:h, 0:w]
    place = columns - 1j * rows
    area = np.maximum(cover.sum((1, 2)), 1e-6)
    centre = (cover * place).sum((1, 2)) / area
    return place - centre[:, None, None], area, centre


def _shape(cover: Float[np.ndarray, "t h w"]) -> str:
    """By the n-fold symmetry |sum z^n| / sum |z|^n of its pixels z, which no turn changes; large areas weigh more."""
    z, area, _ = _offsets(cover)
    powers = [(abs((cover * z**n).sum((1, 2))), (cover * abs(z) ** n).sum((1, 2))) for n in (3, 4)]
    three, four = (np.average(turned / np.maximum(size, 1e-6), weights=area) for turned, size in powers)
    return "triangle" if three > TRIANGLE else "square" if four > SQUARE else "circle"


def _motion(cover: Float[np.ndarray, "t h w"], light: Float[np.ndarray, "t h w"]) -> str | None:
    """The motion done most completely: centre and log area by a straight line over time, turning by the bright side."""
    t, h, w = cover.shape
    if t == 1 or cover.max((1, 2)).min() < 0.5:  # an image, or an object that is missing in some frames
        return None
    z, area, centre = _offsets(cover)
    s = np.linspace(-0.5, 0.5, t)
    slope = s / (s @ s)
    travel = centre @ slope / min(h, w)
    mean = (cover * light).sum((1, 2)) / area
    inside = cover * (cover > 0.9)
    bright = (inside * (light - mean[:, None, None]) * z).sum((1, 2)) / area**1.5
    done = {"moves left": -travel.real / MOVE, "moves right": travel.real / MOVE, "moves down": -travel.imag / MOVE}
    done |= {"moves up": travel.imag / MOVE, "grows": np.log(area) @ slope / GROW, "turns": abs(_turn(bright)) / TURN}
    motion = max(done, key=lambda name: done[name])
    return motion if done[motion] > STILL else None


def _turn(bright: Complex[np.ndarray, " t"]) -> float:
    """Radians that the bright side turns over the clip: the steady turn that fits all frames best (matched filter)."""
    if abs(bright).mean() < 2e-3:
        return 0.0
    turns = np.linspace(-1.5, 1.5, 181) * np.pi
    fit = abs(np.exp(-1j * np.outer(turns, np.linspace(0, 1, len(bright)))) @ bright)
    return float(turns[fit.argmax()])
