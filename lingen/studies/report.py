"""What a run tells of itself, as one page of HTML in its folder that needs nothing else."""

import json
from html import escape
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from lingen.files import write_text
from lingen.launch.status import Status, status_of
from lingen.plan.loading import load_curriculum
from lingen.recipe import to_yaml
from lingen.recipe.reading import shipped_recipes
from lingen.studies.compare import Compared, cell_of, leaves, read_compared
from lingen.studies.page import MOST_BYTES, POINTS, sheets_of, strips_of, svg_of, table, whole_page
from lingen.training.folder import RunFolder

CURVES = {
    "loss": ("loss", "validation/loss"), "learning rate": ("lr",), "norm of the gradients": ("grad_norm",),
    "tokens a second": ("tokens_per_second",),
}  # fmt: skip
"""Label of a drawing -> columns of metrics.csv."""
SHEETS = 5
"""The most contact sheets of the page: the first, the last, and others between them."""


def write_report(folder: str | Path) -> Path:
    """Writes ``report.html`` into a run folder, finished or not, anew each time. RecipeError where it is none."""
    path, target = Path(folder), RunFolder(Path(folder)).report
    status = status_of(path)
    (run,) = read_compared([path])
    parts = {
        "": f"<p>{escape(_state(status))}</p>{table([_numbers(run)])}",
        "Curves": _curves(run, status),
        "Clips": _clips(run),
        "Score": _score(run),
        "Samples": _ledger(path),
        "Started again": _restarts(status),
        "Settings": _settings(run),
    }  # fmt: skip
    name = escape(f"{path.resolve().name}: a run of {run.settings.get('name', 'a recipe')}")
    write_text(target, whole_page(name, {title: part for title, part in parts.items() if part}))
    return target


def _state(status: Status) -> str:
    stages = ", ".join(f"{name} {one['step']:,} of {one['steps']:,} steps" for name, one in status.stages.items())
    return f"{status.state}{f': {status.reason}' if status.reason else ''}. Stages: {stages}."


def _score(run: Compared) -> str:
    rows = [
        {"attribute": name, "right": f"{one['share']:.0%} ({one['low']:.0%} to {one['high']:.0%})"}
        for name, one in run.scores.items()
    ]
    return table(rows) if rows else ""


def _restarts(status: Status) -> str:
    rows = [{"time": one["time"], "the start before it ended so": one["reason"]} for one in status.restarts]
    return table(rows) if rows else ""


def _numbers(run: Compared) -> dict[str, str]:
    return {name.replace("_", " "): cell_of(value) for name, value in run.about.items() if name not in ("run", "state")}


def _curves(run: Compared, status: Status) -> str:
    """A drawing for each label, over the steps of the whole run; lines where a stage begins."""
    figure = Figure((10, 6.5), layout="constrained")
    for axes, (label, names) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        axes.set_title(label, fontsize=10)
        begin = 0
        for stage in list(status.stages.values())[:-1]:
            begin += stage["steps"]
            axes.axvline(begin, color="#999", linewidth=0.8, linestyle="--")
        for name in names:
            curve = run.curve(name, "steps")
            thin = curve[:: 1 + len(curve) // POINTS] + curve[-1:]
            axes.plot(*zip(*thin, strict=True) if thin else ([], []), label=name, marker="." * (len(thin) < 30))
        if len(names) > 1:
            axes.legend(fontsize=8)
    return svg_of(figure)


def _clips(run: Compared) -> str:
    """A row for each prompt, a column for each of up to `SHEETS` steps."""
    sheets = sheets_of(run)
    chosen = sorted({round(n * (len(sheets) - 1) / (SHEETS - 1)) for n in range(SHEETS)}) if sheets else []
    rows: dict[str, dict[str, str]] = {}
    room = MOST_BYTES
    for number in chosen[::-1]:  # the last ones first, should there be too many for the page
        for prompt, strip in strips_of(sheets[number]):
            room -= len(strip)
            if room > 0:
                rows.setdefault(prompt, {})[sheets[number].parent.name] = strip
    names = [sheets[number].parent.name for number in chosen]
    shown = [{"prompt": prompt} | {name: row.get(name, "") for name in names} for prompt, row in rows.items()]
    return table(shown) if shown else ""


def _ledger(path: Path) -> str:
    """Samples of the stage trained last: used, retried, and dropped for which reasons."""
    file = RunFolder(path).ledger
    ledger = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    counts = {key: ledger.get(key, 0) for key in ("used", "retried", "truncated")} | ledger.get("dropped", {})
    return table([{what: cell_of(number) for what, number in counts.items()}]) if ledger else ""


def _settings(run: Compared) -> str:
    """Those that the recipe of that name, as it comes with lingen, has otherwise; and all of them."""
    usual: dict[str, str] = {}
    if (name := run.settings.get("name", "")) in shipped_recipes():
        usual = dict(leaves(yaml.safe_load(to_yaml(load_curriculum(name).base))))
    changed = [
        {"setting": key, "here": value, "in the recipe": usual[key]}
        for key, value in run.settings.items()
        if key in usual and usual[key] != value
    ]
    every = table([{"setting": key, "value": value} for key, value in run.settings.items()])
    return f"{table(changed) if changed else ''}<details><summary>All settings and versions</summary>{every}</details>"
