"""One file of footage -> its samples: shots, pieces of the lengths that are wanted, filters, H.264. No torch here."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from lingen.data.encode import encode_mp4, encode_webp
from lingen.data.filters import (
    BLACK_FRAME,
    LOOKS,
    Filters,
    Verdict,
    judge_clip,
    judge_film,
    judge_size,
    looks_of,
    motion_of,
)
from lingen.data.footage import Source, read_frames, sample_key
from lingen.data.frames import covering, fit_frame
from lingen.data.pictures import fit_picture, open_picture, reported
from lingen.data.shots import BLACK, HEIGHT, Track, follow, look

CRF = 18
"""x264's quality: hard to tell from the source."""
KEY_SECONDS = 1.0
"""Between key frames: a clip that begins in the middle decodes half a second too much on average."""


class Wanted(NamedTuple):
    """What the stages of a recipe want."""

    size: tuple[int, int]
    """Largest height and width in pixels: samples are scaled down to cover it, never up."""
    fps: float
    """Frames a second; a film of fewer keeps its own."""
    lengths: tuple[int, ...]
    """Frames of a clip, at `fps`, longest first; empty where no stage wants clips."""


class Job(NamedTuple):
    """A source and everything that making its samples depends on."""

    source: Source
    captions: list[str]
    """Empty where there are none and that is allowed."""
    wanted: Wanted
    filters: Filters
    out: Path
    """A tar file that the samples go to; it appears whole."""


class Made(NamedTuple):
    """A sample that lies in the tar."""

    key: str
    media: str
    height: int
    width: int
    frames: int
    fps: float
    looks: tuple[int, ...]


class Outcome(NamedTuple):
    """What became of a source."""

    samples: list[Made]
    drops: list[tuple[str, str]]
    """(the source's key, or a clip's, and ``reason: detail``)"""


