"""Makes a manifest for shards that have none: each sample is read once, and described by its media."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageOps

from lingen.data import manifest
from lingen.data.batch import Drop, Progress, no_progress
from lingen.data.captions import captions_of
from lingen.data.frames import opened_video, orientation, refuse_odd
from lingen.data.latents import LATENTS_NPY
from lingen.data.manifest import About, Row, media_hash
from lingen.data.pictures import open_picture, reported, webp_size, webp_times
from lingen.data.shards import read_sample, scan_shard, tar_files
from lingen.prepare.workers import in_order
from lingen.recipe.errors import RecipeError

SUFFIXES = ("mp4", "webm", "webp", "jpg", "jpeg", "png")
COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tar.zst", ".tar.lz4")


def index_folder(folder: Path, processes: int | None, progress: Progress = no_progress) -> tuple[int, list[Drop]]:
    """Writes the manifest of the tar files in a folder. Returns the number of its rows, and the samples and shards that
    cannot be used and are in none. RecipeError where there is no tar file, or none of the samples can be used.
    `processes` read shards at the same time; 0: this one; None: one for each core."""
    paths = shards_of(folder)
    drops = compressed_shards(folder)

    def rows() -> Iterator[Row]:
        done = in_order(index_shard, paths, processes, lambda path: ([], [crashed_at(path)]))
        is_empty = True
        for number, (_, (found, broken)) in enumerate(done, start=1):
            drops.extend(broken)
            is_empty &= not found
            yield from found
            progress(number, len(paths))
        if is_empty:  # before a manifest that is there is replaced
            first = f"{drops[0].where}: {drops[0].reason}" if drops else "its tar files hold no sample at all"
            raise RecipeError(f"'{folder}' holds no sample that can be used; the first: {first}")

    return manifest.write(folder / manifest.NAME, rows(), About()), drops


def compressed_shards(folder: Path) -> list[Drop]:
    """The compressed tar files of a folder as faults."""
    why = "compressed tar: its samples cannot be read one by one; unpack it to a plain .tar"
    names = sorted(path.name for path in folder.glob("*"))
    return [Drop(name, why) for name in names if name.lower().endswith(COMPRESSED)]


def shards_of(folder: Path) -> list[Path]:
    """The tar files of a folder. RecipeError where it holds none."""
    if paths := tar_files(folder):
        return paths
    packed_up = "".join(f" {drop.where} is a {drop.reason}." for drop in compressed_shards(folder)[:1])
    none = f"'{folder}' holds no tar file; name the folder of the shards.{packed_up}"
    raise RecipeError(manifest.nothing_packed(folder) or none)


def crashed_at(path: Path) -> Drop:
    """The fault of a shard that ended the process which read it."""
    return Drop(path.name, "unreadable shard: the process that read it ended")


def index_shard(path: Path) -> tuple[list[Row], list[Drop]]:
    """The rows of a shard, and what in it cannot be used."""
    rows: list[Row] = []
    drops: list[Drop] = []
    try:
        with path.open("rb") as file:
            for entry in scan_shard(path):
                where = f"{path.name}:{entry.key}" if entry.key else path.name
                try:
                    if entry.fault:
                        raise ValueError(entry.fault)
                    place = entry.start, entry.end - entry.start
                    told = describe_sample(read_sample(file, *place, entry.key))
                    rows.append(Row(entry.key, path.name, *place, source=path.parent.name, **told))
                except ValueError as error:
                    drops.append(Drop(where, str(error)))
    except OSError as error:
        drops.append(Drop(path.name, f"unreadable shard: {error.strerror or error}"))
    return rows, drops


def describe_sample(members: dict[str, bytes]) -> dict[str, Any]:
    """What a row of a manifest says of a sample, but for where it lies. ValueError where it cannot be used."""
    if LATENTS_NPY in members:
        raise ValueError("encoded sample: only `lingen encode`, which made it, writes the manifest of such shards")
    suffix = next((suffix for suffix in SUFFIXES if suffix in members), None)
    if suffix is None:
        raise ValueError(f"no media: none of {', '.join(SUFFIXES)} among {', '.join(sorted(members)) or 'nothing'}")
    data = members[suffix]
    captions = captions_of(members)
    told = {"captions": len(captions), "caption_length": len(captions[0]), "media": suffix, "hash": media_hash(data)}
    if suffix in ("mp4", "webm"):
        return {"kind": "video", **told, **_video(data)}
    times = webp_times(data) if suffix == "webp" else np.zeros(0)
    if len(times) > 1:
        with reported():
            height, width = webp_size(data)[::-1]
        return {"kind": "video", **told, "height": height, "width": width, "frames": len(times), "fps": _rate(times)}
    picture = open_picture(data, ("PNG", "JPEG", "WEBP"))
    with reported():
        upright = ImageOps.exif_transpose(picture)  # reads it, so that a broken one is found now
    return {"kind": "image", **told, "height": upright.height, "width": upright.width, "frames": 1, "fps": 0.0}


def _video(data: bytes) -> dict[str, Any]:
    """Size, frames and rate of a video by its frames' time stamps, not its header; rotated as the first frame."""
    with opened_video(data) as (stream, packets, shown):
        codec = stream.codec_context
        first = next((frame for packet in [*packets, None] for frame in codec.decode(packet)), None)
        if first is None or not len(shown):
            raise ValueError("broken video: there is no frame in it")
        refuse_odd(first)
        size = first.height, round(first.width * float(codec.sample_aspect_ratio or 1))
        height, width = size[::-1] if orientation(first)[0] % 2 else size
        return {"height": height, "width": width, "frames": len(shown), "fps": _rate(shown * float(stream.time_base))}


def _rate(times: Sequence[float] | np.ndarray) -> float:
    """Frames per second by the times at which they are shown; 0 where there is only one."""
    return float((len(times) - 1) / (times[-1] - times[0])) if len(times) > 1 else 0.0
