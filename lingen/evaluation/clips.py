"""The clips that are judged: which there are, what their prompts are, and the pixels that every measure sees."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import UInt8

from lingen.data.decode import decode_video
from lingen.data.frames import ShortClip, frames_at, opened_video
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import DataConfig
from lingen.recipe.text import decode_text

CLIP_ENDS = (".mp4", ".webm")
Key = tuple[str, int]
"""Prompt and repetition."""


class ClipFile(NamedTuple):
    """A clip; its prompt is "" where it is lost, its repetition -1 until it is counted, its seed None where it is not
    known."""

    path: Path
    prompt: str
    repetition: int = -1
    seed: int | None = None

    @property
    def key(self) -> Key:
        return self.prompt, self.repetition


@dataclass(frozen=True)
class View:
    """How clips are shown to all measures: frames nearest in time at `fps`, scaled to cover a square of `side`, its
    centre cut out (`lingen.data.decode`). Video networks see the first `frames`."""

    fps: float
    frames: int = 16
    side: int = 224


def show_clip(data: bytes, view: View) -> tuple[UInt8[np.ndarray, "t h w 3"], str]:
    """All frames, and the codec. ValueError for a clip that is broken or shorter than `view.frames`."""
    with opened_video(data) as (stream, _, shown):
        if len(shown) < 2:
            raise ValueError("broken video: it has fewer than two frames")
        tick, codec = float(stream.time_base), f"{stream.codec_context.name} {stream.codec_context.pix_fmt}"
        length = float(shown[-1] - shown[0]) * tick
        count = frames_at(view.fps, length, length / (len(shown) - 1), len(shown), tick)
    if count < view.frames:
        raise ValueError(f"{ShortClip(count, view.frames)}; --frames {count} takes it")
    clip = decode_video(data, frames=count, size=(view.side,) * 2, fps=view.fps, start=0)
    return np.ascontiguousarray(clip.pixels.permute(1, 2, 3, 0).numpy()), codec


def check_length(name: str, data: DataConfig, view: View) -> None:
    """RecipeError where clips of a recipe's frames are too short for the view."""
    count = frames_at(view.fps, (data.frames - 1) / data.fps, 1 / data.fps, data.frames, 0)
    if count < view.frames:
        raise RecipeError(
            f"{name} makes clips of {data.frames} frames at {data.fps:g} a second, {count} at --fps {view.fps:g}, and "
            f"--frames {view.frames} are wanted: " + (f"say --frames {count}." if count > 1 else "take longer clips.")
        )


def holds_clips(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix.lower() in CLIP_ENDS for path in folder.iterdir())


def find_clips(folder: Path, *, named: bool = False) -> list[ClipFile]:
    """The clips of a folder. Their prompts are in the notes of `lingen sample`, or in NAME.txt beside them; where that
    holds for no clip, names stand for prompts. RecipeError for no clips, or two of one prompt and repetition.

    Args:
        named: a clip without both has its title for a prompt, else its name without ``-N``."""
    if not holds_clips(folder):
        raise RecipeError(f"{folder} is no folder with clips ({', '.join(CLIP_ENDS)}); unpack shards with tar -xf.")
    found = [_in(path, named) for path in sorted(folder.iterdir()) if path.suffix.lower() in CLIP_ENDS]
    if not any(clip.prompt for clip in found):
        found = [clip._replace(prompt=clip.path.stem) for clip in found]
    counts, clips = Counter[str](), []
    for clip in found:
        clips.append(clip if clip.repetition >= 0 else clip._replace(repetition=counts[clip.prompt]))
        counts[clip.prompt] += 1
    twice = [key for key, n in Counter(clip.key for clip in clips).items() if n > 1]
    if twice:
        raise RecipeError(f"{folder} holds two clips of {twice[0]} (prompt, repetition). Take one of them out.")
    return clips


def _in(path: Path, named: bool) -> ClipFile:
    about: dict[str, str] = {}
    with suppress(OSError, av.FFmpegError), av.open(str(path)) as file:
        about = file.metadata
    with suppress(ValueError, KeyError, TypeError):
        notes = json.loads(about["comment"])
        return ClipFile(path, str(notes["prompt"]), int(notes["repetition"]), notes.get("seed"))
    beside = path.with_suffix(".txt")
    prompt = decode_text(beside.read_bytes()).strip() if beside.is_file() else ""
    if named and not prompt:
        prompt = about.get("title", "").strip() or re.sub(r"-\d+$", "", path.stem)
    return ClipFile(path, prompt)


def check_paired(subjects: dict[str, list[ClipFile]], prompts: Sequence[str] = (), repeat: int = 1) -> list[Key]:
    """The takes that every subject should hold: those asked for, else all that any of them holds.

    RecipeError where subjects have different seeds, or one lacks prompts of another. A repetition that is not there
    and a clip that cannot be read are failures of their subject, and with `prompts` all that is missing."""
    seeds = {name: {clip.seed for clip in clips} - {None} for name, clips in subjects.items()}
    if len({frozenset(held) for held in seeds.values() if held}) > 1:
        raise RecipeError(f"The clips were sampled with different seeds ({seeds}). Sample all with the same --seed.")
    held = {name: {clip.prompt for clip in clips} - {""} for name, clips in subjects.items()}
    wanted = list(dict.fromkeys(prompts)) or sorted(set().union(*held.values()))
    for name, clips in subjects.items():
        missing, more = [one for one in wanted if one not in held[name]], sorted(held[name] - set(wanted))
        if more or (not prompts and len(missing) > sum(not clip.prompt for clip in clips)):
            told = f"has clips of {len(more)} prompts that --prompts lacks" if more else f"lacks {len(missing)} prompts"
            raise RecipeError(
                f"{name} {told}, such as '{(more or missing)[0]}'. Sample the same prompts for all; --prompts FILE "
                "counts what is missing as failures."
            )
    asked = [(prompt, number) for prompt in wanted for number in range(repeat)] if prompts else []
    return asked or sorted({clip.key for clips in subjects.values() for clip in clips if clip.prompt})
