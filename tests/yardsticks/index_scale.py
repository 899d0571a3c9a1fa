"""The cost of an index of very many samples: time to make it and to open it, and memory of a worker."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from lingen.cli.bench import yardstick
from lingen.data import manifest
from lingen.data.datamodule import ClipData
from lingen.data.manifest import About
from lingen.data.shards import write_shards
from lingen.media import encode_mp4
from lingen.prepare.index import index_folder
from lingen.recipe.sections import DataConfig, PerKind, Recipe, Shards

T = TypeVar("T")

SHAPES = [(frames, *size) for frames in (20, 40, 70) for size in ((32, 32), (32, 48), (32, 64))]
"""Of the clips: three lengths, three aspect ratios."""
BATCHES = 400
"""Batches that are made before the memory of the workers is measured."""
WORKERS = 2


def index_at_scale(rows: int) -> dict[str, Any]:
    """Makes a manifest of so many rows, each of a real sample of a small shard, and reads batches of it as training
    would.

    Returns:
        seconds to make the index and to open it up to the first batch; MiB of a worker beside one on a small manifest.
    """
    with tempfile.TemporaryDirectory(prefix="lingen-index-") as name:
        folder = Path(name) / "clips"
        clips = [encode_mp4(np.full((*shape, 3), 99, np.uint8), 16) for shape in SHAPES]
        samples = ({"__key__": f"clip-{i:012d}", "mp4": clip, "txt": "a clip"} for i, clip in enumerate(clips))
        write_shards(samples, f"{folder}/video-%d.tar")
        index_folder(folder, 0)
        small = _fresh(_start, folder)
        lengthen(folder, rows)
        made = _fresh(_make, folder)
        large = _fresh(_start, folder)
        size = sum(file.stat().st_size for file in (Path(name) / "cache").rglob("*") if file.is_file())
    return {
        "rows": rows,
        "manifest_gigabytes": round(large["manifest"] / 1e9, 3),
        "index_gigabytes": round(size / 1e9, 3),
        "seconds_to_make_the_index": round(made, 1),
        "seconds_to_the_first_batch": round(large["first"], 2),
        "seconds_to_the_first_batch_of_a_small_manifest": round(small["first"], 2),
        "worker_private_mib": round(large["private"] / 2**20, 1),
        "worker_private_mib_with_a_small_manifest": round(small["private"] / 2**20, 1),
        "worker_resident_mib": round(large["resident"] / 2**20, 1),
        "worker_resident_mib_with_a_small_manifest": round(small["resident"] / 2**20, 1),
    }


def lengthen(folder: Path, rows: int) -> None:
    """Repeats the rows of a folder's manifest until there are so many."""
    path = folder / manifest.NAME
    few = pa.Table.from_batches(list(manifest.batches(path)))
    (group,) = pa.concat_tables([few] * max(1, manifest.GROUP // len(few))).combine_chunks().to_batches()
    groups = (group.slice(0, min(len(group), rows - start)) for start in range(0, rows, len(group)))
    manifest.write_batches(path, groups, About())


def _fresh(work: Callable[[Path], T], folder: Path) -> T:
    """Done by a new process, whose memory holds nothing yet, with a cache beside the folder."""
    # A new process finds this module, which is on no path, only after it has loaded it as a yardstick.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), yardstick, ("index_scale",)) as pool:
        return pool.submit(_with_cache, work, folder).result()


def _with_cache(work: Callable[[Path], T], folder: Path) -> T:
    os.environ["LINGEN_CACHE"] = str(folder.parent / "cache")
    return work(folder)


def _make(folder: Path) -> float:
    """Seconds to make the index."""
    begin = time.perf_counter()
    _data(folder).setup()
    return time.perf_counter() - begin


def _data(folder: Path) -> ClipData:
    data = DataConfig(
        shards=Shards(video=str(folder / manifest.NAME)), mix=PerKind(image=0, video=1), batch=PerKind(video=8),
        frames=16, lengths=[32, 64], size=(32, 32), sizes=[(32, 48), (32, 64)], fps=16.0, workers=WORKERS,
    )  # fmt: skip
    return ClipData(Recipe(data=data))


def _start(folder: Path) -> dict[str, float]:
    """Opens the data anew, as a resumed run does."""
    begin = time.perf_counter()
    batches: Any = iter(_data(folder).train_dataloader())
    next(batches)
    first = time.perf_counter() - begin
    for batch in islice(batches, BATCHES):
        assert not batch.drops
    memory = [_memory(worker.pid) for worker in batches._workers]
    return {
        "first": first,
        "manifest": (folder / manifest.NAME).stat().st_size,
        "resident": max(one["Rss"] for one in memory),
        "private": max(one["Private_Clean"] + one["Private_Dirty"] for one in memory),
    }


def _memory(process: int) -> dict[str, int]:
    """Memory of a process in bytes, under the kernel's names; Linux only."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    return {name.rstrip(":"): int(size) * 1024 for name, size, *_ in map(str.split, lines)}
