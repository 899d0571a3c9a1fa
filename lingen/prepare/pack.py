"""From folders of footage to shards with a manifest: `lingen data pack`."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from lingen.data.batch import Progress, no_progress
from lingen.data.captions import NO_CAPTION
from lingen.data.fingerprint import hash_settings, hash_weights
from lingen.data.manifest import About, media_hash
from lingen.prepare.captions import Captions
from lingen.prepare.cut import OUTCOME, ClipRequirements, CutJob, make_samples, read_samples
from lingen.prepare.filters import Filters
from lingen.prepare.footage import Footage, MediaSource, look_through
from lingen.prepare.journal import Note, Part, Record, SetFolder, ShardStream
from lingen.prepare.limits import Duplicates
from lingen.prepare.report import Report, close_set
from lingen.prepare.workers import in_order
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import KINDS, Recipe


class Packing(NamedTuple):
    """What to pack, and how."""

    sources: list[MediaSource]
    captions: Captions
    wanted: ClipRequirements
    filters: Filters
    part: Part = Part()
    processes: int | None = 0
    """Processes that work at once; 0: this process; None: one for each core."""
    shard_mb: int = 1000
    keep_uncaptioned: bool = False
    """Whether samples without a caption are kept, for `lingen data caption`; broken or empty ones are dropped."""
    unseen: Sequence[tuple[str, str]] = ()
    """What lies among the sources and is none, with the reason, for the ledger."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings on which the samples depend."""
        told = {"made_by": "lingen data pack", "wanted": self.wanted._asdict(), "filters": asdict(self.filters)}
        return told | {"keep_uncaptioned": self.keep_uncaptioned}


def wanted_by(stages: Sequence[Recipe]) -> ClipRequirements:
    """The sizes of all stages, their largest frame rate, and each length of a clip, in frames at that rate."""
    data = [stage.data for stage in stages]
    films = [one for one in data if one.mix.video]
    fps = max(one.fps for one in films or data)
    seconds = {frames / one.fps for one in films for frames in (one.frames, *one.lengths)}
    lengths = sorted({math.ceil(length * fps - 1e-6) for length in seconds}, reverse=True)
    groups = [tuple((height, width) for height, width in dict.fromkeys([one.size, *one.sizes])) for one in data]
    return ClipRequirements(tuple(dict.fromkeys(groups)), fps, tuple(lengths))


def filters_for(wanted: ClipRequirements, given: dict[str, Any]) -> Filters:
    """Fills in limits that were not given, from the wanted sizes: nothing is enlarged, no frame is repeated.
    SettingError for a limit out of bounds."""
    side = max(min(min(size) for size in group) for group in wanted.sizes)
    return Filters(**{"min_side": side, "min_fps": round(0.99 * wanted.fps, 3), **given})


def look_for_footage(videos: Sequence[str | Path], images: Sequence[str | Path], wanted: ClipRequirements) -> Footage:
    """All files of the folders. RecipeError where none are named, or where no stage wants what they hold."""
    if not videos and not images:
        raise RecipeError("Say where the footage is: --videos DIR, --images DIR, or both.")
    if videos and not wanted.lengths:
        raise RecipeError("No stage of the recipe trains on videos (data.mix.video is 0); leave --videos away.")
    pictures, films = look_through(images, "image", videos), look_through(videos, "video", images)
    return Footage(pictures.sources + films.sources, sorted({*pictures.unseen, *films.unseen}))


def pack(job: Packing, out: Path, progress: Progress = no_progress) -> Report:
    """Packs this part; when all parts are done, writes the manifest and the ledger of the whole set.

    The same call again goes on where a killed one was, and packs what has been added to the folders since; it looks
    again at what was left out and has other content or captions now. RecipeError as `SetFolder`, `ShardStream.has` and
    `Captions.unused`.

    Args:
        progress: called with the files dealt with and all files of this part.
    Returns:
        of this part; of the whole set once all parts are done."""
    fileless = [Note(key, "caption without a file: a row of the table") for key in job.captions.unused(job.sources)]
    fileless += [Note(name, reason) for name, reason in job.unseen]
    folder = SetFolder(out, job.part, job.settings)
    with folder.locked():
        own = [source for source in job.sources if job.part.holds(f"{source.kind}:{source.key}")]
        done = 0
        for kind in KINDS:
            stream = ShardStream(folder, kind, job.shard_mb * 1_000_000)
            for _ in _pack_kind(job, [source for source in own if source.kind == kind], stream):
                done += 1
                progress(done, len(own))
            stream.commit()
        complete = folder.finish()
    # Near-duplicates of a sample in an earlier part stay in their shard, but not in the manifest.
    across = job.filters.duplicates if job.part.total > 1 else None
    return close_set(folder, About(hash_settings(job.settings), job.settings), complete, fileless, across)


def _pack_kind(job: Packing, sources: list[MediaSource], stream: ShardStream) -> Iterator[MediaSource]:
    """Processes the sources that no earlier run has processed; yields every source, those of earlier runs too."""
    todo: list[CutJob] = []
    for source in sources:
        one = _job(job, source, stream)
        if stream.has(source.key, one.mark):
            yield source
        else:
            todo.append(one)
    written: set[str] = set()
    seen = Duplicates(job.filters.duplicates)
    for entry in stream.entries():
        written.add(entry.row.key)
        seen.add(entry.row.key, entry.looks)
    ended = "unreadable: it ended the process that decoded it"
    done = in_order(make_samples, todo, job.processes, lambda one: Record([], [Note(one.source.key, ended)]))
    for one, outcome in done:
        notes = list(outcome.notes)
        samples = read_samples(one.out) if outcome.entries else iter(())
        for entry, members in zip(outcome.entries, samples, strict=True):
            key = entry.row.key
            if key in written:
                continue  # where a killed run stopped
            twin = seen.find(entry.looks)
            if twin is not None:
                notes.append(Note(key, f"near-duplicate: of {twin}"))
                continue
            seen.add(key, entry.looks)
            stream.write({"__key__": key, **members}, entry)
        stream.note([*notes, Note(one.source.key, mark=one.mark)], one.out)
        yield one.source


def _job(job: Packing, source: MediaSource, stream: ShardStream) -> CutJob:
    captions, fault = list[str](), ""
    try:
        captions = job.captions.of(source)
    except (ValueError, OSError) as error:
        fault = str(error)
        if fault == NO_CAPTION:
            cure = f"write {source.path.stem}.txt beside it, name a table (--captions), or --keep-uncaptioned"
            fault = "" if job.keep_uncaptioned else f"{fault}: {cure}"
    try:
        content = hash_weights(source.path)
    except OSError:  # which is told when it is decoded
        content = ""
    mark = f"{content}.{_digest([captions, fault])}"
    # OUTCOME: what an earlier version left there has another form.
    work = stream.folder.work / f"{stream.kind}-{_digest([OUTCOME, source.key, mark])}.tar"
    return CutJob(source, captions, fault, job.wanted, job.filters, work, mark)


def _digest(told: list[Any]) -> str:
    return media_hash(json.dumps(told).encode())
