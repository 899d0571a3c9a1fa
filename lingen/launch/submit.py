"""``lingen submit``: everything that a job needs is checked and written down, then SLURM gets the script."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lingen.files import write_json, write_text
from lingen.launch.options import ClusterSettings, Options, merged, script_of, seconds_of
from lingen.plan.loading import load_for_training, to_yaml
from lingen.provenance import git_commit, versions
from lingen.recipe.errors import RecipeError
from lingen.run_folder import lock
from lingen.run_folder.folder import RunFolder

KEPT_VARIABLES = (
    "CUDA", "NCCL", "GLOO", "TORCH", "PYTORCH", "TRITON", "OMP", "MKL", "LINGEN", "UCX", "FI_", "PYTHONPATH", "PATH",
    "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "XDG_CACHE_HOME", "MASTER_",
)  # fmt: skip
"""Starts of the names of variables that are noted: what numbers and speed may depend on, and nothing that is secret."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job that is ready to be submitted."""

    folder: Path
    """Of this submission; it is made when it is submitted."""
    script: str
    recipe: str | None = None
    """The filled recipe, which the job trains whatever happens to the file meanwhile."""
    lines: list[str] = field(default_factory=list)
    """What is to be said of it."""
    problems: Sequence[str] = ()
    """Why it would fail as soon as it starts."""


def prepare_training(
    recipe: str, overrides: Sequence[str], settings: ClusterSettings, options: Options,
    *, nodes: int, gpus: int | None, preflight: bool, run: str | None, stage: str | None,
) -> Submission:  # fmt: skip
    """The job that trains a recipe. Nothing is written. RecipeError for mistakes in the recipe or in what is wished.

    Args:
        options: of sbatch, which go before ours.
        gpus: of a node, where the command line says it."""
    per_node = _per_node(recipe, overrides, gpus, settings, stage)  # tells mistakes in words before torch is imported
    from lingen.plan.forecast import plan, signal_seconds
    from lingen.run_folder import identity, record
    from lingen.training.inputs import check_inputs

    ranks = [f"trainer.num_nodes={nodes}", f"trainer.devices={per_node}"]
    curriculum = load_for_training(recipe, [*overrides, *ranks], stage)
    told, chosen, lines = identity.described(curriculum.stages), curriculum.chosen(stage), list[str]()
    path = Path(run) if run else record.default_path(curriculum.stages[0].name, told, lines.append)
    folder = RunFolder(path.absolute())
    place = _next_place(folder.path / "submit")
    seconds = settings.signal_seconds or signal_seconds(chosen, [plan(one) for one in chosen])
    if settings.time is not None and seconds_of(settings.time) <= 2 * seconds:
        raise RecipeError(
            f"--time {settings.time}: the signal to stop comes {seconds} s before the end, as the longest step and a "
            "checkpoint need, so that most of the job would be lost. Ask for more time, or for less with "
            "--signal-seconds."
        )
    on_gpus = curriculum.base.trainer.get("accelerator") != "cpu"
    own = _usual(folder.path.name, place, settings) | {
        "nodes": str(nodes), "ntasks-per-node": str(per_node),
        **({"gpus-per-node": str(per_node)} if on_gpus else {}),
        "cpus-per-task": str(1 + max(one.data.workers for one in chosen)), "signal": f"USR1@{seconds}",
    }  # fmt: skip
    lingen = [sys.executable, "-m", "lingen"]
    command = [*lingen, "fit", "--recipe", str(place / "recipe.yaml"), "--run", str(folder.path)]
    judge = [*lingen, "status", str(folder.path), "--ended"]
    command += [*(["--stage", stage] if stage else []), *(["--preflight"] if preflight else [])]
    script = script_of(merged(own, options), command, settings, judge)
    problems: Sequence[str] = ()
    try:  # whatever would stop `lingen fit`, as far as it shows on this machine
        check_inputs(chosen, folder)
        lock.check_unlocked(folder.path)
        record.start(folder, curriculum, told, str(chosen[0].stage))
    except RecipeError as error:
        problems = error.problems
    return Submission(folder=place, script=script, recipe=to_yaml(curriculum.base), lines=lines, problems=problems)


