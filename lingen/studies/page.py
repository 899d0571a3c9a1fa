"""The comparison as one page of HTML that needs nothing else: tables, curves as SVG, clips of the same prompts."""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import av
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from lingen.studies.compare import Compared, Curve, tables_of

MOST_BYTES, STRIP, POINTS = 3_000_000, 480, 400
"""Of all pictures; pixels across one; points of a curve."""
STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em;color:#222}
div{overflow-x:auto}table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #ccc;padding:.25em .6em;
text-align:left;vertical-align:top}th{background:#f3f3f3}svg,img{max-width:100%;height:auto}img{min-width:16em}"""


class Element(str):
    """An element of HTML; every other text is escaped."""


def page_of(found: dict[str, Any], runs: Sequence[Compared]) -> str:
    """The whole page of what `compare_runs` found."""
    overview, differ = tables_of(found)
    return whole_page(
        f"{found['metric']} of {len(runs)} runs",
        {
            "": table(overview), "Curves": _curves(found), "Settings that differ": table(differ) or "<p>None.</p>",
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


def _curves(found: dict[str, Any]) -> str:
    figure = Figure((10, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=found["at"])
    axes.set_ylabel(found["metric"], parse_math=False)
    lines = [draw(axes, [(x, math.nan if y is None else y) for x, y in one["curve"]]) for one in found["runs"]]
    for text in axes.legend(lines, [one["run"] for one in found["runs"]], fontsize=8).get_texts():
        text.set_parse_math(False)
    return svg_of(figure)


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
