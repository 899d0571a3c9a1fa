"""Pages of HTML that need nothing else: runs side by side, and what a run tells of itself in its folder."""

import base64
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from lingen.files import write_text
from lingen.launch.status import status_of
from lingen.plan.loading import load_curriculum
from lingen.recipe import to_yaml
from lingen.recipe.reading import shipped_recipes
from lingen.studies.compare import Compared, Curve, cell_of, leaves, read_compared, stretches_of, tables_of

MOST_BYTES, STRIP, POINTS = 3_000_000, 480, 400
"""Of all pictures; pixels across one; points of a curve."""
CURVES = {
    "loss": ("loss", "validation/loss"), "learning rate": ("lr",), "norm of the gradients": ("grad_norm",),
    "tokens a second": ("tokens_per_second",),
}  # fmt: skip
"""Label of a drawing -> columns of metrics.csv."""
SHEETS = 5
"""The most contact sheets of the page: the first, the last, and others between them."""
STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em;color:#222}
div{overflow-x:auto}table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #ccc;padding:.25em .6em;
text-align:left;vertical-align:top}th{background:#f3f3f3}svg,img{max-width:100%;height:auto}img{min-width:16em}"""


class Element(str):
    """An element of HTML; every other text is escaped."""


def page_of(found: dict[str, Any], runs: Sequence[Compared]) -> str:
    """The whole page of what `compare_runs` found."""
    overview, differ = tables_of(found)
    curves = {run.about["run"]: run.curve(found["metric"], found["at"]) for run in runs}
    newest = {run.about["run"]: sheet for run in runs for sheet in sheets_of(run, 1).values()}
    return whole_page(
        f"{found['metric']} of {len(runs)} runs",
        {
            "": table(overview), "Curves": drawing({found["metric"]: curves}, found["at"]),
            "Settings that differ": table(differ) or "<p>None.</p>",
            "Clips of the same prompts": _clips(newest) or "<p>There are none yet.</p>",
        },
    )  # fmt: skip


def whole_page(name: str, parts: Mapping[str, str]) -> str:
    """A page of parts, which are HTML, each under its heading; one that is empty is left out."""
    title = escape(name)
    body = "".join(f"<h2>{heading}</h2>{part}" if heading else part for heading, part in parts.items() if part)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return f'<!doctype html><html lang="en">{head}<style>{STYLE}</style><main><h1>{title}</h1>{body}</main>'


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows, whose cells are escaped unless they are an `Element`; nothing for no rows."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, "") for name in names] for row in rows]
    lines = ["".join(f"<td>{one if isinstance(one, Element) else escape(one)}" for one in line) for line in cells]
    return f"<div><table><tr>{''.join(f'<th>{escape(one)}' for one in names)}<tr>{'<tr>'.join(lines)}</table></div>"


@rc_context({"svg.fonttype": "none", "text.parse_math": False})  # letters stay letters
def drawing(panels: Mapping[str, Mapping[str, Curve]], axis: str, borders: Sequence[float] = ()) -> str:
    """Curves by panel and label as an element of HTML, with dots where rows are few, and lines where a stage begins."""
    rows, columns = -(-len(panels) // 2), min(2, len(panels))
    figure, drawn = Figure((10, 2.5 + 2 * rows), layout="constrained"), io.StringIO()
    for axes, (title, curves) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items(), strict=True):
        axes.set(title=title, xlabel=axis)
        for border in borders:
            axes.axvline(border, color="#999", linewidth=0.8, linestyle="--")
        lines = dict[str, Any]()
        for label, piece in ((label, piece) for label, curve in curves.items() for piece in stretches_of(curve)):
            colour, thin = lines[label].get_color() if label in lines else None, piece[:: 1 + len(piece) // POINTS]
            places, values, *_ = zip(*thin, piece[-1], strict=True)
            (line,) = axes.plot(places, values, marker="." * (len(thin) < 30), color=colour)
            lines.setdefault(label, line)
        if len(curves) > 1:
            axes.legend(list(lines.values()), list(lines), fontsize=8)
    figure.savefig(drawn, format="svg")
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def sheets_of(run: Compared, most: int) -> dict[str, Path]:
    """The contact sheets of the clips of `sample.prompts` by stage and step, in order: the last, the first, and others
    between them."""
    found = [one for stage in run.stages for one in sorted(run.folder.path.glob(f"samples/{stage}-[0-9]*/sheet.png"))]
    numbers = {*np.linspace(len(found) - 1, 0, most).round().astype(int)} if found else set[int]()
    return {found[number].parent.name: found[number] for number in sorted(numbers)}


def strips_of(sheet: Path) -> Iterator[tuple[str, Element]]:
    """Prompt -> its row in a contact sheet, as a picture."""
    with suppress(OSError, ValueError, IndexError, ZeroDivisionError):  # it is being written
        clips, whole = sorted(sheet.parent.glob("[0-9]*.mp4")), Image.open(sheet).convert("RGB")
        height = whole.height // len(clips)
        for number, clip in enumerate(clips):
            with av.open(str(clip)) as file:
                prompt = file.metadata.get("title", clip.name)
            strip, data = whole.crop((0, number * height, whole.width, (number + 1) * height)), io.BytesIO()
            strip.thumbnail((STRIP, STRIP))
            strip.save(data, "jpeg", quality=80)
            url = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
            yield prompt, Element(f'<img alt="{escape(prompt)}" src="{url}">')


def write_report(folder: str | Path) -> Path:
    """Writes ``report.html`` into a run folder, finished or not, anew each time. RecipeError where it is none."""
    status, (run,) = status_of(folder), read_compared([folder])
    numbers = {key.replace("_", " "): cell_of(one) for key, one in run.about.items() if key not in ("run", "state")}
    numbers["most memory of a"] = status.most_memory() or "-"
    score = [
        {"attribute": name, "right": f"{one['share']:.0%} ({one['low']:.0%} to {one['high']:.0%})",
         "by chance": f"{one['chance']:.0%}"} for name, one in run.scores.items()
    ]  # fmt: skip
    curves = {label: {name: run.curve(name, "steps") for name in names} for label, names in CURVES.items()}
    borders = list(accumulate(stage["steps"] for stage in status.stages.values()))[:-1]
    restarts = [{"time": one["time"], "the start before it ended so": one["reason"]} for one in status.restarts]
    stages = ", ".join(f"{name} {one['step']:,} of {one['steps']:,} steps" for name, one in status.stages.items())
    state = f"{status.state}{f': {status.reason}' if status.reason else ''}. Stages: {stages}."
    ledger = json.loads(run.folder.ledger.read_text("utf-8")) if run.folder.ledger.is_file() else {}
    counts = {key: ledger.get(key, 0) for key in ("used", "retried", "truncated")} | ledger.get("dropped", {})
    parts = {
        "": f"<p>{escape(state)}</p>{table([numbers])}",
        "Curves": drawing(curves, "steps", borders),
        "Clips": _clips(sheets_of(run, SHEETS)),
        "Score": table(score),
        "Samples": table([{what: cell_of(number) for what, number in counts.items()}]) if ledger else "",
        "Started again": table(restarts),
        "Settings": _settings(run),
    }  # fmt: skip
    write_text(
        run.folder.report, whole_page(f"{run.about['run']}: a run of {run.settings.get('name', 'a recipe')}", parts)
    )
    return run.folder.report


def _clips(sheets: dict[str, Path]) -> str:
    """A row for each prompt, a column for each contact sheet, with pictures up to `MOST_BYTES`, the last ones first."""
    rows, room = dict[str, dict[str, str]](), MOST_BYTES
    for name in reversed(sheets):
        for prompt, strip in strips_of(sheets[name]):
            room -= len(strip)
            row = rows.setdefault(prompt, {"prompt": prompt} | dict.fromkeys(sheets, ""))
            row[name] = strip if room > 0 else "left out: the page would be too large"
    return table([*rows.values()])


def _settings(run: Compared) -> str:
    """Those that the recipe of that name, as it comes with lingen, has otherwise; and all of them."""
    usual: dict[str, str] = {}
    if (name := run.settings.get("name", "")) in shipped_recipes():
        usual = dict(leaves(yaml.safe_load(to_yaml(load_curriculum(name).base))))
    own = [key for key in run.settings if key.startswith("stages.") and usual]
    shared = {key: re.sub(r"^stages\.[^.]+\.", "", key) for key in [*usual, *own]}  # what a stage takes, else
    both = {key: [one.get(key, one.get(shared[key], "-")) for one in (run.settings, usual)] for key in shared}
    changed = [{"setting": key, "here": a, "in the recipe": b} for key, (a, b) in both.items() if a != b]
    unused = [one for one in run.settings if one.startswith("reconstruction.") and run.settings["trains"] == "denoiser"]
    every = table([{"setting": key, "value": value} for key, value in run.settings.items() if key not in unused])
    return f"{table(changed)}<details><summary>All settings and versions</summary>{every}</details>"
