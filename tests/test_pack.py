"""`lingen data pack`: shards and manifest of many files, in parts, in processes, and killed at any moment."""

from __future__ import annotations

import fcntl
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from lingen.cli import main, progress
from lingen.cli.encode import FROM_RECIPE
from lingen.data import manifest
from lingen.data.manifest import About, Row, media_hash
from lingen.prepare.captions import Captions
from lingen.prepare.cut import ClipRequirements, CutJob, make_samples
from lingen.prepare.filters import Filters
from lingen.prepare.journal import JournalEntry, Note, Part, SetFolder, ShardStream, parse_part
from lingen.prepare.pack import Packing, filters_for, look_for_footage, pack, wanted_by
from lingen.prepare.report import LEDGER, close_set
from lingen.prepare.workers import in_order
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import DataConfig, PerKind, Recipe
from tests.helpers.commands import ROOT
from tests.helpers.files import contents, killed_before
from tests.helpers.footage import explode, film, frames, write_film

WANTED = ClipRequirements((((48, 64),),), 12.0, (24, 12))
SCENES = ("testsrc2", "mandelbrot", "testsrc", "rgbtestsrc", "life=seed=1", "gradients=seed=3:speed=0.1")


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six films, one of them twice and one broken; two pictures, one of them twice; a table of captions."""
    folder = tmp_path_factory.mktemp("footage")
    films = folder / "films"
    film(films / "a.mp4", ("testsrc2", 2.5), ("mandelbrot", 1.2))
    film(films / "b/b.mpg", ("testsrc", 2), codec="mpeg2video")
    film(films / "c.avi", ("mandelbrot=start_scale=0.1", 1.5), codec="mpeg4")
    film(films / "d.mp4", ("testsrc2", 2.5), codec="libx264")
    film(films / "e.mp4", ("life=seed=1:mold=10", 1.2))
    film(films / "uncaptioned.mp4", ("testsrc", 1))
    (films / "f.mp4").write_bytes(b"broken")
    pictures = folder / "pictures"
    pictures.mkdir()
    for name, source in (("p.png", "testsrc2"), ("q.jpg", "mandelbrot"), ("r.webp", "testsrc2")):
        Image.fromarray(next(frames(source, 1))).save(pictures / name)
    keys = ("b/b", "c", "d", "e", "f", "p", "q", "r", "nowhere")
    rows = [f"{key},about {key}" for key in keys] + ["a,first of a", "a,second of a"]
    (folder / "captions.csv").write_text("\n".join(["key,caption", *rows]) + "\n")
    return folder


def packing(footage: Path, **how: object) -> Packing:
    sources = look_for_footage([footage / "films"], [footage / "pictures"], WANTED).sources
    filters = Filters(jerky=None, still=None, frozen=None)
    return Packing(sources, Captions(footage / "captions.csv"), WANTED, filters)._replace(**how)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def packed(footage: Path) -> Path:
    pack(packing(footage, shard_mb=0), footage / "packed")
    return footage / "packed"


def test_manifest_shards_and_webdataset_agree(packed: Path) -> None:
    rows = list(manifest.rows(packed / manifest.NAME))
    assert [row.key for row in rows] == ["p", "q", "a-0000", "a-0001", "b/b-0000", "c-0000", "e-0000"]
    read = {}
    for sample in webdataset.WebDataset([str(path) for path in sorted(packed.glob("*.tar"))], shardshuffle=False):
        read[sample["__key__"]] = sample
    assert read.keys() == {row.key for row in rows}
    for row in rows:
        sample = read[row.key]
        about = json.loads(sample["json"])
        captions = about.get("captions") or [about["caption"]]
        assert captions == (["first of a", "second of a"] if row.key[0] == "a" else [f"about {row.key.split('-')[0]}"])
        assert (row.captions, row.caption_length) == (len(captions), len(captions[0]))
        assert row.hash == media_hash(sample[row.media])
        assert row.source == ("pictures" if row.kind == "image" else "films")
        piece = (packed / row.shard).read_bytes()[row.offset : row.offset + row.length]
        assert sample[row.media] in piece and piece.startswith(row.key.encode())


def test_the_ledger_names_everything_that_was_left_out(packed: Path) -> None:
    ledger = json.loads((packed / "ledger.json").read_text())
    assert ledger["looked_at"] == 10 and ledger["made"] == {"image": 2, "video": 5}
    assert ledger["left_out"] == {
        "near-duplicate": 2,
        "unreadable": 1,
        "no caption": 1,
        "caption without a file": 1,
    }
    named = [line for lines in ledger["named"].values() for line in lines]
    assert "d-0000: near-duplicate: of a-0000" in named and "r: near-duplicate: of p" in named
    cure = "write uncaptioned.txt beside it, name a table (--captions), or --keep-uncaptioned"
    assert f"uncaptioned: no caption: {cure}" in named
    assert "nowhere: caption without a file: a row of the table" in named
    assert ledger["seconds"] == pytest.approx(sum((30, 14, 24, 18, 14)) / 12, abs=1e-3)


def test_processes_and_restarts_change_no_byte(footage: Path, packed: Path, tmp_path: Path) -> None:
    report = pack(packing(footage, shard_mb=0, processes=2), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(packed)
    before = contents(tmp_path / "out")
    again = pack(packing(footage, shard_mb=0), tmp_path / "out")
    assert contents(tmp_path / "out") == before and again.as_json() == report.as_json()


def test_one_shard_or_one_for_each_sample(footage: Path, packed: Path, tmp_path: Path) -> None:
    pack(packing(footage), tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("*.tar"))] == ["image-00000.tar", "video-00000.tar"]
    assert [path.name for path in sorted(packed.glob("video-*.tar"))] == [f"video-{i:05d}.tar" for i in range(5)]


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
if __name__ == "__main__":
    import {module} as test_pack

    footage = Path({footage!r})
    job = test_pack.packing(footage, shard_mb=0, processes=2)
    test_pack.pack(job, Path({out!r}), lambda done, total: print(done, flush=True))
"""


