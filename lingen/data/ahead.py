"""Samples read ahead of time, so that decoding does not wait for a disk or a server."""

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

from lingen.data.index import Index
from lingen.data.remote import is_remote
from lingen.data.sources import Piece, Reader

READERS = 8
"""Remote samples that one process reads at a time."""


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    """The reading threads of this process; a parent's threads do not exist after a fork."""
    return ThreadPoolExecutor(READERS, thread_name_prefix="read-ahead")


class Ahead:
    """Reads the samples of an index, ahead of time where they were requested.

    Remote samples are read by threads. For local ones the operating system is told to read them into its cache, from
    network disks too; that takes no memory of this process.

    Args:
        index: where the samples lie.
        reader: how they are read."""

    def __init__(self, index: Index, reader: Reader):
        self.index = index
        self.reader = reader
        self._coming: dict[int, Future[Piece] | None] = {}
        self._process = os.getpid()

    def __reduce__(self) -> Any:
        return Ahead, (self.index, self.reader)

    def ask(self, numbers: Iterable[int]) -> None:
        """Begins to read samples; earlier requests that are not among them and not done are dropped."""
        wanted = dict.fromkeys(numbers)
        self._leave_parent()
        for number in self._coming.keys() - wanted.keys():
            if (coming := self._coming.pop(number)) is not None:
                coming.cancel()
        for number in wanted.keys() - self._coming.keys():
            place = self._place(number)
            if is_remote(place[0]):
                self._coming[number] = _threads(os.getpid()).submit(self._read, place)
            else:
                self.reader.announce(*place[:3])
                self._coming[number] = None

    def get(self, number: int) -> Piece:
        """A sample's bytes; errors as for `Reader.read`, and ValueError where the shard ends before it does."""
        self._leave_parent()
        coming = self._coming.pop(number, None)
        return coming.result() if coming is not None else self._read(self._place(number))

    def _leave_parent(self) -> None:
        """Called after a fork: forgets the reads of the parent's threads, which do not arrive here."""
        if self._process != os.getpid():
            self._coming, self._process = {}, os.getpid()

    def _place(self, number: int) -> tuple[str, int, int, str]:
        """Shard, offset, length and version of a sample, see `Reader.read`."""
        record = self.index.records[number]
        # The hash is that of the media alone: captions may change beside them.
        version = f"{record['hash']:016x} {self.index.versions[record['shard']]}" if self.index.versions else ""
        shard = str(self.index.shards[record["shard"]])
        return shard, int(record["offset"]), int(record["length"]), version

    def _read(self, place: tuple[str, int, int, str]) -> Piece:
        piece, (_, offset, length, _) = self.reader.read(*place), place
        if len(piece.data) < length:
            missing = f"{length - len(piece.data)} of {length} bytes at {offset} are missing"
            raise ValueError(f"cut off: the shard ends before the sample does, {missing}")
        return piece
