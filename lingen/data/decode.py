"""From the bytes of a sample to a clip of the size, length and frame rate that a stage wants, and its caption."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

MAX_PIXELS = 50_000_000
"""A larger picture is refused before it is allocated (ours)."""
VIDEO = ("mp4", "webm", "webp")
IMAGE = ("jpg", "jpeg", "png", "webp")


class Refused(ValueError):
    """A picture is too large to be read."""


class ShortClip(ValueError):
    """A video has fewer frames than wanted, after resampling."""

    def __init__(self, available: int, wanted: int):
        super().__init__(f"short clip: {available} frames where {wanted} are wanted")


class Clip(NamedTuple):
    """A decoded clip."""

    pixels: UInt8[Tensor, "3 t h w"]
    starts: int
    """How many clips of this length the video holds: the number of different first frames."""


def decode_sample(
    sample: dict[str, bytes], kind: str, *, frames: int, size: tuple[int, int], fps: float, start: float
) -> Clip:
    """The clip (or the picture: t = 1) of a sample.

    Args:
        sample: extension -> content.
        kind: ``image`` or ``video``; a webp is a picture in the one and an animation in the other.
        frames, size, fps, start: see `decode_video`.
    Raises:
        ValueError: ``reason: detail``, where it cannot be used.
    """
    known = VIDEO if kind == "video" else IMAGE
    suffix = next((suffix for suffix in known if suffix in sample), None)
    if suffix is None:
        raise ValueError(f"no {kind}: none of {', '.join(known)} among {', '.join(sorted(sample)) or 'nothing'}")
    if kind == "image":
        return Clip(decode_image(sample[suffix], size=size), 1)
    decode = decode_animation if suffix == "webp" else decode_video
    return decode(sample[suffix], frames=frames, size=size, fps=fps, start=start)


def captions_of(sample: dict[str, bytes]) -> list[str]:
    """`captions` (a list) or `caption` of the JSON, else the text of the .txt; at least one.

    Raises:
        ValueError: ``no caption`` (none, or one of them empty), ``broken JSON``, ``caption is not UTF-8``.
    """
    try:
        about = json.loads(sample["json"].decode()) if "json" in sample else None
        about = about if isinstance(about, dict) else {}
        found = about.get("captions") or about.get("caption")
        if found is None:
            found = sample.get("txt", b"").decode()
        found = found if isinstance(found, list) else [found]
        captions = [text.strip() if isinstance(text, str) else "" for text in found]
        "".join(captions).encode()  # JSON can hold half a surrogate pair
    except UnicodeError as error:
        raise ValueError("caption is not UTF-8") from error
    except ValueError as error:
        raise ValueError(f"broken JSON: {error}") from error
    if not all(captions):
        raise ValueError("no caption")
    return captions


def caption_of(sample: dict[str, bytes], draw: float = 0.0) -> str:
    """One of the captions, chosen by ``0 <= draw < 1``; errors as for `captions_of`."""
    captions = captions_of(sample)
    return captions[int(draw * len(captions))]


# video


def decode_video(data: bytes, *, frames: int, size: tuple[int, int], fps: float, start: float) -> Clip:
    """A clip of an MP4 or a WebM, resampled by the time stamps of its frames, whatever its header says.

    Decoding begins at the key frame before the clip and ends with its last frame.

    Args:
        data: the file.
        frames: frames wanted.
        size: height and width in pixels: the smaller side is scaled to cover it, the centre is cut out.
        fps: frames per second wanted; each frame is the nearest one in time.
        start: 0 <= start < 1, where between the first and the last possible beginning the clip begins.
    Raises:
        ShortClip: too few frames.
        ValueError: broken or refused bytes.
    """
    import av

    try:
        opened: Any = av.open(io.BytesIO(data), format=_container(data))
        with opened as file:
            if not file.streams.video:
                raise ValueError("broken video: there is no picture in it")
            stream = file.streams.video[0]
            codec = stream.codec_context
            _refuse_bomb(codec.width, codec.height)
            codec.options = {"max_pixels": str(MAX_PIXELS)}
            codec.thread_count = 1  # the workers share the cores
            packets = [p for p in file.demux(stream) if p.pts is not None and p.size]
            shown = np.array(sorted(p.pts for p in packets if not p.is_discard), np.int64)
            chosen, starts = _resample((shown - shown[:1]) * float(stream.time_base), frames, fps, start)
            decoded = _decode(codec, packets, shown[chosen], size)
    except av.FFmpegError as error:
        raise ValueError(f"broken video: {error.strerror or error}") from error
    return Clip(_stack(decoded), starts)


def _container(data: bytes) -> str:
    """The only formats that FFmpeg may take the bytes for: others (playlists, say) can name other files."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        return "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    raise ValueError("broken video: neither an MP4 nor a WebM")


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Refused(f"too large: {width} x {height} pixels, at most {MAX_PIXELS // 1_000_000} million are read")


