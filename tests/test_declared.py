"""What films and pictures declare, and what our own declare: times, orientation, curves, fields, colours."""

from __future__ import annotations

import io
import itertools
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import Image

from lingen.data.decode import decode_image, decode_video
from lingen.data.frames import ShortClip, fit_frame
from lingen.media import encode_mp4, save_video
from lingen.prepare.cut import ClipRequirements, CutJob
from lingen.prepare.filters import Filters
from lingen.prepare.footage import MediaSource, read_frames
from lingen.prepare.index import describe_sample
from lingen.prepare.shots import follow
from tests.helpers.footage import Cut, cut_out, frames, write_film

SIDE = 64
OPEN = Filters(black=None, frozen=None, still=None, jerky=None, duplicates=None)


def cut(path: Path, filters: Filters = OPEN, fps: float = 24.0) -> Cut:
    wanted = ClipRequirements((((SIDE, SIDE),),), fps, (8,))
    source = MediaSource("video", path.stem, path, "films")
    return cut_out(CutJob(source, ["a caption"], "", wanted, filters, path.with_suffix(".tar")))


def greys(count: int) -> list[np.ndarray]:
    return [np.full((SIDE, SIDE, 3), 20 + 4 * number, np.uint8) for number in range(count)]


def numbers_of(path: Path) -> list[int]:
    """Which of `greys` a film shows."""
    return [round((float(one.picture.to_ndarray(format="rgb24").mean()) - 20) / 4) for one in read_frames(path)]


def stamped(path: Path, stamps: list[int | None], b_frames: int = 0, rate: int = 24) -> Path:
    """A film in which the packets, in the order of decoding, have these time stamps, in frames."""
    with av.open(str(path), "w") as file:
        options = {"bf": str(b_frames), "b-adapt": "0", "crf": "4", "sc_threshold": "0"}
        stream = file.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        pictures = (av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in greys(len(stamps)))
        packets = [packet for picture in [*pictures, None] for packet in stream.encode(picture)]
        for packet, stamp in zip(packets, stamps, strict=True):
            if stamp is not None:
                packet.pts = packet.dts = round(stamp / rate / packet.time_base)
            file.mux(packet)
    return path


# time


@pytest.mark.parametrize("name", ["a.avi", "a.mkv"])
def test_a_film_with_times_of_decoding_alone_keeps_every_frame(tmp_path: Path, name: str) -> None:
    """B-frames in an AVI, or in what was made of one: the decoder reorders frames, their time stamps do not."""
    path = stamped(tmp_path / name, list(range(40)), b_frames=3)
    read = list(read_frames(path))
    assert numbers_of(path) == list(range(40)) and not any(frame.gap for frame in read)
    assert [frame.time for frame in read] == pytest.approx(np.arange(40) / 24, abs=0.0011)
    with pytest.raises(ValueError, match="out of order|broken video: neither"):
        decode_video(path.read_bytes(), frames=30, size=(SIDE, SIDE), fps=24.0, start=0.0)


def test_what_lies_behind_the_join_of_two_films_is_read_as_a_further_shot(tmp_path: Path) -> None:
    one = write_film(tmp_path / "one.ts", frames("testsrc2", 1, size=(SIDE, SIDE)))
    both = tmp_path / "both.ts"
    both.write_bytes(one.read_bytes() * 2)
    track = follow(read_frames(both))
    assert len(track.times) == 48 and (np.diff(track.times) > 0).all()
    assert 24 in track.cuts and track.fps == pytest.approx(24, rel=0.01) and track.mended == 1
    outcome = cut(both)
    assert sum(made.frames for made in outcome.samples) == 48
    assert outcome.told == [("both", "time stamps mended: 1 of 48 were missing or did not ascend")]


