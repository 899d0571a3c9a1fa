"""All GPUs of one machine through NCCL and lingen's own commands (docs/performance.md, "Several GPUs"):

- ``speed``: LinGen-4B, clips of 512p of encoded random numbers, under every strategy and on one GPU; tokens a second,
  MFU, a step by part and by kernel, and the memory of a rank beside what `lingen plan` says.
- ``equal``: first and last gradients and the losses of 20 steps of a small model, in float32, beside one GPU's.
- ``events``: the preflight; a signal, and the run goes on with one GPU; a rank that is killed; a rank that
  is stopped; clips that GPUs share.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from lingen.data import manifest
from lingen.data.fingerprint import frozen_settings, hash_settings
from lingen.data.latents import LATENTS_NPY, TEXT
from lingen.data.shards import write_shards
from lingen.kernels.choice import best_device
from lingen.plan.forecast import text_tokens
from lingen.recipe import load_recipe
from lingen.recipe.sections import DataConfig
from lingen.sampling.files import read_latents
from tests.helpers.closeness import relative_error
from tests.helpers.commands import ROOT, lingen_command
from tests.helpers.ranks import steps_of_ranks
from tests.helpers.tiny import write_recipe, write_shapes
from tests.soak import ranks
from tests.soak.kill import RECORDER, notes_of
from tests.yardsticks.place import device_name
from tests.yardsticks.results import head

Row = dict[str, Any]
LARGE = """
extends: t2v_68s
data: {shards: {image: "shards/image-*.tar", video: "shards/video-*.tar"}, workers: 2}
train: {sample_every: 0, validate_every: 0, log_every: EVERY, checkpoint_every: 1000000000, watchdog: 120}
sample: {prompts: []}
trainer: {num_nodes: 1, logger: false}
stages:
  t2v_512_17s: {data: {mix: {image: 0, video: 1}}, train: {steps: STEPS, warmup: 2}}
  t2v_512_34s: {data: {mix: {image: 0, video: 1}}, train: {steps: STEPS, warmup: 2}}
  t2v_512_68s: {data: {mix: {image: 0, video: 1}}, train: {steps: STEPS, warmup: 2}}
