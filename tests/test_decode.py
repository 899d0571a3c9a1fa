"""Clips and pictures from real files: which frames, which pixels, and what is refused."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lingen.data import decode, frames
from lingen.data.captions import captions_of
from lingen.data.decode import (
    Clip,
    decode_animation,
    decode_image,
    decode_sample,
    decode_video,
)
from lingen.data.frames import ShortClip
from lingen.data.pictures import webp_size

SIZE = (16, 32)


def grey(index: int) -> int:
    """The brightness of the index-th frame of a test video: neighbours differ by far more than a codec's error."""
    return 20 + 4 * index


def video(
    count: int = 24,
    fps: float = 24,
    *,
    codec: str = "libx264",
    container: str = "mp4",
    pix_fmt: str = "yuv420p",
    gop: int = 8,
    b_frames: int = 2,
    size: tuple[int, int] = SIZE,
    times: list[int] | None = None,
    false_key: int | None = None,
) -> bytes:
    """A file whose frame i is plain `grey(i)`.

    Args:
        times: presentation times in milliseconds.
        false_key: a frame that the container calls a key frame though it is none.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        options = {"bf": str(b_frames), "crf": "4", "sc_threshold": "0"} if codec == "libx264" else {"lossless": "1"}
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.gop_size = gop
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        packets = []
        for index in range(count):
            picture = np.full((*size, 3), grey(index), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode()
        if false_key is not None:
            packets[false_key].is_keyframe = True
        file.mux(packets)
    return buffer.getvalue()


def frames_of(clip: Clip) -> list[int]:
    """Which frames of a test video a clip holds."""
    means = clip.pixels.double().mean(dim=(0, 2, 3))
    return [round((mean - 20) / 4) for mean in means.tolist()]


def decoded(data: bytes, frames: int = 4, fps: float = 24, start: float = 0.0, size: tuple[int, int] = SIZE) -> Clip:
    return decode_video(data, frames=frames, size=size, fps=float(fps), start=start)


def test_shape_and_type() -> None:
    clip = decoded(video())
    assert clip.pixels.shape == (3, 4, *SIZE) and clip.pixels.dtype == torch.uint8 and clip.pixels.is_contiguous()


@pytest.mark.parametrize("gop", [1, 8, 100])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_every_start_gives_exactly_its_frames(gop: int, b_frames: int) -> None:
    data = video(20, gop=gop, b_frames=b_frames)
    for first in range(17):
        clip = decoded(data, start=(first + 0.5) / 17)
        assert clip.starts == 17
        assert frames_of(clip) == list(range(first, first + 4))


def test_start_reaches_the_first_and_the_last_frame() -> None:
    data = video(20)
    assert frames_of(decoded(data, start=0.0))[0] == 0
    assert frames_of(decoded(data, start=0.999999))[-1] == 19


def test_a_video_as_long_as_the_clip_has_one_start() -> None:
    data = video(16)
    assert decoded(data, 16).starts == 1
    assert torch.equal(decoded(data, 16, start=0.0).pixels, decoded(data, 16, start=0.9).pixels)


@pytest.mark.parametrize(("source", "wanted", "frames"), [
    (24, 12, [0, 2, 4, 6]),
    (24, 16, [0, 1, 3, 4]),  # 0, 1.5, 3, 4.5: of two equally near frames the earlier
    (12, 24, [0, 0, 1, 1]),
    (30, 16, [0, 2, 4, 6]),  # 0, 1.9, 3.75, 5.6
    (29.97, 29.97, [0, 1, 2, 3]),
])  # fmt: skip
def test_frames_nearest_in_time(source: float, wanted: float, frames: list[int]) -> None:
    assert frames_of(decoded(video(24, source), fps=wanted)) == frames


def test_variable_frame_rate_goes_by_time_stamps() -> None:
    data = video(6, times=[0, 100, 200, 600, 700, 800])
    assert frames_of(decoded(data, 9, fps=10)) == [0, 1, 2, 2, 2, 3, 3, 4, 5]


def test_webm() -> None:
    data = video(12, codec="libvpx-vp9", container="webm", b_frames=0)
    assert frames_of(decoded(data, start=0.5)) == [4, 5, 6, 7]


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv422p", "yuvj420p", "yuv420p10le"])
def test_odd_pixel_formats(pix_fmt: str) -> None:
    if pix_fmt == "yuv420p10le" and pix_fmt not in {f.name for f in av.Codec("libx264", "w").video_formats}:
        pytest.skip("this libx264 has 8 bits only")
    assert frames_of(decoded(video(8, pix_fmt=pix_fmt))) == [0, 1, 2, 3]


def fed_packets(
    monkeypatch: pytest.MonkeyPatch, data: bytes, frames: int = 4, **options: float
) -> tuple[list[int], int]:
    """The numbers of the frames of a clip, and how many pictures the decoder was given for them."""
    fed: list[object] = []
    original = decode._pick

    def counting(codec: object, packets: Iterable[object], *rest: object) -> object:
        return original(codec, (fed.append(packet) or packet for packet in packets), *rest)

    monkeypatch.setattr(decode, "_pick", counting)
    return frames_of(decoded(data, frames, **options)), len(fed)


def test_only_what_is_needed_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    frames, fed = fed_packets(monkeypatch, video(56, gop=8, b_frames=0), start=33.5 / 53)
    assert frames == [33, 34, 35, 36] and fed == 5  # the key frame 32 and the clip


def test_pictures_that_no_other_one_needs_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video(56, gop=56, b_frames=3)
    frames, fed = fed_packets(monkeypatch, data, start=40.5 / 53)
    assert frames == [40, 41, 42, 43] and fed < 30  # of 45
    frames, fed = fed_packets(monkeypatch, data, fps=12.0, start=0.9)
    assert frames == [44, 46, 48, 50] and fed < 30  # of 52


def test_a_frame_that_is_called_a_key_frame_and_is_none() -> None:
    data = video(40, gop=40, b_frames=0, false_key=20)
    assert frames_of(decoded(data, start=24.5 / 37)) == [24, 25, 26, 27]


def test_too_few_frames_names_both_numbers() -> None:
    with pytest.raises(ShortClip, match="short clip: 7 frames where 8 are wanted"):
        decoded(video(7), 8)
    with pytest.raises(ShortClip, match="short clip: 8 frames where 9 are wanted"):
        decoded(video(16), 9, fps=12)


def lying_duration(data: bytes, factor: int) -> bytes:
    """The MP4 with every duration in its headers (mvhd, tkhd, mdhd, elst) multiplied."""
    data = bytearray(data)
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):
        at = data.index(box) + offset
        (duration,) = struct.unpack_from(">I", data, at)
        struct.pack_into(">I", data, at, duration * factor)
    return bytes(data)


@pytest.mark.parametrize("factor", [0, 50])
def test_a_header_that_lies_about_the_length_changes_nothing(factor: int) -> None:
    data = video(8, b_frames=0)
    lying = lying_duration(data, factor)
    assert lying != data
    clip = decoded(lying, 4, start=0.999)
    assert clip.starts == 5 and frames_of(clip) == [4, 5, 6, 7]
    with pytest.raises(ShortClip, match="8 frames where 9"):
        decoded(lying, 9)


def corrupted(data: bytes) -> bytes:
    """The MP4 with every coded picture overwritten."""
    at = data.index(b"mdat") + 4
    end = data.index(b"moov") - 4 if data.index(b"moov") > at else len(data)
    return data[:at] + b"\x5a" * (end - at) + data[end:]


@pytest.mark.parametrize("data", [
    pytest.param(b"", id="empty"),
    pytest.param(b"not a video at all" * 20, id="text"),
    pytest.param(b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:///etc/passwd\n", id="playlist"),
    pytest.param(video(8)[:200], id="cut"),
    pytest.param(corrupted(video(8)), id="overwritten"),
])  # fmt: skip
def test_broken_bytes_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="broken video"):
        decoded(data)


def test_a_file_with_sound_alone() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with pytest.raises(ValueError, match="broken video: there is no picture in it"):
        decoded(buffer.getvalue())


def test_a_video_larger_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_PIXELS", 500)
    with pytest.raises(ValueError, match="too large: 32 x 16 pixels"):
        decoded(video(8))


def striped(size: tuple[int, int]) -> np.ndarray:
    """Left half red, right half green, the uppermost eighth blue."""
    picture = np.zeros((*size, 3), np.uint8)
    picture[:, : size[1] // 2, 0] = 255
    picture[:, size[1] // 2 :, 1] = 255
    picture[: size[0] // 8] = (0, 0, 255)
    return picture


def encoded(pictures: list[np.ndarray], aspect: Fraction = Fraction(1)) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=8, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv444p"
        stream.codec_context.sample_aspect_ratio = aspect
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return buffer.getvalue()


def rotated(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """The MP4 with another display matrix (a, b, c, d) in its track header (ISO 14496-12)."""
    data = bytearray(data)
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return bytes(data)


def colours_at(pixels: torch.Tensor, *points: tuple[float, float]) -> str:
    """The strongest channel at relative (y, x) positions of the first frame."""
    height, width = pixels.shape[2:]
    return "".join("rgb"[int(pixels[:, 0, int(y * height), int(x * width)].argmax())] for y, x in points)


def test_scaled_to_cover_then_cut_at_the_centre() -> None:
    pixels = decode_video(encoded([striped((64, 128))] * 2), frames=2, size=(32, 32), fps=8.0, start=0.0).pixels
    assert colours_at(pixels, (0.05, 0.5), (0.5, 0.1), (0.5, 0.9)) == "brg"
    assert (pixels[0, 0, 16] > 128).float().mean() == pytest.approx(0.5, abs=0.04)  # the seam stays in the middle
    tall = decode_video(encoded([striped((128, 64))] * 2), frames=2, size=(32, 32), fps=8.0, start=0.0).pixels
    assert colours_at(tall, (0.05, 0.1), (0.05, 0.9)) == "rg"  # the blue band lies outside the cut


def test_enlarged_where_the_source_is_smaller() -> None:
    assert decode_video(encoded([striped((16, 16))] * 2), frames=2, size=(40, 72), fps=8.0, start=0.0).pixels.shape == (
        3,
        2,
        40,
        72,
    )


def test_pixels_that_are_not_square() -> None:
    data = encoded([striped((32, 32))] * 2, Fraction(2))
    wide = decode_video(data, frames=2, size=(32, 64), fps=8.0, start=0.0).pixels
    assert colours_at(wide, (0.05, 0.5), (0.5, 0.1), (0.5, 0.9)) == "brg"  # nothing is cut off


def test_a_sliver_is_refused_before_it_grows() -> None:
    with pytest.raises(ValueError, match="too large: 256 x 256000 pixels"):
        decode_video(encoded([striped((2000, 2))] * 2), frames=2, size=(256, 256), fps=8.0, start=0.0)


@pytest.mark.parametrize("format", ["yuv420p", "yuvj420p", "yuv422p", "yuv444p"])
@pytest.mark.parametrize("scale", [1.0, 0.5, 1.5])
def test_every_column_is_written_at_every_width(format: str, scale: float) -> None:
    """FFmpeg has fast paths for some widths and formats; memory is filled with other values before."""
    from av.video.reformatter import VideoReformatter

    rng = np.random.default_rng(0)
    for width in (*range(16, 80, 2), 456):
        frame = av.VideoFrame(width, 32, format)
        for number, plane in enumerate(frame.planes):
            plane.update(
                bytes(rng.integers(60, 180, plane.buffer_size, np.uint8))
                if number == 0
                else b"\x80" * plane.buffer_size
            )
        size = round(32 * scale), round(width * scale)
        poison = [np.full(3 * size[0] * (size[1] + 32), 255, np.uint8) for _ in range(8)]
        del poison
        pixels = frames.fit_frame(frame, VideoReformatter(), None, size)
        deep = VideoReformatter().reformat(
            frame, size[1], size[0], "gbrp16le", interpolation="AREA" if scale < 1 else "BICUBIC"
        )
        green = np.frombuffer(deep.planes[0], np.uint16).reshape(-1, deep.planes[0].line_size // 2)[
            : size[0], : size[1]
        ]
        assert pixels.shape == (3, *size) and abs(pixels - green[None] / 257).max() < 6, (width, format)


@pytest.mark.parametrize(("matrix", "points"), [
    ((0, 1, -1, 0), "rgb"),  # shown turned by 90 degrees clockwise: left -> top, right -> bottom, top -> right
    ((-1, 0, 0, -1), "grb"),
])  # fmt: skip
def test_rotation_metadata_turns_the_picture(matrix: tuple[int, int, int, int], points: str) -> None:
    data = rotated(encoded([striped((32, 48))] * 2), matrix)
    clockwise = matrix[0] == 0
    size = (48, 32) if clockwise else (32, 48)
    pixels = decode_video(data, frames=2, size=size, fps=8.0, start=0.0).pixels
    where = [(0.1, 0.3), (0.9, 0.3), (0.5, 0.97)] if clockwise else [(0.4, 0.1), (0.4, 0.9), (0.97, 0.5)]
    assert colours_at(pixels, *where) == points


# pictures


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures(kind: str) -> None:
    data = saved(Image.fromarray(striped((64, 128))), kind)
    pixels = decode_image(data, size=(32, 32))
    assert pixels.shape == (3, 1, 32, 32) and pixels.dtype == torch.uint8
    assert colours_at(pixels, (0.05, 0.5), (0.5, 0.1), (0.5, 0.9)) == "brg"


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_white(kind: str) -> None:
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (decode_image(saved(picture, kind, lossless=True), size=(8, 8)) == 255).all()
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert decode_image(saved(half, "PNG"), size=(8, 8)).double().mean().item() == pytest.approx(127, abs=1)


@pytest.mark.parametrize(
    ("mode", "value", "expected"), [("L", 77, 77), ("LA", (77, 255), 77), ("1", 1, 255), ("I;16", 77 * 256, 77)]
)
def test_odd_modes(mode: str, value: object, expected: int) -> None:
    picture = Image.new(mode, (8, 8), value)
    assert (decode_image(saved(picture, "PNG"), size=(8, 8)) == expected).all()


def test_palette_with_a_transparent_colour() -> None:
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    assert (decode_image(saved(picture, "PNG", transparency=0), size=(8, 8)) == 255).all()


def test_exif_turns_a_photograph() -> None:
    exif = Image.Exif()
    exif[274] = 6  # shown turned by 90 degrees clockwise
    pixels = decode_image(saved(Image.fromarray(striped((32, 48))), "JPEG", exif=exif, quality=95), size=(48, 32))
    assert colours_at(pixels, (0.1, 0.3), (0.9, 0.3), (0.5, 0.97)) == "rgb"


def test_a_turned_photograph_is_decoded_large_enough() -> None:
    """A JPEG is decoded at a fraction of its size, which is told as it lies, not as it is shown."""
    exif = Image.Exif()
    exif[274] = 6
    lying = Image.fromarray(np.repeat(np.indices((512, 1024)).sum(0)[..., None] // 16 % 2 * 255, 3, 2).astype(np.uint8))
    found = decode_image(saved(lying, "JPEG", exif=exif, quality=95), size=(128, 256))
    exact = decode_image(saved(lying.transpose(Image.Transpose.ROTATE_270), "PNG"), size=(128, 256))
    assert (found.float() - exact.float()).abs().mean() < 4  # 38 where half of the rows and columns are made up


def png_bomb(width: int, height: int) -> bytes:
    """A valid header of a huge PNG and no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def webp_bomb(width: int, height: int) -> bytes:
    body = (
        b"WEBPVP8X"
        + struct.pack("<I", 10)
        + bytes(4)
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("data", [
    pytest.param(png_bomb(10000, 10000), id="100 megapixels"),
    pytest.param(png_bomb(100000, 100000), id="10 gigapixels"),
    pytest.param(webp_bomb(16000, 16000), id="webp"),
])  # fmt: skip
def test_decompression_bombs_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="^too large"):
        decode_image(data, size=(8, 8))


