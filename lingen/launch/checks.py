"""The checks of a preflight: what each rank measures, and what rank 0 makes of it (`lingen.launch.preflight`)."""

from __future__ import annotations

import gc
import os
import re
import secrets
import shutil
import time
import timeit
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from lingen.data.datamodule import ClipData, as_it_is
from lingen.files import wait_for, write_text
from lingen.plan.forecast import Plan, disk_of, plan, signal_seconds
from lingen.provenance import git_commit, versions
from lingen.ranks.environment import UnfitError, here
from lingen.ranks.slurm import answer
from lingen.recipe.sections import Recipe
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.saver import memory_left
from lingen.training.trainer import build_trainer

MESSAGE = {"cuda": 256 << 20, "cpu": 4 << 20}
"""Bytes that are sent and written, by type of device [ours]."""
TIMES = 3
"""Of each message; the first one makes the connection."""
SLOW_SHARE = 0.25
"""Share of the median speed below which a node is slow, where there are at least `FEWEST` [ours]."""
FEWEST = 4
SKEW = 30.0
"""Seconds by which clocks may differ: how long a rank has been silent is read on another machine [ours]."""
WORKER = 1 << 28
"""Bytes of memory that a loader worker may take beside its batches [ours]."""
AHEAD = 3
"""Batches that a worker holds in /dev/shm: two ahead, and one that is used."""

Measured = dict[str, Any]
"""What a rank found: plain values."""
AllMeasured = Sequence[tuple[str, Measured]]
"""Those of all ranks, in order, with the names of their nodes."""


@dataclass
class PreflightReport:
    """What was found."""

    nodes: dict[str, dict[str, float]] = field(default_factory=dict)
    """Name of each node -> what was measured there: bytes, bytes a second, seconds."""
    faults: list[dict[str, Any]] = field(default_factory=list)
    """What keeps a run from training: ``check``, ``nodes`` (none: the same on all) and ``told``, with the cure."""
    notes: list[str] = field(default_factory=list)
    """What costs time or work."""
    hung: bool = False

    def blame(self, check: str, nodes: Iterable[str], told: str) -> None:
        """Notes a fault of these nodes."""
        named = sorted(set(nodes))
        self.faults.append({"check": check, "nodes": [] if named == sorted(self.nodes) else named, "told": told})

    def check(self) -> None:
        """UnfitError where there is a fault; its nodes are those that others may stand in for."""
        if self.faults:
            nodes = sorted({node for one in self.faults for node in one["nodes"]})
            everywhere = any(not one["nodes"] for one in self.faults) or nodes == sorted(self.nodes)
            text = "; ".join(f"{one['check']}: {one['told']}" for one in self.faults)
            raise UnfitError(text, [] if everywhere else nodes, self.hung)

    def measured(self, words: AllMeasured, name: str, how: Callable[[Iterable[float]], float]) -> dict[str, float]:
        """Node -> one value of those of its ranks, which is noted."""
        nodes = dict.fromkeys(node for node, word in words if name in word)
        found = {node: how(word[name] for one, word in words if one == node and name in word) for node in nodes}
        for node, value in found.items():
            self.nodes[node][name] = value
        return found


class PreflightContext:
    """Where a preflight checks.

    Args:
        run: folder of the run; it need not exist.
        stages: that are to be trained."""

    def __init__(self, run: Path, stages: Sequence[Recipe]):
        self.run, self.stages, self.own, self.report = run, stages, here(), PreflightReport()
        on_gpu = torch.cuda.is_available() and stages[0].trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
        self.device = torch.device("cuda", self.own.local_rank) if on_gpu else torch.device("cpu")
        self.batch: Any = None
        self.plans: dict[str, Plan] = {}
        """Of rank 0, as it takes a while."""
        self.told: dict[str, str] = {}
        """What rank 0 tells all."""
        self.names: list[str] = []
        """Of rank 0: the node of each rank, as it said at the first check."""
        if self.own.rank == 0:
            self.plans = {str(one.stage): plan(one) for one in stages}
            around = next(one for one in (run, *run.parents) if one.is_dir())
            largest = str(max(stages, key=self._tokens).stage)
            self.told = {"folder": str(around / f".lingen-preflight-{secrets.token_hex(4)}"), "stage": largest}

    def _tokens(self, stage: Recipe) -> int:
        tokens = self.plans[str(stage.stage)].tokens
        return max(getattr(stage.data.batch, kind) * count for kind, count in tokens.items())

    @property
    def stage(self) -> Recipe:
        """That with the most tokens in a batch."""
        return next(one for one in self.stages if str(one.stage) == self.told["stage"])

    @property
    def message(self) -> int:
        """Bytes."""
        return MESSAGE[self.device.type]


class NodeCheck(NamedTuple):
    """A check of every node."""

    name: str
    seconds: float
    """That it may take [ours]."""
    measure: Callable[[PreflightContext], Measured]
    judge: Callable[[PreflightContext, AllMeasured], object]
    """By rank 0, of what all have measured."""
    once: bool = False
    """By one rank of each node; else by every rank."""