"""
STAGE, EVERY = "t2v_512_17s", 4
"""Stage that is measured, and steps of a row of metrics.csv, of which the second one counts."""
STEPS = 2 * EVERY + 3
"""The last one is not taken, and the two before it are taken apart."""
RUNNING: set[int] = set()
"""Process groups of the runs that are under way."""
ACTS = '''
"""What happens to rank 1 in a step, and to all of them at a signal."""
import os, signal, time
from lingen.training.denoiser import LinGenModule

how, _, at = os.environ.get("ACT", "").partition(":")
train = LinGenModule.training_step

def act(self, batch, batch_idx):
    if how and self.recipe.stage == "clips" and self.global_step == int(at) and self.global_rank == 1:
        print("acted", time.time(), flush=True)
        os.kill(os.getpid(), getattr(signal, how))
    return train(self, batch, batch_idx)

LinGenModule.training_step = act
'''


PEAK = '''
import json, os
from contextlib import nullcontext
import torch
from lingen.ranks.environment import here
from lingen.training.denoiser import LinGenModule
from tests.yardsticks.fit import StepProfiler
from tests.yardsticks.parts import profiled_milliseconds

train, notes = LinGenModule.training_step, {}

def note(self, batch, batch_idx):
    left, on_gpu = self.recipe.train.steps - self.global_step, self.device.type == "cuda"
    notes["peak"] = torch.cuda.max_memory_allocated() if on_gpu else 0
    notes["reserved"] = torch.cuda.max_memory_reserved() if on_gpu else 0
    if left == 3:  # a step by part, and one by kernel
        self.trainer.profiler = StepProfiler(self.device)
    if left == 2:
        notes["parts"] = self.trainer.profiler.times
        if on_gpu:
            notes["profile"] = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            notes["profile"].start()
    if left == 1:
        if on_gpu:
            torch.cuda.synchronize()
            (profile := notes.pop("profile")).stop()
            notes["kernels"] = profiled_milliseconds(profile, True)
            most = sorted(profile.key_averages(), key=lambda one: -one.self_device_time_total)[:25]
            notes["most"] = {one.key[:120]: [one.count, one.self_device_time_total / 1e3] for one in most}
        with open(f"peak-{self.global_rank}", "w") as file:
            json.dump(notes, file)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        os._exit(0)  # what would follow writes 100 GB
    return train(self, batch, batch_idx)

LinGenModule.training_step = note
build = LinGenModule.__init__

def build_here(self, recipe):
    """Four billion random numbers take minutes on a CPU."""
    with torch.device("cuda", here().local_rank) if torch.cuda.is_available() else nullcontext():
        build(self, recipe)

LinGenModule.__init__ = build_here
'''


def write_encoded(folder: Path, stage: str, clips: int, overrides: Sequence[str] = ()) -> None:
    """Encoded shards of random numbers, in the sizes of a stage of `LARGE`."""
    (folder / "large.yaml").write_text(LARGE.replace("STEPS", str(STEPS)).replace("EVERY", str(EVERY)))
    recipe = load_recipe(folder / "large.yaml", overrides, stage=stage)
    rng, model, data = np.random.default_rng(0), recipe.model, recipe.data
    strides = (8, 8, 8)
    counts = list(zip(text_tokens(recipe), model.text_dims, strict=True))
    rows: list[manifest.Row] = []
    for kind, frames in (("video", data.frames), ("image", 1)):
        t, h, w = (-(-n // stride) for n, stride in zip((frames, *data.size), strides, strict=True))
        samples = []
        for number in range(clips):
            texts = {TEXT.format(n): _npy(rng.standard_normal((2 * m, width))) for n, (m, width) in enumerate(counts)}
            about: Row = {"captions": ["a clip"], "source": "random numbers"}
            about["tokens"] = {str(n): [m] for n, (m, _) in enumerate(counts)}
            about["null"] = {str(n): m for n, (m, _) in enumerate(counts)}
            latents = {LATENTS_NPY: _npy(rng.standard_normal((model.channels, t, h, w)))}
            samples.append({"__key__": f"{number:04d}", **latents, **texts, "json": about})
        (shard,) = write_shards(samples, str(folder / "shards" / f"{kind}-%05d.tar"))
        rows += _rows(shard, frames, data)
    (folder / "peak.py").write_text(PEAK)
    settings = {**frozen_settings(recipe), "null_text": True}
    manifest.write(folder / "shards" / manifest.NAME, rows, manifest.About(hash_settings(settings), settings))


def _rows(shard: Path, frames: int, data: DataConfig) -> Iterator[manifest.Row]:
    """Of the samples of a shard, as `lingen encode` would list them."""
    ends: dict[str, list[tarfile.TarInfo]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            ends.setdefault(member.name.partition(".")[0], []).append(member)
    for key, members in ends.items():
        first, last = members[0].offset, members[-1].offset_data + members[-1].size
        fps = data.fps if frames > 1 else 0.0
        height, width = data.size
        yield manifest.Row(
            key, shard.name, first, last - first, "latents", height, width, frames, fps, 1, 6, LATENTS_NPY
        )


def _npy(numbers: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, numbers.astype("<f2"))
    return buffer.getvalue()


class Speed(NamedTuple):
    """What is measured at speed: every stage with every value of `model.checkpointing`, under every strategy."""

    stages: Sequence[str] = (STAGE,)
    checkpointing: Sequence[str] = ("true",)
    strategies: Sequence[str] = ("fsdp", "hsdp", "ddp")
    single: bool = True
    """Whether one GPU is measured, too, without a strategy."""
    overrides: Sequence[str] = ()


def speed(folder: Path, gpus: int, asked: Speed) -> Iterator[Row]:
    """A row for each run; what `lingen plan` says is found out while it trains."""
    runs = [*((1, "auto") for _ in range(asked.single)), *((gpus, one) for one in asked.strategies if gpus > 1)]
    for stage in asked.stages:
        there = folder / stage
        (there / "shards").mkdir(parents=True)
        write_encoded(there, stage, 4 * gpus, asked.overrides)
        for checkpointing, (count, strategy) in product(asked.checkpointing, runs):
            run = f"{strategy}-{count}-{checkpointing}"
            of = {"trainer.devices": count, "trainer.strategy": strategy, "model.checkpointing": checkpointing}
            words = ["--stage", stage, *(f"{key}={value}" for key, value in of.items()), *asked.overrides]
            row: Row = {"act": "speed", "stage": stage, "checkpointing": checkpointing, "strategy": strategy}
            asking = ["--recipe", "large.yaml", "--gpus", str(count), "--gpu", "h200", "--json"]
            planning = subprocess.Popen(
                lingen_command("plan", *asking, *words), cwd=there, env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            code, text, seconds = _fit(there, "large.yaml", "--run", run, "--import", "peak", *words)
            plan, _ = planning.communicate()
            row |= {"gpus": count, "seconds": round(seconds), "overrides": list(asked.overrides)}
            if not planning.returncode:
                (planned,) = json.loads(plan)["stages"]
                row |= {"plan peak": planned["memory"]["peak"], "plan fits": planned["fits"]}
            if code:
                yield row | {"failed": text[-1500:]}
                continue
            notes = [json.loads((there / f"peak-{rank}").read_text()) for rank in range(count)]
            row |= {f"{name} bytes": [one[name] for one in notes] for name in ("peak", "reserved")}
            row |= {name: value for name, value in notes[0].items() if name in ("parts", "kernels", "most")}
            with (there / run / "metrics.csv").open(newline="") as file:
                (second,) = (one for one in csv.DictReader(file) if one["step"] == str(2 * EVERY))
            wanted = re.compile("tokens_per_second|mfu|hfu|loss$")
            row |= {name: float(value) for name, value in second.items() if value and wanted.search(name)}
            yield row


def equal(folder: Path, gpus: int, strategies: Sequence[str]) -> Iterator[Row]:
    """Differences of each strategy to one GPU: of the first and last gradients, all together, and of the velocities."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sizes = [word.replace("accelerator=cpu", "accelerator=gpu") for word in ranks.SIZES]
    with mock.patch.multiple(ranks, SIZES=tuple(sizes), STEPS={"32-true": 20, "64-true": 20}):
        one = ranks.Alone(folder, 20)
        held = one.found("32-true")
        for strategy in strategies:
            trial = {"recipe": str(one.recipe), "overrides": one.overrides("32-true", strategy, gpus),
                     "run": str(folder / f"{strategy}-{gpus}"), "stage": ranks.STAGE}  # fmt: skip
            (found,) = steps_of_ranks([trial], gpus)
            first, last = min(held.gradients), max(held.gradients)
            losses = [_losses(run) for run in (one.run("32-true"), Path(trial["run"]))]
            yield {
                "act": "equal", "strategy": strategy, "gpus": gpus,
                "first gradients": _together(held.gradients[first], found.gradients[first]),
                "last gradients": _together(held.gradients[last], found.gradients[last]),
                "losses": max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True)), "steps": len(losses[0]),
            }  # fmt: skip


