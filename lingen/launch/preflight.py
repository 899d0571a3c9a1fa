"""Is every node fit to train? ``lingen doctor --preflight``, and ``lingen fit --preflight`` before its first step.

A look runs in a thread, since what it waits for may never come, and ranks tell what they found through the store where
they met: it answers where a collective hangs. Rank 0 waits for all and judges, and the others hear what it says.
"""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from lingen.launch.looks import ALL_LOOKS, Fitness, Look, Site, Word
from lingen.ranks import heartbeat, launch, local_ranks, signals
from lingen.ranks.collectives import is_connected, on_first_rank
from lingen.ranks.environment import UnfitError
from lingen.recipe.sections import Recipe
from lingen.tables import as_table
from lingen.training.folder import RunFolder

LAG = 20.0
"""Seconds by which one rank may begin a look after another [ours]."""
SHOWN_UNITS = {
    "all_reduce": ("all-reduce GB/s", 1e9), "network": ("network GB/s", 1e9), "write": ("disk GB/s", 1e9),
    "free": ("disk free GB", 1e9), "shm": ("/dev/shm GiB", 2**30), "memory": ("memory GiB", 2**30),
    "gpu": ("step GiB", 2**30), "clock": ("clock s", 1.0),
}  # fmt: skip
_numbers = itertools.count()


def preflight(folder: RunFolder, stages: Sequence[Recipe]) -> Fitness:
    """All looks, by all ranks together; what they found, on each.

    Args:
        folder: of the run, which need not exist.
        stages: that are to be trained; of the one with the most tokens in a batch a step is made.
    Raises:
        UnfitError: rank 0 has gone.
    """
    site = Site(folder.path.absolute(), stages)
    store = dist.distributed_c10d._get_default_store() if is_connected() else dist.HashStore()
    words = _Words(dist.PrefixStore(f"preflight-{next(_numbers)}", store), site)
    try:
        for look in ALL_LOOKS:
            if not words.agree(look):
                break
    finally:
        if site.own.rank == 0:
            shutil.rmtree(site.told["folder"], ignore_errors=True)
    return site.report


def preflight_alone(run: str | Path, stages: Sequence[Recipe]) -> Fitness:
    """The same where nothing is trained after it; starts the ranks that the stages ask for, as `lingen fit` does."""
    launch.join()
    try:
        ranks = on_first_rank(lambda: launch.ranks_to_start(stages))
        if local_ranks.start_ranks(ranks):
            on_first_rank(lambda: ranks)
        report = preflight(RunFolder(Path(run)), stages)
    except BaseException as error:
        local_ranks.give_up(getattr(error, "hung", False))
        raise
    if not report.hung:
        signals.check()
        local_ranks.end_ranks()
    return report


def fitness_lines(report: Fitness) -> Iterator[str]:
    """A row for each node, and a line for whatever is wrong."""
    rows = []
    for node, values in report.nodes.items():
        cells = {title: f"{values[name] / unit:.3g}" for name, (title, unit) in SHOWN_UNITS.items() if name in values}
        rows.append({"node": node, "ranks": str(values["ranks"])} | cells)
    yield as_table(rows, terminal=False)
    if not report.faults:
        yield "every node is fit"
    yield from (f"note: {text}" for text in report.notes)
    for one in report.faults:
        yield f"unfit: {', '.join(one['nodes']) or 'every node'}: {one['look']}: {one['told']}"


class _Words:
    """What the ranks tell each other.

    Args:
        store: of this preflight alone.
    """

    def __init__(self, store: dist.Store, site: Site):
        self.store, self.site, self.first, self.names = store, site, site.own.rank == 0, list[str]()

    def agree(self, look: Look) -> bool:
        """This rank looks, hands on what it found, and takes over what rank 0 says: whether the next look makes sense.
        Meanwhile it gives signs of life, since a look has a limit of its own."""
        site, key = self.site, f"{look.name}/{self.site.own.rank}"
        self.store.set(f"{key}/came", heartbeat.host_name())
        found = _begin(look, site)
        end, shortened = time.monotonic() + look.seconds + (LAG if self.first else 2 * LAG), False
        while not self.store.check(self._keys(look) if self.first else [look.name]):
            if found:
                self.store.set(key, json.dumps((word := found.pop()) | {"signal": signals.noted()}))
                if "error" in word:
                    self.store.set(f"{look.name}/failed", "")
            if not shortened and self.store.check([f"{look.name}/failed"]):  # who waits for that rank waits in vain
                end, shortened = min(end, time.monotonic() + LAG), self.first
            if time.monotonic() > end:
                break
            heartbeat.sign("preflight")
            time.sleep(0.1)
        if self.first:
            goes_on = self._judge(look)
            self.store.set(look.name, json.dumps([goes_on, asdict(site.report), site.told]))
        elif not self.store.check([look.name]):
            raise UnfitError(f"rank 0 gives no answer in the preflight ({look.name})", hung=True)
        goes_on, report, site.told = json.loads(self.store.get(look.name))
        site.report = Fitness(**report)
        return bool(goes_on)

    def _keys(self, look: Look) -> list[str]:
        return [f"{look.name}/{rank}" for rank in range(self.site.own.ranks)]

    def _names(self, keys: list[str]) -> list[str]:
        """The node of each rank; one that never came is its own."""
        if not self.names:
            came = [self.store.check([f"{key}/came"]) for key in keys]
            pairs = enumerate(zip(keys, came, strict=True))
            self.names = [self.store.get(f"{key}/came").decode() if here else f"rank {n}" for n, (key, here) in pairs]
            self.site.report.nodes = {node: {"ranks": count} for node, count in Counter(self.names).items()}
        return self.names

    def _judge(self, look: Look) -> bool:
        keys = self._keys(look)
        words: list[Word | None] = [
            json.loads(self.store.get(key)) if self.store.check([key]) else None for key in keys
        ]
        report, names = self.site.report, self._names(keys)
        late = [rank for rank, word in enumerate(words) if word is None]
        missing = [rank for rank in late if not self.store.check([f"{keys[rank]}/came"])]
        failed = {rank: str(word["error"]) for rank, word in enumerate(words) if word and "error" in word}
        for text in dict.fromkeys(failed.values()):
            report.blame(look.name, [names[rank] for rank, told in failed.items() if told == text], text)
        # Who waits for a rank that has failed, or has not come, is not to blame.
        waited = missing or ([] if failed else late)
        if waited:
            told = ", ".join(f"rank {rank} on {names[rank]}" for rank in waited[:16])
            how = f"{'did not come' if missing else 'is not through'} after {look.seconds:.0f} s: look at its process"
            report.blame(look.name, [names[rank] for rank in waited], f"{told} {how}")
        report.hung = bool(late)
        if not (report.hung or failed):
            step = self.site.own.per_node if look.once else 1
            look.judge(self.site, [(names[rank], cast(Word, words[rank])) for rank in range(0, len(words), step)])
        return not (report.hung or failed or any(word and word["signal"] for word in words))


def _begin(look: Look, site: Site) -> list[Word]:
    """What a look finds, or its error, once it is over: the list is empty until then."""
    found: list[Word] = []

    def run() -> None:
        try:
            if site.device.type == "cuda":
                torch.cuda.set_device(site.device)  # of this thread
            found.append(look.measure(site) if site.own.local_rank == 0 or not look.once else {})
        except Exception as error:
            found.append({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})

    threading.Thread(target=run, name="lingen-preflight", daemon=True).start()
    return found
