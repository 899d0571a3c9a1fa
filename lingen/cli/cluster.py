"""Runs on a cluster: ``lingen submit`` and ``lingen status``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from lingen.cli.command import DONE, FAILED, JSON, RECIPE, argument, command, natural, parse_arguments, print_json, uint
from lingen.launch.status import Status, status_of
from lingen.ranks.signals import REQUEUE
from lingen.recipe.errors import RecipeError
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.sessions import unfit_nodes, worth_another_start
from lingen.tables import as_duration

WATCH = 5.0
"""Seconds between two looks of `lingen status --watch`."""
IN_SHARES = ("encode", "data pack", "data caption", "sweep", "ablate")
"""Commands whose work a job array shares."""


@command(
    "SLURM trains a recipe, and goes on by itself after a time limit, a preemption or a node that fails",
    RECIPE,
    argument("--nodes", type=natural, metavar="N", help="default: 1"),
    argument("--gpus-per-node", type=natural, metavar="G", help="ranks of a node; default: trainer.devices"),
    argument("--time", metavar="T", help="of a job, as sbatch takes it: HH:MM:SS, D-HH, ..."),
    argument("--run", metavar="DIR", help="run folder; default: runs/RECIPE-FINGERPRINT"),
    argument("--stage", metavar="S", help="train only this stage"),
    argument(
        "--sbatch", action="append", default=[], metavar="OPTIONS",
        help="of sbatch, e.g. --sbatch='--partition=NAME --account=NAME'; may be given again",
    ),
    argument("--max-requeues", type=uint, metavar="N", help="how often a job goes on by itself; default: 20"),
    argument(
        "--signal-seconds", type=natural, metavar="S",
        help="between the signal to stop and the end of a job; default: by the forecast of the longest step",
    ),
    argument(
        "--array", type=natural, metavar="N",
        help="no training: a job array that shares the work of the command behind --, which is encode, data pack or "
        "data caption",
    ),
    argument("--no-preflight", action="store_true", help="do not look whether every node is fit before training"),
    argument("--dry-run", action="store_true", help="print the script; nothing is written or submitted"),
    overrides=True,
    behind=True,
)  # fmt: skip
def submit(args: argparse.Namespace) -> None:
    if args.array is None and args.behind:
        raise RecipeError("A command behind -- goes with --array N, which shares its work.")
    from lingen.launch.options import merged, read_options, read_settings, seconds_of, settings_file

    asked = {name: getattr(args, name) for name in ("time", "max_requeues", "signal_seconds")}
    settings = read_settings(settings_file())
    settings = replace(settings, **{name: value for name, value in asked.items() if value is not None})
    options = read_options(settings.sbatch, str(settings_file()))
    options = merged(options, read_options(args.sbatch, "--sbatch"))
    if settings.time is not None:
        seconds_of(settings.time)  # refuses
    words = _check_array(args) if args.array is not None else []
    if args.array is None and args.recipe is None:
        raise RecipeError("Say which recipe: --recipe R.")
    from lingen.launch import submit as jobs

    if args.array is not None:
        out = Path(parse_arguments(words).out)
        job = jobs.prepare_array(words, args.array, out, settings, options, args.gpus_per_node)
    else:
        job = jobs.prepare_training(
            args.recipe, args.overrides, settings, options, nodes=args.nodes or 1, gpus=args.gpus_per_node,
            preflight=not args.no_preflight, run=args.run, stage=args.stage,
        )  # fmt: skip
    for line in job.lines:
        print(line, file=sys.stderr)
    if args.dry_run:
        for problem in job.problems:
            print(f"it would be refused: {problem}", file=sys.stderr)
        print(job.script, end="")
        return
    print(jobs.submit(job))
    print(f"its script and its log lie in {job.folder}", file=sys.stderr)
    if args.array is None:
        print(f"lingen status {job.folder.parents[1]}", file=sys.stderr)


def _check_array(args: argparse.Namespace) -> list[str]:
    """The words of the command behind ``--``. RecipeError where it does not go with --array."""
    words = list(args.behind)
    other = [flag for flag in ("recipe", "run", "stage", "nodes") if getattr(args, flag) is not None]
    if other or args.overrides:
        told = ", ".join([*(f"--{flag}" for flag in other), *args.overrides])
        raise RecipeError(f"With --array, what is to be done stands behind --; {told} stands before it.")
    name = next((name for name in IN_SHARES if words[: len(name.split())] == name.split()), None)
    if name is None:
        raise RecipeError(
            f"--array shares the work of {', '.join(IN_SHARES)}. Write it behind --, for example: "
            "lingen submit --array 8 -- encode --recipe R --out DIR"
        )
    if parse_arguments(words).part is not None:
        raise RecipeError("--array says itself which --part each job does; leave --part out.")
    return words


@command(
    "how far runs are, whether they are alive, and why they stopped",
    argument("runs", nargs="+", metavar="RUN", help="run folders"),
    argument("--watch", action="store_true", help="again every 5 seconds, until all have finished or failed"),
    argument(
        "--ended", type=natural, metavar="CODE",
        help="for the script of `lingen submit`: srun ended with this code; returns 75 where "
        "another start is worth it, and prints the nodes that are to be left out then",
    ),
    JSON,
)  # fmt: skip
def status(args: argparse.Namespace) -> int:
    if args.ended is not None:
        return _judge(Path(args.runs[0]), args.ended)
    while True:
        found = [status_of(run) for run in args.runs]
        if args.json:
            told = [asdict(one) for one in found]
            print_json(told[0] if len(told) == 1 else told)
        else:
            if args.watch and sys.stdout.isatty():
                print("\033[H\033[2J", end="")
            print(*("\n".join(_lines_of(one)) for one in found), sep="\n\n", flush=True)
        if not args.watch or all(one.state in ("finished", "failed") for one in found):
            return DONE
        time.sleep(WATCH)


def _judge(run: Path, code: int) -> int:
    """For a script: whether a run is started again whose ranks ended with this code, and without which nodes."""
    try:
        again, why = worth_another_start(RunFolder(run), code)
        print(unfit_nodes(RunFolder(run)), end="")
    except (OSError, ValueError) as error:  # a record that cannot be read is no reason to end
        again, why = code != FAILED, str(error)
    print(f"lingen: {why}", file=sys.stderr)
    return REQUEUE if again else FAILED


def _lines_of(one: Status) -> Iterator[str]:
    """A run in lines for people."""
    yield f"{one.run}: {one.state}" + (f" ({one.reason})" if one.reason else "")
    if one.stage is None:
        return
    stages = list(one.stages)
    speed = f", {one.tokens_per_second:,.0f} tokens/s" if one.tokens_per_second is not None else ""
    loss = f", loss {one.loss:.4f}" if one.loss is not None else ""
    place = f"stage {stages.index(one.stage) + 1}/{len(stages)} {one.stage}: step {one.step:,} of {one.steps:,}"
    yield f"  {place}{loss}{speed}"
    if one.state != "finished":
        yield f"  left: {as_duration(one.eta_seconds)} of the stage, {as_duration(one.eta_run_seconds)} of the run"
    yield f"  checkpoint: {one.checkpoint or 'none yet'}"
    for restart in one.restarts:
        yield f"  restarted {restart['time']}: {restart['reason']}"
    if one.ranks:
        hosts = len({rank.host for rank in one.ranks})
        yield f"  ranks: {len(one.ranks)} on {hosts} host{'s' * (hosts > 1)}; most memory of a {one.most_memory()}"
    for rank in one.slowest():
        now = f"{rank.doing} for {rank.doing_seconds:.0f} s, {rank.data_share:.0%} of its time waiting for data"
        now += f", {rank.pace[0]:.3g} s of forward pass in a step" if rank.pace else ""
        yield (
            f"    rank {rank.rank} on {rank.host}: last sign {rank.age_seconds:.0f} s ago at step {rank.step:,}, "
            + (rank.ended or now)
        )
