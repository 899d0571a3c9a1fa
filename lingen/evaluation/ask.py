"""`lingen eval A B`: from what is asked to results.json and results.png. Runs and weights files are sampled first."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lingen.data.batch import Progress
from lingen.evaluation.clips import ClipFile, check_paired, find_clips, holds_clips
from lingen.evaluation.comparison import REAL, compare_subjects, join_results, judge_all
from lingen.evaluation.judging import Judge
from lingen.evaluation.statistics import check_extra
from lingen.files import whole_file, write_json
from lingen.recipe.errors import RecipeError
from lingen.sampling.files import sample_to_files
from lingen.weights import find_weights

Bar = Callable[[str], AbstractContextManager[Progress]]


def answer(
    subjects: Sequence[str], judge: Callable[[], Judge], out: Path, bar: Bar,
    *, real: str | None = None, prompts: Sequence[str] = (), repeat: int = 1, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """What `compare_subjects` finds, also written as results.json and results.png into `out`. RecipeError for what
    cannot be judged or compared, before anything is sampled where that can be known.

    Args:
        subjects: folders of clips, runs, weights files, and results.json of before, which stands beside what is new.
        judge: makes the judge, once all that is asked for is there.
        prompts, repeat, seed: of clips that are sampled here; each subject should hold `repeat` clips of each prompt.
    """
    check_extra()
    paths = {name: Path(name) for name in subjects if not name.endswith(".json")}
    if not paths:
        raise RecipeError("Earlier results need clips to stand beside: name a folder, a run or a weights file, too.")
    weights = {name: find_weights(path) for name, path in paths.items() if not holds_clips(path)}
    if weights and not prompts:
        raise RecipeError(f"{next(iter(weights))} is to be sampled: give --prompts FILE, one on each line.")
    clips = {REAL: find_clips(Path(real))} if real else {}
    made, held, judged = judge(), dict[str, list[ClipFile]](), {}
    for name, path in paths.items():
        with bar(f"sampling {name}") as progress:
            asked = (out / "samples", prompts, repeat, seed, progress)
            held[name] = _sampled(weights[name], *asked) if name in weights else find_clips(path)
    takes = check_paired(held, prompts, repeat)
    for name, files in (held | clips).items():
        with bar(f"measuring {name}") as progress:
            wanted = [file.key for file in files] if name == REAL else takes
            judged[name] = judge_all(made, name, files, wanted, progress)
    found = compare_subjects(made, [judged[name] for name in held], judged.get(REAL))
    for name in (name for name in subjects if name.endswith(".json")):
        found = join_results(found, json.loads(Path(name).read_text(encoding="utf-8")), name)
    write_json(out / "results.json", found)
    _draw(found["results"], out / "results.png")
    return found


def _sampled(
    weights: Path, folder: Path, prompts: Sequence[str], repeat: int, seed: int, progress: Progress
) -> list[ClipFile]:
    """Samples those of the clips that are not there yet, into a folder of these weights and this seed."""
    about = weights.stat()
    words = f"{weights.resolve()} {about.st_size} {about.st_mtime_ns} {seed}"
    folder /= f"{weights.parent.name}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
    kept = find_clips(folder) if holds_clips(folder) else []
    counts = Counter(clip.prompt for clip in kept)
    left = [prompt for prompt in dict.fromkeys(prompts) if counts[prompt] < repeat]
    for clip in kept:
        if clip.prompt in left:
            clip.path.unlink()
    files = sample_to_files(weights, left, folder / f"{len(kept)}.mp4", repeat=repeat, seed=seed) if left else ()
    for done, _ in enumerate(files, start=1):
        progress(done, len(left) * repeat)
    return [clip for clip in find_clips(folder) if clip.prompt in prompts and clip.repetition < repeat]


def _draw(results: list[dict[str, Any]], path: Path) -> None:
    """A panel for each metric: subjects with their intervals, and the floor as a dashed line."""
    from matplotlib.figure import Figure

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
