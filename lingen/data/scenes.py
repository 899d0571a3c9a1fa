"""The scenes of the emoji theatre: panoramas of six places by day, at dusk and at night, drawn after theatre.yaml."""

from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from lingen.data.theatre import PLAY

WINDOWS = {"day": (0.62, 0.72, 0.82), "dusk": (1.0, 0.86, 0.45), "night": (1.0, 0.86, 0.45)}
BITS = 4
"""Corners lie at sixteenths of a pixel, so that outlines are smooth."""


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
