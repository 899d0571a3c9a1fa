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

from lingen.studies.compare import Compared, tables_of

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
    title, clips = escape(f"{found['metric']} of {len(runs)} runs"), _samples(runs)
    return whole_page(
        title,
        {
            "": table(overview), "Curves": _curves(found), "Settings that differ": table(differ),
            "Clips of the same prompts": table(clips) if clips else "<p>There are none yet.</p>",
        },
    )  # fmt: skip


def whole_page(title: str, parts: Mapping[str, str]) -> str:
    """A page of parts, each under its heading.

    Args:
        title: escaped, as the parts are.
    """
    body = "".join(f"<h2>{name}</h2>{part}" if name else part for name, part in parts.items())
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return f'<!doctype html><html lang="en">{head}<style>{STYLE}</style><main><h1>{title}</h1>{body}</main>'


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows, whose cells are escaped unless they are an `Element`."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, "") for name in names] for row in rows]
    lines = ["".join(f"<td>{one if isinstance(one, Element) else escape(one)}" for one in line) for line in cells]
    return f"<div><table><tr>{''.join(f'<th>{escape(one)}' for one in names)}<tr>{'<tr>'.join(lines)}</table></div>"


def _curves(found: dict[str, Any]) -> str:
    figure = Figure((10, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=found["at"])
    axes.set_ylabel(found["metric"], parse_math=False)
    lines = []
    for one in found["runs"]:
        curve = [(x, math.nan if y is None else y) for x, y in one["curve"]]
        thin = curve[:: 1 + len(curve) // POINTS] + curve[-1:]
        lines += axes.plot(*zip(*thin, strict=True) if thin else ([], []), marker="." if len(thin) < 30 else None)
    for text in axes.legend(lines, [one["run"] for one in found["runs"]], fontsize=8).get_texts():
        text.set_parse_math(False)
    return svg_of(figure)


def svg_of(figure: Figure) -> str:
    """A drawing as an element of HTML."""
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):  # letters stay letters
        figure.savefig(drawn, format="svg")
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def _samples(runs: Sequence[Compared]) -> list[dict[str, str]]:
    """A row for each prompt, a column for each run: frames of its newest clip; up to `MOST_BYTES`."""
    strips, rows, room = {run.about["run"]: dict(_strips(run)) for run in runs}, list[dict[str, str]](), MOST_BYTES
    for prompt in dict.fromkeys(prompt for one in strips.values() for prompt in one):
        row = {"prompt": prompt} | {name: one.get(prompt, "") for name, one in strips.items()}
        room -= sum(map(len, row.values()))
        rows += [row] if room > 0 else [{"prompt": f"{prompt} (left out: the page would be too large)"}]
    return rows


def _strips(run: Compared) -> Iterator[tuple[str, str]]:
    """Prompt -> its row in the contact sheet of the clips that were sampled last."""
    return strips_of(sheets[-1]) if (sheets := sheets_of(run)) else iter(())


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
