"""The scenes of the emoji theatre: drawn panoramas of six places by day, at dusk and at night."""

import cv2
import numpy as np
from jaxtyping import Float, UInt8

Colour = tuple[float, float, float]
"""RGB, 0..1."""
GROUND = 0.88
"""Where feet stand, as a share of the height."""
SKIES: dict[str, tuple[Colour, Colour]] = {
    "day": ((0.33, 0.60, 0.95), (0.80, 0.92, 1.0)),
    "dusk": ((0.36, 0.22, 0.50), (1.0, 0.62, 0.34)),
    "night": ((0.02, 0.03, 0.10), (0.11, 0.15, 0.32)),
}
"""Light -> colour above and at the horizon."""
SHINE: dict[str, Colour] = {"day": (1.0, 1.0, 1.0), "dusk": (0.95, 0.68, 0.60), "night": (0.34, 0.40, 0.62)}
"""What the light leaves of a colour of the ground."""
SMOOTH, FINE = cv2.LINE_AA, 4
"""Polygons have corners at sixteenths of a pixel, so that a hill's outline is smooth: `FINE` bits of cv2's shift."""


class Canvas:
    """A panorama while it is drawn. Lengths are shares of the height.

    Args:
        size: height and width in pixels.
        light: of `SKIES`.
        rng: of the places of hills, houses and stars.
    """

    def __init__(self, size: tuple[int, int], light: str, rng: np.random.Generator):
        self.light, self.rng, self.side = light, rng, size[0]
        self.width = size[1] / size[0]
        self.pixels = np.zeros((*size, 3), np.uint8)

    def fill_sky(self, above: Colour, below: Colour, horizon: float = 0.65) -> None:
        share = np.clip(np.linspace(0, 1, self.side) / horizon, 0, 1)[:, None, None]
        colours = np.array(above) + share * (np.array(below) - np.array(above))
        self.pixels[:] = np.rint(255 * colours)

    def shape(self, points: Float[np.ndarray, "n 2"], colour: Colour, *, lit: bool = True) -> None:
        """A polygon of points (x, y)."""
        corners = np.rint(points * self.side * 2**FINE).astype(np.int32)
        cv2.fillPoly(self.pixels, [corners], self._rgb(colour, lit), SMOOTH, FINE)

    def disc(self, x: float, y: float, radius: float, colour: Colour, *, flat: float = 1.0, lit: bool = False) -> None:
        """A disc, or with `flat` below 1 an ellipse."""
        angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        self.shape(np.stack([x + radius * np.cos(angle), y + flat * radius * np.sin(angle)], 1), colour, lit=lit)

    def box(self, x: float, y: float, width: float, height: float, colour: Colour, *, lit: bool = True) -> None:
        corners = np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])
        self.shape(corners, colour, lit=lit)

    def hills(self, top: float, rise: float, length: float, colour: Colour) -> None:
        """Everything below a wavy line."""
        x = np.linspace(0, self.width, 80)
        wave = np.sin(2 * np.pi * (x / length + self.rng.random())) + 0.4 * np.sin(5 * x / length + self.rng.random())
        outline = np.stack([x, top - rise * wave], 1)
        self.shape(np.concatenate([outline, [[self.width, 1.1], [0, 1.1]]]), colour)

    def scatter(self, count: int, above: float, below: float) -> list[tuple[float, float]]:
        """Random places (x, y) between two heights."""
        return [(self.width * self.rng.random(), self.rng.uniform(above, below)) for _ in range(count)]

    def stars(self, count: int, below: float) -> None:
        for x, y in self.scatter(count, 0.0, below):
            self.disc(x, y, self.rng.uniform(0.004, 0.009), (0.95, 0.95, 0.85))

    def lamp(self) -> None:
        """Sun or moon, and stars by night."""
        x = self.rng.uniform(0.25, 0.75) * self.width
        if self.light == "day":
            self.disc(x, 0.15, 0.075, (1.0, 0.94, 0.45))
        elif self.light == "dusk":
            self.disc(x, 0.50, 0.11, (1.0, 0.80, 0.42))
        else:
            self.stars(25, 0.55)
            self.disc(x, 0.15, 0.065, (0.93, 0.93, 0.82))

    def _rgb(self, colour: Colour, lit: bool) -> tuple[float, float, float]:
        red, green, blue = (255 * c * s for c, s in zip(colour, SHINE[self.light] if lit else (1, 1, 1), strict=True))
        return red, green, blue


