"""Measurements: ``lingen bench ...``. Every command says what it does as it goes, and writes after each number."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lingen.cli.command import (
    DONE,
    JSON,
    Argument,
    argument,
    command,
    count_bar,
    natural,
    positive,
    print_json,
    print_table,
)
from lingen.recipe.errors import RecipeError


def _grid(text: str) -> tuple[int, int, int]:
    try:
        t, h, w = map(natural, text.split("x"))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"'{text}' is no grid; say tokens in t, h and w, e.g. 34x32x32") from None
    return t, h, w


BENCH_MIXERS = argument(
    "--mixers", nargs="+", default=["attention", "temporal_swin", "mamba2", "mate", "linear_attention"], metavar="M"
)
BENCH_RECIPE = argument("--recipe", default="t2v_68s", metavar="R", help="a YAML file or a name (default: t2v_68s)")
DIM = argument("--dim", type=natural, help="width of a token; default: 2560, on a CPU 64")
BENCH_GRIDS = argument(
    "--grid", dest="grids", type=_grid, action="append", metavar="TxHxW",
    help="tokens in t, h, w, e.g. 34x32x32, which is 512x512 for 17 s; may be given again",
)  # fmt: skip
WHERE = (
    argument("--device", help="cuda or cpu; default: the GPU where there is one"),
    argument("--budget", type=positive, metavar="S", help="seconds for each number; what takes longer runs once"),
    argument("--commit", metavar="HASH", help="for the result file, where there is no checkout"),
)


def out(path: str) -> Argument:
    """The result file."""
    return argument("--out", default=path, metavar="FILE", help=f"result file (default: {path})")


@command(
    "how FLOPs, time and memory of mixers grow with the tokens: scaling.json, .csv, .png and .md",
    BENCH_MIXERS,
    DIM,
    argument(
        "--sizes", type=_grid, nargs="+", metavar="TxHxW", help="three or more; default: 256x256 17 s to 512x512 136 s"
    ),
    argument("--quick", action="store_true", help="small sizes on the CPU, under two minutes; a CPU's default"),
    argument("--render", action="store_true", help="measure nothing: .csv, .png and .md anew from DIR/scaling.json"),
    argument("--out", default="bench", metavar="DIR", help="default: bench"),
    *WHERE,
)
def bench_scaling(args: argparse.Namespace) -> int:
    from .receipt import write_receipt
    from .scaling import GRIDS, QUICK_GRIDS, check_grids, scaling

    folder = Path(args.out)
    args.out = folder / "scaling.json"
    if not args.render:
        place = place_for(args, 0.5)
        grids = args.sizes or (GRIDS if place.cuda else QUICK_GRIDS)
        check_grids(grids)
        scaling(args.mixers, args.dim, grids, place, results_for(args, place, dim=args.dim, batch=1))
    elif not args.out.is_file():
        raise RecipeError(f"There is no {args.out} to render; name its folder with --out.")
    files = write_receipt(json.loads(args.out.read_text(encoding="utf-8")), folder)
    print(files[-1].read_text(encoding="utf-8"), end="")
    print(*files, sep="\n")
    return DONE


@command(
    "mixers at equal width: parameters, FLOPs, time and memory of a layer",
    BENCH_MIXERS,
    DIM,
    BENCH_GRIDS,
    out("bench/mixers.json"),
    *WHERE,
)
def bench_mixers(args: argparse.Namespace) -> int:
    from .scaling import measure_scaling

    place = place_for(args)
    results = results_for(args, place, dim=args.dim, batch=1)
    measure_scaling(args.mixers, args.dim, args.grids, place, results)
    return print_tables(results, "mixers")


@command(
    "each kernel against its twins and its roofline, forward and backward, and how exact it is",
    argument("--only", nargs="+", default=[], metavar="NAME", help="operations; default: all"),
    DIM,
    BENCH_GRIDS,
    out("bench/kernels.json"),
    *WHERE,
)
def bench_kernels(args: argparse.Namespace) -> int:
    from . import kernels

    kernels.check_names(args.only)
    place = place_for(args)
    results = results_for(args, place, dim=args.dim, batch=1)
    kernels.bench_kernels(args.grids, args.dim, place, results, args.only)
    return print_tables(results, "kernels")


@command(
    "MATE's branches without their projections against stock parts, forward and backward",
    BENCH_RECIPE,
    BENCH_GRIDS,
    out("bench/stock.json"),
    *WHERE,
    overrides=True,
)
def bench_stock(args: argparse.Namespace) -> int:
    from lingen.recipe import load_recipe

    from . import branches

    model = load_recipe(args.recipe, args.overrides).model
    if isinstance(model.mixer, list) or model.mixer["name"] != "mate":
        raise RecipeError(f"'{args.recipe}' has no mixer 'mate', whose branches are measured here.")
    place = place_for(args)
    results = results_for(args, place, dim=model.dim, batch=1)
    branches.bench_branches(model.mixer, model.dim, args.grids, place, results)
    return print_tables(results, "branches")


@command(
    "forward and backward of the denoiser's layers: tokens a second and MFU, against stock parts",
    BENCH_RECIPE,
    BENCH_GRIDS,
    argument("--layers", default="0,1", help="which ones (default: 0,1)"),
    out("bench/training.json"),
    *WHERE,
    overrides=True,
)
def bench_training(args: argparse.Namespace) -> int:
    from lingen.recipe import load_recipe

    from . import training

    model = load_recipe(args.recipe, args.overrides).model
    layers = [int(word) for word in args.layers.split(",") if word.isdecimal()]
    if len(layers) < len(args.layers.split(",")) or max(layers) >= model.depth:
        raise RecipeError(f"--layers {args.layers}: say layers of 0 to {model.depth - 1}, e.g. --layers 0,1.")
    place = place_for(args)
    results = results_for(args, place, dim=model.dim, batch=1)
    training.bench_training(model, args.grids, place, results, layers)
    return print_tables(results, "training")


@command(
    "a recipe's own training loop by part: waiting for data, forward, backward, optimiser, average; tokens a second",
    BENCH_RECIPE,
    argument("--stage", metavar="NAME", help="of the recipe (default: the last one)"),
    argument("--steps", type=natural, default=20, metavar="N", help="of each measurement (default: 20)"),
    out("bench/fit.json"),
    argument("--commit", metavar="HASH", help="for the result file, where there is no checkout"),
    overrides=True,
)
def bench_fit(args: argparse.Namespace) -> int:
    import torch

    from . import fit, results

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    file = results.Results(Path(args.out), {}, device, say, args.commit)
    fit.bench_fit(args.recipe, args.overrides, args.stage, args.steps, file)
    return print_tables(file, "fit")


@command(
    "committed results next to the targets: reached, or by how much missed",
    argument("--results", default="docs/results", metavar="DIR", help="folder of result files (default: docs/results)"),
    argument("--markdown", metavar="PAGE", help="make the tables of this page anew from the files, in place"),
    JSON,
)
def bench_show(args: argparse.Namespace) -> int:
    from .show import PAGE, fill, read

    files = read(Path(args.results))
    lines = PAGE["targets"].lines(files)
    if args.markdown:
        page = Path(args.markdown)
        if not page.is_file():
            raise RecipeError(f"There is no page {page}.")
        page.write_text(fill(page.read_text(encoding="utf-8"), files), encoding="utf-8")
        print(page)
    elif args.json:
        print_json([dict(zip(lines[0], line, strict=True)) for line in lines[1:]])
    else:
        _print_lines(lines)
    return DONE


@command(
    "how fast the loader is, beside a bare PyAV loop and plain webdataset (CPU)",
    argument("--shards", default="data/footage/*video-*.tar", metavar="S", help="default: `lingen data fetch footage`"),
    argument("--out", default="bench", metavar="DIR", help="loader.json goes there"),
    argument("--pairs", type=int, default=7, metavar="N", help="measurements of each of both sides; default: 7"),
    argument("--seconds", type=float, default=5.0, metavar="S", help="that a measurement takes about; default: 5"),
    argument("--rows", type=int, default=1_000_000, metavar="N", help="of a synthetic manifest; 0: none"),
)
def bench_loader(args: argparse.Namespace) -> int:
    from . import loader

    with count_bar("measuring") as progress:
        result = loader.bench(
            args.shards, Path(args.out), pairs=args.pairs, seconds=args.seconds, rows=args.rows, progress=progress
        )
    print_table([_comparison_row(one) for one in result["comparisons"]])
    if args.rows:
        print(f"\nthe index of {args.rows:,} rows: ", end="")
        print(
            ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["index"].items() if name != "rows")
        )
    print(Path(args.out) / "loader.json")
    return DONE


def _comparison_row(one: dict[str, Any]) -> dict[str, str]:
    ours, theirs = one["clips_per_second"]
    cpu = [f"{milliseconds:.3g}" for milliseconds in one["cpu_ms_per_clip"]]
    return {
        "shards": one["what"], "beside": one["beside"], "workers": str(one["workers"]), "ratio": f"{one['ratio']:.2f}",
        "clips/s": f"{ours:.4g}", "theirs": f"{theirs:.4g}", "CPU ms/clip": cpu[0], "theirs, ms": cpu[1],
    }  # fmt: skip


def place_for(args: argparse.Namespace, budget: float | None = None) -> Any:
    """Where it is measured: on the CPU with --quick. Fills in the width and the grids, which are small on a CPU.
    `budget`: seconds for each number, where the user says none."""
    from .place import place_of

    quick = getattr(args, "quick", False)
    if quick and args.device not in (None, "cpu"):
        raise RecipeError(f"--quick measures on the CPU; leave out --quick, or --device {args.device}.")
    place = place_of("cpu" if quick else args.device, getattr(args, "precision", None), args.budget or budget)
    args.dim = getattr(args, "dim", None) or (2560 if place.cuda else 64)
    args.grids = getattr(args, "grids", None) or [(34, 32, 32) if place.cuda else (4, 8, 8)]
    return place


def results_for(args: argparse.Namespace, place: Any, **about: object) -> Any:
    """The result file that --out names, with what its head says."""
    from .results import Results

    return Results(Path(args.out), about, place.device, say, args.commit)


def say(text: str) -> None:
    """Prints a line at once, so that an interrupted run shows how far it came."""
    print(text, file=sys.stderr, flush=True)


def print_tables(results: Any, *names: str) -> int:
    """Those of these tables that have something of this run."""
    from .show import TABLES

    for name in names:
        lines = TABLES[name].lines({"this run": results.data})
        if len(lines) > 1:
            _print_lines(lines)
    return DONE


def _print_lines(lines: Sequence[Sequence[str]]) -> None:
    head, *rest = lines
    unique = [name + " " * head[:i].count(name) for i, name in enumerate(head)]  # columns may have the same heading
    print_table([dict(zip(unique, line, strict=True)) for line in rest])
