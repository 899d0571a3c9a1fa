"""Writes checkpoints while training goes on, and takes away those that are not kept."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lingen.files import write_json
from lingen.kernels.choice import memory_here
from lingen.ranks.collectives import broadcast_object, gather_objects, largest, on_first_rank, place, together
from lingen.run_folder.folder import RunFolder, step_of
from lingen.run_folder.intact import ABOUT, about_of
from lingen.run_folder.lock import check_held
from lingen.run_folder.storage import RowPiece, Written, bytes_of, describe_tensors, pieces_of, write_file
from lingen.weights import header_of

ROOM = 0.75
"""Share of the memory left that buffers may take: the loader needs some, too [ours]."""
PARTIAL = ".partial-"
"""Stands in the name of a folder that is being written, or taken away."""


class _Job(NamedTuple):
    """A checkpoint on its way."""

    step: int
    partial: Path
    tensors: dict[str, Any]
    """As `storage.describe_tensors` makes it."""
    state: dict[str, Any]
    ledger: dict[str, Any]
    written: Future[Written]
    """What this rank wrote, or its error."""


class Saver:
    """The checkpoints of a stage. All ranks call every method but `is_writing` together, in the same order.

    Each rank copies its rows into a buffer of its own, and a thread writes them while training goes on. When all have
    written, rank 0 adds the JSON file and renames the folder: until then nothing bears a checkpoint's name.

    Args:
        folder: of the run.
        stage: whose checkpoints.
        keep: how many of the newest ones stay.
        keep_every: those of multiples of this step stay as well; None: no others.
        back_every: so does the newest one of a multiple of this step."""

    def __init__(
        self, folder: RunFolder, stage: str, keep: int, keep_every: int | None = None, back_every: int | None = None
    ):
        self.folder, self.stage, self.keep = folder, stage, keep
        self.keep_every, self.back_every = keep_every, back_every
        self._mark = broadcast_object(f"{PARTIAL}{secrets.token_hex(4)}")
        self._buffer: Tensor | None = None
        self._from_gpu = False
        self._job: _Job | None = None
        self._thread = ThreadPoolExecutor(1, "lingen-saver")
        on_first_rank(self._sweep)

    def _sweep(self) -> None:
        """What killed processes left behind; this run has its folder alone."""
        for left in (self.folder.path / "stages" / self.stage).glob("step-*partial*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()  # files are of earlier versions

    def prepare(self, tensors: Mapping[str, Tensor], pinned: bool) -> str | None:
        """Makes the buffer. Returns a sentence where there is no room for it: then `begin` ends when all is written.

        Args:
            tensors: of the sizes that checkpoints will have.
            pinned: a GPU copies into it."""
        size = sum(piece.rows.nbytes for piece in pieces_of(tensors, *place()))
        here, left = socket.gethostname(), memory_left()
        if sum(needed for host, needed in gather_objects((here, size)) if host == here) <= ROOM * left:
            self._buffer = torch.zeros(size, dtype=torch.uint8)
            self._from_gpu = pinned and _pin(self._buffer)
        if not largest(int(self._buffer is None))[0]:
            return None
        self._buffer = None
        return (
            f"checkpoints are written while training waits: a copy of {size / 2**30:.3g} GiB for each rank finds no "
            f"room in the {left / 2**30:.3g} GiB of memory that are left"
        )

    @property
    def is_writing(self) -> bool:
        """Whether this rank's file is not on the disk yet."""
        return self._job is not None and not self._job.written.done()

    def begin(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], ledger: dict[str, Any]) -> None:
        """Starts a checkpoint, once the one before is complete. What the tensors hold now is what is written.

        Args:
            tensors: as `storage.pieces_of` takes them.
            state, ledger: plain values; those of rank 0 count."""
        self.finish()
        path = self.folder.checkpoint(self.stage, step)
        partial = path.with_name(path.name + self._mark)
        rank, world = place()
        file = partial / f"rank-{rank:05d}-of-{world:05d}.safetensors"
        pieces = pieces_of(tensors, rank, world)
        buffer = self._copy(pieces)
        rows = [one.rows for one in pieces] if buffer is None else [buffer]
        written = self._thread.submit(_write, file, pieces, chain.from_iterable(map(bytes_of, rows)))
        self._job = _Job(step, partial, describe_tensors(tensors), state, ledger, written)
        if buffer is None:
            wait([written])
        if self._buffer is None:  # on all ranks: training waits anyway
            self.finish()

    def _copy(self, pieces: Sequence[RowPiece]) -> Tensor | None:
        """This rank's rows in the buffer, as they will lie in the file; None where they find no room."""
        size = sum(piece.rows.nbytes for piece in pieces)
        if self._buffer is None or size > len(self._buffer):
            return None
        end = 0
        for piece in pieces:
            begin, end = end, end + piece.rows.nbytes
            room = self._buffer[begin:end].view(piece.rows.dtype).view(piece.rows.shape)
            room.copy_(piece.rows, non_blocking=self._from_gpu)
        if self._from_gpu:
            torch.cuda.synchronize()
        return self._buffer[:end]

    def finish(self) -> None:
        """Waits for the checkpoint on its way, if there is one, and completes it.

        Raises:
            OSError: this rank could not write; nothing of this checkpoint is left.
            OtherRankError: another one could not."""
        job, self._job = self._job, None
        if job is None:
            return
        try:
            written = together(job.written.result)
        except Exception:
            on_first_rank(lambda: shutil.rmtree(job.partial, ignore_errors=True))
            raise
        files = gather_objects(written)
        on_first_rank(lambda: self._complete(job, files))

    def abandon(self, together: bool) -> None:
        """Waits for what this rank writes, before an error ends the run.

        Args:
            together: all ranks end by this error, so that the checkpoint can be completed; else it is left unfinished
                where other ranks have a part in it."""
        if together or place()[1] == 1:
            with contextlib.suppress(OSError):  # the error that ends the run is the one to tell
                self.finish()
        elif self._job is not None:
            wait([self._job.written])

    def stays(self, step: int) -> bool:
        """Whether a checkpoint of this step is to be kept for good."""
        return self.keep_every is not None and step % self.keep_every == 0

    def _complete(self, job: _Job, files: list[Written]) -> None:
        final = self.folder.checkpoint(self.stage, job.step)
        try:
            check_held(look=True)
            write_file(job.partial / ABOUT, [about_of(job.state, job.tensors, files)])
            _sync(job.partial)
            self._remove(final)
            job.partial.rename(final)
        except Exception as error:
            shutil.rmtree(job.partial, ignore_errors=True)
            raise _called(error, job.partial) from error
        _sync(final.parent)
        write_json(self.folder.ledger, job.ledger)
        for path in self._surplus(job.step):
            self._remove(path)

    def _surplus(self, step: int) -> Iterator[Path]:
        """Checkpoints that do not stay: old ones, and damaged ones of steps that are to be trained again."""
        there = self.folder.checkpoints(self.stage)
        yield from (path for path in there if step_of(path) > step)
        done = [path for path in there if step_of(path) <= step]
        back = [path for path in done if self.back_every and step_of(path) % self.back_every == 0][-1:]
        for path in done[: -self.keep]:
            if not self.stays(step_of(path)) and path not in back:
                yield path

    def _remove(self, path: Path) -> None:
        """In one step, as far as names go: a folder first loses its name."""
        if path.is_dir():
            gone = path.with_name(f"{path.name}{self._mark}-old")
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _pin(buffer: Tensor) -> bool:
    """Lets a GPU write into this memory by itself, where the driver agrees. torch's own pinned memory would be up to
    twice as much, a power of two."""
    start = buffer.data_ptr()
    if not buffer.nbytes or int(torch.cuda.cudart().cudaHostRegister(start, buffer.nbytes, 0)):
        return False
    weakref.finalize(buffer, torch.cuda.cudart().cudaHostUnregister, start)
    return True


