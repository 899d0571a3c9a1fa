"""A storyboard as pixels: where each actor is at each moment, and sprites on scenes as theatre.yaml has them."""

import io
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from lingen.data.index import RECORD, Index
from lingen.data.locations import Location
from lingen.data.theatre import (
    ACTORS,
    PLAY,
    SPLITS,
    WORDINGS,
    Event,
    Split,
    Storyboard,
    Theatre,
    caption_of,
    storyboard,
)
from lingen.recipe.errors import RecipeError

SPRITE = 64
"""Height and width of a sprite in its file."""
SPRITE_FRAMES = 36
"""Pictures of an animation: three seconds at 12 a second."""
ALIKE = 0.04
"""Mean difference of two pictures in 0..1 below which they are alike: the nearest actors differ by 0.077 [ours]."""
GROUND, TALL = 0.88, 0.45
"""Where feet stand, and how tall an actor is, as shares of the picture's height."""
FACES_RIGHT = ("plane", "rocket")
"""Actors whose sprites look to the right; the others look to the left, or at us."""
PANORAMA, BLEND = 1.4, 0.25
"""Width of a scene in pictures; seconds that an actor or another scene takes to appear."""
VIEWS = 64
"""Of each scene in each light."""
WINDOWS = {"day": (0.62, 0.72, 0.82), "dusk": (1.0, 0.86, 0.45), "night": (1.0, 0.86, 0.45)}
BITS = 4
"""Corners lie at sixteenths of a pixel, so that outlines are smooth."""

PerFrame = Float[np.ndarray, " t"]


@dataclass(frozen=True)
class DrawnIndex(Index):
    """The clips of a split, drawn when they are asked for, in the place of an index of shards."""

    drawn: bool = True
    theatre: Theatre = Theatre()
    split: Split = "train"

    @classmethod
    def of(cls, theatre: Theatre, split: Split) -> "DrawnIndex":
        """As many clips as the settings say, which take no memory: all have the same record."""
        check_sprites(theatre.sprites)
        records = np.broadcast_to(np.zeros(1, RECORD), theatre.clips if split == "train" else theatre.held_out)
        return cls([Location("theatre", split)], records, np.zeros(0, "u1"), ["theatre"], theatre=theatre, split=split)

    def key(self, number: int) -> str:
        return f"{number:08d}"

    def draw(self, number: int, shape: tuple[int, int, int], fps: float) -> tuple[UInt8[Tensor, "3 t h w"], list[str]]:
        """Frames and captions of a clip: a function of the settings, the split and these arguments alone; `shape`:
        frames, height and width. RecipeError as for `load_sprites`."""
        frames, height, width = shape
        board = storyboard(self.split, self.theatre.seed, number, frames / fps)
        rng = np.random.default_rng([self.theatre.seed, SPLITS.index(self.split), number, 1])
        captions = [caption_of(board), *(caption_of(board, rng) for _ in range(WORDINGS - 1))]
        clip = perform(board, frames, fps, (height, width), load_sprites(self.theatre.sprites), rng)
        return torch.from_numpy(np.ascontiguousarray(clip.transpose(3, 0, 1, 2))), captions


def check_sprites(path: str) -> None:
    """RecipeError where there is no file of sprites."""
    if not Path(path).is_file():
        raise RecipeError(
            f"There are no actors at {path}: fetch them with `lingen data fetch theatre --out {Path(path).parent}`, or "
            "set data.synthetic.sprites to where they are."
        )


@lru_cache(1)
def load_sprites(path: str) -> UInt8[np.ndarray, "n k s s 4"]:
    """RGB times opacity, and opacity, of each actor's animation. RecipeError where the file is missing or is another
    version's."""
    check_sprites(path)
    if multiprocessing.parent_process() is not None:
        cv2.setNumThreads(0)  # its threads do not outlive a fork, and each core has a process of its own
    with Image.open(io.BytesIO(Path(path).read_bytes())) as picture:
        if picture.size != (SPRITE * SPRITE_FRAMES, SPRITE * len(ACTORS)):
            raise RecipeError(f"{path} does not hold this version's actors: delete it and fetch them again.")
        pixels = np.asarray(picture.convert("RGBa"))
    return pixels.reshape(len(ACTORS), SPRITE, SPRITE_FRAMES, SPRITE, 4).swapaxes(1, 2)


