"""What became of the samples: counted, named, and too many of them stop the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from lingen.data.batch import Batch, Drop
from lingen.data.shards import FAULTS

ENOUGH = 100
"""Samples seen before a share of dropped ones means something."""
NAMED = 20
"""Dropped samples that are kept by name for each reason; all are counted."""


class DataError(ValueError):
    """Too much of the data is broken."""

    def __init__(self, message: str):
        # torch hands an error over from a worker with the worker's traceback in front of its sentence
        super().__init__(message.rpartition("DataError: ")[2])


class Ledger:
    """Counts of used and dropped samples. A reason's part before the first colon is what drops are grouped by.

    Faults that are found when shards are opened (a cut tar, a refused member) count once by name, also after a resume.
    """

    def __init__(self) -> None:
        self.used = 0
        self.dropped: Counter[str] = Counter()
        """Dropped samples by reason."""
        self.shards: Counter[str] = Counter()
        """Dropped samples by shard."""
        self.named: dict[str, list[str]] = {}
        """Reason -> the first dropped samples as ``shard:key: reason``."""
        self.faults: dict[str, str] = {}
        """Shard or ``shard:key`` -> what was wrong when the shards were opened."""

    @property
    def seen(self) -> int:
        """Samples that were asked for: used and dropped ones."""
        return self.used + self.dropped.total()

    def record(self, batch: Batch) -> None:
        """Counts a batch that was trained on, and what was dropped on the way to it."""
        self.used += len(batch.keys)
        for drop in batch.drops:
            self._drop(drop)

    def _drop(self, drop: Drop) -> None:
        group = drop.reason.partition(":")[0]
        if group in FAULTS:
            self.faults[drop.where] = drop.reason
            return
        self.dropped[group] += 1
        self.shards[drop.where.partition(":")[0]] += 1
        self._name(group, [f"{drop.where}: {drop.reason}"])

    def _name(self, group: str, lines: Iterable[str]) -> None:
        """Keeps the first few different names."""
        self.named[group] = list(dict.fromkeys([*self.named.get(group, []), *lines]))[:NAMED]

    def check(self, max_dropped: float) -> None:
        """DataError where more is broken than `data.max_dropped` allows: 0 stops at the first, 1 never, else a share of
        the samples seen, once 100 were seen."""
        broken = self.dropped.total() + (len(self.faults) if max_dropped == 0 else 0)
        if max_dropped >= 1 or not broken:
            return
        if max_dropped == 0 or (self.seen >= ENOUGH and broken > max_dropped * self.seen):
            raise DataError(
                f"{broken} samples cannot be used ({self.used} could), more than data.max_dropped: {max_dropped:g} "
                f"allows. The first: {'; '.join(self._first(3))}. Mend or remove them, or raise data.max_dropped."
            )

    def _first(self, count: int) -> list[str]:
        found = [f"{where}: {reason}" for where, reason in self.faults.items()]
        return [*found, *(line for lines in self.named.values() for line in lines)][:count]

    def summary(self) -> str:
        """One sentence for people, or nothing where all is well."""
        counts = [f"{count} x {group}" for group, count, _ in self.rows()[1:]]
        if not counts:
            return ""
        total = self.dropped.total()
        first = self._first(1)[0]
        return f"Of {self.seen} samples {total} were dropped and replaced ({', '.join(counts)}); first: {first}."

    def _fault_groups(self) -> Counter[str]:
        return Counter(reason.partition(":")[0] for reason in self.faults.values())

    def rows(self) -> list[tuple[str, int, str]]:
        """(reason, how many, an example) for a table; the first row is what was used."""
        rows = [("used", self.used, "")]
        rows += [(group, count, self.named[group][0]) for group, count in self.dropped.most_common()]
        for group, count in self._fault_groups().items():
            example = next(f"{where}: {reason}" for where, reason in self.faults.items() if reason.startswith(group))
            rows.append((group, count, example))
        return rows

    def as_json(self) -> dict[str, Any]:
        """Plain types, with the totals spelled out."""
        return {"seen": self.seen, **self.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return {
            "used": self.used,
            "dropped": dict(self.dropped),
            "shards": dict(self.shards),
            "named": {group: list(lines) for group, lines in self.named.items()},
            "faults": dict(self.faults),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`; what was counted before the call is forgotten."""
        self.__init__()  # type: ignore[misc]
        self._add(state)

    def _add(self, state: dict[str, Any]) -> None:
        self.used += state["used"]
        self.dropped.update(state["dropped"])
        self.shards.update(state["shards"])
        for group, lines in state["named"].items():
            self._name(group, lines)
        self.faults |= state["faults"]

    @classmethod
    def merged(cls, states: Iterable[dict[str, Any]]) -> Ledger:
        """One ledger from the `state_dict` of every rank."""
        ledger = cls()
        for state in states:
            ledger._add(state)
        return ledger
