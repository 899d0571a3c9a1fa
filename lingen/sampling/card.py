"""The model card of an exported model: what its run folder knows of data, scores and how it was made."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lingen.provenance import version_of
from lingen.recipe.sections import Recipe
from lingen.recipe.text import decode_json
from lingen.training.denoiser import LinGenModule
from lingen.training.folder import RunFolder


def card_of(module: LinGenModule, weights: Path, about: Mapping[str, str]) -> str:
    """The card of a weights file with this metadata; what is not known, as outside of a run folder, is said."""
    folder, recipe = RunFolder(weights.resolve().parents[2]), module.recipe
    run = _held(folder.about)
    used = {"lingen": version_of("lingen")} | run.get("versions", {})
    card = files("lingen.sampling").joinpath("card.md").read_text(encoding="utf-8")
    return card.format(
        parameters=sum(one.numel() for one in module.model.parameters()), **dict(about) | vars(recipe.data),
        name=recipe.name, height=recipe.data.size[0], width=recipe.data.size[1], sources=_sources(recipe, folder),
        prompt=(recipe.sample.prompts or ["a red circle moves right"])[0].replace('"', "'"),
        versions=", ".join(f"{name} {one}" for name, one in used.items()),
        commit=f" (commit {run['commit']})" if run.get("commit") else "",
        metrics=_table(["metric", "value", "95% interval", "clips"], _scores(folder) if run else []),
    )  # fmt: skip


def _sources(recipe: Recipe, folder: RunFolder) -> str:
    """Samples of the stage trained last by their source, with the licence that was written beside the shards."""
    own, shards = recipe.data.synthetic or {}, recipe.data.shards
    named = [[one] if isinstance(one, str) else one or [] for one in (shards.image, shards.video, own.get("sprites"))]
    beside = {Path(one).parent / "fetched.json": None for listed in named for one in listed}
    licences = [line for file in beside for line in _held(file).get("licences", ())]
    rows = []
    for source, counts in _held(folder.ledger).get("sources", {}).items():
        found = [line.partition(": ")[2] for line in licences if own or line.startswith(f"{source}: ")]
        told = "; ".join(found) or ("drawn by lingen" if own else "not recorded")
        rows.append((source, f"{counts.get('used', 0):,}", told))
    return _table(["source", "samples used by the last stage", "licence"], rows)


def _scores(folder: RunFolder) -> Iterator[Sequence[str]]:
    """Judged clips of held-out captions, and what `lingen eval --out` wrote into the run folder."""
    sampled = _held(folder.score).get("sampled", {})
    shares = {name: one for name, one in sampled.items() if isinstance(one, dict) and "share" in one}
    rows = [(name, one["share"], (one["low"], one["high"]), sampled["clips"]) for name, one in shares.items()]
    for row in (row for file in folder.path.glob("**/results.json") for row in _held(file)["results"]):
        rows.append((f"{row['metric']} ({row['subject']})", row["value"], row["interval"], row["n"]))
    for name, value, ends, clips in rows:
        yield name, f"{value:.3g}", f"{ends[0]:.3g} to {ends[1]:.3g}" if ends else "-", str(clips)


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; a sentence where there are no rows."""
    cells = [[one.replace("|", "/") for one in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in [names, ["---"] * len(names), *cells]]
    return "\n".join(lines) if cells else "Not recorded."


def _held(file: Path) -> dict[str, Any]:
    return dict(decode_json(file.read_bytes())) if file.is_file() else {}
