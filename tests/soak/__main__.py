"""Long trials by chance: ``python -m tests.soak fuzz --seed S --minutes M`` puts damaged files through commands,
``kill --seed S --times N`` kills training and goes on with it,
``cluster --seed S --times N`` disturbs a job that `lingen submit` made, ``ranks`` compares ranks with one process,
``plan`` dry-runs every shipped stage on 1 to 512 ranks, ``plan-peak`` compares a dry-run step with one on a GPU,
``gpu`` trains the main recipe on one GPU, ``gpus`` on all of this machine,
``handover`` trains a toy of two stages, ``study`` asks whether the intervals of `lingen study report` cover, and
``coverage`` holds them and those of `lingen eval` to what they covered."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.soak.fuzz import TARGETS, fuzz
from tests.soak.handover import cases, unlike_the_page
from tests.soak.kill import kill
from tests.soak.moments import MOMENTS, moments
from tests.soak.one_gpu import on_one_gpu
from tests.soak.ranks import compare_all


def main() -> int:
    args = _arguments()
    trials = {
        "fuzz": _fuzz, "kill": _kill, "moments": _moments, "cluster": _cluster, "ranks": _ranks,
        "gpu": partial(_told, on_one_gpu), "gpus": _gpus, "handover": _handover,
        "plan": _plan, "plan-peak": _plan_peak, "study": _study, "coverage": _coverage,
    }  # fmt: skip
    return trials[args.trial](args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    trials = parser.add_subparsers(dest="trial", required=True)
    one = trials.add_parser("fuzz", help="damaged films, pictures, tables, recipes, manifests and weights")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--minutes", type=float, default=1.0)
    one.add_argument("--only", choices=sorted(TARGETS), help="one sort of file")
    one.add_argument("--case", type=int, help="only this case of the seed, as a failure names it")
    one.add_argument("--keep", type=Path, default=Path("fuzz"), metavar="DIR", help="failing inputs go there")
    two = trials.add_parser("kill", help="ranks, loader workers and whole runs, at any moment")
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--times", type=int, default=20)
    two.add_argument("--strategy", default="ddp")
    two.add_argument("--keep", type=Path, default=Path("kill"), metavar="DIR", help="the runs lie there; made anew")
    three = trials.add_parser("cluster", help="six small stages on a SLURM of two nodes, signalled and killed")
    three.add_argument("--seed", type=int, default=0)
    three.add_argument("--times", type=int, default=4)
    three.add_argument("--minutes", type=float, default=20.0, help="after which it counts as one that does not end")
    three.add_argument(
        "--keep", type=Path, default=Path("cluster"), metavar="DIR", help="the run lies there; made anew"
    )
    four = trials.add_parser("ranks", help="every strategy on 2, 3 and 4 ranks, against one process")
    four.add_argument("--keep", type=Path, default=Path("ranks"), metavar="DIR", help="the runs lie there; made anew")
    last = trials.add_parser("moments", help="the main recipe on two nodes of SLURM, a signal at each moment of it")
    last.add_argument("--keep", type=Path, default=Path("moments"), metavar="DIR", help="the runs lie there; made anew")
    trials.add_parser("plan", help="every shipped stage on 1, 2, 8, 64 and 512 ranks")
    peak = trials.add_parser("plan-peak", help="3 steps of a stage of t2v_68s on this GPU, beside the dry run")
    peak.add_argument("--stage", default="t2v_512_17s")
    peak.add_argument("--steps", type=int, default=3)
    peak.add_argument("--keep", type=Path, default=Path("plan-peak"), metavar="DIR", help="shards and run; made anew")
    peak.add_argument("overrides", nargs="*", metavar="key=value")
    more = trials.add_parser("gpu", help="the main recipe on one GPU, stopped and undisturbed")
    more.add_argument("--keep", type=Path, default=Path("gpu"), metavar="DIR", help="the runs lie there; made anew")
    several = trials.add_parser("gpus", help="all GPUs of this machine: speed, equality, what comes over a run")
    several.add_argument("--acts", nargs="+", default=["speed", "equal", "events"])
    several.add_argument("--strategies", nargs="*", default=["fsdp", "hsdp", "ddp"])
    several.add_argument("--stages", nargs="+", default=["t2v_512_17s"], help="that are measured at speed")
    several.add_argument("--checkpointing", nargs="+", default=["true"], help="values of model.checkpointing, at speed")
    several.add_argument("--single", action=argparse.BooleanOptionalAction, default=True, help="speed of one GPU, too")
    several.add_argument("--set", nargs="+", default=[], metavar="key=value", help="of the large recipe")
    several.add_argument("--keep", type=Path, default=Path("gpus"), metavar="DIR", help="runs lie there; made anew")
    several.add_argument("--json", type=Path, help="what was seen")
    toy = trials.add_parser("handover", help="the loss over a hand-over, with and without a decay before it")
    toy.add_argument("--steps", type=int, nargs=2, default=[120, 48], metavar="N", help="of the first and second stage")
    toy.add_argument("--keep", type=Path, default=Path("handover"), metavar="DIR", help="runs lie there; made anew")
    toy.add_argument("--json", type=Path, help="what was seen")
    votes = trials.add_parser("study", help="simulated votes with effects of raters and prompts")
    votes.add_argument("--seed", type=int, default=1)
    votes.add_argument("--times", type=int, default=1000, help="studies of each design and taste")
    votes.add_argument("--json", type=Path, help="the table; cells that it has of the same command are kept")
    held = trials.add_parser("coverage", help="the same and the intervals of eval, against bars; 1 where one is missed")
    held.add_argument("--times", type=int, default=4000, help="simulations of each cell")
    return parser.parse_args()


def _study(args: argparse.Namespace) -> int:
    from lingen.files import write_text
    from tests.soak.study import cells
    from tests.yardsticks.results import head

    command = f"python -m tests.soak study --seed {args.seed} --times {args.times}"
    held = json.loads(args.json.read_text(encoding="utf-8")) if args.json and args.json.is_file() else {}
    rows = held["rows"] if held.get("command") == command else []
    for row in cells(args.seed, args.times, rows[:]):
        rows.append(row)
        print(*(f"{one:.1%}" if isinstance(one, float) else one for one in row.values()), sep="  ", flush=True)
        if args.json:
            write_text(args.json, json.dumps({**head({}), "command": command, "rows": rows}, indent=1) + "\n")
    return 0


def _handover(args: argparse.Namespace) -> int:
    from lingen.files import write_json
    from tests.yardsticks.results import head

    shutil.rmtree(args.keep, ignore_errors=True)
    rows = []
    for row in cases(args.keep.absolute(), *args.steps):
        rows.append(row)
        print(*row.values(), sep="  ", flush=True)
    failures = list(unlike_the_page(rows))
    print(*failures, f"{len(failures)} failures", sep="\n")
    if args.json:
        command = f"python -m tests.soak handover --steps {args.steps[0]} {args.steps[1]}"
        write_json(args.json, {**head({}), "command": command, "rows": rows}, end="\n")
    return 1 if failures else 0


def _plan(args: argparse.Namespace) -> int:
    from tests.soak.plan import plan_all

    return plan_all()


def _plan_peak(args: argparse.Namespace) -> int:
    from tests.soak.plan import compare_peak

    shutil.rmtree(args.keep, ignore_errors=True)
    return compare_peak(args.keep.absolute(), args.stage, args.steps, args.overrides)


def _cluster(args: argparse.Namespace) -> int:
    from tests.soak.cluster import disturb

    shutil.rmtree(args.keep, ignore_errors=True)
    counts, wrong = disturb(args.keep.absolute(), args.seed, args.times, args.minutes)
    print(*wrong, sep="\n")
    told = ", ".join(f"{count} x {what}" for what, count in sorted(counts.items()))
    print(f"{counts.total()} disturbances ({told}): {len(wrong)} failures")
    return 1 if wrong else 0


def _ranks(args: argparse.Namespace) -> int:
    shutil.rmtree(args.keep, ignore_errors=True)
    failed = compare_all(args.keep.absolute())
    print(*(f"too far from one process: {line}" for line in failed), f"{len(failed)} failed", sep="\n")
    return 1 if failed else 0


def _moments(args: argparse.Namespace) -> int:
    shutil.rmtree(args.keep, ignore_errors=True)
    failures = list(moments(args.keep.absolute()))
    for failure in failures:
        print(failure)
    print(f"{len(MOMENTS)} signals to a job of two nodes: {len(failures)} failures")
    return 1 if failures else 0


def _gpus(args: argparse.Namespace) -> int:
    from tests.soak.gpus import Speed, several_gpus

    shutil.rmtree(args.keep, ignore_errors=True)
    asked = Speed(args.stages, args.checkpointing, args.strategies, args.single, args.set)
    return several_gpus(args.keep.absolute(), args.acts, asked, args.json)


def _coverage(args: argparse.Namespace) -> int:
    from tests.soak.coverage import coverage

    return _printed(coverage(args.times))


def _told(trial: Callable[[Path], Iterator[str]], args: argparse.Namespace) -> int:
    shutil.rmtree(args.keep, ignore_errors=True)
    return _printed(trial(args.keep.absolute()))


def _printed(lines: Iterator[str]) -> int:
    failures = 0
    for line in lines:
        print(line, flush=True)
        failures += line.startswith("failed")
    print(f"{failures} failures")
    return 1 if failures else 0


def _kill(args: argparse.Namespace) -> int:
    shutil.rmtree(args.keep, ignore_errors=True)
    report = kill(args.keep.absolute(), args.seed, args.times, args.strategy)
    for failure in report.failures:
        print(failure)
    kills = ", ".join(f"{count} x {victim}" for victim, count in sorted(report.kills.items()))
    print(f"{report.kills.total()} times ({kills}) in {report.finished} runs: {len(report.failures)} failures")
    return 1 if report.failures else 0


def _fuzz(args: argparse.Namespace) -> int:
    report = fuzz(args.seed, args.minutes * 60, only=args.only, case=args.case)
    for failure in report.failures:
        kept = args.keep / f"{args.seed}-{failure.case}"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for name, content in failure.files.items():
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            (kept / name).write_bytes(content)
        only = f" --only {args.only}" if args.only else ""
        print(f"{failure}\n  again: python -m tests.soak fuzz --seed {args.seed} --case {failure.case}{only}; {kept}")
    counts = ", ".join(f"{count} x {name}" for name, count in sorted(report.counts.items()))
    print(f"{sum(report.counts.values())} cases ({counts}): {len(report.failures)} failed")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