def test_the_join_of_very_short_films_is_a_gap(tmp_path: Path) -> None:
    one = write_film(tmp_path / "one.ts", greys(4))
    both = tmp_path / "both.ts"
    both.write_bytes(one.read_bytes() * 3)
    read = list(read_frames(both))
    assert [number for number, frame in enumerate(read) if frame.gap] == [4, 8] and len(read) == 12
    assert np.diff([frame.time for frame in read]) == pytest.approx(1 / 24, abs=0.005)


@pytest.mark.parametrize(
    "stamps",
    [[0, 1, 2, 2, 3, 4, 5, 6], [0, 0, 2, 2, 4, 4, 6, 6], [0, 1, 3, 2, 4, 5, 6, 7]],
    ids=["duplicate", "pairs", "one step back"],
)
def test_stamps_that_do_not_ascend_lose_no_frame(tmp_path: Path, stamps: list[int]) -> None:
    path = write_film(tmp_path / "a.mkv", greys(8), 25, "mpeg4")
    restamp(path, [40 * stamp for stamp in stamps])
    read = list(read_frames(path))
    assert len(read) == 8 and all(b.time > a.time for a, b in itertools.pairwise(read))
    assert any(frame.mended for frame in read) and not any(frame.gap for frame in read)
    assert read[-1].time == pytest.approx(7 / 25, abs=1.01 / 25)


def restamp(path: Path, times: list[int]) -> None:
    """Gives the frames of a short Matroska film of 25 frames a second other times, in ms of its one cluster."""
    data, at = bytearray(path.read_bytes()), 0
    for number, time in enumerate(times):
        at = data.index(b"\x81" + struct.pack(">h", 40 * number), at + 3)  # track 1 and the time begin a block
        data[at + 1 : at + 3] = struct.pack(">h", time)
    path.write_bytes(data)


@pytest.mark.parametrize(("fps", "count"), [(24, 33), (24, 2), (30, 17), (60, 49), (15, 9), (23.976, 25), (120, 33)])
@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("webm", "libvpx")])
def test_a_film_of_exactly_the_wanted_length_is_long_enough(
    tmp_path: Path, container: str, codec: str, fps: float, count: int
) -> None:
    """A WebM rounds times to milliseconds."""
    path = write_film(tmp_path / f"a.{container}", (one[:16, :16] for one in greys(count)), fps, codec)
    clip = decode_video(path.read_bytes(), frames=count, size=(16, 16), fps=fps, start=0.5)
    assert clip.starts == 1
    means = clip.pixels.double().mean((0, 2, 3))
    assert (means.diff() > 2).all()  # each frame once
    with pytest.raises(ShortClip, match=f"{count} frames where {count + 1} are wanted"):
        decode_video(path.read_bytes(), frames=count + 1, size=(16, 16), fps=fps, start=0.5)


def test_pack_counts_as_training_does(tmp_path: Path) -> None:
    pictures = frames("testsrc2", 1, size=(SIDE, SIDE))
    path = write_film(tmp_path / "a.webm", itertools.islice(pictures, 16), 24, "libvpx")
    assert [made.frames for made in cut(path).samples] == [8, 8] and not cut(path).told
    path.with_suffix(".tar").unlink()
    retimed = cut(path, fps=12.0)
    assert retimed.told == [("a", "retimed from 24 to 12 frames a second")] and retimed == cut(path, fps=12.0)


@pytest.mark.parametrize("delays", [(120, 130), (130, 120)])  # ms
def test_rounded_times_are_not_told_as_another_rate(tmp_path: Path, delays: tuple[int, int]) -> None:
    """A GIF of 8 frames a second reads as 8.01 or 7.99: 12.5 hundredths of a second cannot be written."""
    path = tmp_path / "a.gif"
    pictures = [Image.fromarray(one) for one in itertools.islice(frames("testsrc2", 4, size=(SIDE, SIDE)), 32)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[*delays] * 16)
    track = follow(read_frames(path))
    assert track.fps != pytest.approx(8, rel=1e-3)
    assert not cut(path, fps=8.0).told


