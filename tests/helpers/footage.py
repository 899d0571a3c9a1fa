"""Films for the tests, out of FFmpeg's own sources: known motion, known cuts, no download."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from lingen.data.manifest import Row
from lingen.prepare.cut import CutJob, make_samples
from lingen.prepare.journal import KEPT

SIZE = (96, 128)

Scene = tuple[str, float]
"""A source of FFmpeg, with options where need be, and seconds."""


def frames(source: str, seconds: float, fps: float = 24, size: tuple[int, int] = SIZE) -> Iterator[np.ndarray]:
    """RGB frames [h w 3] of a lavfi source such as ``testsrc2`` or ``mandelbrot``."""
    name, _, options = source.partition("=")
    graph = av.filter.Graph()
    start = graph.add(
        name, f"size={size[1]}x{size[0]}:rate={Fraction(fps).limit_denominator(1001)}:{options}".strip(":")
    )
    sink = graph.add("buffersink")
    start.link_to(sink)
    graph.configure()
    for _ in range(round(seconds * fps)):
        yield sink.pull().to_ndarray(format="rgb24")


def write_film(
    path: Path, pictures: Iterable[np.ndarray], fps: float = 24, codec: str = "libx264", pix_fmt: str = "yuv420p"
) -> Path:
    """Writes frames as a film in the format of the path's extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        options = {"crf": "16", "preset": "ultrafast", "threads": "1"} if codec == "libx264" else {}
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.pix_fmt = pix_fmt
        if codec != "libx264":
            stream.bit_rate = 2_000_000
        for number, picture in enumerate(pictures):
            if number == 0:
                stream.height, stream.width = picture.shape[:2]
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        file.mux(stream.encode())
    return path


def film(path: Path, *scenes: Scene, fps: float = 24, size: tuple[int, int] = SIZE, codec: str = "libx264") -> Path:
    """A film of scenes with hard cuts between them."""
    pictures = (picture for source, seconds in scenes for picture in frames(source, seconds, fps, size))
    return write_film(path, pictures, fps, codec)


def explode(number: int) -> int:
    """Ends its process at 3."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    return number * number


class Cut(NamedTuple):
    """What `make_samples` made of a source."""

    samples: list[Row]
    looks: list[tuple[int, ...]]
    drops: list[tuple[str, str]]
    told: list[tuple[str, str]]
    """Of what was kept, but not as it is."""


def cut_out(job: CutJob) -> Cut:
    entries, notes = make_samples(job)
    drops = [(name, reason) for name, reason, _ in notes if not reason.startswith(KEPT)]
    told = [(name, reason.removeprefix(KEPT)) for name, reason, _ in notes if reason.startswith(KEPT)]
    return Cut([entry.row for entry in entries], [entry.looks for entry in entries], drops, told)
