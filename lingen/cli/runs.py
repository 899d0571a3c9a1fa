"""Training, sampling and what comes of it: ``lingen fit``, ``sample``, ``demo``, ``decode`` and ``export``."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from lingen.cli import command as cli
from lingen.cli.edge import line_of
from lingen.cli.prompts import REWRITER, lines_of, report_faults, rewrite
from lingen.files import check_place, check_target
from lingen.ranks import signals
from lingen.ranks.environment import OtherRankError, UnfitError, here, who
from lingen.recipe.errors import RecipeError, SettingError, did_you_mean
from lingen.recipe.subjects import SUBJECTS, Subject
from lingen.weights import export_weights, find_weights, read_run

if TYPE_CHECKING:
    from lingen.plan.loading import Curriculum
    from lingen.recipe.sections import Recipe
    from lingen.run_folder.folder import RunFolder
    from lingen.text.rewrite import Rewritten


@cli.command(
    "train every stage of a recipe; the same command again goes on where it was stopped", cli.RECIPE,
    cli.argument("--stage", metavar="S", help="train only this stage"),
    cli.argument("--run", metavar="DIR", help="run folder; default: runs/RECIPE-FINGERPRINT"),
    cli.argument("--preflight", action="store_true", help="first look whether every node is fit, as doctor does"),
    overrides=True,
)  # fmt: skip
def fit(args: argparse.Namespace) -> int:
    try:
        with signals.listening():
            return _fit(args)
    except signals.Stopped as stopped:
        if here().rank == 0:
            print(f"{stopped}; the same command goes on from here.", file=sys.stderr)
        return stopped.code


def _fit(args: argparse.Namespace) -> int:
    if args.run == "":
        raise RecipeError("--run is empty, as an unset variable of a shell is: name a folder, or leave it out.")
    curriculum = load_alike(args)
    from lingen import run
    from lingen.cli.progress import ConsoleReporter
    from lingen.data.ledger import DataError
    from lingen.ranks.collectives import is_first_rank

    with ConsoleReporter(cli.console()) if here().rank == 0 else nullcontext(run.Reporter()) as reporter:
        try:
            before = partial(_look, reporter.say) if args.preflight else None
            folder = run.fit_curriculum(curriculum, run=args.run, stage=args.stage, reporter=reporter, before=before)
        except UnfitError as error:
            return leave_unfit(error)
        except (DataError, run.NonFiniteError) as error:
            reporter.say(str(error))
            return cli.FAILED
        except Exception as error:
            number = signals.noted()
            if number is None or isinstance(error, RecipeError):
                raise
            # A signal to all processes of a job may end what the run needed, a compiler say: no fault of the run.
            line = line_of(error, args)
            if line:
                print(who() + line, file=sys.stderr)
            elif line is None and not isinstance(error, OtherRankError):
                traceback.print_exception(error)
            raise signals.Stopped(number) from None
    if is_first_rank():
        _print_outcome(folder, curriculum.base.subject)
    return cli.DONE


def load_alike(args: argparse.Namespace) -> Curriculum:
    """The recipe to train, on all ranks. RecipeError, on one of them."""
    from lingen.recipe import load_for_training

    def own() -> Curriculum:
        if args.recipe is None:
            raise RecipeError("Say which recipe: --recipe R. `lingen list recipes` shows those that come with lingen.")
        return load_for_training(args.recipe, args.overrides, args.stage)

    if here().ranks == 1:
        return own()  # mistakes are reported before lightning and lingen.data are imported
    from lingen.ranks.launch import load_together

    return load_together(own)


def _look(say: Callable[[str], None], folder: RunFolder, stages: Sequence[Recipe]) -> None:
    """The preflight of all ranks. UnfitError where it finds a fault."""
    from lingen.launch.preflight import preflight, report_lines

    say("preflight: looks at every node")
    report = preflight(folder, stages)
    for line in report_lines(report):
        say(line)
    report.check()


def leave_unfit(error: UnfitError) -> int:
    """Exit code of a run whose preflight has failed: that of a start anew where other nodes may do."""
    code = signals.REQUEUE if error.nodes else cli.FAILED
    if error.hung:  # a thread may never come back
        if here().rank and not here().local_rank:
            print(f"{who()}{error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _print_outcome(folder: RunFolder, subject: Subject) -> None:
    from lingen.studies.report import write_report

    if folder.score.is_file():
        score = json.loads(folder.score.read_text())
        form = {"right": "{share:.0%} ({low:.0%} to {high:.0%})", "by chance": "{chance:.0%}"}
        cli.print_table([
            {"clips": what, "attribute": name} | {key: one.format(**score[what][name]) for key, one in form.items()}
            for what, name in product(("sampled", "real"), ("colour", "shape", "motion"))
        ])  # fmt: skip
        print("", *map(_about_score, ("sampled", "real"), (score["sampled"], score["real"])), sep="\n")
    for stage in (*reversed(read_run(folder.about)["stages"]), "score"):
        for sheet in sorted(folder.path.glob(f"samples/{stage}-[0-9]*/sheet.png"), reverse=True):
            print(sheet)
    try:
        print(write_report(folder.path))
    except Exception as error:  # the run is finished, whatever becomes of its page
        print(f"report.html was not made ({error}); lingen report {folder.path} tries again", file=sys.stderr)
    if subject is SUBJECTS["autoencoder"]:
        print(f"lingen eval tae --run {quote(str(folder.path))}")
    else:
        print(f"lingen sample --run {quote(str(folder.path))} --prompt '...' --out clip.mp4")


def _about_score(what: str, score: dict[str, Any]) -> str:
    apart = "" if score.get("diversity") is None else f"; clips of one caption are {score['diversity']:.3f} apart"
    captions = f" of {score['captions']} held-out captions" if "captions" in score else ""
    wide = "; so few captions make wide intervals: score.clips=12 has more" if score.get("captions", 12) < 12 else ""
    return f"{what}: {score['clips']} clips{captions}, {score['empty']} of them empty{apart}{wide}"


@cli.command(
    "make the clip of a prompt: an H.264 MP4, a contact sheet and the latents beside it",
    cli.argument("--run", metavar="DIR", help="a run folder: its last finished stage"),
    cli.argument("--checkpoint", metavar="F", help="a weights file (.safetensors)"),
    cli.argument("--prompt", action="append", default=[], help="what to show; may be given several times"),
    cli.argument("--prompts", metavar="FILE", help="a file with a prompt on each line"),
    cli.argument("--rewrite", action="store_true", help="have the recipe's chat model make long prompts of them first"),
    REWRITER,
    cli.argument("--again", metavar="CLIP", help="make this MP4 again, from what it notes; same machine, same bits"),
    cli.argument("--out", metavar="x.mp4", help="several give x-00.mp4, ...; default: clip.mp4, or CLIP-again.mp4"),
    cli.argument("--seed", type=int, help="another seed gives another clip"),
    cli.argument("--steps", type=cli.natural, metavar="N", help="solver steps"),
    cli.argument("--guidance", type=float, help="weight of the prompt; 1: none"),
    cli.argument("--seconds", type=cli.positive, metavar="S", help="length of the clip"),
    cli.argument("--size", type=cli.size_of, metavar="HxW", help="height x width in pixels, e.g. 384x704"),
    cli.argument("--repeat", type=cli.natural, metavar="N", help="different clips of each prompt; default: 1"),
    cli.IMPORT,
)  # fmt: skip
def sample(args: argparse.Namespace) -> int:
    if args.again is not None:
        return _sample_again(args)
    prompts = args.prompt + (lines_of(args.prompts) if args.prompts else [])
    if (args.run is None) == (args.checkpoint is None):
        raise RecipeError("Say where the weights are: either --run DIR or --checkpoint F.")
    if not prompts:
        raise RecipeError("There is no prompt. Give --prompt TEXT, or --prompts FILE with one on each line.")
    repeat, out = args.repeat or 1, check_target(args.out or "clip.mp4", ".mp4")
    weights = find_weights(args.run or args.checkpoint)  # a wrong name is told before torch is imported
    from lingen.ranks.collectives import on_first_rank, together
    from lingen.ranks.local_ranks import share
    from lingen.sampling.files import clip_paths, sample_to_files

    own = share(len(clip_paths(out, len(prompts) * repeat)))
    rewritten = on_first_rank(partial(_rewritten, args, prompts, weights))
    if on_first_rank(lambda: report_faults(rewritten)):
        print("Nothing was sampled. Leave out --rewrite to use the prompts as they are.", file=sys.stderr)
        return cli.FAILED
    say = partial(print, file=sys.stderr) if own.rank == 0 else lambda line: None
    with cli.count_bar("sampling") if own.rank == 0 else nullcontext() as progress:
        files = sample_to_files(
            weights, prompts, out, seed=args.seed, steps=args.steps,
            guidance=args.guidance, seconds=args.seconds, size=args.size, repeat=repeat, progress=progress,
            rewritten=[str(one.text) for one in rewritten], own=own, say=say,
        )  # fmt: skip
        together(partial(_make, (file for clip in files for file in _beside(clip))))
    return cli.DONE


def _beside(clip: Path) -> list[Path]:
    """A clip's MP4, contact sheet and latents."""
    from lingen.sampling.files import LATENTS_SUFFIX

    return [clip.with_suffix(end) for end in (".mp4", ".png", LATENTS_SUFFIX)]


