"""`lingen eval A B`: subjects side by side; means over clips, distances to real clips, intervals, floors, and tests of
each pair. Runs and weights files are sampled first."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lingen.data.batch import Progress
from lingen.evaluation import statistics
from lingen.evaluation.clips import ClipFile, Key, check_length, check_paired, find_clips, holds_clips
from lingen.evaluation.judging import Judge, Judged
from lingen.evaluation.statistics import SEED, check_extra, holm, mean_interval, paired_p
from lingen.files import whole_file, write_json
from lingen.recipe.errors import RecipeError
from lingen.recipe.text import decode_json
from lingen.sampling.files import sample_to_files
from lingen.training.weights import recipe_of
from lingen.weights import find_weights

FEW = 2048
"""Clips below which a Frechet distance is mostly its bias."""
REAL = "real clips"
BLIND = "I3D hardly sees how things move: a claim about motion rests on motion, flicker, coherence and raters, too."


@dataclass(frozen=True)
class Entrant:
    """A subject's clips as they were measured, and why the others failed."""

    name: str
    judged: dict[Key, Judged]
    failures: dict[Key, str]

    def features(self, network: str, keys: Sequence[Key]) -> statistics.FeatureSet:
        rows = np.stack([self.judged[key].features[network] for key in keys])
        return statistics.FeatureSet(rows, [prompt for prompt, _ in keys])

    def metrics(self) -> dict[str, dict[Key, float]]:
        """Each measure by take. A failed clip follows no text; other measures lack it, and `failed clips` counts it."""
        found = {"failed clips": dict.fromkeys(self.judged, 0.0) | dict.fromkeys(self.failures, 1.0)}
        for key, one in self.judged.items():
            for name, value in one.values.items():
                wrong = dict.fromkeys(self.failures, 0.0) if name.startswith("text:") else {}
                found.setdefault(name, wrong)[key] = value
        return found


def _apart(takes: Iterable[Key]) -> bool:
    """Whether they are of two prompts or more: distances leave out pairs within one."""
    return len({prompt for prompt, _ in takes}) > 1


def judge_all(judge: Judge, name: str, clips: Sequence[ClipFile], takes: Sequence[Key], progress: Progress) -> Entrant:
    """Measures the clips of a subject; what is missing or cannot be read is a failure with its reason."""
    held, found = {clip.key: clip for clip in clips}, Entrant(name, {}, dict.fromkeys(takes, "missing"))
    for done, key in enumerate(takes, start=1):
        try:
            if key in held:
                found.judged[key] = judge(held[key])
                del found.failures[key]
        except (ValueError, OSError) as error:
            found.failures[key] = f"{held[key].path.name}: {error}"
        progress(done, len(takes))
    return found


