"""Pictures and clips: pixels to floats and back, H.264 that a browser plays, contact sheets. No torch here."""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from lingen.files import whole_file

Frames = UInt8[np.ndarray, "t h w 3"]
Picture = UInt8[np.ndarray, "h w 3"]


def as_floats(pixels: Any) -> Any:
    """A uint8 tensor of pixels -> float32 in -1..1, what autoencoders take."""
    return pixels.float() / 127.5 - 1


def as_frames(clip: Any) -> Frames:
    """A tensor [1 3 t h w] in -1..1 -> frames; what is beyond is clamped."""
    pixels = ((clip[0].float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(1, 2, 3, 0).cpu().numpy()


def save_video(
    clip: Any, path: str | Path, fps: float, *, title: str = "", about: dict[str, Any] | None = None
) -> Path:
    """Writes frames as H.264 (yuv420p, index in front) with PyAV; the same frames give the same pictures, always.
    ValueError for no frames, or frames that are not uint8 [h w 3].

    Args:
        clip: uint8 frames [t h w 3]: an array, a tensor, or an iterable of frames [h w 3] that is consumed one by one,
            so that memory does not grow with the length. An odd height or width is padded by its last row or column.
        path: file to write, replaced in one step when it is complete; after an error it is what it was.
        fps: frames per second.
        title: stored as the MP4's title (the prompt, say).
        about: stored as JSON in the MP4's comment."""
    path, fast = Path(path), {"movflags": "+faststart"}
    with whole_file(path) as partial, av.open(str(partial), "w", format="mp4", options=fast) as file:
        file.metadata["title"] = title
        file.metadata["comment"] = json.dumps(about or {}, ensure_ascii=False)
        _encode(file, clip, fps, {"crf": "16", "preset": "medium"} | EXACT)
    return path


def save_animation(clip: Frames, path: Path, fps: float) -> Path:
    """Writes a GIF or an animated WebP, by the name of the file, that begins anew for ever."""
    first, *others = map(Image.fromarray, clip)
    with whole_file(path) as partial:
        first.save(partial, path.suffix[1:], save_all=True, append_images=others, duration=1000 / fps, loop=0)
    return path


def read_video(data: bytes) -> tuple[Frames, float]:
    """All frames of a small video file, and how many there are a second."""
    with av.open(io.BytesIO(data), "r") as file:
        stream = file.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(stream)])
        return frames, float(stream.average_rate or 25)


def encode_mp4(
    clip: Iterable[Any], fps: float, crf: int = 12, key_seconds: float | None = None, exact: bool = False
) -> bytes:
    """Frames as H.264 (yuv420p) in an MP4: a member of a shard. ValueError for no frames, or frames that are not uint8
    [h w 3].

    Args:
        clip: uint8 frames [h w 3], taken one by one; an odd height or width is padded as `save_video` does.
        key_seconds: the most time between key frames, in seconds; None: x264's default, 250 frames.
        exact: the same bytes for the same frames, always. The file may become a fifth larger."""
    buffer = io.BytesIO()
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1"} | (EXACT if exact else {})
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as file:
        _encode(file, clip, fps, options, key_seconds)
    return buffer.getvalue()


HD_ROWS = 720
"""Rows from which on players take a film for BT.709, and below for BT.601; ours say so, too."""
MATRIX_709, MATRIX_601 = 1, 6
"""Numbers of the matrices in ITU-T H.273; 6 is smpte170m."""
EXACT = {"x264-params": "no-mbtree=1"}
"""Leaves out x264's macroblock tree, whose sums change with what happens to lie in memory."""


def _encode(
    file: Any, clip: Iterable[Any], fps: float, options: dict[str, str], key_seconds: float | None = None
) -> None:
    stream, scaler = None, VideoReformatter()
    for frame in map(_checked, clip):
        if stream is None:
            stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
            stream.height, stream.width = frame.shape[:2]
            stream.pix_fmt = "yuv420p"
            # Tags of what is written (ITU-T H.273). Primaries and transfer are those of ordinary screens at every size,
            # because pixels are converted by the matrix alone.
            codec = stream.codec_context
            codec.colorspace = MATRIX_709 if codec.height >= HD_ROWS else MATRIX_601
            codec.color_range = ColorRange.MPEG
            codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            if key_seconds is not None:
                stream.codec_context.gop_size = max(1, round(key_seconds * fps))
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        # Inside the encoder, conversion runs in several threads and does not always give the same pixels.
        matrix = Colorspace.ITU709 if frame.shape[0] >= HD_ROWS else Colorspace.ITU601
        coded = scaler.reformat(
            picture, format="yuv420p", dst_colorspace=matrix, dst_color_range=ColorRange.MPEG, threads=1
        )
        file.mux(stream.encode(coded))
    if stream is None:
        raise ValueError("There are no frames to write.")
    file.mux(stream.encode())


def _checked(frame: Any) -> Picture:
    """A contiguous frame of even height and width."""
    array = np.asarray(frame)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"A frame is uint8 [height width 3], got {array.dtype} {list(array.shape)}.")
    height, width = array.shape[:2]
    if height % 2 or width % 2:
        array = np.pad(array, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return np.ascontiguousarray(array)


def encode_png(image: Picture) -> bytes:
    """A PNG, losslessly."""
    return _encode_picture(image, "png")


def encode_webp(image: Picture, quality: int = 92) -> bytes:
    """A WebP, about a tenth of a PNG for pictures."""
    return _encode_picture(image, "webp", quality=quality)


def _encode_picture(image: Picture, form: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form, **options)
    return buffer.getvalue()


def contact_sheet(
    clips: Sequence[np.ndarray], path: str | Path, captions: Sequence[str] = (), columns: int = 8
) -> Path:
    """A PNG with a row for each clip: up to `columns` frames spread over its time, the caption above. `clips`: uint8 [t
    h w 3] each; small frames are enlarged by whole factors so that a person can see them."""
    rows = [_row(np.asarray(clip), columns) for clip in clips]
    line = 16 if captions else 0
    width = max(row.width for row in rows)
    sheet = Image.new("RGB", (width, sum(row.height + line for row in rows)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for index, row in enumerate(rows):
        if captions:
            draw.text((4, top + 2), captions[index][: width // 6], fill="black")
        sheet.paste(row, (0, top + line))
        top += row.height + line
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def sheet_frames(count: int, columns: int = 8) -> set[int]:
    """Numbers of those of `count` frames that a contact sheet shows."""
    return set(np.linspace(0, count - 1, min(columns, count)).round().astype(int).tolist())


def _row(clip: np.ndarray, columns: int) -> Any:
    shown = _enlarged(clip[sorted(sheet_frames(len(clip), columns))])
    shown = np.pad(shown, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)
    return Image.fromarray(np.concatenate(list(shown), axis=1))


def error_frames(clip: np.ndarray, rebuilt: np.ndarray, gain: int = 4) -> Frames:
    """`gain` times the absolute difference of uint8 frames."""
    return (np.abs(clip.astype(int) - rebuilt) * gain).clip(max=255).astype(np.uint8)


def beside(clip: np.ndarray, rebuilt: np.ndarray) -> Iterator[Picture]:
    """Frames of both, the clip on the left; small ones are enlarged by a whole factor."""
    for pair in zip(clip, rebuilt, strict=True):
        yield _enlarged(np.concatenate(pair, 1))


def _enlarged(frames: np.ndarray) -> np.ndarray:
    """[... h w 3], made so much larger, by a whole factor, that a person can see them."""
    factor = max(1, round(96 / frames.shape[-3]))
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)
