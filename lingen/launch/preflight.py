"""Is every node fit to train? ``lingen doctor --preflight``, and ``lingen fit --preflight`` before its first step.

A look runs in a thread, since what it waits for may never come, and ranks tell what they found through the store where
they met: it answers where a collective hangs. Rank 0 waits for all and judges, and the others hear what it says.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

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
        stages: that are to be trained; of the one that takes the most memory a step is made.
    Raises:
        UnfitError: rank 0 has gone.
    """
    site = Site(folder.path.absolute(), stages)
    store = dist.distributed_c10d._get_default_store() if is_connected() else dist.HashStore()
    words = _Words(dist.PrefixStore(f"preflight-{next(_numbers)}", store), site)
    for look in ALL_LOOKS:
        if not words.agree(look, _within(look.seconds, lambda look=look: look.measure(site))):  # type: ignore[misc]
            break
    return site.report


def preflight_alone(run: str | Path, stages: Sequence[Recipe]) -> Fitness:
    """The same where nothing is trained after it; starts the ranks that the stages ask for, as `lingen fit` does."""
    launch.join()
    try:
        ranks = on_first_rank(lambda: launch.ranks_to_start(stages))
        if local_ranks.start_ranks(ranks):
            on_first_rank(lambda: ranks)
        report = preflight(RunFolder(Path(run)), stages)
    except BaseException:
        local_ranks.give_up()
        raise
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
    yield from (f"note: {text}" for text in report.notes)
    for one in report.faults:
        yield f"unfit: {', '.join(one['nodes']) or 'every node'}: {one['look']}: {one['told']}"


def _within(seconds: float, act: Callable[[], Word]) -> Word:
    """What a look finds, its error, or that it is not over."""
    found: list[Word] = []

    def run() -> None:
        try:
            found.append(act())
        except Exception as error:
            found.append({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})

    threading.Thread(target=run, name="lingen-preflight", daemon=True).start()
    return found[0] if _wait(seconds, lambda: bool(found)) else {"late": True}


def _wait(seconds: float, is_over: Callable[[], bool]) -> bool:
    """Whether something is over in time. Meanwhile this rank gives signs of life, since a look has its own limit."""
    end = time.monotonic() + seconds
    while not is_over():
        if time.monotonic() > end:
            return False
        heartbeat.sign("preflight")
        time.sleep(0.1)
    return True


class _Words:
    """What the ranks tell each other.

    Args:
        store: of this preflight alone.
    """

    def __init__(self, store: dist.Store, site: Site):
        self.store, self.site = store, site

    def agree(self, look: Look, word: Word) -> bool:
        """Hands on what this rank found, and takes over what rank 0 says; whether the next look makes sense."""
        site = self.site
        self.store.set(f"{look.name}/{site.own.rank}", json.dumps(word | {"signal": signals.noted()}))
        if site.own.rank == 0:
            goes_on = self._judge(look)
            self.store.set(look.name, json.dumps([goes_on, asdict(site.report), site.told]))
        if not _wait(look.seconds + 2 * LAG, lambda: self.store.check([look.name])):
            raise UnfitError(f"rank 0 gives no answer in the preflight ({look.name})", hung=True)
        goes_on, report, site.told = json.loads(self.store.get(look.name))
        site.report = Fitness(**report)
        return bool(goes_on)

    def _judge(self, look: Look) -> bool:
        words = self._gather(look)
        report, names = self.site.report, self.site.names(words)
        missing = [rank for rank, word in enumerate(words) if word is None]
        late = [rank for rank, word in enumerate(words) if word and "late" in word]
        failed = {rank: str(word["error"]) for rank, word in enumerate(words) if word and "error" in word}
        whole = [(names[rank], word) for rank, word in enumerate(words) if word and not word.keys() & {"late", "error"}]
        for text in dict.fromkeys(failed.values()):
            report.blame(look.name, [names[rank] for rank, told in failed.items() if told == text], text)
        # Who waits for a rank that has failed, or has not come, is not to blame.
        waited = missing or ([] if failed else late)
        if waited:
            told = ", ".join(f"rank {rank} on {names[rank]}" for rank in waited[:16])
            how = "did not come" if missing else "is not through"
            report.blame(look.name, [names[rank] for rank in waited], f"{told} {how} after {look.seconds:.0f} s")
        report.hung = bool(missing or late)
        if not (report.hung or failed):
            look.judge(self.site, whole)
        return not (report.hung or failed or any(word["signal"] for _, word in whole))

    def _gather(self, look: Look) -> list[Word | None]:
        """Of each rank; None where it did not come."""
        keys = [f"{look.name}/{rank}" for rank in range(self.site.own.ranks)]
        _wait(look.seconds + LAG, lambda: self.store.check(keys))
        return [json.loads(self.store.get(key)) if self.store.check([key]) else None for key in keys]
