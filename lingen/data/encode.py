"""Frames to the bytes of a shard's members; the same frames give the same bytes."""

from __future__ import annotations

import io
from fractions import Fraction

import numpy as np
from jaxtyping import UInt8


def encode_mp4(clip: UInt8[np.ndarray, "t h w 3"], fps: float, crf: int = 12, preset: str = "veryfast") -> bytes:
    """H.264 (yuv420p) in an MP4, the same bytes for the same frames. Height and width must be even."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as file:
        options = {"crf": str(crf), "preset": preset, "threads": "1"}
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        for frame in clip:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
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
