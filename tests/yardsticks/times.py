"""``python -m tests.yardsticks.times``: which training shift, which sampling times, which solver.

- ``gauss``: the share of the deviation of a Gaussian that a solver keeps on its exact velocity, for the usual
  schedules and for every shipped recipe.
- ``late``: the share of its loss that an untrained model of each recipe that predicts the clip spends at late times.
- ``heldout``: the loss of runs on held-out samples, in bins of times that are drawn alike whatever they trained at.
- ``follow``: how often clips of those runs show what their held-out captions say, by schedule and solver.
- ``pair``: how much less often than others, paired by caption, from what ``follow --json`` wrote of both.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lingen import flow
from lingen.data.datamodule import ClipData
from lingen.data.synthetic import captions, parse_caption
from lingen.kernels.choice import best_device
from lingen.metrics.shapes import clustered_interval, judge
from lingen.model import SMALLEST_TIME_LEFT
from lingen.plan.loading import load_curriculum
from lingen.recipe.reading import shipped_recipes
from lingen.recipe.sections import Recipe, SampleConfig, TimeConfig
from lingen.sampling.clips import Texts, clip_size, decoded, encode_prompts, sample_latents, takes_of
from lingen.tables import as_table
from lingen.training.denoiser import LinGenModule
from lingen.training.weights import load_denoiser

DEVIATIONS = (0.3, 0.1)
WAYS = {
    "uniform, shifted": {"schedule": "uniform"},
    "uniform, unshifted": {"schedule": "linear_quadratic", "emulated_steps": 1},  # which is that
    "linear-quadratic": {"schedule": "linear_quadratic", "emulated_steps": 250},
}
"""Name -> settings of `sample`."""
ATTRIBUTES = ("colour", "shape", "motion")
CLIPS_OF_A_CAPTION = 13
"""Of the 312 that `follow` makes of 24 captions."""
BATCH = 60
"""Clips at a time."""


def joined(texts: Sequence[Texts]) -> Texts:
    """Several prompts as one batch."""
    null, text = ([flow.stack_text(*parts) for parts in zip(*each, strict=True)] for each in zip(*texts, strict=True))
    return Texts(null, text)


def kept(times: Tensor, solver: str, deviation: float) -> float:
    """Share of a Gaussian's standard deviation that is left of it at the end of sampling.

    The data are N(0, s^2), so X_t is N(0, v(t)) with v = t^2 s^2 + (1 - (1 - e) t)^2, and the exact velocity at (x, t)
    is x v'(t) / (2 v(t)).
    """
    rest = 1 - flow.SIGMA_MIN

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        t = time.double()
        slope = t * deviation**2 - rest * (1 - rest * t)
        return x * slope / ((t * deviation) ** 2 + (1 - rest * t) ** 2)

    return float(flow.solve(velocity, torch.ones(1, dtype=torch.float64), times, solver)) / deviation


def stacked() -> Tensor:
    """The times of 50 steps that are linear-quadratic and moved by a shift of 4, which sampling no longer does."""
    return flow.shift_time(flow.linear_quadratic(50, 250), 4.0)


def kept_by_recipe(name: str) -> dict[str, float]:
    """Stage -> what its sampling keeps of a deviation of 0.3 at its own clips; of a denoiser's recipe."""
    stages = load_curriculum(name).stages
    return {str(one.stage): kept(_times_of(one).schedule(one.sample), one.sample.solver, 0.3) for one in stages
            if one.subject.encoded}  # fmt: skip


def late_share(times: flow.Times) -> float:
    """Share of the loss at times above 0.9 where the clip is predicted with the same error at all times, as an
    untrained model does: that of the velocity is the error over (1 - t)^2."""
    grid = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    loss = times.density(grid) / (1 - grid).clamp(min=SMALLEST_TIME_LEFT) ** 2
    return float(loss[grid > 0.9].sum() / loss.sum())