def _make(files: Iterable[Path]) -> None:
    """Names each file as soon as it is made."""
    try:
        for file in files:
            print(file, flush=True)
    except SettingError as error:
        raise RecipeError(*(f"--{error.setting}: {text.partition(' (at ')[0]}" for text in error.problems)) from error
    except ValueError as error:
        raise error if isinstance(error, RecipeError) else RecipeError(str(error)) from error


def _sample_again(args: argparse.Namespace) -> int:
    """``sample --again CLIP``: only where the weights are and where to write may be said beside it."""
    given = [f"--{name}" for name in NOTED if getattr(args, name) not in (None, False, [])]
    if given:
        raise RecipeError(f"--again takes everything from the clip's notes; leave out {', '.join(given)}.")
    if args.run is not None and args.checkpoint is not None:
        raise RecipeError("Say where the weights are: either --run DIR or --checkpoint F, or neither.")
    from lingen.sampling.files import sample_again

    made = Path(args.again)
    out = args.out or made.with_name(f"{made.stem}-again.mp4")
    with cli.count_bar("sampling") as progress:
        say = partial(print, file=sys.stderr)
        print(*_beside(sample_again(made, out, args.run or args.checkpoint, say=say, progress=progress)), sep="\n")
    return cli.DONE


NOTED = ("prompt", "prompts", "rewrite", "rewriter", "seed", "steps", "guidance", "seconds", "size", "repeat")
"""Flags of `sample` for what a clip notes."""


