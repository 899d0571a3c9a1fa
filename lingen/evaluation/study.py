"""A preference study as one page: clips of two or more models, their sides hidden, and the key that tells them."""

import base64
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import av

from lingen.evaluation.clips import Key, find_clips
from lingen.files import check_target, write_json, write_text
from lingen.media import encode_mp4, read_video
from lingen.recipe.errors import RecipeError
from lingen.recipe.text import decode_json

QUESTIONS = ("overall", "consistency", "motion", "text")
KEY_FORMAT = "lingen-study-1"
LARGE_PAGE, SHOWN = 100e6, 10
"""Bytes above which a page opens slowly and is too large for mail; problems of a kind that are named."""

KNOWN_PAIRS = (
    ("overall", "blurred", "One clip was blurred; the other one is better."),
    ("consistency", "flickering", "One clip flickers; the other one keeps its light."),
    ("overall", "", "Both clips were the same: 'Equal' is a good answer whenever you see no difference."),
    ("consistency", "flickering", ""),
    ("overall", "blurred", ""),
)
"""Known answers: the axis that counts, how the page spoils one side, what training says; without a word no training."""


class StudyClip(NamedTuple):
    """A clip's H.264 in an MP4 that says nothing about its maker, and what it is: frames x height x width, fps."""

    path: Path
    data: bytes
    shape: str