def late() -> Iterator[dict[str, Any]]:
    """Beside the shift that `auto` was, the root of tokens / 8,704."""
    for name in shipped_recipes():
        for stage in load_curriculum(name).stages:
            if stage.subject.encoded and stage.model.predict == "clip":
                now = _times_of(stage)
                before = flow.Times(TimeConfig(shift=math.sqrt(now.tokens / 8704)), now.tokens)
                shares = {"share": f"{late_share(now):.1%}", "with the old auto": f"{late_share(before):.1%}"}
                yield {
                    "recipe": name,
                    "stage": stage.stage,
                    "tokens": now.tokens,
                    "shift": round(now.shift, 2),
                } | shares


def _times_of(recipe: Recipe) -> flow.Times:
    from lingen.plan.forecast import plan

    return flow.Times(recipe.time, max(plan(recipe).tokens.values()))


def gauss() -> Iterator[dict[str, Any]]:
    for shift in (1.0, 4.0):
        for way, settings in WAYS.items():
            for solver in flow.SOLVERS:
                steps = 25 if solver == "heun" else 50
                how = SampleConfig(steps=steps, solver=solver, **settings)  # type: ignore[arg-type]
                times = flow.Times(TimeConfig(shift=shift), 1).schedule(how)
                shares = {f"s = {one}": round(kept(times, solver, one), 3) for one in DEVIATIONS}
                yield {"shift": shift, "schedule": way, "solver": solver, "steps": steps} | shares
    for solver in ("euler", "ab2"):
        shares = {f"s = {one}": round(kept(stacked(), solver, one), 3) for one in DEVIATIONS}
        yield {"shift": 4.0, "schedule": "both stacked, as it was", "solver": solver, "steps": 50} | shares
    for name in shipped_recipes():
        for stage, share in kept_by_recipe(name).items():
            yield {"schedule": f"recipe {name}, stage {stage}", f"s = {DEVIATIONS[0]}": round(share, 3)}


def follow(
    weights: Sequence[Path], ways: Sequence[str], solvers: Sequence[str], clips: int, steps: int | None
) -> Iterator[dict[str, Any]]:
    """Verdicts on clips of both held-out splits: a row for each file of weights, schedule and solver."""
    for path in weights:
        module = load_denoiser(path, torch.device("cpu"))
        for way in ways:
            for solver in solvers:
                budget = steps or module.recipe.sample.steps
                how = replace(
                    module.recipe.sample, solver=solver, steps=budget // (2 if solver == "heun" else 1),  # type: ignore[arg-type]
                    **(WAYS[way] if way != "recipe" else {}),  # type: ignore[arg-type]
                )  # fmt: skip
                yield {"weights": str(path), "schedule": way, "solver": solver, "evaluations": budget} | _followed(
                    module, how, clips
                )


@torch.no_grad()
def heldout(weights: Sequence[Path], samples: int) -> Iterator[dict[str, Any]]:
    """Mean loss by bin of uniform times, with fixed noise."""
    for path in weights:
        module = load_denoiser(path, best_device())
        settings = replace(module.recipe.train, validation_samples=samples)
        module.recipe = replace(module.recipe, time=TimeConfig(distribution="uniform", shift=1.0), train=settings)
        module.eval()
        for batch in ClipData(module.recipe).val_dataloader():
            with torch.autocast(module.device.type, torch.bfloat16, enabled=module.device.type == "cuda"):
                module.validation_step(move_data_to_device(batch, module.device), 0)
        yield {"weights": str(path)} | module.validation_meter.flush()


