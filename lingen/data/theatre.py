"""Emoji theatre: storyboards of animated emoji before drawn scenes, and captions that tell exactly what they show.

80 actors x 11 actions x 6 scenes x 3 lights, one to twelve events a clip. Pairs of actor and action, of actor and
scene, and orders of two actions are held out, by rules that are fixed here: 1 of 11 pairs of actor and action to tune
on and as many to report on, 1 of 12 of the others. Training never shows them, though it shows each of their words.
Words alone, no pixels: `lingen.data.acting` draws. All of it is ours; the paper has no such set.
"""

import re
from collections.abc import Iterable
from importlib.resources import files
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import yaml

from lingen.recipe.bounds import CONTENT, IDENTITY, AtLeast
from lingen.recipe.signature import section

PLAY: dict[str, Any] = yaml.safe_load(files("lingen.data").joinpath("theatre.yaml").read_text(encoding="utf-8"))
"""What the theatre plays with: names, wordings, and how scenes look."""
ACTORS: dict[str, str] = PLAY["actors"]
"""Name -> emoji, in the order of the sprites in their file."""
ACTIONS, SCENES, LIGHTS = (list(PLAY[part]) for part in ("actions", "scenes", "lights"))
OTHER_WAY = {"left": "right", "right": "left"}
WORDINGS = 4
"""Captions of a clip."""

Split = Literal["train", "tune", "report"]
SPLITS: tuple[Split, ...] = ("train", "tune", "report")
"""Of every data set that lingen draws itself."""


@section
class Theatre:
    """Animated emoji that act before drawn scenes, drawn while training goes on; nothing is kept on the disk."""

    sprites: Annotated[str, IDENTITY, CONTENT, "of `lingen data fetch theatre`"] = "data/theatre/sprites.webp"
    clips: Annotated[int, AtLeast(1), IDENTITY, "clips to train on before the first comes again"] = 1_000_000
    held_out: Annotated[int, AtLeast(1), IDENTITY, "clips in each of the two held-out splits"] = 512
    seed: Annotated[int, AtLeast(0), IDENTITY, "of the storyboards; independent of the recipe's seed"] = 0


class Event(NamedTuple):
    """Who does what, and where."""

    who: str
    other: str
    """Who is followed; else empty."""
    action: str
    way: str
    """``left`` or ``right``; empty for actions that go nowhere."""
    scene: str
    light: str


class Storyboard(NamedTuple):
    """Events of equal length, one after the other."""

    events: tuple[Event, ...]
    pan: str
    """Where the camera pans: ``left``, ``right`` or nowhere."""


def split_of(kind: Literal["action", "scene", "order"], one: str, other: str) -> Split:
    """The split of an actor and an action, of an actor and a scene, or of two actions one after the other.

    Each actor has one action in each held-out split, and one scene in one of them. Eight orders of different actions
    are held out to report on and eight to tune on; training has each the other way around."""
    names = list(ACTORS)
    if kind == "action":
        remainder, tune = (5 * names.index(one) + ACTIONS.index(other)) % 11, 5
    elif kind == "scene":
        remainder, tune = (7 * names.index(one) + SCENES.index(other)) % 12, 6
    else:
        remainder, tune = (ACTIONS.index(one) + 2 * ACTIONS.index(other)) % 13 if one != other else 1, 3
    return "report" if remainder == 0 else "tune" if remainder == tune else "train"


def splits_in(board: Storyboard) -> set[str]:
    """The splits of all pairs and orders in a storyboard. One to train on has ``train`` alone, a held-out one never
    what the other held-out split has."""
    events = board.events
    found = {split_of("order", one.action, other.action) for one, other in pairwise(events)}
    found |= {split_of("action", event.who, event.action) for event in events}
    return {*found, *(split_of("scene", who, event.scene) for event in events for who in event[:2] if who)}


def storyboard(split: Split, seed: int, number: int, seconds: float) -> Storyboard:
    """The storyboard of a clip: a function of these four alone. One event in 12 seconds to one in 2, at most 12; one of
    a held-out split has at least one pair or order of it."""
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    while True:
        board = _draw(split, rng, seconds)
        if split in splits_in(board):
            return board


def _draw(split: Split, rng: np.random.Generator, seconds: float) -> Storyboard:
    """Events one by one, each of what the split may hold."""

    def one_of(names: Iterable[str]) -> str:
        found = list(names)
        return found[rng.integers(len(found))]

    events = list[Event]()
    most = min(12, max(1, int(seconds / 2)))
    count = rng.integers(min(most, max(1, int(seconds / 12))), most + 1)
    scene, light = one_of(SCENES), one_of(LIGHTS)
    while len(events) < count:
        if events and seconds > 8 and rng.random() < 0.5:
            scene, light = one_of(SCENES), one_of(LIGHTS)
        who, action = one_of(ACTORS), one_of(ACTIONS)
        other = one_of(ACTORS) if action == "follow" else ""
        way = one_of(OTHER_WAY) if "{" in PLAY["actions"][action][0] else ""
        event = Event(who, other, action, way, scene, light)
        if who != other and splits_in(Storyboard((*events[-1:], event), "")) <= {"train", split}:
            events.append(event)
    return Storyboard(tuple(events), one_of(("", "", "left", "right")))


def caption_of(board: Storyboard, rng: np.random.Generator | None = None) -> str:
    """``a honeybee flies left over a meadow at dusk, then a rocket takes off``; with `rng` in any of the wordings."""

    def pick(wordings: list[str]) -> str:
        return wordings[0 if rng is None else rng.integers(len(wordings))]

    place_first, text, before = rng is not None and rng.random() < 0.4, "", ("", "")
    for event in board.events:
        words = {"way": event.way, "back": OTHER_WAY.get(event.way), "other": _a(event.other)}
        clause = f"{_a(event.who)} {pick(PLAY['actions'][event.action]).format(**words)}"
        if before != (event.scene, event.light):
            before = (event.scene, event.light)
            place = f"{pick(PLAY['scenes'][event.scene])} {pick(PLAY['lights'][event.light])}"
            clause = f"{place} {clause}" if place_first else f"{clause} {place}"
        text += (pick(PLAY["then"]) if text else "") + clause
    return text + pick(PLAY["pans"][board.pan])


def _a(name: str) -> str:
    return f"{'an' if name[:1] in 'aeio' else 'a'} {name}"


def known_words() -> frozenset[str]:
    """Every word that a caption can hold, in lower case."""
    wordings = [*ACTORS, "a an left right", *PLAY["then"]]
    for part in ("actions", "scenes", "lights", "pans"):
        wordings += [text.format(way="", back="", other="") for texts in PLAY[part].values() for text in texts]
    return frozenset(re.findall(r"\w+", " ".join(wordings).lower()))
