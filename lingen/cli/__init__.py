"""The ``lingen`` command: argparse reads, rich prints. Only this package prints; each command calls one function.

Heavy imports are made inside the commands, so that ``lingen --help`` is instant."""

import os
import sys
from collections.abc import Sequence

# Their commands register themselves, in the order of `lingen --help`.
from lingen.cli import runs, compare, recipes, data, encode, prompts, evaluate, cluster, doctor, bench  # noqa: F401  # isort: skip
from lingen.cli.command import COMMANDS, DONE, FAILED, WRONG_USE, parse_arguments
from lingen.cli.edge import TellsOfTorch, line_of
from lingen.ranks.environment import OtherRankError, here, who
from lingen.ranks.signals import INTERRUPTED
from lingen.recipe.errors import RecipeError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0 done, 1 failed, 2 wrong use, 75 asked to be requeued, 130 interrupted."""
    # Before torch is imported: OpenMP threads that spin while they wait slow a busy machine down.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args, is_told = None, False
    try:
        is_told = bool(who()) and (sys.argv[1:] if argv is None else argv)[:1] == ["fit"]  # by rank 0
        args = parse_arguments(argv)
        if "torch" not in sys.modules and TellsOfTorch not in sys.meta_path and here().rank == 0:
            sys.meta_path.insert(0, TellsOfTorch)
        return COMMANDS[args.command].run(args) or DONE
    except SystemExit as stop:  # such as of --help
        return int(stop.code or DONE)
    except RecipeError as error:
        for problem in () if is_told and args is None else error.problems:
            print(who() + " ".join(problem.split("\n")), file=sys.stderr)
        return WRONG_USE
    except OtherRankError:  # that one says what is wrong
        return FAILED
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `lingen list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        line = line_of(error, args)
        if line is None:
            if who():
                print(f"{who()}this went wrong:", file=sys.stderr)
            raise
        if line:
            print(who() + line, file=sys.stderr)
        return FAILED
