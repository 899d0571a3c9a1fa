"""What a recipe or this machine lacks: ``lingen doctor``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from lingen.cli.command import DONE, FAILED, JSON, RECIPE, STAGE, argument, command, print_json
from lingen.cli.runs import leave_unfit, load_alike
from lingen.ranks import signals
from lingen.ranks.environment import UnfitError, here
from lingen.recipe.errors import RecipeError

if TYPE_CHECKING:
    from lingen.doctor import Checkup


@command(
    "which weights and shards does a recipe lack, and where do they come from? Without one: about this machine",
    RECIPE, STAGE, argument(
        "--preflight", action="store_true",
        help="look whether every node is fit to train it: run folder, memory, samples, network, a step; under srun, or "
        "on this machine alone",
    ),
    argument("--run", metavar="DIR", help="run folder of --preflight; default: runs/RECIPE-FINGERPRINT"),
    JSON, overrides=True,
)  # fmt: skip
def doctor(args: argparse.Namespace) -> int:
    if args.preflight:
        return _preflight(args)
    if args.recipe is None:
        if args.overrides or args.stage:
            raise RecipeError("--stage and key=value change a recipe: say which, --recipe R.")
        from lingen.doctor import machine

        lines = list(machine())
        told = [f"{'ok' if line.ok else 'note'}: {line.what}: {line.told}" for line in lines]
        print_json([line._asdict() for line in lines]) if args.json else print(*told, sep="\n")
        return DONE
    from lingen.plan.loading import load_curriculum

    stages = load_curriculum(args.recipe, args.overrides, to_train=True).chosen(args.stage)
    from lingen.doctor import examine

    found = examine(stages)
    if args.json:
        weights, shards = ([one._asdict() for one in some] for some in (found.missing, found.absent))
        print_json({"missing": weights, "absent": shards, "ok": found.ok, "notes": found.notes})
    else:
        _print(found)
    return FAILED if found.missing or found.absent else DONE


def _preflight(args: argparse.Namespace) -> int:
    """As `lingen fit` starts, without training."""
    try:
        with signals.listening():
            curriculum = load_alike(args)
            from lingen.launch.preflight import preflight_alone, report_lines
            from lingen.run_folder import record
            from lingen.run_folder.identity import described

            stages = curriculum.stages
            run = args.run or record.default_path(stages[0].name, described(stages), lambda text: None)
            report = preflight_alone(run, curriculum.chosen(args.stage))
        if here().rank == 0:
            print_json(asdict(report)) if args.json else print(*report_lines(report), sep="\n")
        report.check()
    except signals.Stopped as stopped:
        return stopped.code
    except UnfitError as error:
        return leave_unfit(error)
    return DONE


def _print(found: Checkup) -> None:
    """A line for each thing on stdout, what helps on stderr."""
    if not (found.missing or found.absent or found.ok):
        print("ok: it needs no weights")
    for note in found.notes:
        print(f"note: {note}")
    for there in found.ok:
        print(f"ok: {there}")
    for word, lacks in (("missing", found.missing), ("absent", found.absent)):
        cures: dict[str, list[str]] = {}
        for one in lacks:
            cures.setdefault(f"{word}: {one.name} {one.path}", []).append(" ".join(one.cure.split()))
        for line, each in cures.items():
            print(line, flush=True)
            for cure in each:
                print(f"  {cure}", file=sys.stderr, flush=True)
