"""`lingen eval selftest`: which metric of `lingen eval` sees what? Clips are damaged in six ways at five strengths, and
each damaged set stands against the undamaged one as two models would. Beside it the coverage of every interval, by
simulation (`coverage`)."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from lingen.data.batch import Progress
from lingen.data.shards import read_shard
from lingen.data.synthetic import captions, draw_clip
from lingen.evaluation import distances
from lingen.evaluation.clips import CLIP_ENDS, View, show_clip
from lingen.evaluation.comparison import REAL, Entrant, compare_subjects, names_of
from lingen.evaluation.judging import Judge, Judged
from lingen.evaluation.statistics import SEED, holm
from lingen.metrics.measures import measure_shapes
from lingen.recipe.errors import RecipeError

Frames = np.ndarray
"""uint8 [t h w 3]"""

SEEN = 0.05
"""Holm's p over all metrics of a comparison, below which a damage counts as seen."""
SWAPS = 199
"""Permutations of the test of Frechet distances."""
JUDGED_SIDE = 48
"""Pixels at which the judge of shapes looks: its thresholds are for small clips."""


def blur(clip: Frames, sigma: float, rng: np.random.Generator) -> Frames:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in clip])


def noise(clip: Frames, sigma: float, rng: np.random.Generator) -> Frames:
    return (clip + rng.normal(0, sigma, clip.shape)).round().clip(0, 255).astype(np.uint8)


def shuffle(clip: Frames, window: float, rng: np.random.Generator) -> Frames:
    """Frames change places within windows of so many."""
    order = np.arange(len(clip))
    for start in range(0, len(clip), int(window)):
        rng.shuffle(order[start : start + int(window)])
    return clip[order]


def freeze(clip: Frames, share: float, rng: np.random.Generator) -> Frames:
    """The picture stands still for the last share of the clip."""
    return clip[np.minimum(np.arange(len(clip)), max(0, round(len(clip) * (1 - share)) - 1))]


def reverse(clip: Frames, share: float, rng: np.random.Generator) -> Frames:
    """The first share of the clip runs backwards."""
    end = round(len(clip) * share)
    return np.concatenate([clip[:end][::-1], clip[end:]])


def drift(clip: Frames, degrees: float, rng: np.random.Generator) -> Frames:
    """The hue turns steadily, by so many degrees at the end."""
    turned = []
    for frame, turn in zip(clip, np.linspace(0, degrees, len(clip)), strict=True):
        hsv = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV_FULL)
        hsv[..., 0] += np.uint8(round(turn * 256 / 360) % 256)
        turned.append(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL))
    return np.stack(turned)


DAMAGES: dict[str, tuple[Any, tuple[float, ...], str]] = {
    "blur": (blur, (0.5, 1, 2, 4, 8), "standard deviation, pixels of 224"),
    "noise": (noise, (2, 5, 10, 20, 40), "standard deviation, of 255"),
    "shuffle": (shuffle, (2, 3, 4, 8, 16), "frames in a window"),
    "freeze": (freeze, (0.125, 0.25, 0.5, 0.75, 1), "share of the clip"),
    "reversal": (reverse, (0.25, 0.5, 0.75, 0.875, 1), "share of the clip"),
    "hue drift": (drift, (10, 20, 45, 90, 180), "degrees over the clip"),
}


class Source(NamedTuple):
    """A piece of a clip."""

    name: str
    frames: Frames
    prompt: str


def pieces_of(folder: Path, view: View) -> Iterator[Source]:
    """Every whole piece of `view.frames` of the clips of a folder: MP4 files, or shards of `lingen data fetch`.
    RecipeError for a folder without clips; clips that are too short are left out."""
    tars = sorted(folder.glob("*video*.tar"))
    files: list[tuple[str, bytes]] = [
        (one["__key__"], one[end[1:]]) for tar in tars for one in read_shard(tar) for end in CLIP_ENDS if end[1:] in one
    ]
    if folder.is_dir():
        files += [(one.stem, one.read_bytes()) for one in sorted(folder.iterdir()) if one.suffix.lower() in CLIP_ENDS]
    if not files:
        raise RecipeError(f"{folder} holds no clips and no shards of them: lingen data fetch footage, for instance.")
    for name, data in files:
        try:
            shown, _ = show_clip(data, view)
        except ValueError:  # too short
            continue
        for start in range(0, len(shown) - view.frames + 1, view.frames):
            yield Source(f"{name}:{start}", shown[start : start + view.frames], "")


