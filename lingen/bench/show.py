"""Committed results beside the targets, and the tables of the performance page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lingen.bench.findings import table as exponents
from lingen.bench.receipt import as_markdown, number, source
from lingen.bench.results import Row, read_all
from lingen.bench.targets import PAPER_SIZES, TARGETS, VARIANTS, Target, row_of
from lingen.recipe.registry import RecipeError

Files = dict[str, Row]
"""Name of a result file -> what it holds."""

Lines = list[list[str]]
"""Rows of cells, the head first."""

MARK = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
"""Where a page holds a table: between these two comments."""


def read(folder: Path) -> Files:
    """All result files of a folder. RecipeError where there are none."""
    files = {name: file for name, file in read_all(folder) if "rows" in file}  # the loader's has a form of its own
    if not files:
        raise RecipeError(f"There are no result files in '{folder}'. Run in a checkout, or name their folder.")
    return files


def value_of(target: Target, files: Files) -> tuple[float | None, str]:
    """The value of the newest file that has one, and the file's name."""
    found = {name: target.find(file) for name, file in files.items()}
    dates = [(files[name].get("date", ""), name) for name, value in found.items() if value is not None]
    name = max(dates)[1] if dates else ""
    return found.get(name), name


def targets(files: Files) -> Lines:
    """Each bar with the paper's, stock's and our number, and whether it is reached."""
    lines = [["what", "paper", "stock parts", "to reach", "stretch", "ours", "", "file"]]
    for target in TARGETS:
        value, name = value_of(target, files)
        sign = ">=" if target.more else "<="
        bars = [f"{sign} {number(bar)}" if bar is not None else "" for bar in (target.reach, target.stretch)]
        what = f"{target.name} ({target.unit})" if target.unit else target.name
        known = [number(one) for one in (target.paper, target.stock)]
        lines.append([what, *known, *bars, number(value), target.verdict(value), name])
    return lines


def forwards(files: Files) -> Lines:
    """Every forward of a full depth."""
    lines = [["model", "layers", "kernels", "dtype", "tokens", "batch", "s per 100", "GiB", "TFLOP/s", "file"]]
    for name, file in files.items():
        for row in _rows(file, "forward"):
            rate = row["tflop"] / row["ms"] * 1e3 if row.get("tflop") else None
            model = "DiT" if row["mixer"] == "attention" else row["mixer"]
            lines.append(
                [
                    model, str(row["depth"]), row["kernel"], row["dtype"], f"{row['tokens']:,}", str(row["batch"]),
                    number(row["seconds_per_100"]), number(row.get("gib")), number(rate), name,
                ]
            )  # fmt: skip
    return lines


def ablation(files: Files) -> Lines:
    """The paper's latency table at 512x512, 17 s, beside ours: seconds, and the change against the default."""
    lines = [["512x512, 17 s", "paper, s", "against default", "ours, s", "against default"]]
    paper_default = VARIANTS[0].paper_seconds
    for variant in VARIANTS:
        wanted = {"name": "variant", "variant": variant.name, "tokens": PAPER_SIZES["512x512 17 s"].tokens}
        found = [row for file in files.values() if (row := row_of(file, **wanted))]
        ours = found[-1] if found else None
        cells = [number(ours["seconds_per_100"]), _change(ours["ms"] / ours["default_ms"])] if ours else ["", ""]
        change = _change(variant.paper_seconds / paper_default)
        lines.append([variant.name, number(variant.paper_seconds), change, *cells])
    return lines if any(line[3] for line in lines[1:]) else lines[:1]


def sampling(files: Files) -> Lines:
    """Real samplings."""
    lines = [["tokens", "dtype", "steps", "guidance", "passes", "seconds", "GiB", "file"]]
    for name, file in files.items():
        for row in _rows(file, "sampling"):
            lines.append(
                [
                    f"{row['tokens']:,}", row["dtype"], str(row["steps"]), number(row["guidance"]), row["passes"],
                    number(row["seconds"]), number(row.get("gib")), name,
                ]
            )  # fmt: skip
    return lines


def parts(files: Files) -> Lines:
    """Where the time of a forward goes."""
    lines = [["tokens", "dtype", "part", "ms", "share", "file"]]
    for name, file in files.items():
        for row in _rows(file, "part"):
            cells = [f"{row['tokens']:,}", row["dtype"], row["part"], number(row["ms"]), f"{row['share']:.1%}", name]
            lines.append(cells)
    return lines


def branches(files: Files) -> Lines:
    """Ours and stock parts, without projections."""
    lines = [["what", "tokens", "ours, ms", "stock, ms", "faster", "with backward", "stock", "faster", "file"]]
    for name, file in files.items():
        ours = [row for row in file["rows"] if "without projections" in row["name"] and row["kernel"] == "auto"]
        for row in ours:
            same = (row["name"], row["tokens"], "stock")
            stock = next(r for r in file["rows"] if (r["name"], r.get("tokens"), r.get("kernel")) == same)
            cells = [[row[f], stock[f], stock[f] / row[f]] for f in ("ms", "train_ms")]
            flat = [f"{number(a)}|{number(b)}|{c:.2f}x".split("|") for a, b, c in cells]
            lines.append([row["name"], f"{row['tokens']:,}", *flat[0], *flat[1], name])
    return lines


