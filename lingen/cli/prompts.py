"""Prompts rewritten by a local chat model: ``lingen prompts rewrite``, and for ``lingen sample --rewrite``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lingen.cli.command import DONE, FAILED, JSON, RECIPE, STAGE, argument, command, count_bar
from lingen.cli.encode import DEVICE
from lingen.recipe.errors import RecipeError
from lingen.recipe.text import read_text_file

if TYPE_CHECKING:
    from lingen.recipe.sections import RewriteConfig
    from lingen.text.rewrite import Rewritten

REWRITER = argument("--rewriter", metavar="DIR", help="rewrite with the chat model in this folder, not the recipe's")


@command(
    "short prompts -> long ones by a local chat model, a line for a line; what was rewritten before is kept",
    argument("file", metavar="FILE", help="a prompt on each line"),
    REWRITER, RECIPE, STAGE, argument("--out", metavar="FILE", help="default: standard output"), DEVICE, JSON,
    overrides=True,
)  # fmt: skip
def prompts_rewrite(args: argparse.Namespace) -> int:
    from lingen.kernels.choice import best_device

    prompts = lines_of(args.file)
    if not prompts:
        raise RecipeError(f"There is no prompt in {args.file}; write one on each line.")
    found = rewrite(prompts, _settings(args), str(best_device(args.device)))
    wrong = report_faults(found)
    if wrong and not args.json:  # one line for each prompt, so that none stands for another
        print("Nothing was written. Change what is named above; the others are kept.", file=sys.stderr)
        return FAILED
    lines = "\n".join(str(one.text) for one in found)
    rows = [
        {"prompt": one.prompt, "rewritten": one.text, "cached": one.cached}
        | ({"fault": one.fault} if one.fault else {})
        for one in found
    ]
    text = json.dumps(rows, indent=2, ensure_ascii=False) if args.json else lines
    if args.out is None:
        print(text)
    else:
        try:
            Path(args.out).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            why = error.strerror
            raise RecipeError(f"--out {args.out} cannot be written: {why}. The rewritten prompts are kept.") from error
        print(args.out)
    return FAILED if wrong else DONE


def _settings(args: argparse.Namespace) -> RewriteConfig:
    """The recipe's settings, with the model of --rewriter where that is given."""
    if args.recipe is None and (args.overrides or args.stage):
        raise RecipeError("--stage and key=value change a recipe: say which, --recipe R.")
    if args.recipe is None and args.rewriter is None:
        raise RecipeError("Say which model rewrites: --rewriter DIR, or --recipe R with rewrite.path.")
    if args.recipe is None:
        from lingen.recipe.sections import RewriteConfig

        return RewriteConfig(path=args.rewriter)
    from lingen.recipe import load_recipe

    how = load_recipe(args.recipe, args.overrides, stage=args.stage).rewrite
    how = replace(how, path=args.rewriter or how.path)
    if how.path is None:
        raise RecipeError("The recipe names no model that rewrites. Set rewrite.path, or give --rewriter DIR.")
    return how


def rewrite(prompts: Sequence[str], how: RewriteConfig, device: str) -> list[Rewritten]:
    """Rewrites each prompt, then frees the model's memory."""
    from lingen.text.rewrite import Rewriter

    rewriter = Rewriter(how, device)
    with count_bar("rewriting prompts") as progress:
        found = rewriter.rewrite(prompts, progress)
    rewriter.release()
    if not all(prompt.strip() for prompt in prompts):
        print("An empty prompt is used as it is: there is nothing in it to rewrite.", file=sys.stderr)
    return found


def report_faults(found: Sequence[Rewritten]) -> int:
    """Says on stderr which prompts have no rewritten form, each once. Returns how many."""
    wrong = {one.prompt: one.fault for one in found if one.fault}
    for prompt, fault in wrong.items():
        print(f"Not rewritten in two attempts: {prompt} -- the last answer: {fault}", file=sys.stderr)
    return len(wrong)


def lines_of(path: str) -> list[str]:
    """The lines of a file that are not empty. RecipeError where it cannot be read."""
    return [line.strip() for line in read_text_file(Path(path)).split("\n") if line.strip()]
