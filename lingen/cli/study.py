"""Human preference: ``lingen study ...``."""

import argparse
import sys
from pathlib import Path
from typing import Any

from lingen.cli.command import JSON, argument, command, natural, positive, print_json, print_table
from lingen.cli.prompts import lines_of


@command(
    "one page on which people compare clips without knowing whose they are, and the key that tells it",
    argument("folders", nargs="+", metavar="DIR", help="two or more folders of clips of `lingen sample`"),
    argument("--prompts", metavar="FILE", required=True, help="a file with a prompt on each line"),
    argument("--out", metavar="F.html", default="study.html", help="the key lies beside it; default: study.html"),
    argument("--seed", type=int, default=0, help="another order, other sides"),
    argument("--per-rater", type=natural, metavar="N", help="so many pairs for each rater; default: all"),
)
def study_make(args: argparse.Namespace) -> None:
    from lingen.evaluation.study import make_study

    key, notes = make_study(args.folders, lines_of(args.prompts), args.out, args.seed, args.per_rater)
    print("".join(f"{note}\n" for note in notes), end="", file=sys.stderr)
    print(f"study {key['study']}, {sum('pair' in one for one in key['trials'].values())} pairs")
    page = Path(args.out).with_suffix(".html")
    print(f"{page}: for the raters\n{page.with_suffix('.key.json')}: which side was which; keep it to yourself")


@command(
    "what the votes say: wins, ties, losses, strengths, agreement, and how many raters are still needed",
    argument("votes", nargs="+", metavar="VOTES.csv", help="the files that raters downloaded"),
    argument("--key", metavar="F", required=True, help="the key that `lingen study make` wrote"),
    argument("--margin", type=positive, default=0.1, metavar="M", help="wins minus losses to show; default: 0.1"),
    JSON,
)
def study_report(args: argparse.Namespace) -> None:
    from lingen.evaluation.study_report import report_votes

    found = report_votes(args.votes, args.key, args.margin)
    if args.json:
        print_json(found)
        return
    print_table([_row(row) for row in found["pairs"]])
    print_table([{"axis": row["axis"], "of": row["of"], "strength": _cell(row, "+.2f")} for row in found["strengths"]])
    print(*found["notes"], sep="\n", file=sys.stderr)


def _row(row: dict[str, Any]) -> dict[str, str]:
    cells = {name: _cell(row[name], "+.0%" if name == "net" else ".0%") for name in ("win", "tie", "loss", "net")}
    cells |= {"raters": f"{row['ahead']}:{row['behind']}", "p": f"{row['p']:.2g}", "p, Holm": f"{row['p_holm']:.2g}"}
    cells |= {"agreement": "-" if row["agreement"] is None else f"{row['agreement']:.2f}"}
    cells |= {"raters needed": "-" if row["raters_needed"] is None else str(row["raters_needed"])}
    return {"axis": row["axis"], "of": row["of"], "against": row["against"], "votes": str(row["n"]), **cells}


def _cell(one: dict[str, Any], form: str) -> str:
    return f"{one['value']:{form}} [{one['interval'][0]:{form}}, {one['interval'][1]:{form}}]"
