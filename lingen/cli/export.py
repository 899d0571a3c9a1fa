"""``lingen export``: weights to use and to share, as one file or as a folder by diffusers' conventions."""

import argparse

from lingen.cli.command import argument, command


@command(
    "the averaged weights of a finished stage as one small file, for sampling, `init` or autoencoder.path; or a folder",
    argument("--run", required=True, metavar="DIR", help="a run folder: its last finished stage; or a weights file"),
    argument("--out", required=True, metavar="F", help="a .safetensors file; of --to diffusers a new folder"),
    argument("--to", choices=["file", "diffusers"], default="file",
             help="diffusers: a folder for lingen.LinGenPipeline.from_pretrained, with a model card; default: file"),
    argument("--precision", choices=["bf16", "fp32"],
             help="default: bf16; of a folder fp32, which makes the same clips"),
)  # fmt: skip
def export(args: argparse.Namespace) -> None:
    if args.to == "diffusers":
        from lingen.sampling.pipeline import export_folder as write
    else:
        from lingen.weights import export_weights as write
    print(write(args.run, args.out, args.precision or ("fp32" if args.to == "diffusers" else "bf16")))
