"""What the loader is measured against: a bare PyAV loop, plain webdataset, and itself over a slow network."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader

from lingen.data import manifest, order
from lingen.data.captions import captions_of
from lingen.data.decode import decode_sample

from . import loader
from .loader import BATCH, Loader, Made, loader_for, take, warm
from .loopback import serve
from .pairs import Comparison, Measured, Watch

DELAY = 0.02
"""Seconds that each answer of the remote server is late."""


def comparisons(made: Made, seconds: float, stack: contextlib.ExitStack) -> Iterator[Comparison]:
    """Each with as many clips in a measurement as take about so long."""
    for workers in (1, 2):
        yield from _raw(made, workers, seconds, stack)
    for workers in (1, 2):
        yield from _encoded(made, workers, seconds)
    for what, recipe, folder in (("raw", loader.RAW, made.raw), ("encoded", loader.ENCODED, made.encoded)):
        near = loader_for(recipe, str(folder / manifest.NAME), 2, seconds)
        far = Loader(recipe, f"{stack.enter_context(_far_away(folder))}/{manifest.NAME}", 2, near.clips)
        beside = f"the same from the local disk; each answer is {1000 * DELAY:g} ms late"
        yield Comparison(f"{what} over http", beside, 2, far.run, near.run, recipe.data.frames if what == "raw" else 0)


def _raw(made: Made, workers: int, seconds: float, stack: contextlib.ExitStack) -> Iterator[Comparison]:
    ours = loader_for(loader.RAW, str(made.raw / manifest.NAME), workers, seconds)
    wanted = Wanted(loader.RAW.data.frames, loader.RAW.data.size, loader.RAW.data.fps)
    bare = BareLoop(wanted, workers)
    stack.callback(bare.close)
    theirs = partial(_run_bare, bare, ours, made.files)
    yield Comparison("raw", "bare PyAV loop", workers, ours.run, theirs, wanted.frames)
    plain = plain_webdataset(sorted(made.raw.glob("*.tar")), ReadRaw(wanted), stack_clips, BATCH, workers)
    run = partial(_run_plain, plain, ours.clips, workers)
    yield Comparison("raw", "plain webdataset with the same decode", workers, ours.run, run, wanted.frames)


def _encoded(made: Made, workers: int, seconds: float) -> Iterator[Comparison]:
    ours = loader_for(loader.ENCODED, str(made.encoded / manifest.NAME), workers, seconds)
    shards = sorted(made.encoded.glob("*.tar"))
    for beside, read, collate in (
        ("plain webdataset, np.load and stack", read_arrays, stack_arrays),
        ("plain webdataset that reads and hands nothing over", count_bytes, None),
    ):
        plain = plain_webdataset(shards, read, collate, BATCH, workers)
        yield Comparison("encoded", beside, workers, ours.run, partial(_run_plain, plain, ours.clips, workers), 0)


def jobs(ours: Loader, pair: int, files: Path) -> list[Job]:
    """The clips of a pair's batches as pieces of files."""
    clips = ours.clips_of()
    found = []
    for place in islice(ours.data.places(ours.first(pair) + warm(ours.workers)), ours.batches):
        for number in place.numbers:
            choice = clips._choose(place, number)
            index = clips.pools[choice.kind].index
            begin = order.uniform("start", choice.stream, choice.epoch, index.where(choice.number))
            found.append(Job(files / f"{index.key(choice.number)}.mp4", begin))
    return found


def _run_bare(bare: BareLoop, ours: Loader, files: Path, pair: int) -> Measured:
    wanted = jobs(ours, pair, files)
    watch = Watch(bare.processes)
    bare.run(wanted)
    return watch.stop(len(wanted))


