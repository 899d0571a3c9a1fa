"""``lingen export``: weights to use and to share, as one file or as a folder by diffusers' conventions."""

import argparse

from lingen.cli.command import argument, command
from lingen.recipe.errors import RecipeError, did_you_mean


@command(
    "the averaged weights of a finished stage as one small file, for sampling, `init` or autoencoder.path; or a folder",
    argument("run", metavar="RUN", help="a run folder: its last finished stage; or a weights file"),
    argument("--out", metavar="F", help="the .safetensors file to write"),
    argument("--to", nargs=2, metavar=("diffusers", "DIR"),
             help="the new folder to write, for lingen.LinGenPipeline.from_pretrained, with a model card"),
    argument("--precision", choices=["bf16", "fp32"],
             help="default: bf16; of a folder fp32, which makes the same clips"),
)  # fmt: skip
def export(args: argparse.Namespace) -> None:
    from lingen.weights import export_weights, find_weights

    if (args.out is None) == (args.to is None):
        raise RecipeError("Say what to write: either --out F.safetensors, or --to diffusers DIR.")
    if args.to and args.to[0] != "diffusers":
        meant = did_you_mean(args.to[0], ["diffusers"])
        raise RecipeError(f"--to knows no '{args.to[0]}'.{meant} A folder: --to diffusers DIR; a file: --out F.")
    find_weights(args.run)  # a wrong name is told before torch is imported
    if args.out is not None:
        print(export_weights(args.run, args.out, args.precision or "bf16"))
        return
    from lingen.sampling.pipeline import export_folder

    print(export_folder(args.run, args.to[1], args.precision or "fp32"))
