"""Reading pieces of shards wherever they lie: local files, ``https://`` and ``http://``, ``s3://``.

A read that fails for a passing reason (a timeout, a broken connection, a server that is busy) is tried again, each time
after a longer wait; one that cannot succeed (no such file, no permission) is not. Remote pieces may be kept on
the local disk, up to a limit."""

import contextlib
import errno
import hashlib
import io
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from lingen.data.remote import Passing, SourceError, Stat, is_remote, list_s3, read_remote, stat_remote
from lingen.files import cache_folder, whole_file
from lingen.recipe.sections import Remote

T = TypeVar("T")

LARGEST_READ = 1 << 31
"""Bytes that are read at once; a sample that claims to be larger is refused before it is allocated (ours)."""
FIRST_WAIT = 0.25
"""Seconds before the second attempt; doubled for each further one, up to a minute."""
OPEN_FILES = 64
"""Local shards that a process keeps open."""
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.EINTR}
"""Errors of network disks that may pass: worth another attempt."""


class Piece(NamedTuple):
    """Bytes, and how many attempts after the first one they took."""

    data: bytes | bytearray
    retries: int


class PieceCache:
    """Pieces of remote shards on the local disk, shared by the processes of a machine; the least recently used ones go
    first.

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
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            os.utime(path)
            return data
        return None

    def put(self, name: str, data: bytes) -> None:
        """Keeps a piece; a full or missing disk only means that it is not kept."""
        if not self.limit or len(data) > self.limit // 4:
            return
        with contextlib.suppress(OSError):
            with whole_file(self._path(name), durable=False) as partial:
                partial.write_bytes(data)
            self._written += len(data)
            if self._written > self.limit // 100:
                self._written = 0
                self._shrink()

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _shrink(self) -> None:
        """Deletes the least recently used pieces until nine tenths of the limit are left."""
        found = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):  # another process was first
                about = path.stat()
                found.append((about.st_mtime_ns, about.st_size, path))
        size = sum(one[1] for one in found)
        if size <= self.limit:
            return
        for _, bytes_of, path in sorted(found, key=lambda one: one[0]):
            path.unlink(missing_ok=True)
            size -= bytes_of
            if size <= self.limit * 0.9:
                return


class Reader:
    """Reads pieces; holds nothing that may not cross into another process or thread. `settings` say time-outs, attempts
    and room for the cache."""

    def __init__(self, settings: Remote):
        self.settings = settings
        self._kept = PieceCache(cache_folder() / "pieces", int(settings.cache_gb * 1e9))

    def read(self, location: str, offset: int, length: int, version: str = "") -> Piece:
        """`length` bytes from `offset` on; fewer where the file ends before. SourceError where it cannot be read.
        `version`: changes when the file does; the cache takes a piece of another version for another one, and keeps
        none whose version is not known."""
        if length > LARGEST_READ:
            raise SourceError(f"too large: {length} bytes of {location}, at most {LARGEST_READ} are read at once")
        if not is_remote(location):
            return Piece(*self._retry(location, lambda: _read_file(location, offset, length)))
        name = hashlib.sha256(repr((location, offset, length, version)).encode()).hexdigest()
        if version and (kept := self._kept.get(name)) is not None:
            return Piece(kept, 0)
        piece = Piece(*self._retry(location, lambda: read_remote(location, offset, length, self.settings.timeout)))
        if version:
            self._kept.put(name, bytes(piece.data))
        return piece

    def announce(self, location: str, offset: int, length: int) -> None:
        """Has the system read a piece of a local file into its cache, without waiting for it."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # the later read reports the error
                os.posix_fadvise(_opened(location).fileno(), offset, length, os.POSIX_FADV_WILLNEED)

    def stat(self, location: str) -> Stat:
        """Size and version of a remote file. SourceError where there is none or it cannot be reached."""
        return self._retry(location, lambda: stat_remote(location, self.settings.timeout))[0]

    def find(self, pattern: str) -> list[str]:
        """The objects that a pattern at ``s3://`` stands for. SourceError where they cannot be listed."""
        return self._retry(pattern, lambda: list_s3(pattern, self.settings.timeout))[0]

    def _retry(self, location: str, read: Callable[[], T]) -> tuple[T, int]:
        """The bytes that `read` returns, and how many attempts after the first one they took."""
        for attempt in range(self.settings.attempts):
            try:
                return read(), attempt
            except Passing as error:
                said = str(error)
            except SourceError as error:
                error.retries = attempt
                raise
            except OSError as error:
                said = error.strerror or str(error)
                if error.errno not in PASSING:
                    raise SourceError(f"unreadable shard: {location}: {said}", retries=attempt) from error
            if attempt + 1 < self.settings.attempts:
                time.sleep(min(60.0, FIRST_WAIT * 2**attempt))
        times = f"{self.settings.attempts} attempts" if self.settings.attempts > 1 else "one attempt"
        told = f"unreachable: {location} could not be read in {times} ({said})"
        raise SourceError(told, retries=self.settings.attempts - 1)


class _Shard(io.FileIO):
    """Closes when its last reader is done, which is meant, so nothing warns of it."""

    def __del__(self) -> None:
        self.close()


@lru_cache(OPEN_FILES)
def _open_file(path: str, device: int, inode: int) -> _Shard:
    """The local shards that were read last, kept open. Threads and forked processes may share one, as every read says
    from where."""
    return _Shard(path)


def _opened(path: str) -> _Shard:
    """The file that has this path now, not one that had it before."""
    about = os.stat(path)
    return _open_file(path, about.st_dev, about.st_ino)


def _read_file(path: str, offset: int, length: int) -> bytearray:
    file = _opened(path)
    data, done = bytearray(length), 0
    while done < length and (more := os.preadv(file.fileno(), [memoryview(data)[done:]], offset + done)):
        done += more
    return data[:done] if done < length else data
