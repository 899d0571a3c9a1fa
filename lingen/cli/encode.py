"""Models run over whole data sets: ``lingen encode`` and ``lingen data caption``."""

from __future__ import annotations

import argparse

from lingen.cli.command import JSON, PART, RECIPE, SHARD_MB, STAGE, argument, command, console
from lingen.cli.data import print_report
from lingen.registry import RecipeError

DEVICE = argument("--device", metavar="D", help="cuda, cuda:1, cpu; default: cuda where there is one")


@command(
    "what a recipe trains on -> latents and text embeddings of its frozen parts, as shards for `lingen fit`",
    RECIPE,
    STAGE,
    argument("--out", required=True, metavar="DIR"),
    argument("--validation", action="store_true", help="the held-out shards instead of the training shards"),
    argument("--precision", choices=["float16", "float32"], default="float16", help="default: float16"),
    DEVICE,
    SHARD_MB,
    PART,
    JSON,
    overrides=True,
)
def encode(args: argparse.Namespace) -> int:
    if args.recipe is None:
        raise RecipeError("Say with which recipe: --recipe R; it names the shards, the autoencoder and the encoders.")
    from pathlib import Path

    from lingen.data.encode_shards import Encoding
    from lingen.data.encode_shards import encode as encode_shards
    from lingen.data.journal import part_of
    from lingen.progress import count_bar
    from lingen.recipe import load_recipe, load_stages

    part = part_of(args.part)
    every = load_stages(args.recipe, args.overrides)
    stages = [load_recipe(args.recipe, args.overrides, stage=args.stage)] if args.stage else every
    workers = max(stage.data.workers for stage in stages)
    how = Encoding(device_of(args.device), args.precision, part, workers, args.shard_mb, args.validation)
    with count_bar(console(), "encoding") as progress:
        report = encode_shards(stages, Path(args.out), how, progress)
    return print_report(report, args)


def device_of(name: str | None) -> str:
    """The device that was asked for; RecipeError where there is none of that name."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name
