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
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from lingen.bench import rivals
from lingen.bench.index_scale import index_at_scale
from lingen.bench.loopback import serve
from lingen.bench.pairs import Comparison, Measured, Watch, measure
from lingen.bench.rivals import BareLoop, Job, Wanted
from lingen.data import latents, manifest, order
from lingen.data.datamodule import ClipData
from lingen.data.dataset import Clips
from lingen.data.fingerprint import fingerprint, frozen_settings
from lingen.data.locations import expand
from lingen.data.manifest import About, Row
from lingen.data.shards import read_shard, scan, write_shards
from lingen.prepare.index import index_folder
from lingen.provenance import git_commit, versions
from lingen.recipe.registry import AUTOENCODERS, TEXT_ENCODERS, RecipeError
from lingen.recipe.sections import DataConfig, PerKind, Recipe, Shards

RAW = Recipe(data=DataConfig(frames=16, size=(256, 256), fps=16.0))
"""The clips of the raw comparison."""
ENCODED = Recipe(
    autoencoder={"name": "tae"},
    text=[{"name": "ul2"}, {"name": "byt5"}],
    data=DataConfig(frames=272, size=(256, 256), fps=16.0),
)
"""Those of the encoded one: 17 s through LinGen's autoencoder, and two text encoders."""
TOKENS = 128
"""Of each text encoder for a caption."""
BATCH = 4
COPIES = 8
"""Times that each clip of the footage stands in the shards."""
SAMPLES = 64
"""Encoded ones."""
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
            "raw": _told(RAW),
            "encoded": {**_told(ENCODED), "megabytes": made.encoded_megabytes},
            "comparisons": results,
        }
    if rows:
        result["index"] = index_at_scale(rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "loader.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _told(recipe: Recipe) -> dict[str, Any]:
    return {"frames": recipe.data.frames, "size": recipe.data.size, "fps": recipe.data.fps, "batch": BATCH}


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
    """Shards of random numbers as `lingen encode` stores them; the bytes of a sample."""
    random, data = np.random.default_rng(0), ENCODED.data
    with torch.device("meta"):
        autoencoder = AUTOENCODERS.build(ENCODED.autoencoder)
        encoders = [TEXT_ENCODERS.build(component) for component in ENCODED.text]
    size = latents.Wanted(autoencoder.channels, autoencoder.strides, frozenset()).latents((data.frames, *data.size))

    def npy(shape: Sequence[int]) -> bytes:
        stream = io.BytesIO()
        np.save(stream, random.standard_normal(shape, np.float32).astype(np.float16))
        return stream.getvalue()

    def sample(number: int) -> dict[str, Any]:
        text = {latents.TEXT.format(i): npy((TOKENS, encoder.dim)) for i, encoder in enumerate(encoders)}
        about = {"captions": ["a clip"], "tokens": {str(i): [TOKENS] for i in range(len(encoders))}}
        return {"__key__": f"{number:04d}", latents.LATENTS: npy(size), **text, "json": about}

    paths = write_shards(map(sample, range(SAMPLES)), str(folder / "video-%03d.tar"), per_shard=SAMPLES // 4)
    rows = [
        Row(one.key, path.name, one.start, one.end - one.start, "latents", *data.size, data.frames, data.fps)
        for path in paths
        for one in scan(path)
    ]
    settings = frozen_settings(ENCODED)
    manifest.write(folder / manifest.NAME, rows, About(fingerprint(settings), settings))
    return rows[0].length


# the two sides


def compare(made: Made, seconds: float, stack: contextlib.ExitStack) -> Iterator[Comparison]:
    """The comparisons, each with as many clips in a measurement as take about so long."""
    for workers in (1, 2):
        yield from _compare_raw(made, workers, seconds, stack)
    for workers in (1, 2):
        yield from _compare_encoded(made, workers, seconds)
    for what, recipe, folder in (("raw", RAW, made.raw), ("encoded", ENCODED, made.encoded)):
        near = _loader(recipe, str(folder / manifest.NAME), 2, seconds)
        far = Loader(recipe, f"{stack.enter_context(_far_away(folder))}/{manifest.NAME}", 2, near.clips)
        beside = f"the same from the local disk; each answer is {1000 * DELAY:g} ms late"
        yield Comparison(f"{what} over http", beside, 2, far.run, near.run, recipe.data.frames if recipe is RAW else 0)


def _compare_raw(made: Made, workers: int, seconds: float, stack: contextlib.ExitStack) -> Iterator[Comparison]:
    ours = _loader(RAW, str(made.raw / manifest.NAME), workers, seconds)
    wanted = Wanted(RAW.data.frames, RAW.data.size, RAW.data.fps)
    bare = BareLoop(wanted, workers)
    stack.callback(bare.close)
    theirs = partial(_run_bare, bare, ours, made.files)
    yield Comparison("raw", "bare PyAV loop", workers, ours.run, theirs, wanted.frames)
    shards = sorted(made.raw.glob("*.tar"))
    plain = rivals.plain_webdataset(shards, rivals.ReadRaw(wanted), rivals.stack_clips, BATCH, workers)
    run = partial(_run_plain, plain, ours.clips, workers)
    yield Comparison("raw", "plain webdataset with the same decode", workers, ours.run, run, wanted.frames)


def _compare_encoded(made: Made, workers: int, seconds: float) -> Iterator[Comparison]:
    ours = _loader(ENCODED, str(made.encoded / manifest.NAME), workers, seconds)
    shards = sorted(made.encoded.glob("*.tar"))
    for beside, read, collate in (
        ("plain webdataset, np.load and stack", rivals.read_arrays, rivals.stack_arrays),
        ("plain webdataset that reads and hands nothing over", rivals.count_bytes, None),
    ):
        plain = rivals.plain_webdataset(shards, read, collate, BATCH, workers)
        run = partial(_run_plain, plain, ours.clips, workers)
        yield Comparison("encoded", beside, workers, ours.run, run, 0)


class Loader:
    """The loader on some shards.

    Args:
        recipe: which clips.
        shards: a manifest.
        workers: processes.
        clips: in a measurement.
    """

    def __init__(self, recipe: Recipe, shards: str, workers: int, clips: int):
        mix, batch = PerKind(image=0, video=1), PerKind(video=BATCH)
        data = replace(recipe.data, shards=Shards(video=shards), mix=mix, batch=batch, workers=workers)
        self.data = ClipData(replace(recipe, data=data))
        self.workers = workers
        self.clips = clips
        self.batches = -(-clips // BATCH)

    def run(self, pair: int) -> Measured:
        """One pair's batches."""
        self.data.start_step = self.first(pair)
        return _take(self.data.train_dataloader(), self.batches, self.workers)

    def first(self, pair: int) -> int:
        """Step at which the batches of a pair begin."""
        return pair * (self.batches + _warm(self.workers))

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


def _loader(recipe: Recipe, shards: str, workers: int, seconds: float) -> Loader:
    """One whose measurements take about so long, in whole epochs of the shards, so that all sides do the same."""
    tried = Loader(recipe, shards, workers, BATCH)
    measured, epoch = tried.run(0), len(_clips_of(tried.data).pools["video"])
    epochs = max(1, round(measured.clips / measured.seconds * seconds / epoch))
    return Loader(recipe, shards, workers, epochs * epoch)


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