def make_study(
    folders: Sequence[str | Path], prompts: Sequence[str], out: str | Path, seed: int = 0, per_rater: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Writes the page and, beside it, ``NAME.key.json``; the same clips, prompts and seed make the same study. Returns
    the key, and sentences about what is odd.

    Args:
        folders: clips as `lingen sample` writes them; for others see `find_clips`: a clip's repetition is its place
            among those of the prompt.
        per_rater: so many pairs for each rater, drawn by name; None: every two folders at every clip of a prompt.
    Raises:
        RecipeError: clips are missing, doubled, broken or the same on both sides, or another study's key is there."""
    page = check_target(out, ".html")
    if len(folders) < 2 or len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise RecipeError("A study compares two or more different folders: lingen study make A/ B/ --prompts P.")
    sides = [_clips_in(Path(folder)) for folder in folders]
    takes = sorted({take for side in sides for take in side if take[0] in prompts} | {(one, 0) for one in prompts})
    for folder, side in zip(folders, sides, strict=True):
        if lacking := [f"'{prompt}' (clip {number})" for prompt, number in takes if (prompt, number) not in side]:
            told = f"{', '.join(lacking[:SHOWN])}{' ...' if len(lacking) > SHOWN else ''}"
            raise RecipeError(f"{folder} lacks {len(lacking)} clips: {told}. Sample each side with the same prompts.")
    notes = [f"{len(side) - len(takes)} clips of {folder} have other prompts and are left out."
             for folder, side in zip(folders, sides, strict=True) if len(side) > len(takes)]  # fmt: skip
    rows = [[side[take] for side in sides] for take in takes]
    for (prompt, _), row in zip(takes, rows, strict=True):
        if len({clip.data for clip in row}) < len(row):
            raise RecipeError(f"Two sides show the same clip: {', '.join(str(clip.path) for clip in row)}.")
        if len({clip.shape for clip in row}) > 1:
            told = ", ".join(f"{clip.path} has {clip.shape}" for clip in row)
            notes.append(f"'{prompt}' is unequal, so that raters may tell the sides: {told}.")
    content, key = _study([str(folder) for folder in folders], [take[0] for take in takes], rows, seed, per_rater)
    text = _page(content, key)
    if (file := page.with_suffix(".key.json")).exists() and read_key(file)["study"] != key["study"]:
        raise RecipeError(f"{file} is the key of another study, whose votes need it. Name another --out.")
    if len(text) > LARGE_PAGE:
        notes.append(f"The page has {len(text) / 1e6:.0f} MB: slow to open, too large for mail. Take fewer prompts.")
    write_json(file, key)
    write_text(page, text)
    return key, notes


def _clips_in(folder: Path) -> dict[Key, StudyClip]:
    """The clip of each take. All are encoded anew alike: they play everywhere, none tells its maker."""
    found: dict[Key, StudyClip] = {}
    for path, key in ((clip.path, clip.key) for clip in find_clips(folder, named=True)):
        try:
            with av.open(str(path)) as file:
                count = file.streams.video[0].frames
            frames, fps = read_video(path.read_bytes())
            if len(frames) < max(2, count):
                raise ValueError(f"it has {len(frames)} of {max(2, count)} frames")
            data = encode_mp4(frames, fps, crf=14, exact=True)
        except (OSError, ValueError, IndexError, av.FFmpegError) as error:
            raise RecipeError(f"{path} cannot be read as a film: {error}. Make it again.") from error
        found[key] = StudyClip(path, data, f"{'x'.join(map(str, frames.shape[:3]))} at {fps:.4g} fps")
    return found


def _study(
    systems: list[str], prompts: list[str], rows: list[list[StudyClip]], seed: int, per_rater: int | None
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Name of a clip -> its bytes, and the key. Names and order of clips and trials tell nothing."""
    random, count = Random(seed), len(rows) * len(systems)
    names = [f"{number:04d}" for number in random.sample(range(count), count)]
    content: dict[str, bytes] = {}
    clips: dict[str, Any] = {}
    trials: list[dict[str, Any]] = []
    for prompt, row in zip(prompts, rows, strict=True):
        own = [names.pop() for _ in row]
        content |= {name: clip.data for name, clip in zip(own, row, strict=True)}
        clips |= {name: {"system": side, "file": str(row[side].path)} for side, name in enumerate(own)}
        trials += [{"prompt": prompt, "shown": random.sample([own[side] for side in pair], 2), "pair": pair}
                   for pair in combinations(range(len(systems)), 2)]  # fmt: skip
    for number, (axis, spoilt, hint) in enumerate(KNOWN_PAIRS):
        good = list(content)[number * (len(systems) + 1) % count]
        shown = random.sample([good, f"{good} {spoilt}".strip()], 2)
        known = {"axis": axis, "answer": good if spoilt else "tie", "hint": hint}
        trials.append({"prompt": prompts[list(content).index(good) // len(systems)], "shown": shown, "known": known})
    random.shuffle(trials)
    hashes = [hashlib.sha256(data).hexdigest() for data in content.values()]
    study = hashlib.sha256(json.dumps([seed, per_rater, systems, trials, hashes]).encode()).hexdigest()[:12]
    key = {"format": KEY_FORMAT, "study": study, "seed": seed, "systems": systems, "per_rater": per_rater}
    return content, key | {"clips": clips, "trials": {f"{number:04d}": one for number, one in enumerate(trials)}}


def _page(content: dict[str, bytes], key: dict[str, Any]) -> str:
    """The HTML, with each clip once; of known answers it tells those of training alone."""
    trials: list[dict[str, Any]] = []
    for name, trial in key["trials"].items():
        trials.append({"id": name, "prompt": trial["prompt"], "clips": trial["shown"], "always": "known" in trial})
        if (known := trial.get("known")) and known["hint"]:
            trials[-1] |= {"answer": [known["axis"], known["answer"]], "hint": known["hint"]}
    told = json.dumps({"study": key["study"], "axes": QUESTIONS, "per_rater": key["per_rater"], "trials": trials})
    coded = {name: base64.b64encode(data).decode() for name, data in sorted(content.items())}
    films = "\n".join(f'<script type="text/plain" id="clip-{name}">{data}</script>' for name, data in coded.items())
    before, after = Path(__file__).with_name("study.html").read_text(encoding="utf-8").split("__CLIPS__")
    return before.replace("__DATA__", told.replace("<", "\\u003c")) + films + after


def read_key(path: str | Path) -> dict[str, Any]:
    """The key of a study. RecipeError for any other file."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        if (key := decode_json(Path(path).read_bytes()))["format"] == KEY_FORMAT:
            return dict(key)
    raise RecipeError(f"{path} is not there, or no key of `lingen study make`, whose name ends with .key.json.")
