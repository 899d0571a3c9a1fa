"""Is every node fit to train? ``lingen doctor --preflight``, and ``lingen fit --preflight`` before its first step.

A check runs in a thread, since what it waits for may never come, and ranks tell what they found through the store where
they met: it answers where a collective hangs. Rank 0 waits for all and judges, and the others hear what it says."""

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

from lingen.launch.checks import NODE_CHECKS, Measured, NodeCheck, PreflightContext, PreflightReport
from lingen.ranks import heartbeat, launch, local_ranks, signals
from lingen.ranks.collectives import is_connected, on_first_rank
from lingen.ranks.environment import UnfitError
from lingen.recipe.sections import Recipe
from lingen.run_folder.folder import RunFolder
from lingen.tables import as_table

LAG = 20.0
"""Seconds by which one rank may begin a check after another [ours]."""
SHOWN_UNITS = {
    "all_reduce": ("all-reduce GB/s", 1e9), "network": ("network GB/s", 1e9), "write": ("disk GB/s", 1e9),
    "free": ("disk free GB", 1e9), "shm": ("/dev/shm GiB", 2**30), "memory": ("memory GiB", 2**30),
    "gpu": ("step GiB", 2**30), "clock": ("clock s", 1.0),
}  # fmt: skip
_numbers = itertools.count()


def preflight(folder: RunFolder, stages: Sequence[Recipe]) -> PreflightReport:
    """All checks, by all ranks together; what they found, on each.

    Args:
        folder: of the run, which need not exist.
        stages: that are to be trained; of the one with the most tokens in a batch a step is made.
    Raises:
        UnfitError: rank 0 has gone."""
    context = PreflightContext(folder.path.absolute(), stages)
    store = dist.distributed_c10d._get_default_store() if is_connected() else dist.HashStore()
    store = dist.PrefixStore(f"preflight-{next(_numbers)}", store)  # of this one alone
    try:
        for check in NODE_CHECKS:
            if not _agree(store, context, check):
                break
    finally:
        if context.own.rank == 0:
            shutil.rmtree(context.told["folder"], ignore_errors=True)
    return context.report


def preflight_alone(run: str | Path, stages: Sequence[Recipe]) -> PreflightReport:
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


def report_lines(report: PreflightReport) -> Iterator[str]:
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
        yield f"unfit: {', '.join(one['nodes']) or 'every node'}: {one['check']}: {one['told']}"


def _agree(store: dist.Store, context: PreflightContext, check: NodeCheck) -> bool:
    """This rank checks, hands on what it found, and takes over what rank 0 says: whether the next check makes sense.
    Meanwhile it gives signs of life, since a check has a limit of its own."""
    first, keys = context.own.rank == 0, [f"{check.name}/{rank}" for rank in range(context.own.ranks)]
    store.set(f"{keys[context.own.rank]}/came", heartbeat.host_name())
    found = _begin(check, context)
    end, shortened = time.monotonic() + check.seconds + (LAG if first else 2 * LAG), False
    while not store.check(keys if first else [check.name]):
        if found:
            store.set(keys[context.own.rank], json.dumps((word := found.pop()) | {"signal": signals.noted()}))
            if "error" in word:
                store.set(f"{check.name}/failed", "")
        if not shortened and store.check([f"{check.name}/failed"]):  # who waits for that rank waits in vain
            end, shortened = min(end, time.monotonic() + LAG), first
        if time.monotonic() > end:
            break
        heartbeat.sign("preflight")
        time.sleep(0.1)
    if first:
        goes_on = _judge(store, context, check, keys)
        store.set(check.name, json.dumps([goes_on, asdict(context.report), context.told]))
    elif not store.check([check.name]):
        raise UnfitError(f"rank 0 gives no answer in the preflight ({check.name})", hung=True)
    goes_on, report, context.told = json.loads(store.get(check.name))
    context.report = PreflightReport(**report)
    return bool(goes_on)


def _judge(store: dist.Store, context: PreflightContext, check: NodeCheck, keys: Sequence[str]) -> bool:
    words = [json.loads(store.get(key)) if store.check([key]) else None for key in keys]
    came, report = [store.check([f"{key}/came"]) for key in keys], context.report
    if not context.names:  # one that never came is its own node
        pairs = enumerate(zip(keys, came, strict=True))
        context.names = [store.get(f"{key}/came").decode() if here else f"rank {n}" for n, (key, here) in pairs]
        report.nodes = {node: {"ranks": count} for node, count in Counter(context.names).items()}
    names = context.names
    late = [rank for rank, word in enumerate(words) if word is None]
    missing = [rank for rank in late if not came[rank]]
    failed = {rank: str(word["error"]) for rank, word in enumerate(words) if word and "error" in word}
    for text in dict.fromkeys(failed.values()):
        report.blame(check.name, [names[rank] for rank, told in failed.items() if told == text], text)
    # Who waits for a rank that has failed, or has not come, is not to blame.
    waited = missing or ([] if failed else late)
    if waited:
        told = ", ".join(f"rank {rank} on {names[rank]}" for rank in waited[:16])
        how = f"{'did not come' if missing else 'is not through'} after {check.seconds:.0f} s: look at its process"
        report.blame(check.name, [names[rank] for rank in waited], f"{told} {how}")
    report.hung = bool(late)
    if not (report.hung or failed):
        step = context.own.per_node if check.once else 1
        check.judge(context, [(names[rank], cast(Measured, words[rank])) for rank in range(0, len(words), step)])
    return not (report.hung or failed or any(word and word["signal"] for word in words))


def _begin(check: NodeCheck, context: PreflightContext) -> list[Measured]:
    """What a check finds, or its error, once it is over: the list is empty until then."""
    found: list[Measured] = []

    def run() -> None:
        try:
            if context.device.type == "cuda":
                torch.cuda.set_device(context.device)  # of this thread
            found.append(check.measure(context) if context.own.local_rank == 0 or not check.once else {})
        except Exception as error:
            found.append({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})

    threading.Thread(target=run, name="lingen-preflight", daemon=True).start()
    return found
