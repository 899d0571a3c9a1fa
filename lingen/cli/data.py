"""Data sets: ``lingen data ...``."""

from __future__ import annotations

import argparse
import sys

from lingen.cli.command import DONE, FAILED, argument, command, console


@command(
    "real clips with captions, as shards",
    argument(
        "set",
        choices=["emoji", "footage"],
        help="emoji: animated 3-D emoji and their names; footage: a few filmed clips",
    ),
    argument("--out", metavar="DIR", help="default: data/SET"),
    argument(
        "--parts",
        type=int,
        default=1,
        choices=[1, 2, 3, 4],
        help="emoji: how many of the four packages of animations (170 MB each)",
    ),
    argument("--limit", type=int, help="only so many clips and images"),
)
def data_fetch(args: argparse.Namespace) -> int:
    from lingen.data.fetch import fetch
    from lingen.data.packages import FetchError
    from lingen.progress import count_bar

    with count_bar(console(), f"fetching {args.set}") as progress:
        try:
            fetched = fetch(
                args.set, args.out or f"data/{args.set}", parts=args.parts, limit=args.limit, progress=progress
            )
        except FetchError as error:
            print(error, file=sys.stderr)
            return FAILED
    for line in fetched.licences:
        print(line)
    print(f"{fetched.folder}: " + ", ".join(f"{count} {kind}" for kind, count in fetched.counts.items()))
    return DONE