def check_alike(path: str) -> None:
    """RecipeError where two actors look alike, as they are or mirrored: what is held out of one would be trained on as
    the other. They differ by less than `ALIKE` on average, over the first pictures shrunk to 8 x 8."""
    small = load_sprites(path)[:, 0].reshape(len(ACTORS), 8, SPRITE // 8, 8, SPRITE // 8, 4).mean((2, 4)) / 255
    for number, (name, actor) in enumerate(zip(ACTORS, small, strict=True)):
        pairs = np.minimum(*(abs(small[:number] - one).mean((1, 2, 3)) for one in (actor, actor[:, ::-1])))
        for other in np.flatnonzero(pairs < ALIKE):
            raise RecipeError(f"{path}: the actors '{list(ACTORS)[other]}' and '{name}' look alike: none is held out.")


def perform(
    board: Storyboard, frames: int, fps: float, size: tuple[int, int], sprites: UInt8[np.ndarray, "n k s s 4"],
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "t h w 3"]:  # fmt: skip
    """Draws a storyboard.

    Args:
        size: height and width in pixels.
        sprites: of `load_sprites`.
        rng: of everything that the captions do not tell: places, sizes, and how a scene looks."""
    moments, lasts, first = (np.arange(frames) + 0.5) / frames, frames / fps / len(board.events), 0
    if frames == 1:  # an image is any moment in the midst of four seconds
        moments, lasts, first = rng.uniform(0.2, 0.8, 1), 4.0, int(rng.integers(SPRITE_FRAMES))
    clip = _backdrop(board, moments, lasts, size, rng)
    last, names = len(board.events) - 1, list(ACTORS)
    for number, event in enumerate(board.events):
        mine = np.flatnonzero((moments * (last + 1)).astype(int) == number)
        share = moments[mine] * (last + 1) - number
        # An actor that is there before or after its part would have to come from somewhere: it fades in and out.
        ends = np.minimum(share if number else 1.0, 1 - share if number < last else np.ones_like(share))
        for who, motion in _motions(event, share, lasts, size[1] / size[0], rng):
            mirrored = bool(event.way) and (event.way == "right") != (who in FACES_RIGHT)
            for frame, seen, *at in zip(mine, ends * lasts / BLEND, *motion, strict=True):
                picture = sprites[names.index(who), (first + int(frame / fps * 12 + 1e-6)) % SPRITE_FRAMES]
                _put(clip[frame], picture, at, mirrored, min(1.0, seen))
    return clip


def _backdrop(
    board: Storyboard, moments: PerFrame, lasts: float, size: tuple[int, int], rng: np.random.Generator
) -> UInt8[np.ndarray, "t h w 3"]:
    """The scenes behind events that last so many seconds each; one gives way to the next within `BLEND` seconds. A pan
    goes over a panorama."""
    height, width = size
    wide = round(PANORAMA * width)
    keys = [(event.scene, event.light) for event in board.events]
    drawn = {key: _view(*key, height, wide, int(rng.integers(VIEWS))) for key in dict.fromkeys(keys)}
    shares = {"left": 1 - moments, "right": moments}.get(board.pan, np.full(len(moments), 0.5))
    clip = np.empty((len(moments), height, width, 3), np.uint8)
    for frame, moment, share in zip(clip, moments * len(keys), shares, strict=True):
        at = int(moment)
        since = (moment - at) * lasts / BLEND if at else 1.0
        picture = drawn[keys[at]]
        if since < 1 and keys[at] != keys[at - 1]:
            picture = cv2.addWeighted(picture, since, drawn[keys[at - 1]], 1 - since, 0)
        cv2.warpAffine(picture, np.array([[1, 0, -share * (wide - width)], [0, 1, 0]]), (width, height), frame)
    return clip


@lru_cache(18 * VIEWS)
def _view(scene: str, light: str, height: int, wide: int, view: int) -> UInt8[np.ndarray, "h w 3"]:
    """A scene takes longer to draw than those who act before it: each process keeps what it drew."""
    return draw_scene(scene, light, (height, wide), np.random.default_rng(view))


def _motions(
    event: Event, share: PerFrame, seconds: float, width: float, rng: np.random.Generator
) -> list[tuple[str, tuple[PerFrame, ...]]]:
    """Each actor of an event, x and y of its middle in heights of the picture, its size (1: as usual) and its angle in
    degrees, clockwise; `share` of the event, 0..1, `seconds` that it lasts."""
    place, size, feet = width * rng.uniform(0.4, 0.6), rng.uniform(0.95, 1.1), GROUND + rng.uniform(-0.03, 0.03)
    low, out, way = feet - TALL * size / 2, 0.55 * TALL * size, -1 if event.way == "left" else 1
    start, end = (-out, width + out)[::way]
    beat = 2 * np.pi * (max(1, round(seconds / 2.5)) * share + rng.random())
    hop, bounce = share * max(1, round(seconds * 0.75)) % 1, np.clip((share - 0.6) / 0.2, 0, 1)
    grown = {"grow": share, "shrink": 1 - share}.get(event.action)
    sizes = size + 0 * share if grown is None else 0.45 * 3.1 ** (grown * grown * (3 - 2 * grown))
    x = {
        "enter": start + (place - start) * (1 - (1 - np.minimum(share / 0.7, 1)) ** 2),
        "leave": place + (end - place) * np.maximum((share - 0.25) / 0.75, 0) ** 2,
        **dict.fromkeys(("cross", "fly", "follow"), start + (end - start) * share),
    }.get(event.action, place + 0 * share)
    y = {
        "rise": low - (low + out) * np.maximum((share - 0.2) / 0.8, 0) ** 2,
        "fall": low - (low + out) * (1 - np.minimum(share / 0.6, 1) ** 2) - 0.4 * bounce * (1 - bounce),
        "jump": low - 1.3 * hop * (1 - hop),
        "fly": 0.36 + 0.07 * np.sin(beat),
    }.get(event.action, feet - TALL * sizes / 2)
    turns = 360 * rng.choice([-1, 1]) * max(1, round(seconds / 4)) * share
    angle = {"turn": turns, "fly": way * 8 * np.cos(beat)}.get(event.action, 0 * share)
    if event.action != "follow":
        return [(event.who, (x, y, sizes, angle))]
    gap = 1.1 * TALL * way
    return [(event.other, (x + gap * share, y, sizes, angle)), (event.who, (x + gap * (share - 1), y, sizes, angle))]


def _put(
    frame: UInt8[np.ndarray, "h w 3"],
    picture: UInt8[np.ndarray, "s s 4"],
    at: Sequence[float],
    mirrored: bool,
    seen: float,
) -> None:
    """Puts a sprite onto a frame; what lies outside is cut."""
    x, y, size, angle = at
    scale = TALL * size * frame.shape[0] / SPRITE
    side = 2 * int(SPRITE * scale * 0.72) + 4
    middle = np.array([x, y]) * frame.shape[0] - 0.5
    left, top = corner = middle.astype(int) - side // 2
    sin, cos = scale * np.sin(np.radians(angle)), scale * np.cos(np.radians(angle))
    turn = np.array([[cos, -sin], [sin, cos]]) * ([[-1, 1]] if mirrored else 1)
    shift = middle - corner - turn @ np.full(2, (SPRITE - 1) / 2)
    patch = cv2.warpAffine(picture, np.column_stack([turn, shift]), (side, side))
    rows, columns = (slice(max(0, one), max(0, one + side)) for one in (top, left))
    under = frame[rows, columns]
    over = patch[rows.start - top :, columns.start - left :][: len(under), : under.shape[1]] * np.float32(seen)
    under[:] = np.rint(under * (1 - over[..., 3:] / 255) + over[..., :3])


def draw_scene(scene: str, light: str, size: tuple[int, int], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """A panorama of one of `SCENES` in one of `LIGHTS`; `size`: height, width in pixels; `rng`: of what lies where."""
    height, width = size
    above, below = np.array(PLAY["skies"]["space" if scene == "space" else "earth"][light])
    fall = np.clip(np.linspace(0, 1 / 0.65, height), 0, 1)[:, None, None]
    pixels = np.rint(255 * (above + fall * (below - above))).astype(np.uint8).repeat(width, 1)
    lamps = [] if scene == "space" else PLAY["lamps"][light]
    for stroke in (*lamps, *PLAY["strokes"][scene]):
        shine = (1.0, 1.0, 1.0) if stroke.get("glows") else PLAY["shine"][light]
        for corners, colour in _shapes(stroke, width / height, rng):
            own = WINDOWS[light] if colour == "window" else np.multiply(colour, shine)
            points = np.rint(corners * height * 2**BITS).astype(np.int32)
            cv2.fillPoly(pixels, [points], [255 * float(part) for part in own], cv2.LINE_AA, BITS)
    return pixels


def _shapes(
    stroke: dict[str, Any], width: float, rng: np.random.Generator
) -> Iterator[tuple[Float[np.ndarray, "n 2"], Sequence[float] | str]]:
    """Corners and colour of each shape of a stroke, on a panorama of this width in heights."""
    if "hills" in stroke:
        top, rise, length = stroke["hills"]
        x = np.linspace(0, width, 80)
        wave = np.sin(2 * np.pi * (x / length + rng.random())) + 0.4 * np.sin(5 * x / length + rng.random())
        yield np.concatenate([np.stack([x, top - rise * wave], 1), [[width, 1.1], [0, 1.1]]]), stroke["colour"]
        return
    every = stroke.get("every")
    places = np.arange(0, width, every) if every else rng.uniform(0.1, 0.9, stroke["count"]) * width
    for x in places:
        y, size = rng.uniform(*stroke["y"]), rng.uniform(*stroke["size"])
        for part in stroke["stamp"]:
            yield np.array([x, y]) + size * _outline(part), part["colour"]


def _outline(part: dict[str, Any]) -> Float[np.ndarray, "n 2"]:
    if "shape" in part:
        return np.array(part["shape"], float)
    x, y, radius, flat = part["disc"]
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return np.stack([x + radius * np.cos(angle), y + flat * radius * np.sin(angle)], 1)
