"""Judgements: ``lingen eval ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from lingen.cli.command import (
    DONE,
    FAILED,
    JSON,
    RECIPE,
    STAGE,
    WAYS,
    argument,
    command,
    console,
    print_json,
    print_table,
    size_of,
    whole,
)
from lingen.cli.encode import DEVICE, device_of
from lingen.registry import RecipeError


@command(
    "how well a recipe's autoencoder reconstructs its held-out clips, next to bicubic scaling of the same size",
    RECIPE,
    STAGE,
    argument("--run", metavar="DIR", help="weights: the last finished stage of an autoencoder's run; also its recipe"),
    argument("--checkpoint", metavar="F", help="weights: a file of such a run"),
    argument("--autoencoder", metavar="NAME", help="another one than the recipe's, e.g. pixels"),
    argument("--clips", type=whole, default=8, metavar="N", help="of each kind; default: 8"),
    argument("--frames", type=whole, metavar="T", help="of a clip; default: the recipe's"),
    argument("--size", type=size_of, metavar="HxW", help="default: the recipe's"),
    *WAYS,
    argument("--compare", action="store_true", help="also how far the three ways are apart"),
    argument("--out", default="eval/tae", metavar="DIR", help="default: eval/tae"),
    DEVICE,
    JSON,
    overrides=True,
)  # fmt: skip
def eval_tae(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    from pathlib import Path

    from lingen.autoencoder.ways import tiles_of
    from lingen.metrics.autoencoder import Request, evaluate
    from lingen.progress import count_bar

    asked = Request(
        clips=args.clips, way=args.stream, tiles=tiles_of(args.tile), compare=args.compare,
        device=device_of(args.device),
    )  # fmt: skip
    with count_bar(console(), "reconstructing") as progress:
        try:
            result = evaluate(recipe, asked, Path(args.out), progress)
        except RecipeError:
            raise
        except ValueError as error:  # data of which nothing fits, a reconstruction that is not finite
            print(error, file=sys.stderr)
            return FAILED
    if args.json:
        print_json(result)
    else:
        _print(result, Path(args.out))
    return DONE


def _recipe(args: argparse.Namespace) -> Any:
    """The stage that is asked for, with the weights that are asked for; the last stage where none is named."""
    from lingen.folder import RunFolder
    from lingen.recipe import load_recipe, load_stages
    from lingen.weights import find_weights

    if args.run and args.checkpoint:
        raise RecipeError("Say where the weights are: either --run DIR or --checkpoint F.")
    source = args.run or args.checkpoint
    if args.recipe is None and args.run is None:
        raise RecipeError("Say on which recipe's clips: --recipe R, or --run DIR for the recipe of a run.")
    named = [f"autoencoder={args.autoencoder}"] if args.autoencoder else []
    asked = {
        "data.frames": args.frames,
        "data.size": args.size and list(args.size),
        "autoencoder.path": find_weights(source) if source else None,
        "model.patch": [1, 1, 1],  # the denoiser plays no part: its patches need not fill the clip
    }
    overrides = [*named, *args.overrides, *(f"{key}={value}" for key, value in asked.items() if value is not None)]
    recipe = args.recipe or RunFolder(_folder(args.run)).recipe
    return load_recipe(recipe, overrides, stage=args.stage) if args.stage else load_stages(recipe, overrides)[-1]


def _folder(run: str) -> Any:
    from pathlib import Path

    path = Path(run)
    if not path.is_dir():
        raise RecipeError(f"--run {run} is no run folder; name one, or give --recipe R --checkpoint F.")
    return path


def _print(result: dict[str, Any], out: Any) -> None:
    print_table([*_rows(result)])
    if result["compare"]:
        print()
        print_table(
            [
                {"ways": name, "decodes, PSNR": f"{one['psnr']:.2f}", "latents, relative RMS": f"{one['latents']:.2g}"}
                for name, one in result["compare"].items()
            ]
        )
    print()
    for kind, one in result["latents"].items():
        print(f"{kind}: latents have mean {one['mean']:.3g} and standard deviation {one['std']:.3g}")
    stage = f", stage {result['stage']}" if result["stage"] else ""
    print(f"{result['recipe']}{stage}; decoded the way '{result['way']}'")
    print(*result["notes"], sep="\n")
    print(*sorted(str(file) for file in out.glob("side_by_side.*")), out / "metrics.json", sep="\n")


def _rows(result: dict[str, Any]) -> Iterator[dict[str, str]]:
    for row in result["rows"]:
        yield {
            "kind": row["kind"],
            "what": row["what"],
            "numbers kept": f"{row['numbers']:.3%}",
            "PSNR": f"{row['psnr']:.2f}",
            "SSIM": f"{row['ssim']:.3f}",
            "perceptual": _cell(row["perceptual"], ".4f"),
            "flicker": _cell(row["flicker"], "+.4f"),
            "of the clip's": _cell(row["flicker_share"], "+.1%"),
            "flicker of the error": _cell(row["error_flicker"], ".4f"),
        }
    for kind in result["data"]:
        paper = result["paper"][kind]
        yield {
            "kind": kind,
            "what": "Movie Gen's TAE, in its paper, other clips, 512 pixels",
            "numbers kept": f"{16 / (3 * 8 ** (3 if kind == 'video' else 2)):.3%}",
            "PSNR": f"{paper['psnr']:.2f}",
            "SSIM": f"{paper['ssim']:.3f}",
        }


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
