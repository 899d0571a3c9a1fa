"""Looks of clips, by which near-duplicates are found. Imports nothing heavy."""

from collections import defaultdict

LOOKS = 3
"""Frames of a clip that are compared with those of others: at 1/6, 1/2 and 5/6 of its length."""
BANDS = 4 * LOOKS
"""Pieces of 16 bits: of two clips that differ in fewer bits than there are pieces, at least one piece is equal."""


class Duplicates:
    """The looks of all clips so far, in which near-duplicates are found. About 500 bytes a clip.

    Args:
        limit: clips that differ in at most this many bits are duplicates; below `BANDS`, so that all are found."""

    def __init__(self, limit: int | None):
        self.limit = limit
        self._looks, self._names = list[int](), list[str]()
        self._bands: dict[tuple[int, int], list[int]] = defaultdict(list)

    def find(self, looks: tuple[int, ...]) -> str | None:
        """Name of a clip that looks like this one."""
        if self.limit is None:
            return None
        whole = _joined(looks)
        near = {number for band in _bands(whole) for number in self._bands.get(band, ())}
        return next((self._names[n] for n in sorted(near) if (self._looks[n] ^ whole).bit_count() <= self.limit), None)

    def add(self, name: str, looks: tuple[int, ...]) -> None:
        """Remembers a clip."""
        if self.limit is None:
            return
        for band in _bands(_joined(looks)):
            self._bands[band].append(len(self._names))
        self._looks.append(_joined(looks))
        self._names.append(name)


def _joined(looks: tuple[int, ...]) -> int:
    return sum(look << 64 * i for i, look in enumerate(looks))


def _bands(whole: int) -> list[tuple[int, int]]:
    return [(i, whole >> 16 * i & 0xFFFF) for i in range(BANDS)]
