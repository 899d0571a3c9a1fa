"""The ``lingen`` command: argparse in, rich out. The only file that prints; each command calls one function.

Heavy imports are made inside the commands, so that ``lingen --help`` is instant.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lingen import __version__
from lingen.registry import RecipeError

DONE, FAILED, WRONG_USE, INTERRUPTED, REQUEUE = 0, 1, 2, 130, 75


Run = Callable[[argparse.Namespace], int]
Argument = tuple[tuple[str, ...], dict[str, Any]]


class Command(NamedTuple):
    """A subcommand: its function, and the arguments it takes."""

    run: Run
    help: str
    arguments: tuple[Argument, ...]
    takes_overrides: bool


COMMANDS: dict[str, Command] = {}
GROUPS = {"data": "data sets", "bench": "measurements"}
"""Words that stand before the name of a command, and what they are about."""


def argument(*flags: str, **options: Any) -> Argument:
    """One argument, as argparse's `add_argument` takes it."""
    return flags, options


RECIPE = argument("--recipe", metavar="R", help="a YAML file, or the name of a recipe that comes with lingen")
STAGE = argument("--stage", metavar="S", help="one stage of the recipe")
JSON = argument("--json", action="store_true", help="for machines")


def command(help: str, *arguments: Argument, overrides: bool = False) -> Callable[[Run], Run]:
    """Makes a function the command of its name, `data_fetch` that of ``lingen data fetch``.

    With `overrides`, ``key=value`` words arrive in ``args.overrides``.
    """

    def add(run: Run) -> Run:
        COMMANDS[run.__name__.rstrip("_").replace("_", " ")] = Command(run, help, arguments, overrides)
        return run

    return add


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0 done, 1 failed, 2 wrong use, 75 asked to be requeued, 130 interrupted."""
    # Before torch is imported: OpenMP threads that spin while they wait bring a busy laptop to a standstill.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        args = _parse(argv)
        return COMMANDS[args.command].run(args)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or DONE)
    except RecipeError as error:
        for problem in error.problems:
            print(" ".join(problem.split("\n")), file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `lingen list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


@command(
    "what a recipe can name: mixers, scan orders, autoencoders, text encoders; and the recipes that come with lingen",
    argument("what", choices=["mixers", "scans", "autoencoders", "text", "recipes"]),
    JSON,
)
def list_(args: argparse.Namespace) -> int:
    from lingen.catalogue import parts, recipes

    rows = recipes() if args.what == "recipes" else parts(args.what)
    if args.json:
        _print_json(rows)
    else:
        from lingen.tables import as_cell

        _print_table([{key: as_cell(value) for key, value in row.items()} for row in rows])
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
        from lingen.json_schema import json_schema

        _print_json(json_schema())
        return DONE
    if args.recipe is None:
        raise RecipeError("Say which recipe: --recipe R, or --schema.")
    from lingen.plan import plan
    from lingen.recipe import load_recipe, load_stages, to_yaml
    from lingen.schema import as_plain

    recipe = load_recipe(args.recipe, args.overrides, stage=args.stage)
    stages = [recipe] if args.stage else load_stages(args.recipe, args.overrides)
    plans = [plan(stage) for stage in stages]
    if args.json:
        _print_json({"recipe": as_plain(recipe), "stages": [one.as_dict() for one in plans]})
        return DONE
    _print_forecast([_forecast_row(one) for one in plans], plans[0].parameters)
    print(to_yaml(recipe), end="")
    return DONE


@command(
    "train every stage of a recipe; the same command again goes on where it was stopped",
    RECIPE,
    argument("--stage", metavar="S", help="train only this stage"),
    argument("--run", metavar="DIR", help="run folder; default: runs/RECIPE-FINGERPRINT"),
    overrides=True,
)
def fit(args: argparse.Namespace) -> int:
    from lingen.recipe import load_stages

    if args.recipe is None:
        raise RecipeError("Say which recipe: --recipe R. `lingen list recipes` shows those that come with lingen.")
    load_stages(args.recipe, args.overrides)  # says what is wrong before lightning and the data room are imported
    import signal

    from lingen import run
    from lingen.data.ledger import DataError
    from lingen.progress import ConsoleReporter

    with ConsoleReporter(_console()) as reporter:
        try:
            outcome = run.fit(args.recipe, args.overrides, run=args.run, stage=args.stage, reporter=reporter)
        except (DataError, run.NonFiniteError) as error:
            reporter.say(str(error))
            return FAILED
    if outcome.signal is not None:
        print(f"Stopped by {signal.Signals(outcome.signal).name}; the same command goes on from here.", file=sys.stderr)
        return INTERRUPTED if outcome.signal == signal.SIGINT else REQUEUE
    if outcome.is_first_rank:
        _print_outcome(outcome)
    return DONE


def _print_outcome(outcome: Any) -> None:
    folder = outcome.folder
    if folder.score.is_file():
        score = json.loads(folder.score.read_text())
        _print_table([_score_row(what, rate) for what in ("sampled", "real") for rate in _rates(score[what], what)])
        print(
            f"\n{score['sampled']['clips']} clips of held-out captions, {score['sampled']['empty']} of them empty; "
            "95% intervals."
        )
    for sheet in sorted(folder.path.glob("samples/*/sheet.png")):
        print(sheet)
    print(f"lingen sample --run {folder.path} --prompt '...' --out clip.mp4")


def _rates(score: dict[str, Any], what: str) -> list[dict[str, Any]]:
    return [{"attribute": name, **score[name]} for name in ("colour", "shape", "motion")]


def _score_row(what: str, rate: dict[str, Any]) -> dict[str, str]:
    share = f"{rate['share']:.0%} ({rate['low']:.0%} to {rate['high']:.0%})"
    return {"clips": what, "attribute": rate["attribute"], "right": share, "by chance": f"{rate['chance']:.0%}"}


SAMPLING = (
    argument("--seed", type=int, help="another seed gives another clip"),
    argument("--steps", type=int, help="solver steps"),
    argument("--guidance", type=float, help="weight of the prompt; 1: none"),
    argument("--seconds", type=float, help="length of the clip"),
    argument("--size", metavar="HxW", help="height x width in pixels, e.g. 384x704"),
)


@command(
    "make the clip of a prompt: an H.264 MP4, a contact sheet and the latents beside it",
    argument("--run", metavar="DIR", help="a run folder: its last finished stage"),
    argument("--checkpoint", metavar="F", help="a weights file (.safetensors)"),
    argument("--prompt", action="append", default=[], help="what to show; may be given several times"),
    argument("--prompts", metavar="FILE", help="a file with a prompt on each line"),
    argument("--out", default="clip.mp4", metavar="x.mp4", help="several prompts give x-00.mp4, x-01.mp4, ..."),
    *SAMPLING,
)
def sample(args: argparse.Namespace) -> int:
    prompts = args.prompt + (_lines(args.prompts) if args.prompts else [])
    if (args.run is None) == (args.checkpoint is None):
        raise RecipeError("Say where the weights are: either --run DIR or --checkpoint F.")
    if not prompts:
        raise RecipeError("There is no prompt. Give --prompt TEXT, or --prompts FILE with one on each line.")
    size = _size(args.size)
    from lingen.output import sample_to_files
    from lingen.progress import step_bar

    with step_bar(_console()) as progress:
        files = sample_to_files(
            args.run or args.checkpoint, prompts, args.out, seed=args.seed, steps=args.steps,
            guidance=args.guidance, seconds=args.seconds, size=size, progress=progress,
        )  # fmt: skip
        try:
            for file in files:
                print(file)
        except ValueError as error:
            raise error if isinstance(error, RecipeError) else RecipeError(str(error)) from error
    return DONE


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The prompts in {path} cannot be read: {error}") from error


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise RecipeError(f"--size is height x width in pixels, such as 384x704; got '{text}'.")
    return int(height), int(width)


@command(
    "latents that `lingen sample` saved -> MP4 and contact sheet",
    argument("latents", metavar="LATENTS", help="a .latents.safetensors file"),
    argument("--out", default="clip.mp4", metavar="x.mp4"),
)
def decode(args: argparse.Namespace) -> int:
    from lingen.output import decode_file

    print(decode_file(args.latents, args.out))
    return DONE


@command(
    "real clips with captions, as shards",
    argument(
        "set",
        choices=["emoji", "footage"],
        help="emoji: animated 3-D emoji and their names; footage: a few filmed clips",
    ),
    argument("--out", metavar="DIR", help="default: data/SET"),
    argument(
        "--parts",
        type=int,
        default=1,
        choices=[1, 2, 3, 4],
        help="emoji: how many of the four packages of animations (170 MB each)",
    ),
    argument("--limit", type=int, help="only so many clips and images"),
)
def data_fetch(args: argparse.Namespace) -> int:
    from lingen.data.fetch import fetch
    from lingen.data.packages import FetchError
    from lingen.progress import count_bar

    with count_bar(_console(), f"fetching {args.set}") as progress:
        try:
            fetched = fetch(
                args.set, args.out or f"data/{args.set}", parts=args.parts, limit=args.limit, progress=progress
            )
        except FetchError as error:
            print(error, file=sys.stderr)
            return FAILED
    for line in fetched.licences:
        print(line)
    print(f"{fetched.folder}: " + ", ".join(f"{count} {kind}" for kind, count in fetched.counts.items()))
    return DONE


@command(
    "how FLOPs, time and activation memory of mixers grow with the tokens (CPU)",
    argument("--mixers", nargs="+", default=["attention", "temporal_swin", "mamba2", "mate"], metavar="M"),
    argument("--dim", type=int, default=64, help="width of a token"),
    argument("--out", default="bench", metavar="DIR", help="scaling.json, .csv and .md go there"),
)
def bench_scaling(args: argparse.Namespace) -> int:
    from pathlib import Path

    from lingen.bench.scaling import scaling, write
    from lingen.progress import count_bar

    with count_bar(_console(), "measuring") as progress:
        files = write(scaling(args.mixers, args.dim, progress=progress), Path(args.out))
    print(files[-1].read_text(), end="")
    print(*files, sep="\n")
    return DONE


def _console() -> Any:
    """Where progress goes: stderr, so that stdout holds results only."""
    from rich.console import Console

    return Console(stderr=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command; what argparse leaves over are overrides, wherever they stand between the flags."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    flags = [word for word in rest if word.startswith("-")]
    if flags or (rest and not COMMANDS[args.command].takes_overrides):
        parser.error(f"unrecognized arguments: {' '.join(flags or rest)}")
    args.overrides = rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lingen",
        description="Text-to-video diffusion whose cost grows linearly with pixels: an open framework for LinGen.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lingen {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    groups: dict[str, Any] = {}
    for name, one in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group and group not in groups:
            about = GROUPS[group]
            groups[group] = commands.add_parser(group, help=about, description=about).add_subparsers(
                metavar="WHAT", required=True
            )
        usage = " [key=value ...]" if one.takes_overrides else ""
        sub = groups.get(group, commands).add_parser(word, help=one.help, description=one.help, allow_abbrev=False)
        sub.set_defaults(command=name)
        for flags, options in one.arguments:
            sub.add_argument(*flags, **options)
        if usage:
            sub.usage = sub.format_usage().removeprefix("usage: ").rstrip() + usage
    return parser


def _forecast_row(one: Any) -> dict[str, str]:
    gib = {name: f"{size / 2**30:.3g} GiB" for name, size in one.memory.items()}
    tokens = " + ".join(f"{count:,} ({kind})" for kind, count in one.tokens.items())
    flops = " + ".join(f"{count / 1e12:.3g}" for count in one.flops.values())
    return {"stage": one.stage, "tokens": tokens, "parameters": f"{one.trained:,}", "forward TFLOP": flops, **gib}


def _print_forecast(rows: list[dict[str, str]], parameters: dict[str, int]) -> None:
    """On a terminal two tables; else comment lines, so that what is printed is a recipe."""
    parts = [{"part": name, "parameters": f"{count:,}"} for name, count in parameters.items()]
    if sys.stdout.isatty():
        _print_table(rows)
        _print_table(parts)
        return
    for row in rows:
        print("# " + ", ".join(f"{name}: {value}" for name, value in row.items()))
    print("# " + ", ".join(f"{row['part']}: {row['parameters']}" for row in parts))


def _print_table(rows: Sequence[dict[str, str]]) -> None:
    from lingen.tables import as_table

    print(as_table(rows, terminal=sys.stdout.isatty()))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