def memory_left() -> int:
    """Bytes of this machine's memory, or of the control group's that a container gives it, that can still be had."""
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.is_file():
        return memory_here()
    kept = dict(line.split(":") for line in meminfo.read_text().splitlines())
    left = int(kept["MemAvailable"].split()[0]) * 1024
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()).isdecimal():
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        left = min(left, int(limit) - int((group / "memory.current").read_text()) + int(stat["inactive_file"]))
    return left


def _write(file: Path, pieces: Sequence[RowPiece], chunks: Iterable[memoryview]) -> Written:
    """Writes a rank's file. Its error, under the name that the checkpoint would have borne."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        header = header_of([(one.name, one.rows) for one in pieces], {"format": "pt"})
        size, found = write_file(file, chain([header], chunks))
        return Written(file.name, size, found, tuple((one.name, one.start, one.stop) for one in pieces))
    except Exception as error:
        raise _called(error, file.parent) from None


def _called(error: Exception, partial: Path) -> Exception:
    """An error of the system under the name that the checkpoint would have borne."""
    if not isinstance(error, OSError) or error.errno is None:
        return error
    return OSError(error.errno, os.strerror(error.errno), str(partial).partition(PARTIAL)[0])


def _sync(folder: Path) -> None:
    """What is in a folder, by name, is on the disk. Some file systems cannot be asked."""
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
