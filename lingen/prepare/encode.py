"""Samples encoded once, by the frozen parts of a recipe, instead of at every step: `lingen encode`. One set holds the
samples of all stages; each stage takes those of its own shapes."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lingen.data.acting import DrawnIndex
from lingen.data.ahead import Ahead
from lingen.data.batch import Progress, no_progress
from lingen.data.buckets import Pool, Shape
from lingen.data.captions import captions_of
from lingen.data.datamodule import ClipData
from lingen.data.decode import decode_sample
from lingen.data.fingerprint import differences, frozen_settings, hash_settings
from lingen.data.follow import follow_parent
from lingen.data.index import Index, short_names
from lingen.data.latents import LATENTS_NPY
from lingen.data.manifest import About, Row, media_hash
from lingen.data.shards import parse_sample
from lingen.data.sources import Reader
from lingen.prepare.encoders import Encoders
from lingen.prepare.journal import JournalEntry, Note, Part, SetFolder, ShardStream, name_for
from lingen.prepare.report import Report, close_set
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import KINDS, Recipe


class Task(NamedTuple):
    """A clip to encode."""

    samples: Index
    number: int
    """Number of its sample in the index."""
    shape: Shape
    fps: float
    """0 for an image."""
    window: int
    """Number of the clip among the consecutive clips of its video."""
    key: str
    """Its name among the encoded samples."""
    where: str
    """``shard:key`` of its sample, the shard's name below the common folder of all stages."""

    @property
    def mark(self) -> str:
        """Hash of its media; empty where there is no manifest."""
        digits = int(self.samples.records[self.number]["hash"])
        return f"{digits:016x}" if digits else ""


class LoadedClip(NamedTuple):
    """A clip before it is encoded."""

    pixels: Tensor
    """uint8 [3 t h w]; empty where it cannot be used."""
    captions: list[str]
    reason: str = ""


