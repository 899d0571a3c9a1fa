"""What `lingen data pack` leaves out: its limits, and the looks of clips, by which near-duplicates are found. Imports
nothing heavy: the command line makes its flags of the limits."""

from collections import defaultdict
from typing import Annotated

from lingen.recipe.bounds import AtLeast, Between
from lingen.recipe.signature import section

LOOKS = 3
"""Frames of a clip that are compared with those of others: at 1/6, 1/2 and 5/6 of its length."""
BANDS = 4 * LOOKS
"""Pieces of 16 bits: of two clips that differ in fewer bits than there are pieces, at least one piece is equal."""


@section
class Filters:
    """Limits of `lingen data pack`; None switches a filter off. Raises SettingError for one out of bounds."""

    min_side: Annotated[int | None, AtLeast(0), "pixels of the shorter side"] = None
    min_fps: Annotated[float | None, AtLeast(0), "frames a second"] = None
    min_seconds: Annotated[float | None, AtLeast(0), "keep shorter shots than any stage wants, down to this"] = None
    black: Annotated[float | None, Between(0, 1), "largest share of black frames"] = 0.3
    frozen: Annotated[
        float | None, Between(0, 1), "largest share of time that stands still for half a second or more"
    ] = 0.5
    still: Annotated[float | None, AtLeast(0), "least motion, in picture heights a second"] = 0.01
    jerky: Annotated[float | None, AtLeast(0), "largest jerk of the camera, in picture heights a second"] = 1.0
    hdr: Annotated[float | None, Between(0, 1), "largest share of frames in PQ or HLG"] = 0.0
    interlaced: Annotated[float | None, Between(0, 1), "largest share of frames that are declared interlaced"] = 0.0
    duplicates: Annotated[
        int | None, Between(0, BANDS - 1), f"of {64 * LOOKS} bits of its looks, how few may differ from another clip's"
    ] = 10


class Duplicates:
    """The looks of all clips so far, in which near-duplicates are found. About 500 bytes a clip.

    Args:
        limit: clips that differ in at most this many bits are duplicates; below `BANDS`, so that all are found; None:
            none are looked for."""

    def __init__(self, limit: int | None):
        self.limit = -1 if limit is None else limit
        self._looks, self._names = list[int](), list[str]()
        self._bands: dict[tuple[int, int], list[int]] = defaultdict(list)

    def find(self, looks: tuple[int, ...]) -> str | None:
        """Name of a clip that looks like this one."""
        whole = _joined(looks)
        near = {number for band in _bands(whole) for number in self._bands.get(band, ())}
        return next((self._names[n] for n in sorted(near) if (self._looks[n] ^ whole).bit_count() <= self.limit), None)

    def add(self, name: str, looks: tuple[int, ...]) -> None:
        """Remembers a clip."""
        if self.limit < 0:
            return
        for band in _bands(_joined(looks)):
            self._bands[band].append(len(self._names))
        self._looks.append(_joined(looks))
        self._names.append(name)


def _joined(looks: tuple[int, ...]) -> int:
    return sum(look << 64 * i for i, look in enumerate(looks))


def _bands(whole: int) -> list[tuple[int, int]]:
    return [(i, whole >> 16 * i & 0xFFFF) for i in range(BANDS)]