def _together(one: dict, other: dict) -> float:
    return relative_error(*(torch.cat([held[key].flatten().cpu() for key in sorted(one)]) for held in (one, other)))


def _losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def events(folder: Path, gpus: int, accelerator: str = "gpu") -> Iterator[Row]:
    """What comes over a run of a small model, and how it ends; all at once, each in a folder of its own."""
    shards = write_shapes(folder / "shards")
    base = ["--import", "recorder", "--import", "acts", f"trainer.accelerator={accelerator}", "sample.prompts=[]",
            "stages.clips.train.steps=12", "train.log_every=1", "trainer.strategy=fsdp"]  # fmt: skip

    def start(run: str, count: int, *words: str, act: str = "") -> tuple[int, str, float, Any]:
        own = folder / f"of-{run}"
        own.mkdir(exist_ok=True)
        for path in own.glob("notes-*"):
            path.unlink()
        write_recipe(own / "tiny.yaml", shards)
        (own / "recorder.py").write_text(RECORDER)
        (own / "acts.py").write_text(ACTS)
        many = [f"data.batch={{image: {4 // count}, video: {4 // count}}}", f"trainer.devices={count}"]
        code, text, seconds = _fit(own, "tiny.yaml", "--run", run, *base, *many, *words, ACT=act)
        notes = dict(notes_of(own))
        acted = re.search(r"acted ([\d.]+)", text)
        return code, text, (time.time() - float(acted[1])) if acted else seconds, _samples(notes)

    def moved() -> tuple[Any, ...]:
        return *start("moved", gpus, act="SIGTERM:5"), *start("moved", 1)

    def straight() -> tuple[Any, ...]:
        told = start("straight", 1)
        return *told, {} if told[0] else _sampled(folder / "of-straight")

    with ThreadPoolExecutor(5) as threads:
        undisturbed, went_on = threads.submit(straight), threads.submit(moved)
        preflight = threads.submit(start, "preflight", gpus, "--preflight")
        killed = threads.submit(start, "killed", gpus, act="SIGKILL:5")
        stopped = threads.submit(start, "stopped", gpus, "train.watchdog=20", act="SIGSTOP:5")
        for what, one in (
            (f"preflight, {gpus} GPUs", preflight),
            ("a rank is killed", killed),
            ("a rank is stopped, train.watchdog=20", stopped),
        ):
            code, text, seconds, _ = one.result()
            yield {"act": "events", "what": what, "code": code, "seconds": round(seconds, 1), "said": text[-3000:]}
        yield {"act": "events", "what": "files of the stopped run's ranks",
               "files": sorted(path.name for path in (folder / "of-stopped/stopped/ranks").glob("*"))}  # fmt: skip
        code, text, seconds, whole, sampled = undisturbed.result()
        yield {"act": "events", "what": "undisturbed, 1 GPU", "code": code, "seconds": round(seconds, 1),
               "failed": text[-1500:] if code else ""}  # fmt: skip
        yield {"act": "events", "what": f"4 clips on {gpus} GPUs and on 1"} | sampled
        code, text, seconds, before, again, more, _, after = went_on.result()
        same = {key: before.get(key, set()) | after.get(key, set()) for key in whole} == whole
        yield {"act": "events", "what": f"SIGTERM on {gpus} GPUs, resumed on 1", "codes": [code, again],
               "seconds": round(seconds, 1), "same samples": same, "said": (text[-600:], more[-1200:]),
               "failed": "" if same and not again else "it did not go on with the same samples"}  # fmt: skip