@pytest.mark.slow
def test_a_killed_run_loses_and_doubles_nothing(footage: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(root=str(ROOT), module=__name__, footage=str(footage), out=str(out)))
    killed = 0
    for after in (2, 6, 100):  # lines it says before it is killed
        process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for number, _ in enumerate(process.stdout, 1):
            if number == after:
                time.sleep(0.01 * after)
                process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed == 2 and process.returncode == 0
    assert contents(out) == contents(packed)


def test_a_kill_between_a_record_and_its_shard(footage: Path, packed: Path, tmp_path: Path) -> None:
    with killed_before("video-00002.tar"):
        pack(packing(footage, shard_mb=0), tmp_path)
    assert (tmp_path / ".parts/001-of-001/records/video-00002.json").is_file()
    pack(packing(footage, shard_mb=0), tmp_path)
    assert contents(tmp_path) == contents(packed)
    (tmp_path / "video-00001.tar").unlink()
    with pytest.raises(RecipeError, match="video-00001.tar' is gone, though later shards are there. Put it back"):
        pack(packing(footage, shard_mb=0), tmp_path)


def test_footage_that_is_added_later_comes_behind(footage: Path, tmp_path: Path) -> None:
    films = tmp_path / "films"
    film(films / "b.mp4", ("testsrc2", 1))
    captions = tmp_path / "captions.json"
    captions.write_text('{"a": "first", "b": "second", "c": "third"}')

    def rows() -> list[str]:
        job = Packing(look_for_footage([films], [], WANTED).sources, Captions(captions), WANTED, Filters())
        pack(job, tmp_path / "out")
        return [row.key for row in manifest.rows(tmp_path / "out" / manifest.NAME)]

    assert rows() == ["b-0000"]
    film(films / "a.mp4", ("mandelbrot", 1))
    film(films / "c.mp4", ("testsrc2", 1))  # as b
    assert rows() == ["b-0000", "a-0000"]
    assert json.loads((tmp_path / "out" / "ledger.json").read_text())["left_out"] == {"near-duplicate": 1}


