"""The tables of `lingen ablate` from what its folders hold, training nothing: runs that are not whole are left out.

    python -m tests.yardsticks.ablate_tables runs/range/study [runs/range/adapt ...] [--out JSON] [--picture PNG]

A folder may have been brought from another machine without its checkpoints: what counts is run.json, recipe.yaml and
metrics.csv. A run is whole where its last row is of its last stage's last step."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from lingen.cli.command import print_table
from lingen.run_folder.folder import RunFolder
from lingen.studies.ablation import BASELINE, VARIANTS, effects_of
from lingen.studies.compare import Compared, cell_of, read_compared
from lingen.studies.grid import GridRun

NAME = re.compile(r"(?P<variant>\w+)(-[0-9a-f]{8})?,seed=(?P<seed>\d+)(-[0-9a-f]{8})?")


def steps_of(run: Compared) -> int:
    """That the whole run has, by the recipe in its folder."""
    if run.stages and f"stages.{run.stages[0]}.train.steps" not in run.settings:
        own = [run.settings.get(f"stages.{stage}.train.steps", run.settings["train.steps"]) for stage in run.stages]
    else:
        own = [run.settings[f"stages.{stage}.train.steps"] for stage in run.stages] or [run.settings["train.steps"]]
    return sum(int(one.replace(",", "")) for one in own)


def study_of(folder: Path) -> dict[str, Any]:
    """Tables and curves of a folder of runs, and which runs are missing or not whole."""
    metric = json.loads((folder / "metric.json").read_text(encoding="utf-8"))
    named = {path.parent: NAME.fullmatch(path.parent.name) for path in sorted(folder.glob("*/run.json"))}
    keys = {path: (found["variant"], int(found["seed"])) for path, found in named.items() if found}
    planned = [BASELINE, *VARIANTS]
    order = {name: place for place, name in enumerate(planned)}
    keys = dict(sorted(keys.items(), key=lambda one: (order.get(one[1][0], len(order)), one[1])))
    runs = dict(zip(keys.values(), read_compared(list(keys)), strict=True)) if keys else {}
    whole = {key: run for key, run in runs.items() if run.about["steps"] == steps_of(run)}
    grid: Any = {key: GridRun(RunFolder(run.folder.path), None) for key, run in whole.items()}  # type: ignore[arg-type]
    rows = [row for axis in ("steps", "flops") for row in effects_of(grid, metric, axis)] if grid else []
    told = [
        {"run": run.about["run"], "parameters": run.about["parameters"], "flop": run.about["flop"],
         "seconds": round(run.about["seconds"], 1), "depth": run.settings.get("model.depth"),
         "curve": [[step, float(f"{value:.5g}")] for step, value, *_ in run.curve(metric, "steps")]}
        for run in whole.values()
    ]  # fmt: skip
    left = {run.about["run"]: run.about["steps"] for key, run in runs.items() if key not in whole}
    return {"metric": metric, "results": rows, "runs": told, "not whole, steps": left}


def draw(found: dict[str, Any], path: Path) -> None:
    """A panel for each folder: the metric over steps, a thin line for a run and a thick one for a variant's mean."""
    figure = Figure((5.5 * len(found), 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, study) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        variants: dict[str, list[dict[int, float]]] = {}
        for run in study["runs"]:
            variants.setdefault(run["run"].partition(",")[0], []).append(dict(run["curve"]))
        for number, (variant, curves) in enumerate(variants.items()):
            for curve in curves:
                axes.plot(*zip(*curve.items(), strict=True), color=f"C{number}", linewidth=0.6, alpha=0.5)
            steps = sorted(set.intersection(*map(set, curves)))
            mean = [sum(curve[step] for curve in curves) / len(curves) for step in steps]
            axes.plot(steps, mean, color=f"C{number}", linewidth=2.2, label=f"{variant} ({len(curves)})")
        axes.set(title=name, xlabel="steps", ylabel=study["metric"], yscale="log")
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--note", action="append", default=[], metavar="KEY=TEXT", help="put into the file")
    args = parser.parse_args()
    found = {folder.name: study_of(folder) for folder in args.folders}
    for name, one in found.items():
        print(f"{name}: {len(one['runs'])} whole runs; not whole: {one['not whole, steps'] or 'none'}")
        print_table([{key: cell_of(value) for key, value in row.items()} for row in one["results"]])
        print_table([{key: cell_of(value) for key, value in run.items() if key != "curve"} for run in one["runs"]])
    if args.picture:
        draw(found, args.picture)
    if args.out:
        notes = dict(note.split("=", 1) for note in args.note)
        args.out.write_text(json.dumps({**notes, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