def test_a_gif_of_eight_frames_a_second_is_not_slower_than_eight(tmp_path: Path) -> None:
    """A GIF rounds times to hundredths of a second."""
    path = write_film(tmp_path / "a.gif", frames("testsrc2", 1, 8, (SIDE, SIDE)), 8, "gif", "rgb8")
    outcome = cut(path, Filters(still=None, duplicates=None, min_fps=7.92), fps=8.0)
    assert not outcome.drops and [made.fps for made in outcome.samples] == [8.0]


def test_a_gap_of_an_hour_does_not_make_a_film_slow(tmp_path: Path) -> None:
    path = stamped(tmp_path / "a.mkv", [*range(12), *range(90_000, 90_012)])
    track = follow(read_frames(path))
    assert track.fps == pytest.approx(24, rel=0.01) and 12 in track.cuts


# orientation

MATRICES = [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1), (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0),
            (0, -1, -1, 0)]  # fmt: skip


def with_matrix(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """The MP4 with another display matrix (a, b, c, d) in its track header (ISO 14496-12)."""
    changed = bytearray(data)
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", changed, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return bytes(changed)


@pytest.mark.parametrize("matrix", MATRICES)
def test_all_eight_orientations(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Each stored pixel lands where the matrix says: (x, y) -> (a x + c y, b x + d y)."""
    height, width = 32, 48
    stored = np.zeros((height, width, 3), np.uint8)
    stored[: height // 2, : width // 2] = 255, 0, 0
    stored[: height // 2, width // 2 :] = 0, 255, 0
    stored[height // 2 :, : width // 2] = 0, 0, 255
    path = write_film(tmp_path / "a.mp4", [stored] * 8, 8)
    path.write_bytes(with_matrix(path.read_bytes(), matrix))
    a, b, c, d = matrix
    size = (height, width) if a else (width, height)
    read = next(read_frames(path))
    packed = fit_frame(read.picture, VideoReformatter(), read.aspect, size)
    trained = decode_video(path.read_bytes(), frames=8, size=size, fps=8.0, start=0.0).pixels[:, 0].numpy()
    for y, x in itertools.product((-1, 1), repeat=2):
        colour = stored[height // 2 + y * height // 4, width // 2 + x * width // 4]
        at = size[0] // 2 + (b * x + d * y) * size[0] // 4, size[1] // 2 + (a * x + c * y) * size[1] // 4
        for pixels in (packed, trained):
            assert np.abs(pixels[:, at[0], at[1]].astype(int) - colour).max() < 12, (y, x)
    assert follow(read_frames(path)).size == size
    told = describe_sample({"mp4": path.read_bytes(), "txt": b"a"})
    assert (told["height"], told["width"]) == size


# curves and fields


def declaring(path: Path, transfer: int = 1, interlaced: bool = False) -> Path:
    with av.open(str(path), "w") as file:
        options = {"x264-params": "interlaced=1"} if interlaced else {}
        stream = file.add_stream("libx264", rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.codec_context.color_trc = transfer
        for picture in frames("testsrc2", 1, size=(SIDE, SIDE)):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("reason", "transfer", "interlaced"), [("hdr", 16, False), ("hdr", 18, False), ("interlaced", 1, True)]
)
def test_hdr_and_interlaced_film_is_refused_and_counted(
    tmp_path: Path, reason: str, transfer: int, interlaced: bool
) -> None:
    path = declaring(tmp_path / "a.mp4", transfer, interlaced)
    ((key, said),) = cut(path).drops
    assert key == "a" and said.startswith(f"{reason}: 100% of its frames") and "ffmpeg -vf" in said
    with pytest.raises(ValueError, match=f"^{reason}: "):
        decode_video(path.read_bytes(), frames=4, size=(SIDE, SIDE), fps=24.0, start=0.0)
    with pytest.raises(ValueError, match=f"^{reason}: "):
        describe_sample({"mp4": path.read_bytes(), "txt": b"a"})
    path.with_suffix(".tar").unlink(missing_ok=True)
    assert cut(path, Filters(**{"still": None, reason: None})).samples
    assert not cut(declaring(tmp_path / "b.mp4")).drops


# transparency and colour profiles


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.webm", "libvpx", "yuva420p"),
        ("b.webm", "libvpx-vp9", "yuva420p"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("p.mov", "png", "rgba"),
    ],
)
def test_a_transparent_film_is_on_white(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    """Black, transparent in its left half, half transparent in its lower right quarter."""
    picture = np.zeros((SIDE, SIDE, 4), np.uint8)
    picture[:, SIDE // 2 :, 3] = 255
    picture[SIDE // 2 :, SIDE // 2 :, 3] = 128
    path = tmp_path / name
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=24, options={"auto-alt-ref": "0"} if "vpx" in codec else {})
        stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, pix_fmt
        if "vpx" in codec:
            stream.metadata["alpha_mode"] = "1"
            stream.bit_rate = 2_000_000
        for _ in range(8):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
        file.mux(stream.encode())
    read = next(read_frames(path))
    shown = [fit_frame(read.picture, VideoReformatter(), read.aspect, (SIDE, SIDE))]
    if name.endswith("webm"):
        data = path.read_bytes()
        shown.append(decode_video(data, frames=8, size=(SIDE, SIDE), fps=24.0, start=0.0).pixels[:, 0].numpy())
    for pixels in shown:
        levels = [float(pixels[:, y, x].mean()) for y, x in ((16, 16), (16, 48), (48, 48))]
        assert levels == pytest.approx([255, 0, 127], abs=6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_exif_orientations(orientation: int) -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1))
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(back[orientation]) if orientation in back else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    stored.save(data, "PNG", exif=exif)
    assert (decode_image(data.getvalue(), size=(48, 32))[:, 0].permute(1, 2, 0).numpy() == np.asarray(upright)).all()
    told = describe_sample({"png": data.getvalue(), "txt": b"a"})
    assert (told["height"], told["width"]) == (48, 32)


def matrix_profile(columns: list[tuple[float, float, float]], gamma: float, space: bytes = b"RGB ") -> bytes:
    """An ICC profile (version 2) of a display with these columns in XYZ (D50), or of grey."""
    fixed = [tuple(round(value * 65536) for value in column) for column in columns]
    tags = [(b"wtpt", b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061))]
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    if space == b"GRAY":
        tags.append((b"kTRC", curve))
    else:
        tags += [
            (name, b"XYZ \0\0\0\0" + struct.pack(">3i", *c))
            for name, c in zip((b"rXYZ", b"gXYZ", b"bXYZ"), fixed, strict=True)
        ]
        tags += [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    table, body, at = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags:
        table += name + struct.pack(">2I", at + len(body), len(content))
        body += content
    header = struct.pack(">I4x4s4s4s4s12x4s", at + len(body), b"\x02\x10\0\0", b"mntr", space, b"XYZ ", b"acsp")
    header = header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body


ADOBE_RGB = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_colour_profile_becomes_srgb(kind: str) -> None:
    """(150, 100, 80) of Adobe RGB (1998) by its formulas in sRGB."""
    linear = (np.array([150, 100, 80]) / 255) ** 2.2
    to_srgb = np.linalg.inv(
        np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
    )
    seen = to_srgb @ np.array(ADOBE_RGB).T @ linear
    wanted = 255 * np.where(seen < 0.0031308, 12.92 * seen, 1.055 * np.abs(seen) ** (1 / 2.4) - 0.055)
    data = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    picture = Image.new("RGB", (16, 16), (150, 100, 80))
    picture.save(data, kind, icc_profile=matrix_profile(ADOBE_RGB, 2.2), **options)
    pixels = decode_image(data.getvalue(), size=(16, 16))[:, 0, 8, 8].numpy()
    assert abs(wanted[0] - 150) > 8 and np.abs(pixels - wanted).max() < 2.5


def test_profiles_of_grey_and_of_transparent_pictures() -> None:
    grey = io.BytesIO()
    Image.new("L", (8, 8), 128).save(grey, "PNG", icc_profile=matrix_profile([], 1.0, b"GRAY"))
    assert decode_image(grey.getvalue(), size=(8, 8)).double().mean().item() == pytest.approx(188, abs=2)
    clear = io.BytesIO()
    Image.new("RGBA", (8, 8), (150, 100, 80, 0)).save(clear, "PNG", icc_profile=matrix_profile(ADOBE_RGB, 2.2))
    assert (decode_image(clear.getvalue(), size=(8, 8)) == 255).all()
    broken = io.BytesIO()
    Image.new("RGB", (8, 8)).save(broken, "PNG", icc_profile=b"no profile")
    with pytest.raises(ValueError, match="broken colour profile"):
        decode_image(broken.getvalue(), size=(8, 8))


# streams


def test_the_default_stream_is_the_film_and_a_cover_is_none(tmp_path: Path) -> None:
    from av.stream import Disposition

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        streams = []
        for flags in (Disposition.attached_pic, 0, Disposition.default):
            stream = file.add_stream("libx264", rate=24)
            stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, "yuv420p"
            stream.disposition = flags
            streams.append(stream)
        for shown in range(8):
            for level, stream in zip((30, 90, 150), streams, strict=True):
                picture = np.full((SIDE, SIDE, 3), level + shown, np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            file.mux(stream.encode())
    first = next(read_frames(path)).picture.to_ndarray(format="rgb24")
    assert abs(float(first.mean()) - 150) < 4
    clip = decode_video(path.read_bytes(), frames=8, size=(SIDE, SIDE), fps=24.0, start=0.0)
    assert abs(float(clip.pixels[:, 0].double().mean()) - 150) < 4


# what we write


@pytest.mark.parametrize(("rows", "matrix"), [(480, 6), (720, 1)])
@pytest.mark.parametrize("member", [False, True], ids=["save_video", "shard"])
def test_what_we_write_says_how_its_colours_are_coded(tmp_path: Path, rows: int, matrix: int, member: bool) -> None:
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (235, 120, 20)]
    clip = np.repeat(np.array(colours, np.uint8)[None, None], rows, 1).repeat(64, 2)
    clip = np.repeat(clip, 2, 0)
    data = encode_mp4(clip, 8) if member else save_video(clip, tmp_path / "a.mp4", 8).read_bytes()
    with av.open(io.BytesIO(data)) as file:
        codec = file.streams.video[0].codec_context
        assert (codec.colorspace, codec.color_range, codec.color_primaries, codec.color_trc) == (matrix, 1, 1, 1)
        picture = next(file.decode(video=0))
    # by the formulas of BT.601 and BT.709, not by FFmpeg
    red, blue = (0.299, 0.114) if matrix == 6 else (0.2126, 0.0722)
    planes = picture.to_ndarray()
    luma, cb, cr = planes[:rows], planes[rows : rows + rows // 4], planes[rows + rows // 4 :]
    for number, colour in enumerate(colours):
        x = 64 * number + 32
        y = (float(luma[rows // 2, x]) - 16) / 219
        u = (float(cb.reshape(rows // 2, 128)[rows // 4, x // 2]) - 128) / 224
        v = (float(cr.reshape(rows // 2, 128)[rows // 4, x // 2]) - 128) / 224
        r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
        g = (y - red * r - blue * b) / (1 - red - blue)
        assert np.abs(np.array([r, g, b]) * 255 - colour).max() <= 3
    read = decode_video(data, frames=2, size=(rows, 256), fps=8.0, start=0.0).pixels[:, 0, rows // 2, 32::64]
    assert np.abs(read.numpy().T.astype(int) - colours).max() <= 3