# versions and the scheduler


def _versions(context: PreflightContext) -> Measured:
    found = versions() | {"cuda": torch.version.cuda, "commit": git_commit()}
    with suppress(OSError):
        found["driver"] = " ".join(re.findall(r"\d+\.\d+[.\d]*", Path("/proc/driver/nvidia/version").read_text())[:1])
    return {"versions": {name: one for name, one in found.items() if one is not None}}


def _judge_versions(context: PreflightContext, words: AllMeasured) -> None:
    for name in sorted({name for _, word in words for name in word["versions"]}):
        held = [(node, str(word["versions"].get(name))) for node, word in words]
        usual = Counter(version for _, version in held).most_common(1)[0][0]
        for other in sorted({version for _, version in held} - {usual}):
            nodes = [node for node, version in held if version == other]
            told = f"{name} is {other} there and {usual} elsewhere; make them the same"
            context.report.blame("versions", nodes, told)
    needed = signal_seconds(context.stages, list(context.plans.values()))
    context.report.notes += faults_of_job(os.environ.get("SLURM_JOB_ID"), needed)


def faults_of_job(job: str | None, needed: int) -> Iterator[str]:
    """What of SLURM's settings would cost a job work, in sentences; nothing outside of a job.

    Args:
        needed: seconds before its end at which it has to be told."""
    told = answer("scontrol", "show", "job", job) if job else ""
    if not job or not told:
        return
    script = answer("scontrol", "write", "batch_script", job, "-")
    config = dict(re.findall(r"^(\w+) *= (\S+)", answer("scontrol", "show", "config"), re.M))
    lead = re.search(r"^#SBATCH --signal=(?:\w+:)?\w+@(\d+)", script, re.M)
    if "Requeue=0" in told:
        yield "SLURM does not start this job again where a node fails: submit it with --requeue"
    if "TimeLimit=UNLIMITED" not in told and int(lead[1] if lead else 0) < needed:
        yield (
            f"the signal comes {lead[1] if lead else 0} s before the end of this job, and the longest step and a "
            f"checkpoint may take {needed} s: submit it with --signal=USR1@{needed}"
        )
    if "--kill-on-bad-exit" not in script and config.get("KillOnBadExit") != "1":
        yield "where a rank dies the others may wait for it: start them with srun --kill-on-bad-exit=1"
    if config.get("PreemptMode", "OFF") != "OFF" and int(config.get("KillWait", needed)) < needed:
        yield (
            f"a preempted job may be killed {config['KillWait']} s after it is told (KillWait, GraceTime), before a "
            f"checkpoint that takes up to {needed} s: lower train.checkpoint_every"
        )


# the run folder


def _disk(context: PreflightContext) -> Measured:
    clock, place = time.time(), Path(context.told["folder"])
    place.mkdir(exist_ok=True)
    if context.own.rank == 0:
        write_text(place / "token", place.name)
    begun = time.perf_counter()
    with (place / str(context.own.node)).open("wb") as file:
        file.write(os.urandom(context.message))
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    with suppress(FileNotFoundError):
        wait_for(place / "token")
    found = {"clock": clock, "write": context.message / seconds, "free": shutil.disk_usage(place).free}
    return found | {"seen": (place / "token").is_file()}


def _judge_disk(context: PreflightContext, words: AllMeasured) -> None:
    report, place = context.report, Path(context.told["folder"])
    if unseen := [node for node, word in words if not word["seen"]]:
        report.blame("run folder", unseen, f"{place.parent} is not the disk that rank 0 writes to: mount the same one")
    middle = median(word["clock"] for _, word in words)
    clocks = report.measured([(node, {"clock": word["clock"] - middle}) for node, word in words], "clock", max)
    if wrong := [node for node, skew in clocks.items() if abs(skew) > SKEW]:
        report.blame("clock", wrong, f"it is more than {SKEW:.0f} s off: let it follow a time server")
    report.notes += _slow(report.measured(words, "write", max), "writes to the run folder")
    run = RunFolder(context.run)
    names = [(stage, str(stage.stage)) for stage in context.stages]
    needed = sum(disk_of(stage, context.plans[name], len(run.checkpoints(name))) for stage, name in names)
    if full := [node for node, free in report.measured(words, "free", min).items() if free < needed]:
        told = f"checkpoints still take {needed / 1e9:.3g} GB at {place.parent}: free some, or lower "
        report.blame("run folder", full, f"{told}train.keep_checkpoints")


def _slow(speeds: Mapping[str, float], does: str) -> Iterator[str]:
    usual = median(speeds.values())
    for node, speed in speeds.items():
        if len(speeds) >= FEWEST and speed < SLOW_SHARE * usual:
            yield f"{node} {does} at {speed / 1e9:.3g} GB/s, the median is {usual / 1e9:.3g}"


