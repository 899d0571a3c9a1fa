"""From the bytes of a sample to a clip of the size, length and frame rate that a stage wants, and its caption."""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from jaxtyping import Int, UInt8
from PIL import ExifTags, ImageOps
from torch import Tensor

from lingen.data.frames import decoder_of, fit_frame, opened_video, refuse_odd, resample
from lingen.data.pictures import fit_picture, open_picture, reported, webp_times

VIDEO = ("mp4", "webm", "webp")
IMAGE = ("jpg", "jpeg", "png", "webp")


class Clip(NamedTuple):
    """A decoded clip."""

    pixels: UInt8[Tensor, "3 t h w"]
    starts: int
    """How many clips of this length the video holds: the number of different first frames."""


def decode_sample(
    sample: Mapping[str, Any], kind: str, *, frames: int, size: tuple[int, int], fps: float, start: float
) -> Clip:
    """The clip (or the picture: t = 1) of a sample. ValueError ``reason: detail`` where it cannot be used.

    Args:
        sample: extension -> content; what else it holds, such as webdataset's ``__key__``, is not read.
        kind: ``image`` or ``video``; a webp is a picture in the one and an animation in the other.
        frames, size, fps, start: see `decode_video`."""
    known = VIDEO if kind == "video" else IMAGE
    suffix = next((suffix for suffix in known if suffix in sample), None)
    if suffix is None:
        raise ValueError(f"no {kind}: none of {', '.join(known)} among {', '.join(sorted(sample)) or 'nothing'}")
    if kind == "image":
        return Clip(decode_image(sample[suffix], size=size), 1)
    decode = decode_animation if suffix == "webp" else decode_video
    return decode(sample[suffix], frames=frames, size=size, fps=fps, start=start)


def decode_video(data: bytes, *, frames: int, size: tuple[int, int], fps: float, start: float) -> Clip:
    """A clip of an MP4 or a WebM, resampled by the time stamps of its frames, whatever its header says.

    Decoding begins at the key frame before the clip and ends with its last frame. ShortClip for too few frames,
    ValueError for broken or refused bytes.

    Args:
        data: the file.
        frames: frames wanted.
        size: height and width in pixels: the smaller side is scaled to cover it, the centre is cut out.
        fps: frames per second wanted; each frame is the nearest one in time.
        start: 0 <= start < 1, where between the first and the last possible beginning the clip begins."""
    with opened_video(data) as (stream, packets, shown):
        tick = float(stream.time_base)
        chosen, starts = resample((shown - shown[:1]) * tick, frames, fps, start, tick)
        decoded = _decode(decoder_of(stream), packets, shown[chosen], size)
    return Clip(torch.from_numpy(np.stack(decoded, 1)), starts)


def _decode(codec: Any, packets: list[Any], chosen: Int[np.ndarray, " t"], size: tuple[int, int]) -> list[np.ndarray]:
    """The frames with the presentation times `chosen` (ascending, with repeats), fitted to `size`. From the key frame
    before the first to the last one of them, without pictures that no other one is built from. Where that does not give
    all, everything is decoded: a container may call a frame a key frame that is none."""
    needed = set(chosen.tolist())
    key = max((i for i, p in enumerate(packets) if p.is_keyframe and p.pts <= chosen[0]), default=0)
    told = re.search(rb"x264 - core (\d+)", bytes(memoryview(packets[0])[:2048])) if key else None
    if told is not None and int(told[1]) < 151:
        # The 4:4:4 of x264 before build 151 differs from the standard, which FFmpeg learns from the first packet alone.
        codec.decode(packets[0])
        codec.flush_buffers()
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
    """Presentation time -> those of the needed frames that the packets give, fitted to `size`. ValueError for what
    `refuse_odd` refuses, and where times are those of decoding: decoders give frames as they are shown."""
    scaler = VideoReformatter()  # one scaler for all frames, because it keeps its tables
    found: dict[int, np.ndarray] = {}
    last: int | None = None
    for packet in itertools.chain(packets, [None]):  # None drains the decoder
        for frame in codec.decode(packet):
            if not frame.is_corrupt and frame.pts is not None:
                if last is not None and frame.pts < last:
                    raise ValueError("out of order: its time stamps do not ascend; pack it again with lingen data pack")
                last = frame.pts
            if frame.pts in needed and frame.pts not in found and not frame.is_corrupt:
                refuse_odd(frame)
                found[frame.pts] = fit_frame(frame, scaler, codec.sample_aspect_ratio, size)
        if len(found) == len(needed):
            break
    return found


def _is_spare(packet: Any, codec: Any) -> bool:
    """Whether the decoder can skip this picture because no other one refers to it. Known for H.264 in MP4 and Matroska
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


def _stack(pictures: list[np.ndarray]) -> UInt8[Tensor, "3 t h w"]:
    return torch.from_numpy(np.stack(pictures).transpose(3, 0, 1, 2).copy())


def decode_image(data: bytes, *, size: tuple[int, int]) -> UInt8[Tensor, "3 1 h w"]:
    """A PNG, JPEG or WebP (its first picture), upright, on white where it is transparent. ValueError for broken bytes,
    or more than 50 million pixels.

    Args:
        data: the file.
        size: height and width in pixels: scaled to cover it, the centre is cut out."""
    picture = open_picture(data, ("PNG", "JPEG", "WEBP"))
    with reported():
        turned = picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # after decoding
        picture.draft("RGB", size if turned else size[::-1])  # a JPEG is decoded no larger than needed
        return _stack([fit_picture(ImageOps.exif_transpose(picture), size)])


def decode_animation(data: bytes, *, frames: int, size: tuple[int, int], fps: float, start: float) -> Clip:
    """A clip of an animated WebP; arguments and errors as for `decode_video`. Decoding ends with the clip."""
    picture = open_picture(data, ("WEBP",))
    chosen, starts = resample(webp_times(data), frames, fps, start, 0.001)
    found: dict[int, np.ndarray] = {}
    with reported():
        for number in sorted(set(chosen.tolist())):
            picture.seek(number)
            found[number] = fit_picture(picture, size)
    return Clip(_stack([found[number] for number in chosen.tolist()]), starts)