def test_what_was_left_out_is_looked_at_again_when_its_captions_or_content_change(tmp_path: Path) -> None:
    films, out = tmp_path / "films", tmp_path / "out"
    for name, source in (("a", "testsrc2"), ("b", "mandelbrot")):
        film(films / f"{name}.mp4", (source, 1))
    (films / "a.txt").write_text("first")
    (films / "c.mp4").write_bytes(b"broken")
    (films / "c.txt").write_text("third")

    def captions() -> dict[str, str]:
        job = Packing(look_for_footage([films], [], WANTED).sources, Captions(), WANTED, Filters(still=None))
        report = pack(job, out)
        assert json.loads((out / LEDGER).read_text()) == {**report.as_json(), "not_in_manifest": []}
        shards = [str(path) for path in sorted(out.glob("*.tar"))]
        samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
        assert [row.key for row in manifest.rows(out / manifest.NAME)] == [sample["__key__"] for sample in samples]
        assert report.looked_at == 3 and report.made["video"] == len(samples)
        left.append(dict(report.left_out))
        return {sample["__key__"]: json.loads(sample["json"])["caption"] for sample in samples}

    left: list[dict[str, int]] = []
    assert captions() == {"a-0000": "first"}
    (films / "b.txt").write_text("second")
    film(films / "c.mp4", ("testsrc", 1))
    with killed_before("video-00001.tar"):  # what it was about to write is made again
        captions()
    assert captions() == {"a-0000": "first", "b-0000": "second", "c-0000": "third"}
    assert captions().keys() == {"a-0000", "b-0000", "c-0000"}
    assert left == [{"no caption": 1, "unreadable": 1}, {}, {}]
    before = contents(out)
    (films / "a.txt").write_text("other")
    told = f"'a' has other captions than when it went into '{out}': its samples there are old. Name a new folder"
    with pytest.raises(RecipeError, match=re.escape(told) + ".*bring the old captions back"):
        captions()
    (films / "a.txt").write_text("first\n")  # the same caption
    (films / "c.mp4").write_bytes((films / "b.mp4").read_bytes())
    with pytest.raises(RecipeError, match="'c' has changed since it went into .* bring the old file back"):
        captions()
    assert contents(out) == before


def test_a_caption_that_changes_while_a_killed_run_waits_is_noticed(tmp_path: Path) -> None:
    films, out = tmp_path / "films", tmp_path / "out"
    film(films / "a.mp4", ("testsrc2", 1), ("mandelbrot", 1))
    (films / "a.txt").write_text("first")
    job = Packing(look_for_footage([films], [], WANTED).sources, Captions(), WANTED, Filters(still=None), shard_mb=0)
    with killed_before("video-00001.tar"):  # the film's second clip
        pack(job, out)
    (films / "a.txt").write_text("other")
    with pytest.raises(RecipeError, match="'a' has other captions than when it went into"):
        pack(job, out)
    (films / "a.txt").write_text("first")
    assert pack(job, out).made == {"video": 2}


def test_a_set_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    films, out = tmp_path / "films", tmp_path / "out"
    film(films / "a.mp4", ("testsrc2", 1))
    (films / "a.txt").write_text("first")
    job = Packing(look_for_footage([films], [], WANTED).sources, Captions(), WANTED, Filters(still=None))
    pack(job, out)
    (path,) = (out / ".parts").rglob("video-00000.json")
    record = json.loads(path.read_text())
    record["entries"] = [entry[:2] for entry in record["entries"]]
    record["notes"] = [[*note[:2], note[2].partition(".")[0]] for note in record["notes"]]
    path.write_text(json.dumps(record))
    before = contents(out)
    assert pack(job, out).made == {"video": 1} and contents(out) == before
    film(films / "a.mp4", ("mandelbrot", 1))
    with pytest.raises(RecipeError, match="'a' has changed since"):
        pack(job, out)


def test_parts_make_the_same_set(footage: Path, packed: Path, tmp_path: Path) -> None:
    for number in (3, 1, 2):
        assert not (tmp_path / manifest.NAME).exists()
        pack(packing(footage, part=Part(number, 3)), tmp_path)
    whole, parts = (list(manifest.rows(folder / manifest.NAME)) for folder in (packed, tmp_path))
    # Of two that look alike, the one in the earlier part is kept.
    alike = {"a-0000": "a or d", "d-0000": "a or d", "p": "p or r", "r": "p or r"}
    assert sorted(alike.get(row.key, row.key) for row in parts) == sorted(alike.get(row.key, row.key) for row in whole)
    assert all(row.shard.startswith((f"{row.kind}-001-", f"{row.kind}-002-", f"{row.kind}-003-")) for row in parts)
    left = json.loads((tmp_path / "ledger.json").read_text())
    assert left["left_out"]["near-duplicate"] == 2
    held = {
        f"{path.name}:{sample['__key__']}"
        for path in tmp_path.glob("*.tar")
        for sample in webdataset.WebDataset([str(path)], shardshuffle=False)
    }
    assert held - {f"{row.shard}:{row.key}" for row in parts} == set(left["not_in_manifest"])


@given(st.text(), st.integers(1, 70))
def test_every_file_is_in_one_part(name: str, count: int) -> None:
    assert sum(Part(number, count).holds(name) for number in range(1, count + 1)) == 1


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "-1/3", "3/"])
def test_parts_are_counted_from_one(text: str) -> None:
    assert parse_part("3/64") == Part(3, 64) and parse_part(None) == Part(1, 1)
    with pytest.raises(RecipeError, match="counted from 1"):
        parse_part(text)


