"""The main recipe on one GPU through NCCL, as it is shipped (strategy, precision, recomputation, six stages, Triton
kernels), with fewer layers: a run that a signal stops, and that goes on, trains on the samples of one that nobody
disturbed, its losses are as near to theirs as those of two such runs are to each other, and it samples."""

from __future__ import annotations

import csv
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.commands import lingen_command
from tests.helpers.small_t2v import write_small_t2v
from tests.soak.kill import RECORDER, notes_of

STOPS = {"t2i_256": 3, "t2v_512_17s": 5}
"""Stage -> the step in which a signal comes."""
RECIPE = """
model: {dim: 1024, depth: 4, ffn_dim: 2752}
data:
  shards: {image: "shards/image-*.tar", video: "shards/video-*.tar"}
  size: [256, 256]
  mix: {image: 1, video: 2}
  batch: {image: 4, video: 1}
  workers: 2
train: {sample_every: 0, validate_every: 0, log_every: 1}
sample: {steps: 8, prompts: [a red circle moves right]}
trainer: {devices: 1, num_nodes: 1}
stages:
  t2i_256:     {data: {batch: {image: 8}}, train: {steps: 8, warmup: 2}}
  t2v_256_17s: {data: {frames: 32, size: [128, 128], batch: {image: 2, video: 2}}, train: {steps: 6, warmup: 2}}
  t2v_512_17s: {data: {frames: 32}, train: {steps: 9, warmup: 2}, model: {checkpointing: 0.2}}
  t2v_512_34s: {data: {frames: 64}, train: {steps: 6, warmup: 2}}
  t2v_512_68s: {data: {frames: 64}, train: {steps: 6, warmup: 2}}
  quality:     {data: {frames: 64}, train: {steps: 6, warmup: 2}}
"""
STOPPER = '''
"""Sends a signal to itself in one step, where the environment asks for it."""
import os, signal

stage, _, step = os.environ.get("STOP", "").partition(":")
noted = LinGenModule.training_step

def stop(self, batch, batch_idx):
    if stage == self.recipe.stage and int(step) == self.global_step:
        os.kill(os.getpid(), signal.SIGUSR1)
    return noted(self, batch, batch_idx)

LinGenModule.training_step = stop
'''


def on_one_gpu(folder: Path) -> Iterator[str]:
    """What was seen, and a sentence that begins with ``failed`` for each thing that is wrong."""
    folder.mkdir(parents=True)
    began = time.monotonic()
    here = Path.cwd()
    os.chdir(folder)
    write_small_t2v(folder, RECIPE, frames=64, side=256)
    os.chdir(here)
    yield f"shards made in {time.monotonic() - began:.0f} s"
    (folder / "recorder.py").write_text(RECORDER + STOPPER)
    samples = {}
    for run in ("straight", "again", "stopped"):
        for stage, step in STOPS.items() if run == "stopped" else ():
            yield from _start(folder, run, f"{stage}:{step}", wanted=75)
        yield from _start(folder, run, "", wanted=0)
        notes = notes_of(folder)
        samples[run] = dict(notes)
        if len(samples[run]) != len(notes):
            yield f"failed: {run} trained a step twice"
        for path in folder.glob("notes-*"):
            path.unlink()
    for run in ("again", "stopped"):
        if samples[run] != samples["straight"]:
            yield f"failed: {run} was trained on other samples"
    yield from _compare({run: _losses(folder / run) for run in samples})
    words = ("sample", "--run", "stopped", "--prompt", "a red circle moves right", "--out", "clip.mp4")
    yield from _call(folder, "sample", words, wanted=0)
    if not (folder / "clip.mp4").is_file():
        yield "failed: there is no clip"


def _start(folder: Path, run: str, stop: str, wanted: int) -> Iterator[str]:
    words = ("fit", "--recipe", "small.yaml", "--run", run, "--import", "recorder")
    yield from _call(folder, f"{run} {stop}".strip(), words, wanted, STOP=stop)


def _call(folder: Path, name: str, words: tuple[str, ...], wanted: int, **env: str) -> Iterator[str]:
    began = time.monotonic()
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (folder / f"{name.replace(' ', '-').replace(':', '-')}.log").open("w+") as log:
        code = subprocess.run(
            lingen_command(*words), cwd=folder, env=os.environ | {"PYTHONPATH": paths} | env, stdout=log, stderr=log,
            timeout=600, check=False,
        ).returncode  # fmt: skip
        log.seek(0)
        text = log.read()
    yield f"{name}: exit code {code} after {time.monotonic() - began:.0f} s"
    if code != wanted or "Traceback" in text:
        yield f"failed: {name} ended with {code}, not {wanted}, and said: {text[-3000:]}"


def _losses(run: Path) -> dict[tuple[str, str], float]:
    """(stage, step) -> loss."""
    with (run / "metrics.csv").open(newline="") as file:
        return {(row["stage"], row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row["loss"]}


def _compare(losses: dict[str, dict[tuple[str, str], float]]) -> Iterator[str]:
    one, other, stopped = losses.values()
    if not one.keys() == other.keys() == stopped.keys():
        yield f"failed: other steps were logged: {sorted(one.keys() ^ stopped.keys())[:3]}"
        return
    spread = max(abs(one[place] - other[place]) for place in one)
    far = max(min(abs(stopped[place] - one[place]), abs(stopped[place] - other[place])) for place in one)
    yield f"{len(one)} losses of {min(one.values()):.4f} to {max(one.values()):.4f}: two undisturbed runs lie at most "
    yield f"{spread:.3e} apart, the stopped one at most {far:.3e} from the nearer of them"
    if far > spread:
        yield "failed: the stopped run lies outside of the spread"
