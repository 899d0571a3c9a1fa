"""Samples read ahead of time by threads, so that decoding does not wait for a disk or a server."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

from lingen.data.index import Index
from lingen.data.sources import Piece, Reader

READERS = 8
"""Samples that one process reads at a time."""


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Those of this process; a parent's do not cross a fork."""
    return ThreadPoolExecutor(READERS, thread_name_prefix="read-ahead")


class Ahead:
    """Reads the samples of an index, those that were asked for before they are needed.

    Args:
        index: where they lie.
        reader: how they are read.
    """

    def __init__(self, index: Index, reader: Reader):
        self.index = index
        self.reader = reader
        self._coming: dict[int, Future[Piece]] = {}
        self._process = os.getpid()

    def __reduce__(self) -> Any:
        return Ahead, (self.index, self.reader)

    def ask(self, numbers: Iterable[int]) -> None:
        """Begins to read samples; what was asked for before, is not there yet and is not among them is let go."""
        wanted = list(numbers)
        self._leave_parent()
        for number in self._coming.keys() - set(wanted):
            self._coming.pop(number).cancel()
        for number in wanted:
            if number not in self._coming:
                self._coming[number] = _threads(os.getpid()).submit(self._read, number)

    def get(self, number: int) -> Piece:
        """A sample's bytes; errors as for `Reader.read`, and ValueError where the shard ends before it does."""
        self._leave_parent()
        coming = self._coming.pop(number, None)
        return coming.result() if coming is not None else self._read(number)

    def _leave_parent(self) -> None:
        """After a fork: what the parent's threads read does not arrive here."""
        if self._process != os.getpid():
            self._coming, self._process = {}, os.getpid()

    def _read(self, number: int) -> Piece:
        record = self.index.records[number]
        offset, length = int(record["offset"]), int(record["length"])
        shard = str(self.index.shards[record["shard"]])
        version = f"{record['hash']:016x}" if record["hash"] else self.index.mark
        piece = self.reader.read(shard, offset, length, version)
        if len(piece.data) < length:
            missing = f"{length - len(piece.data)} of {length} bytes at {offset} are missing"
            raise ValueError(f"cut off: the shard ends before the sample does, {missing}")
        return piece
