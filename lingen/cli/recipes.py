"""The parts that recipes can name, a recipe with all defaults filled in, and what it takes: ``lingen list``, ``lingen
show`` and ``lingen plan``; and ``lingen new``, a package with a part."""

import argparse
import inspect
import re
import sys
from keyword import iskeyword
from pathlib import Path
from typing import Any

from lingen.cli import command as cli
from lingen.plan import GPUS
from lingen.recipe.errors import RecipeError
from lingen.recipe.reading import shipped_folder, shipped_recipes
from lingen.recipe.registry import SCANS, Registry, registries
from lingen.recipe.signature import REQUIRED, as_plain
from lingen.recipe.sizes import ranks_of
from lingen.tables import as_cell

GRID = (8, 16, 16)
"""Tokens (t, h, w) on which scan orders are compared."""

CatalogueRow = dict[str, Any]


@cli.command(
    "what a recipe can name: mixers, scan orders, autoencoders, text encoders, perceptual distances, optimisers, "
    "decays, losses, data sets that lingen draws; and the recipes that come with lingen",
    cli.argument("what", nargs="?", help="default: all of them", choices=[
        "mixers", "scans", "autoencoders", "text", "perceptual", "optimizer", "decay", "loss", "synthetic",
        "recipes"]),
    cli.JSON, cli.IMPORT,
)  # fmt: skip
def list_(args: argparse.Namespace) -> None:
    asked = [args.what] if args.what else [*registries(), "recipes"]
    found = {what: recipes() if what == "recipes" else parts(what) for what in asked}
    if args.json:
        cli.print_json(found[args.what] if args.what else found)
        return
    for what, rows in found.items():
        if not args.what:
            print(what.upper())
        cli.print_table([{key: as_cell(value) for key, value in row.items()} for row in rows])
        if what != asked[-1]:
            print()


def parts(what: str) -> list[CatalogueRow]:
    """A row for each part of a registry (``mixers``, ``scans``, ``autoencoders``, ``text``), plugins included."""
    registry = registries()[what]
    rows = [_row(registry, name) for name in registry.names()]
    return rows + [{"name": name, "origin": origin, "error": error} for name, origin, error in registry.refused()]


def recipes() -> list[CatalogueRow]:
    """A row for each recipe that comes with lingen: its stages, and the first line that says what it is."""
    from lingen.recipe import stages_of

    rows: list[dict[str, Any]] = []
    for name, file in shipped_recipes().items():
        lines = file.read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
        comments = [line.lstrip("# ") for line in lines if line.startswith("# ") and "yaml-language-server" not in line]
        try:
            rows.append({"name": name, "stages": stages_of(file), "about": _sentence(" ".join(comments))})
        except RecipeError as error:
            rows.append({"name": name, "error": str(error)})
    return rows


def _row(registry: Registry, name: str) -> CatalogueRow:
    row: CatalogueRow = {"name": name, "origin": registry.origin(name)}
    try:
        part = registry[name]
        if registry is SCANS:
            return row | {f"steps between neighbours at {GRID}": _distances(part), "about": _about(part)}
        defaults = {key: setting.default for key, setting in registry.settings(name).items()}
        settings = {key: "required" if value is REQUIRED else value for key, value in defaults.items()}
        return row | {"about": _about(part), "settings": settings}
    except Exception as error:  # a plugin may raise anything; other rows are still shown
        return row | {"error": " ".join(str(error).split())}


def _distances(scan: Any) -> dict[str, float]:
    """Mean distance in the sequence of neighbours in t, h and w; of a cycle, over its entries."""
    from lingen.blocks.scan import adjacency

    layers = range(len(scan)) if isinstance(scan, tuple) else range(1)
    scores = [adjacency(scan, GRID, layer) for layer in layers]
    means = [sum(values) / len(scores) for values in zip(*scores, strict=True)]
    return {axis: round(mean, 1) for axis, mean in zip("thw", means, strict=True)}


def _about(part: Any) -> str:
    if isinstance(part, str):
        return f"slowest axis {part[0]}, fastest axis {part[-1]}"
    if isinstance(part, tuple):
        entries = ", ".join(one if isinstance(one, str) else one.__name__ for one in part)
        return f"layer i takes entry i % {len(part)} of {entries}"
    return _sentence(inspect.getdoc(part) or "")


