"""Shards, faults, the datamodule and the ledger, on real tar files with real H.264 and PNG in them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import webdataset

from lingen.data.ahead import Ahead
from lingen.data.batch import Batch, Drop
from lingen.data.cache import Cache
from lingen.data.datamodule import ClipData
from lingen.data.dataset import ClipCache, Sample
from lingen.data.index import Index
from lingen.data.indexing import scan_shards
from lingen.data.ledger import DataError, Ledger
from lingen.data.locations import Location, expand
from lingen.data.shards import parse_sample, write_shards
from lingen.data.sources import Reader
from lingen.media import encode_mp4, encode_picture
from lingen.prepare.index import index_folder
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import DataConfig, PerKind, Recipe, Remote, Shards, TrainConfig

SIZE = (16, 16)
FRAMES = 4


@lru_cache
def mp4(level: int, frames: int = FRAMES) -> bytes:
    return encode_mp4(np.full((frames, *SIZE, 3), level, np.uint8), 8)


@lru_cache
def png(level: int) -> bytes:
    return encode_picture(np.full((*SIZE, 3), level, np.uint8))


def video_samples(count: int, frames: int = FRAMES) -> list[dict[str, Any]]:
    return [{"__key__": f"v{i:03d}", "mp4": mp4(8 * i, frames), "json": {"caption": f"clip {i}"}} for i in range(count)]


def image_samples(count: int) -> list[dict[str, Any]]:
    return [{"__key__": f"i{i:03d}", "png": png(8 * i), "txt": f"picture {i}"} for i in range(count)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 clips in 3 shards, 5 pictures in 2."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(video_samples(7), str(folder / "video-%03d.tar"), per_shard=3)
    write_shards(image_samples(5), str(folder / "image-%03d.tar"), per_shard=3)
    return folder


def recipe(folder: Path, *, accumulate: int = 1, validation_samples: int = 4, seed: int = 0, **data: Any) -> Recipe:
    settings = {"mix": PerKind(image=1, video=3), "batch": PerKind(image=3, video=2), "workers": 0} | data
    named = Shards(image=str(folder / "image-*.tar"), video=str(folder / "video-*.tar"))
    return Recipe(
        seed=seed,
        data=DataConfig(**{"shards": named, "frames": FRAMES, "size": SIZE, "fps": 8.0, **settings}),
        train=TrainConfig(accumulate=accumulate, validation_samples=validation_samples),
    )


def take(data: ClipData, count: int, start: int = 0, **ranks: int) -> list[Batch]:
    return list(islice(data.batches(start, **ranks), count))


def keys_of(batches: list[Batch]) -> list[tuple[str, list[str]]]:
    return [(batch.kind, batch.keys) for batch in batches]


def index(paths: list[Any]) -> Index:
    return scan_shards(Location.of(str(path)) for path in paths)


def read(found: Index, number: int) -> dict[str, bytes]:
    return parse_sample(Ahead(found, Reader(Remote())).get(number).data, found.key(number))


# finding shards


def test_patterns(shards: Path) -> None:
    videos = [str(shards / f"video-{i:03d}.tar") for i in range(3)]
    assert expand(str(shards / "video-*.tar"), "x") == videos
    assert expand(str(shards / "video-{000..002}.tar"), "x") == videos
    assert expand([videos[1], str(shards / "video-00[01].tar")], "x") == videos[:2]
    assert expand(None, "x") == []


@pytest.mark.parametrize(("pattern", "message"), [
    ("{}/film-*.tar", "data.shards.video: no file matches '{}/film-*.tar'; correct the pattern"),
    ("{}/video-{{000..003}}.tar", "data.shards.video: there is no file '{}/video-003.tar'; correct the path"),
    ("{}", "data.shards.video: '{}' has no manifest.parquet; write it with `lingen data index {}`"),
    ("gs://bucket/video.tar", "'gs://bucket/video.tar' is neither a path nor an address at https:// or s3://; copy"),
    ("https://host/folder/", "'https://host/folder/' is a folder; name its manifest: 'https://host/folder/manifest"),
    ("pipe:cat {}", "is neither a path nor an address"),
])  # fmt: skip
def test_patterns_that_match_nothing(shards: Path, pattern: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        expand(pattern.format(shards), "data.shards.video")
    assert message.format(shards, shards) in str(caught.value)


# writing and indexing


def test_shards_are_plain_webdataset_and_reproducible(shards: Path, tmp_path: Path) -> None:
    again = write_shards(iter(video_samples(7)), str(tmp_path / "video-%03d.tar"), per_shard=3)
    assert [path.name for path in again] == ["video-000.tar", "video-001.tar", "video-002.tar"]
    assert all(path.read_bytes() == (shards / path.name).read_bytes() for path in again)
    samples = list(webdataset.WebDataset([str(path) for path in again], shardshuffle=False))
    assert [(s["__key__"], json.loads(s["json"])["caption"]) for s in samples] == [
        (f"v{i:03d}", f"clip {i}") for i in range(7)
    ]


def test_a_shard_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def failing() -> Any:
        yield from video_samples(3)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_shards(failing(), str(tmp_path / "%d.tar"), per_shard=2)
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]
    with pytest.raises(ValueError, match="no samples"):
        write_shards([], str(tmp_path / "%d.tar"))


def test_any_sample_is_one_read_away(shards: Path) -> None:
    found = index(expand(str(shards / "video-*.tar"), "x"))
    assert len(found) == 7 and not found.faults
    assert [found.where(i) for i in (0, 3, 6)] == ["video-000.tar:v000", "video-001.tar:v003", "video-002.tar:v006"]
    for number in (6, 0, 4):
        sample = read(found, number)
        assert sample.keys() == {"mp4", "json"} and sample["mp4"] == mp4(8 * number)


def test_long_names_folders_and_upper_case(tmp_path: Path) -> None:
    long = "deep/" * 30 + "name"
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("__meta__/about.json"), io.BytesIO())
        folder = tarfile.TarInfo("deep")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in (f"{long}.PNG", f"{long}.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
    found = index([tmp_path / "a.tar"])
    assert [found.where(i) for i in range(len(found))] == [f"a.tar:{long}"]
    assert read(found, 0) == {"png": b"abc", "txt": b"abc"}


def test_shards_of_the_same_name_in_two_folders(tmp_path: Path) -> None:
    paths = [write_shards(image_samples(1), str(tmp_path / folder / "%d.tar"))[0] for folder in "ab"]
    assert [index(paths).where(i) for i in range(2)] == ["a/0.tar:i000", "b/0.tar:i000"]


# faults of shards


def cut(path: Path, source: Path, size: int) -> Path:
    path.write_bytes(source.read_bytes()[:size])
    return path


def test_a_tar_cut_anywhere_is_noticed_and_gives_its_whole_samples(shards: Path, tmp_path: Path) -> None:
    source = shards / "video-000.tar"
    whole = index([source])
    ends = (whole.records["offset"] + whole.records["length"]).tolist()
    for size in [*range(512, ends[-1], 700), *ends, *(end - 1 for end in ends), *(end + 100 for end in ends)]:
        found = index([cut(tmp_path / "cut.tar", source, size)])
        reasons = [drop.reason.partition(":")[0] for drop in found.faults]
        assert "truncated shard" in reasons
        complete = sum(end <= size for end in ends)
        usable = [read(found, i) for i in range(len(found))]
        assert [sample["mp4"] for sample in usable if len(sample) == 2] == [mp4(8 * i) for i in range(complete)]


def test_what_a_cut_is_called(shards: Path, tmp_path: Path) -> None:
    found = index([cut(tmp_path / "cut.tar", shards / "video-000.tar", 1700)])
    assert found.faults[0].where == "cut.tar:v000" and "cut off" in found.faults[0].reason
    assert found.faults[-1].where == "cut.tar" and "no end-of-archive block" in found.faults[-1].reason


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "empty shard: zero bytes"),
    (b"<html>not found</html>" * 99, "not a tar"),
    (b"ab", "not a tar"),
])  # fmt: skip
def test_files_that_are_no_tar(shards: Path, tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "bad.tar").write_bytes(content)
    found = index([tmp_path / "bad.tar", shards / "video-000.tar"])
    assert len(found) == 3
    assert (
        len(found.faults) == 1
        and found.faults[0].reason.startswith(reason)
        and found.faults[0].where.endswith("bad.tar")
    )


def test_a_header_overwritten_in_the_middle(shards: Path, tmp_path: Path) -> None:
    data = bytearray((shards / "video-000.tar").read_bytes())
    second = int(index([shards / "video-000.tar"]).records["offset"][1])
    data[second : second + 512] = b"\x7f" * 512
    (tmp_path / "bad.tar").write_bytes(data)
    found = index([tmp_path / "bad.tar"])
    assert len(found) == 1 and f"at byte {second} of" in found.faults[0].reason


@pytest.mark.parametrize("make", ["/etc/passwd.png", "../up.png", "a/../../up.png", "symlink", "device"])
def test_unsafe_members_are_refused(tmp_path: Path, make: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo({"symlink": "x.png", "device": "x.png"}.get(make, make))
        if make == "symlink":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        elif make == "device":
            member.type = tarfile.CHRTYPE
        else:
            member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
        good = tarfile.TarInfo("good.png")
        tar.addfile(good, io.BytesIO(b""))
    found = index([tmp_path / "a.tar"])
    assert [found.where(i) for i in range(len(found))] == ["a.tar:good"]
    assert [drop.reason.partition(":")[0] for drop in found.faults] == ["unsafe member"]


def test_a_sample_that_changes_under_our_feet_is_an_error(shards: Path, tmp_path: Path) -> None:
    path = cut(tmp_path / "a.tar", shards / "video-000.tar", 10**9)
    found = index([path])
    cut(path, shards / "video-000.tar", int(found.records["offset"][1]) + 700)
    with pytest.raises(ValueError, match="cut off: the shard ends before the sample does"):
        read(found, 1)
    with pytest.raises(ValueError, match="cut off"):
        read(found, 2)
    path.write_bytes((shards / "video-001.tar").read_bytes())
    with pytest.raises(ValueError, match="damaged sample: 'v003.json' stands in the place of 'v000'"):
        read(found, 0)


# the datamodule


def test_batches(shards: Path) -> None:
    image, *videos = take(ClipData(recipe(shards)), 4)
    assert (image.kind, image.step, image.fps, image.clips.shape) == ("image", 0, 0.0, (3, 3, 1, *SIZE))
    for step, batch in enumerate(videos, 1):
        assert (batch.kind, batch.step, batch.fps, batch.clips.shape) == ("video", step, 8.0, (2, 3, FRAMES, *SIZE))
        assert batch.clips.dtype == torch.uint8 and not batch.drops
        for clip, caption, key in zip(batch.clips, batch.captions, batch.keys, strict=True):
            number = int(key[-3:])
            assert caption == f"clip {number}" and abs(clip.double().mean() - 8 * number) < 3
    assert torch.cat([batch.slots for batch in (image, *videos)]).tolist() == list(range(9))


def test_every_epoch_sees_every_sample_in_another_order(shards: Path) -> None:
    data = ClipData(recipe(shards, mix=PerKind(image=0, video=1)))
    keys = [key for batch in take(data, 14) for key in batch.keys]
    epochs = [keys[i : i + 7] for i in range(0, 28, 7)]
    assert all(len(set(epoch)) == 7 for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 4
    other = ClipData(recipe(shards, mix=PerKind(image=0, video=1), seed=1))
    assert [key for batch in take(other, 14) for key in batch.keys] != keys


def test_one_image_step_in_a_hundred_and_one_exactly(shards: Path) -> None:
    data = ClipData(recipe(shards, mix=PerKind(image=1, video=100)))
    assert Counter(place.kind for place in islice(data.places(37), 202)) == {"image": 2, "video": 200}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_workers_ranks_and_resumes_see_the_same(shards: Path, accumulate: int) -> None:
    data = ClipData(recipe(shards, accumulate=accumulate))
    whole = take(data, 12 * accumulate)
    for start in (1, 5):
        rest = take(data, (12 - start) * accumulate, start)
        assert keys_of(rest) == keys_of(whole[start * accumulate :])
        assert all(torch.equal(a.clips, b.clips) for a, b in zip(rest, whole[start * accumulate :], strict=True))
    wide = ClipData(recipe(shards, accumulate=accumulate, batch=PerKind(image=6, video=4)))
    shares = [take(data, 6 * accumulate, rank=rank, world=2) for rank in range(2)]
    for alone, first, second in zip(take(wide, 6 * accumulate), *shares, strict=True):
        assert alone.keys == first.keys + second.keys
        assert torch.equal(alone.slots, torch.cat([first.slots, second.slots]))
        assert torch.equal(alone.clips, torch.cat([first.clips, second.clips]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_any_number_of_workers_gives_the_same_batches(shards: Path, workers: int) -> None:
    data = ClipData(recipe(shards, workers=workers))
    data.start_step = 2
    loaded = list(islice(data.train_dataloader(), 9))
    expected = take(data, 9, start=2)
    assert keys_of(loaded) == keys_of(expected)
    assert all(torch.equal(a.clips, b.clips) for a, b in zip(loaded, expected, strict=True))


def test_fewer_samples_than_ranks_times_workers_times_batch(tmp_path: Path) -> None:
    write_shards(video_samples(1), str(tmp_path / "video-%d.tar"))
    data = ClipData(
        recipe(tmp_path, shards=Shards(video=str(tmp_path / "*.tar")), mix=PerKind(image=0, video=1), workers=2)
    )
    assert {key for batch in islice(data.train_dataloader(), 4) for key in batch.keys} == {"video-0.tar:v000"}
    assert take(data, 1, rank=7, world=8)[0].keys == ["video-0.tar:v000"] * 2


def test_clips_begin_elsewhere_in_each_epoch(tmp_path: Path) -> None:
    moving = np.stack([np.full((*SIZE, 3), 10 * i, np.uint8) for i in range(20)])
    samples = [{"__key__": "a", "mp4": encode_mp4(moving, 8), "txt": "brighter"}]
    write_shards(samples, str(tmp_path / "%d.tar"))
    only = {
        "shards": Shards(video=str(tmp_path / "0.tar")),
        "mix": PerKind(image=0, video=1),
        "batch": PerKind(video=1),
    }
    starts = [
        round(batch.clips[0, :, 0].double().mean().item() / 10)
        for batch in take(ClipData(recipe(tmp_path, **only)), 12)
    ]
    assert len(set(starts)) > 4 and max(starts) <= 16
    cached = ClipData(recipe(tmp_path, cache_mb=1, **only))
    assert [round(batch.clips[0, :, 0].double().mean().item() / 10) for batch in take(cached, 12)] == starts


# faults of samples


FAULTY = {
    "captionless": ({"mp4": mp4(1)}, "no caption"),
    "empty": ({"mp4": mp4(1), "json": {"caption": " "}}, "no caption"),
    "latin": ({"mp4": mp4(1), "txt": "caf\u00e9".encode("latin-1")}, "caption is not UTF-8"),
    "broken": ({"mp4": b"\x00" * 700, "txt": "a"}, "broken video"),
    "half": ({"mp4": mp4(1)[:600], "txt": "a"}, "broken video"),
    "short": ({"mp4": mp4(1, 3), "txt": "a"}, "short clip"),
    "pictureless": ({"wav": b"x", "txt": "a"}, "no video"),
}


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Five good clips among all faults, one of the shards cut, one empty."""
    bad = [{"__key__": f"{name}", **members} for name, (members, _) in FAULTY.items()]
    write_shards([*video_samples(5), *bad], str(tmp_path / "video-%d.tar"))
    (last,) = write_shards(video_samples(3), str(tmp_path / "video-cut-%d.tar"))
    last.write_bytes(last.read_bytes()[: int(index([last]).records["offset"][2]) + 1700])
    (tmp_path / "video-empty.tar").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_all_faults_at_once_are_replaced_counted_and_named(faulty: Path, workers: int) -> None:
    data = ClipData(recipe(faulty, mix=PerKind(image=0, video=1), workers=workers))
    ledger = Ledger()
    ledger.open(data.train.faults, data.left_out)
    for batch in islice(data.train_dataloader(), 21):  # 3 epochs of 14 samples
        assert len(batch.keys) == len(batch.captions) == len(batch.clips) == 2
        assert not any(name in key for key in batch.keys for name in FAULTY)
        ledger.record(batch)
    assert ledger.used == 42 and ledger.seen == 42 + ledger.dropped.total()
    named = [line for lines in ledger.named.values() for line in lines]
    for name, (_, reason) in FAULTY.items():
        assert any(line.startswith(f"video-0.tar:{name}: {reason}") for line in named), name
    assert [shard for shard, counts in ledger.shards.items() if counts["dropped"]] == ["video-0.tar"]
    assert sum((counts for counts in ledger.shards.values()), Counter())["used"] == ledger.used
    assert ledger.sources == {str(faulty): Counter(used=42, dropped=ledger.dropped.total())}
    assert {where: reason.partition(":")[0] for where, reason in ledger.faults.items()} == {
        "video-cut-0.tar": "truncated shard",
        "video-cut-0.tar:v002": "cut off",
        "video-empty.tar": "empty shard",
    }
    assert "short clip: 3 frames where 4 are wanted" in str(ledger.named)
    ledger.check(1)
    ledger.check(0.99)
    with pytest.raises(DataError, match="data.max_dropped: 0 allows. The first: video-cut-0.tar:v002: cut off"):
        ledger.check(0)


