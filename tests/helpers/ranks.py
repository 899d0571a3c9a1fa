"""Several ranks of a program on this machine, told who they are as torchrun does; and what their training steps did."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.helpers.commands import ROOT

SECONDS = 400
"""After which ranks are killed."""


@dataclass
class Steps:
    """What the first and the last step of a stage did, whole."""

    velocity: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """(step, slot) -> what the model gave."""
    gradients: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Step -> name -> gradient of all ranks, before it is clipped."""


def free_port() -> str:
    """Where ranks meet: the test's own, or a free one."""
    if "MASTER_PORT" in os.environ:
        return os.environ["MASTER_PORT"]
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def run_ranks(words: Sequence[str], ranks: int, nodes: int = 1) -> list[str]:
    """What each rank of ``python WORDS`` prints; all must end well.

    Args:
        nodes: the ranks are told that they share so many machines.
    """
    each = ranks // nodes
    shared = os.environ | {
        "PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(each),
    }  # fmt: skip
    own = [{"RANK": str(n), "LOCAL_RANK": str(n % each), "GROUP_RANK": str(n // each)} for n in range(ranks)]
    started = [
        subprocess.Popen(
            [sys.executable, *words], env=shared | one, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for one in own
    ]
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text
    return said


def steps_of(recipe: str | Path, overrides: Sequence[str], run: Path, stage: str) -> Steps:
    """Trains one stage as this process's rank, and notes what its first and its last step did."""
    from lingen.run import fit
    from lingen.training.denoiser import LinGenModule
    from lingen.training.state import whole_of

    held = Steps()
    step, edge = LinGenModule.training_step, LinGenModule.on_before_optimizer_step

    def is_noted(module: LinGenModule) -> bool:
        return module.global_step in (0, module.recipe.train.steps - 1)

    def training_step(self: LinGenModule, batch: Any, batch_idx: int) -> Tensor:
        def note(model: Any, inputs: Any, output: Tensor) -> None:
            if is_noted(self):
                slots = [(batch.step, slot) for slot in batch.slots.tolist()]
                held.velocity.update(zip(slots, output.detach().double().clone(), strict=True))

        hook = self.model.register_forward_hook(note)
        try:
            return step(self, batch, batch_idx)
        finally:
            hook.remove()

    def on_before_optimizer_step(self: LinGenModule, optimizer: Any) -> None:
        if is_noted(self):
            named = self.trained_parameters().items()
            held.gradients[self.global_step] = {name: whole_of(p.grad).double().clone() for name, p in named}
        edge(self, optimizer)

    noted = {"training_step": training_step, "on_before_optimizer_step": on_before_optimizer_step}
    with mock.patch.multiple(LinGenModule, **noted):
        fit(recipe, overrides, run=run, stage=stage)
    return held


def main(plan: str) -> None:
    """As one of the ranks: trains all that a JSON file lists, and leaves ``RUN-RANK.pt`` of each."""
    torch.set_num_threads(1)
    for trial in json.loads(Path(plan).read_text()):
        steps = steps_of(trial["recipe"], trial["overrides"], Path(trial["run"]), trial["stage"])
        if os.environ["RANK"] != "0":
            steps.gradients = {}
        torch.save([steps.velocity, steps.gradients], f"{trial['run']}-{os.environ['RANK']}.pt")


def steps_of_ranks(trials: Sequence[dict[str, Any]], ranks: int, nodes: int = 1) -> list[Steps]:
    """`steps_of` each trial (its arguments by name) on so many ranks, one after the other in the same processes."""
    folder = Path(trials[0]["run"]).parent
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    where = [f"trainer.num_nodes={nodes}", f"trainer.devices={ranks // nodes}"]
    plan.write_text(
        json.dumps([one | {"run": str(one["run"]), "overrides": [*one["overrides"], *where]} for one in trials])
    )
    run_ranks(["-m", "tests.helpers.ranks", str(plan)], ranks, nodes)
    found = []
    for trial in trials:
        steps = Steps()
        for rank in range(ranks):
            velocity, gradients = torch.load(f"{trial['run']}-{rank}.pt")
            steps.velocity |= velocity
            steps.gradients |= gradients
        found.append(steps)
    return found


if __name__ == "__main__":
    main(sys.argv[1])
