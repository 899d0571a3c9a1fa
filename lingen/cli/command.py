"""How a subcommand of ``lingen`` is declared, parsed and shown."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any, NamedTuple, NoReturn

from lingen import __version__
from lingen.recipe.errors import RecipeError, did_you_mean, no_such
from lingen.recipe.registry import import_module
from lingen.recipe.sections import Recipe
from lingen.tables import as_table

DONE, FAILED, WRONG_USE = 0, 1, 2
"""Exit codes; beside them those of `lingen.ranks.signals`."""

CommandFunction = Callable[[argparse.Namespace], int | None]
"""Returns an exit code; None where all that it can be is done."""
Argument = tuple[tuple[str, ...], dict[str, Any]]


class Command(NamedTuple):
    """A subcommand: its function, and the arguments it takes."""

    run: CommandFunction
    help: str
    arguments: tuple[Argument, ...]
    takes_overrides: bool
    takes_command: bool
    """Whether another command may stand behind ``--``."""


COMMANDS: dict[str, Command] = {}
UNSAID = {"eval": "clips"}
"""First words of commands -> their second one, where another word or a flag stands there."""
GROUPS = {"data": "data sets", "prompts": "texts that say what to show", "bench": "measurements", "eval": "judgements"}
GROUPS["study"] = "what people prefer"
"""First words of two-word commands, and what they are about."""


def argument(*flags: str, **options: Any) -> Argument:
    """One argument, as argparse's `add_argument` takes it."""
    return flags, options


def natural(text: str, least: int = 1) -> int:
    """A whole number above 0, or from 0 on, as an argument's `type`."""
    if not (text.isdecimal() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number {'above 0' if least else 'from 0 on'}")
    return int(text)


uint = partial(natural, least=0)
"""A whole number from 0 on, as an argument's `type`."""


def positive(text: str) -> float:
    """A finite number above 0, as an argument's `type`."""
    with suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")


def size_of(text: str) -> tuple[int, int]:
    """HxW as an argument's `type`."""
    try:
        height, width = map(natural, text.lower().split("x"))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"'{text}' is no height x width in pixels, such as 256x256") from None
    return height, width


RECIPE = argument("--recipe", metavar="R", help="a YAML file, or the name of a recipe that comes with lingen")
NEEDED = argument("--recipe", required=True, **RECIPE[1])
STAGE = argument("--stage", metavar="S", help="one stage of the recipe")
JSON = argument("--json", action="store_true", help="for machines")
IMPORT = argument("--import", dest="imports", metavar="MODULE", action="append", default=[],
                  help="import a module that registers parts of yours; may be given again")  # fmt: skip
PART = argument("--part", metavar="I/N", help="only the I-th of N shares of the work, counted from 1, for a job array")
PROCESSES = argument("--processes", type=uint, metavar="N", help="default: one for each core")
STREAM_FLAGS = (
    argument("--stream", choices=["exact", "tiled", "whole"],
             help="by the autoencoder's own streams, the same in cross-faded tiles of a frame, or in one call; "
             "default: exact where it has streams, else whole"),
    argument("--tile", type=size_of, metavar="HxW",
             help="--stream tiled in tiles of this height and width; default: of the whole frame"),
)  # fmt: skip
SHARD_MB = argument("--shard-mb", type=natural, default=1000, metavar="N", help="size of a shard; default: 1000")


def ways_of_args(args: argparse.Namespace) -> tuple[str | None, tuple[int, int] | None]:
    """The way through the autoencoder that `STREAM_FLAGS` ask for (None: its own), and the tile; a tile means tiled.
    RecipeError for a tile with another way."""
    if args.tile is None or args.stream == "tiled":
        return args.stream, args.tile
    if args.stream is not None:
        raise RecipeError(f"--tile goes with --stream tiled, not with --stream {args.stream}.")
    return "tiled", args.tile


