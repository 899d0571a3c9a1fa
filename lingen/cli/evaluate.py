"""Evaluation: ``lingen eval ...``; and what people prefer: ``lingen study ...``."""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lingen.cli import command as cli
from lingen.cli.encode import DEVICE
from lingen.cli.prompts import lines_of
from lingen.files import check_place
from lingen.recipe.errors import RecipeError
from lingen.recipe.subjects import SUBJECTS
from lingen.run_folder.folder import RunFolder
from lingen.weights import find_weights


@cli.command(
    "how well a recipe's autoencoder reconstructs its held-out clips, next to bicubic scaling of the same size",
    cli.RECIPE, cli.STAGE,
    cli.argument("--run", metavar="DIR", help="the autoencoder of a run's last finished stage; it also is the recipe"),
    cli.argument("--checkpoint", metavar="F", help="the autoencoder of a weights file of such a run"),
    cli.argument("--autoencoder", metavar="NAME", help="another one than the recipe's, e.g. pixels"),
    cli.argument("--clips", type=cli.natural, default=8, metavar="N", help="of each kind; default: 8"),
    cli.argument("--frames", type=cli.natural, metavar="T", help="of a clip; default: the recipe's"),
    cli.argument("--size", type=cli.size_of, metavar="HxW", help="default: the recipe's"),
    *cli.STREAM_FLAGS,
    cli.argument("--compare", action="store_true",
                 help="also how far the ways are apart, tiles where there is a --tile"),
    cli.argument("--out", default="eval/tae", metavar="DIR", help="default: eval/tae"),
    DEVICE, cli.JSON, overrides=True,
)  # fmt: skip
def eval_tae(args: argparse.Namespace) -> int:
    way, tile = cli.ways_of_args(args)
    recipe = _recipe(args)
    from lingen.kernels.choice import best_device
    from lingen.metrics.autoencoder import Request, evaluate

    device = str(best_device(args.device))
    asked = Request(clips=args.clips, way=way, tile=tile, compare=args.compare, device=device)
    with cli.count_bar("reconstructing") as progress:
        try:
            result = evaluate(recipe, asked, Path(args.out), progress)
        except RecipeError:
            raise
        except ValueError as error:  # no sample fits, or a reconstruction is not finite
            print(error, file=sys.stderr)
            return cli.FAILED
    if args.json:
        cli.print_json(result)
    else:
        _print(result, Path(args.out))
    return cli.DONE


UNUSED = ("trains=denoiser", "model.patch=[1,1,1]", "sample.decode=auto", "sample.tile=null")
"""Overrides that switch off checks of training and sampling: here any autoencoder may be judged."""


def _recipe(args: argparse.Namespace) -> Any:
    """The stage that is asked for, with the autoencoder that is asked for; the last stage where none is named."""
    from lingen.recipe import load_curriculum

    if args.recipe is None and args.run is None:
        raise RecipeError("Say on which recipe's clips: --recipe R, or --run DIR for the recipe of a run.")
    first, last = _autoencoder(args)
    asked = {"data.frames": args.frames, "data.size": args.size and list(args.size)}
    changes = [f"{key}={value}" for key, value in asked.items() if value is not None]
    overrides = [*first, *args.overrides, *changes, *last, *UNUSED]
    return load_curriculum(args.recipe or RunFolder(Path(args.run)).recipe, overrides).chosen(args.stage)[-1]


