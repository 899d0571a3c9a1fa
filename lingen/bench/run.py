"""``lingen bench model``: what is measured of a recipe's denoiser, in which order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lingen.bench.build import best_device, precision_of
from lingen.bench.flops import Grid
from lingen.bench.model import ModelBench, bench_forward, bench_quality, bench_sampling, bench_variants, free
from lingen.bench.results import Results, Say
from lingen.bench.targets import VARIANTS
from lingen.bench.twins import bench_twins
from lingen.recipe import load_recipe
from lingen.recipe.registry import AUTOENCODERS, RecipeError
from lingen.recipe.sections import LinGenConfig, Recipe
from lingen.recipe.sizes import grids_of


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `lingen bench model` was asked for; see its help."""

    recipe: str
    stage: str | None = None
    overrides: tuple[str, ...] = ()
    grids: tuple[Grid, ...] = ()
    precision: str | None = None
    run50: bool = False
    twins: tuple[str, ...] | None = None
    """None: no twins; empty: all of them."""
    dit_depth: int | None = None
    variants: bool = False
    quality: bool = False
    device: str | None = None
    budget: float | None = None
    commit: str | None = None


PRECISIONS = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}


def bench_recipe(asked: Request, out: Path, say: Say) -> Results:
    """Everything that was asked for, one grid after the other, into one result file: what is compared is of one run.

    Raises RecipeError for mistakes in the recipe, and where no size is named.
    """
    recipe = load_recipe(asked.recipe, asked.overrides, asked.stage)
    grids = asked.grids or (video_grid(recipe),)
    device = best_device(asked.device)
    dtype = PRECISIONS[asked.precision] if asked.precision else precision_of(device)
    about = {"recipe": recipe.name, "dim": recipe.model.dim, "depth": recipe.model.depth}
    results = Results(out, about, device, say, asked.commit)
    bench = ModelBench(
        recipe.model, grids[0], device, dtype, asked.precision == "fp8", results, say, asked.budget or 3.0
    )
    say(f"building {bench.mixer}: width {recipe.model.dim}, {recipe.model.depth} layers")
    model = bench.make()
    for grid in grids:
        one = replace(bench, grid=grid)
        forwards = bench_forward(one, model)
        if asked.twins is not None:
            bench_twins(one, model, forwards[1].get("gib"), asked.dit_depth, asked.twins)
            free(device)
        if asked.run50:
            bench_sampling(one, model, recipe, forwards)
        if asked.variants:
            bench_variants(one, model, [(each, _with(asked, each.overrides)) for each in VARIANTS])
        if asked.quality:
            bench_quality(one)
            free(device)
    return results


def _with(asked: Request, overrides: tuple[str, ...]) -> LinGenConfig:
    return load_recipe(asked.recipe, (*asked.overrides, *overrides), asked.stage).model


def video_grid(recipe: Recipe) -> Grid:
    """Tokens of the stage's clips."""
    if recipe.stages:
        raise RecipeError(f"Name the size: --grid 34x32x32, or --stage with one of {', '.join(recipe.stages)}.")
    with torch.device("meta"):
        strides = tuple(AUTOENCODERS.build(recipe.autoencoder).strides)
    grids = grids_of(recipe.data, strides, recipe.model.patch)
    return grids.get("video") or next(iter(grids.values()))
