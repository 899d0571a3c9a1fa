"""Files of footage: which are films and which are pictures, by the extensions that FFmpeg and Pillow declare for what
they read; finding them, naming them, and their frames one after the other, whatever the container."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import av
from av.format import ContainerFormat
from PIL import Image, ImageFile

from lingen.data.frames import decoder_of, picture_stream
from lingen.data.pictures import as_rgb, open_picture, reported, webp_times
from lingen.recipe.errors import RecipeError

NAMES = {"video": "film", "image": "picture"}
OTHER = {"video": "image", "image": "video"}
USUAL = {"video": (".mp4", ".mov", ".mkv", ".webm", ".avi"), "image": (".jpg", ".png", ".webp", ".tiff")}

READ = (
    "mov,matroska,avi,mpeg,mpegts,mpegvideo,gif,asf,flv,mxf,ogg,dv,rm,nut,ivf,wtv,h264,hevc,yuv4mpegpipe,apng,gxf,m4v"
)
"""Containers of films that lie in one file. What FFmpeg reads beside them (playlists, lists of pictures, scripts,
devices, text) can name other files, or is no film."""
WRITTEN = (
    "mov,mp4,ipod,3gp,3g2,psp,ismv,f4v,matroska,webm,avi,mpeg,dvd,vob,svcd,mpegts,mpeg1video,mpeg2video,gif,asf,flv,"
    "mxf,ogv,dv,rm,nut,ivf,wtv,h264,hevc,yuv4mpegpipe,apng,gxf,m4v"
)
"""The same as FFmpeg names them where it writes: there it declares extensions that it reads by content alone."""
NO_FILMS = frozenset((".m4a", ".m4b", ".wma", ".ra", ".isma", ".mka", ".mks", ".heic", ".heif"))
"""Extensions of the same containers for sound, subtitles and pictures alone."""
NO_PICTURES = frozenset(("EPS", "FLI", "MPEG", "IPTC"))
"""What Pillow reads by running another program, or reads no picture of."""
MEMBERS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
"""Formats of pictures that training reads, as Pillow names them, and the extensions of their members in a shard."""
MOVING = ("GIF", "WEBP", "PNG", "AVIF")
"""Formats whose pictures follow each other in time; several pictures of others are pages or sizes."""
CAPTIONS = (".txt", ".json")
"""Extensions of captions beside a file."""


@cache
def extensions(kind: str) -> frozenset[str]:
    """Extensions of a kind, ``image`` or ``video``, in lower case with their dots. ``.gif`` and a few are of both."""
    if kind == "image":
        read = picture_formats()
        return frozenset(one for one, name in Image.registered_extensions().items() if name in read)
    found = {".gif", ".apng", ".webp"}
    for name in f"{READ},{WRITTEN}".split(","):
        with suppress(ValueError):  # FFmpeg was built without it
            found |= {f".{one}" for one in ContainerFormat(name).extensions} - NO_FILMS - extensions("image")
    return frozenset(found)


@cache
def picture_formats() -> tuple[str, ...]:
    """The formats that Pillow opens by itself, by its names."""
    Image.init()
    opened = ((name, opener) for name, (opener, _) in Image.OPEN.items())
    stubs = {name for name, one in opened if isinstance(one, type) and issubclass(one, ImageFile.StubImageFile)}
    return tuple(sorted(Image.OPEN.keys() - stubs - NO_PICTURES))


class MediaSource(NamedTuple):
    """A file to make samples of."""

    kind: str
    """``image`` or ``video``."""
    key: str
    """Its path below the folder that was named, without the extension: what captions are joined by."""
    path: Path
    folder: str
    """Name of that folder."""


class Footage(NamedTuple):
    """What lies in some folders."""

    sources: list[MediaSource]
    """The files of a kind, sorted by key."""
    unseen: list[tuple[str, str]]
    """Path below the folder and ``reason: detail`` of everything else, but for captions of the sources."""


def look_through(folders: Iterable[str | Path], kind: str, others: Iterable[str | Path] = ()) -> Footage:
    """All files of a kind below the folders, hidden ones left out; linked folders are followed, each folder once.
    RecipeError for a folder that is none or holds no such file, and two files of the same key. `others`: folders that
    are looked through for the other kind: its files there are seen."""
    found: dict[str, MediaSource] = {}
    unseen: list[tuple[str, str]] = []
    both = {os.path.realpath(one) for one in others}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise RecipeError(f"There is no folder '{folder}'. Correct the path, or the folder lingen is started in.")
        other = OTHER[kind]
        elsewhere = extensions(other) if os.path.realpath(folder) in both else frozenset()
        before = len(found)
        rest: list[Path] = []
        for path in _files(folder, unseen):
            if path.suffix.lower() not in extensions(kind):
                rest.append(path)
                continue
            key = _key(path, folder)
            if key in found:
                raise RecipeError(
                    f"'{found[key].path}' and '{path}' have the same key, '{key}'. Rename one of them, or name the "
                    "folder that holds both folders, so that their paths below it differ."
                )
            found[key] = MediaSource(kind, key, path, folder.resolve().name)
        if len(found) == before:
            raise RecipeError(_holds_none(folder, kind, rest))
        media = found.keys() | {_key(path, folder) for path in rest if path.suffix.lower() in extensions(other)}
        for path in rest:
            suffix = path.suffix.lower()
            if suffix in CAPTIONS and _key(path, folder) in media or suffix in elsewhere:
                continue
            unseen.append((_text(path.relative_to(folder).as_posix()), _why_unseen(path, other)))
    return Footage([found[key] for key in sorted(found)], sorted(unseen))


def _key(path: Path, folder: Path) -> str:
    return _text(path.relative_to(folder).with_suffix("").as_posix())


def _why_unseen(path: Path, other: str) -> str:
    """The reason why a file that is no source is not looked at."""
    suffix = path.suffix.lower()
    if suffix in CAPTIONS:
        return "caption without a file: there is no film or picture of its name"
    if suffix in extensions(other):
        return f"{NAMES[other]} among {NAMES[OTHER[other]]}s: name its folder with --{other}s too"
    return f"other file: {suffix or 'no extension'}, which neither FFmpeg nor Pillow is known to read"


def _holds_none(folder: Path, kind: str, rest: list[Path]) -> str:
    """That a folder holds no source, and what it holds."""
    other = OTHER[kind]
    wrong = sum(path.suffix.lower() in extensions(other) for path in rest)
    if wrong:
        return (
            f"'{folder}' holds no {kind} file, but {wrong} {NAMES[other]}{'s' * (wrong > 1)}: name it with "
            f"--{other}s instead of --{kind}s."
        )
    counts = Counter(path.suffix.lower() or "no extension" for path in rest)
    held = ", ".join(f"{count} x {suffix}" for suffix, count in counts.most_common(5)) or "nothing"
    return f"'{folder}' holds no {kind} file (such as {' '.join(USUAL[kind])}), but {held}. Correct the path."


def _files(folder: Path, unseen: list[tuple[str, str]]) -> Iterator[Path]:
    """All files below a folder but for hidden ones, which are `unseen`; real folders before linked ones."""
    seen: set[tuple[int, int]] = set()
    pending = [folder]
    links: list[Path] = []

    def skip(path: Path, reason: str) -> None:
        unseen.append((_text(path.relative_to(folder).as_posix()), reason))

    while pending or links:
        parent = pending.pop() if pending else links.pop(0)
        try:
            about = parent.stat()
            entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
        except OSError as error:
            skip(parent, f"unreadable: {error.strerror}")
            continue
        if (about.st_dev, about.st_ino) in seen:
            skip(parent, "linked folder: it leads to one that is looked at already")
            continue
        seen.add((about.st_dev, about.st_ino))
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                skip(path, "hidden: its name begins with a dot")
            elif entry.is_dir():
                (links if entry.is_symlink() else pending).append(path)
            elif not entry.is_file():
                skip(path, "unreadable: a broken link" if entry.is_symlink() else "unreadable: no file")
            else:
                yield path


def _text(name: str) -> str:
    """A file's name as text that can be written anywhere, though its bytes may not be UTF-8."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def sample_key(key: str) -> str:
    """A source's key as the name of samples: webdataset cuts a name at its first dot and hides those that begin with
    underscores, so these are written as in a URL."""
    escaped = re.sub(r"[%.\x00-\x1f]", lambda match: f"%{ord(match[0]):02X}", key)
    return "%5F" + escaped[1:] if escaped.startswith("_") else escaped


