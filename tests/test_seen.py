"""Nothing that a user wrote or named is lost silently: text of every editor, files of every extension, links."""

from __future__ import annotations

import codecs
import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lingen.cli import main
from lingen.cli.prompts import lines_of
from lingen.data import manifest
from lingen.data.ahead import Ahead
from lingen.data.captions import captions_of
from lingen.data.indexing import open_index, scan_shards
from lingen.data.locations import Location, expand
from lingen.data.manifest import About
from lingen.data.shards import parse_sample, write_shards
from lingen.data.sources import Reader
from lingen.media import encode_picture
from lingen.prepare.captions import Captions, read_table
from lingen.prepare.check import check_folders
from lingen.prepare.footage import MediaSource, look_through
from lingen.prepare.index import index_folder
from lingen.recipe import load_recipe
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import Remote
from tests.helpers.footage import frames, write_film
from tests.yardsticks.loopback import serve

ENCODINGS = {
    "plain": lambda text: text.encode(),
    "utf-8": lambda text: codecs.BOM_UTF8 + text.encode(),
    "utf-16-le": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16-be": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-32": lambda text: codecs.BOM_UTF32_LE + text.encode("utf-32-le"),
}
RECIPE = """
extends: footage_64
data: {frames: 8, size: [32, 32], fps: 8}
"""


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, encoding: str) -> None:
    write = ENCODINGS[encoding]
    assert captions_of({"txt": write("ein Drache \u00fcber\r\ndem Haus\r\n")}) == ["ein Drache \u00fcber\ndem Haus"]
    assert captions_of({"json": write('{"caption": "\u00fc"}')}) == ["\u00fc"]
    for name, text in (
        ("t.csv", "key,caption\r\na,\u00fc\r\n"),
        ("t.jsonl", '{"key": "a", "caption": "\u00fc"}\r\n'),
        ("t.json", '{"a": "\u00fc"}'),
    ):
        (tmp_path / name).write_bytes(write(text))
        assert list(read_table(tmp_path / name)) == [("a", "\u00fc")], name
    (tmp_path / "p.txt").write_bytes(write("one \u00fc\r\n\r\ntwo"))
    assert lines_of(str(tmp_path / "p.txt")) == ["one \u00fc", "two"]
    (tmp_path / "r.yaml").write_bytes(write("extends: quickstart_cpu\r\nseed: 5\r\n"))
    assert load_recipe(tmp_path / "r.yaml", stage=None).seed == 5


def test_bytes_that_are_no_text_are_named_with_their_place(tmp_path: Path) -> None:
    bad = "one\ncaf\u00e9\n".encode("latin-1")
    place = r"line 2, byte 7 \(0xe9\) is no UTF-8; save the file as UTF-8"
    with pytest.raises(ValueError, match="caption is not UTF-8: " + place):
        captions_of({"txt": bad})
    for name, read in (("p.txt", lines_of), ("r.yaml", load_recipe), ("t.csv", Captions)):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(RecipeError, match=f"{name}.*{place}"):
            read(str(tmp_path / name))


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{", '{"caption": nope}'])
def test_json_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="^broken JSON: "):
        captions_of({"json": text.encode()})
    (tmp_path / "t.json").write_text(text)
    (tmp_path / "t.jsonl").write_text(f"\n{text}\n")
    with pytest.raises(RecipeError, match="t.json' cannot be read: broken JSON"):
        Captions(tmp_path / "t.json")
    with pytest.raises(RecipeError, match="t.jsonl:2' cannot be read: broken JSON"):
        Captions(tmp_path / "t.jsonl")


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("first", ["", "sep={}\n"])
def test_columns_are_found_whatever_stands_between_them(tmp_path: Path, mark: str, first: str) -> None:
    rows = [["Caption ", "KEY"], ['"a, b; c"', "x"]]
    (tmp_path / "t.csv").write_text(first.format(mark) + "\r\n".join(mark.join(row) for row in rows))
    assert list(read_table(tmp_path / "t.csv")) == [("x", "a, b; c")]