@pytest.mark.parametrize(
    "data", [b"", b"text" * 9, png_bomb(8, 8), saved(Image.new("RGB", (64, 64)), "JPEG")[:-200], b"RIFF1234WEBP"]
)
def test_broken_pictures_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="broken picture"):
        decode_image(data, size=(8, 8))


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 90}])
def test_the_size_of_a_webp_is_read_from_its_header(options: dict[str, object]) -> None:
    assert webp_size(saved(Image.new("RGB", (70, 30)), "WEBP", **options)) == (70, 30)
    assert webp_size(saved(Image.new("RGBA", (70, 30), (9, 9, 9, 9)), "WEBP", **options)) == (70, 30)


def animation(count: int, durations: list[int]) -> bytes:
    first, *rest = [Image.new("RGB", (32, 16), (grey(i),) * 3) for i in range(count)]
    return saved(first, "WEBP", save_all=True, append_images=rest, duration=durations, lossless=True)


def test_an_animated_webp_is_a_video() -> None:
    data = animation(12, [125] * 12)
    clip = decode_animation(data, frames=4, size=SIZE, fps=8.0, start=0.5)
    assert clip.starts == 9 and frames_of(clip) == [4, 5, 6, 7]
    assert frames_of(decode_animation(data, frames=4, size=SIZE, fps=4.0, start=0.0)) == [0, 2, 4, 6]
    assert frames_of(decode_animation(animation(3, [100, 300, 100]), frames=4, size=SIZE, fps=10.0, start=0.0)) == [
        0,
        1,
        1,
        2,
    ]


