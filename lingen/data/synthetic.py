"""Clips that lingen draws itself: one coloured shape that moves, grows or turns, with an exact caption.

6 colours x 3 shapes x 6 motions = 108 captions in three splits that never share one: 84 to train on, 12 to tune on, 12
to report on. Every shape is brighter on one side, and that side turns with it, so that a turn shows on a circle too.
All of it is ours; the paper has no such set."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from lingen.data.shards import read_shard, write_shards
from lingen.data.theatre import SPLITS, Split
from lingen.files import cache_folder, whole_folder
from lingen.media import encode_mp4, encode_picture, read_video
from lingen.recipe.bounds import IDENTITY, AtLeast
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import SYNTHETIC
from lingen.recipe.sections import KINDS, Recipe, Shards
from lingen.recipe.signature import section

COLOURS = {
    "red": (1.0, 0.0, 0.0), "yellow": (1.0, 1.0, 0.0), "green": (0.0, 1.0, 0.0),
    "cyan": (0.0, 1.0, 1.0), "blue": (0.0, 0.0, 1.0), "magenta": (1.0, 0.0, 1.0),
}  # fmt: skip
"""RGB at full light, in steps of 60 degrees of hue."""
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "grows", "turns")

DRAWING_FORMAT = 5
"""Raised whenever the drawing changes, so that an old cache is not taken for a new one."""


@section
class Shapes:
    """Coloured shapes that move, grow or turn; 12 captions are held out to tune on and 12 to report on."""

    clips: Annotated[int, AtLeast(1), IDENTITY, "video clips to train on"] = 1600
    images: Annotated[int, AtLeast(1), IDENTITY, "images to train on"] = 400
    held_out: Annotated[int, AtLeast(1), IDENTITY, "clips, and as many images, in each of the two held-out splits"] = 96
    seed: Annotated[int, AtLeast(0), IDENTITY, "of the drawing; independent of the recipe's seed"] = 0


class Caption(NamedTuple):
    """What a caption says; an image has no motion."""

    colour: str
    shape: str
    motion: str | None

    def __str__(self) -> str:
        return " ".join(("a", *(word for word in self if word)))


def parse_caption(caption: str) -> Caption:
    """``"a red circle moves right"`` -> ``("red", "circle", "moves right")``; ValueError for any other wording."""
    _, colour, shape, motion = (*caption.split(" ", 3), "", "", "")[:4]
    if colour not in COLOURS or shape not in SHAPES or motion not in (*MOTIONS, ""):
        raise ValueError(f"'{caption}' is not a caption of the shapes data set, such as 'a red circle moves right'.")
    return Caption(colour, shape, motion or None)


def captions(split: Split = "train", kind: str = "video") -> list[str]:
    """The captions of a split, in a fixed order: 84, 12 and 12 for clips. Images have the same 18 in every split. Each
    held-out split holds every colour and motion twice and every shape four times, and training keeps every pair of two
    attributes, so that a held-out caption asks for a new combination and never for an unknown word."""
    if kind == "image":
        return [str(Caption(colour, shape, None)) for colour in COLOURS for shape in SHAPES]
    return [
        str(Caption(colour, shape, motion))
        for c, colour in enumerate(COLOURS)
        for s, shape in enumerate(SHAPES)
        for m, motion in enumerate(MOTIONS)
        if _split(c, s, m) == split
    ]


def _split(colour: int, shape: int, motion: int) -> str:
    """Colour c is held out with four motions (offsets 0, 1 | 3, 4), each with one shape."""
    place = {0: 0, 1: 1, 3: 2, 4: 3}.get((motion - colour) % 6)
    if place is None or shape != (colour + place) % 3:
        return "train"
    return "tune" if place < 2 else "report"


def draw_clip(
    caption: str, size: tuple[int, int], frames: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "t h w 3"]:
    """Draws a caption: dark grey background, random place, size and speed; the motion fills the clip.

    Args:
        caption: as `parse_caption` reads it; without a motion the shape stands still.
        size: height and width in pixels."""
    colour, shape, motion = parse_caption(caption)
    height, width = size
    side = min(height, width)
    s = np.linspace(-0.5, 0.5, frames) if frames > 1 else np.zeros(1)
    radius = side * rng.uniform(0.24, 0.26) * np.ones(frames)
    angle = rng.uniform(-0.1, 0.1) * np.ones(frames)
    x, y = (extent / 2 + side * rng.uniform(-0.04, 0.04) + np.zeros(frames) for extent in (width, height))
    if motion == "grows":
        radius = radius * 0.9 * rng.uniform(1.9, 2.1) ** s
    elif motion == "turns":
        angle = angle + rng.uniform(0.9, 1.1) * np.pi * (s + 0.5)
    elif motion is not None:
        step = side * rng.uniform(0.42, 0.48) * s * (-1 if motion in ("moves left", "moves up") else 1)
        x, y = (x + step, y) if motion in ("moves left", "moves right") else (x, y + step)
    cover, light = _shape(shape, size, x, y, radius, angle)
    paint = light[..., None] * np.array(COLOURS[colour])
    shade = rng.uniform(0.05, 0.15)
    return np.rint(255 * (shade + cover[..., None] * (paint - shade))).astype(np.uint8)


def _shape(
    shape: str, size: tuple[int, int], x: Float[np.ndarray, " t"], y: Float[np.ndarray, " t"],
    radius: Float[np.ndarray, " t"], angle: Float[np.ndarray, " t"],
) -> tuple[Float[np.ndarray, "t h w"], Float[np.ndarray, "t h w"]]:  # fmt: skip
    """Coverage 0..1 (anti-aliased over one pixel) and light 0.6..1 of a shape whose area is pi radius^2."""
    rows, columns = np.mgrid[0.5 : size[0], 0.5 : size[1]]
    dx, dy = columns - x[:, None, None], rows - y[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    r = radius[:, None, None]
    if shape == "circle":
        edge = np.hypot(u, v) - r
    elif shape == "square":
        edge = np.maximum(abs(u), abs(v)) - r * np.sqrt(np.pi) / 2
    else:
        lean = np.sqrt(3) / 2 * abs(u) - v / 2
        edge = np.maximum(v, lean) - r * np.sqrt(np.pi / (3 * np.sqrt(3)))
    return np.clip(0.5 - edge, 0, 1), np.clip(0.8 - 0.2 * v / r, 0.6, 1.0)


def ensure(recipe: Recipe) -> tuple[Shards, Shards]:
    """The training shards and the validation (`tune`) shards of ``recipe.data.synthetic``, drawn on first use.

    Videos are H.264 MP4, images PNG, at the recipe's size, length and frame rate (clips have 8 frames where it wants
    single ones). They lie in the cache folder under a name that depends on all of this. The folder appears whole or not
    at all, so two ranks may call this at once and a killed process leaves nothing half made. RecipeError for an unknown
    name or setting of ``data.synthetic``."""
    folder = _folder(recipe)
    return _shards(folder, "train"), _shards(folder, "tune")


def held_out_clips(
    recipe: Recipe, count: int, split: Split = "report"
) -> tuple[list[UInt8[np.ndarray, "t h w 3"]], list[str]]:
    """The first `count` clips of a split (no more than were drawn), decoded from their MP4, with their captions. How
    well the judge of `lingen.metrics.shapes` does on them is the most that a model can reach."""
    clips, texts = [], []
    paths = sorted((_folder(recipe) / split).glob("video-*.tar"))
    for sample in itertools.islice(itertools.chain.from_iterable(map(read_shard, paths)), count):
        clips.append(read_video(sample["mp4"])[0])
        texts.append(json.loads(sample["json"])["caption"])
    return clips, texts


def settings(component: dict[str, Any] | None) -> Shapes:
    """The checked settings of a recipe's ``data.synthetic``; RecipeError names an unknown data set or setting."""
    component = component or {"name": "shapes"}
    name = component.get("name")
    if name != "shapes":
        raise RecipeError(f"There is no synthetic data set called '{name}'. Known: shapes. (at data.synthetic)")
    return SYNTHETIC.build(component)


