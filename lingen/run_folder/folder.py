"""The folder of a run: recipe, checkpoints, weights, metrics, ledger and samples of every stage."""

import re
from collections.abc import Sequence
from pathlib import Path

from lingen.weights import OF_TRAINING, WeightsError, read_metadata

CHECKPOINT = re.compile(r"step-\d+(\.ckpt)?")


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(checkpoint.stem.removeprefix("step-"))


class RunFolder:
    """Paths inside a run folder. Files appear in one step, so that a kill leaves nothing half written."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe, self.readme, self.report = path / "recipe.yaml", path / "README.md", path / "report.html"
        self.about, self.ledger, self.score = path / "run.json", path / "ledger.json", path / "score.json"
        self.metrics = path / "metrics.csv"
        self.ranks = path / "ranks"
        """The signs of life of the ranks."""

    def samples(self, stage: str, step: int) -> Path:
        return self.path / "samples" / f"{stage}-{step:07d}"

    def last_step(self, stage: str) -> int:
        """Step of the newest checkpoint; 0: none."""
        return max((step_of(path) for path in self.checkpoints(stage)), default=0)

    def weights(self, stage: str) -> Path:
        return self.path / "stages" / stage / "weights.safetensors"

    def checkpoints(self, stage: str) -> list[Path]:
        """Checkpoints for resuming, oldest first, by their names: folders, and files of earlier versions."""
        found = (path for path in (self.path / "stages" / stage).glob("step-*") if CHECKPOINT.fullmatch(path.name))
        return sorted(found, key=step_of)

    def checkpoint(self, stage: str, step: int) -> Path:
        return self.path / "stages" / stage / f"step-{step:08d}"

    def finished_steps(self, stage: str) -> int:
        """Steps that the finished weights of a stage were trained for; 0: not finished."""
        path = self.weights(stage)
        try:
            return int(read_metadata(path, OF_TRAINING)["step"]) if path.is_file() else 0
        except WeightsError as error:
            cure = f"Delete it, and `lingen fit` ends stage '{stage}' anew from its last checkpoint."
            raise WeightsError(path, f"{error.what} {cure}") from error

    def finished(self, stages: Sequence[str]) -> list[str]:
        """The stages that have weights, in order."""
        return [stage for stage in stages if self.weights(stage).is_file()]