def test_a_short_or_broken_animation() -> None:
    with pytest.raises(ShortClip, match="3 frames where 4"):
        decode_animation(animation(3, [125] * 3), frames=4, size=SIZE, fps=8.0, start=0.0)
    with pytest.raises(ShortClip, match="1 frames where 4"):
        decode_animation(saved(Image.new("RGB", (8, 8)), "WEBP"), frames=4, size=SIZE, fps=8.0, start=0.0)
    with pytest.raises(ValueError, match="broken picture"):
        decode_animation(animation(8, [125] * 8)[:-60], frames=8, size=SIZE, fps=8.0, start=0.0)


# samples


def test_a_sample_is_decoded_by_its_kind() -> None:
    both = {"webp": animation(8, [125] * 8)}
    wanted = {"frames": 8, "size": SIZE, "fps": 8.0, "start": 0.0}
    assert decode_sample(both, "video", **wanted).pixels.shape == (3, 8, *SIZE)
    assert decode_sample(both, "image", **wanted).pixels.shape == (3, 1, *SIZE)
    with pytest.raises(ValueError, match="no video: none of mp4, webm, webp among json, png"):
        decode_sample({"png": b"", "json": b""}, "video", **wanted)


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize("sample", [
    {"json": as_json({"caption": " a red circle "})},
    {"txt": b"a red circle\n"},
    {"json": as_json({"caption": "a red circle"}), "txt": b"another"},
    {"json": as_json({"width": 3}), "txt": b"a red circle"},
])  # fmt: skip
def test_captions(sample: dict[str, bytes]) -> None:
    assert captions_of(sample) == ["a red circle"]


@pytest.mark.parametrize(("sample", "reason"), [
    ({}, "no caption"),
    ({"json": as_json({"caption": "  "})}, "no caption"),
    ({"txt": b""}, "no caption"),
    ({"json": as_json(["a"])}, "no caption"),
    ({"json": as_json({"caption": 7})}, "no caption"),
    ({"json": as_json({"captions": ["a", " "]})}, "no caption"),
    ({"json": as_json({"captions": 7})}, "no caption"),
    ({"json": b"{'caption'"}, "broken JSON"),
    ({"json": '{"caption": "caf\u00e9"}'.encode("latin-1")}, "caption is not UTF-8"),
    ({"txt": b"caf\xe9"}, "caption is not UTF-8"),
    ({"json": b'{"caption": "\\ud800"}'}, "caption is not UTF-8"),
])  # fmt: skip
def test_captions_that_cannot_be_used(sample: dict[str, bytes], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        captions_of(sample)


def test_several_captions_each_once() -> None:
    assert captions_of({"json": as_json({"captions": ["a", "b ", "c", "b"], "caption": "other"})}) == ["a", "b", "c"]