def _resample(
    times: Float[np.ndarray, " n"], frames: int, fps: float, start: float
) -> tuple[Int[np.ndarray, " t"], int]:
    """Which source frames make the clip.

    Args:
        times: when each source frame is shown, in seconds from the first one, ascending.
    Returns:
        indices into `times`, and the number of possible beginnings. ShortClip where there is none.
    """
    if len(times) == 0:
        raise ShortClip(0, frames)
    interval = times[-1] / (len(times) - 1) if len(times) > 1 else 1 / fps
    available = int((times[-1] + interval) * fps + 1e-3)
    starts = available - frames + 1
    if starts < 1:
        raise ShortClip(available, frames)
    wanted = (int(start * starts) + np.arange(frames)) / fps
    halfway = (times[1:] + times[:-1]) / 2
    return np.searchsorted(halfway, wanted - 1e-6), starts  # of two frames equally near, the earlier one


def _decode(codec: Any, packets: list[Any], chosen: Int[np.ndarray, " t"], size: tuple[int, int]) -> list[np.ndarray]:
    """The frames with the presentation times `chosen` (ascending, with repeats), fitted to `size`.

    From the key frame before the first to the last one of them, without pictures that no other one is built from. Where
    that does not give all, everything is decoded: a container may call a frame a key frame that is none, and pictures
    of x264 before build 151 need what stands in the very first packet.
    """
    needed = set(chosen.tolist())
    key = max((i for i, p in enumerate(packets) if p.is_keyframe and p.pts <= chosen[0]), default=0)
    end = max((i for i, p in enumerate(packets) if p.pts in needed), default=len(packets)) + 1
    lean = (p for p in packets[key:end] if p.pts in needed or not _is_spare(p, codec))
    found = _pick(codec, lean, needed, size)
    if len(found) < len(needed):
        codec.flush_buffers()
        found |= _pick(codec, packets, needed - found.keys(), size)
    if len(found) < len(needed):
        raise ValueError(f"broken video: {len(needed) - len(found)} of {len(needed)} frames cannot be decoded")
    return [found[pts] for pts in chosen.tolist()]


def _pick(codec: Any, packets: Iterable[Any], needed: set[int], size: tuple[int, int]) -> dict[int, np.ndarray]:
    """Presentation time -> those of the needed frames that the packets give, fitted to `size`."""
    from av.video.reformatter import VideoReformatter

    scaler = VideoReformatter()  # one for all frames: it keeps its tables
    found: dict[int, np.ndarray] = {}
    for packet in itertools.chain(packets, [None]):  # None drains the decoder
        for frame in codec.decode(packet):
            if frame.pts in needed and frame.pts not in found and not frame.is_corrupt:
                found[frame.pts] = _fit_frame(frame, scaler, codec.sample_aspect_ratio, size)
        if len(found) == len(needed):
            break
    return found


def _is_spare(packet: Any, codec: Any) -> bool:
    """Can the decoder do without this picture, since no other one refers to it? Known for H.264 in MP4 and Matroska
    (ISO 14496-10, 7.4.1: nal_ref_idc 0; 14496-15: units behind their lengths), and where the container says so."""
    if packet.is_disposable or codec.name != "h264" or not codec.extradata or codec.extradata[0] != 1:
        return bool(packet.is_disposable)
    data, width, position = memoryview(packet), (codec.extradata[4] & 3) + 1, 0
    while position + width < len(data):
        unit = data[position + width]
        if 1 <= unit & 31 <= 5:  # a slice
            return not unit >> 5 & 3
        position += width + int.from_bytes(data[position : position + width], "big")
    return False