def drawn(n: int, view: View) -> Iterator[Source]:
    """Clips of the shapes data set, which need no download."""
    rng, texts = np.random.default_rng(SEED), captions()
    for number in range(n):
        prompt = texts[number * 29 % len(texts)]  # 29 and 84 have no common divisor
        yield Source(f"{number}", draw_clip(prompt, (view.side,) * 2, view.frames, rng), prompt)


def _measured(judge: Judge, source: Source, damage: str | None, strength: float, number: int) -> Judged:
    torch.set_num_threads(1)  # several threads for one clip are slower than one for each of several
    frames, rng = source.frames, np.random.default_rng((SEED, number))
    if damage:
        frames = DAMAGES[damage][0](frames, strength, rng)
    found = judge.measure(np.ascontiguousarray(frames), source.prompt)
    if source.prompt:
        small = [cv2.resize(frame, (JUDGED_SIDE,) * 2, interpolation=cv2.INTER_AREA) for frame in frames]
        found.values.update(measure_shapes(np.stack(small), source.prompt))
    return found


class Remembered(torch.nn.Module):
    """A network of single frames that sees each only once: half of the damages only change their order."""

    video = False

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network, self.known = network, dict[bytes, torch.Tensor]()

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        keys = [hashlib.sha256(frame.numpy().tobytes()).digest() for frame in frames]
        new = [number for number, key in enumerate(keys) if key not in self.known]
        if new:
            self.known |= dict(zip([keys[number] for number in new], self.network(frames[new]), strict=True))
        return torch.stack([self.known[key] for key in keys])


_work: Any = None
"""What forked workers do, so that neither networks nor clips are sent to them."""


def _at(place: tuple[str | None, float, int]) -> Judged:
    return _work(*place)


def measure_all(
    judge: Judge, sources: Sequence[Source], n: int, jobs: int, progress: Progress
) -> dict[tuple[str | None, float], list[Judged]]:
    """Measures of the first n as they are and damaged, and under (None, 1) of the others."""
    global _work
    torch.set_num_threads(1)  # before the fork
    judge.networks = {k: one if one.video else Remembered(one) for k, one in judge.networks.items()}
    _work = lambda damage, strength, number: _measured(judge, sources[number], damage, strength, number)  # noqa: E731
    asked: list[tuple[str | None, float, int]] = [(None, float(k >= n), k) for k in range(len(sources))]
    asked += [(name, s, k) for name, (_, strengths, _) in DAMAGES.items() for s in strengths for k in range(n)]
    found: dict[tuple[str | None, float], list[Judged]] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        results = map(_at, asked) if jobs == 1 else pool.map(_at, asked)
        for done, (place, one) in enumerate(zip(asked, results, strict=True), start=1):
            found.setdefault(place[:2], []).append(one)
            progress(done, len(asked))
    return found


