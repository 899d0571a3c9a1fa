"""``python -m tests.soak fuzz --seed S --minutes M``: broken files through the command line, until one gets through."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from tests.soak.fuzz import TARGETS, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    trials = parser.add_subparsers(dest="trial", required=True)
    one = trials.add_parser("fuzz", help="damaged films, pictures, tables, recipes, manifests and weights")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--minutes", type=float, default=1.0)
    one.add_argument("--only", choices=sorted(TARGETS), help="one sort of file")
    one.add_argument("--case", type=int, help="only this case of the seed, as a failure names it")
    one.add_argument("--keep", type=Path, default=Path("fuzz"), metavar="DIR", help="failing inputs go there")
    args = parser.parse_args()
    report = fuzz(args.seed, args.minutes * 60, only=args.only, case=args.case)
    for failure in report.failures:
        kept = args.keep / f"{args.seed}-{failure.case}"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for name, content in failure.files.items():
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            (kept / name).write_bytes(content)
        only = f" --only {args.only}" if args.only else ""
        print(f"{failure}\n  again: python -m tests.soak fuzz --seed {args.seed} --case {failure.case}{only}; {kept}")
    counts = ", ".join(f"{count} x {name}" for name, count in sorted(report.counts.items()))
    print(f"{sum(report.counts.values())} cases ({counts}): {len(report.failures)} failed")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