GAP = 0.5
"""Seconds between two frames from which on frames are missing between them (ours)."""


class Frame(NamedTuple):
    """A decoded frame."""

    time: float
    """Seconds since the first frame."""
    picture: Any
    """`av.VideoFrame`, upright once turned as its `orientation` says."""
    aspect: Any
    """Width over height of a pixel; None: square."""
    gap: bool
    """Whether the film is broken before it: damaged frames, a gap of half a second, time stamps that begin anew."""
    tick: float = 0.0
    """Seconds that the container rounds times to."""
    mended: bool = False
    """Whether its time stamp was missing or not behind the one before, so that the average rate gave the time."""


def read_frames(path: Path) -> Iterator[Frame]:
    """All frames of a video in the order in which they are shown; times ascend, whatever the time stamps do. A time
    stamp that is missing or not behind the one before is replaced by the average rate. Where they jump back by more
    than one frame, as where two recordings were joined, the film goes on behind what was before. ValueError:
    ``unreadable: ...``, ``too large: ...``."""
    film = _animation(path) if path.suffix.lower() == ".webp" else _film(path)
    interval, tick = next(film)[:2]
    last, before, offset, gap = -interval, None, None, False
    for stamp, picture, aspect in film:
        if picture is None:
            gap = True
            continue
        time = last + interval if stamp is None or offset is None else stamp + offset
        offset = time - stamp if offset is None and stamp is not None else offset
        mended = stamp is None or time <= last
        if stamp is not None and time <= last:
            time = last + interval
            if before is not None and stamp < before - 1.5 * interval:
                gap, offset = True, time - stamp
        before = before if stamp is None else stamp
        yield Frame(time, picture, aspect, gap or time - max(last, 0.0) > GAP, tick, mended)
        last, gap = time, False


