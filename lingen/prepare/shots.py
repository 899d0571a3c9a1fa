"""Measures of a film: where its shots begin, and for each frame its brightness, motion and look. Shots are found by
PySceneDetect's AdaptiveDetector (Castellano, BSD 3-clause), motion by OpenCV's DIS optical flow (Kroeger et al., arXiv
1603.03590); both see small pictures. The measures and their limits are ours."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import cv2
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, Int, UInt8
from scenedetect import AdaptiveDetector, FrameTimecode

from lingen.data.frames import HDR, on_white, orientation
from lingen.prepare.footage import GAP, Frame

HEIGHT = 96
"""Height in pixels of the small pictures that are measured, which takes a tenth of the time of decoding an HD frame."""
BLACK = 32
"""A pixel below this grey (of 255) is taken for black."""


class Track(NamedTuple):
    """Measures of every frame of a film. What concerns two frames stands at the later one, and is 0 at the first."""

    size: tuple[int, int]
    """Height and width as shown: upright, square pixels."""
    times: Float[np.ndarray, " n"]
    """Seconds since the first frame."""
    cuts: list[int]
    """First frame of every shot but the first."""
    lit: Float[np.ndarray, " n"]
    """Share of pixels that are not black."""
    change: Float[np.ndarray, " n"]
    """Mean difference in grey levels of 255."""
    motion: Float[np.ndarray, " n"]
    """Mean length of the optical flow, in picture heights a second."""
    sway: Float[np.ndarray, "n 2"]
    """Median of the optical flow, which is how the camera moves, in picture heights a second."""
    looks: Int[np.ndarray, " n"]
    """uint64: `look` of the frame."""
    tick: float = 0.0
    """Seconds that the container rounds times to."""
    mended: int = 0
    """Frames whose time stamp was missing or did not ascend."""
    hdr: float = 0.0
    """Share of frames that declare PQ or HLG."""
    interlaced: float = 0.0
    """Share of frames that declare themselves interlaced."""

    @property
    def fps(self) -> float:
        """Frames a second, by the time stamps; steps above `GAP` do not count, unless all are."""
        steps = self._steps()
        return len(steps) / float(steps.sum()) if len(steps) else 0.0

    @property
    def fps_at_most(self) -> float:
        """`fps` where the container's rounding made the film longer by as much as it can."""
        steps = self._steps()
        return len(steps) / float(steps.sum() - min(self.tick, steps.mean() / 4)) if len(steps) else 0.0

    def _steps(self) -> Float[np.ndarray, " n"]:
        steps = np.diff(self.times)
        return steps[steps <= GAP] if (steps <= GAP).any() else steps


def follow(frames: Iterable[Frame]) -> Track:
    """Measures all frames in one pass. ValueError ``unreadable: ...`` where there are none."""
    cv2.setNumThreads(1)  # the processes share the cores
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    detector = AdaptiveDetector(min_scene_len=1)  # a flash counts as a cut, too, so that no clip holds a cut
    size, before, tick = (0, 0), None, 0.0
    odd = np.zeros(3, int)
    times, cuts, rows, looks = list[float](), list[int](), list[tuple[float, ...]](), list[int]()
    for number, frame in enumerate(frames):
        small, shown = _small(frame)
        size = size if number else shown
        grey = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY)
        if before is not None and before.shape != grey.shape:
            raise ValueError(f"unreadable: the picture changes its shape at {frame.time:.1f} s")
        cuts += [cut.frame_num for cut in detector.process_frame(FrameTimecode(number, 25.0), small)]
        cuts += [number] if frame.gap else []
        pace = (frame.time - times[-1]) * HEIGHT if times else 1.0
        rows.append((float((grey > BLACK).mean()), *(_motion(before, grey, flow, pace) if times else (0.0,) * 4)))
        odd += frame.mended, frame.picture.color_trc in HDR, frame.picture.interlaced_frame
        tick = frame.tick
        looks.append(look(grey))
        times.append(frame.time)
        before = grey
    if not times:
        raise ValueError("unreadable: no frame of it can be decoded")
    lit, change, motion, *sway = np.array(rows, np.float32).T
    return Track(
        size, np.array(times), sorted(set(cuts) - {0}), lit, change, motion, np.stack(sway, 1),
        np.array(looks, np.uint64), tick, int(odd[0]), *(odd[1:] / len(times)).tolist(),
    )  # fmt: skip


def _small(frame: Frame) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
    """The picture as BGR, `HEIGHT` rows high, not turned; and the height and width of what is shown."""
    picture: Any = frame.picture
    width = picture.width * float(frame.aspect or 1)
    columns = max(16, round(width * HEIGHT / picture.height))
    shown_picture = on_white(picture, VideoReformatter())
    small = shown_picture.reformat(columns, HEIGHT, "bgr24", interpolation="AREA", threads=1).to_ndarray()
    shown = (picture.height, round(width))
    return small, shown[::-1] if orientation(picture)[0] % 2 else shown


def _motion(before: Any, grey: Any, flow: Any, pace: float) -> tuple[float, ...]:
    """change, motion, and sway along x and y; `pace` is the seconds between the two, times `HEIGHT`."""
    change = float(np.abs(grey.astype(np.int16) - before).mean())
    if change == 0:
        return (0.0,) * 4
    field = flow.calc(before, grey, None) / pace
    return change, float(np.hypot(field[..., 0], field[..., 1]).mean()), *np.median(field, (0, 1)).tolist()


def look(grey: UInt8[np.ndarray, "h w"]) -> int:
    """64 bits of which pictures that look alike share almost all: whether each of the 63 lowest frequencies is above
    their median (the pHash of Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010)."""
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()[1:]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")