def _sentence(text: str) -> str:
    """The first one, whole."""
    return re.split(r"(?<=[.])\s+(?=[A-Z`])", " ".join(text.partition("\n\n")[0].split()))[0]


@cli.command(
    "writes a small package with a part of your own, which a recipe names once the package is installed, and its test",
    cli.argument("what", choices=["mixer", "scan", "text", "autoencoder"]),
    cli.argument("name", metavar="NAME", help="of part, package and folder: small letters, digits and _"),
)
def new(args: argparse.Namespace) -> None:
    folder, told = Path(args.name), f"such as my_{args.what}; got '{args.name}'."
    if not (args.name.isidentifier() and args.name.islower() and args.name.isascii()):
        raise RecipeError(f"A part is named in small letters, digits and _, {told}")
    if iskeyword(args.name):
        raise RecipeError(f"A part has a name that is no word of Python's own, {told}")
    if folder.exists():
        raise RecipeError(f"{folder} is there already; name another part, or go to another folder.")
    folder.mkdir()
    for file in sorted((shipped_folder("templates") / args.what).glob("*.*")):
        path, text = folder / file.name.replace("NAME", args.name), file.read_text(encoding="utf-8")
        text = text.replace("NAME", args.name).replace("CLASS", args.name.title().replace("_", ""))
        path.write_text(text, encoding="utf-8")
        print(path)
    key = {"mixer": "model.mixer", "scan": "model.mixer.scan"}.get(args.what, args.what)
    print(f"next: pip install -e {folder} && pytest {folder}, then {key}={folder} in a recipe or on the command line")


@cli.command(
    "the recipe with every default filled in, its tokens and parameters; for its memory see `lingen plan`",
    cli.RECIPE, cli.STAGE, cli.JSON,
    cli.argument("--schema", action="store_true", help="print a JSON Schema of recipes, for editors"),
    overrides=True,
)  # fmt: skip
def show(args: argparse.Namespace) -> None:
    if args.schema:
        from lingen.recipe.json_schema import json_schema

        cli.print_json(json_schema())
        return
    if args.recipe is None:
        raise RecipeError("Say which recipe: --recipe R, or --schema.")
    from lingen.plan.loading import load_curriculum, to_yaml

    curriculum = load_curriculum(args.recipe, args.overrides, to_train=True)
    stages = curriculum.chosen(args.stage)
    from lingen.data.order import steps_of
    from lingen.plan.forecast import plan
    from lingen.plan.practice import note_of_warmup

    recipe = stages[0] if args.stage else curriculum.base
    plans = [(plan(stage), steps_of(stage)) for stage in stages]
    for note in filter(None, map(note_of_warmup, stages)):
        print(note, file=sys.stderr)
    if args.json:
        told = [one.as_dict() | {"steps": steps} for one, steps in plans]
        cli.print_json({"recipe": as_plain(recipe), "stages": told})
        return
    _print_forecast(plans)
    print(to_yaml(recipe), end="")


