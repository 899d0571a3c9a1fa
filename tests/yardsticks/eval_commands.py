"""``lingen eval selftest``, the measures measured, and ``lingen eval vbench``, totals over another package's files."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from lingen.cli.command import DONE, JSON, argument, command, count_bar, natural, positive, print_json, print_table

WEIGHTS = {"i3d": "weights/i3d.safetensors", "efficientnet": "weights/efficientnet.safetensors"}


@command(
    "which metric sees which damage: blur, noise, shuffle, freeze, reversal, hue drift; do the intervals cover?",
    argument("folders", nargs="*", metavar="DIR", help="clips or shards of them; default: the built-in shapes"),
    argument("--coverage", action="store_true", help="the intervals instead, by simulation"),
    argument("--clips", type=natural, default=10, metavar="N", help="to damage, with up to three times as many beside; "
             "default: 10"),
    argument("--times", type=natural, default=1000, metavar="N", help="simulations of each interval; default: 1000"),
    argument("--features", action="append", metavar="NET[=PATH]", help="i3d, efficientnet or module:Class, may be "
             "given again; default: those of i3d and efficientnet that lie in weights"),
    argument("--fps", type=positive, default=16.0, metavar="F", help="at which clips are shown; default: 16"),
    argument("--jobs", type=natural, metavar="N", help="processes; default: one for each core"),
    argument("--out", default="eval/selftest.json", metavar="FILE", help="other parts of it stay; a picture of its "
             "name goes beside it; default: eval/selftest.json"),
    JSON,
)  # fmt: skip
def eval_selftest(args: argparse.Namespace) -> int:
    from lingen.evaluation.statistics import check_extra
    from lingen.files import check_place

    from .results import head

    check_extra()
    check_place(Path(args.out).parent)
    began, about = time.perf_counter(), head({})
    part, found = ("coverage", _coverage(args)) if args.coverage else _damaged(args)
    minutes = round((time.perf_counter() - began) / 60, 1)
    _keep(Path(args.out), part, {**about, "minutes": minutes, **found})
    if args.json:
        print_json(found)
    return DONE


def _coverage(args: argparse.Namespace) -> dict[str, Any]:
    from .coverage import coverage

    with count_bar("simulating") as progress:
        rows = coverage(args.times, progress)
    if not args.json:
        print_table([{key: str(value) for key, value in row.items()} for row in rows])
    return {"rows": rows}


def _damaged(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    import numpy as np

    from lingen.evaluation.clips import View
    from lingen.evaluation.judging import Judge

    from . import selftest

    networks = args.features or [name for name, path in WEIGHTS.items() if Path(path).is_file()]
    judge, n = Judge(networks, View(args.fps), device="cpu"), args.clips
    if args.folders:
        sources = [one for folder in args.folders for one in selftest.pieces_of(Path(folder), judge.view)]
        sources = [sources[k] for k in np.random.default_rng(0).permutation(len(sources))[: 4 * n]]
    else:
        sources = list(selftest.drawn(4 * n, judge.view))
    with count_bar("damaging") as progress:
        rows = selftest.selftest(judge, sources, n, args.jobs or len(os.sched_getaffinity(0)), progress)
    part = "clips" if args.folders else "shapes"
    picture = Path(args.out).with_name(f"{Path(args.out).stem}_{part}.png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    selftest.draw(rows, picture)
    strengths = {name: list(strengths) for name, (_, strengths, _) in selftest.DAMAGES.items()}
    if not args.json:
        print_table(selftest.table_of(rows))
        print("the weakest strength (1 to 5) from which on it is seen; in brackets the effect of the strongest")
        for name in WEIGHTS.keys() - judge.networks.keys() if not args.features else ():
            print(f"without {name}: lingen data fetch {name}")
        print(picture, args.out, sep="\n")
    about = {"damaged": n, "real": len(sources) - n, "strengths": strengths, "fingerprint": judge.fingerprint}
    return part, {**about, "rows": rows}


def _keep(path: Path, part: str, found: dict[str, Any]) -> None:
    """Puts a part of the file in the place of its former one; rows take a line each."""
    import json

    from lingen.files import write_text

    whole = (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}) | {part: found}
    parts = []
    for name, held in whole.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in held.items() if key != "rows"]
        rows = ",\n".join(f"   {json.dumps(row)}" for row in held["rows"])
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join([*lines, f'  "rows": [\n{rows}\n  ]']) + "\n }")
    write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


@command(
    "totals of VBench from the result files that it wrote",
    argument("path", metavar="DIR|FILE", help="its *_eval_results.json, or a folder of them"),
    JSON,
)
def eval_vbench(args: argparse.Namespace) -> int:
    from .vbench import QUALITY, SEMANTIC, vbench_scores, vbench_totals

    scores = vbench_scores(Path(args.path))
    totals, missing = vbench_totals(scores), [name for name in (*QUALITY, *SEMANTIC) if name not in scores]
    if args.json:
        print_json({"scores": scores, **totals, "missing": missing})
        return DONE
    shown = {**scores, **totals}.items()
    print_table([{"score": name, "%": "-" if value is None else f"{100 * value:.2f}"} for name, value in shown])
    print(*(f"missing: {name}" for name in missing), sep="\n")
    return DONE
