"""A data set in numbers and pictures: `lingen data stats`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lingen.data import manifest
from lingen.data.manifest import Row
from lingen.recipe.errors import RecipeError

QUANTILES = (0.05, 0.5, 0.95)
PANEL = (390, 230)
"""Width and height of a histogram in pixels."""
BINS = 30
INK, BAR, FAINT = (40, 44, 52), (76, 120, 168), (225, 228, 232)


class Measure(NamedTuple):
    """One number of each sample."""

    name: str
    values: np.ndarray


class Stats(NamedTuple):
    """A data set in numbers."""

    rows: list[dict[str, str]]
    """For a table: a row for each kind."""
    sources: dict[str, int]
    """Where the samples came from, most frequent first."""
    measures: list[Measure]


def measure(folders: Sequence[Path]) -> Stats:
    """Reads the manifests of the folders. RecipeError where one has none."""
    columns: dict[str, list[np.ndarray]] = {}
    for folder in folders:
        if not (folder / manifest.NAME).is_file():
            raise RecipeError(f"'{folder}' has no {manifest.NAME}; write it with `lingen data index {folder}`.")
        for batch in manifest.batches(folder / manifest.NAME):
            for name in ("kind", "source", "height", "width", "frames", "fps", "captions", "caption_length", "length"):
                columns.setdefault(name, []).append(batch.column(name).to_numpy(zero_copy_only=False))
    if not columns:
        raise RecipeError("The manifests have no row: there is nothing to count.")
    table = {name: np.concatenate(parts) for name, parts in columns.items()}
    kinds = [str(kind) for kind in np.unique(table["kind"])]
    names, counts = np.unique(table["source"], return_counts=True)
    sources = {str(names[i]): int(counts[i]) for i in np.argsort(-counts, kind="stable")}
    return Stats([_row(kind, table) for kind in kinds], sources, list(_measures(table)))


def _row(kind: str, table: dict[str, np.ndarray]) -> dict[str, str]:
    own = {name: column[table["kind"] == kind] for name, column in table.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds = np.where(own["fps"] > 0, own["frames"] / own["fps"], 0)
    return {
        "kind": kind,
        "samples": f"{len(own['kind']):,}",
        "GB": f"{own['length'].sum() / 1e9:.3g}",
        "hours": f"{seconds.sum() / 3600:.3g}" if seconds.any() else "",
        "seconds (5%, half, 95%)": _spread(seconds) if seconds.any() else "",
        "shorter side": _spread(np.minimum(own["height"], own["width"])),
        "frames a second": _spread(own["fps"]) if seconds.any() else "",
        "captions": f"{own['captions'].sum():,}",
        "characters": _spread(own["caption_length"]),
    }


def _spread(values: np.ndarray) -> str:
    return ", ".join(f"{value:.4g}" for value in np.quantile(values.astype(float), QUANTILES))


def _measures(table: dict[str, np.ndarray]) -> Iterator[Measure]:
    moving = table["fps"] > 0
    known = (table["height"] > 0) & (table["width"] > 0)
    height, width = table["height"][known], table["width"][known]
    yield Measure("seconds of a clip", table["frames"][moving] / table["fps"][moving])
    yield Measure("frames a second", table["fps"][moving])
    yield Measure("pixels of the shorter side", np.minimum(height, width))
    yield Measure("width / height", width / np.maximum(1, height))
    yield Measure("characters of a caption", table["caption_length"])
    yield Measure("kilobytes of a sample", table["length"] / 1000)


# pictures


def histograms(measures: Sequence[Measure], path: Path) -> Path:
    """A PNG with a histogram of each measure that has values, three in a row."""
    from PIL import Image

    shown = [one for one in measures if len(one.values)]
    sheet = Image.new("RGB", (3 * PANEL[0], -(-len(shown) // 3) * PANEL[1]), "white")
    for number, one in enumerate(shown):
        sheet.paste(_histogram(one), (number % 3 * PANEL[0], number // 3 * PANEL[1]))
    sheet.save(path)
    return path


def _histogram(one: Measure) -> Any:
    from PIL import Image, ImageDraw, ImageFont

    values = one.values.astype(float)
    low, high = float(values.min()), float(np.quantile(values, 0.99) if len(values) > 100 else values.max())
    counts, labels = _bins(values, low, high)
    panel = Image.new("RGB", PANEL, "white")
    draw = ImageDraw.Draw(panel)
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    left, top, right, bottom = 46, 34, PANEL[0] - 24, PANEL[1] - 36
    draw.text((left, 8), one.name, INK, font)
    draw.text((left - 6, top), f"{counts.max():,}", INK, small, anchor="rt")
    draw.line((left, top, right, top), FAINT)
    step = (right - left) / BINS
    for number, count in enumerate(counts):
        tall = (bottom - top) * count / counts.max()
        if count:
            draw.rectangle((left + number * step, bottom - max(1, tall), left + (number + 1) * step - 2, bottom), BAR)
    draw.line((left, bottom, right, bottom), INK)
    for share, text in labels.items():
        at = left + (right - left) * share
        draw.line((at, bottom, at, bottom + 4), INK)
        draw.text((at, bottom + 7), text, INK, small, anchor="mt")
    return panel


def _bins(values: np.ndarray, low: float, high: float) -> tuple[np.ndarray, dict[float, str]]:
    """Counts from `low` to `high`, larger values in the last one, and labels at shares of the axis. Values that are all
    the same are one bar in the middle."""
    if high - low < 1e-3 * max(1.0, abs(high)):
        counts = np.zeros(BINS, int)
        counts[BINS // 2] = len(values)
        return counts, {(BINS // 2 + 0.45) / BINS: f"{low:.4g}"}
    counts, _ = np.histogram(np.minimum(values, high), BINS, (low, high))
    more = "+" if values.max() > high else ""
    return counts, {0.0: f"{low:.3g}", 0.5: f"{(low + high) / 2:.3g}", 1.0: f"{high:.3g}{more}"}


def chosen(folders: Sequence[Path], count: int, seed: int = 0) -> list[tuple[Path, Row]]:
    """Samples to look at: `count` of each kind, drawn by chance, the same for the same seed; latents left out."""
    kept: dict[str, list[tuple[bytes, Path, Row]]] = {"video": [], "image": []}
    for folder in folders:
        for row in manifest.rows(folder / manifest.NAME):
            if row.kind not in kept:
                continue
            key = hashlib.blake2b(f"{seed} {row.shard}:{row.key}".encode(), digest_size=8).digest()
            kept[row.kind].append((key, folder, row))
            if len(kept[row.kind]) > 2 * count:
                kept[row.kind] = sorted(kept[row.kind], key=lambda one: one[0])[:count]
    ordered = [sorted(of_kind, key=lambda one: one[0])[:count] for of_kind in kept.values()]
    return [(folder, row) for of_kind in ordered for _, folder, row in of_kind]


def contact_sheet(folders: Sequence[Path], path: Path, count: int = 8, seed: int = 0) -> Path | None:
    """Some samples to look at: a row of frames for each clip, eight pictures in a row. None where there are none.

    What cannot be decoded is black, with the reason above it.
    """
    from lingen.media import contact_sheet as sheet

    picked = chosen(folders, count, seed)
    looks = [_look(folder, row) for folder, row in picked if row.kind == "video"]
    pictures = [_look(folder, row) for folder, row in picked if row.kind == "image"]
    for first in range(0, len(pictures), 8):
        of_row = pictures[first : first + 8]
        looks.append((np.concatenate([clip for clip, _ in of_row]), "; ".join(text for _, text in of_row)))
    clips, captions = [clip for clip, _ in looks], [text for _, text in looks]
    return sheet(clips, path, captions) if clips else None


def _look(folder: Path, row: Row) -> tuple[np.ndarray, str]:
    """Small frames [t h w 3], and a line: the key, its measures, the caption."""
    from lingen.data.captions import captions_of
    from lingen.data.decode import decode_sample
    from lingen.data.shards import parse

    moving = row.kind == "video" and row.width
    size = (96, max(16, round(96 * row.width / max(1, row.height)))) if moving else (96, 96)
    seconds = f", {row.frames / row.fps:.3g} s at {row.fps:.3g}" if row.fps else ""
    told = f"{row.key} ({row.height}x{row.width}{seconds})"
    try:
        with (folder / row.shard).open("rb") as file:
            file.seek(row.offset)
            members = parse(file.read(row.length), row.key)
        frames, fps = (row.frames, row.fps) if row.kind == "video" else (1, 1.0)
        pixels = decode_sample(members, row.kind, frames=frames, size=size, fps=fps, start=0.0).pixels
        caption = captions_of(members)[0] if row.captions else "no caption yet"
        return pixels.permute(1, 2, 3, 0).numpy(), f"{told}: {caption}"
    except (OSError, ValueError) as error:
        return np.zeros((1, *size, 3), np.uint8), f"{told}: {error}"
