"""Emoji theatre: storyboards of animated emoji before drawn scenes, and captions that tell exactly what they show.

80 actors x 11 actions x 6 scenes x 3 lights, one to twelve events a clip. Pairs of actor and action, of actor and
scene, and orders of two actions are held out, by rules that are fixed here: 1 of 11 pairs of actor and action to tune
on and as many to report on, 1 of 12 of the others. Training never shows them, though it shows each of their words.
Words alone, no pixels: `lingen.data.acting` draws. All of it is ours; the paper has no such set.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np

from lingen.recipe.bounds import CONTENT, IDENTITY, AtLeast
from lingen.recipe.signature import checked

ACTORS = {
    "ant": "🐜", "chick": "🐤", "bear": "🐻", "bird": "🐦", "blowfish": "🐡", "caterpillar": "🐛",
    "camel": "🐫", "hen": "🐔", "squirrel": "🐿️", "cow": "🐄", "crocodile": "🐊", "dog": "🐶",
    "cat": "🐱", "dolphin": "🐬", "elephant": "🐘", "sheep": "🐑", "fish": "🐟", "frog": "🐸",
    "honeybee": "🐝", "horse": "🐎", "koala": "🐨", "ladybird": "🐞", "monkey": "🐒", "mouse": "🐁",
    "octopus": "🐙", "panda": "🐼", "penguin": "🐧", "pig": "🐖", "rabbit": "🐇", "rooster": "🐓",
    "snail": "🐌", "snake": "🐍", "whale": "🐋", "tiger": "🐅", "turtle": "🐢", "wolf": "🐺",
    "butterfly": "🦋", "crab": "🦀", "duck": "🦆", "fox": "🦊", "giraffe": "🦒", "hedgehog": "🦔",
    "kangaroo": "🦘", "lion": "🦁", "owl": "🦉", "parrot": "🦜", "peacock": "🦚", "shark": "🦈",
    "unicorn": "🦄", "zebra": "🦓", "dinosaur": "🦖", "eagle": "🦅", "dragon": "🐉",
    "polar bear": "🐻‍❄️", "motorcycle": "🏍️", "racing car": "🏎️", "ambulance": "🚑", "bus": "🚌",
    "fire engine": "🚒", "flying saucer": "🛸", "helicopter": "🚁", "train": "🚂", "police car": "🚓",
    "rocket": "🚀", "plane": "🛩️", "ship": "🚢", "taxi": "🚕", "tractor": "🚜", "balloon": "🎈",
    "robot": "🤖", "mushroom": "🍄", "cactus": "🌵", "sunflower": "🌻", "christmas tree": "🎄",
    "pumpkin": "🎃", "cake": "🎂", "strawberry": "🍓", "hamburger": "🍔", "basketball": "🏀",
    "guitar": "🎸",
}  # fmt: skip
"""Name -> emoji, in the order of the sprites in their file."""
ACTIONS = {
    "enter": ("enters from the {back}", "comes in from the {back}", "appears from the {back}"),
    "leave": ("leaves to the {way}", "goes away to the {way}", "disappears to the {way}"),
    "cross": ("moves {way}", "crosses to the {way}", "goes past to the {way}"),
    "fly": ("flies {way}", "flies to the {way}", "soars {way}"),
    "rise": ("takes off", "rises into the sky", "lifts off"),
    "fall": ("falls down", "falls from the sky", "drops from above"),
    "jump": ("jumps", "jumps up and down", "hops"),
    "grow": ("grows", "gets bigger", "becomes large"),
    "shrink": ("shrinks", "gets smaller", "becomes small"),
    "turn": ("turns around", "spins", "rolls over"),
    "follow": ("follows {other} to the {way}", "chases {other} to the {way}", "goes {way} behind {other}"),
}
"""Action -> wordings; the first is that of `caption_of`."""
DIRECTED = ("enter", "leave", "cross", "fly", "follow")
SCENES = {
    "meadow": ("over a meadow", "in a meadow", "on a green meadow"),
    "sea": ("by the sea", "at the sea", "on a beach"),
    "desert": ("in the desert", "in a desert", "on desert sand"),
    "city": ("in the city", "in a city", "in a street of a city"),
    "space": ("in space", "on the moon", "in outer space"),
    "snow": ("in the snow", "over snow", "in a snowy land"),
}
LIGHTS = {
    "day": ("by day", "in daylight", "on a bright day"),
    "dusk": ("at dusk", "at sunset", "in the evening"),
    "night": ("at night", "by night", "under the stars"),
}
PANS = {
    "": ("",),
    **{way: (f", the camera pans {way}", f", while the camera moves {way}") for way in ("left", "right")},
}
THEN = (", then ", " and then ", ". After that ")
OTHER_WAY = {"left": "right", "right": "left"}
WORDINGS = 4
"""Captions of a clip."""

Split = Literal["train", "tune", "report"]
SPLITS: tuple[Split, ...] = ("train", "tune", "report")
"""Of every data set that lingen draws itself."""


@checked
@dataclass(frozen=True, kw_only=True)
class Theatre:
    """Animated emoji that act before drawn scenes, drawn while training goes on; nothing is kept on the disk."""

    sprites: Annotated[str, IDENTITY, CONTENT, "the actors' pictures, of `lingen data fetch theatre`"] = (
        "data/theatre/sprites.webp"
    )
    clips: Annotated[int, AtLeast(1), IDENTITY, "clips to train on before the first comes again"] = 1_000_000
    held_out: Annotated[int, AtLeast(1), IDENTITY, "clips in each of the two held-out splits"] = 512
    seed: Annotated[int, AtLeast(0), IDENTITY, "of the storyboards; independent of the recipe's seed"] = 0


class Event(NamedTuple):
    """Who does what, and where."""

    who: str
    action: str
    way: str
    """``left`` or ``right``; empty for actions that go nowhere."""
    other: str
    """Who is followed; else empty."""
    scene: str
    light: str


class Storyboard(NamedTuple):
    """Events of equal length, one after the other."""

    events: tuple[Event, ...]
    pan: str
    """Where the camera pans: ``left``, ``right`` or nowhere."""


def _number(names: Mapping[str, object], name: str) -> int:
    return list(names).index(name)


def _named(remainder: int, tune: int) -> Split:
    return "report" if remainder == 0 else "tune" if remainder == tune else "train"


def split_of_action(who: str, action: str) -> Split:
    """Each actor has one action in each held-out split."""
    return _named((5 * _number(ACTORS, who) + _number(ACTIONS, action)) % 11, 5)


def split_of_scene(who: str, scene: str) -> Split:
    """Every second actor has one scene to tune on, the others one to report on."""
    return _named((7 * _number(ACTORS, who) + _number(SCENES, scene)) % 12, 6)


def split_of_order(before: str, after: str) -> Split:
    """Eight orders of two different actions are held out to report on, eight to tune on; training has each the other
    way around."""
    one, other = _number(ACTIONS, before), _number(ACTIONS, after)
    return "train" if one == other else _named((one + 2 * other) % 13, 3)


def splits_in(board: Storyboard) -> set[str]:
    """The splits of all pairs and orders in a storyboard. One to train on has ``train`` alone, a held-out one never
    what the other held-out split has."""
    actions = [event.action for event in board.events]
    found: set[str] = {split_of_order(one, other) for one, other in zip(actions, actions[1:], strict=False)}
    for event in board.events:
        found.add(split_of_action(event.who, event.action))
        found |= {split_of_scene(who, event.scene) for who in (event.who, event.other) if who}
    return found


def event_counts(seconds: float) -> tuple[int, int]:
    """The fewest and the most events of a clip: one in 12 seconds to one in 2, at most 12."""
    most = min(12, max(1, int(seconds / 2)))
    return min(most, max(1, int(seconds / 12))), most


def storyboard(split: Split, seed: int, number: int, seconds: float) -> Storyboard:
    """The storyboard of a clip: a function of these four alone. One of a held-out split holds at least one pair or
    order of it."""
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    while True:
        board = _draw(split, rng, seconds)
        if split in splits_in(board):
            return board


def _draw(split: Split, rng: np.random.Generator, seconds: float) -> Storyboard:
    """Events one by one, each of what the split may hold."""
    allowed, events = {"train", split}, list[Event]()
    low, high = event_counts(seconds)
    count = int(rng.integers(low, high + 1))
    scene, light = _one(SCENES, rng), _one(LIGHTS, rng)
    while len(events) < count:
        if events and rng.random() < (0.5 if seconds > 8 else 0):
            scene, light = _one(SCENES, rng), _one(LIGHTS, rng)
        action, who = _one(ACTIONS, rng), _one(ACTORS, rng)
        other = _one(ACTORS, rng) if action == "follow" else ""
        way = ("left", "right")[rng.integers(2)] if action in DIRECTED else ""
        event = Event(who, action, way, other, scene, light)
        if who != other and splits_in(Storyboard((*events[-1:], event), "")) <= allowed:
            events.append(event)
    pan = ("", "", "left", "right")[rng.integers(4)]
    return Storyboard(tuple(events), pan)


def _one(names: Mapping[str, object], rng: np.random.Generator) -> str:
    return list(names)[rng.integers(len(names))]


def caption_of(board: Storyboard) -> str:
    """The plainest caption: ``a honeybee flies left over a meadow at dusk, then a rocket takes off``."""
    return _told(board, None)


def captions_of_board(board: Storyboard, rng: np.random.Generator) -> list[str]:
    """`caption_of`, and the same in other words: `WORDINGS` captions in all."""
    return [caption_of(board), *(_told(board, rng) for _ in range(WORDINGS - 1))]


def _told(board: Storyboard, rng: np.random.Generator | None) -> str:
    def pick(wordings: tuple[str, ...]) -> str:
        return wordings[0 if rng is None else rng.integers(len(wordings))]

    place_first, text, before = rng is not None and rng.random() < 0.4, "", ("", "")
    for event in board.events:
        words = {"way": event.way, "back": OTHER_WAY.get(event.way), "other": with_article(event.other)}
        clause = f"{with_article(event.who)} {pick(ACTIONS[event.action]).format(**words)}"
        if before != (event.scene, event.light):
            place = f"{pick(SCENES[event.scene])} {pick(LIGHTS[event.light])}"
            clause = f"{place} {clause}" if place_first else f"{clause} {place}"
            before = (event.scene, event.light)
        text += (pick(THEN) if text else "") + clause
    return text + pick(PANS[board.pan])


def with_article(name: str) -> str:
    """``a dog``, ``an ant``."""
    return f"{'an' if name[:1] in 'aeio' else 'a'} {name}"


def known_words() -> frozenset[str]:
    """Every word that a caption can hold, in lower case."""
    texts = [*ACTORS, "a an"]
    for wordings in (*ACTIONS.values(), *SCENES.values(), *LIGHTS.values(), *PANS.values(), THEN):
        texts += [text.format(way="left", back="right", other="") for text in wordings]
    return frozenset(word for text in texts for word in re.findall(r"\w+", text.lower()))
