"""A set of shards that several jobs write step by step, each of which may be killed at any moment.

Each part of the set (``--part 3/64``) has a folder below ``OUT/.parts``. A shard appears in one step, after its record:
what lies in it, and what became of everything that was looked at since the shard before. So the records alone say where
to continue, and no sample is lost or written twice. When all parts are done, their records become the manifest and the
ledger."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lingen.data.fingerprint import differences
from lingen.data.manifest import Row
from lingen.data.shards import open_shard
from lingen.files import write_json, write_text
from lingen.recipe.errors import RecipeError


class Part(NamedTuple):
    """The `number`-th of `total` equal shares, counted from 1."""

    number: int = 1
    total: int = 1

    def holds(self, name: str) -> bool:
        """Whether this name is in the share. A name's share does not depend on the other names."""
        digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.total == self.number - 1

    def slice_of(self, count: int) -> slice:
        """Its share of `count` items in order, as one range."""
        return slice(count * (self.number - 1) // self.total, count * self.number // self.total)

    def __str__(self) -> str:
        return f"{self.number:03d}-of-{self.total:03d}"


def parse_part(text: str | None) -> Part:
    """``3/64`` -> the third of 64. RecipeError for anything else."""
    if text is None:
        return Part()
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise RecipeError(
            f"--part is a number and how many there are, counted from 1, such as 3/64; got '{text}'. (A job array: "
            "`--array=1-64` and `--part $SLURM_ARRAY_TASK_ID/64`.)"
        )
    return Part(int(number), int(count))


KEPT = "kept, "
"""How the reason of a note begins that leaves nothing out."""


class Note(NamedTuple):
    """The outcome for a source or sample."""

    name: str
    """A source, or a sample of it."""
    reason: str = ""
    """``reason: detail`` of what was left out, or of what was changed (`KEPT`); empty: used."""
    mark: str = ""
    """Hashes, with points between them, of what decided it: the source's content (empty: not known), its captions."""


def name_for(key: str, place: str, taken: set[str]) -> str:
    """The name of a sample in a part: its key; where an earlier one has it, with digits of its place. It is added to
    those `taken`."""
    name = f"{key}-{hashlib.blake2b(place.encode(), digest_size=4).hexdigest()}" if key in taken else key
    taken.add(name)
    return name


class JournalEntry(NamedTuple):
    """A sample in a shard, or on its way there."""

    row: Row
    looks: tuple[int, ...] = ()
    """Looks of the clip for `Duplicates`; empty where clips are not compared."""
    source: str = ""
    """What it was made of, as a note names it; empty in sets of earlier versions."""
    mark: str = ""
    """As a note's, of then."""


class Record(NamedTuple):
    """A shard, and the outcome of everything since the shard before. A record without `entries` has no shard."""

    entries: list[JournalEntry]
    notes: list[Note]


class SetFolder:
    """The folder of a set, as one job sees it; it is made where it is missing. RecipeError where it holds something
    else, or was begun in another way.

    Args:
        part: the share of this job.
        settings: plain values that all parts, and all runs, must have in common."""

    def __init__(self, out: Path, part: Part, settings: dict[str, Any]):
        self.out, self.part, self.settings = out, part, settings
        self.parts = out / ".parts"
        if out.exists() and not self.parts.is_dir() and (not out.is_dir() or any(out.iterdir())):
            raise RecipeError(f"'{out}' exists and was not begun by this command. Name a new or empty folder.")
        self.own = self.parts / str(part)
        self.records, self.work = self.own / "records", self.own / "work"
        """The second one is for files that are not in a shard yet."""
        self.records.mkdir(parents=True, exist_ok=True)
        told = json.loads(json.dumps({**settings, "parts": part.total}))
        path = self.parts / "settings.json"
        if not path.is_file():
            write_json(path, told, indent=1)
        held = json.loads(path.read_text(encoding="utf-8"))
        if held != told:
            raise RecipeError(
                f"'{out}' was begun in another way: {'; '.join(differences(held, told))}. Go on as it was begun, or "
                "name another folder."
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """RecipeError where another process works at this part. A killed one leaves no lock."""
        import fcntl  # which Windows lacks

        with (self.own / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RecipeError(f"Another process is at part {self.part} of '{self.out}'; wait for it.") from error
            try:
                yield
            finally:  # processes that were ended in the middle of a file, or killed ones, leave it
                for partial in self.work.glob("*.partial"):
                    partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def finishing(self, *names: str) -> Iterator[None]:
        """One process at a time; what a killed one left of these files of the set is removed."""
        import fcntl

        with (self.parts / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for partial in (path for name in names for path in self.out.glob(f"{name}.*.partial")):
                partial.unlink()
            yield

    def finish(self) -> bool:
        """Marks this part as done. True where all are."""
        shutil.rmtree(self.work, ignore_errors=True)
        write_text(self.own / "done", "")
        return all((folder / "done").is_file() for folder in self._folders())

    def records_of(self, kind: str, whole: bool) -> Iterator[Record]:
        """The records of a kind: of the `whole` set in the order of its parts, or of this part alone."""
        for folder in self._folders() if whole else [self.own]:
            yield from (parse_record(path.read_bytes()) for path in sorted(folder.glob(f"records/{kind}-*.json")))

    def _folders(self) -> list[Path]:
        """Those of all parts, in order."""
        return [self.parts / str(self.part._replace(number=number)) for number in range(1, self.part.total + 1)]


def parse_record(text: str | bytes) -> Record:
    """A record of the JSON of its `_asdict`."""
    held = json.loads(text)
    entries = [JournalEntry(Row(*row), tuple(looks), *made_of) for row, looks, *made_of in held["entries"]]
    return Record(entries, [Note(*note) for note in held["notes"]])


CHANGED = {"file": "has changed since", "captions": "has other captions than when"}
"""What the hashes of a mark are of, and what is said where they differ."""


class ShardStream:
    """Shards of one kind, one after the other; goes on behind those that are there.

    Args:
        folder: the set.
        kind: the first word of their names: ``video-003-00000.tar`` of part 3, ``video-00000.tar`` where there is one.
        limit: bytes of a shard; the sample that passes it is its last."""

    def __init__(self, folder: SetFolder, kind: str, limit: int):
        self.folder, self.kind, self.limit = folder, kind, limit
        self._prefix = f"{kind}-" if folder.part.total == 1 else f"{kind}-{folder.part.number:03d}-"
        self._number = 0
        self.committed = list(self._settle())
        """The records of earlier runs."""
        notes = (note for record in self.committed for note in record.notes)
        self._finished = {note.name: note.mark for note in notes if not note.reason}
        """Everything that they are done with, and its marks."""
        self._made = {entry.source: entry.mark for entry in self.entries()}
        """Marks of what has samples here."""
        self._again: set[str] = set()
        """What was left out by other marks than it has now."""
        self._record = Record([], [])
        self._used: list[Path] = []
        self._open = contextlib.ExitStack()
        """The shard that is written."""
        self._tar: Any = None

    def _settle(self) -> Iterator[Record]:
        """The records of earlier runs. What a killed run left unfinished is removed, to be made again."""
        for partial in self.folder.out.glob(f"{self._prefix}*.partial"):
            partial.unlink()
        paths = sorted(self.folder.records.glob(f"{self.kind}-*.json"))
        for path in paths:
            record = parse_record(path.read_bytes())
            shard = self._shard
            if not record.entries or shard.is_file():
                self._number += 1
                yield record
            elif path == paths[-1]:
                path.unlink()
            else:
                raise RecipeError(f"'{shard}' is gone, though later shards are there. Put it back, or begin anew.")

    @property
    def _shard(self) -> Path:
        return self.folder.out / f"{self._prefix}{self._number:05d}.tar"

    def has(self, name: str, mark: str) -> bool:
        """Whether earlier runs are done with it. What they left out is not done where its mark has changed. RecipeError
        where samples of it are there that its mark does not hold for any more."""
        held = self._finished.get(name)
        made = self._made.get(name, self._made.get(""))
        if made is None and held not in (None, mark):
            self._again.add(name)
            return False
        then = "" if made is None else made or held or ""
        for what, old, new in zip(CHANGED, then.split("."), mark.split("."), strict=False):
            if old and new and old != new:
                raise RecipeError(
                    f"'{name}' {CHANGED[what]} it went into '{self.folder.out}': its samples there are old. Name a new "
                    f"folder (--out), or bring the old {what} back."
                )
        return held is not None

    def entries(self) -> Iterator[JournalEntry]:
        """The samples in the shards of earlier runs."""
        return (entry for record in self.committed for entry in record.entries)

    def write(self, sample: dict[str, Any], entry: JournalEntry) -> None:
        """Adds a sample; its row's shard, offset and length are filled in."""
        if self._tar is None:
            self._tar = open_shard(self._open, self._shard)
        start = self._tar.tarstream.offset
        self._tar.write(sample)
        end = self._tar.tarstream.offset
        last = max(key for key in sample if not key.startswith("__"))
        row = entry.row._replace(shard=self._shard.name, offset=start, length=end - start - -len(sample[last]) % 512)
        self._record.entries.append(entry._replace(row=row))
        if end >= self.limit:
            self.commit()

    def note(self, notes: Iterable[Note], used: Path | None = None) -> None:
        """Notes an outcome; `used` is a file that can be deleted once the shard is written."""
        self._record.notes.extend(notes)
        self._used += [used] if used is not None else []

    def commit(self) -> None:
        """Writes the record and then renames the shard to its final name."""
        if not self._record.entries and not self._record.notes:
            return
        self._forget()
        write_json(self.folder.records / f"{self.kind}-{self._number:05d}.json", self._record._asdict(), indent=None)
        self._open.close()
        for used in self._used:
            used.unlink(missing_ok=True)
        self._number += 1
        self._record, self._used, self._tar = Record([], []), [], None

    def _forget(self) -> None:
        """Takes the notes on what is looked at again out of the records of earlier runs: it is not done until this run
        has written its own."""
        for number, record in enumerate(self.committed if self._again else ()):
            kept, own = list[Note](), list[Note]()
            for note in record.notes:
                own.append(note)
                if not note.reason:  # the last one on its source
                    kept += [] if note.name in self._again else own
                    own = []
            if kept != record.notes:
                told = record._replace(notes=kept)._asdict()
                write_json(self.folder.records / f"{self.kind}-{number:05d}.json", told, indent=None)
        self._again.clear()
