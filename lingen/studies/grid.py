"""A grid of runs, all checked before the first starts, trained one after another in usual run folders."""

import hashlib
import itertools
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from lingen.files import write_text
from lingen.plan.loading import Curriculum, load_for_training, to_yaml
from lingen.ranks import signals
from lingen.recipe.errors import RecipeError
from lingen.run_folder.folder import RunFolder


class GridRun(NamedTuple):
    """One run of a grid, and the folder of its name."""

    folder: RunFolder
    curriculum: Curriculum


def values_of(text: str) -> list[str]:
    """``1e-4,[8, 4],{a: 1, b: 2}`` -> its three values: commas inside of brackets separate none."""
    cuts, depth = [-1], 0
    for place, letter in enumerate(text):
        depth += (letter in "[{(") - (letter in "]})")
        cuts += [place] if letter == "," and depth == 0 else []
    return [text[start + 1 : end].strip() for start, end in itertools.pairwise([*cuts, len(text)])]


def combinations_of(words: Sequence[str]) -> dict[str, list[str]]:
    """Name -> overrides of each run that ``key=value,value`` words ask for. RecipeError where no setting has several
    values, or one is named twice or lacks a value."""
    split = [(word.partition("=")[0], values_of(word.partition("=")[2])) for word in words]
    axes = [[f"{key}={value}" for value in values] for key, values in split]
    for key, values in (one for one in split if len(one[1]) > 1):
        if "" in values or len({*values}) < len(values) or sum(key == other for other, _ in split) > 1:
            raise RecipeError(f"{key}: a setting of a grid is named once, and so is each value between its commas.")
    if all(len(one) == 1 for one in axes):
        raise RecipeError("Name at least one setting with several values, such as train.lr=1e-4,3e-4 or seed=0,1,2.")
    many = [number for number, one in enumerate(axes) if len(one) > 1]
    return {name_of(",".join(run[number] for number in many)): [*run] for run in itertools.product(*axes)}


def name_of(settings: str) -> str:
    """Of a run's folder. Settings that make no name as they are get a hash, so that no two runs share one."""
    plain = re.sub(r"[^\w.,+=-]", "_", settings)[:80]
    return plain if plain == settings else f"{plain}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def load_grid(recipe: str, named: dict[str, list[str]], out: Path) -> list[GridRun]:
    """The runs of these names and overrides. Nothing is written; RecipeError with whatever would stop `fit` of any, by
    its recipe, by what lies there, or by what it needs."""
    runs, problems = list[GridRun](), list[str]()
    for name, overrides in named.items():
        try:
            run = GridRun(RunFolder(out / name), load_for_training(recipe, overrides))
            from lingen.run_folder import identity, record  # a mistake in words is told before torch is imported
            from lingen.training.inputs import check_inputs

            check_inputs(run.curriculum.stages, run.folder)
            record.start(run.folder, run.curriculum, identity.described(run.curriculum.stages), run.curriculum.names[0])
            runs.append(run)
        except RecipeError as error:
            problems += [f"{name}: {text.replace('--run', '--out')}" for text in error.problems]
    if problems:
        raise RecipeError(*problems)
    return runs


def train_grid(runs: Sequence[GridRun], say: Callable[[str], None]) -> bool:
    """Trains what is missing, each run in a process of its own, so that one that fails takes no other with it; one that
    another process trains is left to it. Returns whether all are done. `signals.Stopped` where a signal came."""
    from lingen.run import is_complete

    for number, run in ((n, one) for n, one in enumerate(runs, start=1) if not is_complete(*one)):
        say(f"trains {run.folder.path} ({number} of {len(runs)})")
        if code := _train(run):
            say(f"{run.folder.path} ended with code {code}; the others go on.")
    missing = [run.folder.path.name for run in runs if not is_complete(*run)]
    if missing:
        say(f"{len(missing)} of {len(runs)} runs are not done: {'; '.join(missing)}. The same command goes on.")
    return not missing


def _train(run: GridRun) -> int:
    """``lingen fit`` of the recipe as it was checked, whatever happens to its file meanwhile; returns the exit code."""
    recipe = run.folder.path.with_name(f"{run.folder.path.name}.yaml")
    write_text(recipe, to_yaml(run.curriculum.base))
    command = [sys.executable, "-m", "lingen", "fit", "--recipe", str(recipe), "--run", str(run.folder.path)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2) as process:
        while process.poll() is None and signals.noted() is None:
            time.sleep(0.1)
        if (number := signals.noted()) is not None:
            process.send_signal(number)  # a terminal has sent it as well; so soon after, the two count as one
            process.wait()
            raise signals.Stopped(number)
    return process.returncode
