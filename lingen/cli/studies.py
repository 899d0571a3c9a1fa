"""Several runs: ``lingen sweep``, ``compare`` and ``ablate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lingen.cli.command import (
    COMMANDS,
    DONE,
    FAILED,
    JSON,
    PART,
    RECIPE,
    argument,
    command,
    natural,
    parse_arguments,
    print_json,
    print_table,
)
from lingen.files import write_json, write_text
from lingen.ranks import signals
from lingen.recipe.errors import RecipeError

if TYPE_CHECKING:
    from lingen.studies.compare import Compared
    from lingen.studies.grid import GridRun

say = partial(print, file=sys.stderr, flush=True)
METRIC = argument("--metric", metavar="M", help="a column of metrics.csv; default: validation/loss, else loss")
OF_A_GRID = (
    RECIPE,
    argument("--out", metavar="DIR", help="folder of the runs' folders; default: runs/RECIPE-COMMAND-XXXXXXXX"),
    argument("--dry-run", action="store_true", help="check all runs and say what they are; none is trained"),
    argument("--array", action="store_true", help="SLURM trains them, each in a task of a job array; options of "
             "`lingen submit` stand behind --"),
    PART,
)  # fmt: skip


@command("train a grid of runs, such as train.lr=1e-4,3e-4 seed=0,1,2, one after another, and compare them",
         *OF_A_GRID, METRIC, overrides=True, behind=True)  # fmt: skip
def sweep(args: argparse.Namespace) -> int:
    _check(args)
    from lingen.studies.grid import combinations_of, default_folder, load_grid

    fixed, named = combinations_of(args.overrides)
    out = Path(args.out or default_folder("sweep", args.recipe, fixed))
    runs = load_grid(args.recipe, {name: [*fixed, *words] for name, words in named.items()}, out)
    code = _train(args, runs, out, args.overrides)
    if code is None:
        return DONE
    there = [run.folder.path for run in runs if run.folder.about.is_file()]
    return _compare(args, there, "steps", out / "compare.html") or code


@command("runs side by side: settings that differ, parameters, cost, scores, curves and clips of the same prompts",
         argument("runs", nargs="+", metavar="RUN", help="run folders, or folders of them"), METRIC,
         argument("--at", choices=["steps", "flops"], default="steps", help="at equal steps (default) or FLOPs: as far "
                  "as all runs are"),
         argument("--out", metavar="F.html", help="a page with curves and clips as well"), JSON)  # fmt: skip
def compare(args: argparse.Namespace) -> int:
    return _compare(args, args.runs, args.at, args.out)


@command("variants of a recipe against it, paired by seed: intervals at equal steps and at equal FLOPs",
         *OF_A_GRID, argument("--variants", nargs="+", required=True, metavar="V", help="no_te, no_ma, no_review, no_rms, "
         "zigzag, attention, hybrid_layers, no_images, or yours: NAME:key=value,key=value"),
         argument("--seeds", type=natural, default=3, metavar="N", help="0 to N - 1; default: 3"),
         argument("--metric", default="validation/loss", metavar="M", help="named beforehand; default: validation/loss"),
         overrides=True, behind=True)  # fmt: skip
def ablate(args: argparse.Namespace) -> int:
    _check(args)
    from lingen.studies import ablation
    from lingen.studies.grid import default_folder, load_grid

    fixed = [word for word in args.variants if "=" in word.partition(":")[0]]  # argparse takes them for variants
    asked, fixed = [word for word in args.variants if word not in fixed], [*args.overrides, *fixed]
    out = Path(args.out or default_folder("ablation", args.recipe, fixed))
    variants = {ablation.BASELINE: list[str]()} | dict(ablation.variant_of(one, args.recipe, fixed) for one in asked)
    pairs = {f"{name},seed={seed}": (name, seed) for seed in range(args.seeds) for name in variants}
    named = {key: [*fixed, *variants[name], f"seed={seed}"] for key, (name, seed) in pairs.items()}
    runs = dict(zip(pairs.values(), load_grid(args.recipe, named, out), strict=True))
    for line in ablation.told_before(runs, _made(runs), args.metric):
        say(line)
    if not args.dry_run:
        ablation.put_down(out, args.metric)
    again = [*fixed, "--seeds", str(args.seeds), "--metric", args.metric, "--variants", *asked]
    code = _train(args, list(runs.values()), out, again)
    if code is None:
        return DONE
    made, found = _made(runs), {}
    for axis in ("steps", "flops"):
        found[axis] = ablation.effects_of(ablation.curves_of(runs, made, args.metric, axis))
        print_table([ablation.effect_row(row, args.metric, axis) for row in found[axis]])
    write_json(out / "ablation.json", {"metric": args.metric, "seeds": args.seeds, "variants": variants, **found})
    return _compare(args, [one.folder.path for one in made.values()], "steps", out / "compare.html") or code


def _made(runs: dict[tuple[str, int], GridRun]) -> dict[tuple[str, int], Compared]:
    """The runs of an ablation that are there."""
    from lingen.studies.compare import read_compared

    there = {key: run.folder.path for key, run in runs.items() if run.folder.about.is_file()}
    return dict(zip(there, read_compared(list(there.values())), strict=True))


def _check(args: argparse.Namespace) -> None:
    if args.recipe is None:
        raise RecipeError("Say which recipe: --recipe R.")
    if args.behind and not args.array:
        raise RecipeError("Options of `lingen submit` stand behind -- with --array alone.")


def _train(args: argparse.Namespace, runs: Sequence[GridRun], out: Path, words: Sequence[str]) -> int | None:
    """Exit code where all runs are told of; None where they are not: with --dry-run, --array and --part."""
    from lingen.prepare.journal import parse_part
    from lingen.studies.grid import train_grid

    if args.array:
        again = [args.command, "--recipe", args.recipe, "--out", str(out), *words]
        submission = parse_arguments(["submit", "--array", str(len(runs)), *args.behind, "--", *again])
        COMMANDS["submit"].run(submission)
    elif args.dry_run:
        say(f"{len(runs)} runs in {out}:", *(run.folder.path.name for run in runs), sep="\n")
    else:
        part = parse_part(args.part)
        try:
            with signals.listening():
                done = train_grid(runs[part.number - 1 :: part.total], say)
        except signals.Stopped as stopped:
            say(f"{stopped}; the same command goes on from here.")
            return stopped.code
        return None if args.part and done else DONE if done else FAILED
    return None


def _compare(args: argparse.Namespace, paths: Sequence[str | Path], axis: str, out: str | Path | None) -> int:
    """The comparison as tables, or JSON, and as a page."""
    from lingen.studies import compare as side_by_side

    runs = side_by_side.read_compared(paths)
    found = side_by_side.compare_runs(runs, args.metric, axis)
    if getattr(args, "json", False):
        print_json(found)
    else:
        for rows in side_by_side.tables_of(found):
            print_table(rows)
    if out:
        from lingen.studies.page import page_of

        write_text(Path(out), page_of(found, runs))
        say(str(out))
    return DONE
