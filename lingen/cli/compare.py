"""Several runs: ``lingen sweep``, ``compare`` and ``ablate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lingen.cli import command as cli
from lingen.cli.command import COMMANDS, DONE, FAILED, JSON, NEEDED, PART, argument, command, natural
from lingen.files import write_json, write_text
from lingen.launch.status import status_of
from lingen.ranks import signals
from lingen.recipe.errors import RecipeError

if TYPE_CHECKING:
    from lingen.studies.grid import GridRun

METRIC = argument("--metric", metavar="M", help="a column of metrics.csv; default: validation/loss, else loss")
OF_A_GRID = (
    NEEDED, argument("--out", metavar="DIR", help="folder of the runs' folders; default: runs/RECIPE-sweep, -ablate"),
    argument("--dry-run", action="store_true", help="check all runs and say what they are; none is trained"),
    argument("--array", action="store_true", help="SLURM trains each in a task; options of `lingen submit` behind --"),
    PART,
)  # fmt: skip


def say(*lines: str) -> None:
    print(*lines, sep="\n", file=sys.stderr, flush=True)


@command(
    "train a grid of runs, such as train.lr=1e-4,3e-4 seed=0,1,2, one after another, and compare them",
    *OF_A_GRID, METRIC, overrides=True, behind=True,
)  # fmt: skip
def sweep(args: argparse.Namespace) -> int:
    out = _out(args)
    from lingen.studies.grid import combinations_of, load_grid

    runs = load_grid(args.recipe, combinations_of(args.overrides), out)
    code = _train(args, runs, out, args.overrides)
    _compare(args, [out], "steps", out / "compare.html")
    return code


@command(
    "runs side by side: settings that differ, parameters, cost, scores, curves and clips of the same prompts",
    argument("runs", nargs="+", metavar="RUN", help="run folders, or folders of them"), METRIC,
    argument("--at", choices=["steps", "flops"], default="steps", help="at equal steps (default) or equal FLOPs"),
    argument("--out", metavar="F.html", help="a page with curves and clips as well"), JSON,
)  # fmt: skip
def compare(args: argparse.Namespace) -> None:
    _compare(args, args.runs, args.at, args.out)


@command(
    "the page of a run, report.html in its folder: curves, clips over the steps, samples, settings",
    argument("runs", nargs="+", metavar="RUN", help="run folders, finished or not"),
)
def report(args: argparse.Namespace) -> None:
    for run in args.runs:
        status_of(run)  # a wrong name is told before torch is imported
    from lingen.studies.report import write_report

    for run in args.runs:
        print(write_report(run))


@command(
    "variants of a recipe against it, paired by seed: intervals at equal steps and at equal FLOPs",
    *OF_A_GRID,
    argument("--variants", nargs="+", required=True, metavar="V", help="no_te, no_ma, no_review, no_rms, zigzag, "
             "attention, hybrid_layers, no_images, or yours: NAME:key=value,key=value"),
    argument("--seeds", type=natural, default=3, metavar="N", help="0 to N - 1; default: 3"),
    argument("--metric", default="validation/loss", metavar="M", help="noted beforehand; default: validation/loss"),
    overrides=True, behind=True,
)  # fmt: skip
def ablate(args: argparse.Namespace) -> int:
    out = _out(args)
    from lingen.evaluation.statistics import check_extra
    from lingen.recipe import load_curriculum

    check_extra()
    fixed = [word for word in args.variants if "=" in word.partition(":")[0]]  # argparse takes them for variants
    asked, fixed = [word for word in args.variants if word not in fixed], [*args.overrides, *fixed]
    load_curriculum(args.recipe, fixed)  # a mistake in words is told before torch is imported
    from lingen.studies import ablation
    from lingen.studies.compare import cell_of
    from lingen.studies.grid import load_grid, name_of

    fixed += ablation.validating(args.recipe, fixed, args.metric)
    variants = {ablation.BASELINE: list[str]()} | dict(ablation.variant_of(one, args.recipe, fixed) for one in asked)
    if len(variants) <= len(asked):
        raise RecipeError(f"Each variant has a name of its own, and none is called {ablation.BASELINE}.")
    pairs = {(name, seed): name_of(f"{name},seed={seed}") for seed in range(args.seeds) for name in variants}
    named = {folder: [*fixed, *variants[name], f"seed={seed}"] for (name, seed), folder in pairs.items()}
    runs = dict(zip(pairs, load_grid(args.recipe, named, out), strict=True))
    say(*ablation.forecast_lines(runs, args.metric))
    if not args.dry_run:
        ablation.put_down(out, args.metric)
    again = [*fixed, "--seeds", str(args.seeds), "--metric", args.metric, "--variants", *asked]
    code = _train(args, list(runs.values()), out, again)
    rows = [row for axis in ("steps", "flops") for row in ablation.effects_of(runs, args.metric, axis)]
    write_json(out / "ablation.json", {"metric": args.metric, "variants": variants, "results": rows})
    cli.print_table([{key: cell_of(value) for key, value in row.items()} for row in rows])
    _compare(args, [out], "steps", out / "compare.html")
    return code


def _out(args: argparse.Namespace) -> Path:
    """Where the runs' folders lie."""
    if args.behind and not args.array:
        raise RecipeError("Options of `lingen submit` stand behind -- with --array alone.")
    return Path(args.out or f"runs/{Path(args.recipe).stem}-{args.command}")


def _train(args: argparse.Namespace, runs: Sequence[GridRun], out: Path, words: Sequence[str]) -> int:
    """Trains all; returns the exit code. SystemExit with it where there is nothing to compare yet. `words`: what a task
    of a job array gets beside recipe and folder."""
    from lingen.prepare.journal import parse_part
    from lingen.studies.grid import train_grid

    if args.array:
        again = [*["--dry-run"] * args.dry_run, *args.behind, "--", args.command, "--recipe", args.recipe]
        submit = cli.parse_arguments(["submit", "--array", str(len(runs)), *again, "--out", str(out), *words])
        raise SystemExit(COMMANDS["submit"].run(submit))
    if args.dry_run:
        say(f"{len(runs)} runs in {out}:", *(run.folder.path.name for run in runs))
        raise SystemExit(DONE)
    part = parse_part(args.part)
    try:
        with signals.listening():
            code = DONE if train_grid(runs[part.number - 1 :: part.total], say) else FAILED
    except signals.Stopped as stopped:
        say(f"{stopped}; the same command goes on from here.")
        raise SystemExit(stopped.code) from None
    if args.part:
        raise SystemExit(code)
    return code


def _compare(args: argparse.Namespace, paths: Sequence[str | Path], axis: str, out: str | Path | None) -> None:
    """The comparison as tables or JSON, and as a page."""
    from lingen.studies.compare import compare_runs, read_compared, tables_of

    runs = read_compared(paths)
    found = compare_runs(runs, args.metric, axis)
    cli.tell(args, found, tables_of(found))
    if out:
        from lingen.studies.report import page_of

        write_text(Path(out), page_of(found, runs))
        say(str(out))
