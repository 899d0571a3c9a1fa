"""Pages of HTML that need nothing else: runs side by side, and what a run tells of itself in its folder."""

import base64
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import av
import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from lingen.files import write_text
from lingen.launch.status import Status, status_of
from lingen.plan.loading import load_curriculum
from lingen.recipe import to_yaml
from lingen.recipe.reading import shipped_recipes
from lingen.run_folder.folder import RunFolder
from lingen.studies.compare import Compared, Curve, cell_of, leaves, read_compared, tables_of

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
    figure = Figure((10, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=found["at"])
    axes.set_ylabel(found["metric"], parse_math=False)
    lines = [draw(axes, [(x, math.nan if y is None else y) for x, y in one["curve"]]) for one in found["runs"]]
    for text in axes.legend(lines, [one["run"] for one in found["runs"]], fontsize=8).get_texts():
        text.set_parse_math(False)
    return whole_page(
        f"{found['metric']} of {len(runs)} runs",
        {
            "": table(overview), "Curves": svg_of(figure), "Settings that differ": table(differ) or "<p>None.</p>",
            "Clips of the same prompts": table(_samples(runs)) or "<p>There are none yet.</p>",
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


def draw(axes: Any, curve: Curve, label: str | None = None) -> Any:
    """The line of a curve, of `POINTS` at most and with dots where they are few."""
    thin = curve[:: 1 + len(curve) // POINTS] + curve[-1:]
    return axes.plot(*zip(*thin, strict=True) if thin else ([], []), label=label, marker="." * (len(thin) < 30))[0]


def svg_of(figure: Figure) -> str:
    """A drawing as an element of HTML."""
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):  # letters stay letters
        figure.savefig(drawn, format="svg")
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def _samples(runs: Sequence[Compared]) -> list[dict[str, str]]:
    """A row for each prompt, a column for each run: frames of its newest clip; up to `MOST_BYTES`."""
    newest = {run.about["run"]: sheets_of(run)[-1:] for run in runs}
    strips = {name: dict(row for sheet in sheets for row in strips_of(sheet)) for name, sheets in newest.items()}
    rows, room = list[dict[str, str]](), MOST_BYTES
    for prompt in dict.fromkeys(prompt for one in strips.values() for prompt in one):
        row = {"prompt": prompt} | {name: one.get(prompt, "") for name, one in strips.items()}
        room -= sum(map(len, row.values()))
        rows += [row] if room > 0 else [{"prompt": f"{prompt} (left out: the page would be too large)"}]
    return rows


def sheets_of(run: Compared) -> list[Path]:
    """The contact sheets of the clips of `sample.prompts`, from the first stage to the last."""
    found = (sorted(run.folder.path.glob(f"samples/{stage}-[0-9]*/sheet.png")) for stage in run.stages)
    return [sheet for each in found for sheet in each]


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
    path, target = Path(folder), RunFolder(Path(folder)).report
    status = status_of(path)
    (run,) = read_compared([path])
    numbers = {key.replace("_", " "): cell_of(one) for key, one in run.about.items() if key not in ("run", "state")}
    shares = {name: f"{one['share']:.0%} ({one['low']:.0%} to {one['high']:.0%})" for name, one in run.scores.items()}
    restarts = [{"time": one["time"], "the start before it ended so": one["reason"]} for one in status.restarts]
    stages = ", ".join(f"{name} {one['step']:,} of {one['steps']:,} steps" for name, one in status.stages.items())
    state = f"{status.state}{f': {status.reason}' if status.reason else ''}. Stages: {stages}."
    file = RunFolder(path).ledger
    ledger = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}  # of the stage trained last
    counts = {key: ledger.get(key, 0) for key in ("used", "retried", "truncated")} | ledger.get("dropped", {})
    parts = {
        "": f"<p>{escape(state)}</p>{table([numbers])}",
        "Curves": _curves(run, status),
        "Clips": _clips(run),
        "Score": table([{"attribute": name, "right": share} for name, share in shares.items()]),
        "Samples": table([{what: cell_of(number) for what, number in counts.items()}]) if ledger else "",
        "Started again": table(restarts),
        "Settings": _settings(run),
    }  # fmt: skip
    write_text(target, whole_page(f"{path.resolve().name}: a run of {run.settings.get('name', 'a recipe')}", parts))
    return target


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
            draw(axes, run.curve(name, "steps"), name)
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
    return table([{"prompt": prompt} | {name: row.get(name, "") for name in names} for prompt, row in rows.items()])


def _settings(run: Compared) -> str:
    """Those that the recipe of that name, as it comes with lingen, has otherwise; and all of them."""
    usual: dict[str, str] = {}
    if (name := run.settings.get("name", "")) in shipped_recipes():
        usual = dict(leaves(yaml.safe_load(to_yaml(load_curriculum(name).base))))
    own = [key for key in run.settings if key.startswith("stages.") and usual]
    shared = {key: re.sub(r"^stages\.[^.]+\.", "", key) for key in [*usual, *own]}  # what a stage takes, else
    both = {key: [one.get(key, one.get(shared[key], "-")) for one in (run.settings, usual)] for key in shared}
    changed = [{"setting": key, "here": a, "in the recipe": b} for key, (a, b) in both.items() if a != b]
    every = table([{"setting": key, "value": value} for key, value in run.settings.items()])
    return f"{table(changed)}<details><summary>All settings and versions</summary>{every}</details>"
