"""Pieces of remote shards kept on the local disk, within a bound."""

import os
from pathlib import Path

from lingen.files import whole_file


class PieceCache:
    """Pieces on the local disk, shared by the processes of a machine; the least recently used ones go first.

    Each process checks the folder's size whenever it has written a hundredth of the limit, so that the folder may
    briefly exceed the limit by that much for each process.

    Args:
        limit: bytes; 0 keeps nothing."""

    def __init__(self, folder: Path, limit: int):
        self.folder = folder
        self.limit = limit
        self._written = limit  # check the size at the first piece

    def get(self, name: str) -> bytes | None:
        """A stored piece; None where it is not stored."""
        if not self.limit:
            return None
        path = self._path(name)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, name: str, data: bytes) -> None:
        """Keeps a piece; a full or missing disk only means that it is not kept."""
        if not self.limit or len(data) > self.limit // 4:
            return
        path = self._path(name)
        try:
            with whole_file(path, durable=False) as partial:
                partial.write_bytes(data)
            self._written += len(data)
            if self._written > self.limit // 100:
                self._written = 0
                self._shrink()
        except OSError:
            return

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _shrink(self) -> None:
        """Deletes the least recently used pieces until nine tenths of the limit are left."""
        found = []
        for path in self.folder.glob("??/*"):
            try:
                about = path.stat()
                found.append((about.st_mtime_ns, about.st_size, path))
            except OSError:  # another process was first
                continue
        size = sum(one[1] for one in found)
        if size <= self.limit:
            return
        for _, bytes_of, path in sorted(found, key=lambda one: one[0]):
            path.unlink(missing_ok=True)
            size -= bytes_of
            if size <= self.limit * 0.9:
                return
