"""A storyboard as pixels: where each actor is at each moment, sprites put onto the scenes of `lingen.data.scenes`."""

import io
import multiprocessing
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from lingen.data.scenes import GROUND, draw_scene
from lingen.data.theatre import ACTORS, SPLITS, Event, Split, Storyboard, captions_of_board, storyboard
from lingen.recipe.errors import RecipeError

SPRITE = 64
"""Height and width of a sprite in its file."""
SPRITE_FRAMES = 36
"""Pictures of an animation: three seconds at 12 a second."""
TALL = 0.45
"""Height of an actor, as a share of the picture's."""
FACES_RIGHT = frozenset({"plane", "rocket"})
"""Actors whose sprites look to the right; those that look at us may stand either way."""
PANORAMA, BLEND = 1.4, 0.25
"""Width of a scene in pictures; seconds that an actor or another scene takes to appear."""

PerFrame = Float[np.ndarray, " t"]


class Motion(NamedTuple):
    """Where an actor is in each frame of an event. Lengths are shares of the picture's height."""

    x: PerFrame
    y: PerFrame
    """Of its middle."""
    size: PerFrame
    """1: its usual one."""
    angle: PerFrame
    """Degrees, clockwise."""


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
    from PIL import Image

    check_sprites(path)
    if multiprocessing.parent_process() is not None:
        cv2.setNumThreads(0)  # its threads do not outlive a fork, and each core has a process of its own
    with Image.open(io.BytesIO(Path(path).read_bytes())) as picture:
        if picture.size != (SPRITE * SPRITE_FRAMES, SPRITE * len(ACTORS)):
            raise RecipeError(f"{path} does not hold this version's actors: delete it and fetch them again.")
        pixels = np.asarray(picture.convert("RGBa"))
    return pixels.reshape(len(ACTORS), SPRITE, SPRITE_FRAMES, SPRITE, 4).swapaxes(1, 2)


def draw_board(
    number: int, shape: tuple[int, int, int], fps: float, *, split: Split, seed: int, sprites: str
) -> tuple[UInt8[np.ndarray, "t h w 3"], list[str]]:
    """Frames and captions of a clip: a function of these arguments alone. RecipeError as for `load_sprites`.

    Args:
        number: of the clip in its split.
        shape: frames, height and width.
    """
    frames, *size = shape
    board = storyboard(split, seed, number, frames / fps)
    rng = np.random.default_rng([seed, SPLITS.index(split), number, 1])
    captions = captions_of_board(board, rng)
    moments = (np.arange(frames) + 0.5) / frames
    return perform(board, moments, frames / fps, (size[0], size[1]), load_sprites(sprites), rng), captions


def perform(
    board: Storyboard,
    moments: PerFrame,
    seconds: float,
    size: tuple[int, int],
    sprites: UInt8[np.ndarray, "n k s s 4"],
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "t h w 3"]:
    """Draws a storyboard.

    Args:
        moments: of the frames, ascending, as shares of the whole.
        seconds: that the whole lasts.
        size: height and width in pixels.
        sprites: of `load_sprites`.
        rng: of everything that the captions do not tell: places, sizes, and how a scene looks.
    """
    clip = _backdrop(board, moments, seconds, size, rng)
    count, names = len(board.events), list(ACTORS)
    for number, event in enumerate(board.events):
        mine = np.flatnonzero((moments * count).astype(int) == number)
        share, lasts = moments[mine] * count - number, seconds / count
        # An actor that is there before or after its part would have to come from somewhere: it fades in and out.
        seen = np.ones_like(share)
        if number:
            seen = np.clip(share * lasts / BLEND, 0, 1)
        if number + 1 < count:
            seen = np.minimum(seen, (1 - share) * lasts / BLEND)
        for who, motion in _motions(event, share, lasts, size[1] / size[0], rng):
            right = event.way == "right"
            mirrored = bool(event.way) and right != (who in FACES_RIGHT)
            pictures = sprites[names.index(who)]
            for at, frame in enumerate(mine):
                moment = moments[frame] * seconds
                picture = pictures[int(moment * 12 + 1e-6) % SPRITE_FRAMES]
                _put(clip[frame], picture, [float(track[at]) for track in motion], mirrored, float(seen[at]))
    return clip