def tasks_of(stages: Sequence[Recipe], kind: str, part: Part, *, validation: bool = False) -> list[Task]:
    """The clips of a kind that the stages train on, each once: all that fit one behind the other into each video.

    Args:
        part: the share that is asked for; neighbours in a shard stay together.
        validation: those of the held-out shards instead."""
    pools: list[tuple[float, Pool]] = []
    for recipe in stages:
        data = ClipData(recipe)
        clips = data.validation if validation else data.train
        if kind not in clips.pools:
            continue
        pool = clips.pools[kind]
        if pool.index.encoded:
            raise RecipeError(f"data.shards.{kind} of stage '{recipe.stage}' is encoded already.")
        pools.append((recipe.data.fps if kind == "video" else 0.0, pool))
    shards = list(dict.fromkeys(shard for _, pool in pools for shard in pool.index.shards))
    numbered, names = {shard: number for number, shard in enumerate(shards)}, short_names(shards)
    several = Counter((shape, fps) for fps, pool in pools for shape in pool.shapes)
    taken: dict[tuple[Shape, float], np.ndarray] = {}
    tasks, keys = list[Task](), set[str]()
    for fps, pool in pools:
        own = np.array([numbered[shard] for shard in pool.index.shards])
        for shape, rows in zip(pool.shapes, pool.rows, strict=True):
            numbers = np.asarray(rows[:])
            if several[shape, fps] > 1:
                records, earlier = pool.index.records[numbers], taken.get((shape, fps), np.zeros(0, np.int64))
                offsets = numbers if isinstance(pool.index, DrawnIndex) else records["offset"]
                places = (own[records["shard"]] << 40) + offsets
                numbers, taken[shape, fps] = numbers[~np.isin(places, earlier)], np.union1d(earlier, places)
            for number in numbers[part.slice_of(len(numbers))].tolist():
                record, key = pool.index.records[number], pool.index.key(number)
                where = f"{names[own[record['shard']]]}:{key}"
                for window in range(max(1, _available(record, fps) // shape.frames)):
                    place = f"{where} {record['offset']} {fps:g}"
                    name = name_for(f"{key}-{shape}-{window:02d}", place, keys)
                    tasks.append(Task(pool.index, number, shape, fps, window, name, where))
    return tasks


def _available(record: np.void, fps: float) -> int:
    """Frames that a video has at a frame rate; 0 for an image, or where the manifest does not tell."""
    return int(record["frames"] / float(record["fps"]) * fps + 1e-3) if record["fps"] > 0 else 0


def _load(reader: Reader, task: Task) -> LoadedClip:
    """Decodes the clip of a task; what cannot be used comes with its reason."""
    if isinstance(task.samples, DrawnIndex):
        return LoadedClip(*task.samples.draw(task.number, task.shape, task.fps))
    try:
        piece = Ahead(task.samples, reader).get(task.number)
        members = parse_sample(piece.data, task.samples.key(task.number))
        captions = captions_of(members)
        return LoadedClip(_decode(members, task), captions)
    except (OSError, ValueError) as error:
        return LoadedClip(torch.empty(0), [], str(error))


def _decode(members: dict[str, bytes], task: Task) -> Tensor:
    frames, height, width = task.shape
    available = _available(task.samples.records[task.number], task.fps)
    start = (task.window * frames + 0.5) / max(1, available - frames + 1)
    kind = "video" if task.fps else "image"
    size, fps = (height, width), task.fps or 1.0
    return decode_sample(members, kind, frames=frames, size=size, fps=fps, start=min(start, 1 - 1e-9)).pixels


class Encoding(NamedTuple):
    """How to encode."""

    device: str = "cpu"
    precision: str = "float16"
    part: Part = Part()
    workers: int = 0
    """Processes that decode."""
    shard_mb: int = 1000
    validation: bool = False
    """The held-out shards instead of the training shards."""


def encode_shards(stages: Sequence[Recipe], out: Path, how: Encoding, progress: Progress = no_progress) -> Report:
    """Encodes this part of what the stages train on; writes the manifest once all parts are done. The same call again
    goes on where a killed one was. RecipeError where the stages do not have the same frozen parts, where a part cannot
    run, and as `SetFolder`."""
    frozen = frozen_settings(stages[0])
    for stage in stages[1:]:
        if (other := frozen_settings(stage)) != frozen:
            raise RecipeError(
                f"Stages '{stages[0].stage}' and '{stage.stage}' encode in different ways: "
                f"{'; '.join(differences(frozen, other))} (there: '{stages[0].stage}'). Encode them one by one, with "
                "--stage and a folder for each."
            )
    settings = {**frozen, "null_text": True}
    encoders = Encoders(stages[0], how.device, how.precision)
    folder = SetFolder(out, how.part, {**settings, "precision": how.precision, "validation": how.validation})
    with folder.locked():
        work = {kind: tasks_of(stages, kind, how.part, validation=how.validation) for kind in KINDS}
        total, done = sum(map(len, work.values())), 0
        for kind, tasks in work.items():
            stream = ShardStream(folder, kind, how.shard_mb * 1_000_000)
            todo = [task for task in tasks if not stream.has(task.key, task.mark)]
            done += len(tasks) - len(todo)
            batch = max(getattr(stage.data.batch, kind) for stage in stages)
            for group in _groups(todo, stages[0], how.workers, batch):
                _encode_group(group, encoders, stream)
                done += len(group)
                progress(done, total)
            stream.commit()
        complete = folder.finish()
    return close_set(folder, About(hash_settings(settings), settings), complete)


Group = list[tuple[Task, LoadedClip]]


def _groups(tasks: list[Task], recipe: Recipe, workers: int, batch: int) -> Iterator[Group]:
    """Decoded clips, up to `batch` of one shape at a time, in the order of the tasks."""
    clips: Any = tasks  # each is a batch of its own, which a worker loads
    load = partial(_load, Reader(recipe.data.remote))
    loader: DataLoader[LoadedClip] = DataLoader(
        clips, batch_size=None, collate_fn=load, num_workers=min(workers, len(tasks)), worker_init_fn=follow_parent,
        multiprocessing_context="fork" if workers and tasks and sys.platform == "linux" else None,
    )  # fmt: skip
    for _, same in groupby(zip(tasks, loader, strict=True), lambda one: one[0].shape):
        while group := list(islice(same, batch)):
            yield group


def _encode_group(group: Group, encoders: Encoders, stream: ShardStream) -> None:
    """Writes the usable samples of a group, and notes why the others are not."""
    good = [loaded.pixels for _, loaded in group if not loaded.reason]
    latents = iter(encoders.latents(good)) if good else iter(())
    for task, loaded in group:
        try:
            if loaded.reason:
                raise ValueError(loaded.reason)
            members = encoders.members(next(latents), loaded.captions, task.fps, task.where)
        except ValueError as error:
            stream.note([Note(task.key, str(error)), Note(task.key, mark=task.mark)])
            continue
        frames, height, width = task.shape
        row = Row(
            task.key, "", 0, 0, "latents", height, width, frames, task.fps, len(loaded.captions),
            len(loaded.captions[0]), LATENTS_NPY, media_hash(members[LATENTS_NPY]), task.samples.source(task.number),
        )  # fmt: skip
        stream.note([Note(task.key, mark=task.mark)])  # before the sample is written: both belong to one record
        stream.write({"__key__": task.key, **members}, JournalEntry(row, (), task.key, task.mark))
