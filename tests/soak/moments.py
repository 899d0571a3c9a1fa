"""The main recipe as it is shipped, small, on two nodes of real SLURM: the job of docs/cluster.md is signalled at one
moment after another and requeued each time. Weights and used samples have to be those of a job that nobody disturbed,
bit for bit."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lingen.run_folder.folder import RunFolder
from lingen.weights import hash_tensors, read_weights
from tests.helpers.commands import ROOT
from tests.helpers.slurm import Cluster, script_of_docs, slurm
from tests.helpers.small_t2v import STEPS, write_small_t2v

SECONDS = 1500
"""For a job with all of its lives."""
STAGES = ("t2i_256", "t2v_256_17s", "t2v_512_17s", "t2v_512_34s", "t2v_512_68s", "quality")
MOMENTS = ("import", "set-up", "a step", "a step of all", "the last step", "sampling", "the hand-over", "the last clip")
"""One for each life of the job."""
TASK = '''
"""A task of `lingen fit` that notes its samples and, where it is told to, gets a signal at the moment of this life."""
import json, os, signal, subprocess, sys, time

disturbed = sys.argv.pop(1) == "disturbed"
life, rank = int(os.environ.get("SLURM_RESTART_COUNT", "0")), int(os.environ["SLURM_PROCID"])
from lingen.ranks import signals

signals.listen()
if disturbed and life == 0 and rank == 1:
    os.kill(os.getpid(), signal.SIGTERM)

from lingen.sampling import clips
from lingen.training import begin
from lingen.training.denoiser import LinGenModule

SENT = []

def to_one(number):
    SENT.append(number)
    os.kill(os.getpid(), number)

def to_all():
    SENT.append(signal.SIGUSR1)
    subprocess.run(["scancel", "--signal=USR1", os.environ["SLURM_JOB_ID"]], check=True)
    while signals.noted() is None:
        time.sleep(0.01)

def at(owner, name, of_life, of_rank, is_then, send):
    whole = getattr(owner, name)

    def call(*args, **settings):
        if disturbed and (life, rank) == (of_life, of_rank) and not SENT and is_then(*args):
            send()
        return whole(*args, **settings)

    setattr(owner, name, call)

def step(stage, number):
    return lambda module, *_: module.recipe.stage == stage and module.global_step == number

def of(stage):
    return lambda module, *_: module.recipe.stage == stage

at(LinGenModule, "configure_optimizers", 1, 0, lambda module: True, to_all)
at(LinGenModule, "training_step", 2, 1, step("t2i_256", 1), lambda: to_one(signal.SIGTERM))
at(LinGenModule, "training_step", 3, 1, step("t2v_256_17s", 0), to_all)
at(LinGenModule, "training_step", 4, 0, step("t2v_512_17s", LAST), lambda: to_one(signal.SIGUSR1))
at(clips, "sample_latents", 5, 1, of("t2v_512_34s"), lambda: to_one(signal.SIGTERM))
at(begin, "load_into", 6, 0, of("t2v_512_68s"), lambda: to_one(signal.SIGUSR1))
at(clips, "sample_latents", 7, 0, of("quality"), lambda: to_one(signal.SIGTERM))
train = LinGenModule.training_step

def note(self, batch, batch_idx):
    line = [self.recipe.stage, batch.step, rank, batch.kind, batch.slots.tolist(), list(batch.keys)]
    with open(f"notes-{rank}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\\n")
    return train(self, batch, batch_idx)

LinGenModule.training_step = note
from lingen.__main__ import enter
sys.exit(enter())
'''.replace("LAST", str(STEPS - 1))


def moments(folder: Path) -> Iterator[str]:
    """A sentence for each thing that is wrong."""
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        write_small_t2v(folder)
    (folder / "task.py").write_text(TASK)
    with slurm(nodes=2) as running:
        running.env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        said = {name: _job(running, folder, name) for name in ("straight", "disturbed")}
    for name, text in said.items():
        if "Traceback" in text or not text.endswith("COMPLETED"):
            yield f"{name}: {text}"
    stops = said["disturbed"].count("; the same command goes on from here.")
    if stops != len(MOMENTS):
        yield f"the job was stopped {stops} times in place of {len(MOMENTS)}"
    straight, disturbed = (_notes(folder / name) for name in said)
    yield from (f"trained {count} times: {line}" for line, count in disturbed.items() if count > 1)
    if straight.keys() != disturbed.keys():
        yield f"other samples were used: {sorted(straight.keys() ^ disturbed.keys())[:3]}"
    for stage in STAGES:
        one, other = (_hash(folder / name / "run", stage) for name in said)
        if one != other:
            yield f"stage {stage} has other weights: {other} in place of {one}"


def _job(running: Cluster, folder: Path, name: str) -> str:
    """What a job said, and its state at the end."""
    place, log = folder / name, folder / name / "job.log"
    place.mkdir()
    for part in ("weights", "shards", "small.yaml"):
        (place / part).symlink_to(folder / part)
    fit = shlex.join([sys.executable, str(folder / "task.py"), name, "fit", "--recipe", "small.yaml", "--run", "run"])
    script = script_of_docs(fit, log).replace("\nsrun", f"\ncd {place}\nsrun", 1)
    (place / "job.sh").write_text(script)
    state = running.finish(place / "job.sh", log, SECONDS)
    return f"{log.read_text()}\n{state}"


def _notes(place: Path) -> Counter[str]:
    lines = [line for file in place.glob("notes-*.jsonl") for line in file.read_text().splitlines()]
    return Counter(json.dumps(json.loads(line)) for line in lines)


def _hash(run: Path, stage: str) -> Any:
    path = RunFolder(run).weights(stage)
    if not path.is_file():
        return "none"
    return [hash_tensors(read_weights(path, kind)) for kind in ("raw", "averaged")]
