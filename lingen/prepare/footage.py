"""Files of footage: finding them, naming them, and their frames one after the other, whatever the container."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lingen.data.frames import picture_stream
from lingen.data.pictures import on_plain, open_picture, reported, webp_times
from lingen.recipe.errors import RecipeError

EXTENSIONS = {
    "video": tuple(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .m2v .ts .gif .webp".split()),
    "image": (".jpg", ".jpeg", ".png", ".webp"),
}
FORMATS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,gif"
"""What FFmpeg may take a file for: other formats (playlists, say) can name other files."""


class MediaSource(NamedTuple):
    """A file to make samples of."""

    kind: str
    """``image`` or ``video``."""
    key: str
    """Its path below the folder that was named, without the extension: what captions are joined by."""
    path: Path
    folder: str
    """Name of that folder."""


def find_sources(folders: Iterable[str | Path], kind: str) -> list[MediaSource]:
    """All files of a kind below the folders, hidden ones left out, sorted by key.

    Raises:
        RecipeError: a folder that is none or holds no such file, or two files of the same key.
    """
    found: dict[str, MediaSource] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise RecipeError(f"There is no folder '{folder}'. Correct the path, or the folder lingen is started in.")
        before = len(found)
        for path in _files(folder, EXTENSIONS[kind]):
            key = _text(path.relative_to(folder).with_suffix("").as_posix())
            if key in found:
                raise RecipeError(
                    f"'{found[key].path}' and '{path}' have the same key, '{key}'. Rename one of them, or name the "
                    "folder that holds both folders, so that their paths below it differ."
                )
            found[key] = MediaSource(kind, key, path, folder.resolve().name)
        if len(found) == before:
            endings = ", ".join(EXTENSIONS[kind])
            raise RecipeError(f"'{folder}' holds no {kind} file ({endings}).")
    return [found[key] for key in sorted(found)]


def _files(folder: Path, extensions: tuple[str, ...]) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(extensions) and not name.startswith("."):
                yield Path(parent, name)


def _text(name: str) -> str:
    """A file's name as text that can be written anywhere, though its bytes may not be UTF-8."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def sample_key(key: str) -> str:
    """A source's key as the name of samples: webdataset cuts a name at its first dot and hides those that begin with
    underscores, so these are written as in a URL."""
    escaped = re.sub(r"[%.\x00-\x1f]", lambda match: f"%{ord(match[0]):02X}", key)
    return "%5F" + escaped[1:] if escaped.startswith("_") else escaped


class Frame(NamedTuple):
    """A decoded frame."""

    time: float
    """Seconds since the first frame."""
    picture: Any
    """`av.VideoFrame`, upright once turned by its `rotation`."""
    aspect: Any
    """Width over height of a pixel; None: square."""
    gap: bool
    """Whether frames are missing before it: damaged ones, or a gap of half a second."""


def read_frames(path: Path) -> Iterator[Frame]:
    """The frames of a video in the order in which they are shown.

    Raises:
        ValueError: ``unreadable: ...``, ``too large: ...``.
    """
    last: Frame | None = None
    first, gap = 0.0, False
    for time, picture, aspect in _animation(path) if path.suffix.lower() == ".webp" else _film(path):
        if picture is None:
            gap = True
            continue
        first = time if last is None else first
        if last is not None and time - first <= last.time:
            continue  # of two frames at the same time only one is shown
        late = last is not None and time - first - last.time > 0.5
        last = Frame(time - first, picture, aspect, gap or late)
        yield last
        gap = False


def _film(path: Path) -> Iterator[tuple[float, Any, Any]]:
    """(seconds, picture or None where it is damaged, aspect)"""
    import av

    try:
        with av.open(str(path), options={"format_whitelist": FORMATS, "protocol_whitelist": "file"}) as file:
            stream = picture_stream(file, "unreadable")
            codec = stream.codec_context
            interval = 1 / float(stream.average_rate or 25)
            time = -interval
            for packet in file.demux(stream):
                for picture in _pictures(codec, packet):
                    known = picture is not None and picture.time is not None
                    time = float(picture.time) if known else time + interval
                    yield time, picture, codec.sample_aspect_ratio
    except av.FFmpegError as error:
        raise ValueError(f"unreadable: {error.strerror or error}") from error


def _pictures(codec: Any, packet: Any) -> Iterator[Any]:
    """What a packet gives, None for a damaged picture; the last packet is empty and drains the decoder."""
    import av

    if not packet.size and packet.dts is not None:
        return
    try:
        for picture in codec.decode(packet):
            yield None if picture.is_corrupt else picture
    except av.InvalidDataError:
        yield None


def _animation(path: Path) -> Iterator[tuple[float, Any, None]]:
    """The pictures of an animated WebP, on white; a still one has one."""
    import av

    data = path.read_bytes()
    animation = open_picture(data, ("WEBP",))
    for number, time in enumerate(webp_times(data)):
        with reported():
            animation.seek(number)
            shown = on_plain(animation)
        yield float(time), av.VideoFrame.from_image(shown), None