def command(
    help: str, *arguments: Argument, overrides: bool = False, behind: bool = False
) -> Callable[[CommandFunction], CommandFunction]:
    """Makes a function the command of its name, `data_fetch` that of ``lingen data fetch``. With `overrides`,
    ``key=value`` words arrive in ``args.overrides``, and so does --import: it adds to `imports` of the recipe. With
    `behind`, what stands behind ``--`` arrives in ``args.behind`` as it is."""
    arguments += (IMPORT,) if overrides else ()

    def add(run: CommandFunction) -> CommandFunction:
        COMMANDS[run.__name__.rstrip("_").replace("_", " ")] = Command(run, help, arguments, overrides, behind)
        return run

    return add


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command; what argparse leaves over are overrides, wherever they stand between the flags."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["help"], ["version"]):
        words = [*words[1:], f"--{words[0]}"]
    second = words[1] if len(words) > 1 and words[0] in UNSAID else "--help"
    if second not in ("-h", "--help") and f"{words[0]} {second}" not in COMMANDS:
        words.insert(1, UNSAID[words[0]])
    behind: list[str] = []
    if "--" in words and any(one.takes_command for name, one in COMMANDS.items() if name == words[0]):
        cut = words.index("--")
        words, behind = words[:cut], words[cut + 1 :]
    parser = _parser()
    args, rest = parser.parse_known_args(words)
    args.behind = behind
    flags = [word for word in rest if word.startswith("-")]
    if flags or (rest and not COMMANDS[args.command].takes_overrides):
        wrong = flags or rest
        told = f"unrecognized arguments: {' '.join(wrong)}.{_hint(wrong[0], rest, COMMANDS[args.command])}"
        raise RecipeError(f"lingen {args.command}: {told} `lingen {args.command} --help` lists what it takes.")
    args.overrides = [*(f"imports={json.dumps([name])}" for name in getattr(args, "imports", ())), *rest]
    if not COMMANDS[args.command].takes_overrides:
        for name in getattr(args, "imports", ()):
            try:
                import_module(name)
            except RecipeError as error:
                raise RecipeError(f"--import {name}: {error}") from error
    return args


def _hint(wrong: str, rest: list[str], one: Command) -> str:
    """What may be meant by a word that is too much: a prompt, or the nearest flag or setting of the recipe."""
    known = [flag for names, _ in one.arguments for flag in names]
    if "--prompt" in known and not wrong.startswith("-"):
        return f" Write --prompt {wrong!r}."
    flag, _, value = wrong.partition("=")
    if one.takes_overrides:
        value = value or " ".join(rest[rest.index(wrong) + 1 :][:1]) or "..."
        for name, part in vars(Recipe()).items():
            known += [f"{name}={value}", *(f"{name}.{key}={value}" for key in getattr(part, "__dict__", ()))]
    of_sbatch = f" If it is sbatch's, write --sbatch={flag}={value or 'VALUE'}." * ("--sbatch" in known)
    return did_you_mean(flag, known) or of_sbatch


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, with how the argument is written."""

    def error(self, message: str) -> NoReturn:
        flag = re.escape(message.removeprefix("argument ").partition(":")[0])
        form = re.search(rf"{flag} [^][]+", " ".join(self.format_usage().split()))
        told = f" Write {form[0].strip().replace(' ', '=', message.endswith('expected one argument'))}." if form else ""
        if wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            word, known = wrong[1], re.findall(r"[^', ]+", wrong[2])
            told = did_you_mean(word, known)
            if word == "bench":
                raise RecipeError("Run `pip install -e .`, then run this command from a checkout of lingen.")
            if self.get_default("command") is None:  # the word should have named one
                start = f"{self.prog} ".removeprefix("lingen ")
                raise RecipeError(no_such("command", start + word, [start + name for name in known]))
        raise RecipeError(f"{self.prog}: {message}.{told} `{self.prog} --help` lists what it takes.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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
            own = commands.add_parser(group, help=GROUPS[group], description=GROUPS[group])
            groups[group] = own.add_subparsers(required=True)
        usage = (" [key=value ...]" if one.takes_overrides else "") + (" [-- COMMAND ...]" if one.takes_command else "")
        sub = groups.get(group, commands).add_parser(word, help=one.help, description=one.help, allow_abbrev=False)
        sub.set_defaults(command=name)
        for flags, options in one.arguments:
            sub.add_argument(*flags, **options)
        if usage:
            sub.usage = sub.format_usage().removeprefix("usage: ").rstrip() + usage
    return parser


def console() -> Any:
    """Where progress goes: stderr, so that stdout holds results only."""
    from rich.console import Console

    return Console(stderr=True)


def count_bar(description: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """A bar on stderr, to be called with (done, total)."""
    from lingen.cli import progress

    return progress.count_progress(console(), description)


def print_table(rows: Sequence[dict[str, str]]) -> None:
    print(as_table(rows, terminal=sys.stdout.isatty()))


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def tell(args: argparse.Namespace, value: Any, tables: Iterable[Sequence[dict[str, str]]], *lines: object) -> None:
    """Prints what a command found: as JSON where --json asks for it, else as tables and lines for people."""
    if getattr(args, "json", False):
        print_json(value)
        return
    for rows in tables:
        print_table(rows)
    for line in lines:
        print(line)