def _autoencoder(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Overrides that name the autoencoder and that what is typed may change, and those that it may not."""
    if args.run and args.checkpoint:
        raise RecipeError("Say where the weights are: either --run DIR or --checkpoint F.")
    source = args.run or args.checkpoint
    if not source:
        return [f"autoencoder={args.autoencoder}"] if args.autoencoder else [], []
    if args.autoencoder:
        raise RecipeError(
            f"--autoencoder {args.autoencoder} and the weights at {source} are two autoencoders. To judge "
            f"'{args.autoencoder}' on a run's clips say --recipe DIR/recipe.yaml --autoencoder {args.autoencoder}."
        )
    component = _trained(Path(source))
    return [f"autoencoder={json.dumps(component)}"], [f"autoencoder.path={json.dumps(component['path'])}"]


def _trained(source: Path) -> dict[str, Any]:
    """The autoencoder of a run folder or weights file, as a recipe that names these weights says it."""
    file = find_weights(source)  # a wrong name is told before torch is imported
    from lingen.autoencoder.stored import read_shapes, settings_from_shapes
    from lingen.training.weights import recipe_of

    recipe = recipe_of(file)
    if recipe.subject is not SUBJECTS["autoencoder"]:
        name, place = recipe.autoencoder["name"], "R" if file == source else f"{source}/recipe.yaml"
        raise RecipeError(
            f"{source} holds a denoiser and no autoencoder of its own. To judge '{name}', with which it was trained, "
            f"name the recipe instead: --recipe {place}."
        )
    component = recipe.autoencoder
    if "path" not in component:  # an autoencoder that comes with its weights, trained further
        component = {"name": "tae", **settings_from_shapes(read_shapes(file))}
    return {**component, "path": str(file)}


def _print(result: dict[str, Any], out: Any) -> None:
    cli.print_table([*_rows(result)])
    if result["compare"]:
        print()
        cells = {name: (f"{one['psnr']:.2f}", f"{one['latents']:.2g}") for name, one in result["compare"].items()}
        heads = ("ways", "decodes, PSNR", "latents, relative RMS")
        cli.print_table([dict(zip(heads, (name, *told), strict=True)) for name, told in cells.items()])
    print()
    for kind, one in result["latents"].items():
        print(f"{kind}: latents have mean {one['mean']:.3g} and standard deviation {one['std']:.3g}")
    stage = f", stage {result['stage']}" if result["stage"] else ""
    print(f"{result['recipe']}{stage}; decoded the way '{result['way']}'")
    print(*result["notes"], sep="\n")
    print(*sorted(str(file) for file in out.glob("side_by_side.*")), out / "metrics.json", sep="\n")


MEASURES = {
    "numbers kept": ("numbers", ".3%"), "PSNR": ("psnr", ".2f"), "SSIM": ("ssim", ".3f"),
    "perceptual": ("perceptual", ".4f"), "flicker": ("flicker", "+.4f"), "of the clip's": ("flicker_share", "+.1%"),
    "flicker of the error": ("error_flicker", ".4f"),
}  # fmt: skip
"""Column -> what it shows of a row, and how."""


def _rows(result: dict[str, Any]) -> Iterator[dict[str, str]]:
    name = "Movie Gen's TAE, in its paper, other clips, 512 pixels"
    kept = {kind: 16 / (3 * 8 ** (3 if kind == "video" else 2)) for kind in result["data"]}
    papers = [{"kind": kind, "what": name, "numbers": kept[kind], **result["paper"][kind]} for kind in kept]
    for row in (*result["rows"], *papers):
        cells = {title: _cell(row[key], form) for title, (key, form) in MEASURES.items() if key in row}
        yield {"kind": row["kind"], "what": row["what"], **cells}


@cli.command(
    "subjects side by side: distances to real clips, motion, coherence, text; with intervals, floors, tests of pairs",
    cli.argument("subjects", nargs="+", metavar="A",
                 help="folders of clips, runs, weights files; results.json of before"),
    cli.argument("--real", metavar="DIR", help="a folder of real clips, for distances"),
    cli.argument("--prompts", metavar="FILE",
                 help="one a line: what runs are asked, and what each subject should hold"),
    cli.argument("--repeat", type=cli.natural, default=1, metavar="N", help="clips of each of --prompts; default: 1"),
    cli.argument("--seed", type=int, default=0, help="of clips that are sampled here; default: 0"),
    cli.argument("--features", action="append", metavar="NET[=PATH]", help="i3d, efficientnet or module:Class, may be "
                 "given again, or none; default: efficientnet, and with --real i3d"),
    cli.argument("--clip", metavar="DIR", help="a CLIP of open_clip, for the CLIP score"),
    cli.argument("--fps", type=cli.positive, default=8.0, metavar="F",
                 help="at which all clips are judged; default: 8"),
    cli.argument("--frames", type=cli.natural, default=16, metavar="T", help="that video networks see; default: 16"),
    cli.argument("--out", default="eval/clips", metavar="DIR", help="default: eval/clips"),
    DEVICE, cli.JSON,
)  # fmt: skip
def eval_clips(args: argparse.Namespace) -> None:
    from lingen.evaluation.features import check_files

    default = ["i3d", "efficientnet"] if args.real else ["efficientnet"]  # I3D's are for distances alone
    networks = [] if args.features == ["none"] else args.features or default
    check_files(networks)  # told before torch is imported
    from lingen.evaluation.clips import View
    from lingen.evaluation.comparison import evaluate_clips
    from lingen.evaluation.judging import Judge

    check_place(Path(args.out))
    judge = partial(Judge, networks, View(args.fps, args.frames), args.clip, args.device)
    found = evaluate_clips(
        args.subjects, judge, Path(args.out), cli.count_bar, real=args.real, repeat=args.repeat,
        prompts=lines_of(args.prompts) if args.prompts else (), seed=args.seed,
    )  # fmt: skip
    lines: dict[str, dict[str, str]] = {}
    for row in found["results"]:
        around = "" if row["interval"] is None else " [{:.4g}, {:.4g}]".format(*row["interval"])
        line = lines.setdefault(row["metric"], {"metric": row["metric"], "floor": _cell(row["floor"], ".4g")})
        line[row["subject"]] = f"{row['value']:.4g}{around}"
    pairs = [{k: f"{v:.3g}" if type(v) is float else str(v) for k, v in row.items()} for row in found["comparisons"]]
    told = list(found["failures"].items())
    failed = [f"{name}: {n} x {why}" for name, held in told for why, n in list(held.items())[:5]]
    failed += [f"{name}: {len(held)} such, all of them in results.json" for name, held in told if len(held) > 5]
    files = [Path(args.out) / f"results.{end}" for end in ("png", "json")]
    cli.tell(args, found, [list(lines.values()), pairs], *failed, *found["notes"], *files)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


@cli.command(
    "one page on which people compare clips without knowing whose they are, and the key that tells it",
    cli.argument("folders", nargs="+", metavar="DIR", help="two or more folders of clips of `lingen sample`"),
    cli.argument("--prompts", metavar="FILE", required=True, help="a file with a prompt on each line"),
    cli.argument("--out", metavar="F.html", default="study.html", help="the key lies beside it; default: study.html"),
    cli.argument("--seed", type=int, default=0, help="another order, other sides"),
    cli.argument("--per-rater", type=cli.natural, metavar="N", help="so many pairs for each rater; default: all"),
)
def study_make(args: argparse.Namespace) -> None:
    from lingen.evaluation.study import make_study

    key, notes = make_study(args.folders, lines_of(args.prompts), args.out, args.seed, args.per_rater)
    print("".join(f"{note}\n" for note in notes), end="", file=sys.stderr)
    print(f"study {key['study']}, {sum('pair' in one for one in key['trials'].values())} pairs")
    page = Path(args.out).with_suffix(".html")
    print(f"{page}: for the raters\n{page.with_suffix('.key.json')}: which side was which; keep it to yourself")


@cli.command(
    "what the votes say: wins, ties, losses, strengths, agreement, and how many raters are still needed",
    cli.argument("votes", nargs="+", metavar="VOTES.csv", help="the files that raters downloaded"),
    cli.argument("--key", metavar="F", required=True, help="the key that `lingen study make` wrote"),
    cli.argument(
        "--margin", type=cli.positive, default=0.1, metavar="M", help="wins minus losses to show; default: 0.1"
    ),
    cli.JSON,
)
def study_report(args: argparse.Namespace) -> None:
    from lingen.evaluation.study_report import report_votes

    found = report_votes(args.votes, args.key, args.margin)
    table = [{"axis": row["axis"], "of": row["of"], "strength": _with_ends(row, "+.2f")} for row in found["strengths"]]
    cli.tell(args, found, [[_preference(row) for row in found["pairs"]], table])
    if not args.json:
        print(*found["notes"], sep="\n", file=sys.stderr)


def _preference(row: dict[str, Any]) -> dict[str, str]:
    cells = {name: _with_ends(row[name], "+.0%" if name == "net" else ".0%") for name in ("win", "tie", "loss", "net")}
    cells |= {"raters": f"{row['ahead']}:{row['behind']}", "p": f"{row['p']:.2g}", "p, Holm": f"{row['p_holm']:.2g}"}
    cells |= {"agreement": _cell(row["agreement"], ".2f"), "raters needed": _cell(row["raters_needed"], "d")}
    return {"axis": row["axis"], "of": row["of"], "against": row["against"], "votes": str(row["n"]), **cells}


def _with_ends(one: dict[str, Any], form: str) -> str:
    return f"{one['value']:{form}} [{one['interval'][0]:{form}}, {one['interval'][1]:{form}}]"
