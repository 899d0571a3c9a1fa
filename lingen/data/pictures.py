"""Still and animated pictures through Pillow: checked before decoding, turned upright, on white, scaled to a size."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lingen.data.frames import Refused, refuse_bomb


def open_picture(data: bytes, formats: tuple[str, ...]) -> Any:
    with reported(), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower and raises an error
        if data[:4] == b"RIFF":
            refuse_bomb(*webp_size(data))  # Pillow allocates a WebP's canvas when it opens it
        try:
            picture = Image.open(io.BytesIO(data), formats=formats)
        except UnidentifiedImageError as error:
            raise ValueError(f"none of {', '.join(formats)}") from error
        except Image.DecompressionBombError as error:
            raise Refused(f"too large: {error}") from error
        refuse_bomb(*picture.size)
    return picture


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Pillow reports broken files by many types of errors; here it is one."""
    try:
        yield
    except (MemoryError, Refused):
        raise
    except Exception as error:
        raise ValueError(f"broken picture: {error}") from error


def fit_picture(picture: Any, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Scales to cover `size` and cuts out the centre."""
    return np.asarray(ImageOps.fit(as_rgb(picture), size[::-1], method=Image.Resampling.BICUBIC))


def as_rgb(picture: Any) -> Any:
    """A picture in sRGB, by its colour profile where it has one, on white where it is transparent. ValueError: ``broken
    colour profile: ...``"""
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith("I"):  # 16 bits
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if profile:
        picture = _by_profile(picture, profile)
    return on_plain(picture) if picture.has_transparency_data else picture.convert("RGB")


def _by_profile(picture: Any, profile: bytes) -> Any:
    """The picture in sRGB, as transparent as it was. A profile of other colours than the picture's is left."""
    modes = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = modes.get(source.profile.xcolor_space)
        if mode is None or (mode == "CMYK") != (picture.mode == "CMYK"):
            return picture
        alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
        # through RGBA, where Pillow keeps the colours of transparent palettes
        plain = picture if picture.mode == mode else picture.convert("RGBA").convert("RGB").convert(mode)
        shown: Any = ImageCms.profileToProfile(plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"broken colour profile: {error}") from error
    if alpha is not None:
        shown.putalpha(alpha)
    return shown


def on_plain(picture: Any, background: str | tuple[int, int, int] = "white") -> Any:
    """A picture in RGB, on a plain background where it is transparent."""
    shown = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, background), shown).convert("RGB")


def webp_size(data: bytes) -> tuple[int, int]:
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


def webp_times(data: bytes) -> Float[np.ndarray, " n"]:
    """When each picture of an animated WebP is shown, in seconds, from the headers of its frames (RFC 9649); 0 ms count
    as 100, as in browsers. A still picture has one."""
    durations, position = [], 12
    while position + 8 <= len(data):
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"ANMF":
            durations.append(int.from_bytes(data[position + 20 : position + 23], "little") or 100)
        position += 8 + length + length % 2
    return np.cumsum([0, *durations[:-1]]) / 1000
