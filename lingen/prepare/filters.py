"""What is left out of a data set, and why: each filter has a switch, and each drop a reason that is counted. Movie Gen
(arXiv 2410.13720, section 3.2.1) removes small, still, jittery and near-duplicate clips; the measures and their limits
are ours."""

import numpy as np

from lingen.prepare.limits import Filters
from lingen.prepare.shots import Track

BLACK_FRAME = 0.02
"""A frame with fewer pixels than this share that are not black is a black one."""
FROZEN = 0.05
"""Frames that differ by less than this many grey levels (of 255) are the same one."""
REPEATED = 0.2
"""A frame that differs by less than this share of the mean difference counts as a copy of the one before."""
FROZEN_SECONDS = 0.5
"""How long a frame has to stand still to count as frozen: animation shows each drawing two or three times."""

TO_SDR = (
    "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=hable,zscale=t=bt709:m=bt709:r=tv,format=yuv420p"
)
"""A filter of ffmpeg that makes ordinary video of PQ or HLG."""
TO_FRAMES = "bwdif=mode=send_field"
"""A filter of ffmpeg that makes a frame of each field."""


def judge_size(size: tuple[int, int], filters: Filters) -> str | None:
    """``reason: detail`` where a picture of this height and width is too small, else None."""
    if filters.min_side is not None and min(size) < filters.min_side:
        return f"small: {size[0]}x{size[1]} pixels, the shorter side is below {filters.min_side}"
    return None


def judge_film(track: Track, filters: Filters) -> str | None:
    """``reason: detail`` for leaving out a whole film; None where there is none."""
    if filters.min_fps is not None and len(track.times) > 1 and track.fps_at_most < filters.min_fps:
        return f"slow: {track.fps:.3g} frames a second, fewer than {filters.min_fps:g}"
    if filters.hdr is not None and track.hdr > filters.hdr:
        return f"hdr: {track.hdr:.0%} of its frames are PQ or HLG; convert it with ffmpeg -vf {TO_SDR}"
    if filters.interlaced is not None and track.interlaced > filters.interlaced:
        return f"interlaced: {track.interlaced:.0%} of its frames; convert it with ffmpeg -vf {TO_FRAMES}"
    return judge_size(track.size, filters)


def judge_clip(track: Track, first: int, end: int, filters: Filters) -> str | None:
    """``reason: detail`` for leaving out the frames from `first` to `end` (excluded) of a film; None: there is none."""
    black = float((track.lit[first:end] < BLACK_FRAME).mean())
    if filters.black is not None and black > filters.black:
        return f"black: {black:.0%} of its frames"
    frozen = frozen_share(track.change[first + 1 : end], track.times[first:end])
    if filters.frozen is not None and frozen > filters.frozen:
        return f"frozen: {frozen:.0%} of its time"
    motion, jerk = motion_of(track, first, end)
    if filters.still is not None and motion < filters.still:
        return f"still: moves by {motion:.2g} picture heights a second, less than {filters.still:g}"
    if filters.jerky is not None and jerk > filters.jerky:
        return f"jerky: the camera jerks by {jerk:.2g} picture heights a second, more than {filters.jerky:g}"
    return None


def motion_of(track: Track, first: int, end: int) -> tuple[float, float]:
    """Mean motion, and jerk of the camera, both in picture heights a second. The jerk is the root mean square of how
    its speed changes from one frame to the next that is not the same (many films show frames twice); less where that is
    little against the speed itself, as in a fast pan."""
    motion, change = track.motion[first + 1 : end], track.change[first + 1 : end]
    again = max(FROZEN, REPEATED * float(change.mean())) if len(change) else FROZEN
    fresh = np.flatnonzero(change >= again) + first + 1
    way = track.sway[fresh] * (track.times[fresh] - track.times[fresh - 1])[:, None]
    sway = way / np.diff(track.times[fresh], prepend=track.times[first])[:, None]
    turn, speed = _size_of(np.diff(sway, axis=0)), _size_of(sway)
    return float(motion.mean()) if len(motion) else 0.0, turn * min(1.0, turn / max(speed, 1e-9))


def _size_of(vectors: np.ndarray) -> float:
    """Root mean square of the vectors' lengths."""
    return float(np.sqrt(np.square(vectors).sum(1).mean())) if len(vectors) else 0.0


def frozen_share(change: np.ndarray, times: np.ndarray) -> float:
    """Share of the time in which the picture stands still for `FROZEN_SECONDS` or more.

    Args:
        change: [n - 1] from each frame to the next.
        times: [n]"""
    if not len(change):
        return 0.0
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (change < FROZEN).astype(int), [0]])))
    runs = times[edges[1::2]] - times[edges[::2]]
    return float(runs[runs >= FROZEN_SECONDS].sum() / (times[-1] - times[0]))