@torch.no_grad()
def _followed(module: LinGenModule, how: SampleConfig, clips: int) -> dict[str, Any]:
    """Shares of clips with the right colour, shape and motion, and their intervals over captions."""
    words = [*captions("tune"), *captions("report")]
    takes = takes_of(words, repeat=math.ceil(clips / len(words)))[:clips]
    size, right = clip_size(module), np.zeros((len(takes), 3), bool)
    module.eval()
    for first in range(0, len(takes), BATCH):
        part = takes[first : first + BATCH]
        texts = joined(encode_prompts(module, [take.words for take in part], size))
        for number, latents in enumerate(sample_latents(module, part, texts, size, how), start=first):
            shown, asked = judge(decoded(module, latents, size, how)), parse_caption(takes[number].words)
            right[number] = [getattr(shown, name) == getattr(asked, name) for name in ATTRIBUTES]
    rows: dict[str, Any] = {}
    for column, name in enumerate(ATTRIBUTES):
        by_caption = {take.words: [0, 0] for take in takes}
        for take, is_right in zip(takes, right[:, column], strict=True):
            by_caption[take.words][0] += int(is_right)
            by_caption[take.words][1] += 1
        low, high = clustered_interval([(good, count) for good, count in by_caption.values()])
        rows |= {name: round(float(right[:, column].mean()), 4), f"{name} interval": [round(low, 3), round(high, 3)],
                 f"{name} by caption": {words: good for words, (good, _) in by_caption.items()}}  # fmt: skip
    return rows


def pair(before: Sequence[Path], now: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """What changed for each attribute, in points: the mean over runs paired in order and over captions, and the most
    by which it may be worse, by the spread over captions and by that over pairs (one-sided 95% of Student's t)."""
    from scipy import stats

    read = [[json.loads(path.read_text()) for path in paths] for paths in (before, now)]
    told = [[row for one in side for row in (one if isinstance(one, list) else one["rows"])] for side in read]
    for name in ATTRIBUTES:
        first, second = (np.array([[*one[f"{name} by caption"].values()] for one in rows]) for rows in told)
        points = 100 * (second - first) / CLIPS_OF_A_CAPTION
        row: dict[str, Any] = {"attribute": name, "pairs": len(points)}
        row |= {
            side: round(float(100 * one.mean() / CLIPS_OF_A_CAPTION), 1)
            for side, one in (("before", first), ("now", second))
        }
        row |= {"difference": round(float(points.mean()), 1)}
        for over, axis in (("captions", 0), ("pairs", 1)):
            each = points.mean(axis)
            most = float(stats.t.ppf(0.95, len(each) - 1) * stats.sem(each) - each.mean())
            row[f"worse by at most, over {over}"] = round(max(0.0, most), 1)
        yield row | {"by pair": points.mean(1).round(1).tolist()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.yardsticks.times", description=__doc__)
    acts = parser.add_subparsers(dest="act", required=True)
    acts.add_parser("gauss")
    acts.add_parser("late")
    three = acts.add_parser("heldout")
    three.add_argument("weights", nargs="+", type=Path)
    three.add_argument("--samples", type=int, default=256)
    two = acts.add_parser("follow")
    two.add_argument("weights", nargs="+", type=Path)
    two.add_argument("--schedules", nargs="+", default=["recipe"], choices=["recipe", *WAYS])
    two.add_argument("--solvers", nargs="+", default=["euler"], choices=list(flow.SOLVERS))
    two.add_argument("--clips", type=int, default=312)
    two.add_argument("--steps", type=int, help="evaluations for a clip; default: the recipe's steps")
    two.add_argument("--json", type=Path)
    four = acts.add_parser("pair")
    four.add_argument("--before", nargs="+", type=Path, required=True)
    four.add_argument("--now", nargs="+", type=Path, required=True)
    args = parser.parse_args()
    if args.act == "pair":
        rows = list(pair(args.before, args.now))
    elif args.act == "gauss":
        rows = list(gauss())
    elif args.act == "late":
        rows = list(late())
    elif args.act == "heldout":
        rows = list(heldout(args.weights, args.samples))
    else:
        rows = []
        for row in follow(args.weights, args.schedules, args.solvers, args.clips, args.steps):
            rows.append(row)
            print(json.dumps({key: value for key, value in row.items() if "by caption" not in key}), flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))
        return 0
    print(as_table([{key: str(value) for key, value in row.items()} for row in rows], terminal=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
