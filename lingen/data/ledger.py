"""Counts used and dropped samples, with reasons and names; too many broken ones stop the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from lingen.data.batch import Batch, Drop

ENOUGH = 100
"""Samples after which the share of dropped ones is checked."""
NAMED = 20
"""Dropped samples whose names are kept, for each reason; all are counted."""
CUT = ("truncated shard", "empty shard", "cut off")
"""Reasons that say that the end of something is missing."""


class DataError(ValueError):
    """Too much of the data is broken."""

    def __init__(self, message: str):
        # torch hands an error over from a worker with the worker's traceback in front of its sentence
        super().__init__(message.rpartition("DataError: ")[2])


def reason_of(reason: str) -> str:
    """The group of a reason: its part before the first colon."""
    return reason.partition(":")[0]


def is_cut(drop: Drop) -> bool:
    """Whether the reason says that the end of a shard or of a sample is missing."""
    return reason_of(drop.reason) in CUT


def count_reason(counts: Counter[str], named: dict[str, list[str]], name: str, reason: str) -> None:
    """Counts the group of a reason, and keeps the first different ``name: reason`` of each."""
    counts[reason_of(reason)] += 1
    name_first(named, {reason_of(reason): [f"{name}: {reason}"]})


def name_first(named: dict[str, list[str]], more: Mapping[str, Iterable[str]]) -> None:
    """Adds names to those of each reason, up to `NAMED` different ones."""
    for group, lines in more.items():
        named[group] = list(dict.fromkeys([*named.get(group, []), *lines]))[:NAMED]


class Ledger:
    """Counts of used, dropped, truncated and retried samples, in all, for each shard and for each source. Faults that
    are found when shards are opened (a cut tar, a refused member) count once by name, also after a resume."""

    def __init__(self) -> None:
        self.used = 0
        self.retried = 0
        """Attempts to read a sample after the first one."""
        self.passed = 0
        """Samples that were passed over for a spike (`train.on_spike`)."""
        self.dropped: Counter[str] = Counter()
        """Dropped samples by reason."""
        self.named: dict[str, list[str]] = {}
        """Reason -> the first dropped samples as ``shard:key: reason``."""
        self.faults: dict[str, str] = {}
        """Shard or ``shard:key`` -> what was wrong when the shards were opened."""
        self.left_out: dict[str, int] = {}
        """``kind: reason`` -> samples that are in no bucket of this stage."""
        self.shards: dict[str, Counter[str]] = {}
        """Shard -> ``used``, ``dropped``, ``truncated``, ``retried``."""
        self.sources: dict[str, Counter[str]] = {}
        """The same for where samples came from."""

    @property
    def seen(self) -> int:
        """Samples that were asked for: used and dropped ones."""
        return self.used + self.dropped.total()

    @property
    def truncated(self) -> int:
        """Shards and samples whose end is missing."""
        found = sum(reason_of(reason) in CUT for reason in self.faults.values())
        return found + sum(self.dropped[reason] for reason in CUT)

    def open(self, faults: Iterable[Drop], left_out: Mapping[str, int]) -> None:
        """Adds the faults that were found when the shards were opened."""
        self.faults |= {drop.where: drop.reason for drop in faults}
        self.left_out |= left_out

    def record(self, batch: Batch) -> None:
        """Counts a batch that was trained on, and the samples that were dropped or read again for it."""
        self.used += len(batch.keys)
        for where, source in zip(batch.keys, batch.sources, strict=True):
            self._count("used", where, source)
        for drop in batch.drops:
            count_reason(self.dropped, self.named, drop.where, drop.reason)
            self._count("dropped", drop.where, drop.source)
            if is_cut(drop):
                self._count("truncated", drop.where, drop.source)
        self.retried += len(batch.retries)
        sources = dict(zip(batch.keys, batch.sources, strict=True)) | {d.where: d.source for d in batch.drops}
        for where in batch.retries:
            self._count("retried", where, sources[where])

    def _count(self, what: str, where: str, source: str) -> None:
        end = max(0, where.find(".tar"))  # before it stand folders and servers, whose names may hold colons
        self.shards.setdefault(where[:end] + where[end:].partition(":")[0], Counter())[what] += 1
        self.sources.setdefault(source, Counter())[what] += 1

    def check(self, max_dropped: float, earlier: Ledger | None = None) -> None:
        """DataError where more is broken than `data.max_dropped` allows: 0 stops at the first, 1 never, else a share of
        the samples seen, once 100 were seen. `earlier`: what was counted before; it counts too."""
        ledgers = [earlier, self] if earlier is not None else [self]
        used, seen = sum(one.used for one in ledgers), sum(one.seen for one in ledgers)
        faults = {where: reason for one in ledgers for where, reason in one.faults.items()}
        broken = seen - used + (len(faults) if max_dropped == 0 else 0)
        if max_dropped >= 1 or not broken:
            return
        if max_dropped == 0 or (seen >= ENOUGH and broken > max_dropped * seen):
            found = [f"{where}: {reason}" for where, reason in faults.items()]
            found += [line for one in ledgers for lines in one.named.values() for line in lines]
            raise DataError(
                f"{broken} samples cannot be used ({used} could), more than data.max_dropped: {max_dropped:g} allows. "
                f"The first: {'; '.join(found[:3])}. Mend or remove them, or raise data.max_dropped."
            )

    def summary(self) -> str:
        """One sentence for people."""
        said = f"{self.used:,} samples were used, {self.dropped.total():,} dropped and replaced"
        found = [f"{self.retried:,} reads tried again"] * bool(self.retried)
        found += [f"{len(self.faults):,} faults found in shards"] * bool(self.faults)
        found += [f"{sum(self.left_out.values()):,} samples fit no bucket"] * bool(self.left_out)
        return "; ".join([said, *found]) + "."

    def rows(self) -> list[dict[str, str]]:
        """Rows (what, how many, an example) for a table; the first row counts the used samples."""
        rows = [("used", self.used, "")]
        rows += [(f"dropped: {group}", count, self.named[group][0]) for group, count in self.dropped.most_common()]
        groups = Counter(map(reason_of, self.faults.values()))
        for group, count in groups.items():
            example = next(f"{where}: {reason}" for where, reason in self.faults.items() if reason.startswith(group))
            rows.append((f"found: {group}", count, example))
        rows += [("retried", self.retried, "")] * bool(self.retried)
        rows += [("passed over for spikes", self.passed, "")] * bool(self.passed)
        rows += [(f"left out: {reason}", count, "") for reason, count in self.left_out.items()]
        return [{"samples": what, "count": f"{count:,}", "for example": example} for what, count, example in rows]

    def as_json(self) -> dict[str, Any]:
        """Plain types, with the totals spelled out."""
        return {"seen": self.seen, "truncated": self.truncated, **self.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint: what `add` takes in."""
        return deepcopy(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`; what was counted before the call is forgotten."""
        self.__init__()  # type: ignore[misc]
        self.add(state)

    def add(self, state: dict[str, Any]) -> None:
        """Takes in the `state_dict` of another ledger."""
        for name in ("used", "retried", "passed"):
            setattr(self, name, getattr(self, name) + state.get(name, 0))  # earlier versions passed over none
        self.dropped.update(state["dropped"])
        name_first(self.named, state["named"])
        self.faults |= state["faults"]
        self.left_out |= state["left_out"]
        for own, others in ((self.shards, state["shards"]), (self.sources, state["sources"])):
            for name, counts in others.items():
                own.setdefault(name, Counter()).update(counts)
