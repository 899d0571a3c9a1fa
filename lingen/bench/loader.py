"""How fast the loader is: raw, encoded and remote shards beside a bare PyAV loop and plain webdataset.

Both sides make the same clips. Every measurement of a loader begins with batches that do not count, until all workers
are at work and as many batches are made ahead as at its end.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader

from lingen.bench import rivals
from lingen.bench.index_scale import index_at_scale
from lingen.bench.loopback import serve
from lingen.bench.pairs import Comparison, Measured, Watch, measure
from lingen.bench.rivals import BareLoop, Job, Wanted
from lingen.config import DataConfig, PerKind, Recipe, Shards
from lingen.data import manifest, order
from lingen.data.datamodule import ClipData
from lingen.data.dataset import Clips
from lingen.data.describe import index_folder
from lingen.data.fingerprint import fingerprint, frozen_settings
from lingen.data.locations import expand
from lingen.data.manifest import About, Row
from lingen.data.shards import read_shard, scan, write_shards
from lingen.folder import git_commit, versions
from lingen.registry import RecipeError

WANTED = Wanted(16, (256, 256), 16.0)
"""The clips of the raw comparison."""
BATCH = 4
COPIES = 8
"""Times that each clip of the footage stands in the shards."""
LATENTS = (16, 34, 32, 32)
"""[c t h w] of an encoded clip: 17 s at 256x256 through LinGen's autoencoder."""
TEXTS = ((128, 4096), (128, 1472))
"""Tokens and widths of two text encoders, as UL2 and ByT5 have them."""
ENCODED = 64
"""Encoded samples."""
DELAY = 0.02
"""Seconds that each answer of the remote server is late."""