def compare_subjects(judge: Judge, subjects: Sequence[Entrant], real: Entrant | None = None) -> dict[str, Any]:
    """``{results, comparisons, failures, notes, fingerprint}``, plain values; a result is {subject, metric, value,
    interval [low, high], n, floor}. RecipeError where subjects are stored by different codecs."""
    everyone = [*subjects, real] if real else list(subjects)
    codecs = {one.name: sorted({clip.codec for clip in one.judged.values()}) for one in everyone}
    used = sorted({codec for one in subjects for codec in codecs[one.name]})
    if len(used) > 1:
        raise RecipeError(f"Clips are stored by different codecs ({codecs}), which is judged, too: encode all alike.")
    results = []
    for subject, metric, held in ((one.name, *item) for one in everyone for item in one.metrics().items()):
        values, interval = list(held.values()), mean_interval(list(held.values()), [prompt for prompt, _ in held])
        results.append(_result(subject, metric, float(np.mean(values)), interval, len(values)))
    notes = [BLIND] if real and "i3d" in judge.networks else []
    able = [one for one in subjects if _apart(one.judged)]
    if real and not _apart(real.judged):
        notes.append("There are no distances: the real clips that could be read are of fewer than two prompts.")
    elif real and able and len(real.judged) > 3:
        if codecs[REAL] != used:
            notes.append(f"Real clips are stored as {codecs[REAL]}, the others as {used}: distances hold that, too.")
        n = min(len(real.judged) // 2, *(len(one.judged) for one in able))
        if n < FEW:
            notes.append(f"Frechet distances and FVD are of {n:,} clips a side: below {FEW:,} they are mostly bias.")
        for network in judge.networks:
            results += _distances(network, able, real, n)
    comparisons = [row for a, b in combinations(subjects, 2) for row in _pairs(a, b, [*judge.networks], real)]
    for row, p in zip(comparisons, holm([row["p"] for row in comparisons]), strict=True):
        row["holm"] = p
    takes = sorted({key for one in subjects for key in (*one.judged, *one.failures)})
    sets = {"takes": takes, "real": sorted(clip.sha256 for clip in real.judged.values()) if real else None}
    own = {"n": len(takes), "codec": used}
    own |= {name: hashlib.sha256(repr(held).encode()).hexdigest()[:16] for name, held in sets.items()}
    failures = {one.name: dict(Counter(one.failures.values())) for one in everyone}
    found = {"results": results, "comparisons": comparisons, "failures": failures, "notes": notes}
    return {**found, "fingerprint": judge.fingerprint | own}


def read_results(path: str) -> dict[str, Any]:
    """What an earlier results.json holds. RecipeError for any other file."""
    with suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
        found, drawn = decode_json(Path(path).read_bytes()), {"subject", "metric", "value", "interval", "floor"}
        if isinstance(found["fingerprint"], dict) and all(row.keys() >= drawn for row in found["results"]):
            return dict(found)
    raise RecipeError(f"{path} is not there, or no results.json of `lingen eval`.")


def join_results(found: dict[str, Any], earlier: dict[str, Any], path: object) -> dict[str, Any]:
    """An earlier result beside a new one. RecipeError where anything in their fingerprints differs."""
    ours, theirs = found["fingerprint"], earlier["fingerprint"]
    differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if differing:
        told = "; ".join(f"{key}: {theirs.get(key)} there, {ours.get(key)} here" for key in differing)
        raise RecipeError(f"{path} was measured differently and is not compared ({told}). Measure its clips again.")
    rows = [row for row in earlier["results"] if row["subject"] != REAL]
    return found | {"results": [*found["results"], *rows], "notes": [*found["notes"], f"{path}: no tests of pairs."]}


def _result(subject: str, metric: str, value: float, interval: Any, n: int, floor: Any = None) -> dict[str, Any]:
    shown = None if interval is None else [float(round(end, 12)) for end in interval]
    return {"subject": subject, "metric": metric, "value": value, "interval": shown, "n": n, "floor": floor}


def names_of(network: str) -> tuple[str, str]:
    """What the kernel and the Frechet distance of a network's features are called."""
    words = ("KVD", "FVD") if network == "i3d" else ("kernel distance", "Frechet distance")
    return f"{words[0]}, {network}", f"{words[1]}, {network}"


def _distances(network: str, subjects: Sequence[Entrant], real: Entrant, n: int) -> Iterator[dict[str, Any]]:
    """The kernel distance of all clips leads; the Frechet distance is of n on all sides, its floor too."""
    (kernel, frechet), there = names_of(network), real.features(network, list(real.judged))
    floor = statistics.frechet_floor(there.rows, n)
    for one in subjects:
        own = one.features(network, list(one.judged))
        distance, count = statistics.KernelDistance(own, there), len(own.rows)
        low = statistics.kernel_floor(there, count)
        yield _result(one.name, kernel, distance.value(), distance.interval(), count, low)
        some = [side.rows[np.random.default_rng(SEED).permutation(len(side.rows))[:n]] for side in (own, there)]
        yield _result(one.name, frechet, statistics.frechet_distance(*some), None, n, floor)


def _pairs(a: Entrant, b: Entrant, networks: Sequence[str], real: Entrant | None) -> Iterator[dict[str, Any]]:
    """What differs between two subjects on the takes that both have, and how likely that is by chance."""
    shown, theirs = {"first": a.name, "second": b.name}, b.metrics()
    for name, held in a.metrics().items():
        keys = [key for key in held if key in theirs.get(name, {})]
        first, second = [held[key] for key in keys], [theirs[name][key] for key in keys]
        if keys:
            difference, p = float(np.mean(first) - np.mean(second)), paired_p(first, second, [key[0] for key in keys])
            yield {"metric": name, **shown, "difference": difference, "n": len(keys), "p": p}
    keys = [key for key in a.judged if key in b.judged]
    if real is None or not (_apart(keys) and _apart(real.judged)):
        return
    for network in networks:
        sides = [one.features(network, held) for one, held in ((a, keys), (b, keys), (real, [*real.judged]))]
        difference, p = statistics.paired_kernel_p(*sides)
        yield {"metric": names_of(network)[0], **shown, "difference": difference, "n": len(keys), "p": p}


def evaluate_clips(
    subjects: Sequence[str], judge: Callable[[], Judge], out: Path, bar: Callable[[str], Any],
    *, real: str | None = None, prompts: Sequence[str] = (), repeat: int = 1, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """What `compare_subjects` finds, also written as results.json and results.png into `out`. RecipeError for what
    cannot be judged or compared. `subjects`: folders of clips, runs, weights files, and results.json of before, which
    stands beside what is new; `judge` is made once they are there; each should hold `repeat` clips of each prompt."""
    check_extra()
    paths = {name: Path(name) for name in subjects if not name.endswith(".json")}
    if not paths:
        raise RecipeError("Earlier results need clips to stand beside: name a folder, a run or a weights file, too.")
    earlier = {name: read_results(name) for name in subjects if name not in paths}
    weights = {name: find_weights(path) for name, path in paths.items() if not holds_clips(path)}
    if weights and not prompts:
        raise RecipeError(f"{next(iter(weights))} is to be sampled: give --prompts FILE, one on each line.")
    clips = {REAL: find_clips(Path(real))} if real else {}
    made, judged = judge(), {}
    for name, file in weights.items():
        check_length(name, recipe_of(file).data, made.view)
    for name, file in weights.items():
        with bar(f"sampling {name}") as progress:
            paths[name] = _sampled(file, out, list(dict.fromkeys(prompts)), repeat, seed, progress)
    held = {name: find_clips(path) for name, path in paths.items()}
    takes = check_paired(held, prompts, repeat)
    for name, files in (held | clips).items():
        with bar(f"measuring {name}") as progress:
            judged[name] = judge_all(made, name, files, takes if name in held else [f.key for f in files], progress)
    found = compare_subjects(made, [judged[name] for name in held], judged.get(REAL))
    for name, before in earlier.items():
        found = join_results(found, before, name)
    write_json(out / "results.json", found)
    _draw(found["results"], out / "results.png")
    return found


def _sampled(weights: Path, out: Path, prompts: Sequence[str], repeat: int, seed: int, progress: Progress) -> Path:
    """A folder of clips of these weights, this seed and these prompts; it is sampled where it is not complete."""
    about = weights.stat()
    words = repr((str(weights.resolve()), about.st_size, about.st_mtime_ns, prompts, repeat, seed))
    folder = out / "samples" / f"{weights.parent.name}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
    if len([*folder.glob("*.mp4")]) < len(prompts) * repeat:
        files = sample_to_files(weights, prompts, folder / "clip.mp4", repeat=repeat, seed=seed)
        for done, _ in enumerate(files, start=1):
            progress(done, len(prompts) * repeat)
    return folder


def _draw(results: list[dict[str, Any]], path: Path) -> None:
    """A panel for each metric: subjects with their intervals, and the floor as a dashed line."""
    metrics = list(dict.fromkeys(row["metric"] for row in results))
    figure = Figure(figsize=(13, 2.2 * -(-len(metrics) // 4)), layout="constrained")
    for number, metric in enumerate(metrics, start=1):
        panel = figure.add_subplot(-(-len(metrics) // 4), 4, number, title=metric, yticks=[])
        panel.margins(0.2)
        for place, row in enumerate(one for one in results if one["metric"] == metric):
            panel.plot(row["interval"] or [row["value"]] * 2, [place, place], color="0.5")
            panel.plot(row["value"], place, "o")
            panel.annotate(row["subject"], (row["value"], place), (0, 4), textcoords="offset points", fontsize=7)
            if row["floor"] is not None:
                panel.axvline(row["floor"], linestyle="--", color="0.7")
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=80)