def test_a_folder_begun_in_another_way_is_refused(footage: Path, packed: Path, tmp_path: Path) -> None:
    other = packing(footage, shard_mb=0, filters=replace(packing(footage).filters, min_side=20))
    with pytest.raises(RecipeError, match=r"begun in another way: filters.min_side is null there and 20 here\. Go on"):
        pack(other, packed)
    with pytest.raises(RecipeError, match="parts is 1 there and 2 here"):
        pack(packing(footage, part=Part(1, 2)), packed)
    (tmp_path / "something").touch()
    with pytest.raises(RecipeError, match="exists and was not begun by this command"):
        pack(packing(footage), tmp_path)


def test_two_processes_do_not_work_at_one_part(tmp_path: Path) -> None:
    with SetFolder(tmp_path, Part(), {}).locked():
        with pytest.raises(RecipeError, match="Another process is at part 001-of-001"):
            with SetFolder(tmp_path, Part(), {}).locked():
                pass


# the parts it is made of


@pytest.mark.slow
def test_a_crash_costs_one_item() -> None:
    found = list(in_order(explode, range(8), 2, crashed=lambda number: -number))
    assert found == [(number, number * number if number != 3 else -3) for number in range(8)]


def test_a_stream_goes_on_behind_what_is_there(tmp_path: Path) -> None:
    def stream() -> ShardStream:
        return ShardStream(SetFolder(tmp_path, Part(), {}), "video", 2000)

    def add(one: ShardStream, keys: Iterable[str]) -> None:
        for key in keys:
            one.write({"__key__": key, "txt": key.encode() * 100}, JournalEntry(Row(key, "", 0, 0, "video"), (), key))
            one.note([Note(key)])

    first = stream()
    add(first, "abc")
    second = stream()  # the first is killed here
    assert (
        second.has("a", "") and not second.has("b", "") and [entry.row.key for entry in second.entries()] == ["a", "b"]
    )
    add(second, "c")
    second.commit()
    rows = [entry.row for entry in stream().entries()]
    assert [(row.key, row.shard, row.offset, row.length) for row in rows] == [
        ("a", "video-00000.tar", 0, 612),
        ("b", "video-00000.tar", 1024, 612),
        ("c", "video-00001.tar", 0, 612),
    ]


