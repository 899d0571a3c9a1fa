"""One file of footage -> its samples: shots, pieces of the lengths that are wanted, filters, H.264. No torch here."""

import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Int, UInt8
from PIL import ImageOps

from lingen.data.frames import covering, fit_frame, frames_at, nearest_frames
from lingen.data.manifest import Row, media_hash
from lingen.data.pictures import fit_picture, open_picture, reported
from lingen.files import whole_file
from lingen.media import encode_mp4, encode_picture
from lingen.prepare import filters as limits
from lingen.prepare.footage import MEMBERS, MOVING, MediaSource, picture_formats, read_frames, sample_key
from lingen.prepare.journal import KEPT, JournalEntry, Note, Record, parse_record
from lingen.prepare.limits import LOOKS
from lingen.prepare.shots import BLACK, HEIGHT, Track, follow, look

CRF = 18
"""x264's quality: hard to tell from the source."""
KEY_SECONDS = 1.0
"""Seconds between key frames: a clip that begins anywhere decodes half of this for nothing, on average."""
OUTCOME = "__outcome__.json"


class ClipRequirements(NamedTuple):
    """The sizes, frame rate and lengths that the stages of a recipe ask for."""

    sizes: tuple[tuple[tuple[int, int], ...], ...]
    """Heights and widths in pixels, for each stage: a sample is scaled down until it just covers, for every stage, the
    size whose aspect ratio is nearest to its own; never up."""
    fps: float
    """Frames a second; a film of fewer keeps its own."""
    lengths: tuple[int, ...]
    """Frames of a clip, at `fps`, longest first; empty where no stage wants clips."""


class CutJob(NamedTuple):
    """A source and everything that making its samples depends on."""

    source: MediaSource
    captions: list[str]
    fault: str
    """``reason: detail`` where the captions alone leave it out."""
    wanted: ClipRequirements
    filters: limits.Filters
    out: Path
    """A tar file that the samples go to, and the outcome as its last member; it appears whole."""
    mark: str = ""
    """Of its content and captions, as `Note.mark`."""


def make_samples(job: CutJob) -> Record:
    """Makes the samples of a source and writes them to ``job.out``, unless an earlier run has done so: they, what was
    left out, and what was kept, but not as it is (other frame rates, mended time stamps)."""
    if job.fault:
        return Record([], [Note(job.source.key, job.fault)])
    if job.out.is_file():
        with tarfile.open(job.out) as tar:
            return parse_record(tar.extractfile(OUTCOME).read())  # type: ignore[union-attr]
    outcome = Record([], [])
    with whole_file(job.out, durable=False) as partial, tarfile.open(partial, "w") as tar:
        for made, media, about in _make(job, outcome.notes):
            _add(tar, f"{made.row.key}.{made.row.media}", media)
            _add(tar, f"{made.row.key}.json", json.dumps(about, ensure_ascii=False, sort_keys=True).encode())
            outcome.entries.append(made)
        _add(tar, OUTCOME, json.dumps(outcome._asdict()).encode())
    return outcome


SampleFiles = tuple[JournalEntry, bytes, dict[str, Any]]
"""A sample, its media, and its JSON."""


def _make(job: CutJob, notes: list[Note]) -> Iterator[SampleFiles]:
    try:
        yield from _film(job, notes) if job.source.kind == "video" else _picture(job, notes)
    except (ValueError, av.FFmpegError, OSError, MemoryError) as error:
        ours = isinstance(error, ValueError) and not isinstance(error, av.FFmpegError)
        notes.append(Note(job.source.key, str(error) if ours else f"unreadable: {error}"))


