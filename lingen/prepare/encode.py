"""Samples encoded once, by the frozen parts of a recipe, instead of at every step: `lingen encode`. One set holds the
samples of all stages; each stage takes those of its own shapes."""

import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lingen.data.acting import DrawnIndex
from lingen.data.ahead import Ahead
from lingen.data.batch import Progress, no_progress
from lingen.data.buckets import Pool, Shape
from lingen.data.captions import captions_of
from lingen.data.datamodule import ClipData
from lingen.data.decode import decode_sample
from lingen.data.fingerprint import differences, frozen_settings, hash_settings, hash_weights
from lingen.data.follow import follow_parent
from lingen.data.index import Index, short_names
from lingen.data.latents import LATENTS_NPY, TEXT
from lingen.data.manifest import About, Row, media_hash
from lingen.data.shards import parse_sample
from lingen.data.sources import Reader
from lingen.frozen import check_ready, is_trained
from lingen.media import as_floats
from lingen.prepare.journal import JournalEntry, Note, Part, SetFolder, ShardStream, name_for
from lingen.prepare.report import Report, close_set
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import AUTOENCODERS, TEXT_ENCODERS
from lingen.recipe.sections import KINDS, Recipe
from lingen.text import TextEncoder, with_frame_rate


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


def _drawn(stages: Sequence[Recipe]) -> dict[str, Any]:
    """What draws the stages' clips, files by their contents: samples of two seeds have the same keys."""

    def content(value: Any) -> Any:
        return hash_weights(Path(value)) if isinstance(value, str) and Path(value).is_file() else value

    return {
        f"{f'stages.{stage.stage}.' * bool(stage.stage)}data.synthetic": {
            key: content(value) for key, value in stage.data.synthetic.items()
        }
        for stage in stages
        if stage.data.synthetic and not any(getattr(stage.data.shards, kind) for kind in KINDS)
    }


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
        captions, (frames, height, width) = captions_of(members), task.shape
        available = _available(task.samples.records[task.number], task.fps)
        start = min((task.window * frames + 0.5) / max(1, available - frames + 1), 1 - 1e-9)
        kind, fps = ("video", task.fps) if task.fps else ("image", 1.0)
        clip = decode_sample(members, kind, frames=frames, size=(height, width), fps=fps, start=start)
        return LoadedClip(clip.pixels, captions)
    except (OSError, ValueError) as error:
        return LoadedClip(torch.empty(0), [], str(error))


class Encoders:
    """The frozen parts of a recipe on a device.

    Args:
        recipe: any of the stages.
        device: where they run.
        precision: of what is kept, ``float16`` or ``float32``; half is enough for latents of a spread near 1 (ours).
    Raises:
        RecipeError: a part lacks something; all of them are named."""

    def __init__(self, recipe: Recipe, device: str, precision: str):
        self.dtype: torch.dtype = getattr(torch, precision)
        self.prefix = recipe.data.fps_prefix
        self.device = torch.device(device)
        self.autoencoder = AUTOENCODERS.build(recipe.autoencoder)
        text = {number: TEXT_ENCODERS.build(component) for number, component in enumerate(recipe.text)}
        self.text = {number: part for number, part in text.items() if not is_trained(part)}
        parts: list[nn.Module] = [self.autoencoder, *self.text.values()]
        check_ready(parts)
        for part in parts:
            part.to(self.device).eval().requires_grad_(False)
        self._null: dict[float, dict[int, Tensor]] = {}
        """Frame rate -> number of a text encoder -> tokens [n w] of no text, which it is asked for once."""

    @torch.no_grad()
    def latents(self, clips: Sequence[Tensor]) -> Tensor:
        """uint8 [3 t h w] each -> latents [b c t h w]."""
        return self.autoencoder.encode(as_floats(torch.stack(list(clips)).to(self.device)))

    @torch.no_grad()
    def tokens(self, captions: Sequence[str], fps: float) -> dict[int, list[Tensor]]:
        """Number of a text encoder -> tokens [n w] of each caption."""
        texts = [with_frame_rate(caption, fps if self.prefix else 0.0) for caption in captions]
        found = {}
        for number, encoder in self.text.items():
            tokens, mask = cast(TextEncoder, encoder).encode(texts)
            found[number] = [one[real] for one, real in zip(tokens, mask, strict=True)]
        return found

    def members(self, latents: Tensor, captions: Sequence[str], fps: float, source: str) -> dict[str, bytes]:
        """The members of a sample, as `lingen.data.latents` reads them. ValueError for what is not finite here.

        Args:
            latents: [c t h w]
            captions: at least one.
            fps: of the clip, 0 for an image.
            source: where it came from, for the JSON."""
        if fps not in self._null:
            self._null[fps] = {number: nothing for number, (nothing,) in self.tokens([""], fps).items()}
        tokens, null = self.tokens(captions, fps), self._null[fps]
        about: dict[str, Any] = {"captions": list(captions), "source": source}
        about["tokens"] = {str(number): [len(one) for one in each] for number, each in tokens.items()}
        about["null"] = {str(number): len(nothing) for number, nothing in null.items()}
        told = {number: torch.cat([*each, null[number]]) for number, each in tokens.items()}
        text = {TEXT.format(number): self._npy(each, "text") for number, each in told.items()}
        stored = {LATENTS_NPY: self._npy(latents, "latents"), **text}
        return stored | {"json": json.dumps(about, ensure_ascii=False).encode()}

    def _npy(self, tensor: Tensor, what: str) -> bytes:
        tensor = tensor.to(self.dtype).cpu().contiguous()
        if not torch.isfinite(tensor).all():
            kind = str(self.dtype).removeprefix("torch.")
            raise ValueError(f"{what} not finite: as {kind} they hold NaN or infinity")
        buffer = io.BytesIO()
        np.save(buffer, tensor.numpy(), allow_pickle=False)
        return buffer.getvalue()


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
    common = {**settings, **_drawn(stages), "precision": how.precision, "validation": how.validation}
    folder = SetFolder(out, how.part, common)
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
