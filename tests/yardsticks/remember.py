"""``python -m tests.yardsticks.remember --json FILE``: does a layer of Mamba2 keep one bit over a whole clip?

One token of a clip holds a bit, +1 or -1, that is to be told at the last token. All others are distractors: a bit in
another feature, and noise. Tasks:

- ``remember``: the bit lies among the first eighth of the tokens.
- ``forget``: one to four bits lie anywhere before the last eighth; the last of them counts.

A narrow layer is trained on clips of 32 tokens first, which it needs to find the bit at all, and on longer ones up to
the length asked for; then it reads clips of that length and of four times as many frames. Told are the losses in bits
(1 is chance) and how much larger the state becomes, as its RMS and as that of the head that grows most. Long clips need
a GPU: ``--grid 34 32 32 --device cuda`` is 34,816 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingen.blocks.layers import RMSNorm
from lingen.blocks.mamba2 import Mamba2, ScanMemory
from lingen.recipe.sections import Triple
from lingen.tables import as_table

from .results import head

SIZES = {"state_dim": 8, "head_dim": 8, "bidirectional": False}
DIM, FEATURES, NOISE, LONGER = 16, 4, 0.3, 4
GRIDS: list[Triple] = [(1, 4, 8), (1, 12, 12), (4, 12, 12), (8, 24, 24)]
"""Of the clips that are trained on before those of the length asked for, where they are shorter."""
STEPS = {"remember": (150, 50), "forget": (400, 50)}
"""Task -> optimiser steps at the first length, and at each of the others."""
READ = 64
"""Clips that are read, which no training has drawn."""
SETTINGS: dict[str, dict[str, Any]] = {
    "mamba_ssm": {"long_heads": 0.0},
    "dt_min 1e-5": {"long_heads": 0.0, "dt_min": 1e-5},
    "long 0.25": {"long_heads": 0.25},
    "long 0.25, per head": {"long_heads": 0.25, "norm": "per_head"},
    "long 1": {"long_heads": 1.0},
    "long 1, per head": {"long_heads": 1.0, "norm": "per_head"},
}
"""Name -> what is compared; `a_min` is 1 / (0.01 n) in all of them, where n are the tokens of a clip read."""
WIDE = {"A in 1e-4..16": {"long_heads": 1.0, "a_min": 1e-4, "a_top": 16.0}}
"""What only `at_start` looks at: one law for all heads, A log-uniform up to `a_top`."""
TASKS = ("remember", "forget")


def clips(task: str, batch: int, grid: Triple, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips [b t h w f], and the bit [b] to be told: 0 or 1. The bits are feature 0, those of distractors feature 1."""
    n, device = math.prod(grid), generator.device
    x = torch.randn(batch, n, FEATURES, generator=generator, device=device)
    bit = x[..., 0].sign()
    x[..., 1] = x[..., 1].sign()
    x *= NOISE
    count = torch.ones(batch, dtype=torch.long, device=device)
    if task == "forget":
        count = torch.randint(1, 5, (batch,), generator=generator, device=device)
    last = n // 8 if task == "remember" else n - n // 8
    places = torch.rand(batch, last, generator=generator, device=device).argsort(1)[:, :4].sort(1).values
    places = places.where(torch.arange(4, device=device) < count[:, None], places.gather(1, count[:, None] - 1))
    x[..., 0] = torch.zeros_like(bit).scatter(1, places, bit.gather(1, places))
    return x.unflatten(1, grid), (bit.gather(1, places[:, -1:]).squeeze(1) > 0).float()


def at_start(name: str, tokens: Sequence[int] = (256, 8_704, 139_264), heads: int = 80) -> dict[str, Any]:
    """What the initialisation of 100 layers with an `a_min` of 7e-4 says of clips whose tokens all write alike: the
    reach; how much larger the state is at the end of the longest clip than of the others; and which share of its
    energy, all of which the shared norm divides by, lies in heads of A above 1."""
    settings = {"long_heads": 0.25, "dt_min": 1e-3, "a_min": 7e-4, "a_top": 1.0} | (SETTINGS | WIDE)[name]
    reaches, energies = [], []
    for seed in range(100):
        torch.manual_seed(seed)
        memory = ScanMemory(1, heads)
        memory.draw(settings["dt_min"], 0.1, settings["long_heads"], settings["a_min"] / settings["a_top"], 16.0)
        memory.a_log.data += math.log(settings["a_top"])
        reaches.append(float(memory.horizon()))
        a, dt = memory.a_log.detach().double().exp(), F.softplus(memory.dt_bias.detach().double())
        held = torch.stack([dt.square() * torch.expm1(-2 * n * dt * a) / torch.expm1(-2 * dt * a) for n in tokens])
        energies.append(torch.stack([held.sum((1, 2)), (held * (a > 1)).sum((1, 2))]))
    *shorter, (longest, short_heads) = torch.stack(energies).mean(0).mT.tolist()
    row: dict[str, Any] = {"settings": name, "reach": round(statistics.median(reaches), 1)}
    for n, (energy, _) in zip(tokens[:-1], shorter, strict=True):
        row[f"state, {tokens[-1]} / {n}"] = round((longest / energy) ** 0.5, 3)
    return row | {"energy of short heads": f"{short_heads / longest:.2%}"}


