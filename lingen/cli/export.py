"""``lingen export``: one file of weights to use and to share."""

import argparse

from lingen.cli.command import DONE, argument, command


@command(
    "the averaged weights of a finished stage as one small file, for sampling, `init` or autoencoder.path",
    argument("--run", required=True, metavar="DIR", help="a run folder: its last finished stage; or a weights file"),
    argument("--out", required=True, metavar="F", help="a .safetensors file"),
    argument("--precision", choices=["bf16", "fp32"], default="bf16", help="default: bf16"),
)
def export(args: argparse.Namespace) -> int:
    from lingen.weights import export_weights

    print(export_weights(args.run, args.out, args.precision))
    return DONE