def _film(path: Path) -> Iterator[tuple[Any, Any, Any]]:
    """First (seconds between two frames on average, seconds of the time base, None); then for each frame (seconds or
    None where they are unknown, picture or None where it is damaged, aspect)."""
    options = {"format_whitelist": READ, "protocol_whitelist": "file"}
    try:
        with av.open(str(path), options=options) as file:
            stamps = _decoding_order(file)
        with av.open(str(path), options=options) as file:
            stream = picture_stream(file, "unreadable")
            codec = decoder_of(stream)
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            yield 1 / (rate if 0.1 <= rate <= 480 else 25), float(stream.time_base), None
            for packet in file.demux(stream):
                for picture in _pictures(codec, packet):
                    stamp = None if picture is None else picture.pts
                    if stamps is not None:
                        stamp = stamps.pop() if stamps else None
                    yield None if stamp is None else float(stamp * stream.time_base), picture, codec.sample_aspect_ratio
    except av.FFmpegError as error:
        raise ValueError(f"unreadable: {error.strerror or error}") from error


def _decoding_order(file: Any) -> list[int] | None:
    """The time stamps of a film that has only those of decoding, such as an AVI with B-frames, the last one first; None
    where frames have times at which they are shown. Frames that the decoder reorders cannot have stamps that ascend in
    the order of decoding, and a frame is shown at the time of the one that is decoded in its place."""
    stream = picture_stream(file, "unreadable")
    packets = [(packet.pts, packet.dts) for packet in file.demux(stream) if packet.size]
    stamps = [dts if pts is None else pts for pts, dts in packets]
    if not stream.codec_context.has_b_frames or None in stamps or any(b <= a for a, b in itertools.pairwise(stamps)):
        return None
    return stamps[::-1]


def _pictures(codec: Any, packet: Any) -> Iterator[Any]:
    """What a packet gives, None for a damaged picture; the last packet is empty and drains the decoder."""
    if not packet.size and packet.dts is not None:
        return
    try:
        for picture in codec.decode(packet):
            yield None if picture.is_corrupt else picture
    except av.InvalidDataError:
        yield None


def _animation(path: Path) -> Iterator[tuple[Any, Any, None]]:
    """As `_film`, of an animated WebP, on white; a still one has one picture."""
    data = path.read_bytes()
    animation = open_picture(data, ("WEBP",))
    yield 0.1, 0.001, None
    for number, time in enumerate(webp_times(data)):
        with reported():
            animation.seek(number)
            shown = as_rgb(animation)
        yield float(time), av.VideoFrame.from_image(shown), None