def make_samples(job: Job) -> Outcome:
    """Makes the samples of a source and writes them to ``job.out``."""
    drops: list[tuple[str, str]] = []
    made: list[Made] = []
    partial = job.out.with_name(job.out.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(partial, "w") as tar:
        try:
            make = _film if job.source.kind == "video" else _picture
            for sample, media, about in make(job, drops):
                _add(tar, sample.key, {sample.media: media, "json": json.dumps(about, ensure_ascii=False).encode()})
                made.append(sample)
        except (OSError, ValueError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"unreadable: {error}"
            drops.append((job.source.key, reason))
    os.replace(partial, job.out)
    return Outcome(made, drops)


def _add(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    for extension, content in members.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


# films


def _film(job: Job, drops: list[tuple[str, str]]) -> Iterator[tuple[Made, bytes, dict[str, Any]]]:
    """The pieces of a film that no filter leaves out. It is decoded twice: once to see, once to cut."""
    track = follow(read_frames(job.source.path))
    verdict = judge_film(track, job.filters)
    if verdict is not None:
        drops.append((job.source.key, str(verdict)))
        return
    fps = job.wanted.fps if track.fps >= 0.99 * job.wanted.fps or len(track.times) == 1 else track.fps
    kept: list[tuple[str, Int[np.ndarray, " t"]]] = []
    for number, frames in enumerate(_pieces(job, track, fps, drops)):
        key = f"{sample_key(job.source.key)}-{number:04d}"
        verdict = judge_clip(track, int(frames[0]), int(frames[-1]) + 1, job.filters)
        if verdict is not None:
            drops.append((key, str(verdict)))
        else:
            kept.append((key, frames))
    size = covering(track.size, job.wanted.size)
    reel = _Reel(job.source.path, size)
    for key, frames in kept:
        media = encode_mp4(reel.show(frames), fps, CRF, key_seconds=KEY_SECONDS)
        first, end = int(frames[0]), int(frames[-1]) + 1
        motion, jerk = motion_of(track, first, end)
        start = float(track.times[first])
        about = _about(job) | {"start": round(start, 3), "seconds": round(len(frames) / fps, 3)}
        about |= {"motion": round(motion, 4), "jerk": round(jerk, 4)}
        yield Made(key, "mp4", *size, len(frames), fps, looks_of(track, first, end)), media, about


def _pieces(job: Job, track: Track, fps: float, drops: list[tuple[str, str]]) -> Iterator[Int[np.ndarray, " t"]]:
    """Of each piece of each shot, which source frames show it at `fps`; repeats where the film has fewer."""
    bounds = [0, *track.cuts, len(track.times)]
    for first, end in itertools.pairwise(bounds):
        times = track.times[first:end]
        interval = 1 / track.fps if track.fps else 1 / fps
        available = int((times[-1] - times[0] + interval) * fps + 1e-3)
        pieces = divide(available, job.wanted.lengths, job.filters.min_seconds, fps)
        if not pieces:
            where = f"{track.times[first]:.2f} s to {times[-1] + interval:.2f} s"
            drops.append((job.source.key, f"short shot: {available} frames at {fps:.3g} a second, {where}"))
        for start, count in pieces:
            wanted = times[0] + (start + np.arange(count)) / fps
            yield first + np.searchsorted((times[1:] + times[:-1]) / 2, wanted - 1e-6)


def divide(available: int, lengths: tuple[int, ...], min_seconds: float | None, fps: float) -> list[tuple[int, int]]:
    """Pieces of a shot as (first frame, frames): the longest length that fits, again and again; what is left over
    lengthens the last one.

    A shot that is shorter than all lengths is one piece where `min_seconds` allows it: it serves other recipes.
    """
    least = min(lengths, default=1)
    if available < least:
        keep = min_seconds is not None and available >= max(2.0, min_seconds * fps)
        return [(0, available)] if keep else []
    pieces, start = [], 0
    while available - start >= least:
        length = next(length for length in lengths if length <= available - start)
        pieces.append((start, length))
        start += length
    pieces[-1] = (pieces[-1][0], available - pieces[-1][0])
    return pieces


class _Reel:
    """Frames of a film by ascending number, decoded once and fitted to a size."""

    def __init__(self, path: Path, size: tuple[int, int]):
        from av.video.reformatter import VideoReformatter

        self.size = size
        self._frames = read_frames(path)
        self._scaler = VideoReformatter()
        self._number = -1
        self._shown: UInt8[np.ndarray, "h w 3"] = np.empty((0, 0, 3), np.uint8)

    def show(self, chosen: Int[np.ndarray, " t"]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The chosen frames, a repeated one again."""
        for wanted in chosen.tolist():
            if wanted > self._number:
                frame = next(itertools.islice(self._frames, wanted - self._number - 1, None), None)
                if frame is None:
                    raise ValueError(f"unreadable: it has no frame {wanted}, though it had when it was looked at")
                self._number = wanted
                self._shown = fit_frame(frame.picture, self._scaler, frame.aspect, self.size)
            yield self._shown


# pictures


def _picture(job: Job, drops: list[tuple[str, str]]) -> Iterator[tuple[Made, bytes, dict[str, Any]]]:
    """The picture, its own bytes where it need not be scaled down."""
    from PIL import ImageOps

    data = job.source.path.read_bytes()
    picture = open_picture(data, ("PNG", "JPEG", "WEBP"))
    with reported():
        upright = ImageOps.exif_transpose(picture)
        height, width = upright.height, upright.width
        size = covering((height, width), job.wanted.size, even=False)
        grey = np.asarray(upright.convert("L").resize((max(16, round(width * HEIGHT / height)), HEIGHT)))
    black = float((grey > BLACK).mean()) < BLACK_FRAME
    verdict = judge_size((height, width), job.filters)
    if verdict is None and black and job.filters.black is not None:
        verdict = Verdict("black", "the picture")
    if verdict is not None:
        drops.append((job.source.key, str(verdict)))
        return
    media = job.source.path.suffix.lower().removeprefix(".")
    if size != (height, width):
        media, data = "webp", encode_webp(fit_picture(upright, size), quality=95)
    yield Made(sample_key(job.source.key), media, *size, 1, 0.0, (look(grey),) * LOOKS), data, _about(job)


def _about(job: Job) -> dict[str, Any]:
    """The sample's JSON: its captions, and where it comes from."""
    named = {"caption": job.captions[0]} if len(job.captions) == 1 else {"captions": job.captions}
    return (named if job.captions else {}) | {"source": f"{job.source.folder}/{job.source.key}"}
