"""Stored results beside the targets, and the tables of docs/performance.md."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from lingen.recipe.errors import RecipeError

from . import targets
from .paper import PAPER_SIZES, VARIANTS
from .receipt import EXPONENTS, MEASURED
from .results import Fields
from .tables import Files, Table, as_markdown, every, named, ratio, row_of, source

MARK = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
"""Where a page holds a table: between these two comments."""


def read(folder: Path) -> Files:
    """All result files of a folder, by name. RecipeError where there are none."""
    held = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    # Those of the loader, of studies of the model and of evaluation have forms of their own.
    files = {name: file for name, file in held.items() if all("name" in row for row in file.get("rows", [{}]))}
    if not files:
        raise RecipeError(f"There are no result files in '{folder}'. Run in a checkout, or name their folder.")
    return files


def fill(page: str, files: Files) -> str:
    """The page with each of its tables made anew from the files. RecipeError for a table that does not exist."""

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name not in PAGE:
            raise RecipeError(f"There is no table called '{name}'. Known: {', '.join(PAGE)}.")
        lines = PAGE[name].lines(files)
        return f"<!-- table: {name} -->\n{as_markdown(lines) if len(lines) > 1 else 'Not measured yet.'}\n<!-- end -->"

    return MARK.sub(made, page)


def _ablation(files: Files) -> Iterator[Fields]:
    """The paper's variants at 512x512, 17 s, with our last row of each; nothing where none was measured."""
    wanted = {"name": "variant", "tokens": PAPER_SIZES["512x512 17 s"].tokens}
    found = [row_of(file, **wanted, variant=one.name) for file in files.values() for one in VARIANTS]
    ours = {row["variant"]: row for row in found if row}
    for variant in VARIANTS if ours else ():
        row = ours.get(variant.name, {})
        paper = {"paper": variant.paper_seconds, "paper_change": variant.paper_seconds / VARIANTS[0].paper_seconds - 1}
        change = {"change": row["ms"] / row["default_ms"] - 1} if row else {}
        yield {"variant": variant.name, **row, **paper, **change}


def _branches(files: Files) -> Iterator[Fields]:
    """Our parts without projections, with stock's times of the same file."""
    for row in every(files):
        if "without projections" in row["name"] and row["kernel"] == "auto":
            stock = row_of(files[row["file"]], name=row["name"], tokens=row["tokens"], kernel="stock")
            for field in ("ms", "train_ms"):
                row |= {f"stock_{field}": stock[field], f"{field}_faster": f"{stock[field] / row[field]:.2f}x"}
            yield row


def _worst_gradient(row: Fields) -> str:
    error, name = max((error, name) for name, error in row["gradient_errors"].items())
    return f"{error:.1e} ({name})"


def _shares(row: Fields) -> str:
    whole = sum(row["parts"].values())
    return ", ".join(f"{part} {ms / whole:.0%}" for part, ms in row["parts"].items())


def _sources(files: Files) -> Iterator[Fields]:
    """Files of measurements of tokens or frames, and of their speed."""
    for name, file in files.items():
        if any({"tokens", "tokens_per_second", "frames"} & row.keys() for row in file["rows"]):
            yield {"file": name, "source": source(file)}


PAGE = {
    "targets": Table(
        targets.targets,
        "what | paper | stock parts=stock | to reach=reach | stretch | ours | =verdict | file",
    ),
    "forwards": Table(
        named("forward"),
        "model | layers=depth | kernels=kernel | dtype | tokens | batch | s per 100=seconds_per_100 | GiB=gib | "
        "TFLOP/s=rate | file",
        {
            "model": lambda row: "DiT" if row["mixer"] == "attention" else row["mixer"],
            "rate": lambda row: 1e3 * row["tflop"] / row["ms"] if row.get("tflop") else None,
        },
    ),
    "ablation": Table(
        _ablation,
        "512x512, 17 s=variant | paper, s=paper | against default=paper_change:+.0% | ours, s=seconds_per_100 | "
        "against default=change:+.0%",
    ),
    "sampling": Table(named("sampling"), "tokens | dtype | steps | guidance | passes | seconds | GiB=gib | file"),
    "parts": Table(named("part"), "tokens | dtype | part | ms | share=share:.1% | file"),
    "branches": Table(
        _branches,
        "what=name | tokens | ours, ms=ms | stock, ms=stock_ms | faster=ms_faster | with backward=train_ms | "
        "stock=stock_train_ms | faster=train_ms_faster | file",
    ),
    "kernels": Table(
        lambda files: (row for row in every(files) if "floor_ms" in row),
        "operation=name | kernel | tokens | ms | floor=floor_ms | of roofline=of_roofline:.0% | "
        "backward, ms=backward_ms | its floor=backward_floor_ms | error=error:.1e | worst gradient=worst | file",
        {"worst": _worst_gradient},
    ),
    "training": Table(
        named("training"),
        "kernels=kernel | tokens | ms a layer=ms | tokens/s, full depth=tokens_per_second | MFU=share | file",
        {"share": lambda row: f"{row['mfu']:.1%} of {row['mfu_of']}" if "mfu" in row else None},
    ),
    "fit": Table(
        named("fit"),
        "recipe | stage | kind | compile | tokens | ms a step=ms | tokens/s=tokens_per_second | MFU=mfu:.1% | "
        "HFU=hfu:.1% | GiB=gib | GPU busy=busy:.0% | of a step=shares | file",
        {"shares": _shares},
    ),
    "autoencoder": Table(
        named("clip"),
        "autoencoder | weights | way | size | frames | dtype | "
        "encode, s=encode | encoded/s=encoded | encode, GiB=encode_gib | "
        "decode, s=decode | decoded/s=decoded | decode, GiB=decode_gib | in all, GiB=gib | file",
        {
            "encode": lambda row: row.get("encode_s", row.get("note")),
            "encoded": lambda row: ratio(row["frames"], row.get("encode_s")),
            "decode": lambda row: row.get("decode_s", row.get("note")),
            "decoded": lambda row: ratio(row["frames"], row.get("decode_s")),
        },
    ),
    "agreement": Table(
        named("agreement"),
        "autoencoder | weights | dtype | size | frames | exact: latents=exact_latents:.1e | "
        "exact: pixels=exact_pixels:.1e | exact: PSNR=exact_psnr:.1f | tiled: latents=tiled_latents:.1e | "
        "tiled: pixels=tiled_pixels:.1e | tiled: PSNR=tiled_psnr:.1f | file",
    ),
    "scaling": EXPONENTS,
    "sources": Table(_sources, "file | device, date, commit, command=source"),
}
"""Name of a table on the page -> what it shows."""
TABLES = PAGE | {"mixers": MEASURED}
"""With those of other commands."""
