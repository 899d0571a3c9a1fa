"""`lingen data check` and `lingen data stats`: every fault of shards and manifests, and every starving stage."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lingen.cli import main
from lingen.data import manifest
from lingen.data.manifest import About, media_hash
from lingen.data.shards import write_shards
from lingen.media import encode_mp4
from lingen.prepare.captions import Captions
from lingen.prepare.check import check_folders
from lingen.prepare.cut import ClipRequirements
from lingen.prepare.filters import Filters
from lingen.prepare.forecast import forecast
from lingen.prepare.journal import Part
from lingen.prepare.pack import Packing, look_for_footage, pack
from lingen.prepare.stats import measure_folders, sample_sheet
from lingen.recipe import load_stages
from lingen.recipe.errors import RecipeError
from lingen.recipe.sizes import ranks_of
from tests.helpers.footage import film, frames

WANTED = ClipRequirements((((32, 48),),), 8.0, (16, 8))
OPEN = Filters(black=None, frozen=None, still=None, jerky=None)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures and four clips, in a shard each kind."""
    folder = tmp_path_factory.mktemp("check")
    films = folder / "films"
    film(films / "a.mp4", ("testsrc2", 2), ("mandelbrot", 2.5), fps=8, size=(32, 48))
    film(films / "b.mp4", ("testsrc", 1), fps=8, size=(32, 60))
    film(films / "c.mp4", ("rgbtestsrc", 1), fps=8, size=(48, 48))
    (folder / "pictures").mkdir()
    for name in ("p", "q"):
        Image.fromarray(next(frames("testsrc2" if name == "p" else "mandelbrot", 1))).save(
            folder / f"pictures/{name}.png"
        )
    (folder / "captions.json").write_text(json.dumps({key: f"about {key}" for key in "abcpq"}))
    sources = look_for_footage([films], [folder / "pictures"], WANTED).sources
    pack(Packing(sources, Captions(folder / "captions.json"), WANTED, OPEN), folder / "packed")
    return folder / "packed"


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "set")
    return tmp_path / "set"


def faults(folder: Path, depth: str = "full") -> list[str]:
    return [f"{drop.where}: {drop.reason}" for drop in check_folders([folder], depth).faults]  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", ["quick", "full", "decode"])
def test_a_whole_set_has_no_fault(packed: Path, depth: str) -> None:
    checked = check_folders([packed], depth, processes=0)  # type: ignore[arg-type]
    assert checked.samples == 6 and not checked.faults


def rows_of(folder: Path) -> list[manifest.Row]:
    return list(manifest.rows(folder / manifest.NAME))


def rewrite(folder: Path, change: Callable[[manifest.Row], manifest.Row | None]) -> None:
    rows = [new for row in rows_of(folder) if (new := change(row)) is not None]
    manifest.write(folder / manifest.NAME, rows, About())


def cut(folder: Path) -> None:
    path = folder / "video-00000.tar"
    path.write_bytes(path.read_bytes()[: rows_of(folder)[-1].offset + 2000])


def flip(folder: Path) -> None:
    row = next(row for row in rows_of(folder) if row.key == "b-0000")
    with (folder / row.shard).open("r+b") as file:
        file.seek(row.offset + row.length - 40)
        file.write(b"\x00" * 20)


def replace_sample(folder: Path, caption: object, mp4: bytes | None = None) -> None:
    """Another shard in the place of the first, whose manifest is right but for what is wrong with the sample."""
    (folder / "video-00000.tar").unlink()
    (folder / manifest.NAME).unlink()
    clip = encode_mp4(list(frames("testsrc2", 1, 8, (32, 48))), 8)
    about = caption if isinstance(caption, bytes) else json.dumps({"caption": caption}).encode()
    write_shards([{"__key__": "x", "mp4": clip if mp4 is None else mp4, "json": about}], str(folder / "video-%05d.tar"))


