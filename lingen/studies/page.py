"""The comparison as one page of HTML that needs nothing else: tables, curves as SVG, clips of the same prompts."""

import base64
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from html import escape
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
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>
<h1>{title}</h1>{_table(overview)}<h2>Curves</h2>{_curves(found)}<h2>Settings that differ</h2>{_table(differ)}
<h2>Clips of the same prompts</h2>{_table(clips) if clips else "<p>There are none yet.</p>"}"""


def _table(rows: Sequence[dict[str, str]]) -> str:
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
    found = (path for stage in run.stages for path in sorted(run.folder.path.glob(f"samples/{stage}-[0-9]*/sheet.png")))
    with suppress(OSError, ValueError, IndexError, ZeroDivisionError):  # there is none, or it is being written
        sheet = [*found][-1]
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