def frechet_p(first: np.ndarray, second: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Frechet distance of `first` to the real clips minus that of `second`, and p of "as far": they change places
    within each clip. `lingen eval` has no such test."""
    rng, pick = np.random.default_rng(SEED), np.random.default_rng(SEED).permutation(len(real))[: len(first)]
    apart = []
    for swap in np.concatenate([np.zeros((1, len(first))), rng.integers(0, 2, (SWAPS, len(first)))]).astype(bool):
        sides = np.where(swap[:, None], second, first), np.where(swap[:, None], first, second)
        apart.append(np.subtract(*(distances.frechet_distance(one, real[pick]) for one in sides)))
    return float(apart[0]), float((np.abs(apart) >= abs(apart[0]) * (1 - 1e-9)).mean())


def compared(judge: Judge, damaged: Entrant, clean: Entrant, real: Entrant) -> dict[str, dict[str, float]]:
    """Metric -> value of either set, effect and Holm's p. The effect is the difference in standard deviations of
    undamaged clips; of a distance in floors (what real clips have among themselves)."""
    found, spread = compare_subjects(judge, [damaged, clean], real), clean.metrics()
    rows = {(row["subject"], row["metric"]): row for row in found["results"]}
    tests = {row["metric"]: row for row in found["comparisons"] if row["metric"] != "failed clips"}
    for network in judge.networks:
        sides = [one.features(network, list(one.judged)).rows for one in (damaged, clean, real)]
        difference, p = frechet_p(*sides)
        tests[names_of(network)[1]] = {"difference": difference, "p": p}
    shown: dict[str, dict[str, float]] = {}
    for (metric, test), p in zip(tests.items(), holm([one["p"] for one in tests.values()]), strict=True):
        one, other = rows["damaged", metric], rows["clean", metric]
        unit = one["floor"] or float(np.std(list(spread[metric].values()))) or 1.0
        effect = test["difference"] / unit
        shown[metric] = {"clean": other["value"], "damaged": one["value"], "effect": effect, "p": p}
    return shown


def selftest(judge: Judge, sources: Sequence[Source], n: int, jobs: int, progress: Progress) -> list[dict[str, Any]]:
    """A row for each metric and damage: value without it, values, effects and p at each strength, and the weakest
    strength from which on it is seen (1 to 5, None: not at the strongest)."""
    if len(sources) < 3 * n:
        raise RecipeError(
            f"There are {len(sources)} pieces of {judge.view.frames} frames, and --clips {n} needs {3 * n}: {n} to "
            "damage, and twice as many real ones. Name more folders, or lower --clips."
        )
    held = measure_all(judge, sources, n, jobs, progress)

    def entrant(name: str, judged: Sequence[Judged], first: int = 0) -> Entrant:
        return Entrant(name, {(sources[first + k].name, 0): one for k, one in enumerate(judged)}, {})

    clean, real = entrant("clean", held[None, 0.0]), entrant(REAL, held[None, 1.0], n)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for damage, (_, strengths, _) in DAMAGES.items():
        for strength in strengths:
            for metric, one in compared(judge, entrant("damaged", held[damage, strength]), clean, real).items():
                about = {"damage": damage, "metric": metric, "clean": _short(one["clean"])}
                row = rows.setdefault((damage, metric), about)
                for key in ("damaged", "effect", "p"):
                    row.setdefault(key, []).append(_short(one[key]))
    for row in rows.values():
        blind = [number for number, p in enumerate(row["p"], start=1) if p >= SEEN]
        row["from"] = None if 5 in blind else max(blind, default=0) + 1
    return list(rows.values())


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def table_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """A line for each metric: in each column the weakest strength that is seen, and the effect of the strongest."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(row["metric"], {"metric": row["metric"]})
        line[row["damage"]] = f"{row['from'] or '-'} ({row['effect'][-1]:+.2g})"
    return list(lines.values())


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Metrics over damages and strengths: the effect as a colour, a dot where it is seen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    figure = Figure(figsize=(12, 0.26 * len(metrics) + 1.2), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    axes, image = figure.subplots(1, len(DAMAGES), sharey=True), None
    for panel, (damage, (_, strengths, unit)) in zip(axes, DAMAGES.items(), strict=True):
        own = {row["metric"]: row for row in rows if row["damage"] == damage}
        effects = np.array([own[metric]["effect"] for metric in metrics])
        image = panel.imshow(effects, cmap="RdBu_r", norm=SymLogNorm(0.1, vmin=-30, vmax=30), aspect="auto")
        seen = np.argwhere(np.array([own[metric]["p"] for metric in metrics]) < SEEN)
        panel.plot(seen[:, 1], seen[:, 0], "k.", markersize=4)
        panel.set_title(damage, fontsize=9)
        panel.set_xticks(range(5), [f"{one:g}" for one in strengths], fontsize=7)
        panel.set_xlabel(unit, fontsize=7)
    axes[0].set_yticks(range(len(metrics)), metrics, fontsize=7)
    bar = figure.colorbar(image, ax=axes, ticks=[-10, -1, 0, 1, 10])
    bar.set_label("effect", fontsize=8)
    figure.savefig(path)