def _backdrop(
    board: Storyboard, moments: PerFrame, seconds: float, size: tuple[int, int], rng: np.random.Generator
) -> UInt8[np.ndarray, "t h w 3"]:
    """The scenes behind the events; one gives way to the next within `BLEND` seconds. A pan goes over a panorama."""
    height, width = size
    wide = round(PANORAMA * width)
    keys = [(event.scene, event.light) for event in board.events]
    drawn = {key: draw_scene(*key, (height, wide), rng) for key in dict.fromkeys(keys)}
    shares = {"left": 1 - moments, "right": moments}.get(board.pan, np.full(len(moments), 0.5))
    clip = np.empty((len(moments), height, width, 3), np.uint8)
    for number, (moment, share) in enumerate(zip(moments, shares, strict=True)):
        at = min(int(moment * len(keys)), len(keys) - 1)
        picture = drawn[keys[at]]
        since = (moment * len(keys) - at) * seconds / len(keys) / BLEND
        if at and keys[at] != keys[at - 1] and since < 1:
            picture = cv2.addWeighted(picture, since, drawn[keys[at - 1]], 1 - since, 0)
        move = np.array([[1, 0, -share * (wide - width)], [0, 1, 0]], np.float32)
        cv2.warpAffine(picture, move, (width, height), clip[number], cv2.INTER_LINEAR)
    return clip


def _motions(
    event: Event, share: PerFrame, seconds: float, width: float, rng: np.random.Generator
) -> list[tuple[str, Motion]]:
    """Each actor of an event and how it moves; `share` of the event, 0..1, `seconds` that it lasts."""
    still = np.zeros_like(share)
    place, size = width * rng.uniform(0.4, 0.6), rng.uniform(0.95, 1.1)
    stand = GROUND + rng.uniform(-0.03, 0.03)
    low = stand - TALL * size / 2
    way, out = (-1 if event.way == "left" else 1), 0.55 * TALL * size
    start, end = (-out, width + out) if way > 0 else (width + out, -out)
    x, y, sizes, angle = still + place, still + low, still + size, still
    if event.action == "enter":
        x = start + (place - start) * (1 - (1 - np.minimum(share / 0.7, 1)) ** 2)
    elif event.action == "leave":
        x = place + (end - place) * np.maximum((share - 0.25) / 0.75, 0) ** 2
    elif event.action in ("cross", "follow"):
        x = start + (end - start) * share
    elif event.action == "fly":
        beat = 2 * np.pi * (max(1, round(seconds / 2.5)) * share + rng.random())
        x, y = start + (end - start) * share, 0.36 + 0.07 * np.sin(beat)
        angle = way * 8 * np.cos(beat)
    elif event.action == "rise":
        y = low - (low + out) * np.maximum((share - 0.2) / 0.8, 0) ** 2
    elif event.action == "fall":
        bounce = np.clip((share - 0.6) / 0.2, 0, 1)
        y = low - (low + out) * (1 - np.minimum(share / 0.6, 1) ** 2) - 0.4 * bounce * (1 - bounce)
    elif event.action == "jump":
        beat = share * max(1, round(seconds * 0.75)) % 1
        y = low - 1.3 * beat * (1 - beat)
    elif event.action in ("grow", "shrink"):
        towards = share if event.action == "grow" else 1 - share
        sizes = 0.45 * (3.1 ** (towards * towards * (3 - 2 * towards)))
        y = stand - TALL * sizes / 2
    elif event.action == "turn":
        angle = 360 * rng.choice([-1, 1]) * max(1, round(seconds / 4)) * share
    if event.action != "follow":
        return [(event.who, Motion(x, y, sizes, angle))]
    gap = 1.1 * TALL
    ahead, behind = (start + way * (way * (end - start) + gap) * share - way * lag for lag in (0, gap))
    return [(event.other, Motion(ahead, y, sizes, angle)), (event.who, Motion(behind, y, sizes, angle))]


def _put(
    frame: UInt8[np.ndarray, "h w 3"], picture: UInt8[np.ndarray, "s s 4"], at: list[float], mirrored: bool, seen: float
) -> None:
    """Puts a sprite onto a frame; what lies outside is cut."""
    x, y, size, angle = at
    side = frame.shape[0]
    scale = TALL * size * side / SPRITE
    radius = int(SPRITE * scale * 0.72) + 2
    left, top = int(x * side) - radius, int(y * side) - radius
    middle = (x * side - left - 0.5, y * side - top - 0.5)
    sin, cos = scale * np.sin(np.radians(angle)), scale * np.cos(np.radians(angle))
    flip = -1 if mirrored else 1
    turn = np.array([[flip * cos, -sin, 0], [flip * sin, cos, 0]], np.float64)
    turn[:, 2] = middle - turn[:, :2] @ np.full(2, (SPRITE - 1) / 2)
    method = cv2.INTER_AREA if scale < 0.5 else cv2.INTER_LINEAR
    patch = cv2.warpAffine(picture, turn, (2 * radius, 2 * radius), flags=method)
    rows, columns = (
        slice(max(0, first), max(0, min(length, first + 2 * radius)))
        for first, length in zip((top, left), frame.shape, strict=False)
    )
    under = frame[rows, columns]
    if under.size:
        over = patch[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] * np.float32(seen)
        under[:] = np.rint(under * (1 - over[..., 3:] / 255) + over[..., :3])
