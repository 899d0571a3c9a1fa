"""What a job asks SLURM for, from lingen, from the user's own file and from the command line; and the script that it
runs, which starts the ranks, hands signals on, and puts the job into the queue again."""

import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated

from lingen.ranks.signals import REQUEUE
from lingen.recipe.bounds import AtLeast
from lingen.recipe.errors import RecipeError
from lingen.recipe.layers import read_yaml
from lingen.recipe.reading import raise_all, shipped_folder
from lingen.recipe.signature import check_settings, section
from lingen.recipe.text import decode_text

MAX_REQUEUES = 20
"""Times that a job is put into the queue again [ours]."""
OF_SUBMIT = {
    "nodes": "--nodes", "ntasks": "--nodes and --gpus-per-node", "ntasks-per-node": "--gpus-per-node",
    "array": "--array", "time": "--time", "signal": "--signal-seconds", "chdir": "the current folder",
    "open-mode": "nothing: the log goes on after a restart",
}  # fmt: skip
"""Options of sbatch that are decided otherwise, and by what."""

Options = dict[str, str | None]
"""Long name of an option of sbatch -> its value; None: it takes none."""


@section
class ClusterSettings:
    """What the user's own file says of his cluster; what the command line says stands in its place."""

    sbatch: Annotated[list[str], "options of sbatch, such as --partition=NAME"] = field(default_factory=list)
    srun: Annotated[list[str], "options of srun, such as those of a container"] = field(default_factory=list)
    setup: Annotated[list[str], "lines of shell before all else, such as module load ..."] = field(default_factory=list)
    gpus_per_node: Annotated[int | None, AtLeast(1), "where the command line does not say"] = None
    time: Annotated[str | None, "of a job, as sbatch takes it"] = None
    max_requeues: Annotated[int, AtLeast(0), "how often a job goes on by itself"] = MAX_REQUEUES
    signal_seconds: Annotated[int | None, AtLeast(1), "between the signal and the end of a job"] = None


def settings_file() -> Path:
    """``$XDG_CONFIG_HOME/lingen/slurm.yaml``, else ``~/.config/lingen/slurm.yaml``; it need not exist."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "lingen" / "slurm.yaml"


def read_settings(file: Path) -> ClusterSettings:
    """The user's file; the defaults where there is none. RecipeError with the line of each mistake."""
    if not file.is_file():
        return ClusterSettings()
    layered, problems = read_yaml(decode_text(file.read_bytes()), str(file))
    raise_all(problems)
    if isinstance(time := layered.tree.get("time"), int):
        raise_all([layered.problem(("time",), f"{time} is a number, as YAML reads a bare 24:00:00; put it in quotes.")])
    settings, found = check_settings(ClusterSettings, layered.tree)
    raise_all(layered.problem(one.path, one.text) for one in found)
    return ClusterSettings(**settings)


def read_options(words: Iterable[str], where: str) -> Options:
    """Options as they are written, each as ``--name=value`` or ``--name``.

    Args:
        where: what messages call the place."""
    found: Options = {}
    for word in (part for text in words for part in shlex.split(text)):
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"--[a-z][a-z-]+", name):
            raise RecipeError(
                f"{where}: '{word}' is no option of sbatch in its long form; write --name=value, such as "
                "--partition=NAME (several in one word: --sbatch='--partition=NAME --account=NAME')."
            )
        if instead := OF_SUBMIT.get(name[2:]):
            raise RecipeError(f"{where}: {name} is decided by {instead}; leave it out there.")
        found[name[2:]] = value if equals else None
    return found


def merged(own: Options, *others: Options) -> Options:
    """The options with those that others say in their place; GPUs that are asked for in another way stay out."""
    found = {**own}
    for other in others:
        if other.keys() & {"gres", "gpus", "gpus-per-task"}:
            found.pop("gpus-per-node", None)
        if "no-requeue" in other:
            found.pop("requeue", None)
        found |= other
    return found


def seconds_of(time: str) -> int:
    """A time as sbatch takes it (``90``, ``90:00``, ``1:30:00``, ``1-6``, ``1-6:30``, ``1-6:30:00``), in seconds.
    RecipeError for anything else."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if found is None or not any(int(part or 0) for part in found.groups()):
        raise RecipeError(f"--time: '{time}' is no time of SLURM; write minutes, HH:MM:SS or D-HH:MM:SS.")
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None or third is not None:
        return ((days or 0) * 24 + (first or 0)) * 3600 + (second or 0) * 60 + (third or 0)
    return (first or 0) * 60 + (second or 0)


def script_of(options: Options, command: Sequence[str], settings: ClusterSettings, judge: Sequence[str] = ()) -> str:
    """The whole script.

    Args:
        options: of sbatch, all of them.
        command: of each rank, behind `srun`; words that begin with $ are left to the shell.
        judge: a command that gets the code of ranks that were stopped, failed or were killed, and returns `REQUEUE`
            where they are worth another start, and prints the nodes to do without, if any; none: those that were killed
            are."""
    srun = ["srun", "--kill-on-bad-exit=1", *settings.srun]
    judged = f'unfit=$({_shell(judge)} "$code"); code=$?' if judge else f'[ "$code" -eq 1 ] || code={REQUEUE}'
    filled = {"command": _shell([*srun, *command]), "judged": judged, "late": REQUEUE, "most": settings.max_requeues}
    text = (shipped_folder("templates") / "submit.sh").read_text(encoding="utf-8")
    parts = [
        "#!/bin/bash",
        *(f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in options.items()),
        "",
        f"# Written by: {shlex.join(['lingen', *sys.argv[1:]])}",
        *settings.setup,
        re.sub(r"\{(command|judged|late|most)\}", lambda found: str(filled[found[1]]), text),
    ]
    return "\n".join(parts)


def _shell(words: Sequence[str]) -> str:
    return " ".join(f'"{word}"' if word.startswith("$") else shlex.quote(word) for word in words)