class Reader(nn.Module):
    """One layer, read at the last token."""

    def __init__(self, **settings: Any):
        super().__init__()
        self.embed = nn.Linear(FEATURES, DIM)
        self.mixer = Mamba2(DIM, 0, **SIZES | settings)
        self.out = nn.Sequential(RMSNorm(DIM), nn.Linear(DIM, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.out((h + self.mixer(h))[:, -1, -1, -1]).squeeze(-1)

    def state_rms(self, x: Tensor) -> Tensor:
        """Of each head [k], where the first direction ends."""
        mixer = self.mixer
        streams = mixer.in_proj(self.embed(x))[..., mixer.sizes[0] :]
        state = mixer._review_state(streams, mixer.kernel, "auto")
        return state[:, 0].float().square().mean((0, 2, 3)).sqrt()


def bits(model: Reader, x: Tensor, bit: Tensor) -> Tensor:
    """Mean loss, 1 for a model that knows nothing."""
    return F.binary_cross_entropy_with_logits(model(x).float(), bit) / math.log(2)


def study(name: str, task: str, grid: Triple, seed: int, lr: float, device: str, review: bool) -> dict[str, Any]:
    """Trains one layer, and reads clips of the same and of four times the length."""
    torch.manual_seed(seed)
    a_min = min(1.0, 100 / (LONGER * math.prod(grid)))
    model = Reader(**{"a_min": a_min, "review": (2, 2, 2) if review else None} | SETTINGS[name]).to(device)
    row = {"settings": name, "task": task, "review": review, "tokens": math.prod(grid), "seed": seed, "device": device,
           "reach": float(model.mixer.horizon())}  # fmt: skip
    generator = torch.Generator(device).manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    began = time.perf_counter()
    for number, one in enumerate([*(one for one in GRIDS if math.prod(one) < math.prod(grid)), grid]):
        for _ in range(STEPS[task][min(number, 1)]):
            loss = bits(model, *clips(task, _batch(one), one, generator))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    seconds = time.perf_counter() - began
    near, far = (_read(model, task, one, seed) for one in (grid, (LONGER * grid[0], *grid[1:])))
    return row | {
        "loss": round(near[0], 5), "loss at 4x": round(far[0], 5),
        "state at 4x": float(far[1].square().mean().sqrt() / near[1].square().mean().sqrt()),
        "head at 4x": float((far[1] / near[1]).max()), "seconds": round(seconds, 1),
    }  # fmt: skip


def _batch(grid: Triple) -> int:
    return min(16, max(2, 4608 // math.prod(grid)))


@torch.no_grad()
def _read(model: Reader, task: str, grid: Triple, seed: int) -> tuple[float, Tensor]:
    """Loss, and the state's RMS by head."""
    generator = torch.Generator(model.embed.weight.device).manual_seed(2000 + seed)
    found = []
    for _ in range(READ // _batch(grid)):
        x, bit = clips(task, _batch(grid), grid, generator)
        found.append((float(bits(model, x, bit)), model.state_rms(x)))
    losses, states = zip(*found, strict=True)
    return statistics.fmean(losses), torch.stack(states).square().mean(0).sqrt()


def medians(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row for all seeds of a case: medians, and the largest loss."""
    for case in dict.fromkeys((row["tokens"], row["task"], row["review"], row["settings"]) for row in rows):
        same = [row for row in rows if (row["tokens"], row["task"], row["review"], row["settings"]) == case]
        told = {"tokens": case[0], "task": case[1], "review": case[2], "settings": case[3], "seeds": len(same)}
        for key in ("reach", "loss", "loss at 4x", "state at 4x", "head at 4x"):
            told[key] = float(f"{statistics.median(row[key] for row in same):.3g}")
        yield told | {"solved": f"{sum(row['loss'] < 0.5 for row in same)} of {len(same)}"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.yardsticks.remember", description=__doc__)
    parser.add_argument("--grid", nargs=3, type=int, default=[4, 12, 12], help="frames, rows, columns trained on")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--review", nargs="+", type=int, default=[0, 1], choices=[0, 1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, of one thread each")
    parser.add_argument("--json", type=Path, help="rows are added to those that it holds")
    parser.add_argument("--start", action="store_true", help="tell only what layers of t2v_68s start with")
    args = parser.parse_args()
    if args.start:
        rows = [at_start(name) for name in SETTINGS | WIDE if "per head" not in name]
        print(as_table([{key: str(value) for key, value in row.items()} for row in rows], terminal=False))
        return 0
    held = json.loads(args.json.read_text())["rows"] if args.json and args.json.is_file() else []
    keys = ("settings", "task", "review", "tokens", "seed")
    done = {tuple(row[key] for key in keys) for row in held}
    grid: Triple = tuple(args.grid)
    todo = [
        (name, task, grid, seed, args.lr, args.device, review)
        for seed, task, review in itertools.product(args.seeds, args.tasks, map(bool, args.review))
        for name in args.settings
        if (name, task, review, math.prod(grid), seed) not in done
    ]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), initializer=_one_thread) as jobs:
        for one in as_completed([jobs.submit(study, *case) for case in todo]):
            held.append(one.result())
            print(json.dumps(held[-1]), flush=True)
            if args.json:
                args.json.write_text(_json(held))
    print(as_table([{key: str(value) for key, value in row.items()} for row in medians(held)], terminal=False))
    return 0


def _one_thread() -> None:
    torch.set_num_threads(1)


def _json(rows: list[dict[str, Any]]) -> str:
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    about = json.dumps(head({}, program="python -m tests.yardsticks.remember"))[1:-1]
    return f'{{\n {about},\n "rows": [\n  {lines}\n ]\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