def kernels(files: Files) -> Lines:
    """Each kernel and its twins."""
    head = ["operation", "kernel", "tokens", "ms", "floor", "of roofline", "backward, ms", "its floor", "error"]
    lines = [[*head, "worst gradient", "file"]]
    for name, file in files.items():
        for row in file["rows"]:
            if "floor_ms" in row:
                gradient, worst = max((error, one) for one, error in row["gradient_errors"].items())
                lines.append(
                    [
                        row["name"], row["kernel"], f"{row['tokens']:,}", number(row["ms"]), number(row["floor_ms"]),
                        f"{row['of_roofline']:.0%}", number(row["backward_ms"]), number(row["backward_floor_ms"]),
                        f"{row['error']:.1e}", f"{gradient:.1e} ({worst})", name,
                    ]
                )  # fmt: skip
    return lines


def training(files: Files) -> Lines:
    """Forward and backward of single layers, times the depth."""
    lines = [["kernels", "tokens", "ms a layer", "tokens/s, full depth", "MFU", "file"]]
    for name, file in files.items():
        for row in _rows(file, "training"):
            lines.append(
                [
                    row["kernel"], f"{row['tokens']:,}", number(row["ms"]), number(row["tokens_per_second"]),
                    f"{row['mfu']:.1%} of {row['mfu_of']}" if "mfu" in row else "", name,
                ]
            )  # fmt: skip
    return lines


def autoencoder(files: Files) -> Lines:
    """Long clips through an autoencoder and back."""
    head = ["autoencoder", "weights", "way", "size", "frames", "dtype", "encode, s", "encoded/s", "encode, GiB"]
    lines = [[*head, "decode, s", "decoded/s", "decode, GiB", "in all, GiB", "file"]]
    for name, file in files.items():
        for row in _rows(file, "clip"):
            halves = []
            for half in ("encode", "decode"):
                seconds = row.get(f"{half}_s")
                rate = row["frames"] / seconds if seconds else None
                halves += [number(seconds) or row.get("note", ""), number(rate), number(row.get(f"{half}_gib"))]
            lines.append(
                [
                    row["autoencoder"], row["weights"], row["way"], _size(row), f"{row['frames']:,}", row["dtype"],
                    *halves, number(row.get("gib")), name,
                ]
            )  # fmt: skip
    return lines


def agreement(files: Files) -> Lines:
    """How far the ways of an autoencoder are from one call."""
    head = ["autoencoder", "weights", "dtype", "size", "frames", "exact: latents", "exact: pixels", "exact: PSNR"]
    lines = [[*head, "tiled: latents", "tiled: pixels", "tiled: PSNR", "file"]]
    for name, file in files.items():
        for row in _rows(file, "agreement"):
            cells = [
                f"{row[field]:{form}}" if (field := f"{way}_{what}") in row else ""
                for way in ("exact", "tiled")
                for what, form in (("latents", ".1e"), ("pixels", ".1e"), ("psnr", ".1f"))
            ]
            about = [row["autoencoder"], row["weights"], row["dtype"], _size(row), f"{row['frames']:,}"]
            lines.append([*about, *cells, name])
    return lines


def scaling(files: Files) -> Lines:
    """Exponents of the receipts."""
    found = [exponents(file) for file in files.values() if "fits" in file]
    return found[-1] if found else [["mixer", "FLOPs ~ n^", "time ~ n^", "memory ~ n^"]]


def sources(files: Files) -> Lines:
    """Where the measurements of each file come from."""
    measured = {
        name: file for name, file in files.items() if any({"tokens", "frames"} & row.keys() for row in file["rows"])
    }
    return [["file", "device, date, commit, command"]] + [[name, source(file)] for name, file in measured.items()]


TABLES = {
    "targets": targets, "forwards": forwards, "ablation": ablation, "sampling": sampling, "parts": parts,
    "branches": branches, "kernels": kernels, "training": training, "autoencoder": autoencoder, "agreement": agreement,
    "scaling": scaling, "sources": sources,
}  # fmt: skip
"""Name of a table on the page -> what makes it."""


def fill(page: str, files: Files) -> str:
    """The page with each of its tables made anew from the files. RecipeError for a table that does not exist."""

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise RecipeError(f"There is no table called '{name}'. Known: {', '.join(TABLES)}.")
        lines = TABLES[name](files)
        body = as_markdown(lines) if len(lines) > 1 else "Not measured yet."
        return f"<!-- table: {name} -->\n{body}\n<!-- end -->"

    return MARK.sub(made, page)


def _rows(file: Row, name: str) -> Sequence[Row]:
    return [row for row in file.get("rows", []) if row.get("name") == name]


def _size(row: Row) -> str:
    return "{}x{}".format(*row["size"])


def _change(share: float) -> str:
    return f"{share - 1:+.0%}"
