"""A report of what a command did with a data set: counts by reason, as a table and as JSON."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lingen.data import manifest
from lingen.data.ledger import count_reason
from lingen.data.manifest import About, Row
from lingen.files import write_json
from lingen.prepare.journal import KEPT, Note, Record, SetFolder
from lingen.prepare.limits import Duplicates
from lingen.recipe.sections import KINDS

LEDGER = "ledger.json"
"""Name of the report in the folder of a set."""


class Report:
    """Counts of samples made and of what was left out."""

    def __init__(self) -> None:
        self.looked_at = 0
        """Sources (files, or samples of another set) that were dealt with."""
        self.made: Counter[str] = Counter()
        """Samples by kind."""
        self.seconds = 0.0
        """Length of all clips."""
        self.bytes = 0
        """Of all samples."""
        self.changed: Counter[str] = Counter()
        """What was changed -> sources that were kept."""
        self.left_out: Counter[str] = Counter()
        """Reason -> sources or clips."""
        self.named: dict[str, list[str]] = {}
        """Reason, or what was changed -> the first ones as ``name: reason: detail``."""

    def add(self, record: Record) -> None:
        """Counts what a record tells."""
        for entry in record.entries:
            row = entry.row
            self.made[row.kind] += 1
            self.seconds += row.frames / row.fps if row.fps else 0.0
            self.bytes += row.length
        for name, reason, _ in record.notes:
            if reason:
                counts = self.changed if reason.startswith(KEPT) else self.left_out
                count_reason(counts, self.named, name, reason)
            else:
                self.looked_at += 1

    def rows(self) -> list[dict[str, str]]:
        """For a table: what was made, then what was left out, most frequent first, with an example."""
        told = [(reason, n, self.named[reason][0].partition(":")[0]) for reason, n in self.changed.most_common()]
        told += [(f"left out: {reason}", n, self.named[reason][0]) for reason, n in self.left_out.most_common()]
        made = [{"what": kind, "count": f"{count:,}"} for kind, count in sorted(self.made.items())]
        return made + [{"what": what, "count": f"{count:,}", "first": first} for what, count, first in told]

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        changed = {reason.removeprefix(KEPT): count for reason, count in self.changed.items()}
        return {**vars(self), "seconds": round(self.seconds, 3), "changed": changed}


def close_set(
    folder: SetFolder, about: About, complete: bool, notes: Sequence[Note] = (), limit: int | None = None
) -> Report:
    """The report of this part; once all parts are done, that of the whole set, which gets its manifest and ledger. A
    set without samples gets only the ledger, which says why.

    Args:
        notes: on what is in no part.
        limit: of `Duplicates`: a sample that looks like an earlier one of its kind stays in its shard, but not in the
            manifest."""
    report, rows, twins = Report(), list[Row](), list[str]()
    with folder.finishing(manifest.NAME, LEDGER):  # while it is read, too: what is written is never of before
        for kind in KINDS:
            seen = Duplicates(limit if complete else None)
            for record in folder.records_of(kind, complete):
                told = Record([], [*record.notes])
                for entry in record.entries:
                    twin = seen.find(entry.looks)
                    if twin is None:
                        seen.add(entry.row.key, entry.looks)
                        told.entries.append(entry)
                    else:
                        twins.append(f"{entry.row.shard}:{entry.row.key}")
                        told.notes.append(Note(twins[-1], f"near-duplicate: of {twin}, in another part"))
                rows += [entry.row for entry in told.entries]
                report.add(told)
        if not complete:
            return report
        report.add(Record([], [*notes]))
        if rows:
            manifest.write(folder.out / manifest.NAME, rows, about)
        write_json(folder.out / LEDGER, report.as_json() | {"not_in_manifest": twins}, indent=1, end="\n")
    return report
