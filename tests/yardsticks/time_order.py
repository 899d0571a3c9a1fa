"""``python -m tests.yardsticks.time_order``: the paper's temporal scans against others (docs/model.md, Order of time).

- ``reach``: which tokens a last-frame token hears, by gradients; with ``--png`` the pictures of the page, one for
  each order.
- ``review``: how far into a clip the review is heard, by how much of the output it makes; with ``--png`` also
  as a picture.
- ``stripes``: what differs from one column to the next where all columns hold the same.
- ``task``: a small model that must recall a bit of its column's first quarter at the column's last frame, and remove
  noise on the way; several seeds.
- ``speed``: the denoiser of a recipe, forward, in alternating pairs.

``--json FILE`` keeps the rows of an act under its name.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingen.blocks.layers import RMSNorm
from lingen.blocks.mamba2 import Mamba2
from lingen.blocks.scan import permutation
from lingen.recipe.sections import Triple
from lingen.tables import as_table

from .results import head

Row = dict[str, Any]
WAYS: dict[str, dict[str, str]] = {
    "paper": {"scan": "rotary_major", "conv_ends": "joined"},
    "masked": {"scan": "rotary_major", "conv_ends": "masked"},
    "folded": {"scan": "rotary_major_folded", "conv_ends": "joined"},
    "folded, masked": {"scan": "rotary_major_folded", "conv_ends": "masked"},
}
TEMPORAL = {"hwt": 2, "wht": 3}
"""Layers of both cycles that read column by column."""
PAPER = WAYS["paper"] | {"norm": "shared"}
SPEED = WAYS | {"norm per head": {"norm": "per_head"}, "masked, norm per head": WAYS["masked"] | {"norm": "per_head"}}
"""Of `speed`: settings of the mixer, each over `PAPER`."""
LONG_HEADS = (0, 0.25)
"""Shares of them in `reach`."""
REVIEWS: dict[str, dict[str, Any]] = {
    "mamba_ssm": {"long_heads": 0.0},
    "dt_min 1e-5": {"long_heads": 0.0, "dt_min": 1e-5},
    "long_heads 0.25": {"a_min": 7e-4},
    "long_heads 0.25, norm per head": {"a_min": 7e-4, "norm": "per_head"},
}
"""Of `review`: the names in docs/model.md, and what is set."""
SMALL = {"head_dim": 16, "state_dim": 16}
CHANNELS, NOISE = 4, 0.7
"""Of the task: noisy signal, bit, whether there is one, frame; deviation of the noise, the signal's being 1."""


def mixer(way: str, layer: int, dim: int, seed: int, **settings: Any) -> Mamba2:
    torch.manual_seed(seed)
    return Mamba2(dim, layer, **SMALL | WAYS[way] | settings)


