"""Clips that cannot be made from what lies near: two shapes of one colour move, a curtain hides them, they move on.

A clip has 32 frames of 64x64 pixels: 12 frames of a first motion, 8 behind a grey curtain, 12 of a second motion. Which
two shapes they are, their colour and where they stand is random, the same before and after the curtain, and not in the
caption; the caption tells the two motions in their order, and the second one begins where the first one ended. So what
is seen after the curtain follows from what was seen before it and from the order of two motions. All of it is ours.

    python -m tests.yardsticks.range_clips data/range

writes shards of clips to train on and of held-out ones, the same bytes each time."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from lingen.data.shards import write_shards
from lingen.data.synthetic import COLOURS, SHAPES, _shape
from lingen.files import whole_folder
from lingen.media import encode_mp4

FRAMES, CURTAIN, SIDE = 32, (12, 20), 64
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Of a motion in x and y."""
RADIUS, STEP, SHADE, GREY = 10.0, 1.0, 0.1, 0.5
"""Of a shape in pixels; pixels between two frames; light of the background and of the curtain."""


def draw_clip(order: tuple[str, str], rng: np.random.Generator) -> UInt8[np.ndarray, "t h w 3"]:
    """A clip of two motions; `rng` chooses shapes, colour and places."""
    kinds = rng.permutation(SHAPES)[:2]
    colour = np.array(list(COLOURS.values())[rng.integers(len(COLOURS))])
    (first, second), visible = (np.array(WAYS[way]) for way in order), np.arange(FRAMES)
    moved = np.clip(visible, 0, CURTAIN[0])[:, None] * first + np.clip(visible - CURTAIN[1], 0, None)[:, None] * second
    pixels = np.full((FRAMES, SIDE, SIDE, 3), SHADE)
    for kind, x in zip(kinds, (18.0, 46.0), strict=True):
        place = np.array([x, 32.0]) + rng.uniform((-3, -10), (3, 10)) + STEP * (moved - 6 * (first + second))
        size, angle = np.full(FRAMES, RADIUS), np.zeros(FRAMES)
        cover, light = _shape(kind, (SIDE, SIDE), place[:, 0], place[:, 1], size, angle)
        pixels += cover[..., None] * (light[..., None] * colour - pixels)
    pixels[slice(*CURTAIN)] = GREY
    return np.rint(255 * pixels).astype(np.uint8)


def samples_of(split: str, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`count` samples for shards; orders come in turn, so that each is as frequent."""
    rng, orders = np.random.default_rng([seed, split == "held"]), list(itertools.permutations(WAYS, 2))
    for number in range(count):
        one, two = order = orders[number % len(orders)]
        clip = encode_mp4(draw_clip(order, rng), 8, exact=True)
        caption = {"caption": f"two shapes move {one}, then {two}"}
        yield {"__key__": f"{split}-{number:05d}", "mp4": clip, "json": caption}


def write(folder: Path, clips: int = 1200, held_out: int = 64) -> None:
    """Shards of clips to train on and of held-out ones; the folder appears whole, and one that is there stays."""
    if folder.is_dir():
        return
    with whole_folder(folder) as work:
        for split, count in (("train", clips), ("held", held_out)):
            write_shards(samples_of(split, count), str(work / f"{split}-%05d.tar"), per_shard=-(-count // 4))


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:]))