def draw_scene(scene: str, light: str, size: tuple[int, int], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """A panorama of one of `lingen.data.theatre.SCENES` in one of its lights; `size`: height and width in pixels."""
    canvas = Canvas(size, light, rng)
    if scene != "space":
        canvas.fill_sky(*SKIES[light])
        canvas.lamp()
    PAINTERS[scene](canvas)
    return canvas.pixels


def _meadow(canvas: Canvas) -> None:
    canvas.hills(0.60, 0.05, 1.1, (0.45, 0.72, 0.38))
    canvas.hills(0.72, 0.03, 0.8, (0.36, 0.66, 0.24))
    for number, (x, y) in enumerate(canvas.scatter(26, 0.78, 0.99)):
        canvas.disc(x, y, 0.012, ((1.0, 0.95, 0.4), (1.0, 1.0, 1.0), (0.95, 0.45, 0.6))[number % 3], lit=True)


def _sea(canvas: Canvas) -> None:
    canvas.box(0, 0.55, canvas.width, 0.5, (0.13, 0.47, 0.76))
    for x, y in canvas.scatter(22, 0.58, 0.76):
        canvas.box(x, y, 0.12, 0.010, (0.45, 0.74, 0.92))
    canvas.hills(0.80, 0.015, 0.6, (0.95, 0.86, 0.62))


def _desert(canvas: Canvas) -> None:
    x = canvas.rng.uniform(0.1, 0.6) * canvas.width
    canvas.shape(np.array([[x, 0.70], [x + 0.22, 0.36], [x + 0.44, 0.70]]), (0.80, 0.60, 0.36))
    canvas.shape(np.array([[x + 0.22, 0.36], [x + 0.44, 0.70], [x + 0.30, 0.70]]), (0.66, 0.47, 0.27))
    canvas.hills(0.64, 0.04, 1.3, (0.90, 0.69, 0.40))
    canvas.hills(0.76, 0.03, 0.9, (0.96, 0.79, 0.50))


def _city(canvas: Canvas) -> None:
    x, window = 0.0, (0.62, 0.72, 0.82) if canvas.light == "day" else (1.0, 0.86, 0.45)
    while x < canvas.width:
        width, top = canvas.rng.uniform(0.16, 0.26), canvas.rng.uniform(0.22, 0.50)
        shade = canvas.rng.uniform(0.36, 0.56)
        canvas.box(x, top, width - 0.01, 0.8, (shade, shade, shade + 0.08))
        for row in np.arange(top + 0.05, 0.70, 0.09):
            for column in np.arange(x + 0.03, x + width - 0.05, 0.06):
                if canvas.rng.random() < 0.7:
                    canvas.box(column, row, 0.03, 0.045, window, lit=False)
        x += width
    canvas.box(0, 0.76, canvas.width, 0.3, (0.40, 0.40, 0.43))
    for x in np.arange(0.05, canvas.width, 0.25):
        canvas.box(x, 0.93, 0.12, 0.02, (0.9, 0.9, 0.85))


def _space(canvas: Canvas) -> None:
    glow = {"day": (0.10, 0.22, 0.42), "dusk": (0.42, 0.14, 0.22), "night": (0.03, 0.02, 0.08)}[canvas.light]
    canvas.fill_sky((0.01, 0.01, 0.04), glow)
    canvas.stars(60, 0.70)
    x = canvas.rng.uniform(0.2, 0.8) * canvas.width
    canvas.disc(x, 0.24, 0.24, (0.85, 0.72, 0.50), flat=0.2)
    canvas.disc(x, 0.24, 0.12, (0.80, 0.50, 0.36))
    canvas.hills(0.76, 0.02, 0.9, (0.72, 0.72, 0.76))
    for x, y in canvas.scatter(9, 0.82, 0.98):
        canvas.disc(x, y, canvas.rng.uniform(0.03, 0.06), (0.55, 0.55, 0.60), flat=0.4, lit=True)


def _snow(canvas: Canvas) -> None:
    canvas.hills(0.62, 0.05, 1.2, (0.80, 0.87, 0.96))
    for x, _ in canvas.scatter(8, 0, 1):
        height = canvas.rng.uniform(0.16, 0.26)
        for step in (0.0, 0.3, 0.6):
            top, half = 0.74 - height * (1 - step), height * (0.2 + 0.25 * step)
            corners = np.array([[x, top], [x - half, top + 0.45 * height], [x + half, top + 0.45 * height]])
            canvas.shape(corners, (0.16, 0.42, 0.34))
        canvas.shape(np.array([[x, 0.74 - height], [x - 0.03, 0.80 - height], [x + 0.03, 0.80 - height]]), (1, 1, 1))
    canvas.hills(0.74, 0.02, 0.8, (0.96, 0.98, 1.0))


PAINTERS = {"meadow": _meadow, "sea": _sea, "desert": _desert, "city": _city, "space": _space, "snow": _snow}