def test_the_same_spare_fills_a_slot_again(faulty: Path) -> None:
    settings = recipe(faulty, mix=PerKind(image=0, video=1))
    first, second = (take(ClipData(settings), 7) for _ in range(2))
    assert keys_of(first) == keys_of(second) and [batch.drops for batch in first] == [batch.drops for batch in second]
    assert keys_of(take(ClipData(settings), 4, start=3)) == keys_of(first[3:])


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path, workers: int) -> None:
    write_shards(video_samples(3, frames=2), str(tmp_path / "video-%d.tar"))
    data = ClipData(recipe(tmp_path, mix=PerKind(image=0, video=1), workers=workers))
    with pytest.raises(
        DataError, match="^20 video samples in a row cannot be used.*video-0.tar:v00.: short clip: 2 frames where 4"
    ) as caught:
        next(iter(data.train_dataloader()))
    assert "\n" not in str(caught.value).strip()
    (tmp_path / "video-0.tar").write_bytes(b"")
    with pytest.raises(
        DataError, match="data.shards.video: there is no whole sample in 1 shards .*empty shard: zero bytes"
    ):
        ClipData(recipe(tmp_path, mix=PerKind(image=0, video=1))).setup()


def test_a_kind_without_shards(shards: Path) -> None:
    only_video = Shards(video=str(shards / "video-*.tar"))
    with pytest.raises(
        RecipeError, match="data.mix.image is 1, but data.shards.image names no shards; name some, or set"
    ):
        ClipData(recipe(shards, shards=only_video)).setup()
    assert take(ClipData(recipe(shards, shards=only_video, mix=PerKind(image=0, video=1))), 1)[0].kind == "video"
    with pytest.raises(RecipeError, match="data.mix is 0 for both kinds"):
        ClipData(recipe(shards, mix=PerKind(image=0, video=0))).setup()