def heard(way: str, name: str, grid: Triple, dim: int, seeds: Sequence[int], long_heads: float) -> Tensor:
    """Gradient energy that the last frame of the middle column takes from each token, as shares [columns t] in the
    order of the columns: mean over the seeds, each of new weights, tokens and direction of the output."""
    total = torch.zeros(grid[1] * grid[2], grid[0])
    for seed in seeds:
        one = mixer(way, TEMPORAL[name], dim, seed, long_heads=long_heads)
        x = torch.randn(1, *grid, dim, requires_grad=True)
        place = permutation(name, grid, x.device)[0].view(-1, grid[0])
        last = place[len(place) // 2, -1]
        out = one(x).flatten(1, 3)[0, last]
        energy = torch.autograd.grad((out * torch.randn(dim)).sum(), x)[0].square().sum(-1).flatten()
        total += (energy / energy.sum())[place] / len(seeds)
    return total


def reach(grid: Triple, dim: int, seeds: Sequence[int], png: Path | None) -> Iterator[Row]:
    for name in TEMPORAL:
        pictures: dict[tuple[float, str], Tensor] = {}
        for long, way in ((long, way) for long in LONG_HEADS for way in WAYS):
            share = pictures[long, way] = heard(way, name, grid, dim, seeds, long)
            frames, middle = share.sum(0), len(share) // 2
            half = slice(grid[0] // 2, grid[0] - 1 - grid[0] // 8)
            yield {
                "order": name, "long heads": long, "way": way, "frame 0": _number(frames[0]),
                f"frames {half.start} to {half.stop - 1}": _number(frames[half].sum()),
                "last frame of other columns": _number(frames[-1] - share[middle, -1]),
                "own column": _number(share[middle].sum()),
            }  # fmt: skip
        if png is not None:
            draw(pictures, png.with_stem(f"{png.stem}_{name}"))


def draw(pictures: dict[tuple[float, str], Tensor], png: Path) -> None:
    """Columns around the listener's over frames, as shares in decades; a row for each share of long heads."""
    figure = _figure(11, 4.4)
    rows, image = figure.subplots(len(LONG_HEADS), len(WAYS), sharex=True, sharey=True), None
    for panel, ((long, way), share) in zip(rows.flat, pictures.items(), strict=True):
        middle = len(share) // 2
        near = share[middle - 3 : middle + 4].clamp(1e-12).log10()
        image = panel.imshow(near, aspect="auto", vmin=-8, vmax=0, cmap="magma", interpolation="nearest",
                             extent=(-0.5, share.shape[1] - 0.5, 3.5, -3.5))  # fmt: skip
        panel.set_title(f"{way}, long heads: {long or 'none'}", fontsize=9)
    figure.supxlabel("frame", fontsize=8)
    figure.supylabel("column, from the listener's", fontsize=8)
    figure.colorbar(image, ax=rows, label="share of gradient energy, log10")
    figure.savefig(png)


@torch.no_grad()
def review_shares(grid: Triple, dim: int, seed: int, settings: dict[str, Any]) -> Tensor:
    """How much of a layer's output the review makes, at each token [n] in reading order: the energy of what changes
    without the review, over that of the output. One direction, frame by frame, without a token's own input (D = 0)."""
    torch.manual_seed(seed)
    one = Mamba2(dim, 0, scan="thw", bidirectional=False, **SMALL | settings)
    one.memory.d.zero_()
    x = torch.randn(1, *grid, dim)
    with_review, one.review = one(x), None
    changed = (with_review - one(x)).square().sum(-1).flatten()
    return changed / with_review.square().sum(-1).flatten()


def review(grid: Triple, dim: int, seeds: Sequence[int], png: Path | None) -> Iterator[Row]:
    curves: dict[str, dict[int, float]] = {}
    for name, settings in REVIEWS.items():
        shares = torch.stack([review_shares(grid, dim, seed, settings) for seed in seeds]).mean(0)
        starts = [2**power for power in range(math.ceil(math.log2(len(shares))))]
        curves[name] = {start: float(shares[start : 2 * start].mean()) for start in starts}
        told = {f"from {start}": _number(curves[name][start]) for start in starts if start in (256, 1024, 4096, 16384)}
        yield {"heads": name, "first token": _number(shares[0])} | told
    if png is not None:
        figure = _figure(6, 2.8)
        axes = figure.subplots()
        for name, curve in curves.items():
            axes.loglog([1.5 * start for start in curve], [max(one, 1e-12) for one in curve.values()], label=name)
        axes.set(xlabel="tokens read since the review", ylabel="share of the output")
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(png)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


class Tiny(nn.Module):
    """The two temporal layers of a cycle between an embedding and two outputs, signal and bit [b t h w 2]. All heads
    last for a column, and their steps are long enough to write (docs/model.md, Memory of the scan)."""

    def __init__(self, way: str, dim: int, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.read = nn.Linear(CHANNELS, dim), nn.Linear(dim, 2)
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(3))
        memory = {"long_heads": 1.0, "a_min": 3e-3, "dt_min": 0.1, "dt_max": 0.5}
        settings: dict[str, Any] = SMALL | WAYS[way] | memory
        self.mixers = nn.ModuleList(Mamba2(dim, layer, **settings) for layer in TEMPORAL.values())

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, layer in zip(self.norms, self.mixers, strict=False):
            x = x + layer(norm(x))
        return self.read(self.norms[-1](x))


def samples(clips: int, grid: Triple, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Clips [b t h w CHANNELS], their signals without noise, and the bits (0 or 1) to recall [b h w]. Every column is
    independent of the others, and has its bit at one frame of its first quarter."""
    t, sides = grid[0], (clips, *grid[1:])
    steps = torch.randn(clips, *grid, generator=generator)
    signal = steps.clone()
    for frame in range(1, t):
        signal[:, frame] = 0.9 * signal[:, frame - 1] + math.sqrt(1 - 0.9**2) * steps[:, frame]
    bits = torch.randint(2, sides, generator=generator).float()
    when = torch.randint(t // 4, (clips, 1, *grid[1:]), generator=generator)
    marks = torch.zeros(clips, *grid).scatter_(1, when, 4.0)
    shown = marks * (2 * bits - 1)[:, None]
    clock = torch.linspace(-1, 1, t).view(1, t, 1, 1).expand_as(shown)
    noisy = signal + NOISE * torch.randn(clips, *grid, generator=generator)
    return torch.stack([noisy, shown, marks, clock], -1), signal, bits


def losses(model: nn.Module, clips: int, grid: Triple, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the bit, squared error of each frame [t], share of right bits."""
    x, signal, bit = samples(clips, grid, generator)
    out = model(x)
    guess = out[:, -1, ..., 1]
    right = ((guess > 0) == (bit > 0.5)).float().mean()
    return F.binary_cross_entropy_with_logits(guess, bit), (out[..., 0] - signal).square().mean((0, 2, 3)), right


def trained(way: str, seed: int, grid: Triple, dim: int, steps: int, batch: int, rate: float) -> Row:
    """Trains one model on one thread, and asks it on 128 clips that are the same for all."""
    torch.set_num_threads(1)
    began, model, generator = time.perf_counter(), Tiny(way, dim, seed), torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for _ in range(steps):
        bit, errors, _ = losses(model, batch, grid, generator)
        optimizer.zero_grad()
        (4 * bit + errors.mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        asked = torch.Generator().manual_seed(7)
        bits, each, rights = zip(*(losses(model, 32, grid, asked) for _ in range(4)), strict=True)
        errors, edge = torch.stack(each).mean(0), grid[0] // 4
        striped = stripes_of(model, samples(8, (grid[0], 1, 1), asked)[0].expand(-1, -1, 4, 4, -1))
    return {
        "way": way, "seed": seed, "bit": _number(torch.stack(bits).mean()), 
        "right": _number(torch.stack(rights).mean()),
        "first frame": _number(errors[0]), "last frame": _number(errors[-1]),
        "middle": _number(errors[edge:-edge].mean()), "stripes": _number(striped),
        "seconds": round(time.perf_counter() - began),
    }  # fmt: skip


def stripes_of(run: Any, x: Tensor) -> Tensor:
    """Share of the output's energy that alternates from column to column (the highest frequency along h, w or both)
    where all columns of `x` [b t h w c] hold the same; h and w even."""
    y = torch.fft.fft2(run(x).float(), dim=(2, 3), norm="ortho").abs().square().sum((0, 1, 4))
    h, w = (size // 2 for size in y.shape)
    return (y[h, 0] + y[0, w] + y[h, w]) / y.sum()


@torch.no_grad()
def stripes(grid: Triple, dim: int, seeds: Sequence[int]) -> Iterator[Row]:
    for way in WAYS:
        for conv in ("shared", "per_direction"):
            found = []
            for seed in seeds:
                one = mixer(way, TEMPORAL["hwt"], dim, seed, conv=conv)
                same = torch.randn(4, grid[0], 1, 1, dim).expand(-1, -1, *grid[1:], -1).contiguous()
                found.append(float(stripes_of(one, same)))
            yield {"way": way, "conv": conv, "stripes": _number(statistics.median(found))}


def task(seeds: Sequence[int], ways: Sequence[str], jobs: int, *settings: Any) -> Iterator[Row]:
    """A row for each training, then the medians of each way."""
    asked = [(way, seed) for seed in seeds for way in ways]
    rows: list[Row] = []
    with ProcessPoolExecutor(jobs) as pool:
        for row in pool.map(trained, *zip(*asked, strict=True), *([one] * len(asked) for one in settings)):
            rows.append(row)
            yield row
    for way in ways:
        own = [row for row in rows if row["way"] == way]
        names = [name for name in own[0] if name not in ("way", "seed")]
        yield {"way": way, "seed": "median"} | {
            name: _number(statistics.median(row[name] for row in own)) for name in names
        }


def speed(recipe: str, grid: Triple, pairs: int, device: str | None, ways: Sequence[str]) -> Iterator[Row]:
    """Milliseconds of a forward, each way against the paper's in turn the one or the other first."""
    from dataclasses import replace

    from lingen.recipe import load_recipe, load_stages

    from .build import denoiser, sample_inputs
    from .place import device_name, place_of
    from .timing import forward_work, milliseconds

    place = place_of(device)
    stage = load_stages(recipe)[-1].stage
    config = load_recipe(recipe, (), stage).model
    assert isinstance(config.mixer, dict)
    inputs = sample_inputs(config, grid, place.device)
    base = denoiser(replace(config, mixer=config.mixer | PAPER), place)
    for way in ways:
        other = denoiser(replace(config, mixer=config.mixer | PAPER | SPEED[way]), place)
        works = [forward_work(other, inputs), forward_work(base, inputs)]
        for work in works:
            milliseconds(work, place.device)
        ratios = []
        for pair in range(pairs):
            sides = (0, 1) if pair % 2 else (1, 0)
            took = {side: milliseconds(works[side], place.device) for side in sides}
            ratios.append(took[0] / took[1])
        yield {"way": way, "device": device_name(place.device), "grid": str(grid), "ratio": statistics.median(ratios),
               "ratios": ratios}  # fmt: skip
        del other


def _number(value: Any) -> float:
    return float(f"{float(value):.3g}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.yardsticks.time_order", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("act", choices=["reach", "review", "stripes", "task", "speed"])
    parser.add_argument("--grid", type=int, nargs=3, metavar=("T", "H", "W"))
    parser.add_argument("--dim", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--png", type=Path, help="reach, review: where pictures go")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(SPEED), help="task, speed: which ones")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--jobs", type=int, default=1, help="task: trainings at a time, one thread each")
    parser.add_argument("--recipe", default="t2v_68s")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    grids: dict[str, Triple] = {
        "reach": (69, 8, 8), "review": (34, 32, 32), "stripes": (32, 8, 8), "task": (32, 2, 2), "speed": (34, 32, 32)
    }  # fmt: skip
    grid: Triple = tuple(args.grid or grids[args.act])  # type: ignore[assignment]
    found = {
        "reach": lambda: reach(grid, args.dim or 64, args.seeds, args.png),
        "review": lambda: review(grid, args.dim or 64, args.seeds, args.png),
        "stripes": lambda: stripes(grid, args.dim or 64, args.seeds),
        "task": lambda: task(args.seeds, args.ways, args.jobs, grid, args.dim or 32, args.steps, args.batch, args.rate),
        "speed": lambda: speed(
            args.recipe, grid, args.pairs, args.device, [one for one in args.ways if one != "paper"]
        ),
    }[args.act]()
    rows: list[Row] = []
    for row in found:
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    print(as_table([{key: str(value) for key, value in row.items()} for row in rows], terminal=False))
    if args.json:
        kept = json.loads(args.json.read_text()) if args.json.exists() else {}
        kept[args.act] = {**head({}, program="python -m tests.yardsticks.time_order"), "rows": rows}
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
