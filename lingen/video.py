"""Clips as files: H.264 MP4 that a browser plays, and contact sheets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from lingen.files import whole_file


def save_video(
    clip: Any, path: str | Path, fps: float, *, title: str = "", about: dict[str, Any] | None = None
) -> Path:
    """Writes frames as H.264 (yuv420p, index in front) with PyAV; the same frames give the same pictures, always.

    Args:
        clip: uint8 frames [t h w 3]: an array, a tensor, or an iterable of frames [h w 3] that is consumed one by one,
            so that memory does not grow with the length. An odd height or width is padded by its last row or column.
        path: file to write, replaced in one step when it is complete; after an error it is what it was.
        fps: frames per second.
        title: stored as the MP4's title (the prompt, say).
        about: stored as JSON in the MP4's comment.
    Raises:
        ValueError: for no frames, or frames that are not uint8 [h w 3].
    """
    import av
    from av.video.reformatter import VideoReformatter

    path, scaler = Path(path), VideoReformatter()
    rate, fast = Fraction(fps).limit_denominator(1001), {"movflags": "+faststart"}
    with whole_file(path) as partial, av.open(str(partial), "w", format="mp4", options=fast) as file:
        file.metadata["title"] = title
        file.metadata["comment"] = json.dumps(about or {}, ensure_ascii=False)
        stream = None
        for frame in frames_of(clip):
            if stream is None:
                # x264's macroblock tree and a conversion spread over threads vary from run to run.
                options = {"crf": "16", "preset": "medium", "x264-params": "no-mbtree=1"}
                stream = file.add_stream("libx264", rate=rate, options=options)
                stream.height, stream.width = frame.shape[0], frame.shape[1]
                stream.pix_fmt = "yuv420p"
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            file.mux(stream.encode(scaler.reformat(picture, format="yuv420p", threads=1)))
        if stream is None:
            raise ValueError(f"There are no frames to write to {path}.")
        file.mux(stream.encode())
    return path


def read_about(path: str | Path) -> tuple[str, dict[str, Any]]:
    """The title and the JSON that `save_video` stored in an MP4."""
    import av

    with av.open(str(path)) as file:
        return file.metadata.get("title", ""), json.loads(file.metadata.get("comment", "") or "{}")


def frames_of(clip: Any) -> Iterable[np.ndarray]:
    """Frames as contiguous uint8 arrays [h w 3] of even height and width, one by one."""
    for frame in clip:
        array = np.asarray(frame)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"A frame is uint8 [height width 3], got {array.dtype} {list(array.shape)}.")
        height, width = array.shape[:2]
        yield np.ascontiguousarray(np.pad(array, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))


def contact_sheet(
    clips: Sequence[np.ndarray], path: str | Path, captions: Sequence[str] = (), columns: int = 8
) -> Path:
    """A PNG with a row for each clip: up to `columns` frames spread over its time, the caption above.

    Args:
        clips: uint8 [t h w 3] each; small frames are enlarged by whole factors so that a person can see them.
    """
    from PIL import Image, ImageDraw

    rows = [_row(np.asarray(clip), columns) for clip in clips]
    line = 16 if captions else 0
    width = max(row.width for row in rows)
    sheet = Image.new("RGB", (width, sum(row.height + line for row in rows)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for index, row in enumerate(rows):
        if captions:
            draw.text((4, top + 2), captions[index][: width // 6], fill="black")
        sheet.paste(row, (0, top + line))
        top += row.height + line
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def sheet_frames(count: int, columns: int = 8) -> set[int]:
    """Numbers of those of `count` frames that a contact sheet shows."""
    return set(np.linspace(0, count - 1, min(columns, count)).round().astype(int).tolist())


def _row(clip: np.ndarray, columns: int) -> Any:
    from PIL import Image

    picks = sorted(sheet_frames(len(clip), columns))
    factor = max(1, round(96 / clip.shape[1]))
    shown = clip[picks].repeat(factor, axis=1).repeat(factor, axis=2)
    shown = np.pad(shown, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)
    return Image.fromarray(np.concatenate(list(shown), axis=1))