def test_other_columns_are_said(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file;description\na;b\n")
    with pytest.raises(RecipeError, match="its columns are 'file', 'description'.* columns 'key' and 'caption'"):
        Captions(tmp_path / "t.csv")
    (tmp_path / "t.jsonl").write_text('{"file": "a", "text": "b"}\n')
    with pytest.raises(RecipeError, match="t.jsonl:1: a row needs 'key' and 'caption'.* it has 'file', 'text'"):
        Captions(tmp_path / "t.jsonl")


@pytest.mark.parametrize("name", ["a.TXT", "a.Txt", "a.JSON"])
def test_an_extension_counts_however_it_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"caption": "a dog"}' if "J" in name else "a dog")
    assert Captions().of(MediaSource("video", "a", tmp_path / "a.MP4", "f")) == ["a dog"]


# files


def test_films_of_other_containers_and_linked_folders_are_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    films, elsewhere = tmp_path / "films", tmp_path / "elsewhere"
    names = {
        "a.wmv": "wmv2", "b.flv": "flv1", "c.3gp": "libx264", "d.m2ts": "mpeg2video", "e.MTS": "mpeg2video",
        "f.vob": "mpeg2video", "g.ogv": "libtheora",
    }  # fmt: skip
    for number, (name, codec) in enumerate(names.items()):
        shown = frames(f"life=seed={number}:mold=10", 1.5, 24, (48, 64))
        try:
            write_film(films / name, shown, 24, codec)
        except ValueError:  # this FFmpeg was built without the encoder
            (films / name).unlink(missing_ok=True)
            continue
        (films / name).with_suffix(".txt").write_text(name)
    packed = len(list(films.glob("*.txt")))
    assert packed >= 5
    write_film(elsewhere / "z.mp4", frames("mandelbrot", 1.5, 24, (48, 64)))
    (elsewhere / "z.txt").write_text("linked")
    (films / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(films)
    (films / "loop").symlink_to(films)
    (films / "gone.mp4").symlink_to(films / "nowhere.mp4")
    (films / "clip.xyz").write_bytes(b"?")
    (films / "notes.txt").write_text("of nothing")
    (films / ".hidden.mp4").write_bytes(b"?")
    Image.new("RGB", (64, 64)).save(films / "cover.jpg")
    (tmp_path / "r.yaml").write_text(RECIPE)
    words = ["data", "pack", "--recipe", str(tmp_path / "r.yaml"), "--videos", str(films), "--processes", "0"]
    off = [word for name in ("still", "jerky", "frozen", "duplicates", "black") for word in (f"--{name}", "off")]
    assert main([*words, *off, "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["made"] == {"video": packed + 1}
    assert "linked/z-0000" in [row.key for row in manifest.rows(tmp_path / "out" / manifest.NAME)]
    assert ledger["left_out"] == {
        "linked folder": 2, "unreadable": 1, "other file": 1, "caption without a file": 1, "hidden": 1,
        "picture among films": 1,
    }  # fmt: skip
    assert all(f"left out: {reason}" in told for reason in ledger["left_out"])
    assert ledger["named"]["other file"][0].startswith("clip.xyz: other file: .xyz, ")
    assert ledger["named"]["caption without a file"][0].startswith("notes.txt: ")


def test_a_folder_of_the_other_kind_is_told_as_that(tmp_path: Path) -> None:
    for number in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number}.bmp")
    with pytest.raises(RecipeError, match="holds no video file, but 2 pictures: name it with --images"):
        look_through([tmp_path], "video")
    assert [source.key for source in look_through([tmp_path], "image").sources] == ["0", "1"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f.mkv").touch()
    with pytest.raises(RecipeError, match="holds no image file, but 1 film: name it with --videos"):
        look_through([tmp_path / "a"], "image")
    assert look_through([tmp_path], "video", [tmp_path]).unseen == []


def test_pictures_of_other_formats_become_what_training_reads(tmp_path: Path) -> None:
    from tests.test_footage import cut, media_of, reasons

    picture = Image.fromarray(next(frames("testsrc2", 1, 24, (64, 64))))
    for name in ("a.bmp", "b.tiff", "c.jfif", "d.avif", "e.gif", "f.tga", "g.ppm", "wrong.png"):
        picture.save(tmp_path / name, "JPEG" if name in ("wrong.png", "c.jfif") else None)
        (made,) = cut(tmp_path / name, kind="image").samples
        assert made.media == ("jpg" if name in ("c.jfif", "wrong.png") else "webp"), name
        assert list(media_of(tmp_path / name)[0])[0] == made.media
    picture.save(tmp_path / "moving.gif", save_all=True, append_images=[picture.rotate(90)])
    assert reasons(cut(tmp_path / "moving.gif", kind="image")) == ["film among pictures"]


# shards


def tar_of(path: Path, names: list[str], media: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            member, data = tarfile.TarInfo(name), media if name.endswith("png") else b"a caption"
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "PNG")
    return buffer.getvalue()


SORTED = [f"{number}.{end}" for number in range(3) for end in ("png", "txt")]


def test_an_unsorted_tar_is_told_with_its_cure(tmp_path: Path, png: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    tar_of(tmp_path / "a.tar", sorted(SORTED, key=lambda name: name[2:]), png)
    assert main(["data", "index", str(tmp_path), "--processes", "0"]) == 2
    told = capsys.readouterr().err
    assert "a.tar: unsorted tar: the files of 3 samples do not stand beside each other, such as 0.png and 0.txt" in told
    assert main(["data", "check", str(tmp_path), "--processes", "0"]) == 1
    assert "a.tar: unsorted tar: " in capsys.readouterr().err
    (index,) = scan_shards([Location(str(tmp_path), "a.tar")]).faults
    assert index.reason in told
    subprocess.run(index.reason.split("`")[1], shell=True, check=True, cwd=tmp_path)
    shutil.rmtree(tmp_path / "sorted")
    assert main(["data", "index", str(tmp_path), "--processes", "0"]) == 0
    assert len(list(manifest.rows(tmp_path / manifest.NAME))) == 3


def test_index_and_check_find_the_same(tmp_path: Path, png: bytes) -> None:
    """Without a manifest, and with the one that the index writes."""
    tar_of(tmp_path / "a.TAR", [*SORTED, "3.png", "4.txt", "0.png", "0.txt", "9.png", "9.txt"], png)
    with (tmp_path / "a.TAR").open("r+b") as file:
        where = (tmp_path / "a.TAR").read_bytes().rindex(b"IHDR")
        file.seek(where)
        file.write(b"IXXR")
    (tmp_path / "b.tar.gz").write_bytes(b"?")
    (tmp_path / "zero.tar").touch()
    before = check_folders([tmp_path], "full").faults
    rows, drops = index_folder(tmp_path, 0)
    assert set(before) == set(drops) and rows == 3
    reasons = [drop.reason.partition(":")[0] for drop in drops]
    assert sorted(reasons) == [
        "broken picture", "compressed tar", "empty shard", "no caption", "no media", "same key twice"
    ]  # fmt: skip
    assert set(check_folders([tmp_path], "full").faults) == set(before)


def test_check_plans_for_the_folders_that_are_named(
    tmp_path: Path, png: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(
        "extends: quickstart_cpu\nstages: null\n"
        "data: {synthetic: null, shards: {image: nowhere.tar, video: nowhere.tar}, "
        "mix: {image: 1, video: 0}, batch: {image: 2}, size: [32, 32]}\n"
    )
    tar_of(tmp_path / "set" / "a.tar", SORTED, png)
    words = ["data", "check", "--recipe", str(tmp_path / "r.yaml"), str(tmp_path / "set"), "--processes", "0"]
    assert main(words) == 1
    cure = f"has no manifest.parquet; write it with `lingen data index {tmp_path / 'set'}`"
    assert cure in capsys.readouterr().err
    assert main(["data", "stats", str(tmp_path / "set")]) == 2 and cure in capsys.readouterr().err
    assert main(["data", "index", str(tmp_path / "set"), "--processes", "0"]) == 0
    assert main([*words, "--json"]) == 0
    (bucket,) = json.loads(capsys.readouterr().out.partition("\n")[2])["buckets"]
    assert bucket[1:4] == ["image", "1x32x32", 3]


@pytest.mark.parametrize("name", ["set[1]", "set{1,2}", "set*", "a=b"])
def test_a_path_that_exists_is_no_pattern(tmp_path: Path, png: bytes, name: str) -> None:
    one = tar_of(tmp_path / name / "x[0].tar", SORTED, png)
    other = tar_of(tmp_path / "set1" / "x0.tar", SORTED, png)
    assert expand(str(one), "x") == [str(one)] and expand(str(tmp_path / "set1" / "x[0].tar"), "x") == [str(other)]
    index_folder(tmp_path / name, 0)
    assert expand(str(tmp_path / name), "x") == [str(tmp_path / name / manifest.NAME)]
    assert expand(f"{tmp_path / name}/*.tar", "x") == [str(one)]
    assert expand(f"{tmp_path / name}/x[[]{{0,0}}].tar", "x") == [str(one)]


# caches: the same path with other content never gives old data


def shades(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (shade, 0, 0)).save(buffer, "BMP")  # BMPs of one size are of one length
    return buffer.getvalue()


def replaced(path: Path, content: bytes) -> None:
    """Another file at the same path, of the same length and time."""
    about = path.stat()
    assert about.st_size == len(content)
    path.with_name("new").write_bytes(content)
    path.with_name("new").replace(path)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def test_a_shard_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"old")
    reader = Reader(Remote())
    assert bytes(reader.read(str(path), 0, 3).data) == b"old"
    replaced(path, b"new")
    assert bytes(reader.read(str(path), 0, 3).data) == b"new"


def test_an_index_is_that_of_the_manifest_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINGEN_CACHE", str(tmp_path / "cache"))
    path, other = tmp_path / manifest.NAME, tmp_path / "other" / manifest.NAME
    for where, key in ((path, "a"), (other, "b")):
        manifest.write(where, [manifest.Row(key, "a.tar", 0, 512, "image", 8, 8, 1)], About())
    assert open_index([str(path)], "image", "x", Reader(Remote())).key(0) == "a"
    replaced(path, other.read_bytes())
    assert open_index([str(path)], "image", "x", Reader(Remote())).key(0) == "b"


def test_a_remote_caption_that_changes_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The media, and so the hash, the offset and the length of the sample, stay what they were."""
    monkeypatch.setenv("LINGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    with serve(tmp_path / "set") as address:
        for caption in (b"a red cat", b"a tall dog"):
            shutil.rmtree(tmp_path / "set", ignore_errors=True)
            sample = {"__key__": "a", "png": encode_picture(np.zeros((8, 8, 3), np.uint8)), "txt": caption}
            write_shards([sample], str(tmp_path / "set" / "%d.tar"))
            index_folder(tmp_path / "set", 0)
            index = open_index([f"{address}/{manifest.NAME}"], "image", "x", Reader(Remote()))
            piece = Ahead(index, Reader(Remote(cache_gb=0.1))).get(0)
            assert captions_of(parse_sample(piece.data, "a")) == [caption.decode()]


def test_footage_that_changes_is_not_packed_from_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(
        RECIPE.replace("fps: 8", "fps: 8, mix: {image: 1, video: 0}, shards: {image: nowhere.tar}")
    )
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.bmp").write_bytes(shades(200))
    (pictures / "a.txt").write_text("a shade")
    words = ["data", "pack", "--recipe", str(tmp_path / "r.yaml"), "--images", str(pictures), "--processes", "0"]
    words += ["--out", str(tmp_path / "out"), "--black", "off"]
    assert main(words) == 0
    assert main(words) == 0  # nothing has changed
    replaced(pictures / "a.bmp", shades(90))
    capsys.readouterr()
    assert main(words) == 2
    told = capsys.readouterr().err
    assert f"'a' has changed since it went into '{tmp_path / 'out'}'" in told and "Name a new folder (--out)" in told