FAULTS: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "cut": (cut, "video-00000.tar:c-0000: cut off", True),
    "empty": (lambda f: (f / "image-00000.tar").write_bytes(b""), "image-00000.tar: empty shard: zero bytes", True),
    "gone": (lambda f: (f / "image-00000.tar").unlink(), "image-00000.tar: missing shard: the manifest has 2", True),
    "too few": (lambda f: rewrite(f, lambda r: r if r.key != "q" else None), "q: not in the manifest", True),
    "too many": (lambda f: rewrite(f, lambda r: r._replace(key="z") if r.key == "q" else r), "z: missing sample", True),
    "moved": (lambda f: rewrite(f, lambda r: r._replace(offset=512)), "manifest is wrong: it says", True),
    "no manifest": (lambda f: (f / manifest.NAME).write_bytes(b"PAR1"), "manifest.parquet: unreadable manifest", True),
    "flipped": (flip, "video-00000.tar:b-0000: damaged sample: its media are not those", False),
    "captions": (lambda f: rewrite(f, lambda r: r._replace(captions=2)), "manifest is wrong: of the captions", False),
    "caption": (lambda f: replace_sample(f, " "), "video-00000.tar:x: no caption", False),
    "latin": (lambda f: replace_sample(f, b'{"caption": "caf\xe9"}'), "x: caption is not UTF-8", False),
    "broken": (lambda f: replace_sample(f, "a", b"\x00" * 99), "x: broken video", False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named(copy: Path, fault: str) -> None:
    spoil, message, quick = FAULTS[fault]
    spoil(copy)
    assert any(message in line for line in faults(copy)), faults(copy)
    assert any(message in line for line in faults(copy, "quick")) == quick


def test_what_a_part_left_out_is_no_fault(copy: Path) -> None:
    out = next(row for row in rows_of(copy) if row.key == "q")
    rewrite(copy, lambda row: row if row.key != "q" else None)
    ledger = json.loads((copy / "ledger.json").read_text())
    (copy / "ledger.json").write_text(json.dumps({**ledger, "not_in_manifest": [f"{out.shard}:q"]}))
    assert not faults(copy)


def test_the_same_key_twice(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.txt", "b.txt", "a.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    rows = [manifest.Row(key, "a.tar", offset, 513, "image") for key, offset in (("a", 0), ("b", 1024))]
    manifest.write(tmp_path / manifest.NAME, rows, About())
    assert any("a.tar:a: same key twice" in line for line in faults(tmp_path, "quick"))


def test_a_manifest_that_lies_about_the_length(copy: Path) -> None:
    rewrite(copy, lambda row: row._replace(frames=99) if row.key == "b-0000" else row)
    assert not faults(copy) and "it says 99 frames, there are 8" in faults(copy, "decode")[0]
    with pytest.raises(RecipeError, match="nowhere' holds no tar file"):
        check_folders([copy / "nowhere"], "full")


# stages


RECIPE = """
model: {{dim: 16, depth: 1, mixer: attention, patch: [1, 2, 2]}}
data:
  shards: {{image: "{folder}/image-*.tar", video: "{folder}/video-*.tar"}}
  mix: {{image: 1, video: 2}}
  batch: {{image: 1, video: 2}}
  size: [32, 32]
  fps: 8
  frames: 8
train: {{steps: 12}}
stages:
  short: {{data: {{frames: 8}}}}
  long: {{data: {{frames: 16, batch: {{video: 1}}}}}}
"""


@pytest.fixture
def recipe(packed: Path, tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text(RECIPE.format(folder=packed))
    return tmp_path / "r.yaml"


def test_stages_are_worked_out(recipe: Path) -> None:
    found = forecast(load_stages(recipe))
    assert not found.problems
    shown = [(b.stage, b.kind, b.shape, b.samples, b.step, b.steps) for b in found.buckets]
    assert shown == [
        ("short", "image", "1x32x32", 2, 1, 2.0), ("short", "video", "8x32x32", 4, 2, 2.0),
        ("long", "image", "1x32x32", 2, 1, 2.0), ("long", "video", "16x32x32", 2, 1, 2.0),
    ]  # fmt: skip
    assert found.epochs == {"short": {"image": 2.0, "video": 4.0}, "long": {"image": 2.0, "video": 4.0}}
    assert list(found.left_out.values()) == [2] and "long: video: short clip" in next(iter(found.left_out))


def test_epochs_are_counted_by_samples_where_the_mix_is(recipe: Path) -> None:
    found = forecast(load_stages(recipe, ["data.mix_by=samples", "data.batch.image=2"]))
    assert found.epochs["short"] == {"image": 12 / 3 * 2 / 2, "video": 12 * 2 / 3 * 2 / 4}  # 1:2 by steps, too
    assert found.epochs["long"] == {"image": 3 * 2 / 2, "video": 9 * 1 / 2}  # one step of 2 images for four of a clip


@pytest.mark.parametrize(("overrides", "ranks", "message"), [
    (["data.batch.video=5"], 1, "stage short would starve: 4 videos of 8x32x32 are fewer than the 5 of one step (5 a "
     "batch, 1 ranks, 1 batches accumulated); set data.batch.video=4, or pack more videos."),
    ([], 8, "stage long would starve: 2 videos of 16x32x32 are fewer than the 8 of one step (1 a batch, 8 ranks, 1 "
     "batches accumulated); train on at most 2 ranks, or pack more videos."),
    (["data.sizes=[[32,48]]", "data.batch={image: 2, video: 3}"], 2, "take 8x32x32 out of data.sizes and data.lengths, "
     "or pack more videos of that shape"),
    (["data.frames=99", "stages.long.data.frames=99"], 1, "stage long: data.shards.video: none of 4 samples fits"),
    (["data.shards.video=nowhere/*.tar"], 1, "no file matches"),
])  # fmt: skip
def test_a_stage_that_would_starve_is_refused_with_the_cure(
    recipe: Path, overrides: list[str], ranks: int, message: str
) -> None:
    problems = forecast(load_stages(recipe, overrides), ranks).problems
    assert any(message in problem for problem in problems), problems


def test_ranks_of_a_recipe(recipe: Path) -> None:
    def ranks(*overrides: str) -> int:
        return ranks_of(load_stages(recipe, overrides)[0])

    assert ranks() == 1 and ranks("trainer.devices=4", "trainer.num_nodes=2") == 8
    assert ranks("trainer.devices=[0,2]") == 2 and ranks("trainer.devices=auto") == 1


def test_the_check_command(recipe: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "check", "--recipe", str(recipe), "--processes", "0"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "16x32x32" in shown and "6 samples: bytes checked, nothing wrong" in shown and "left out: 2 x long" in shown
    assert main([*words, "data.batch.video=5"]) == 1 and "set data.batch.video=4" in capsys.readouterr().err
    assert main([*words, "--ranks", "8"]) == 1
    assert "would starve" in capsys.readouterr().err
    flip(copy)
    assert main(["data", "check", str(copy), "--processes", "0", "--quick"]) == 0
    assert main(["data", "check", str(copy), "--processes", "0", "--json"]) == 1
    assert json.loads(capsys.readouterr().out.partition("wrong\n")[2])["faults"][0][0] == "video-00000.tar:b-0000"
    assert main(["data", "check"]) == 2


# numbers and pictures


def test_stats(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", str(packed), "--out", str(tmp_path), "--clips", "3"]) == 0
    shown = capsys.readouterr().out
    assert "video" in shown and "films" in shown and str(tmp_path / "samples.jpg") in shown
    found = {row["kind"]: row for row in measure_folders([packed]).rows}
    assert found["video"]["samples"] == "4" and found["image"]["captions"] == "2"
    assert measure_folders([packed]).sources == {"films": 4, "pictures": 2}
    sheet = Image.open(tmp_path / "samples.jpg")
    assert sheet.width > 700 and sheet.height == 4 * (96 + 16)  # three clips and a row of pictures
    pixels = np.asarray(sheet).std(axis=(1, 2))
    assert (pixels > 20).mean() > 0.7


def test_a_sample_that_cannot_be_shown_is_told_not_left_out(copy: Path, tmp_path: Path) -> None:
    row = next(row for row in rows_of(copy) if row.key == "b-0000")
    with (copy / row.shard).open("r+b") as file:
        file.seek(row.offset + 1500)
        file.write(b"\x5a" * (row.length - 2000))
    sheet = sample_sheet([copy], tmp_path / "s.jpg")
    assert sheet is not None and Image.open(sheet).height == 5 * (96 + 16)


def test_stats_need_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no manifest.parquet; write it with `lingen data index"):
        measure_folders([tmp_path])
    manifest.write(tmp_path / manifest.NAME, [], About())
    with pytest.raises(RecipeError, match="have no row"):
        measure_folders([tmp_path])


def test_the_hash_vouches_for_the_media(packed: Path) -> None:
    assert all(len(row.hash) == len(media_hash(b"")) for row in rows_of(packed))
    assert Part(1, 2).slice_of(5) == slice(0, 2) and Part(2, 2).slice_of(5) == slice(2, 5)


def test_a_damaged_kind_is_counted_too(tmp_path: Path):
    row = manifest.Row("a", "a.tar", 0, 1024, "image\0", 8, 8)
    manifest.write(tmp_path / manifest.NAME, [row], About())
    assert [one["samples"] for one in measure_folders([tmp_path]).rows] == ["1"]