def _sampled(folder: Path) -> Row:
    """Whether clips of one `lingen sample` are the same, shared by all GPUs and made by one."""
    words = lingen_command("sample", "--run", "straight", "--repeat", "4", "--prompt", "a red square", "--out")
    env, seconds = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}, []
    for name, more in (("many", {}), ("one", {"CUDA_VISIBLE_DEVICES": "0"})):
        began = time.monotonic()
        subprocess.run([*words, f"{name}.mp4"], cwd=folder, env=env | more, check=True, stdout=subprocess.DEVNULL)
        seconds.append(round(time.monotonic() - began, 1))
    latents = [
        [read_latents(path)[0] for path in sorted(folder.glob(f"{name}-*.latents.*"))] for name in ("many", "one")
    ]
    same = [torch.equal(*both) for both in zip(*latents, strict=True)]
    return {"same": same, "seconds": seconds, "failed": "" if same == [True] * 4 else "other clips"}


def _samples(notes: dict) -> dict[tuple[str, int], set[str]]:
    """(stage, step) -> keys that were trained on, by all ranks."""
    held: dict[tuple[str, int], set[str]] = {}
    for (stage, step, _), (_, _, keys) in notes.items():
        held.setdefault((stage, step), set()).update(keys)
    return held


def _fit(folder: Path, recipe: str, *words: str, **env: str) -> tuple[int, str, float]:
    """Exit code of `lingen fit`, what it said, and how long it took."""
    began, log = time.monotonic(), folder / f"log-{time.monotonic_ns()}.txt"
    paths = os.pathsep.join([str(ROOT), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w") as file:
        process = subprocess.Popen(
            lingen_command("fit", "--recipe", recipe, *words), cwd=folder, stdout=file, stderr=file,
            env=os.environ | {"PYTHONPATH": paths} | env, start_new_session=True,
        )  # fmt: skip
        RUNNING.add(process.pid)
        try:
            code = process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        RUNNING.discard(process.pid)
    return code, log.read_text(), time.monotonic() - began


def _end(number: int, _: Any) -> None:
    """Whoever ends this trial does not want its runs to hold the GPUs on."""
    for group in RUNNING:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    sys.exit(128 + number)


def several_gpus(folder: Path, acts: Sequence[str], asked: Speed, json_file: Path | None) -> int:
    """Prints a JSON row for whatever was seen; 1 where something failed."""
    gpus, rows = max(1, torch.cuda.device_count()), []
    signal.signal(signal.SIGTERM, _end)
    chosen = {
        "speed": lambda: speed(folder / "speed", gpus, asked),
        "equal": lambda: equal(folder / "equal", gpus, asked.strategies),
        "events": lambda: events(folder / "events", gpus),
    }
    for act in acts:
        (folder / act).mkdir(parents=True)
        for row in chosen[act]():
            rows.append({"name": "gpus", **row})
            print(json.dumps(row), flush=True)
            if json_file:
                about = {"device": device_name(best_device()), **head({}, program="python -m tests.soak")}
                json_file.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return int(any(row.get("failed") for row in rows))
