"""Manifests, the index mapped into memory, and buckets that are decided from it."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingen.cli import main
from lingen.data import buckets, indexing, manifest
from lingen.data.buckets import Shape
from lingen.data.datamodule import ClipData
from lingen.data.index import FORGET, RECORD, Index
from lingen.data.indexing import open_index, scan_shards
from lingen.data.ledger import DataError, Ledger
from lingen.data.locations import Location, expand
from lingen.data.manifest import About, ManifestError, Row
from lingen.data.shards import write_shards
from lingen.data.sources import Reader
from lingen.media import encode_mp4, encode_picture
from lingen.prepare.index import index_folder
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import DataConfig, PerKind, Recipe, Remote, Shards

pytestmark = pytest.mark.usefixtures("cache")

READER = Reader(Remote())


@lru_cache
def mp4(frames: int, height: int, width: int, fps: int = 8) -> bytes:
    return encode_mp4(np.full((frames, height, width, 3), 99, np.uint8), fps)


def row(number: int = 0, **changes: Any) -> Row:
    return Row(f"k{number}", "a.tar", 512 * number, 500, "video", 16, 16, 8, 8.0, 1, 9, "mp4", "", "web")._replace(
        **changes
    )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of four shapes and two that are too short, and pictures of two, in shards with a manifest."""
    folder = tmp_path_factory.mktemp("mixed")
    shapes = [(4, 16, 16), (9, 16, 16), (4, 16, 32), (9, 16, 32), (2, 16, 16)]
    clips = [{"__key__": f"v{i:02d}", "mp4": mp4(*shapes[i % 5]), "txt": f"clip {i}"} for i in range(30)]
    sizes = [(16, 16), (16, 30)]
    pictures = [
        {"__key__": f"i{i}", "png": encode_picture(np.zeros((*sizes[i % 2], 3), np.uint8)), "txt": "a"}
        for i in range(8)
    ]
    write_shards(clips, str(folder / "video-%d.tar"), per_shard=8)
    write_shards(pictures, str(folder / "image-%d.tar"), per_shard=5)
    assert index_folder(folder, 0)[0] == 38
    return folder


def data_of(shards: Shards, *, stage: str = "main", **changes: Any) -> ClipData:
    data = DataConfig(
        **{"shards": shards, "mix": PerKind(image=0, video=1), "batch": PerKind(image=4, video=4), "frames": 4,
           "size": (16, 16), "fps": 8.0, "workers": 0} | changes
    )  # fmt: skip
    return ClipData(Recipe(data=data, stage=stage))


WIDE = {"sizes": [(16, 32)], "lengths": [8]}


# manifests


def test_a_manifest_keeps_its_rows(tmp_path: Path) -> None:
    path, rows = tmp_path / "m.parquet", [row(i, fps=23.976 if i % 2 else 24.0, key=f"ü{i}") for i in range(9)]
    assert manifest.write(path, iter(rows), About("abc", {"crf": 12})) == 9
    assert manifest.about(path) == About("abc", {"crf": 12}, manifest.VERSION)
    assert [one._replace(fps=round(one.fps, 3)) for one in manifest.rows(path)] == rows


def test_a_manifest_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def failing() -> Iterator[Row]:
        yield from (row(i) for i in range(manifest.GROUP + 1))
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        manifest.write(tmp_path / "m.parquet", failing(), About())
    assert not list(tmp_path.iterdir())


