"""Models run over whole data sets: ``lingen encode`` and ``lingen data caption``."""

import argparse
from pathlib import Path

from lingen.cli.command import JSON, PART, RECIPE, SHARD_MB, STAGE, argument, command, count_bar, natural
from lingen.cli.pack import print_report
from lingen.recipe.errors import RecipeError

DEVICE = argument("--device", metavar="D", help="cuda, cuda:1, cpu; default: cuda where there is one")


@command(
    "what a recipe trains on -> latents and text embeddings of its frozen parts, as shards for `lingen fit`",
    RECIPE, STAGE, argument("--out", required=True, metavar="DIR"),
    argument("--validation", action="store_true", help="the held-out shards instead of the training shards"),
    argument("--precision", choices=["float16", "float32"], default="float16", help="default: float16"),
    DEVICE, SHARD_MB, PART, JSON, overrides=True,
)  # fmt: skip
def encode(args: argparse.Namespace) -> int:
    if args.recipe is None:
        raise RecipeError("Say with which recipe: --recipe R; it names the shards, the autoencoder and the encoders.")
    from lingen.recipe import load_curriculum

    stages = load_curriculum(args.recipe, args.overrides).chosen(args.stage)
    from lingen.kernels.choice import best_device
    from lingen.prepare.encode import Encoding, encode_shards
    from lingen.prepare.journal import parse_part

    part = parse_part(args.part)
    workers = max(stage.data.workers for stage in stages)
    how = Encoding(str(best_device(args.device)), args.precision, part, workers, args.shard_mb, args.validation)
    with count_bar("encoding") as progress:
        report = encode_shards(stages, Path(args.out), how, progress)
    return print_report(report, args, "clips: of each sample all that fit, for each shape that a stage takes")


@command(
    "captions for samples that have none, by a local image- or video-text model of transformers: a copy of the shards",
    argument("folder", metavar="DIR", help="shards with a manifest, from `lingen data pack --keep-uncaptioned`"),
    argument("--model", required=True, metavar="DIR", help="a folder that holds the model and its processor"),
    argument("--out", required=True, metavar="DIR"),
    argument("--captions", type=natural, default=1, metavar="N", help="of each sample; default: 1"),
    argument("--prompt", default="", metavar="TEXT", help="what a model that follows instructions is asked"),
    argument("--frames", type=natural, default=8, metavar="N", help="of a clip that the model is shown; default: 8"),
    argument("--max-tokens", type=natural, default=120, metavar="N", help="of a caption; default: 120"),
    argument("--replace", action="store_true", help="also what has captions already"),
    DEVICE, SHARD_MB, PART, JSON,
)  # fmt: skip
def data_caption(args: argparse.Namespace) -> int:
    from lingen.kernels.choice import best_device
    from lingen.prepare.caption import Captioning, caption
    from lingen.prepare.journal import parse_part

    how = Captioning(
        Path(args.model), args.prompt, args.captions, args.frames, args.max_tokens, args.replace,
        str(best_device(args.device)), parse_part(args.part), args.shard_mb,
    )  # fmt: skip
    with count_bar("captioning") as progress:
        report = caption(Path(args.folder), Path(args.out), how, progress)
    return print_report(report, args, "samples")