def prepare_array(
    words: Sequence[str], shares: int, out: Path, settings: ClusterSettings, options: Options, gpus: int | None
) -> Submission:  # fmt: skip
    """The job array that does `shares` shares of a command which takes --part.

    Args:
        words: of the command, behind `lingen`.
        out: the folder that the command writes; beside it the script and the logs lie.
        options, gpus: as of `prepare_training`."""
    place = _next_place(out.absolute().with_name(f"{out.absolute().name}-submit"))
    own = _usual(out.name, place, settings, task="-%a") | {
        "array": f"1-{shares}",
        "ntasks": "1",
        **({"gpus-per-node": str(gpus)} if gpus else {}),
        "signal": f"TERM@{settings.signal_seconds or 60}",
    }
    command = [sys.executable, "-m", "lingen", *words, "--part", f"$SLURM_ARRAY_TASK_ID/{shares}"]
    return Submission(folder=place, script=script_of(merged(own, options), command, settings))


def _per_node(
    recipe: str, overrides: Sequence[str], gpus: int | None, settings: ClusterSettings, stage: str | None
) -> int:
    """Ranks of a node: --gpus-per-node, else what the recipe says, else the user's file."""
    said = [one for one in overrides if one.partition("=")[0].endswith(("trainer.num_nodes", "trainer.devices"))]
    curriculum = load_for_training(recipe, overrides, stage)
    trainer = curriculum.base.trainer
    on_cpu, devices = trainer.get("accelerator") == "cpu", trainer.get("devices")
    if any("num_nodes" in one for one in said):
        raise RecipeError("trainer.num_nodes is what --nodes says; leave it out.")
    if on_cpu and gpus:
        raise RecipeError("--gpus-per-node: the recipe trains on the CPU; trainer.devices=N makes N ranks a node.")
    if gpus and said:
        raise RecipeError("trainer.devices is what --gpus-per-node says; leave one of them out.")
    for count in (gpus, devices, None if on_cpu else settings.gpus_per_node, 1 if on_cpu else None):
        if isinstance(count, int) and count > 0:
            return count
    raise RecipeError("Say how many GPUs a node has: --gpus-per-node G, or gpus_per_node in your slurm.yaml.")


def _next_place(folder: Path) -> Path:
    """A numbered folder: an earlier job, which may still wait or run, keeps its recipe."""
    numbers = [int(one.name) for one in folder.glob("[0-9]*") if one.name.isdecimal()]
    return folder / f"{max(numbers, default=0) + 1:04d}"


def _usual(name: str, place: Path, settings: ClusterSettings, task: str = "") -> Options:
    """Options of every job."""
    return {
        "job-name": f"lingen-{name}",
        "chdir": str(Path.cwd()),
        "output": str(place / f"%{'A' if task else 'j'}{task}.log"),
        "open-mode": "append",
        "requeue": None,
        **({"time": settings.time} if settings.time is not None else {}),
    }


def submit(submission: Submission) -> str:
    """Writes a job down and hands it to SLURM. Returns its number.

    Raises:
        RecipeError: it would fail at once, there is no sbatch here, or it refuses the job; nothing is left of it."""
    if submission.problems:
        raise RecipeError(*submission.problems)
    if shutil.which("sbatch") is None:
        raise RecipeError("There is no sbatch on this machine, so nothing was submitted; --dry-run prints the script.")
    place = submission.folder
    place.mkdir(parents=True)
    script = place / "job.sbatch"
    write_text(script, submission.script)
    if submission.recipe is not None:
        write_text(place / "recipe.yaml", submission.recipe)
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(place)
        raise RecipeError(f"sbatch refuses the job: {' '.join(done.stderr.split())}")
    job = done.stdout.strip().partition(";")[0]
    kept = {name: value for name, value in sorted(os.environ.items()) if name.startswith(KEPT_VARIABLES)}
    about = {"command": sys.argv, "commit": git_commit(), "versions": versions(), "environment": kept}
    write_json(place / "submitted.json", {"job": job, **about})
    return job