def test_what_is_no_manifest(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    path.write_bytes(b"PAR1 it is not")
    with pytest.raises(ManifestError, match="is no manifest: .*Write it anew with `lingen data index .+`"):
        manifest.about(path)
    pa.parquet.write_table(pa.table({"key": ["a"]}), path)
    with pytest.raises(ManifestError, match="is no manifest of lingen's .shard, offset"):
        list(manifest.rows(path))
    manifest.write(path, [row()], About(version=9))
    with pytest.raises(ManifestError, match="of version 9, this lingen reads up to 1"):
        manifest.about(path)


# the index


def opened(pattern: str, kind: str = "video") -> Index:
    return open_index(expand(pattern, "data.shards.x"), kind, "data.shards.x", READER)


def test_the_index_of_a_manifest_is_that_of_the_tar_files(mixed: Path) -> None:
    found = opened(str(mixed / "video-*.tar"))
    scanned = scan_shards(Location.of(str(path)) for path in sorted(mixed.glob("video-*.tar")))
    assert len(found) == 30 and not found.faults and found.mark and not scanned.mark
    for name in ("offset", "length", "shard"):
        assert found.records.array[name].tolist() == scanned.records[name].tolist()
    assert [found.where(i) for i in range(30)] == [scanned.where(i) for i in range(30)]
    record = found.records[1]
    assert (record["frames"], record["fps"], record["height"], record["width"]) == (9, 8.0, 16, 16)
    assert f"{record['hash']:016x}" == manifest.media_hash(mp4(9, 16, 16)) and found.source(1) == mixed.name


def test_a_manifest_named_as_a_whole_gives_its_samples_of_a_kind(mixed: Path) -> None:
    for pattern in (str(mixed), str(mixed / "manifest.parquet")):
        assert len(opened(pattern)) == 30 and len(opened(pattern, "image")) == 8
    assert [len(opened(str(mixed / f"video-{i}.tar"))) for i in range(4)] == [8, 8, 8, 6]
    with pytest.raises(RecipeError, match="image-0.tar holds something else than videos .*i0 is image of 1 frames"):
        opened(str(mixed / "*.tar"))


def test_a_shard_that_its_manifest_does_not_know(mixed: Path) -> None:
    extra = mixed / "video-9.tar"
    extra.write_bytes((mixed / "video-0.tar").read_bytes())
    try:
        with pytest.raises(RecipeError, match="manifest.parquet knows nothing of video-9.tar; write it anew with"):
            opened(str(mixed / "video-*.tar"))
    finally:
        extra.unlink()


def test_shards_with_and_without_a_manifest(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.tar").write_bytes((mixed / "video-0.tar").read_bytes())
    with pytest.raises(RecipeError, match="bare.tar needs a manifest, as other shards here have one"):
        open_index([str(mixed / "video-0.tar"), str(tmp_path / "bare.tar")], "video", "x", READER)


def test_a_changed_manifest_makes_another_index_and_unused_ones_go(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "set" / manifest.NAME
    path.parent.mkdir()
    manifest.write(path, [row(i) for i in range(3)], About())
    first = opened(str(path))
    assert opened(str(path)).mark == first.mark and len(list((cache / "indexes").iterdir())) == 1
    old = time.time() - 40 * 86400
    os.utime(cache / "indexes" / first.mark, (old, old))
    manifest.write(path, [row(i) for i in range(4)], About())
    second = opened(str(path))
    assert len(second) == 4 and second.mark != first.mark
    assert [folder.name for folder in (cache / "indexes").iterdir()] == [second.mark]


def test_a_shared_cache_is_read_whatever_others_do_in_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was listed is gone when it is looked at; an index of another user cannot be marked as used."""

    def refused(*args: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    (cache / "indexes").mkdir(parents=True)
    (cache / "indexes" / "gone").symlink_to("nowhere")
    manifest.write(tmp_path / "set" / manifest.NAME, [row(0)], About())
    assert len(opened(str(tmp_path / "set"))) == 1
    monkeypatch.setattr(os, "utime", refused)
    assert len(opened(str(tmp_path / "set"))) == 1


def test_several_sets_make_one_index(mixed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_shards([{"__key__": "x", "mp4": mp4(4, 16, 16), "txt": "a"}], str(other / "video-%d.tar"))
    index_folder(other, 0)
    found = open_index([str(mixed / manifest.NAME), str(other / "video-0.tar")], "video", "x", READER)
    assert len(found) == 31 and found.key(30) == "x" and len(set(found.names)) == 5
    assert found.source(30) == "other" and len(found.abouts) == 2


def test_cut_and_missing_shards_are_found_when_they_are_opened(mixed: Path, tmp_path: Path) -> None:
    for path in [*mixed.glob("video-*.tar"), mixed / manifest.NAME]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / "video-0.tar").read_bytes()
    (tmp_path / "video-0.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "video-1.tar").write_bytes(b"")
    (tmp_path / "video-2.tar").unlink()
    data = data_of(Shards(video=str(tmp_path / manifest.NAME)))
    reasons = {drop.where: drop.reason.partition(":")[0] for drop in data.train.faults}
    assert reasons == {
        "video-0.tar": "truncated shard",
        "video-1.tar": "empty shard",
        "video-2.tar": "unreadable shard",
    }
    ledger = Ledger()
    for batch in islice(data.batches(), 12):
        ledger.record(batch)
    assert ledger.used == 48 and ledger.dropped["cut off"] and ledger.dropped["unreadable shard"]
    assert ledger.shards["video-1.tar"]["truncated"] == ledger.shards["video-1.tar"]["dropped"] > 0
    assert ledger.truncated == ledger.dropped["cut off"]


# a manifest of what is in tar files


def test_index_folder_tells_every_sort_of_sample(tmp_path: Path) -> None:
    still, frames = np.zeros((6, 10, 3), np.uint8), []
    for shade in (0, 120, 240):
        from PIL import Image

        frames.append(Image.new("RGB", (12, 8), (shade,) * 3))
    import io

    animation = io.BytesIO()
    frames[0].save(animation, "webp", save_all=True, append_images=frames[1:], duration=250)
    samples = [
        {"__key__": "clip", "mp4": mp4(5, 16, 24), "json": {"captions": ["one", "another"]}},
        {"__key__": "animation", "webp": animation.getvalue(), "txt": "ab"},
        {"__key__": "photo", "webp": encode_picture(still, "webp"), "txt": "abc"},
        {"__key__": "silent", "mp4": mp4(5, 16, 24)},
        {"__key__": "broken", "mp4": mp4(5, 16, 24)[:300], "txt": "a"},
        {"__key__": "sound", "wav": b"x", "txt": "a"},
    ]
    write_shards(samples, str(tmp_path / "%d.tar"), per_shard=4)
    (tmp_path / "zero.tar").write_bytes(b"")
    _, drops = index_folder(tmp_path, 0)
    assert [tuple(one[4:12]) for one in manifest.rows(tmp_path / manifest.NAME)] == [
        ("video", 16, 24, 5, 8.0, 2, 3, "mp4"),
        ("video", 8, 12, 3, 4.0, 1, 2, "webp"),
        ("image", 6, 10, 1, 0.0, 1, 3, "webp"),
    ]
    assert {drop.where: drop.reason.partition(":")[0] for drop in drops} == {
        "0.tar:silent": "no caption", "1.tar:broken": "broken video", "1.tar:sound": "no media",
        "zero.tar": "empty shard",
    }  # fmt: skip
    with pytest.raises(RecipeError, match="holds no tar file"):
        index_folder(tmp_path / "absent", 0)


def test_a_manifest_is_not_replaced_by_nothing(tmp_path: Path) -> None:
    """Of encoded samples only `lingen encode` knows what they depend on."""
    path, encoded = tmp_path / manifest.NAME, {"__key__": "a", "latents.npy": b"", "txt": "a"}
    write_shards([encoded], str(tmp_path / "video-%d.tar"))
    manifest.write(path, [row(0, shard="video-0.tar", kind="latents")], About("f", {"made_by": "lingen encode"}))
    before = path.read_bytes()
    with pytest.raises(RecipeError, match="no sample that can be used; the first: video-0.tar:a: encoded sample"):
        index_folder(tmp_path, 0)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "video-1.tar").write_bytes((tmp_path / "video-0.tar").read_bytes())
    with pytest.raises(RecipeError, match="knows nothing of video-1.tar; write it anew with the command that made"):
        opened(str(tmp_path / "*.tar"))
    path.write_bytes(b"no manifest")
    (tmp_path / ".parts").mkdir()
    with pytest.raises(RecipeError, match="Write it anew with the command that made the set"):
        opened(str(tmp_path))


def test_the_command_tells_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(
        [{"__key__": "a", "mp4": mp4(5, 16, 24), "txt": "x"}, {"__key__": "b", "mp4": b""}], f"{tmp_path}/%d.tar"
    )
    assert main(["data", "index", str(tmp_path), "--processes", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path}: 1 samples, 1 left out\n" and "0.tar:b: no caption" in captured.err
    assert main(["data", "index", str(tmp_path / "absent")]) == 2


# buckets

SHAPES = [
    Shape(8, 64, 64),
    Shape(8, 48, 96),
    Shape(24, 64, 64),
    Shape(24, 48, 96),
    Shape(16, 64, 64),
    Shape(16, 48, 96),
]
told = st.tuples(
    st.integers(0, 40), st.sampled_from([0.0, 8.0, 12.0, 23.976, 30.0]), st.integers(0, 99), st.integers(0, 99)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(told, min_size=1, max_size=30))
def test_a_sample_goes_to_the_longest_clip_it_fills_and_the_nearest_frame(
    rows: list[tuple[int, float, int, int]],
) -> None:
    records = np.zeros(len(rows), RECORD)
    for record, (frames, fps, height, width) in zip(records, rows, strict=True):
        record["frames"], record["fps"], record["height"], record["width"] = frames, fps, height, width
    found = buckets._sort_media(records, SHAPES, "video", 12.0)
    for number, (frames, fps, height, width) in zip(found, rows, strict=True):
        fills = frames / float(np.float32(fps)) * 12.0 + 1e-3 if frames and fps else 8
        lengths = [length for length in (8, 16, 24) if length <= math.floor(fills)]
        if not lengths:
            assert number == -1
            continue
        assert SHAPES[number].frames == max(lengths)
        wide = height and width and abs(math.log(width / height) - math.log(2)) < abs(math.log(width / height))
        assert SHAPES[number].width == (96 if wide else 64)


def test_samples_are_sorted_by_the_manifest(mixed: Path) -> None:
    data = data_of(Shards(video=str(mixed)), **WIDE)
    pool = (data.setup(), data.train.pools["video"])[1]
    assert dict(zip(map(str, pool.shapes), map(len, pool.rows), strict=True)) == {
        "4x16x16": 6, "4x16x32": 6, "8x16x16": 6, "8x16x32": 6,
    }  # fmt: skip
    assert pool.batches == [4, 2, 2, 1]  # of as many tokens each
    (reason, out), *more = pool.left_out.items()
    assert reason == "short clip: fewer than 4 frames at 8 fps" and out == (6, "video-0.tar:v04") and not more
    assert data.left_out == {f"video: {reason}": 6}
    assert data.describe() == [
        "video: 6 of 4x16x16 in batches of 4, 6 of 4x16x32 in batches of 2, 6 of 8x16x16 in batches of 2, "
        "6 of 8x16x32 in batches of 1; left out: 6 x short clip: fewer than 4 frames at 8 fps"
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_buckets(mixed: Path, workers: int) -> None:
    """Every batch has one shape and as many tokens, and four epochs hold every sample four times."""
    data = data_of(Shards(video=str(mixed)), workers=workers, **WIDE)
    seen: Counter[str] = Counter()
    shapes: list[Shape] = []
    for batch in islice(data.train_dataloader(), 4 * 27 // 2):  # 1.5 + 3 + 3 + 6 steps an epoch
        shapes.append(Shape(*batch.clips.shape[2:]))
        assert len(batch.keys) * math.prod(shapes[-1]) == 4 * 4 * 16 * 16
        seen.update(batch.keys)
    assert len(seen) == 24 and set(seen.values()) == {4}
    assert len(set(shapes)) == 4 and shapes != sorted(shapes)


def test_all_ranks_have_one_shape_at_every_step(mixed: Path) -> None:
    shards = Shards(video=str(mixed), image=str(mixed))
    data = data_of(shards, mix=PerKind(image=1, video=3), **WIDE)
    ranks = [list(islice(data.batches(rank=rank, world=3), 24)) for rank in range(3)]
    for batches in zip(*ranks, strict=True):
        assert len({(batch.kind, batch.clips.shape) for batch in batches}) == 1
        assert not any(batch.drops for batch in batches)
    assert {tuple(batch.clips.shape[1:]) for batch in ranks[0]} == {
        (3, 1, 16, 16), (3, 1, 16, 32), (3, 4, 16, 16), (3, 4, 16, 32), (3, 8, 16, 16), (3, 8, 16, 32),
    }  # fmt: skip


def test_a_spare_has_the_shape_of_what_it_stands_in_for(mixed: Path, tmp_path: Path) -> None:
    """The manifest says of two clips that they are longer than they are."""
    for path in mixed.glob("video-*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rows = [
        one._replace(frames=9) if one.key in ("v00", "v05") else one for one in manifest.rows(mixed / manifest.NAME)
    ]
    manifest.write(tmp_path / manifest.NAME, [one for one in rows if one.kind == "video"], About())
    data, ledger = data_of(Shards(video=str(tmp_path)), **WIDE), Ledger()
    for batch in islice(data.batches(), 40):
        ledger.record(batch)
        assert batch.clips.shape[0] == len(batch.keys)
    assert set(ledger.named) == {"short clip"} and {line.partition(": ")[0] for line in ledger.named["short clip"]} == {
        "video-0.tar:v00", "video-0.tar:v05",
    }  # fmt: skip


def test_several_shapes_need_a_manifest(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "video-0.tar").write_bytes((mixed / "video-0.tar").read_bytes())
    with pytest.raises(RecipeError, match="data.shards.video: data.sizes and data.lengths need a manifest"):
        data_of(Shards(video=str(tmp_path / "*.tar")), **WIDE).setup()
    with pytest.raises(DataError, match="none of 30 samples fits this stage .30 x short clip: fewer than 40 frames"):
        data_of(Shards(video=str(mixed)), frames=40).setup()


def test_a_sample_that_is_larger_than_a_batch_may_be(mixed: Path) -> None:
    with pytest.raises(
        RecipeError,
        match="one sample of 8x16x32 comes to 1,024 tokens, more than the 768 of a batch .*raise data.batch.video to 4",
    ):
        data_of(Shards(video=str(mixed)), batch=PerKind(video=3), **WIDE).setup()


def test_held_out_samples_of_several_shapes(mixed: Path) -> None:
    data = data_of(Shards(video=str(mixed)), validation=Shards(video=str(mixed)), **WIDE)
    data.recipe = replace(data.recipe, train=replace(data.recipe.train, validation_samples=7))
    batches = list(data.val_dataloader())
    assert sorted(key.partition(":")[2] for batch in batches for key in batch.keys) == [
        "v00", "v01", "v02", "v03", "v05", "v06", "v07",
    ]  # fmt: skip
    assert len({batch.clips.shape[1:] for batch in batches}) == 4


def test_a_checkpoint_of_other_data_is_refused(mixed: Path) -> None:
    state = data_of(Shards(video=str(mixed))).state_dict()
    other = data_of(Shards(video=str(mixed / "video-[012].tar")))
    with pytest.raises(
        DataError, match="changed since step 0: there were video: 24 of 4x16x16, now there are video: 20"
    ):
        other.load_state_dict(state)


def test_a_resumed_run_that_counts_its_mix_otherwise_takes_what_comes_next(mixed: Path) -> None:
    shards = Shards(image=str(mixed), video=str(mixed))
    mix, batch = PerKind(image=1, video=2), PerKind(image=4, video=2)
    first = data_of(shards, mix=mix, batch=batch)
    first.start_step = 5
    places = list(islice(first.places(), 5))
    second = data_of(shards, mix=mix, batch=batch, mix_by="samples")  # one step of 4 images for four of 2 videos
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.start_step = 12
    places += islice(second.places(5), 7)
    third = data_of(shards, mix=mix, batch=batch, mix_by="samples")
    third.load_state_dict(json.loads(json.dumps(second.state_dict())))
    places += islice(third.places(12), 8)
    assert [place.kind[0] for place in places] == [*"ivviv", *"ivvvviv", *"vvvivvvv"]
    for kind in ("image", "video"):
        numbers = [number for place in places if place.kind == kind for number in place.numbers]
        assert numbers == list(range(len(numbers)))
    assert [slot for place in places for slot in place.slots] == list(range(sum(len(one.slots) for one in places)))


def test_a_resumed_run_with_other_batches_goes_on_in_the_same_epoch(mixed: Path) -> None:
    shards = Shards(video=str(mixed))
    first = data_of(shards, **WIDE)
    first.start_step = 5
    seen = Counter(key for batch in islice(first.batches(world=1), 5) for key in batch.keys)
    second = data_of(shards, batch=PerKind(video=8), **WIDE)
    second.load_state_dict(first.state_dict())
    rest = list(islice(second.batches(5), 2))
    assert sum(len(batch.slots) for batch in rest) and rest[0].slots[0] == sum(seen.values())
    taken = second.order().taken(5)["video"]
    assert sum(taken) == sum(seen.values())
    for batch in rest:
        shape = Shape(*batch.clips.shape[2:])
        bucket = second.train.pools["video"].shapes.index(shape)
        before = {key for key in seen if key in _of_bucket(second, bucket)}
        left = 6 - taken[bucket] % 6
        assert not before & set(batch.keys[:left]) or taken[bucket] % 6 == 0


def _of_bucket(data: ClipData, bucket: int) -> set[str]:
    pool = data.train.pools["video"]
    return {pool.index.where(int(row)) for row in pool.rows[bucket][:]}


# at scale


def synthetic_manifest(path: Path, rows: int) -> None:
    """Half of them clips of three lengths and three aspect ratios, the rest pictures, 1,000 to a shard."""
    text, ones = pa.array([""] * 65536), np.ones(65536, np.int32)

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, rows, 65536):
            n = np.arange(start, min(start + 65536, rows))
            video = n % 2 == 0
            columns = {
                "key": pa.array(n.astype("U9")), "shard": pa.array(np.char.add((n // 1000).astype("U9"), ".tar")),
                "offset": n % 1000 * 1_000_000, "length": np.full(len(n), 900_000),
                "kind": pa.array(np.where(video, "video", "image")),
                "height": np.full(len(n), 480), "width": np.array([480, 640, 854])[n // 2 % 3],
                "frames": np.where(video, np.array([20, 40, 80])[n // 6 % 3], 1), "fps": np.where(video, 16.0, 0.0),
                "captions": ones[: len(n)], "caption_length": ones[: len(n)], "media": text[: len(n)],
                "hash": text[: len(n)], "source": text[: len(n)],
            }  # fmt: skip
            arrays = [pa.array(columns[field.name]).cast(field.type) for field in manifest.SCHEMA]
            yield pa.RecordBatch.from_arrays(arrays, schema=manifest.SCHEMA)

    manifest.write_batches(path, batches(), About())


def resident() -> int:
    """Bytes of this process that are in memory, shared ones too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is measured by /proc")
def test_a_million_rows_open_at_once_and_take_little_memory(tmp_path: Path) -> None:
    """What 100 million take is in docs/results/loader.json; the way is the same."""
    synthetic_manifest(tmp_path / manifest.NAME, 1_000_000)
    shards = Shards(video=str(tmp_path), image=str(tmp_path))
    wanted = {"mix": PerKind(image=1, video=100), "frames": 16, "lengths": [32, 64], "size": (256, 256),
              "sizes": [(224, 288), (192, 336)], "fps": 16.0, "batch": PerKind(image=4, video=8)}  # fmt: skip
    data_of(shards, **wanted).setup()  # makes the index
    before, begin = resident(), time.perf_counter()
    data = data_of(shards, **wanted)
    first = next(data.places())
    clips = data.train
    numbers = [clips._choose(first, number).number for number in first.numbers]
    assert time.perf_counter() - begin < 2 and numbers
    pool = clips.pools["video"]
    assert sorted(map(str, pool.shapes)) == sorted(
        f"{t}x{s}" for t in (16, 32, 64) for s in ("256x256", "224x288", "192x336")
    )
    for place in islice(data.places(), 3000):
        for number in place.numbers:
            choice = clips._choose(place, number)
            clips.pools[choice.kind].index.where(choice.number)
    assert resident() - before < 64 << 20
    assert FORGET < 3000


def test_mapped_numbers_open_anew_in_another_process(mixed: Path) -> None:
    import pickle

    data = data_of(Shards(video=str(mixed)), **WIDE)
    place = next(data.places())
    assert pickle.loads(pickle.dumps(data.train))[place].keys == data.train[place].keys
    found = opened(str(mixed))
    again = pickle.loads(pickle.dumps(found))
    assert len(pickle.dumps(found)) < 5000 and [again.where(i) for i in range(30)] == [
        found.where(i) for i in range(30)
    ]


def test_indexing_reads_manifests_in_chunks(mixed: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    whole = [opened(str(mixed)).where(i) for i in range(30)]
    monkeypatch.setattr(indexing, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(buckets, "SORTED_AT_ONCE", 7)
    monkeypatch.setattr(indexing, "INDEX_FORMAT", 99)
    found = opened(str(mixed))
    assert [found.where(i) for i in range(30)] == whole
    data = data_of(Shards(video=str(mixed)), **WIDE)
    assert len(next(iter(data.batches())).keys)
    assert [len(rows) for rows in data.train.pools["video"].rows] == [6, 6, 6, 6]
