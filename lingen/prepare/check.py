"""Checks that shards are complete and that their manifest is right: `lingen data check`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from lingen.data import manifest
from lingen.data.batch import Drop, Progress, no_progress
from lingen.data.captions import captions_of
from lingen.data.decode import decode_sample
from lingen.data.latents import LATENTS_NPY, read_sample_latents, read_text
from lingen.data.manifest import ManifestError, Row, media_hash
from lingen.data.shards import parse_sample, scan_shard
from lingen.prepare.index import compressed_shards, crashed_at, describe_sample, shards_of
from lingen.prepare.report import LEDGER
from lingen.prepare.workers import in_order
from lingen.recipe.text import decode_json

Depth = Literal["quick", "full", "decode"]
"""Depths of a check: headers and manifest; also every byte; also every frame."""


class CheckJob(NamedTuple):
    """A shard to check."""

    path: Path
    rows: list[Row] | None
    """The manifest's rows for the shard; None: there is no manifest."""
    left_out: frozenset[str]
    """Keys of the shard that the manifest leaves out on purpose."""
    depth: Depth


class Checked(NamedTuple):
    """What was found in a shard."""

    samples: int
    faults: list[Drop]


def check_folders(
    folders: Sequence[Path], depth: Depth, processes: int | None = 0, progress: Progress = no_progress
) -> Checked:
    """Checks all shards of local folders against each folder's manifest, where it has one. RecipeError for a folder
    that is none, or holds no shard.

    Args:
        processes: that read shards at the same time; 0: this one; None: one for each core.
        progress: called with the shards checked and all shards."""
    begun, samples = [_jobs(folder, depth) for folder in folders], 0
    jobs = [job for of_folder, _ in begun for job in of_folder]
    faults = [fault for _, missing in begun for fault in missing]
    done = in_order(check_shard, jobs, processes, lambda job: Checked(0, [crashed_at(job.path)]))
    for number, (_, found) in enumerate(done, 1):
        samples += found.samples
        faults += found.faults
        progress(number, len(jobs))
    return Checked(samples, faults)


def _jobs(folder: Path, depth: Depth) -> tuple[list[CheckJob], list[Drop]]:
    paths = {path.name: path for path in shards_of(folder)}
    faults = compressed_shards(folder)
    rows: dict[str, list[Row]] | None = None
    if (folder / manifest.NAME).is_file():
        rows = {name: [] for name in paths}
        try:
            for row in manifest.rows(folder / manifest.NAME):
                rows.setdefault(row.shard, []).append(row)
        except ManifestError as error:
            faults.append(Drop(manifest.NAME, f"unreadable manifest: {error}"))
        gone = rows.keys() - paths.keys()
        faults += [Drop(name, f"missing shard: the manifest has {len(rows[name])} samples of it") for name in gone]
    ledger = folder / LEDGER
    out: frozenset[str] = frozenset()
    try:
        told = decode_json(ledger.read_bytes()) if ledger.is_file() else {}
        out = frozenset(told.get("not_in_manifest", []))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        faults.append(Drop(LEDGER, f"unreadable ledger: {error}; what it leaves out counts as missing"))
    jobs = [CheckJob(path, None if rows is None else rows[name], out, depth) for name, path in paths.items()]
    return jobs, faults


def check_shard(job: CheckJob) -> Checked:
    """Checks one shard; faults name ``shard:key`` and what is wrong."""
    try:
        samples = 0
        faults: list[Drop] = []
        known = {row.key: row for row in job.rows or ()}
        seen: set[str] = set()
        with job.path.open("rb") as file:
            for entry in scan_shard(job.path):
                where = f"{job.path.name}:{entry.key}" if entry.key else job.path.name
                samples += bool(entry.key)
                row = known.get(entry.key)
                problems = [entry.fault] if entry.fault else []
                if entry.key and job.depth != "quick" and not entry.fault:
                    file.seek(entry.start)
                    problems += _look_into(file.read(entry.end - entry.start), entry.key, row, job.depth)
                if entry.key and job.rows is not None and where not in job.left_out and not entry.fault:
                    place = entry.start, entry.end - entry.start
                    if row is None:
                        problems = problems or ["not in the manifest: the shard has it"]  # no broken one belongs there
                    elif (row.offset, row.length) != place:
                        told = f"it says {row.length} bytes at {row.offset}, there are {place[1]} at {place[0]}"
                        problems.append(f"manifest is wrong: {told}")
                faults += [Drop(where, problem) for problem in problems]
                seen.add(entry.key)
        gone = [f"{job.path.name}:{key}" for key in known if key not in seen]
        faults += [Drop(where, "missing sample: the manifest has it, the shard has not") for where in gone]
        return Checked(samples, faults)
    except OSError as error:
        return Checked(0, [Drop(job.path.name, f"unreadable shard: {error.strerror or error}")])


def _look_into(data: bytes, key: str, row: Row | None, depth: Depth) -> Iterator[str]:
    """Reads a sample as training would, and judges one that no hash vouches for as `lingen data index` does; decodes
    every frame where that is asked for."""
    try:
        members = parse_sample(data, key)
        captions = captions_of(members)
        if row is not None:
            if row.captions and (row.captions, row.caption_length) != (len(captions), len(captions[0])):
                yield "manifest is wrong: of the captions"
            vouched = media_hash(members.get(row.media, b"")) == row.hash
            if row.hash and not vouched:
                yield "damaged sample: its media are not those that the manifest was made of"
        if depth == "decode":
            _decode(members, row)
        elif (row is None or not row.hash) and LATENTS_NPY not in members:
            describe_sample(members)
    except (OSError, ValueError) as error:
        yield str(error)


def _decode(members: dict[str, bytes], row: Row | None) -> None:
    """Decodes every frame. ValueError where one cannot be."""
    if LATENTS_NPY in members:
        read_sample_latents(members)
        read_text(members, len(captions_of(members)))
        return
    told = describe_sample(members)
    frames, fps = told["frames"], told["fps"] or 1.0
    decode_sample(members, told["kind"], frames=frames, size=(16, 16), fps=fps, start=0.0)
    if row is not None and row.frames and row.frames != frames:
        raise ValueError(f"manifest is wrong: it says {row.frames} frames, there are {frames}")