@cli.command(
    "what each stage takes: tokens, FLOPs and hours, memory of a GPU by kind, disk; and what makes it fit",
    cli.NEEDED, cli.STAGE,
    cli.argument("--gpus", type=cli.natural, metavar="N", help="ranks; default: the recipe's"),
    cli.argument("--gpu", default="h100-80", choices=GPUS, metavar="NAME", help=f"{', '.join(GPUS)}; default: h100-80"),
    cli.argument("--mfu", type=cli.positive, default=0.4, metavar="SHARE", help="of its bfloat16 FLOP/s; default: 0.4"),
    cli.JSON, overrides=True,
)  # fmt: skip
def plan(args: argparse.Namespace) -> None:
    if args.mfu > 1:
        raise RecipeError(f"--mfu is a share of what the GPU can do, at most 1; got {args.mfu:g}.")
    from lingen.recipe import load_curriculum

    stages = load_curriculum(args.recipe, args.overrides).chosen(args.stage)
    from lingen.launch.resources import resource_rows

    rows: list[dict[str, Any]] = []
    for number, stage in enumerate(stages, start=1):  # each takes up to minutes
        print(f"stage {number}/{len(stages)} {stage.stage}: a step without numbers", file=sys.stderr)
        rows += resource_rows([stage], args.gpus, args.gpu, args.mfu)
    found = {"recipe": stages[0].name, "gpu": args.gpu, "mfu": args.mfu, "stages": rows}
    on_cpu = all(stage.trainer.get("accelerator") == "cpu" for stage in stages)
    hours, small = sum(row["gpu_hours"] for row in rows), not on_cpu and any(row["small"] for row in rows)
    cost = f"{'> ' * small}{hours:,.3g} GPU hours on {args.gpu} at {args.mfu:.0%} of its FLOP/s"
    clock, disk = (sum(each) for each in zip(*((r["gpu_hours"] / r["ranks"], r["disk"]) for r in rows), strict=True))
    cost += "" if small else f", {clock:,.3g} hours on the clock"
    told = "no hours: the recipe trains on a CPU" if on_cpu else cost
    told += "; memory in GiB of a rank" + ("" if on_cpu else f", of which {rows[0]['room'] / 2**30:.1f} count")
    notes = ["> is a floor: steps of so few FLOP wait for launches and data, as graphs less (train.compile); fit tells"]
    advice = [f"stage {row['stage']} does not fit: {row['advice']}" for row in rows if not row["fits"]]
    table = [
        {
            **{name: str(row[name]) for name in ("stage", "ranks")},
            **{name: f"{row[name]:,}" for name in ("tokens", "parameters")},
            "FLOP": f"{row['flop']:.3g}",
            **({} if on_cpu else {"GPU hours": f"{'> ' * row['small']}{row['gpu_hours']:,.3g}"}),
            **{name: f"{size / 2**30:.1f}" for name, size in row["memory"].items()},
            "fits": "yes" if row["fits"] else "no",
            "disk": f"{row['disk'] / 2**30:.1f} GiB",
        }
        for row in rows
    ]
    told += f"; {disk / 2**30:,.1f} GiB of disk in all" if len(rows) > 1 else ""
    data = [
        {
            "stage": row["stage"],
            "samples shown": " + ".join(f"{count:,} ({kind})" for kind, count in row["samples"].items()),
            "MB of latents each": " + ".join(f"{size / 1e6:.3g}" for size in row["latents"].values()),
            "MB of text at most": f"{row['text'] / 1e6:.3g}",
        }
        for row in rows
    ]
    ranks, asked = rows[0]["ranks"], ranks_of(stages[0], 1)
    if args.gpus and ranks != asked and not any("accumulate" in word for word in args.overrides):
        keeps = f"; train.accumulate={asked * stages[0].train.accumulate // ranks} keeps them" * (asked % ranks == 0)
        differs = f"on {ranks} a step has {ranks / asked:.3g} times the samples, and the hours are of those"
        advice.append(f"note: the recipe asks for {asked} ranks; {differs}{keeps}")
    cli.tell(args, found, [table, data], told, *notes * small, *advice)


def _print_forecast(plans: list[tuple[Any, dict[str, int]]]) -> None:
    """On a terminal two tables; else comment lines, so that what is printed is a recipe."""
    parts = [{"part": name, "parameters": f"{count:,}"} for name, count in plans[0][0].parameters.items()]
    rows = [
        {
            "stage": one.stage,
            "tokens": " + ".join(f"{count:,} ({kind})" for kind, count in one.tokens.items()),
            "steps": " + ".join(f"{count:,} ({kind})" for kind, count in steps.items()),
            "parameters": f"{one.trained:,}",
            "forward TFLOP": " + ".join(f"{count / 1e12:.3g}" for count in one.flops.values()) or "unknown",
            "checkpoint (host memory)": f"{one.checkpoint / 2**30:.3g} GiB",
        }
        for one, steps in plans
    ]
    if sys.stdout.isatty():
        cli.print_table(rows)
        cli.print_table(parts)
        return
    for row in rows:
        print("# " + ", ".join(f"{name}: {value}" for name, value in row.items()))
    print("# " + ", ".join(f"{row['part']}: {row['parameters']}" for row in parts))
