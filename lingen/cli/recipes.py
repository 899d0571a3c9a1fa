"""The parts that recipes can name, and a recipe with all defaults filled in: ``lingen list`` and ``lingen show``."""

import argparse
import sys
from typing import Any

from lingen.cli.command import DONE, IMPORT, JSON, RECIPE, STAGE, argument, command, print_json, print_table
from lingen.recipe.errors import RecipeError


@command(
    "what a recipe can name: mixers, scan orders, autoencoders, text encoders, perceptual distances; and the recipes "
    "that come with lingen",
    argument("what", choices=["mixers", "scans", "autoencoders", "text", "perceptual", "recipes"]),
    JSON,
    IMPORT,
)
def list_(args: argparse.Namespace) -> int:
    from lingen.cli.catalogue import parts, recipes

    rows = recipes() if args.what == "recipes" else parts(args.what)
    if args.json:
        print_json(rows)
    else:
        from lingen.tables import as_cell

        print_table([{key: as_cell(value) for key, value in row.items()} for row in rows])
    return DONE


@command(
    "the recipe with every default filled in, its tokens, parameters and memory",
    RECIPE,
    STAGE,
    JSON,
    argument("--schema", action="store_true", help="print a JSON Schema of recipes, for editors"),
    overrides=True,
)
def show(args: argparse.Namespace) -> int:
    if args.schema:
        from lingen.recipe.json_schema import json_schema

        print_json(json_schema())
        return DONE
    if args.recipe is None:
        raise RecipeError("Say which recipe: --recipe R, or --schema.")
    from lingen.plan.forecast import plan, too_large
    from lingen.plan.loading import load_to_run
    from lingen.recipe import to_yaml
    from lingen.recipe.signature import as_plain

    curriculum = load_to_run(args.recipe, args.overrides)
    stages = curriculum.chosen(args.stage)
    recipe = stages[0] if args.stage else curriculum.base
    plans = [plan(stage) for stage in stages]
    for text in filter(None, map(too_large, plans, stages)):
        print(f"warning: {text}", file=sys.stderr)
    if args.json:
        print_json({"recipe": as_plain(recipe), "stages": [one.as_dict() for one in plans]})
        return DONE
    _print_forecast([_forecast_row(one) for one in plans], plans[0].parameters)
    print(to_yaml(recipe), end="")
    return DONE


def _forecast_row(one: Any) -> dict[str, str]:
    sizes = {**one.memory, "checkpoint (host memory)": one.checkpoint}
    gib = {name: f"{size / 2**30:.3g} GiB" for name, size in sizes.items()}
    tokens = " + ".join(f"{count:,} ({kind})" for kind, count in one.tokens.items())
    flops = " + ".join(f"{count / 1e12:.3g}" for count in one.flops.values()) or "unknown"
    return {"stage": one.stage, "tokens": tokens, "parameters": f"{one.trained:,}", "forward TFLOP": flops, **gib}


def _print_forecast(rows: list[dict[str, str]], parameters: dict[str, int]) -> None:
    """On a terminal two tables; else comment lines, so that what is printed is a recipe."""
    parts = [{"part": name, "parameters": f"{count:,}"} for name, count in parameters.items()]
    if sys.stdout.isatty():
        print_table(rows)
        print_table(parts)
        return
    for row in rows:
        print("# " + ", ".join(f"{name}: {value}" for name, value in row.items()))
    print("# " + ", ".join(f"{row['part']}: {row['parameters']}" for row in parts))