def _folder(recipe: Recipe) -> Path:
    shapes = settings(recipe.data.synthetic)
    height, width = (extent + extent % 2 for extent in recipe.data.size)  # yuv420p needs even sizes
    frames = recipe.data.frames if recipe.data.frames > 1 else 8
    what = {**asdict(shapes), "size": [height, width], "frames": frames, "fps": recipe.data.fps}
    what["format"] = DRAWING_FORMAT
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / f"shapes-{digest}"
    if folder.is_dir():
        return folder
    with whole_folder(folder) as work:
        for split in SPLITS:
            counts = (shapes.images, shapes.clips) if split == "train" else (shapes.held_out, shapes.held_out)
            for kind, count in zip(KINDS, counts, strict=True):
                samples = _samples(shapes.seed, split, kind, count, (height, width), frames, recipe.data.fps)
                write_shards(samples, str(work / split / f"{kind}-%05d.tar"), per_shard=400)
    return folder


def _texts(seed: int, split: Split, kind: str, count: int) -> list[str]:
    """The captions of a split come around in turn, each round in another order."""
    rng = np.random.default_rng([seed, SPLITS.index(split), KINDS.index(kind), 0])
    texts = captions(split, kind)
    rounds = -(-count // len(texts))
    return [texts[index] for _ in range(rounds) for index in rng.permutation(len(texts))][:count]


def _samples(
    seed: int, split: Split, kind: str, count: int, size: tuple[int, int], frames: int, fps: float
) -> Iterator[dict[str, Any]]:
    """`count` samples for the shards."""
    rng = np.random.default_rng([seed, SPLITS.index(split), KINDS.index(kind), 1])
    for index, caption in enumerate(_texts(seed, split, kind, count)):
        clip = draw_clip(caption, size, frames if kind == "video" else 1, rng)
        data = {"mp4": encode_mp4(clip, fps, exact=True)} if kind == "video" else {"png": encode_picture(clip[0])}
        yield {"__key__": f"{split}-{index:06d}", **data, "json": {"caption": caption}}


def _shards(folder: Path, split: str) -> Shards:
    return Shards(image=str(folder / split / "image-*.tar"), video=str(folder / split / "video-*.tar"))
