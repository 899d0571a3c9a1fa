"""``python -m tests.yardsticks.versions OLD``: the denoiser of a recipe by the lingen of another checkout and by this
one, forward, in alternating pairs on one GPU.

Each version has a process of its own, which holds its model and waits for its turn, so that both share the GPU's
temperature and clocks. `OLD` is a folder that holds another lingen/, for instance of ``git worktree add OLD COMMIT``;
``--old-words`` and ``--new-words`` are overrides of the recipe for one side alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]


def serve(recipe: str, grids: Sequence[Sequence[int]], words: Sequence[str], forwards: int) -> None:
    """A version's process: for each number of a grid that comes, the milliseconds of a forward."""
    import torch

    from lingen.model import LinGen
    from lingen.recipe import load_recipe
    from lingen.recipe.sections import LinGenConfig

    config: LinGenConfig = load_recipe(recipe, [*words, "model.checkpointing=false", "model.gate_init=1.0"]).model
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LinGen(config).eval().requires_grad_(False)
    inputs = []
    for grid in grids:
        size = [n * part for n, part in zip(grid, config.patch, strict=True)]
        text = tuple(
            (torch.randn(1, 128, width, device="cuda"), torch.ones(1, 128, dtype=torch.bool, device="cuda"))
            for width in config.text_dims
        )
        inputs.append((torch.randn(1, config.channels, *size, device="cuda"), torch.tensor([0.5], device="cuda"), text))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    print("ready", flush=True)
    for line in sys.stdin:
        with torch.no_grad():
            begin.record()
            for _ in range(forwards):
                model(*inputs[int(line)])
            end.record()
        end.synchronize()
        print(begin.elapsed_time(end) / forwards, flush=True)


class Version:
    """A process that measures when it is asked."""

    def __init__(self, checkout: Path, settings: Sequence[str]):
        code = f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r})['serve'](*{settings!r})"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")]),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=checkout, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._heard()

    def milliseconds(self, grid: int) -> float:
        assert self._process.stdin is not None
        print(grid, file=self._process.stdin, flush=True)
        return float(self._heard())

    def _heard(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a version's process ended with {self._process.wait()}")
        return line


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.yardsticks.versions", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("old", type=Path, help="folder that holds the other lingen/")
    parser.add_argument("--recipe", default="t2v_68s")
    parser.add_argument("--grids", nargs="+", default=["34,32,32", "136,32,32"], metavar="T,H,W")
    parser.add_argument("--old-words", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--new-words", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--forwards", type=int, default=3, help="of a measurement")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    grids = [[int(n) for n in grid.split(",")] for grid in args.grids]
    sides = [
        Version(checkout.resolve(), (args.recipe, grids, list(words), args.forwards))
        for checkout, words in ((args.old, args.old_words), (HERE, args.new_words))
    ]
    rows = []
    for number, grid in enumerate(grids):
        took: list[list[float]] = [[], []]
        for pair in range(-1, args.pairs):  # the first one warms up
            for side in (0, 1) if pair % 2 else (1, 0):
                measured = sides[side].milliseconds(number)
                if pair >= 0:
                    took[side].append(measured)
        ratios = [new / old for old, new in zip(*took, strict=True)]
        row = {"grid": grid, "old": args.old_words, "new": args.new_words, "ratio": statistics.median(ratios)}
        milliseconds = {"ms": statistics.median(took[1]), "old ms": statistics.median(took[0])}
        rows.append(row | milliseconds | {"ratios": ratios})
        print(json.dumps(rows[-1]), flush=True)
    if args.json:
        from lingen.kernels.choice import best_device

        from .place import device_name
        from .results import head

        about = {"device": device_name(best_device()), **head({}, program="python -m tests.yardsticks.versions")}
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