def bench(
    shards: str, out: Path, *, pairs: int = 7, seconds: float = 5.0, rows: int = 1_000_000,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Measures everything and writes ``loader.json`` into a folder.

    Args:
        shards: footage: tar files of clips of a second and more, as `lingen data fetch footage` makes them.
        pairs: of measurements for each comparison.
        seconds: that a measurement takes about.
        rows: of the synthetic manifest; 0: none is made.
        progress: called with the pairs done and all pairs.
    """
    with tempfile.TemporaryDirectory(prefix="lingen-bench-") as folder, contextlib.ExitStack() as stack:
        made = make_shards(shards, Path(folder))
        comparisons = list(compare(made, seconds, stack))
        results = []
        for number, comparison in enumerate(comparisons):
            tell = lambda pair, before=number * pairs: progress(before + pair, len(comparisons) * pairs)  # noqa: E731
            results.append(measure(comparison, pairs, tell))
        result = {
            "command": " ".join(["lingen", *sys.argv[1:]]),
            "cores": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "versions": versions(),
            "date": time.strftime("%Y-%m-%d"),
            "commit": git_commit(),
            "clip": {"frames": WANTED.frames, "size": WANTED.size, "fps": WANTED.fps, "batch": BATCH},
            "encoded": {"latents": LATENTS, "text": TEXTS, "megabytes": made.encoded_megabytes},
            "comparisons": results,
        }
    if rows:
        result["index"] = index_at_scale(rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "loader.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


# what is read


class Made(NamedTuple):
    """Shards for the comparisons."""

    raw: Path
    files: Path
    """The same clips as files: ``KEY.mp4``."""
    encoded: Path
    encoded_megabytes: float
    """Of one encoded sample."""


def make_shards(shards: str, folder: Path) -> Made:
    """Copies of the footage as shards and as files, and encoded samples of random numbers: only their bytes matter."""
    clips = [sample for path in expand(shards, "--shards") for sample in read_shard(Path(path)) if "mp4" in sample]
    if not clips:
        raise RecipeError(f"--shards: '{shards}' holds no mp4; make some with `lingen data fetch footage`.")
    (folder / "files").mkdir()
    samples = [
        {**clip, "__key__": f"{clip['__key__']}-{copy}"} for copy in range(COPIES) for clip in clips
    ]  # each shard holds every clip
    for sample in samples:
        (folder / "files" / f"{sample['__key__']}.mp4").write_bytes(sample["mp4"])
    write_shards(samples, str(folder / "raw" / "video-%03d.tar"), per_shard=len(clips) * COPIES // 4)
    index_folder(folder / "raw", 0)
    size = _write_encoded(folder / "encoded")
    return Made(folder / "raw", folder / "files", folder / "encoded", round(size / 1e6, 3))


def _write_encoded(folder: Path) -> int:
    random = np.random.default_rng(0)

    def npy(shape: Sequence[int]) -> bytes:
        stream = io.BytesIO()
        np.save(stream, random.standard_normal(shape, np.float32).astype(np.float16))
        return stream.getvalue()

    def sample(number: int) -> dict[str, Any]:
        text = {f"text{i}.npy": npy(shape) for i, shape in enumerate(TEXTS)}
        about = {"captions": ["a clip"], "tokens": {str(i): [shape[0]] for i, shape in enumerate(TEXTS)}}
        return {"__key__": f"{number:04d}", "latents.npy": npy(LATENTS), **text, "json": about}

    paths = write_shards(map(sample, range(ENCODED)), str(folder / "video-%03d.tar"), per_shard=ENCODED // 4)
    frames, (height, width), fps = WANTED
    rows = [
        Row(one.key, path.name, one.start, one.end - one.start, "latents", height, width, frames, fps)
        for path in paths
        for one in scan(path)
    ]
    settings = frozen_settings(Recipe())
    manifest.write(folder / manifest.NAME, rows, About(fingerprint(settings), settings))
    return rows[0].length


# the two sides


def compare(made: Made, seconds: float, stack: contextlib.ExitStack) -> Iterator[Comparison]:
    """The comparisons, each with as many clips in a measurement as take about so long."""
    frames = WANTED.frames
    for workers in (1, 2):
        bare = BareLoop(WANTED, workers)
        stack.callback(bare.close)
        raw = partial(Loader, str(made.raw / manifest.NAME), workers)
        clips = raw(1).clips_in(seconds)
        ours = raw(clips)
        theirs = partial(_run_bare, bare, ours, made.files)
        yield Comparison("raw", "bare PyAV loop", workers, ours.run, theirs, frames)
        plain = partial(rivals.plain_webdataset, sorted(made.raw.glob("*.tar")), batch=BATCH, workers=workers)
        decoded = plain(read=rivals.ReadRaw(WANTED), collate=rivals.stack_clips)
        yield Comparison(
            "raw",
            "plain webdataset with the same decode",
            workers,
            ours.run,
            partial(_run_plain, decoded, clips, workers),
            frames,
        )
    for workers in (1, 2):
        encoded = partial(Loader, str(made.encoded / manifest.NAME), workers)
        clips = encoded(1).clips_in(seconds)
        ours = encoded(clips)
        plain = partial(rivals.plain_webdataset, sorted(made.encoded.glob("*.tar")), batch=BATCH, workers=workers)
        arrays = plain(read=rivals.read_arrays, collate=rivals.stack_arrays)
        theirs = partial(_run_plain, arrays, clips, workers)
        yield Comparison("encoded", "plain webdataset, np.load and stack", workers, ours.run, theirs, 0)
        counted = plain(read=rivals.count_bytes, collate=None)
        theirs = partial(_run_plain, counted, clips, workers)
        yield Comparison("encoded", "plain webdataset that reads and hands nothing over", workers, ours.run, theirs, 0)
    for name, folder in (("raw", made.raw), ("encoded", made.encoded)):
        near = Loader(str(folder / manifest.NAME), 2, 1)
        clips = near.clips_in(seconds)
        far = Loader(f"{stack.enter_context(_far_away(folder))}/{manifest.NAME}", 2, clips)
        near = Loader(str(folder / manifest.NAME), 2, clips)
        rival = f"the same from the local disk; each answer is {1000 * DELAY:g} ms late"
        yield Comparison(f"{name} over http", rival, 2, far.run, near.run, frames if name == "raw" else 0)


class Loader:
    """The loader on some shards.

    Args:
        shards: a manifest.
        workers: processes.
        clips: in a measurement.
    """

    def __init__(self, shards: str, workers: int, clips: int):
        data = DataConfig(
            shards=Shards(video=shards), mix=PerKind(image=0, video=1), batch=PerKind(video=BATCH), workers=workers,
            frames=WANTED.frames, size=WANTED.size, fps=WANTED.fps,
        )  # fmt: skip
        self.data = ClipData(Recipe(data=data))
        self.workers = workers
        self.batches = -(-clips // BATCH)

    def run(self, pair: int) -> Measured:
        """One pair's batches."""
        self.data.start_step = self.first(pair)
        return _take(self.data.train_dataloader(), self.batches, self.workers)

    def first(self, pair: int) -> int:
        """Step at which the batches of a pair begin."""
        return pair * (self.batches + _warm(self.workers))

    def clips_in(self, seconds: float) -> int:
        """About how many clips it makes in this time, in whole epochs of the shards so that all sides do the same."""
        tried = self.run(0)
        pool = _clips_of(self.data).pools["video"]
        return len(pool) * max(1, round(tried.clips / tried.seconds * seconds / len(pool)))

    def jobs(self, pair: int, files: Path) -> list[Job]:
        """The clips of a pair's batches as pieces of files."""
        clips = _clips_of(self.data)
        start = self.first(pair) + _warm(self.workers)
        jobs = []
        for place in islice(self.data.places(start), self.batches):
            for number in place.numbers:
                choice = clips._choose(place, number)
                index = clips.pools[choice.kind].index
                begin = order.uniform("start", choice.stream, choice.epoch, index.where(choice.number))
                jobs.append(Job(files / f"{index.key(choice.number)}.mp4", begin))
        return jobs


def _clips_of(data: ClipData) -> Clips:
    data.setup()
    assert data.train is not None
    return data.train


def _warm(workers: int) -> int:
    """Batches that do not count: as many as are made ahead, and one more for each worker."""
    return 3 * workers


def _take(loader: DataLoader[Any], count: int, workers: int) -> Measured:
    """So many batches, once the loader is at full speed."""
    batches: Any = iter(loader)
    for _ in range(_warm(workers)):
        next(batches)
    watch = Watch(worker.pid for worker in batches._workers)
    for _ in range(count):
        next(batches)
    return watch.stop(count * BATCH)


def _run_bare(bare: BareLoop, loader: Loader, files: Path, pair: int) -> Measured:
    jobs = loader.jobs(pair, files)
    watch = Watch(bare.processes)
    bare.run(jobs)
    return watch.stop(len(jobs))


def _run_plain(plain: DataLoader[Any], clips: int, workers: int, pair: int) -> Measured:
    return _take(plain, -(-clips // BATCH), workers)


@contextlib.contextmanager
def _far_away(folder: Path) -> Iterator[str]:
    """A server in a process of its own, with answers that are late."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(folder, there), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.terminate()
        process.join()


def _serve(folder: Path, told: Any) -> None:
    with serve(folder, delay=DELAY) as address:
        told.send(address)
        time.sleep(86400)
