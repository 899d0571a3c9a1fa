"""Whole data sets: ``lingen data pack``, from folders of footage to shards; ``lingen encode`` and ``data caption``, by
models that are run over them."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lingen.cli import command as cli
from lingen.prepare.limits import Filters
from lingen.recipe.errors import RecipeError
from lingen.recipe.signature import settings_of

DEVICE = cli.argument("--device", metavar="D", help="cuda, cuda:1, cpu; default: cuda where there is one")
FROM_RECIPE = {"min_side": "those of the largest stage", "min_fps": "the recipe's"}
"""Limits that the recipe gives where they are not named."""


def split_overrides(words: list[str], args: argparse.Namespace) -> list[str]:
    """The folders among the words behind an argument that takes several; ``key=value`` words join the overrides."""
    folders = [word for word in words if "=" not in word or Path(word).exists()]
    args.overrides = [*args.overrides, *(word for word in words if word not in folders)]
    return folders


def number(text: str) -> float | str:
    """A number or ``off``, as an argument's `type`."""
    return text if text == "off" else int(value) if (value := float(text)).is_integer() else value


@cli.command(
    "folders of footage -> shards with a manifest: shots, clips of a recipe's lengths, filters, captions by key",
    cli.RECIPE,
    cli.argument("--videos", nargs="+", default=[], metavar="DIR", help="films and clips"),
    cli.argument("--images", nargs="+", default=[], metavar="DIR", help="pictures"),
    cli.argument(
        "--captions", metavar="TABLE",
        help="CSV, JSONL or Parquet with the columns key (a file's path in its folder) and caption; else NAME.txt or "
        "NAME.json beside each file",
    ),
    cli.argument("--keep-uncaptioned", action="store_true", help="for `lingen data caption`"),
    cli.argument("--out", required=True, metavar="DIR"),
    *(
        cli.argument(f"--{name.replace('_', '-')}", type=number, metavar="N|off", help=f"{one.doc}; default: {default}")
        for name, one in settings_of(Filters).items()
        for default in [FROM_RECIPE.get(name, "off" if one.default is None else f"{one.default:g}")]
    ),
    cli.SHARD_MB, cli.PART, cli.PROCESSES, cli.JSON, overrides=True,
)  # fmt: skip
def data_pack(args: argparse.Namespace) -> int:
    if args.recipe is None:
        raise RecipeError("Say for which recipe: --recipe R; its stages say which sizes and lengths are wanted.")
    from lingen.recipe import load_stages

    videos, images = split_overrides(args.videos, args), split_overrides(args.images, args)
    stages = load_stages(args.recipe, args.overrides)
    from lingen.prepare.captions import Captions
    from lingen.prepare.journal import parse_part
    from lingen.prepare.pack import Packing, filters_for, look_for_footage, pack, wanted_by

    part, wanted = parse_part(args.part), wanted_by(stages)
    given = {name: getattr(args, name) for name in settings_of(Filters) if getattr(args, name) is not None}
    filters = filters_for(wanted, {name: None if one == "off" else one for name, one in given.items()})
    found = look_for_footage(videos, images, wanted)
    job = Packing(
        found.sources, Captions(args.captions), wanted, filters, part,
        args.processes, args.shard_mb, args.keep_uncaptioned, found.unseen,
    )  # fmt: skip
    return make(args, "packing", "files", partial(pack, job, Path(args.out)))


def make(args: argparse.Namespace, doing: str, of: str, work: Callable[[Any], Any]) -> int:
    """Prints what `work` has made, under a bar, as a table or JSON, and of what; FAILED where nothing was made."""
    with cli.count_bar(doing) as progress:
        report = work(progress)
    made = f"{sum(report.made.values()):,} samples from {report.looked_at:,} {of}"
    amount = f"{report.seconds / 3600:.3g} hours of clips, {report.bytes / 1e9:.3g} GB"
    cli.tell(args, report.as_json(), [report.rows()], "", f"{args.out}: {made}, {amount}")
    if not report.made:
        print("No sample was made: everything was left out; the table says why.", file=sys.stderr)
        return cli.FAILED
    return cli.DONE


@cli.command(
    "what a recipe trains on -> latents and text embeddings of its frozen parts, as shards for `lingen fit`",
    cli.RECIPE, cli.STAGE, cli.argument("--out", required=True, metavar="DIR"),
    cli.argument("--validation", action="store_true", help="the held-out shards instead of the training shards"),
    cli.argument("--precision", choices=["float16", "float32"], default="float16", help="default: float16"),
    DEVICE, cli.SHARD_MB, cli.PART, cli.JSON, overrides=True,
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
    of = "clips: of each sample all that fit, for each shape that a stage takes"
    return make(args, "encoding", of, partial(encode_shards, stages, Path(args.out), how))


@cli.command(
    "captions for samples that have none, by a local image- or video-text model of transformers: a copy of the shards",
    cli.argument("folder", metavar="DIR", help="shards with a manifest, from `lingen data pack --keep-uncaptioned`"),
    cli.argument("--model", required=True, metavar="DIR", help="a folder that holds the model and its processor"),
    cli.argument("--out", required=True, metavar="DIR"),
    cli.argument("--captions", type=cli.natural, default=1, metavar="N", help="of each sample; default: 1"),
    cli.argument("--prompt", default="", metavar="TEXT", help="what a model that follows instructions is asked"),
    cli.argument("--frames", type=cli.natural, default=8, metavar="N",
                 help="of a clip that the model is shown; default: 8"),
    cli.argument("--max-tokens", type=cli.natural, default=120, metavar="N", help="of a caption; default: 120"),
    cli.argument("--replace", action="store_true", help="also what has captions already"),
    DEVICE, cli.SHARD_MB, cli.PART, cli.JSON,
)  # fmt: skip
def data_caption(args: argparse.Namespace) -> int:
    from lingen.kernels.choice import best_device
    from lingen.prepare.caption import Captioning, caption
    from lingen.prepare.journal import parse_part

    how = Captioning(
        Path(args.model), args.prompt, args.captions, args.frames, args.max_tokens, args.replace,
        str(best_device(args.device)), parse_part(args.part), args.shard_mb,
    )  # fmt: skip
    return make(args, "captioning", "samples", partial(caption, Path(args.folder), Path(args.out), how))