def _rewritten(args: argparse.Namespace, prompts: list[str], weights: Path) -> list[Rewritten]:
    """The prompts as the chat model rewrites them, before anything else takes memory; none without --rewrite."""
    from lingen.kernels.choice import best_device
    from lingen.training.weights import recipe_of

    how = recipe_of(weights).rewrite
    if not (args.rewrite or args.rewriter):
        if how.path is not None:
            told = f"--rewrite has the recipe's {how.name} ({how.path}) make long ones of them first."
            print(f"The prompts are used as they are; {told}", file=sys.stderr)
        return []
    how = replace(how, path=args.rewriter or how.path)
    if how.path is None:
        raise RecipeError(
            "The recipe of these weights names no model that rewrites prompts. Name one with --rewriter DIR, or leave "
            "out --rewrite to use the prompts as they are."
        )
    return rewrite(prompts, how, str(best_device()))


@cli.command(
    "a sentence as a clip of the emoji theatre, within seconds on a laptop, and a contact sheet",
    cli.argument("prompt", nargs="+", metavar="PROMPT", help="what to show: one sentence, in quotes or without"),
    cli.argument(
        "--checkpoint",
        metavar="F",
        default="theatre_128",
        help="a run of the theatre, its weights, or a folder of both models; default: lingen's own weights",
    ),
    cli.argument(
        "--seconds", type=cli.positive, default=4.0, metavar="S", help="default: 4; trained were 4, 16 and 60"
    ),
    cli.argument("--seed", type=int, default=0, help="another seed gives another clip"),
    cli.argument("--steps", type=cli.natural, metavar="N", help="solver steps"),
    cli.argument("--out", default="demo.mp4", metavar="x.mp4", help="or x.gif, x.webp; default: demo.mp4"),
)
def demo(args: argparse.Namespace) -> None:
    from lingen.data.theatre import ACTIONS, ACTORS, LIGHTS, SCENES, known_words
    from lingen.sampling import find_demo
    from lingen.sampling.asked import unknown_words

    suffix = Path(args.out).suffix.lower()
    out = check_target(args.out, suffix if suffix in (".gif", ".webp") else ".mp4")
    weights = find_demo(args.checkpoint)
    prompt, known = " ".join(args.prompt).strip(), known_words()
    if not prompt:
        raise RecipeError("Say what the clip shows, such as: lingen demo a penguin jumps in the snow at night")
    unknown = unknown_words(prompt, known)
    marked = re.sub(r"\w+", lambda word: f"{word[0]}(?)" if word[0] in unknown else word[0], prompt)
    names = sorted({part for name in (*ACTORS, *ACTIONS, *SCENES, *LIGHTS) for part in name.split()})
    told = []
    for word in unknown:  # a bee is a honeybee, and not "becomes"
        longer = [name for name in names if len(word) > 2 and name.endswith(word)]
        told.append(f"'{word}' is not known.{did_you_mean(longer[0] if longer else word, names)}")
    print(f"{args.seconds:g} seconds of: {marked}", *told, sep="\n", flush=True)  # importing torch takes its time
    with cli.count_bar("sampling") as bar:
        _make(_demo_files(weights, prompt, out, seconds=args.seconds, seed=args.seed, steps=args.steps, progress=bar))


