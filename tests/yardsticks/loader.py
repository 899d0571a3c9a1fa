"""``lingen bench loader``: how fast raw, encoded and remote shards are read, beside other ways to the same batches.

Both sides make the same clips. Every measurement of a loader begins with batches that do not count, until all workers
are at work and as many batches are made ahead as at its end.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from lingen.data import latents, manifest
from lingen.data.datamodule import ClipData
from lingen.data.dataset import Clips
from lingen.data.fingerprint import frozen_settings, hash_settings
from lingen.data.locations import expand
from lingen.data.manifest import About, Row
from lingen.data.shards import read_shard, scan_shard, write_shards
from lingen.prepare.index import index_folder
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import AUTOENCODERS, TEXT_ENCODERS
from lingen.recipe.sections import DataConfig, PerKind, Recipe, Shards

from .index_scale import index_at_scale
from .pairs import Measured, Watch, measure
from .results import head

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
    Raises:
        RecipeError: there is no footage.
    """
    from .rivals import comparisons

    with tempfile.TemporaryDirectory(prefix="lingen-bench-") as folder, contextlib.ExitStack() as stack:
        made = make_shards(shards, Path(folder))
        compared = list(comparisons(made, seconds, stack))
        results = []
        for number, comparison in enumerate(compared):
            tell = lambda pair, before=number * pairs: progress(before + pair, len(compared) * pairs)  # noqa: E731
            results.append(measure(comparison, pairs, tell))
        result = {
            **{"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
            **head({}),
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
    size = latents.LatentRequirements(autoencoder.channels, autoencoder.strides, frozenset()).latents(
        (data.frames, *data.size)
    )

    def npy(shape: Sequence[int]) -> bytes:
        stream = io.BytesIO()
        np.save(stream, random.standard_normal(shape, np.float32).astype(np.float16))
        return stream.getvalue()

    def sample(number: int) -> dict[str, Any]:
        text = {latents.TEXT.format(i): npy((TOKENS, encoder.dim)) for i, encoder in enumerate(encoders)}
        about = {"captions": ["a clip"], "tokens": {str(i): [TOKENS] for i in range(len(encoders))}}
        return {"__key__": f"{number:04d}", latents.LATENTS_NPY: npy(size), **text, "json": about}

    paths = write_shards(map(sample, range(SAMPLES)), str(folder / "video-%03d.tar"), per_shard=SAMPLES // 4)
    rows = [
        Row(one.key, path.name, one.start, one.end - one.start, "latents", *data.size, data.frames, data.fps)
        for path in paths
        for one in scan_shard(path)
    ]
    settings = frozen_settings(ENCODED)
    manifest.write(folder / manifest.NAME, rows, About(hash_settings(settings), settings))
    return rows[0].length


# how it is read


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
        return take(self.data.train_dataloader(), self.batches, self.workers)

    def first(self, pair: int) -> int:
        """Step at which the batches of a pair begin."""
        return pair * (self.batches + warm(self.workers))

    def clips_of(self) -> Clips:
        """What its batches are made of."""
        self.data.setup()
        assert self.data.train is not None
        return self.data.train


def loader_for(recipe: Recipe, shards: str, workers: int, seconds: float) -> Loader:
    """One whose measurements take about so long, in whole epochs of the shards, so that all sides do the same."""
    tried = Loader(recipe, shards, workers, BATCH)
    measured, epoch = tried.run(0), len(tried.clips_of().pools["video"])
    epochs = max(1, round(measured.clips / measured.seconds * seconds / epoch))
    return Loader(recipe, shards, workers, epochs * epoch)


def warm(workers: int) -> int:
    """Batches that do not count: as many as are made ahead, and one more for each worker."""
    return 3 * workers


def take(loader: DataLoader[Any], count: int, workers: int) -> Measured:
    """So many batches, once the loader is at full speed."""
    batches: Any = iter(loader)
    for _ in range(warm(workers)):
        next(batches)
    watch = Watch(worker.pid for worker in batches._workers)
    for _ in range(count):
        next(batches)
    return watch.stop(count * BATCH)
