"""Films: finding them, their shots, what is filtered out, the pieces that are cut, and captions joined by key."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from webdataset.tariterators import base_plus_ext

from lingen.data.decode import decode_image, decode_video
from lingen.data.frames import covering
from lingen.data.shards import META
from lingen.prepare.captions import Captions
from lingen.prepare.cut import ClipRequirements, CutJob, divide, make_samples, read_samples
from lingen.prepare.filters import Filters, frozen_share
from lingen.prepare.footage import MediaSource, look_through, read_frames, sample_key
from lingen.prepare.limits import BANDS, LOOKS, Duplicates
from lingen.prepare.shots import follow
from lingen.recipe.errors import RecipeError
from tests.helpers.footage import SIZE, Cut, cut_out, film, frames, write_film

WANTED = ClipRequirements((((64, 64),),), 12.0, (24, 12))
OPEN = Filters(black=None, frozen=None, still=None, jerky=None, duplicates=None)


def cut(path: Path, filters: Filters = OPEN, wanted: ClipRequirements = WANTED, kind: str = "video") -> Cut:
    source = MediaSource(kind, path.stem, path, "films")
    return cut_out(CutJob(source, ["a caption"], "", wanted, filters, path.parent / "work" / f"{path.name}.tar"))


def reasons(outcome: Cut) -> list[str]:
    return [reason.partition(":")[0] for _, reason in outcome.drops]


def media_of(path: Path) -> list[dict[str, bytes]]:
    return list(read_samples(path.parent / "work" / f"{path.name}.tar"))


# files


def test_files_are_found_by_their_path_without_extension(tmp_path: Path) -> None:
    for name in ("b.MP4", "a.b.mkv", "deep/er/c.webm", ".hidden.mp4", ".git/d.mp4", "x.txt", "p.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [source.key for source in look_through([tmp_path], "video").sources] == ["a.b", "b", "deep/er/c"]
    assert [source.key for source in look_through([tmp_path], "image").sources] == ["p"]
    (tmp_path / "b.avi").touch()
    with pytest.raises(RecipeError, match="have the same key, 'b'. Rename one of them"):
        look_through([tmp_path], "video")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no file names that are not UTF-8")
def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    os.link(film(tmp_path / "a.mp4", ("testsrc2", 2)), os.path.join(os.fsencode(tmp_path), b"caf\xe9.mp4"))
    one, other = look_through([tmp_path], "video").sources
    assert one.key == "a" and other.key == "caf\\xe9"
    made = make_samples(CutJob(other, ["a"], "", WANTED, OPEN, tmp_path / "out.tar")).entries
    assert [entry.row.key for entry in made] == ["caf\\xe9-0000"]


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no video file"):
        look_through([tmp_path], "video")
    with pytest.raises(RecipeError, match="There is no folder"):
        look_through([tmp_path / "nowhere"], "image")


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1), st.text(min_size=1))
def test_webdataset_reads_a_sample_key_back_whole(name: str, other: str) -> None:
    key = sample_key(name)
    assert base_plus_ext(f"{key}.json") == (key, "json") and not META.match(f"{key}.json")
    assert (sample_key(other) == key) == (other == name)


@pytest.mark.parametrize(("name", "codec", "pix_fmt"), [
    ("a.mp4", "libx264", "yuv420p"), ("a.mpg", "mpeg2video", "yuv420p"), ("a.avi", "mpeg4", "yuv420p"),
    ("a.gif", "gif", "rgb8"), ("a.webm", "libvpx", "yuv420p"),
])  # fmt: skip
def test_containers(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    path = write_film(tmp_path / name, frames("testsrc2", 0.5), 25, codec, pix_fmt)
    read = list(read_frames(path))
    assert len(read) == 12 and not any(frame.gap for frame in read)
    assert [frame.time for frame in read] == pytest.approx([i / 25 for i in range(12)], abs=0.011)


def test_an_animated_webp_is_a_film(tmp_path: Path) -> None:
    first, *rest = [Image.fromarray(picture) for picture in frames("testsrc2", 0.5)]
    first.save(tmp_path / "a.webp", save_all=True, append_images=rest, duration=100)
    assert [frame.time for frame in read_frames(tmp_path / "a.webp")] == pytest.approx(np.arange(12) / 10)


@pytest.mark.parametrize("content", [b"", b"no film" * 99, b"#EXTM3U\n#EXTINF:5,\nfile:///etc/passwd\n"])
def test_what_is_no_film_is_left_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    assert reasons(cut(tmp_path / "a.mp4")) == ["unreadable"]


def test_a_picture_bomb_is_refused(tmp_path: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(tmp_path / "a.png")
    assert reasons(cut(tmp_path / "a.png", kind="image")) == ["too large"]


# shots


def test_shots_are_cut_where_the_scene_changes(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", ("testsrc2", 2), ("mandelbrot", 2.5), ("testsrc", 1.5))
    track = follow(read_frames(path))
    assert track.cuts == [48, 108] and len(track.times) == 144
    assert track.fps == pytest.approx(24) and track.size == SIZE


def test_damage_ends_a_shot(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mpg", ("testsrc2", 4), codec="mpeg2video")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    path.write_bytes(data)
    track = follow(read_frames(path))
    whole = len(track.times)
    assert track.cuts and whole > 60
    outcome = cut(path)
    assert sum(made.frames for made in outcome.samples) <= whole / 2 + 1


@given(
    st.integers(0, 400),
    st.sets(st.integers(1, 90), min_size=1, max_size=4),
    st.none() | st.floats(0.1, 10),
    st.just(8.0),
)
def test_pieces_of_a_shot(available: int, lengths: set[int], min_seconds: float | None, fps: float) -> None:
    ordered = tuple(sorted(lengths, reverse=True))
    pieces = divide(available, ordered, min_seconds, fps)
    ends = [start + count for start, count in pieces]
    assert [start for start, _ in pieces] == [0, *ends[:-1]][: len(pieces)]  # one behind the other
    if available >= min(lengths):
        assert ends[-1] == available  # nothing is lost
        assert all(count in lengths for _, count in pieces[:-1])
        assert any(0 <= pieces[-1][1] - length < min(lengths) for length in lengths)
    else:
        assert pieces == ([(0, available)] if min_seconds and available >= max(2, min_seconds * fps) else [])


@given(st.integers(2, 3000), st.integers(2, 3000), st.sampled_from([(512, 512), (256, 256), (384, 704)]))
def test_scaled_down_to_cover_and_never_up(height: int, width: int, wanted: tuple[int, int]) -> None:
    scaled = covering((height, width), [[wanted]])
    assert scaled[0] % 2 == scaled[1] % 2 == 0
    assert scaled[0] <= height + 1 and scaled[1] <= width + 1
    if height >= wanted[0] and width >= wanted[1]:
        assert scaled[0] >= wanted[0] and scaled[1] >= wanted[1]
        assert scaled[0] <= wanted[0] + 2 or scaled[1] <= wanted[1] + 2


# what comes out


def test_clips_show_what_the_film_shows(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", ("testsrc2", 2.5), ("mandelbrot", 1))
    half = (SIZE[0] // 2, SIZE[1] // 2)
    outcome = cut(path, wanted=ClipRequirements(((half,),), 12.0, (24, 12)))
    made = [(made.key, made.frames, made.fps, made.height, made.width) for made in outcome.samples]
    assert made == [("a-0000", 30, 12.0, *half), ("a-0001", 12, 12.0, *half)]
    assert cut(path, wanted=ClipRequirements(((half,),), 12.0, (24, 12))) == outcome, "the same, read again"
    whole = decode_video(path.read_bytes(), frames=42, size=half, fps=12.0, start=0.0).pixels.float()
    for sample, start in zip(media_of(path), (0.0, 2.5), strict=True):
        about = json.loads(sample["json"])
        assert about["caption"] == "a caption" and about["source"] == "films/a" and about["start"] == start
        clip = decode_video(sample["mp4"], frames=12, size=half, fps=12.0, start=0.0).pixels.float()
        first = round(start * 12)
        errors = [
            float((clip[:, : 42 - at].mean(0) - whole[:, at : at + 12].mean(0)).square().mean())
            for at in range(max(0, first - 2), min(32, first + 3))
        ]
        assert errors.index(min(errors)) == min(2, first) and min(errors) < 65  # 30 dB, and no neighbour is nearer


def test_a_slow_film_keeps_its_frame_rate(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", ("testsrc2", 5), fps=5)
    (made,) = cut(path).samples
    assert made.fps == pytest.approx(5) and made.frames == 25
    assert decode_video(media_of(path)[0]["mp4"], frames=24, size=(64, 64), fps=5.0, start=0.0).starts == 2


def test_pictures(tmp_path: Path) -> None:
    picture = next(frames("testsrc2", 1))
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(picture[:64, :70]).save(tmp_path / "b.png")
    (made,) = cut(tmp_path / "a.jpg", kind="image").samples
    assert (made.media, made.height, made.width, made.frames) == ("webp", 86, 64, 1)
    (sample,) = media_of(tmp_path / "a.jpg")
    assert decode_image(sample["webp"], size=(86, 64)).shape == (3, 1, 86, 64)
    (made,) = cut(tmp_path / "b.png", kind="image").samples
    assert made.media == "png" and media_of(tmp_path / "b.png")[0]["png"] == (tmp_path / "b.png").read_bytes()


# filters


def shaking() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    still = next(frames("testsrc", 1))
    return [np.roll(still, rng.integers(-12, 13, 2), (0, 1)) for _ in range(48)]


STILL = [next(frames("mandelbrot", 1))] * 48
SLOWLY = [np.roll(STILL[0], i // 24, 1) for i in range(48)]
FAULTS: dict[str, tuple[list[np.ndarray], Filters, Filters]] = {
    "black": ([np.zeros_like(STILL[0])] * 48, Filters(frozen=None, still=None), OPEN),
    "frozen": (STILL, Filters(still=None), Filters(frozen=None, still=None)),
    "still": (SLOWLY, Filters(frozen=None), Filters(frozen=None, still=None)),
    "jerky": (shaking(), Filters(), Filters(jerky=None)),
    "small": (list(frames("testsrc2", 2)), Filters(min_side=97), Filters(min_side=96)),
    "slow": (list(frames("testsrc2", 2)), Filters(min_fps=24.5), Filters(min_fps=23.9)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_filter_has_a_reason_and_a_switch(tmp_path: Path, fault: str) -> None:
    pictures, on, off = FAULTS[fault]
    path = write_film(tmp_path / "a.mp4", pictures)
    left_out = cut(path, on)
    assert not left_out.samples and reasons(left_out) == [fault], left_out
    (tmp_path / "work" / "a.mp4.tar").unlink()
    kept = cut(path, off)
    assert len(kept.samples) == 1 and not kept.drops, kept


def test_a_fast_pan_that_shows_frames_twice_is_not_jerky(tmp_path: Path) -> None:
    still = np.concatenate(list(frames("mandelbrot", 0.25)), 1)
    pan = [still[:, 8 * (i // 2) : 8 * (i // 2) + 128] for i in range(48)]
    kept = cut(write_film(tmp_path / "a.mp4", pan), Filters(frozen=None))
    assert len(kept.samples) >= 1 and "jerky" not in reasons(kept)


def test_a_short_shot_is_named_with_its_place(tmp_path: Path) -> None:
    outcome = cut(film(tmp_path / "a.mp4", ("testsrc2", 2), ("mandelbrot", 0.75)))
    assert len(outcome.samples) == 1
    assert outcome.drops == [("a", "short shot: 9 frames at 12 a second, 2.00 s to 2.75 s")]
    again = film(tmp_path / "b.mp4", ("testsrc2", 2), ("mandelbrot", 0.75))
    assert [made.frames for made in cut(again, Filters(still=None, min_seconds=0.5)).samples] == [24, 9]


def test_ordinary_films_pass_all_filters(tmp_path: Path) -> None:
    outcome = cut(film(tmp_path / "a.mp4", ("testsrc2", 2), ("mandelbrot", 2)), Filters(min_side=96, min_fps=12))
    assert len(outcome.samples) == 2 and not outcome.drops


def test_drawn_frames_that_stand_for_a_moment_are_not_frozen() -> None:
    times = np.arange(49) / 24
    on_threes = np.array([0.0, 0.0, 5.0] * 16)
    assert frozen_share(on_threes, times) == 0
    assert frozen_share(np.array([5.0] * 24 + [0.0] * 24), times) == pytest.approx(0.5)


LOOK = st.tuples(*[st.integers(0, 2**64 - 1)] * LOOKS)


@given(LOOK, st.lists(LOOK, max_size=20), st.sets(st.integers(0, 64 * LOOKS - 1), max_size=BANDS - 1))
def test_every_near_duplicate_is_found(look: tuple[int, ...], others: list[tuple[int, ...]], flipped: set[int]) -> None:
    seen = Duplicates(BANDS - 1)
    for number, other in enumerate(others):
        seen.add(str(number), other)
    near = list(look)
    for bit in flipped:
        near[bit // 64] ^= 1 << bit % 64
    distances = [sum((a ^ b).bit_count() for a, b in zip(other, near, strict=True)) for other in others]
    expected = next((str(i) for i, distance in enumerate(distances) if distance < BANDS), None)
    assert seen.find(tuple(near)) == expected
    seen.add("look", look)
    assert seen.find(tuple(near)) == (expected or "look")
    assert Duplicates(None).find(look) is None


def test_the_same_film_in_another_quality_is_a_near_duplicate(tmp_path: Path) -> None:
    good = cut(film(tmp_path / "a.mp4", ("testsrc2", 2))).looks[0]
    small = (np.asarray(Image.fromarray(picture).resize((96, 72))) for picture in frames("testsrc2", 2))
    smaller = cut(write_film(tmp_path / "b.avi", small, codec="mpeg4")).looks[0]
    other = cut(film(tmp_path / "c.mp4", ("mandelbrot", 2))).looks[0]
    seen = Duplicates(10)
    seen.add("a", good)
    assert seen.find(smaller) == "a" and seen.find(other) is None


# captions

SOURCES = [MediaSource("video", key, Path(f"{key}.mp4"), "f") for key in ("one", "deep/two", "three")]


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps({row["key"]: row["caption"] for row in rows}))
    return path


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", "json"])
def test_tables_are_joined_by_key_not_by_position(tmp_path: Path, ending: str) -> None:
    rows = [
        {"key": "three", "caption": "drei"},
        {"key": "gone.mp4", "caption": "fort"},
        {"key": "./deep/two.MP4", "caption": "zwei, \u00fc"},
    ]
    captions = Captions(table(tmp_path / f"t.{ending}", rows))
    assert captions.of(SOURCES[2]) == ["drei"] and captions.of(SOURCES[1]) == ["zwei, \u00fc"]
    with pytest.raises(ValueError, match="^no caption$"):
        captions.of(SOURCES[0])
    assert captions.unused(SOURCES) == ["gone"]


def test_several_rows_and_lists_are_several_captions(tmp_path: Path) -> None:
    rows = [{"key": "one", "caption": "a"}, {"key": "one", "caption": "b"}]
    assert Captions(table(tmp_path / "t.csv", rows)).of(SOURCES[0]) == ["a", "b"]
    lists = [{"key": "one", "captions": ["a", "b"]}]
    assert Captions(table(tmp_path / "t.parquet", lists)).of(SOURCES[0]) == ["a", "b"]


def test_an_empty_caption_is_none() -> None:
    captions = Captions()
    captions._found = {"one": ["  "], "deep/two": [None]}
    for source in SOURCES[:2]:
        with pytest.raises(ValueError, match="no caption: it is empty"):
            captions.of(source)


def test_sidecars(tmp_path: Path) -> None:
    sources = [MediaSource("video", name, tmp_path / f"{name}.mp4", "f") for name in ("a", "b", "c", "d")]
    (tmp_path / "a.txt").write_text(" a red ball\n")
    (tmp_path / "b.json").write_text('{"captions": ["one", "two"]}')
    (tmp_path / "c.txt").write_bytes("caf\u00e9".encode("latin-1"))
    assert Captions().of(sources[0]) == ["a red ball"] and Captions().of(sources[1]) == ["one", "two"]
    for source, reason in ((sources[2], "caption is not UTF-8"), (sources[3], "^no caption$")):
        with pytest.raises(ValueError, match=reason):
            Captions().of(source)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("list.txt", "first\nsecond\n", "A list that goes by position is refused"),
    ("list.csv", "caption\nfirst\nsecond\n", "A list that goes by position is refused"),
    ("list.json", '["first", "second"]', "A list that goes by position is refused"),
    ("list.jsonl", '"first"\n"second"\n', "A list that goes by position is refused"),
    ("t.csv", "key,text\na,b\n", "needs 'key' and 'caption'"),
    ("t.jsonl", '{"key": "a", "caption": "b"}\n{"key": ""}\n', r"t.jsonl:2: a row needs 'key' and 'caption'"),
    ("t.json", "{", "cannot be read"),
    ("t.parquet", "no parquet", "cannot be read"),
])  # fmt: skip
def test_tables_that_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=message):
        Captions(tmp_path / name)


def test_a_row_of_a_long_table_is_told_by_its_number(tmp_path: Path) -> None:
    keys = [*map(str, range(1 << 16)), "last", None]
    pq.write_table(pa.table({"key": keys, "caption": ["a"] * len(keys)}), tmp_path / "t.parquet")
    with pytest.raises(RecipeError, match="t.parquet, row 65537: a row needs 'key' and 'caption'"):
        Captions(tmp_path / "t.parquet")


def test_a_table_of_other_keys_or_bytes_is_refused(tmp_path: Path) -> None:
    other = Captions(table(tmp_path / "t.csv", [{"key": "films/one.mp4", "caption": "a"}]))
    with pytest.raises(RecipeError, match="keys look like 'films/one', those of the files like 'deep/two'"):
        other.unused(SOURCES)
    (tmp_path / "l.csv").write_bytes("key,caption\na,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(RecipeError, match="is not UTF-8"):
        Captions(tmp_path / "l.csv")
