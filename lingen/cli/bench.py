"""Measurements: ``lingen bench ...``."""

from __future__ import annotations

import argparse

from lingen.cli.command import DONE, argument, command, console


@command(
    "how FLOPs, time and activation memory of mixers grow with the tokens (CPU)",
    argument("--mixers", nargs="+", default=["attention", "temporal_swin", "mamba2", "mate"], metavar="M"),
    argument("--dim", type=int, default=64, help="width of a token"),
    argument("--out", default="bench", metavar="DIR", help="scaling.json, .csv and .md go there"),
)
def bench_scaling(args: argparse.Namespace) -> int:
    from pathlib import Path

    from lingen.bench.scaling import scaling, write
    from lingen.progress import count_bar

    with count_bar(console(), "measuring") as progress:
        files = write(scaling(args.mixers, args.dim, progress=progress), Path(args.out))
    print(files[-1].read_text(), end="")
    print(*files, sep="\n")
    return DONE
