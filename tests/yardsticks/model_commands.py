"""Measurements of whole models: ``lingen bench model`` and ``lingen bench tae``."""

import argparse
from functools import partial
from typing import Any

from lingen.cli.command import STAGE, argument, command, natural, size_of
from lingen.recipe.errors import RecipeError

from .commands import BENCH_GRIDS, BENCH_RECIPE, WHERE, out, place_for, print_tables, results_for, say

DIT = ("cudnn", "flash", "sdpa", "best")
TWINS: dict[str, tuple[str, ...]] = {"all": (), "dit": DIT} | {name: (name,) for name in (*DIT, "stock")}
"""Word -> the twins that it means; none named: all of them."""


def _twins(text: str) -> tuple[str, ...]:
    words = text.split(",")
    for word in words:
        if word not in TWINS:
            raise argparse.ArgumentTypeError(f"There is no twin called '{word}'. Known: {', '.join(TWINS)}.")
    return () if "all" in words else tuple(name for word in words for name in TWINS[word])


@command(
    "the whole denoiser with random weights: seconds of 100 forwards, memory, parts, sampling, its DiT twin",
    BENCH_RECIPE,
    STAGE,
    BENCH_GRIDS,
    argument("--precision", choices=["bf16", "fp8", "fp32"], help="default: bf16, on a CPU fp32"),
    argument("--run50", action="store_true", help="one real sampling with guidance, of the recipe's steps"),
    argument(
        "--twins",
        type=_twins,
        metavar="WHICH",
        help="in the same rounds: dit (cudnn,flash,best), stock (stock LinGen), or all",
    ),
    argument("--dit-depth", type=natural, help="layers of the DiT (default: 38/28 of the recipe's)"),
    argument("--variants", action="store_true", help="the paper's latency table: without TESA, review tokens, ..."),
    argument("--quality", action="store_true", help="how far 8-bit products are from 16 bits"),
    out("bench/model.json"),
    *WHERE,
    overrides=True,
)
def bench_model(args: argparse.Namespace) -> int:
    from lingen.recipe import load_recipe

    from .model import bench_model, video_grid
    from .paper import VARIANTS

    twins = None
    if args.twins is not None:
        from .twins import bench_twins

        twins = partial(bench_twins, depth=args.dit_depth, only=args.twins)
    recipe = load_recipe(args.recipe, args.overrides, args.stage)
    changes = [(*args.overrides, *one.overrides) for one in VARIANTS if args.variants]
    variants = [load_recipe(args.recipe, overrides, args.stage).model for overrides in changes]
    grids = args.grids or [video_grid(recipe)]
    place = place_for(args, 3.0)
    results = results_for(args, place, recipe=recipe.name, dim=recipe.model.dim, depth=recipe.model.depth)
    wanted = {"fp8": args.precision == "fp8", "run50": args.run50, "fp8_quality": args.quality}
    bench_model(recipe, grids, place, results, twins=twins, variants=variants, **wanted)
    return print_tables(results, "forwards", "sampling", "parts", "ablation")


@command(
    "an autoencoder on long clips: seconds and memory to encode and decode, and how far its ways are apart",
    argument("--recipe", metavar="R", help="the autoencoder of a recipe: a YAML file or a name"),
    argument(
        "--autoencoder", metavar="NAME",
        help="or one with its default settings (default: tae_small); where its weights are missing they are random",
    ),
    argument("--frames", type=natural, action="append", metavar="T", help="may be given again; default: 272 and 1088"),
    argument("--size", type=size_of, metavar="HxW", help="default: 512x512"),
    argument(
        "--ways", nargs="+", choices=["exact", "tiled", "whole"],
        help="by its own streams, the same in tiles of half a frame's sides, in one call; default: all that it has",
    ),
    argument("--precision", choices=["bf16", "fp32"], help="of products; default: bf16, on a CPU fp32"),
    argument("--quick", action="store_true", help="16 and 64 frames of 64x64 on the CPU; a CPU's default"),
    out("bench/tae.json"),
    *WHERE,
    overrides=True,
)  # fmt: skip
def bench_tae(args: argparse.Namespace) -> int:
    from .autoencoder import bench_autoencoder, prepared

    component, place = _component(args), place_for(args, 0.5)
    ready = prepared(component, place, say, args.frames or (), args.size, args.ways or ())
    results = results_for(args, place, autoencoder=ready[0].settings)
    bench_autoencoder(*ready, results)
    return print_tables(results, "autoencoder", "agreement")


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
