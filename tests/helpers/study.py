"""Small studies: folders of clips as `lingen sample` writes them, and votes as the page writes them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lingen.evaluation.study import QUESTIONS
from lingen.evaluation.study_report import VOTE_COLUMNS
from lingen.media import save_video

PROMPTS = ["a red circle moves right", "a blue square turns", "a green star falls"]


def write_clips(folder: Path, prompts: Iterable[str], seed: int, repeat: int = 1, frames: int = 12) -> Path:
    """A clip of a moving square for each prompt, with notes as far as a study reads them."""
    random = np.random.default_rng(seed)
    for number, prompt in enumerate(prompts):
        for repetition in range(repeat):
            clip = np.full((frames, 48, 64, 3), 200, np.uint8)
            top, colour = int(random.integers(4, 30)), random.integers(0, 160, 3)
            for time in range(frames):
                clip[time, top : top + 14, 2 + 3 * time : 16 + 3 * time] = colour
            about = {"prompt": prompt, "repetition": repetition, "weights": f"/secret/of/{folder.name}"}
            save_video(clip, folder / f"clip-{number * repeat + repetition:02d}.mp4", 8, title=prompt, about=about)
    return folder


def rightly(system: int) -> Callable[..., str]:
    """Known answers are given as they are; among others the clip of one system is chosen."""

    def choose(axis: str, trial: dict[str, Any], clips: dict[str, Any]) -> str:
        if "known" in trial:
            return str(trial["known"]["answer"])
        return next(name for name in trial["shown"] if clips[name]["system"] == system)

    return choose


def write_votes(
    path: Path, key: dict[str, Any], rater: str, choose: Any, session: str = "s", time: str = "2026-01-01",
    trials: int | None = None,
) -> Path:  # fmt: skip
    """The file of a rater who sees the clips of each trial in the order of the key."""
    rows = []
    for name, trial in sorted(key["trials"].items(), key=lambda one: "known" not in one[1])[:trials]:
        left, right = trial["shown"]
        for axis in QUESTIONS:
            chosen = choose(axis, trial, key["clips"])
            choice = {left: "left", right: "right"}.get(chosen, "tie")
            rows.append((key["study"], rater, session, name, left, right, axis, choice, "3.0", time))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([VOTE_COLUMNS, *rows])
    return path


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
