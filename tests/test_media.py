"""Pixels to floats and back, and clips as files."""

import io
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lingen.media import as_floats, as_frames, contact_sheet, encode_mp4, encode_picture, save_video
from tests.helpers.media import read_about


def _clip(height: int = 32, width: int = 48, frames: int = 6) -> np.ndarray:
    """A soft pattern that moves."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([127 + 100 * np.sin(x / 9 + y / 7 + t / 2 + p) for p in range(3)], -1).astype(np.uint8)


def _decoded(file: object) -> np.ndarray:
    with av.open(file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_pixels_survive_the_way_to_floats_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 2, 4, 256)
    floats = as_floats(pixels)
    assert floats.dtype == torch.float32 and (floats.min(), floats.max()) == (-1, 1)
    frames = as_frames(floats)
    assert frames.dtype == np.uint8 and frames.shape == (2, 4, 256, 3)
    assert (frames == np.arange(256)[:, None]).all()
    assert (as_frames(floats.double()) == frames).all()


def test_what_is_beyond_is_clamped():
    beyond = torch.tensor([-3.0, -1.001, 1.001, 9.0]).expand(1, 3, 1, 1, 4)
    assert as_frames(beyond)[0, 0, :, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("size", [(32, 48), (31, 47)])
def test_both_writers_of_h264_keep_what_is_seen(tmp_path: Path, size: tuple[int, int]):
    clip = _clip(*size)
    path = save_video(iter(clip), tmp_path / "new" / "x.mp4", 12, title="a prompt", about={"seed": 3})
    assert read_about(path) == ("a prompt", {"seed": 3})
    for file in (str(path), io.BytesIO(encode_mp4(iter(clip), 12, exact=True))):
        seen = _decoded(file)
        assert seen.shape == (6, 32, 48, 3)  # even sizes
        assert np.abs(seen[:, : size[0], : size[1]].astype(int) - clip).mean() < 4
    assert [one.name for one in path.parent.iterdir()] == ["x.mp4"]


def test_the_same_frames_are_the_same_bytes(tmp_path: Path):
    clip = _clip()
    one, other = (save_video(clip, tmp_path / name, 23.976).read_bytes() for name in "ab")
    assert one == other
    assert encode_mp4(clip, 24, exact=True) == encode_mp4(torch.from_numpy(clip), 24, exact=True)


def test_key_frames_come_as_often_as_asked():
    def keys(data: bytes) -> list[int]:
        with av.open(io.BytesIO(data)) as file:
            return [number for number, frame in enumerate(file.decode(video=0)) if frame.key_frame]

    clip = _clip(frames=24)
    assert keys(encode_mp4(clip, 8, key_seconds=1.0)) == [0, 8, 16]
    assert keys(encode_mp4(clip, 8)) == [0]


@pytest.mark.parametrize(
    ("clip", "says"),
    [
        ([], "no frames"),
        (np.zeros((2, 8, 8, 3)), "got float64"),
        (np.zeros((2, 8, 8), np.uint8), r"got uint8 \[8, 8\]"),
    ],
)
def test_what_is_no_clip_is_not_written(tmp_path: Path, clip: object, says: str):
    with pytest.raises(ValueError, match=says):
        save_video(clip, tmp_path / "x.mp4", 8)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match=says):
        encode_mp4(clip, 8)


def test_pictures_as_members():
    image = _clip()[0]
    assert (np.asarray(Image.open(io.BytesIO(encode_picture(image)))) == image).all()
    seen = Image.open(io.BytesIO(encode_picture(image, "webp", quality=92)))
    assert seen.format == "WEBP" and np.abs(np.asarray(seen).astype(int) - image).mean() < 4


def test_no_torch_is_needed():
    code = "import sys, lingen.media; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_half_a_contact_sheet_does_not_pass_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run takes the sheet of a step for the sign that all of its clips are made."""
    sheet = tmp_path / "samples" / "sheet.png"
    save = Image.Image.save

    def cut(self: Image.Image, path: Path, *form: str, **options: object) -> None:
        save(self, path, *form, **options)
        Path(path).write_bytes(Path(path).read_bytes()[:100])
        raise SystemExit  # the process ends amid it

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", cut)
        with pytest.raises(SystemExit):
            contact_sheet([_clip()], sheet)
    assert not sheet.exists()
    assert contact_sheet([_clip()], sheet) == sheet and Image.open(sheet).format == "PNG"