# samples, and memory for those who read them


def _samples(context: PreflightContext) -> Measured:
    context.batch = ClipData(context.stage).largest(context.own.rank)
    text = [tensor for pair in (*context.batch.text.values(), *context.batch.null.values()) for tensor in pair]
    shm = {"shm": shutil.disk_usage("/dev/shm").free} if Path("/dev/shm").is_dir() else {}
    return {"batch": sum(one.nbytes for one in (context.batch.clips, *text)), "memory": memory_left()} | shm


def _judge_samples(context: PreflightContext, words: AllMeasured) -> None:
    report, per_node, workers = context.report, context.own.per_node, context.stage.data.workers * context.own.per_node
    held = AHEAD * workers * max(word["batch"] for _, word in words)
    if small := [node for node, free in report.measured(words, "shm", min).items() if free < held]:
        told = f"{workers} loader workers may need {held / 2**30:.3g} GiB: enlarge it (docker run --shm-size), or lower"
        report.blame("/dev/shm", small, f"{told} data.workers")
    copies = max(one.checkpoint for one in context.plans.values()) / context.own.ranks * per_node
    left = report.measured(words, "memory", min)
    if poor := [node for node, free in left.items() if free < workers * WORKER + held]:
        told = f"{workers} loader workers may need {(workers * WORKER + held) / 2**30:.3g} GiB: lower data.workers"
        report.blame("memory", poor, told)
    if poor := [node for node, free in left.items() if free < workers * WORKER + held + copies]:
        told = f"no room for a checkpoint's copy of {copies / 2**30:.3g} GiB beside loader workers on {', '.join(poor)}"
        report.notes.append(f"{told}: training waits while one is written")


# the network


def _network(context: PreflightContext) -> Measured:
    """Bytes a second of an all-reduce by all, and with two other nodes at least: of a slow node both are slow, of its
    neighbours one."""
    own, device = context.own, context.device
    if own.ranks == 1:
        return {}
    numbers, other = (torch.empty(context.message // 4, device=device) for _ in range(2))
    seconds = _seconds(device, lambda: dist.all_reduce(numbers.fill_(1.0)))
    if not (numbers == own.ranks).all():
        raise RuntimeError(f"a sum over {own.ranks} ranks came out wrong: the network or a GPU changes numbers")
    found = {"all_reduce": 2 * (own.ranks - 1) / own.ranks * numbers.nbytes / seconds}
    for away in range(1, min(own.nodes, 3)):
        to, of = ((own.rank + sign * away * own.per_node) % own.ranks for sign in (1, -1))
        ends = [dist.P2POp(dist.isend, numbers, to), dist.P2POp(dist.irecv, other, of)]
        seconds = _seconds(device, partial(lambda ends: [one.wait() for one in dist.batch_isend_irecv(ends)], ends))
        found["network"] = max(numbers.nbytes / seconds, found.get("network", 0.0))
    return found


def _seconds(device: torch.device, act: Callable[[], Any]) -> float:
    """The least of `TIMES`."""

    def whole() -> None:
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return min(timeit.repeat(whole, number=1, repeat=TIMES))


def _judge_network(context: PreflightContext, words: AllMeasured) -> None:
    report = context.report
    report.measured(words, "all_reduce", min)
    speeds = report.measured(words, "network", sum)
    for told in _slow(speeds, "sends and receives") if speeds else ():
        report.blame("network", [told.split()[0]], f"{told}: look at its links, NCCL_SOCKET_IFNAME, NCCL_IB_HCA")


# a step


def _step(context: PreflightContext) -> Measured:
    """Trains from random weights for one step, with strategy, module and optimiser of the stage. Nothing is written,
    and random numbers go on as if it had not been."""
    kept = {key: value for key, value in context.stage.trainer.items() if key not in ("logger", "profiler")}
    short = replace(context.stage.train, steps=1, accumulate=1)
    recipe = replace(context.stage, train=short, trainer={**kept, "logger": False})
    with isolate_rng(include_cuda=False), warnings.catch_warnings(action="ignore"):
        trainer = build_trainer(recipe, RunFolder(context.run), [])
        loader: DataLoader[Any] = DataLoader(cast(Any, [context.batch]), batch_size=None, collate_fn=as_it_is)
        trainer.fit(recipe.subject.build_module(recipe), loader)
    del trainer
    gc.collect()
    if context.device.type == "cpu":
        return {}
    most = torch.cuda.max_memory_allocated(context.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(context.device)
    return {"gpu": most}


NODE_CHECKS = (
    NodeCheck("versions", 300.0, _versions, _judge_versions, once=True),
    NodeCheck("run folder", 180.0, _disk, _judge_disk, once=True),
    NodeCheck("samples", 1800.0, _samples, _judge_samples),
    NodeCheck("network", 120.0, _network, _judge_network),
    NodeCheck("step", 1200.0, _step, lambda context, words: context.report.measured(words, "gpu", max)),
)
"""In their order."""
