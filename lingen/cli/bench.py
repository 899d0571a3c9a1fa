"""Measurements: ``lingen bench ...``. Every command says what it does as it goes, and writes after each number."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lingen.cli.command import (
    DONE,
    FAILED,
    JSON,
    STAGE,
    argument,
    command,
    positive,
    print_json,
    print_table,
    size_of,
    whole,
)  # fmt: skip
from lingen.recipe.registry import RecipeError

MIXERS = ["attention", "temporal_swin", "mamba2", "mate", "linear_attention"]


def _grid(text: str) -> tuple[int, int, int]:
    try:
        t, h, w = map(whole, text.split("x"))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"'{text}' is no grid; say tokens in t, h and w, e.g. 34x32x32") from None
    return t, h, w


GRIDS = argument(
    "--grid", dest="grids", type=_grid, action="append", metavar="TxHxW",
    help="tokens in t, h, w, e.g. 34x32x32, which is 512x512 for 17 s; may be given again",
)  # fmt: skip
DIM = argument("--dim", type=whole, help="width of a token; default: 2560, on a CPU 64")
DEVICE = argument("--device", help="cuda or cpu; default: the GPU where there is one")
BUDGET = argument("--budget", type=positive, metavar="S", help="seconds for each number; what takes longer runs once")
COMMIT = argument("--commit", metavar="HASH", help="for the result file, where there is no checkout")


def _out(default: str) -> Any:
    return argument("--out", default=default, metavar="FILE", help=f"result file (default: {default})")


@command(
    "how FLOPs, time and memory of mixers grow with the tokens: scaling.json, .csv, .png and .md",
    argument("--mixers", nargs="+", default=MIXERS, metavar="M"),
    DIM,
    argument(
        "--sizes", type=_grid, nargs="+", metavar="TxHxW", help="three or more; default: 256x256 17 s to 512x512 136 s"
    ),
    argument("--quick", action="store_true", help="small sizes on the CPU, under two minutes; a CPU's default"),
    argument("--render", action="store_true", help="measure nothing: .csv, .png and .md anew from DIR/scaling.json"),
    argument("--out", default="bench", metavar="DIR", help="default: bench"),
    DEVICE,
    BUDGET,
    COMMIT,
)
def bench_scaling(args: argparse.Namespace) -> int:
    from lingen.bench.receipt import write_receipt

    out = Path(args.out)
    if args.render and not (out / "scaling.json").is_file():
        raise RecipeError(f"There is no {out / 'scaling.json'} to render; name its folder with --out.")
    result = json.loads((out / "scaling.json").read_text(encoding="utf-8")) if args.render else _scaling(args, out)
    try:
        files = write_receipt(result, out)
    except ImportError as error:
        say(f"{error}. All numbers are in {out / 'scaling.json'}; with matplotlib, --render makes the rest of it.")
        return FAILED
    print(files[-1].read_text(encoding="utf-8"), end="")
    print(*files, sep="\n")
    return DONE


def _scaling(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    from lingen.bench.build import best_device
    from lingen.bench.scaling import GRIDS, QUICK_GRIDS, scaling

    device = best_device(_quick(args))
    cpu = device.type == "cpu"
    grids = args.sizes or (QUICK_GRIDS if cpu else GRIDS)
    dim = args.dim or (64 if cpu else 2560)
    return scaling(args.mixers, dim, grids, device, out, say, args.budget or 0.5, args.commit)


@command(
    "mixers at equal width: parameters, FLOPs, time and memory of a layer",
    argument("--mixers", nargs="+", default=MIXERS, metavar="M"),
    DIM,
    GRIDS,
    _out("bench/mixers.json"),
    DEVICE,
    BUDGET,
    COMMIT,
)
def bench_mixers(args: argparse.Namespace) -> int:
    from lingen.bench.receipt import measured
    from lingen.bench.scaling import measure

    device, dim, grids, budget = _where(args)
    results = _results(args, device, {"dim": dim, "batch": 1})
    measure(args.mixers, dim, grids, device, results, budget)
    _print_lines(measured(results.data["rows"]))
    return DONE


@command(
    "each kernel against its twins and its roofline, forward and backward, and how exact it is",
    argument("--only", nargs="+", default=[], metavar="NAME", help="operations; default: all"),
    DIM,
    GRIDS,
    _out("bench/kernels.json"),
    DEVICE,
    BUDGET,
    COMMIT,
)
def bench_kernels(args: argparse.Namespace) -> int:
    from lingen.bench.branches import Place
    from lingen.bench.build import precision_of
    from lingen.bench.kernels import bench_kernels
    from lingen.bench.show import kernels

    device, dim, grids, budget = _where(args)
    results = _results(args, device, {"dim": dim, "batch": 1})
    square = 8192 if device.type == "cuda" else 512
    bench_kernels(grids, dim, Place(device, precision_of(device), budget), results, args.only, square)
    _print_lines(kernels({"this run": results.data}))
    return DONE


RECIPE = argument("--recipe", default="t2v_68s", metavar="R", help="a YAML file or a name (default: t2v_68s)")


@command(
    "MATE's branches without their projections against stock parts, forward and backward",
    RECIPE,
    GRIDS,
    _out("bench/stock.json"),
    DEVICE,
    BUDGET,
    COMMIT,
    overrides=True,
)
def bench_stock(args: argparse.Namespace) -> int:
    from lingen.bench.branches import Place, bench_branches
    from lingen.bench.build import precision_of
    from lingen.bench.show import branches
    from lingen.recipe import load_recipe

    model = load_recipe(args.recipe, args.overrides).model
    if isinstance(model.mixer, list) or model.mixer["name"] != "mate":
        raise RecipeError(f"'{args.recipe}' has no mixer 'mate', whose branches are measured here.")
    device, _, grids, budget = _where(args)
    results = _results(args, device, {"dim": model.dim, "batch": 1})
    bench_branches(model.mixer, model.dim, grids, Place(device, precision_of(device), budget), results)
    _print_lines(branches({"this run": results.data}))
    return DONE


@command(
    "forward and backward of the denoiser's layers: tokens a second and MFU, against stock parts",
    RECIPE,
    GRIDS,
    argument("--layers", default="0,1", help="which ones (default: 0,1)"),
    _out("bench/training.json"),
    DEVICE,
    BUDGET,
    COMMIT,
    overrides=True,
)
def bench_training(args: argparse.Namespace) -> int:
    from lingen.bench.branches import Place, bench_training
    from lingen.bench.build import precision_of
    from lingen.bench.show import training
    from lingen.recipe import load_recipe

    model = load_recipe(args.recipe, args.overrides).model
    layers = [int(word) for word in args.layers.split(",") if word.isdecimal()]
    if len(layers) < len(args.layers.split(",")) or max(layers) >= model.depth:
        raise RecipeError(f"--layers {args.layers}: say layers of 0 to {model.depth - 1}, e.g. --layers 0,1.")
    device, _, grids, budget = _where(args)
    results = _results(args, device, {"dim": model.dim, "batch": 1})
    for grid in grids:
        bench_training(model, grid, Place(device, precision_of(device), budget), results, layers)
    _print_lines(training({"this run": results.data}))
    return DONE


@command(
    "the whole denoiser with random weights: seconds of 100 forwards, memory, parts, sampling, its DiT twin",
    RECIPE,
    STAGE,
    GRIDS,
    argument("--precision", choices=["bf16", "fp8", "fp32"], help="default: bf16, on a CPU fp32"),
    argument("--run50", action="store_true", help="one real sampling with guidance, of the recipe's steps"),
    argument(
        "--twins",
        metavar="WHICH",
        help="in the same rounds: dit (cudnn,flash,best), stock (stock LinGen), or all",
    ),
    argument("--dit-depth", type=whole, help="layers of the DiT (default: 38/28 of the recipe's)"),
    argument("--variants", action="store_true", help="the paper's latency table: without TESA, review tokens, ..."),
    argument("--quality", action="store_true", help="how far 8-bit products are from 16 bits"),
    _out("bench/model.json"),
    DEVICE,
    BUDGET,
    COMMIT,
    overrides=True,
)
def bench_model(args: argparse.Namespace) -> int:
    from lingen.bench.run import Request, bench_recipe
    from lingen.bench.show import ablation, forwards, parts, sampling

    asked = Request(
        recipe=args.recipe, stage=args.stage, overrides=tuple(args.overrides), grids=tuple(args.grids or ()),
        precision=args.precision, run50=args.run50, twins=None if args.twins is None else _words(args.twins),
        dit_depth=args.dit_depth, variants=args.variants, quality=args.quality, device=args.device,
        budget=args.budget, commit=args.commit,
    )  # fmt: skip
    results = bench_recipe(asked, Path(args.out), say)
    for table in (forwards, sampling, parts, ablation):
        lines = table({"this run": results.data})
        if len(lines) > 1:
            _print_lines(lines)
    return DONE


@command(
    "an autoencoder on long clips: seconds and memory to encode and decode, and how far its ways are apart",
    argument("--recipe", metavar="R", help="the autoencoder of a recipe: a YAML file or a name"),
    argument(
        "--autoencoder", metavar="NAME",
        help="or one with its default settings (default: tae_small); where its weights are missing they are random",
    ),
    argument("--frames", type=whole, action="append", metavar="T", help="may be given again; default: 272 and 1088"),
    argument("--size", type=size_of, metavar="HxW", help="default: 512x512"),
    argument(
        "--ways", nargs="+", choices=["exact", "tiled", "whole"],
        help="by its own streams, in tiles of 32 frames, in one call; default: all that it has",
    ),
    argument("--precision", choices=["bf16", "fp32"], help="of products; default: bf16, on a CPU fp32"),
    argument("--quick", action="store_true", help="16 and 64 frames of 64x64 on the CPU; a CPU's default"),
    _out("bench/tae.json"),
    DEVICE,
    BUDGET,
    COMMIT,
    overrides=True,
)  # fmt: skip
def bench_tae(args: argparse.Namespace) -> int:
    from lingen.bench.autoencoder import Request, bench_autoencoder
    from lingen.bench.show import agreement, autoencoder

    asked = Request(
        autoencoder=_component(args), frames=tuple(args.frames or ()), size=args.size, ways=tuple(args.ways or ()),
        precision=args.precision, device=_quick(args), budget=args.budget, commit=args.commit,
    )  # fmt: skip
    results = bench_autoencoder(asked, Path(args.out), say)
    for table in (autoencoder, agreement):
        lines = table({"this run": results.data})
        if len(lines) > 1:
            _print_lines(lines)
    return DONE


def _component(args: argparse.Namespace) -> dict[str, Any]:
    """The autoencoder of the recipe, or the one that is named."""
    from lingen.recipe import load_recipe

    if args.recipe and args.autoencoder:
        raise RecipeError("Say which autoencoder: either --recipe R, with autoencoder=NAME, or --autoencoder NAME.")
    if args.overrides and not args.recipe:
        raise RecipeError(f"'{args.overrides[0]}' changes a recipe: say which one with --recipe.")
    if args.recipe:
        return load_recipe(args.recipe, args.overrides).autoencoder
    return {"name": args.autoencoder or "tae_small"}


@command(
    "committed results next to the targets: reached, or by how much missed",
    argument("--results", default="docs/results", metavar="DIR", help="folder of result files (default: docs/results)"),
    argument("--markdown", metavar="PAGE", help="make the tables of this page anew from the files, in place"),
    JSON,
)
def bench_show(args: argparse.Namespace) -> int:
    from lingen.bench.show import fill, read, targets

    files = read(Path(args.results))
    if args.markdown:
        page = Path(args.markdown)
        if not page.is_file():
            raise RecipeError(f"There is no page {page}.")
        page.write_text(fill(page.read_text(encoding="utf-8"), files), encoding="utf-8")
        print(page)
        return DONE
    head, *lines = targets(files)
    if args.json:
        print_json([dict(zip(head, line, strict=True)) for line in lines])
    else:
        _print_lines([head, *lines])
    return DONE


def _words(text: str) -> tuple[str, ...]:
    """``all`` is every one: no words. RecipeError for a word that names no twin."""
    known = ("all", "dit", "cudnn", "flash", "sdpa", "best", "stock")
    unknown = [word for word in text.split(",") if word not in known]
    if unknown:
        raise RecipeError(f"There is no twin called '{unknown[0]}'. Known: {', '.join(known)}.")
    text = text.replace("dit", "cudnn,flash,sdpa,best")
    return () if text == "all" else tuple(text.split(","))


def say(text: str) -> None:
    """What is going on, at once: a cut run has said how far it came."""
    print(text, file=sys.stderr, flush=True)


def _quick(args: argparse.Namespace) -> str | None:
    """The device that is asked for; --quick asks for the CPU."""
    if args.quick and args.device not in (None, "cpu"):
        raise RecipeError(f"--quick measures on the CPU; leave out --quick, or --device {args.device}.")
    return "cpu" if args.quick else args.device


def _where(args: argparse.Namespace) -> tuple[Any, int, Any, float]:
    """Device, width, grids and seconds for each number; small ones on a CPU."""
    from lingen.bench.build import best_device

    device = best_device(args.device)
    cpu = device.type == "cpu"
    grids = args.grids or [(4, 8, 8) if cpu else (34, 32, 32)]
    return device, getattr(args, "dim", None) or (64 if cpu else 2560), grids, args.budget or (0.1 if cpu else 0.5)


def _results(args: argparse.Namespace, device: Any, about: dict[str, Any]) -> Any:
    from lingen.bench.results import Results

    return Results(Path(args.out), about, device, say, args.commit)


def _print_lines(lines: list[list[str]]) -> None:
    head, *rest = lines
    print_table([dict(zip(head, line, strict=True)) for line in rest])
