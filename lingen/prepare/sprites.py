"""The actors of the emoji theatre as one picture: a row for each, its animation from left to right, transparent."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lingen.data.acting import SPRITE, SPRITE_FRAMES
from lingen.data.batch import Progress
from lingen.data.theatre import ACTORS
from lingen.prepare.packages import FetchError, Package, download


def write_sprites(packages: Sequence[Package], path: Path, progress: Progress) -> None:
    """Three seconds of each actor's animation at 12 frames a second, as a WebP of a few MB. FetchError where a package
    lacks one."""
    from PIL import Image

    sheet = Image.new("RGBA", (SPRITE * SPRITE_FRAMES, SPRITE * len(ACTORS)))
    rows = {"-".join(f"{ord(letter):x}" for letter in text): row for row, text in enumerate(ACTORS.values())}
    left = set(rows)
    for stem, data in _members(packages):
        if stem in left:
            left.remove(stem)
            with Image.open(io.BytesIO(data)) as picture:
                for column, number in enumerate(_chosen(getattr(picture, "n_frames", 1))):
                    picture.seek(number)
                    small = picture.convert("RGBa").resize((SPRITE, SPRITE), Image.Resampling.LANCZOS).convert("RGBA")
                    sheet.paste(small, (column * SPRITE, rows[stem] * SPRITE))
            progress(len(rows) - len(left), len(rows))
    if left:
        raise FetchError(f"The packages hold no picture of {', '.join(sorted(left))}.")
    sheet.save(path, "WEBP", quality=90, method=4)


def _members(packages: Sequence[Package]) -> Iterator[tuple[str, bytes]]:
    """Stem and content of each file."""
    for package in packages:
        with tarfile.open(download(package)) as archive:
            for member in archive:
                if member.isfile():
                    yield Path(member.name).stem, archive.extractfile(member).read()  # type: ignore[union-attr]


def _chosen(count: int) -> list[int]:
    """The frames of an animation of 24 a second that stand for it; a shorter one comes again."""
    return [int(number) for number in np.arange(SPRITE_FRAMES) * 2 % count]