def test_a_set_is_closed_under_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one that read the records before another job's last shard could write its manifest after that job's."""
    folder, records_of = SetFolder(tmp_path / "set", Part(), {}), SetFolder.records_of
    held: list[Any] = []

    def looked(self: SetFolder, *args: Any) -> Any:
        with (self.parts / "lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(args)
        return records_of(self, *args)

    monkeypatch.setattr(SetFolder, "records_of", looked)
    close_set(folder, About(), complete=True)
    assert len(held) == 2


def test_stages_of_pictures_alone_ask_for_no_frame_rate() -> None:
    pictures = Recipe(data=DataConfig(fps=16, mix=PerKind(image=1, video=0)))
    films = Recipe(data=DataConfig(fps=4, frames=8, mix=PerKind(image=0, video=1)))
    wanted = wanted_by([pictures, films])
    assert (wanted.fps, wanted.lengths) == (4, (8,)) and filters_for(wanted, {}).min_fps == 3.96
    assert wanted_by([pictures]).fps == 16


def test_what_a_recipe_wants() -> None:
    def stage(frames: int, size: tuple[int, int], fps: float = 16, video: int = 1) -> Recipe:
        return Recipe(data=DataConfig(frames=frames, size=size, fps=fps, mix=PerKind(image=1, video=video)))

    stages = [stage(1, (256, 256), video=0), stage(272, (256, 256)), stage(544, (512, 512)), stage(17, (64, 64), 8)]
    wanted = wanted_by(stages)
    assert wanted == ClipRequirements((((256, 256),), ((512, 512),), ((64, 64),)), 16, (544, 272, 34))
    assert filters_for(wanted, {}).min_side == 512 and filters_for(wanted, {}).min_fps == 15.84
    assert filters_for(wanted, {"min_side": None, "still": 0.1}) == Filters(min_fps=15.84, still=0.1)
    senseless = {"black": (1.5, "from 0 to 1"), "jerky": (-1, "at least 0"), "duplicates": (12, "from 0 to 11")}
    for name, (value, message) in senseless.items():
        with pytest.raises(RecipeError, match=message):
            filters_for(wanted, {name: value})
    assert FROM_RECIPE.keys() <= {field.name for field in fields(Filters)}
    with pytest.raises(RecipeError, match="No stage of the recipe trains on videos"):
        look_for_footage(["."], [], wanted_by(stages[:1]))
    with pytest.raises(RecipeError, match="Say where the footage is"):
        look_for_footage([], [], wanted)


def test_work_of_an_earlier_run_is_taken_over(footage: Path, tmp_path: Path) -> None:
    source = look_for_footage([footage / "films"], [], WANTED).sources[0]
    job = CutJob(source, ["a"], "", WANTED, Filters(), tmp_path / "work.tar")
    outcome = make_samples(job)
    assert make_samples(job._replace(source=source._replace(path=Path("gone")))) == outcome


def test_uncaptioned_footage_is_kept_on_demand(footage: Path, tmp_path: Path) -> None:
    write_film(tmp_path / "films" / "a.mp4", frames("testsrc2", 1))
    (tmp_path / "films" / "b.txt").write_text(" ")
    write_film(tmp_path / "films" / "b.mp4", frames("mandelbrot", 1))
    job = Packing(
        look_for_footage([tmp_path / "films"], [], WANTED).sources, Captions(), WANTED, Filters(), keep_uncaptioned=True
    )
    report = pack(job, tmp_path / "out")
    assert report.made == {"video": 1} and report.left_out == {"no caption": 1}
    (row,) = manifest.rows(tmp_path / "out" / manifest.NAME)
    assert row.key == "a-0000" and row.captions == row.caption_length == 0


RECIPE = """
model: {dim: 16, depth: 1, mixer: attention, patch: [2, 8, 8]}
data: {mix: {image: 1, video: 2}, size: [48, 64], fps: 12, frames: 24, shards: {image: i.tar, video: v.tar}}
"""


def test_the_command(footage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    films, pictures, out = (str(path) for path in (footage / "films", footage / "pictures", tmp_path / "out"))
    words = ["data", "pack", "--recipe", str(tmp_path / "r.yaml"), "--captions", str(footage / "captions.csv")]
    words += ["--videos", films, "--images", pictures, "--out", out, "--processes", "0", "--jerky", "off"]
    assert main([*words, "--frozen", "off", "--min-seconds", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "left out: no caption" in shown and "write uncaptioned.txt beside it" in " ".join(shown.split())
    assert re.search(r"out: [1-9] samples from 10 files, ", shown)
    assert main([*words, "--still", "much"]) == 2
    assert "--still: invalid number value: 'much'. Write --still N|off." in capsys.readouterr().err
    assert main(["data", "pack", "--out", out]) == 2


def test_a_picture_is_no_film_and_nothing_at_all_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "films").mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "films" / "still.webp")
    (tmp_path / "films" / "still.txt").write_text("a still")
    words = ["data", "pack", "--recipe", str(tmp_path / "r.yaml"), "--videos", str(tmp_path / "films")]
    assert main([*words, "--out", str(tmp_path / "out"), "--processes", "0", "--min-side", "off"]) == 1
    told = capsys.readouterr()
    assert "short shot: 1 frames" in told.out and "No sample was made" in told.err
    assert not (tmp_path / "out" / manifest.NAME).exists()  # a set of nothing is none
    assert json.loads((tmp_path / "out" / LEDGER).read_text())["left_out"] == {"short shot": 1}
    for next_step in (["data", "stats"], ["data", "check"], ["data", "index"]):
        assert main([*next_step, str(tmp_path / "out")]) == 2
    words_of_both = capsys.readouterr().err
    assert "holds no sample: nothing was packed there, or all was left out; its ledger.json says why" in words_of_both
    assert words_of_both.count("its ledger.json says why") == 3 and "data index" not in words_of_both
    write_film(tmp_path / "films" / "a.mp4", frames("testsrc2", 2))
    (tmp_path / "films" / "a.txt").write_text("a test picture")
    assert main([*words, "--out", str(tmp_path / "out"), "--processes", "0", "--min-side", "off"]) == 0
    assert [row.key for row in manifest.rows(tmp_path / "out" / manifest.NAME)] == ["a-0000"]


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 10.0, 31.0, 31.0, 40.0, 70.0, 70.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    console = Console(file=io.StringIO(), force_terminal=False)
    with progress.count_progress(console, "packing") as tell:
        for done in (1, 2, 3, 1234):
            tell(done, 5000)
    assert console.file.getvalue().splitlines() == ["packing 2/5,000", "packing 1,234/5,000"]  # type: ignore[attr-defined]