def _run_plain(plain: DataLoader[Any], clips: int, workers: int, pair: int) -> Measured:
    return take(plain, -(-clips // BATCH), workers)


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


# the bare loop


class Wanted(NamedTuple):
    """A clip as a stage wants it."""

    frames: int
    size: tuple[int, int]
    fps: float


class Job(NamedTuple):
    """A clip of a file."""

    path: Path
    start: float
    """0 <= start < 1: where between the first and the last possible beginning it begins."""


def bare_clip(job: Job, wanted: Wanted) -> UInt8[np.ndarray, "3 t h w"]:
    """A clip by PyAV's own means: seek to the key frame before it, decode up to its end, take the nearest frames, scale
    to cover the size, cut out the centre."""
    import av
    from av.video.reformatter import VideoReformatter

    step = 1 / wanted.fps
    with av.open(str(job.path)) as file:
        stream = file.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        base = float(stream.time_base or 1)
        duration = (stream.duration or 0) * base
        begin = int(job.start * (int(duration * wanted.fps) - wanted.frames + 1)) * step
        first = float((stream.start_time or 0) * base)
        file.seek(int((first + begin) / base), stream=stream)
        half = 0.5 / float(stream.average_rate or wanted.fps)
        scaler = VideoReformatter()
        pictures: list[np.ndarray] = []
        for frame in file.decode(stream):
            shown = frame.time - first + half
            due = sum(begin + number * step <= shown for number in range(len(pictures), wanted.frames))
            pictures += [_fit(frame, scaler, wanted.size)] * due if due else []
            if len(pictures) == wanted.frames:
                break
    pictures += pictures[-1:] * (wanted.frames - len(pictures))  # the last frame stands a little longer
    return np.ascontiguousarray(np.stack(pictures).transpose(3, 0, 1, 2))


def _fit(frame: Any, scaler: Any, size: tuple[int, int]) -> np.ndarray:
    scale = max(size[0] / frame.height, size[1] / frame.width)
    height, width = max(size[0], round(frame.height * scale)), max(size[1], round(frame.width * scale))
    method = "AREA" if scale < 1 else "BICUBIC"
    pixels = scaler.reformat(frame, width, height, "rgb24", interpolation=method, threads=1).to_ndarray()
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return pixels[top : top + size[0], left : left + size[1]]


class BareLoop:
    """Processes that do nothing but `bare_clip`; what they make stays with them."""

    def __init__(self, wanted: Wanted, processes: int):
        self.wanted = wanted
        self.pool = multiprocessing.get_context("fork").Pool(processes, torch.set_num_threads, (1,))
        self.processes = [process.pid for process in cast(Any, self.pool)._pool]

    def run(self, jobs: Sequence[Job]) -> None:
        """Makes these clips."""
        for frames in self.pool.imap_unordered(self._one, jobs):
            assert frames == self.wanted.frames

    def _one(self, job: Job) -> int:
        return bare_clip(job, self.wanted).shape[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"wanted": self.wanted}  # a pool cannot go into its own processes

    def close(self) -> None:
        """Ends the processes."""
        self.pool.terminate()
        self.pool.join()


# plain webdataset


def plain_webdataset(
    shards: Sequence[Path], read: Callable[[dict[str, Any]], Any], collate: Callable[[list[Any]], Any] | None,
    batch: int, workers: int,
) -> DataLoader[Any]:  # fmt: skip
    """Endless batches by webdataset alone: it reads shards from front to back."""
    from webdataset import WebDataset

    files = WebDataset([str(path) for path in shards], shardshuffle=False, empty_check=False).repeat()
    batches = files.map(read).batched(batch, collation_fn=collate)
    return DataLoader(
        batches, batch_size=None, num_workers=workers, worker_init_fn=_one_thread, collate_fn=_as_it_is,
        multiprocessing_context="fork",  # a fresh process would not know this module by its name
    )  # fmt: skip


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _as_it_is(batch: Any) -> Any:
    return batch


class ReadRaw:
    """webdataset's sample -> (clip, caption), by the loader's own decode; clips begin at random."""

    def __init__(self, wanted: Wanted):
        self.wanted = wanted
        self.random = np.random.default_rng(0)

    def __call__(self, sample: dict[str, Any]) -> tuple[Tensor, str]:
        frames, size, fps = self.wanted
        files = {name: held for name, held in sample.items() if isinstance(held, bytes)}  # beside them names
        clip = decode_sample(files, "video", frames=frames, size=size, fps=fps, start=self.random.random())
        return clip.pixels, captions_of(sample)[0]


def read_arrays(sample: dict[str, Any]) -> tuple[list[Tensor], str]:
    """webdataset's sample -> (arrays, caption), by NumPy."""
    arrays = [torch.from_numpy(np.load(io.BytesIO(sample[name]))) for name in sorted(sample) if name.endswith(".npy")]
    return arrays, json.loads(sample["json"])["captions"][0]


def stack_clips(samples: list[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
    """A batch of `ReadRaw`."""
    clips, captions = zip(*samples, strict=True)
    return torch.stack(clips), list(captions)


def stack_arrays(samples: list[tuple[list[Tensor], str]]) -> tuple[list[Tensor], list[str]]:
    """A batch of `read_arrays`; the benchmark's texts are of one length."""
    arrays, captions = zip(*samples, strict=True)
    return [torch.stack(parts) for parts in zip(*arrays, strict=True)], list(captions)


def count_bytes(sample: dict[str, Any]) -> int:
    """Reads, and hands nothing over."""
    return sum(len(value) for value in sample.values() if isinstance(value, bytes))
