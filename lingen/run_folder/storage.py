"""Tensors in a folder of safetensors files: which rows each rank writes, and what it needs of them again.

A row is an index of axis 0; a tensor without axes is one row. Nothing here knows what the tensors are for."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lingen.files import naming
from lingen.plan.memory_tracker import part_here
from lingen.ranks.heartbeat import sign
from lingen.weights import STORED_TYPES

CHUNK = 1 << 24
"""Bytes that are written and hashed at once."""


class RowPiece(NamedTuple):
    """Rows of a tensor that one rank writes."""

    name: str
    start: int
    stop: int
    rows: Tensor
    """Plain, on whatever device: ``[stop - start, ...]``, or no axis where the tensor has none."""


class Written(NamedTuple):
    """What one rank tells of its file."""

    file: str
    size: int
    sha256: str
    pieces: tuple[tuple[str, int, int], ...]
    """Name, first row, row after the last."""


def pieces_of(tensors: Mapping[str, Tensor], rank: int, world: int) -> list[RowPiece]:
    """The rows that a rank writes, those of large elements first, so that each lies at a multiple of its element.

    Every row of every tensor is written by exactly one rank. A DTensor cut along axis 0 is written where its rows are,
    replicas of them share the work; what all ranks hold whole is divided among them by bytes.

    Args:
        tensors: name -> tensor, the same names and shapes on all ranks.
    Raises:
        NotImplementedError: a DTensor that is cut along another axis."""
    whole = {name: value for name, value in tensors.items() if not is_cut_into_rows(value)}
    total, before = sum(value.nbytes for value in whole.values()), 0
    found = []
    for name, value in tensors.items():
        if name not in whole:
            start, held, (copy, copies) = _local_rows(value)
            low, high = (len(held) * number // copies for number in (copy, copy + 1))
            found.append(RowPiece(name, start + low, start + high, held[low:high]))
            continue
        held, rows = part_here(value), value.shape[0] if value.ndim else 1
        start, stop = (_first_row(held.nbytes, rows, before, total, one, world) for one in (rank, rank + 1))
        found.append(RowPiece(name, start, stop, held[start:stop] if held.ndim else held))
        before += held.nbytes
    return sorted((piece for piece in found if piece.start < piece.stop), key=lambda piece: -piece.rows.itemsize)


def _first_row(size: int, rows: int, before: int, total: int, rank: int, world: int) -> int:
    """The first row of a tensor that begins in the share of this rank or a later one, of `total` bytes in equal
    shares; `before` bytes lie before the tensor."""
    if not size:
        return 0
    behind = rank * total - before * world  # times `world`, to stay with whole numbers
    return min(max(-(-behind * rows // (size * world)), 0), rows)


def is_cut_into_rows(value: Tensor) -> bool:
    """Whether ranks hold different parts of it."""
    return isinstance(value, DTensor) and any(not placed.is_replicate() for placed in value.placements)


def _local_rows(value: Tensor) -> tuple[int, Tensor, tuple[int, int]]:
    """First row here, the rows here, and which of how many equal copies of these rows this is."""
    assert isinstance(value, DTensor)
    mesh, places = value.device_mesh, value.device_mesh.get_coordinate()
    cut = [axis for axis, placed in enumerate(value.placements) if not placed.is_replicate()]
    if len(cut) != 1 or not value.placements[cut[0]].is_shard(0) or places is None:
        raise NotImplementedError(f"A tensor is placed as {value.placements}: only rows are written in parts.")
    size = -(-value.shape[0] // mesh.size(cut[0]))
    copy, copies = 0, 1
    for axis in range(mesh.ndim):
        if axis != cut[0]:
            copy, copies = copy * mesh.size(axis) + places[axis], copies * mesh.size(axis)
    return min(size * places[cut[0]], value.shape[0]), part_here(value), (copy, copies)


# files


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `Checkpoint` wants to know of tensors, before it is known which file holds which rows."""
    return {
        name: {"shape": list(value.shape), "dtype": STORED_TYPES[str(value.dtype)], "pieces": []}
        for name, value in tensors.items()
    }


def bytes_of(value: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in chunks; from a GPU tensor by tensor."""
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, len(flat), CHUNK):
        yield flat[start : start + CHUNK].numpy().data


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Writes a new file, until it is on the disk. Returns its size and its SHA-256. An OSError names the file."""
    digest, size = hashlib.sha256(), 0
    with naming(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for chunk in chunks:
                sign()
                digest.update(chunk)
                left = memoryview(chunk)
                while left:
                    left = left[os.write(file, left) :]
                size += len(chunk)
            os.fsync(file)
        finally:
            os.close(file)
    return size, digest.hexdigest()


@torch.no_grad()
def fill_rows(target: Tensor, rows: Any, name: str) -> None:
    """Puts what this rank needs of a stored tensor into `target`, whole or cut into rows."""
    if is_cut_into_rows(target):
        start, held, _ = _local_rows(target)
        held.copy_(rows.read(name, start, start + len(held)))
    else:
        part_here(target).copy_(rows.read(name))


def is_covered(about: Mapping[str, Any]) -> bool:
    """Whether the pieces of a tensor hold each of its rows once."""
    end = 0
    for _, first, stop in sorted(about["pieces"], key=lambda piece: piece[1]):
        if first != end or stop <= first:
            return False
        end = stop
    shape = about["shape"]
    return bool(end == (shape[0] if shape else 1) or not math.prod(shape))
