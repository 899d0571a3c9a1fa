"""Frames to the bytes of a shard's members."""

from __future__ import annotations

import io
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
from jaxtyping import UInt8


def encode_mp4(
    clip: Iterable[UInt8[np.ndarray, "h w 3"]],
    fps: float,
    crf: int = 12,
    preset: str = "veryfast",
    key_seconds: float | None = None,
    exact: bool = False,
) -> bytes:
    """H.264 (yuv420p) in an MP4.

    Args:
        clip: frames, taken one by one, of an even height and width; at least one.
        key_seconds: at most so much time between key frames; None: as x264 has it, 250 frames.
        exact: the same bytes for the same frames, always: x264's macroblock tree, whose sums change with what happens
            to lie in memory, is left out. The file may become a fifth larger.
    """
    import av
    from av.video.reformatter import VideoReformatter

    scaler = VideoReformatter()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as file:
        options = {"crf": str(crf), "preset": preset, "threads": "1"} | (
            {"x264-params": "no-mbtree=1"} if exact else {}
        )
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.pix_fmt = "yuv420p"
        if key_seconds is not None:
            stream.codec_context.gop_size = max(1, round(key_seconds * fps))
        for number, frame in enumerate(clip):
            if number == 0:
                stream.height, stream.width = frame.shape[:2]
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            # Left to the encoder, the conversion is spread over threads, which do not always give the same pixels.
            file.mux(stream.encode(scaler.reformat(picture, format="yuv420p", threads=1)))
        file.mux(stream.encode())
    return buffer.getvalue()


def encode_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A PNG, losslessly."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def encode_webp(image: UInt8[np.ndarray, "h w 3"], quality: int = 92) -> bytes:
    """A WebP, about a tenth of a PNG for pictures."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "webp", quality=quality)
    return buffer.getvalue()