def read_samples(path: Path) -> Iterator[dict[str, bytes]]:
    """extension -> content of each sample of a file that `make_samples` wrote, in order."""
    with tarfile.open(path) as tar:
        while (media := tar.next()) is not None and media.name != OUTCOME:
            about: Any = tar.next()
            yield {member.name.rpartition(".")[2]: tar.extractfile(member).read() for member in (media, about)}  # type: ignore[union-attr]


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _film(job: CutJob, notes: list[Note]) -> Iterator[SampleFiles]:
    """The pieces of a film that no filter leaves out. The film is decoded twice, to measure it and to cut it."""
    track = follow(read_frames(job.source.path))
    verdict = limits.judge_film(track, job.filters)
    if verdict:
        notes.append(Note(job.source.key, verdict))
        return
    fps = job.wanted.fps if track.fps_at_most >= 0.99 * job.wanted.fps or len(track.times) == 1 else track.fps
    kept: list[tuple[str, Int[np.ndarray, " t"]]] = []
    for number, frames in enumerate(_pieces(job, track, fps, notes)):
        key = f"{sample_key(job.source.key)}-{number:04d}"
        verdict = limits.judge_clip(track, int(frames[0]), int(frames[-1]) + 1, job.filters)
        if verdict:
            notes.append(Note(key, verdict))
        else:
            kept.append((key, frames))
    rounding = track.fps_at_most - track.fps  # 8 frames a second read as 7.99 in a GIF: its times are whole 1/100 s
    if kept and track.fps and abs(track.fps - fps) > max(1e-3 * fps, rounding):
        notes.append(Note(job.source.key, f"{KEPT}retimed from {track.fps:.5g} to {fps:.5g} frames a second"))
    if kept and track.mended:
        told = f"time stamps mended: {track.mended} of {len(track.times)} were missing or did not ascend"
        notes.append(Note(job.source.key, f"{KEPT}{told}"))
    size = covering(track.size, job.wanted.sizes)
    reel = _reel(job.source.path, size, [number for _, frames in kept for number in frames.tolist()])
    for key, frames in kept:
        media = encode_mp4(itertools.islice(reel, len(frames)), fps, CRF, key_seconds=KEY_SECONDS, exact=True)
        first, end = int(frames[0]), int(frames[-1]) + 1
        motion, jerk = limits.motion_of(track, first, end)
        start = float(track.times[first])
        about = _about(job) | {"start": round(start, 3), "seconds": round(len(frames) / fps, 3)}
        about |= {"source_fps": round(track.fps, 3), "motion": round(motion, 4), "jerk": round(jerk, 4)}
        at = [first + (end - first) * (2 * i + 1) // (2 * LOOKS) for i in range(LOOKS)]
        looks = tuple(int(track.looks[i]) for i in at)
        row = _row(job, key, "mp4", media, size, len(frames), fps)
        yield JournalEntry(row, looks, job.source.key, job.mark), media, about


def _pieces(job: CutJob, track: Track, fps: float, notes: list[Note]) -> Iterator[Int[np.ndarray, " t"]]:
    """Of each piece of each shot, which source frames show it at `fps`; repeats where the film has fewer."""
    for first, end in itertools.pairwise([0, *track.cuts, len(track.times)]):
        times = track.times[first:end]
        interval = 1 / track.fps if track.fps else 1 / fps
        available = frames_at(fps, float(times[-1] - times[0]), interval, len(times), track.tick)
        pieces = divide(available, job.wanted.lengths, job.filters.min_seconds, fps)
        if not pieces:
            where = f"{track.times[first]:.2f} s to {times[-1] + interval:.2f} s"
            told = f"short shot: {available} frames at {fps:.3g} a second, {where}"
            notes.append(Note(job.source.key, told))
        for start, count in pieces:
            yield first + nearest_frames(times, times[0] + (start + np.arange(count)) / fps, track.tick)


def divide(available: int, lengths: tuple[int, ...], min_seconds: float | None, fps: float) -> list[tuple[int, int]]:
    """Pieces of a shot as (first frame, frames): the longest length that fits, again and again; what is left lengthens
    the last. A shot shorter than all is one piece where `min_seconds` allows it, for other recipes."""
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


def _reel(path: Path, size: tuple[int, int], chosen: list[int]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Frames of a film by ascending number, decoded once and fitted to a size; a repeated one again."""
    frames, scaler, number = read_frames(path), VideoReformatter(), -1
    for wanted in chosen:
        if wanted > number:
            frame = next(itertools.islice(frames, wanted - number - 1, None), None)
            if frame is None:
                raise ValueError(f"unreadable: it has no frame {wanted}, though it had when it was looked at")
            number, shown = wanted, fit_frame(frame.picture, scaler, frame.aspect, size).transpose(1, 2, 0)
        yield shown


def _picture(job: CutJob, notes: list[Note]) -> Iterator[SampleFiles]:
    """The picture, its own bytes where it need not be scaled down."""
    data = job.source.path.read_bytes()
    picture = open_picture(data, picture_formats())
    if picture.format in MOVING and getattr(picture, "n_frames", 1) > 1:
        raise ValueError("film among pictures: it moves; name its folder with --videos")
    with reported():
        upright = ImageOps.exif_transpose(picture)
        height, width = upright.height, upright.width
        size = covering((height, width), job.wanted.sizes, even=False)
        grey = np.asarray(upright.convert("L").resize((max(16, round(width * HEIGHT / height)), HEIGHT)))
    black = float((grey > BLACK).mean()) < limits.BLACK_FRAME
    verdict = limits.judge_size((height, width), job.filters)
    if not verdict and black and job.filters.black is not None:
        verdict = "black: the picture"
    if verdict:
        notes.append(Note(job.source.key, verdict))
        return
    media = MEMBERS.get(picture.format, "")
    if size != (height, width) or not media:
        media, data = "webp", encode_picture(fit_picture(upright, size), "webp", quality=95)
    row = _row(job, sample_key(job.source.key), media, data, size, 1, 0.0)
    yield JournalEntry(row, (look(grey),) * LOOKS, job.source.key, job.mark), data, _about(job)


def _row(job: CutJob, key: str, suffix: str, media: bytes, size: tuple[int, int], frames: int, fps: float) -> Row:
    """What the manifest says of a sample, but for where it lies."""
    captions = job.captions
    return Row(
        key, "", 0, 0, job.source.kind, *size, frames, fps, len(captions), len(captions[0]) if captions else 0, suffix,
        media_hash(media), job.source.folder,
    )  # fmt: skip


def _about(job: CutJob) -> dict[str, Any]:
    """The sample's JSON: its captions, and where it comes from."""
    named = {"caption": job.captions[0]} if len(job.captions) == 1 else {"captions": job.captions}
    return (named if job.captions else {}) | {"source": f"{job.source.folder}/{job.source.key}"}