def _fit_frame(frame: Any, scaler: Any, aspect: Any, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Scales to cover `size`, turns upright, cuts out the centre."""
    from av.video.reformatter import Interpolation

    _refuse_bomb(frame.width, frame.height)
    turns = round(frame.rotation / 90) % 4
    height, width = size if turns % 2 == 0 else size[::-1]
    shown_width = frame.width * float(aspect or 1)
    scale = max(height / frame.height, width / shown_width)
    scaled = max(height, round(frame.height * scale)), max(width, round(shown_width * scale))
    _refuse_bomb(scaled[1], scaled[0])  # a sliver grows without bounds
    method = Interpolation.AREA if scale < 1 else Interpolation.BICUBIC
    pixels = scaler.reformat(frame, scaled[1], scaled[0], "rgb24", interpolation=method, threads=1).to_ndarray()
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return np.rot90(pixels[top : top + height, left : left + width], turns)


def _stack(pictures: list[np.ndarray]) -> UInt8[Tensor, "3 t h w"]:
    return torch.from_numpy(np.stack(pictures).transpose(3, 0, 1, 2).copy())


# pictures


def decode_image(data: bytes, *, size: tuple[int, int]) -> UInt8[Tensor, "3 1 h w"]:
    """A PNG, JPEG or WebP (its first picture), upright, on white where it is transparent.

    Args:
        data: the file.
        size: height and width in pixels: scaled to cover it, the centre is cut out.
    Raises:
        ValueError: broken bytes, or more than 50 million pixels.
    """
    from PIL import ImageOps

    picture = _open(data, ("PNG", "JPEG", "WEBP"))
    with _reported():
        picture.draft("RGB", size[::-1])  # a JPEG is decoded no larger than needed
        return _stack([_fit_picture(ImageOps.exif_transpose(picture), size)])


def decode_animation(data: bytes, *, frames: int, size: tuple[int, int], fps: float, start: float) -> Clip:
    """A clip of an animated WebP; arguments and errors as for `decode_video`. Decoding ends with the clip."""
    picture = _open(data, ("WEBP",))
    chosen, starts = _resample(_webp_times(data), frames, fps, start)
    found: dict[int, np.ndarray] = {}
    with _reported():
        for number in sorted(set(chosen.tolist())):
            picture.seek(number)
            found[number] = _fit_picture(picture, size)
    return Clip(_stack([found[number] for number in chosen.tolist()]), starts)


def _open(data: bytes, formats: tuple[str, ...]) -> Any:
    from PIL import Image, UnidentifiedImageError

    with _reported(), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower, and an error
        if data[:4] == b"RIFF":
            _refuse_bomb(*_webp_size(data))  # Pillow allocates a WebP's canvas when it opens it
        try:
            picture = Image.open(io.BytesIO(data), formats=formats)
        except UnidentifiedImageError as error:
            raise ValueError(f"none of {', '.join(formats)}") from error
        except Image.DecompressionBombError as error:
            raise Refused(f"too large: {error}") from error
        _refuse_bomb(*picture.size)
    return picture


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Pillow reports broken files by many types of errors; here it is one."""
    try:
        yield
    except (MemoryError, Refused):
        raise
    except Exception as error:
        raise ValueError(f"broken picture: {error}") from error


def _fit_picture(picture: Any, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    from PIL import Image, ImageOps

    if picture.mode.startswith("I"):  # 16 bits
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(ImageOps.fit(picture.convert("RGB"), size[::-1], method=Image.Resampling.BICUBIC))


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of a WebP, from its first chunk (RFC 9649)."""
    bits = int.from_bytes
    match data[12:16]:
        case b"VP8X":
            return bits(data[24:27], "little") + 1, bits(data[27:30], "little") + 1
        case b"VP8L":
            packed = bits(data[21:25], "little")
            return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            return bits(data[26:28], "little") & 0x3FFF, bits(data[28:30], "little") & 0x3FFF
    raise ValueError("not a WebP")


def _webp_times(data: bytes) -> Float[np.ndarray, " n"]:
    """When each picture of an animated WebP is shown, in seconds, from the headers of its frames (RFC 9649); 0 ms count
    as 100, as in browsers. A still picture has one."""
    durations, position = [], 12
    while position + 8 <= len(data):
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"ANMF":
            durations.append(int.from_bytes(data[position + 20 : position + 23], "little") or 100)
        position += 8 + length + length % 2
    return np.cumsum([0, *durations[:-1]]) / 1000