# held-out samples


def test_validation_is_the_same_each_time(shards: Path) -> None:
    held_out = Shards(image=str(shards / "image-*.tar"), video=str(shards / "video-*.tar"))
    data = ClipData(recipe(shards, validation=held_out, workers=2))
    loader = data.val_dataloader()
    first, second = list(loader), list(loader)
    assert (
        keys_of(first)
        == keys_of(second)
        == [
            ("image", ["image-000.tar:i000", "image-000.tar:i001", "image-000.tar:i002"]),
            ("image", ["image-001.tar:i003"]),
            ("video", ["video-000.tar:v000", "video-000.tar:v001"]),
            ("video", ["video-000.tar:v002", "video-001.tar:v003"]),
        ]
    )
    assert len(loader) == 4
    assert list(ClipData(recipe(shards)).val_dataloader()) == []


# in a real trainer


class Recorder(lightning.LightningModule):
    """Notes what it is given; one weight to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained: list[tuple[str, int, list[str]]] = []
        self.validated: list[list[str]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert isinstance(batch, Batch) and all(isinstance(drop, Drop) for drop in batch.drops)
        assert batch.step == self.trainer.global_step
        self.trained.append((batch.kind, batch.step, batch.keys))
        return (self.weight * batch.clips.float().mean()).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(batch.keys)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **settings: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(default_root_dir=folder, **quiet, **settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_resumes_at_its_own_step(shards: Path, tmp_path: Path, workers: int) -> None:
    settings = recipe(shards, accumulate=2, workers=workers, validation=Shards(video=str(shards / "video-*.tar")))

    def fit(steps: int, **resume: Any) -> Recorder:
        module = Recorder()
        run = trainer(
            tmp_path, max_steps=steps, accumulate_grad_batches=2, limit_train_batches=6, enable_checkpointing=False
        )
        run.fit(module, datamodule=ClipData(settings), **resume)
        run.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    whole = fit(8)
    expected = [(batch.kind, batch.step, batch.keys) for batch in take(ClipData(settings), 16)]
    assert whole.trained == expected  # though an "epoch" ends every three steps
    assert whole.validated[0] == ["video-000.tar:v000", "video-000.tar:v001"]
    fit(5)
    assert fit(8, ckpt_path=tmp_path / "5.ckpt").trained == expected[10:]


# memory and books


def test_the_cache_keeps_what_was_used_last() -> None:
    cache, reads = ClipCache(250), []

    def get(number: int, start: float, starts: int = 1) -> None:
        def read() -> Sample:
            reads.append((number, int(start * starts)))
            return Sample(torch.zeros(100, dtype=torch.uint8), starts, ["caption"])

        cache.get("video", number, start, read)

    for number, start in ((0, 0.1), (0, 0.9), (1, 0.5), (0, 0.3), (2, 0.0), (0, 0.5), (1, 0.1)):
        get(number, start)
    assert reads == [(0, 0), (1, 0), (2, 0), (1, 0)]
    for start in (0.1, 0.2, 0.9):
        get(5, start, starts=2)
    assert reads[4:] == [(5, 0), (5, 1)]


def test_a_cache_stays_within_its_limit() -> None:
    cache = Cache[str, bytes](9, len)
    for key in "abc":
        cache.put(key, bytes(3))
    assert cache.get("a") == bytes(3) and cache.used == 9
    cache.put("d", bytes(3))
    assert [cache.get(key) is not None for key in "abcd"] == [True, False, True, True]
    cache.put("d", bytes(1))  # in place of the other one
    assert cache.get("d") == bytes(1) and cache.used == 7
    cache.put("e", bytes(10))
    assert cache.used == 0 and cache.get("e") is None


def batch_with(used: int, *drops: Drop, retries: list[str] | None = None) -> Batch:
    slots, keys = torch.arange(used), ["a:b"] * used
    clips, sources = torch.zeros(used), ["web"] * used
    return Batch("video", 0, clips, [""] * used, 8.0, keys, sources, slots, list(drops), retries or [], {})


def test_the_share_of_dropped_samples_that_stops_a_run() -> None:
    ledger = Ledger()
    ledger.record(batch_with(80, *[Drop("a.tar:k", "short clip: 3 frames where 4 are wanted")] * 6))
    ledger.check(0.05)  # fewer than 100 seen
    ledger.record(batch_with(14))
    with pytest.raises(
        DataError,
        match=r"6 samples cannot be used \(94 could\), more than data.max_dropped: 0.05 allows.*a.tar:k: short clip",
    ):
        ledger.check(0.05)
    ledger.check(0.06)
    ledger.check(1)
    with pytest.raises(DataError):
        ledger.check(0)


def test_the_ledger_survives_a_checkpoint_and_adds_up_over_ranks() -> None:
    first, second = Ledger(), Ledger()
    for rank in (first, second):
        rank.open([Drop("b.tar", "truncated shard: no end")], {"video: short clip": 9})
    first.record(batch_with(2, Drop("a.tar:k", "no caption", "web"), retries=["a:b", "a.tar:k"]))
    second.record(batch_with(3, Drop("c.tar:m", "cut off: 3 bytes", "disk")))
    both = Ledger()
    for rank in (first, second):
        both.add(rank.state_dict())
    assert both.as_json() == {
        "seen": 7, "passed": 0,
        "used": 5,
        "truncated": 2,
        "retried": 2,
        "dropped": {"no caption": 1, "cut off": 1},
        "named": {"no caption": ["a.tar:k: no caption"], "cut off": ["c.tar:m: cut off: 3 bytes"]},
        "faults": {"b.tar": "truncated shard: no end"},
        "left_out": {"video: short clip": 9},
        "shards": {"a": {"used": 5, "retried": 1}, "a.tar": {"dropped": 1, "retried": 1},
                   "c.tar": {"dropped": 1, "truncated": 1}},
        "sources": {"web": {"used": 5, "dropped": 1, "retried": 2}, "disk": {"dropped": 1, "truncated": 1}},
    }  # fmt: skip
    loaded = Ledger()
    loaded.load_state_dict(json.loads(json.dumps(both.state_dict())))
    loaded.open([Drop("b.tar", "truncated shard: no end")], {"video: short clip": 9})  # opened again after a resume
    loaded.record(batch_with(1))
    assert loaded.faults == both.faults and loaded.used == 6 and loaded.left_out == both.left_out
    assert both.state_dict()["used"] == 5
    assert [tuple(row.values()) for row in loaded.rows()] == [
        ("used", "6", ""),
        ("dropped: no caption", "1", "a.tar:k: no caption"),
        ("dropped: cut off", "1", "c.tar:m: cut off: 3 bytes"),
        ("found: truncated shard", "1", "b.tar: truncated shard: no end"),
        ("retried", "2", ""),
        ("left out: video: short clip", "9", ""),
    ]
    assert loaded.summary() == (
        "6 samples were used, 2 dropped and replaced; 2 reads tried again; 1 faults found in shards; "
        "9 samples fit no bucket."
    )
    later = Ledger()
    later.record(batch_with(1))
    later.check(0.5, loaded)
    with pytest.raises(DataError, match=r"3 samples cannot be used \(7 could\).*The first: b.tar: truncated shard"):
        later.check(0, loaded)


def test_shards_of_one_name_are_counted_apart(tmp_path: Path) -> None:
    """In the folders of both kinds, in two folders of one kind, and on two ports of a server."""
    for name, samples in (("i", image_samples(3)), ("v", video_samples(2)), ("w", video_samples(2))):
        write_shards(samples, str(tmp_path / name / "%05d.tar"))
        index_folder(tmp_path / name, 0)
    for name in "vw":
        os.truncate(tmp_path / name / "00000.tar", 1000)
    pictures, films = str(tmp_path / "i"), [str(tmp_path / name / "00000.tar") for name in "vw"]
    both = ClipData(recipe(tmp_path, shards=Shards(image=pictures, video=films)))
    assert {drop.where for drop in both.train.faults} == {"v/00000.tar", "w/00000.tar"}
    data, ledger = ClipData(recipe(tmp_path, shards=Shards(image=pictures, video=films[:1]))), Ledger()
    ledger.open(data.train.faults, {})
    assert ledger.faults.keys() == {"video/00000.tar"}
    ledger.record(take(data, 1)[0])
    ledger.record(batch_with(1, Drop("h1:8080/a/x.tar:k", "no caption"), Drop("h2:8080/a/x.tar:k:l", "no caption")))
    assert ledger.shards.keys() == {"image/00000.tar", "a", "h1:8080/a/x.tar", "h2:8080/a/x.tar"}
    assert data.train.names(next(data.places())) == take(data, 1)[0].keys


def test_lightning_keeps_its_hands_off_the_order(shards: Path) -> None:
    loader = ClipData(recipe(shards)).train_dataloader()
    assert isinstance(loader.sampler, torch.utils.data.DistributedSampler)
    with pytest.raises(TypeError, match="no end"):
        len(loader)


def test_synthetic_clips_stand_in_for_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LINGEN_CACHE", str(tmp_path))
    small = {"name": "shapes", "clips": 4, "images": 3, "held_out": 2}
    data = ClipData(replace(recipe(tmp_path), data=replace(recipe(tmp_path).data, shards=Shards(), synthetic=small)))
    data.prepare_data()
    batches = take(data, 3)
    assert {batch.kind for batch in batches} == {"image", "video"} and all(batch.captions[0] for batch in batches)
    assert [batch.kind for batch in data.val_dataloader()] == ["image", "video"]
