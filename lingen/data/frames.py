"""The size that frames are scaled to, the frames that make a clip, and limits checked before memory is allocated. No
torch here: the processes that cut footage start quickly."""

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.reformatter import Interpolation
from jaxtyping import Float, Int, UInt8

MAX_PIXELS = 50_000_000
"""A larger picture is refused before it is allocated (ours)."""


class Refused(ValueError):
    """A picture is too large to be read."""


class ShortClip(ValueError):
    """A video has fewer frames than wanted, after resampling."""

    def __init__(self, available: int, wanted: int):
        super().__init__(f"short clip: {available} frames where {wanted} are wanted")


def refuse_bomb(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Refused(f"too large: {width} x {height} pixels, at most {MAX_PIXELS // 1_000_000} million are read")


def picture_stream(file: Any, reason: str) -> Any:
    """The pictures of an opened video, to be decoded by one thread, as the processes share the cores: of its streams of
    pictures the one that it declares as its default, else the first. Raises ValueError where there are none (with this
    `reason`), or where they are too large to be decoded."""
    if not file.streams.video:
        raise ValueError(f"{reason}: there is no picture in it")
    # Covers of sound files and thumbnails are no film.
    cover = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    films = [stream for stream in file.streams.video if not stream.disposition & cover]
    if not films:
        raise ValueError(f"{reason}: it holds a cover picture and no film")
    stream = next((stream for stream in films if stream.disposition & Disposition.default), films[0])
    if stream.codec_context is None:
        raise ValueError(f"{reason}: FFmpeg knows no decoder for its pictures")
    refuse_bomb(stream.codec_context.width, stream.codec_context.height)
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    stream.codec_context.thread_count = 1
    return stream


def decoder_of(stream: Any) -> Any:
    """The decoder of a stream; for VP8 and VP9 that declare transparency libvpx, as FFmpeg's own ones leave it out."""
    own = stream.codec_context
    declared = {name.lower(): value for name, value in stream.metadata.items()}
    if declared.get("alpha_mode") != "1" or own.name not in ALPHA_DECODERS:
        return own
    codec: Any = av.CodecContext.create(ALPHA_DECODERS[own.name], "r")
    codec.options, codec.thread_count = own.options, 1
    if own.sample_aspect_ratio:
        codec.sample_aspect_ratio = own.sample_aspect_ratio
    return codec


ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@contextlib.contextmanager
def opened_video(data: bytes) -> Iterator[tuple[Any, list[Any], Int[np.ndarray, " n"]]]:
    """The pictures of an MP4 or a WebM: the stream, its packets, and the time stamps of what is shown, ascending.
    FFmpeg's errors inside the context are ValueErrors: ``broken video: ...``."""
    # The only formats that FFmpeg may take the bytes for: others (playlists, say) can name other files.
    is_mp4 = data[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
    if not is_mp4 and data[:4] != b"\x1a\x45\xdf\xa3":
        raise ValueError("broken video: neither an MP4 nor a WebM")
    try:
        opened: Any = av.open(io.BytesIO(data), format="mp4" if is_mp4 else "matroska")
        with opened as file:
            stream = picture_stream(file, "broken video")
            packets = [packet for packet in file.demux(stream) if packet.pts is not None and packet.size]
            yield stream, packets, np.array(sorted(p.pts for p in packets if not p.is_discard), np.int64)
    except av.FFmpegError as error:
        raise ValueError(f"broken video: {error.strerror or error}") from error


def frames_at(fps: float, length: float, interval: float, count: int, tick: float) -> int:
    """How many frames at `fps` the frames of a film fill.

    Args:
        length: seconds from the first to the last of them.
        interval: seconds that the last one is shown.
        count: how many they are.
        tick: the container's time base in seconds. Time stamps are rounded to it: either end may be half of it off, and
            the interval, which is their mean distance, accordingly."""
    rounding = tick * (1 + 1 / max(1, count - 1)) * fps
    return int((length + interval) * fps + min(rounding, 0.25) + 1e-3)


def resample(
    times: Float[np.ndarray, " n"], frames: int, fps: float, start: float, tick: float = 0.0
) -> tuple[Int[np.ndarray, " t"], int]:
    """Which source frames make the clip.

    Args:
        times: when each source frame is shown, in seconds from the first one, ascending.
        tick: see `frames_at`.
    Returns:
        indices into `times`, and the number of possible beginnings. ShortClip where there is none."""
    if len(times) == 0:
        raise ShortClip(0, frames)
    interval = times[-1] / (len(times) - 1) if len(times) > 1 else 1 / fps
    available = frames_at(fps, float(times[-1]), float(interval), len(times), tick)
    starts = available - frames + 1
    if starts < 1:
        raise ShortClip(available, frames)
    return nearest_frames(times, (int(start * starts) + np.arange(frames)) / fps, tick), starts


def nearest_frames(
    times: Float[np.ndarray, " n"], wanted: Float[np.ndarray, " t"], tick: float = 0.0
) -> Int[np.ndarray, " t"]:
    """Indices of the frames that are nearest to the wanted times; of two that are equally near, the earlier one."""
    rounding = min(tick / 2, float(np.diff(times).min()) / 8) if len(times) > 1 else 0.0
    return np.searchsorted((times[1:] + times[:-1]) / 2, wanted - max(rounding, 1e-6))


def orientation(frame: Any) -> tuple[int, bool]:
    """How a stored frame becomes upright by its display matrix (ISO 14496-12): mirrored left to right first, if at all,
    then turned so many quarters counterclockwise."""
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return 0, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(float)
    mirrored = bool(a * d - b * c < 0)
    sign = -1 if mirrored else 1
    return round(-math.atan2(sign * b, sign * a) / (math.pi / 2)) % 4, mirrored


HDR = {16: "PQ", 18: "HLG"}
"""Transfer curves of ITU-T H.273 that are not those of ordinary screens."""


def refuse_odd(frame: Any) -> None:
    """ValueError where a frame declares what training has no use for: ``hdr: ...``, ``interlaced: ...``."""
    if frame.color_trc in HDR:
        raise ValueError(f"hdr: {HDR[frame.color_trc]}; convert it before it is packed")
    if frame.interlaced_frame:
        raise ValueError("interlaced: two fields are woven into each frame; convert it before it is packed")


def on_white(frame: Any, scaler: Any) -> Any:
    """The frame on white where its format has transparency. What it declares besides is gone then."""
    if not frame.format.has_palette and not any(component.is_alpha for component in frame.format.components):
        return frame
    pixels = scaler.reformat(frame, format="rgba", threads=1).to_ndarray().astype(np.uint16)
    share = pixels[..., 3:]
    mixed = (pixels[..., :3] * share + 255 * (255 - share) + 127) // 255
    return av.VideoFrame.from_ndarray(mixed.astype(np.uint8), format="rgb24")


def fit_frame(frame: Any, scaler: Any, aspect: Any, size: tuple[int, int]) -> UInt8[np.ndarray, "3 h w"]:
    """On white where it is transparent: scales to cover `size`, turns upright, cuts out the centre."""
    refuse_bomb(frame.width, frame.height)
    turns, mirrored = orientation(frame)
    height, width = size if turns % 2 == 0 else size[::-1]
    shown_width = frame.width * float(aspect or 1)
    scale = max(height / frame.height, width / shown_width)
    scaled = max(height, round(frame.height * scale)), max(width, round(shown_width * scale))
    refuse_bomb(scaled[1], scaled[0])  # a very narrow picture would become very large
    method = Interpolation.AREA if scale < 1 else Interpolation.BICUBIC
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    # In planes: FFmpeg scales into them about twice as fast, and a clip is wanted in planes. But where nothing is to be
    # scaled, it leaves the last columns of planes unwritten at some widths.
    layout = "rgb24" if scaled == (frame.height, frame.width) else "gbrp"
    fitted = scaler.reformat(on_white(frame, scaler), scaled[1], scaled[0], layout, interpolation=method, threads=1)
    if layout == "rgb24":
        cut = fitted.to_ndarray()[top : top + height, left : left + width]
        pixels = np.ascontiguousarray(cut.transpose(2, 0, 1))
    else:
        pixels = np.empty((3, height, width), np.uint8)
        for channel, plane in enumerate(fitted.planes[index] for index in (2, 0, 1)):
            rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            pixels[channel] = rows[top : top + height, left : left + width]
    return np.rot90(pixels[:, :, ::-1] if mirrored else pixels, turns, (1, 2))


def covering(
    size: tuple[int, int], wanted: Sequence[Sequence[tuple[int, int]]], *, even: bool = True
) -> tuple[int, int]:
    """Height and width to which a picture of `size` is scaled down, never up; both even for H.264. `wanted`: groups of
    sizes; of each group it covers the one whose aspect ratio is nearest to its own."""
    nearest = [min(group, key=lambda one: abs(math.log(one[0] * size[1] / one[1] / size[0]))) for group in wanted]
    scale = min(1.0, max(max(h / size[0], w / size[1]) for h, w in nearest))
    if scale == 1:
        return (size[0] // 2 * 2, size[1] // 2 * 2) if even else size
    step = 2 if even else 1
    height, width = (step * math.ceil(round(side * scale, 3) / step) for side in size)
    return height, width
