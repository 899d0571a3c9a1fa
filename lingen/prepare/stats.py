"""A data set in numbers and pictures: `lingen data stats`."""

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from lingen.data import manifest
from lingen.data.captions import captions_of
from lingen.data.decode import decode_sample
from lingen.data.manifest import Row, media_hash
from lingen.data.shards import read_sample
from lingen.media import contact_sheet
from lingen.recipe.errors import RecipeError

QUANTILES = (0.05, 0.5, 0.95)


class Stats(NamedTuple):
    """A data set in numbers."""

    rows: list[dict[str, str]]
    """For a table: a row for each kind."""
    sources: dict[str, int]
    """Where the samples came from, most frequent first."""


def measure_folders(folders: Sequence[Path]) -> Stats:
    """Reads the manifests of the folders. RecipeError where one has none."""
    names = ["kind", "source", "height", "width", "frames", "fps", "captions", "caption_length", "length"]
    parts = [batch.select(names) for folder in folders for batch in manifest.batches(folder / manifest.NAME)]
    if not parts:
        raise RecipeError("The manifests have no row: there is nothing to count.")
    whole = pa.Table.from_batches(parts)
    table = {name: whole[name].to_numpy() for name in names}
    kinds = [str(kind) for kind in np.unique(table["kind"])]
    found, counts = np.unique(table["source"], return_counts=True)
    sources = {str(found[i]): int(counts[i]) for i in np.argsort(-counts, kind="stable")}
    return Stats([_row(kind, table) for kind in kinds], sources)


def _row(kind: str, table: dict[str, np.ndarray]) -> dict[str, str]:
    chosen = table["kind"] == np.array(kind, dtype=object)  # as text of numpy's it would lose zeros at its end
    own = {name: column[chosen] for name, column in table.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds = np.where(own["fps"] > 0, own["frames"] / own["fps"], 0)
    return {
        "kind": kind, "samples": f"{len(own['kind']):,}", "GB": f"{own['length'].sum() / 1e9:.3g}",
        "hours": f"{seconds.sum() / 3600:.3g}" if seconds.any() else "",
        "seconds (5%, half, 95%)": _spread(seconds) if seconds.any() else "",
        "shorter side": _spread(np.minimum(own["height"], own["width"])),
        "frames a second": _spread(own["fps"]) if seconds.any() else "", "captions": f"{own['captions'].sum():,}",
        "characters": _spread(own["caption_length"]),
    }  # fmt: skip


def _spread(values: np.ndarray) -> str:
    return ", ".join(f"{value:.4g}" for value in np.quantile(values.astype(float), QUANTILES))


def chosen(folders: Sequence[Path], count: int, seed: int = 0) -> list[tuple[Path, Row]]:
    """Samples to look at: `count` of each kind, drawn by chance, the same for the same seed; latents left out."""
    drawn: list[tuple[Path, Row]] = []
    for kind in ("video", "image"):
        rows = ((folder, row) for folder in folders for row in manifest.rows(folder / manifest.NAME))
        own = (one for one in rows if one[1].kind == kind)
        drawn += heapq.nsmallest(count, own, lambda one: media_hash(f"{seed} {one[1].shard}:{one[1].key}".encode()))
    return drawn


def sample_sheet(folders: Sequence[Path], path: Path, count: int = 8, seed: int = 0) -> Path | None:
    """Some samples to look at: a row of frames for each clip, eight pictures in a row. None where there are none. What
    cannot be decoded is black, with the reason above it."""
    picked = chosen(folders, count, seed)
    looks = [_look(folder, row) for folder, row in picked if row.kind == "video"]
    pictures = [_look(folder, row) for folder, row in picked if row.kind == "image"]
    for first in range(0, len(pictures), 8):
        of_row = pictures[first : first + 8]
        looks.append((np.concatenate([clip for clip, _ in of_row]), "; ".join(text for _, text in of_row)))
    clips, captions = [clip for clip, _ in looks], [text for _, text in looks]
    return contact_sheet(clips, path, captions) if clips else None


def _look(folder: Path, row: Row) -> tuple[np.ndarray, str]:
    """Small frames [t h w 3], and a line: the key, its measures, the caption."""
    moving = row.kind == "video" and row.width
    size = (96, max(16, round(96 * row.width / max(1, row.height)))) if moving else (96, 96)
    seconds = f", {row.frames / row.fps:.3g} s at {row.fps:.3g}" if row.fps else ""
    told = f"{row.key} ({row.height}x{row.width}{seconds})"
    try:
        with (folder / row.shard).open("rb") as file:
            members = read_sample(file, row.offset, row.length, row.key)
        frames, fps = (max(1, row.frames), row.fps if row.fps > 0 else 1.0) if row.kind == "video" else (1, 1.0)
        pixels = decode_sample(members, row.kind, frames=frames, size=size, fps=fps, start=0.0).pixels
        caption = captions_of(members)[0] if row.captions else "no caption yet"
        return pixels.permute(1, 2, 3, 0).numpy(), f"{told}: {caption}"
    except (OSError, ValueError, MemoryError) as error:
        size = (96, min(size[1], 960))  # a manifest may be wrong
        return np.zeros((1, *size, 3), np.uint8), f"{told}: {error}"