def _demo_files(weights: Path, prompt: str, out: Path, **how: Any) -> Iterator[Path]:
    from lingen.media import contact_sheet, save_animation, save_video
    from lingen.sampling.clips import generate
    from lingen.training.weights import recipe_of

    clip, about = next(generate(weights, prompt, **how)), {"prompt": prompt, "recipe": recipe_of(weights).name}
    is_film = out.suffix == ".mp4"
    yield save_video(clip, out, 12, title=prompt, about=about) if is_film else save_animation(clip, out, 12, about)
    yield contact_sheet([clip], out.with_suffix(".png"), [prompt], about=about)


@cli.command(
    "latents that `lingen sample` saved -> MP4 and contact sheet",
    cli.argument("latents", metavar="LATENTS", help="a .latents.safetensors file"),
    cli.argument("--out", default="clip.mp4", metavar="x.mp4"), *cli.STREAM_FLAGS, cli.IMPORT,
)  # fmt: skip
def decode(args: argparse.Namespace) -> None:
    from lingen.sampling.files import decode_file

    print(decode_file(args.latents, args.out, *cli.ways_of_args(args)))


@cli.command(
    "a page for this machine's browser: clips as they are made, stop, a gallery with what made each (gradio)",
    cli.argument("--runs", default="runs", metavar="DIR", help="a folder of run folders; default: runs"),
    cli.argument("--out", default="clips", metavar="DIR", help="where clips are written; default: clips"),
    cli.argument("--port", type=cli.natural, default=7860, metavar="N", help="of 127.0.0.1; default: 7860"),
)
def ui(args: argparse.Namespace) -> None:
    if find_spec("gradio") is None:
        raise RecipeError('The page is made by gradio, which is not installed: pip install "gradio>=6".')
    check_place(Path(args.out))
    from lingen.sampling.ui import open_page

    open_page(Path(args.runs), Path(args.out).resolve(), args.port, partial(print, flush=True))


@cli.command(
    "the averaged weights of a finished stage as one small file, for sampling, `init` or autoencoder.path; or a folder",
    cli.argument("run", metavar="RUN", help="a run folder: its last finished stage; or a weights file"),
    cli.argument("--out", metavar="F", help="the .safetensors file to write"),
    cli.argument("--to", nargs=2, metavar=("diffusers", "DIR"),
                 help="the new folder to write, for lingen.LinGenPipeline.from_pretrained, with a model card"),
    cli.argument("--precision", choices=["bf16", "fp32"],
                 help="default: bf16; of a folder fp32, which makes the same clips"),
)  # fmt: skip
def export(args: argparse.Namespace) -> None:
    if (args.out is None) == (args.to is None):
        raise RecipeError("Say what to write: either --out F.safetensors, or --to diffusers DIR.")
    if args.to and args.to[0] != "diffusers":
        meant = did_you_mean(args.to[0], ["diffusers"])
        raise RecipeError(f"--to knows no '{args.to[0]}'.{meant} A folder: --to diffusers DIR; a file: --out F.")
    find_weights(args.run)  # a wrong name is told before torch is imported
    if args.out is not None:
        print(export_weights(args.run, args.out, args.precision or "bf16"))
        return
    from lingen.sampling.pipeline import export_folder

    print(export_folder(args.run, args.to[1], args.precision or "fp32"))
