"""The folder of a run: recipe, checkpoints, weights, metrics, ledger and samples of every stage."""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lingen.files import write_text
from lingen.provenance import git_commit, versions
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import Recipe

IDENTITY_SECTIONS = ("model", "data", "text", "autoencoder", "seed")
"""Sections that identify a run; the others (steps, learning rate, devices, ...) may change while it continues."""

FREE_DATA = {"workers", "cache_mb", "max_dropped"}
"""Data settings that change nothing about what is learned."""


def run_fingerprint(stages: Sequence[Recipe]) -> str:
    """8 hex digits of the identity of all stages."""
    parts = [[stage.stage, _identity(stage)] for stage in stages]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _identity(stage: Recipe) -> dict[str, Any]:
    sections = {name: value for name, value in asdict(stage).items() if name in IDENTITY_SECTIONS}
    sections["data"] = {name: value for name, value in sections["data"].items() if name not in FREE_DATA}
    return sections | stage.subject.identity(stage)


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder. Files appear in one step, so that a kill leaves nothing half written."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def about(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.json"

    @property
    def score(self) -> Path:
        return self.path / "score.json"

    def samples(self, stage: str, step: int) -> Path:
        return self.path / "samples" / f"{stage}-{step:07d}"

    def weights(self, stage: str) -> Path:
        return self.path / "stages" / stage / "weights.safetensors"

    def checkpoints(self, stage: str) -> list[Path]:
        """Complete checkpoints for resuming, oldest first."""
        return sorted((self.path / "stages" / stage).glob("step-*.ckpt"))

    def checkpoint(self, stage: str, step: int) -> Path:
        return self.path / "stages" / stage / f"step-{step:08d}.ckpt"

    def finished_steps(self, stage: str) -> int:
        """Steps that the finished weights of a stage were trained for; 0: not finished."""
        from lingen.weights import read_metadata

        path = self.weights(stage)
        return int(read_metadata(path)["step"]) if path.is_file() else 0

    def open(self, stages: Sequence[Recipe], recipe_yaml: str) -> None:
        """Makes the folder, or checks that it belongs to this recipe.

        Raises:
            RecipeError: the folder holds another run, or something that is no run.
        """
        mark = run_fingerprint(stages)
        if self.about.is_file():
            from lingen.weights import read_run

            held = read_run(self.about)
            if held["fingerprint"] != mark:
                raise RecipeError(
                    f"{self.path} holds a run of another recipe ('{held['recipe']}', {held['fingerprint']}; this one "
                    f"is '{stages[0].name}', {mark}): {self._differences(stages)}. Name another folder with --run, or "
                    "none."
                )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RecipeError(f"{self.path} exists and is no run folder. Name a new or empty folder with --run.")
        for stage in stages:
            self.weights(stage.stage or "main").parent.mkdir(parents=True, exist_ok=True)
        write_text(self.recipe, recipe_yaml)
        about = {
            "recipe": stages[0].name,
            "fingerprint": mark,
            "stages": [stage.stage or "main" for stage in stages],
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "commit": git_commit(),
            "versions": versions(),
        }
        write_text(self.about, json.dumps(about, indent=2))

    def _differences(self, stages: Sequence[Recipe]) -> str:
        """How the run in this folder differs from the recipe, as half a sentence."""
        from lingen.recipe import load_stages

        try:
            held = {stage.stage: _identity(stage) for stage in load_stages(self.recipe)}
        except RecipeError:
            return "its recipe cannot be loaded any more"
        own = {stage.stage: _identity(stage) for stage in stages}
        if held.keys() != own.keys():
            return f"its stages are {', '.join(map(str, held))}"
        names = {
            name for stage in own for name in own[stage].keys() | held[stage].keys()
            if own[stage].get(name) != held[stage].get(name)
        }  # fmt: skip
        return f"another {', '.join(sorted(names))}"

    def finished(self, stages: Sequence[str]) -> list[str]:
        """The stages that have weights, in order."""
        return [stage for stage in stages if self.weights(stage).is_file()]


def default_path(stages: Sequence[Recipe]) -> Path:
    """``runs/<recipe>-<fingerprint>`` in the current folder."""
    return Path("runs") / f"{stages[0].name}-{run_fingerprint(stages)}"
