"""What encoded samples depend on: the frozen parts of a recipe, their weights and settings, as plain values."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from lingen.data.manifest import About
from lingen.frozen import is_trained, on_meta
from lingen.recipe.bounds import FREE
from lingen.recipe.errors import RecipeError
from lingen.recipe.marks import is_content
from lingen.recipe.registry import AUTOENCODERS, TEXT_ENCODERS, Registry
from lingen.recipe.sections import Component, Recipe
from lingen.recipe.signature import settings_of

MADE_BY = "lingen encode"
SAMPLED = 64
"""Pieces of a weights file that are hashed: enough to tell any two trainings apart, in a second for 30 GB."""
PIECE_BYTES = 1 << 16
WHOLE_BYTES = 1 << 28
"""Up to here the whole file is hashed where a run asks what it is: a second, and no change is missed."""


def frozen_settings(recipe: Recipe) -> dict[str, Any]:
    """Everything on which a recipe's latents and text embeddings depend. Null stands for a text encoder that is trained
    with the denoiser, because samples hold nothing of it, and for a path that does not exist on this machine."""
    return {
        "made_by": MADE_BY, "autoencoder": _frozen(AUTOENCODERS, recipe.autoencoder),
        "text": [_frozen(TEXT_ENCODERS, component) for component in recipe.text], "fps_prefix": recipe.data.fps_prefix,
    }  # fmt: skip


def _frozen(registry: Registry, component: Component) -> dict[str, Any] | None:
    part = on_meta(registry, component)
    if is_trained(part):
        return None
    settings = settings_of(registry[component["name"]])
    idle = {key for key, setting in settings.items() if setting.mark is FREE} | {*getattr(part, "without_effect", ())}
    component = {key: value for key, value in component.items() if key not in idle}
    # The path of the weights may change, their contents may not; what has no mark may be a path, too.
    words = {key: value for key, value in component.items() if key != "name" and isinstance(value, str) and value}
    may_be = [key for key in words if is_content(settings.get(key)) is not False]
    paths = {key: Path(os.path.expanduser(words[key])) for key in may_be}
    weights = {key: hash_weights(path) for key, path in paths.items() if path.exists()}
    told = {**component, **weights}
    packaged = getattr(part, "path", None)
    if "path" not in component and isinstance(packaged, str) and Path(packaged).exists():
        told["weights"] = hash_weights(Path(packaged))  # weights that come with lingen may differ in another release
    if "path" in told and "path" not in weights:
        told["path"] = None
    return {key: list(value) if isinstance(value, tuple) else value for key, value in told.items()}


def hash_weights(path: Path, pieces: int = SAMPLED) -> str:
    """12 hex digits of a file of weights, or of a folder of them: their sizes, and so many pieces of each."""
    digest = hashlib.blake2b(digest_size=6)
    for name, file in _files_of(path):
        size = file.stat().st_size
        digest.update(f"{name} {size}".encode())
        with file.open("rb") as opened:
            for number in range(pieces):
                opened.seek(max(0, size - PIECE_BYTES) * number // (pieces - 1))
                digest.update(opened.read(PIECE_BYTES))
                if size <= PIECE_BYTES:
                    break
    return digest.hexdigest()


def content_of(path: Path) -> str | None:
    """12 hex digits of what a file of weights, a folder of them, or a run folder holds, whatever it is called; None
    where there is nothing. Files up to `WHOLE_BYTES` are hashed whole, larger ones by pieces."""
    if (path / "run.json").is_file():
        from lingen.weights import WeightsError, find_weights

        try:
            path = find_weights(path)  # what else lies in a run folder changes while it is used
        except WeightsError:
            return None
    if not path.exists():
        return None
    hashes = [(name, _content(file, file.stat().st_size, file.stat().st_mtime_ns)) for name, file in _files_of(path)]
    return hashlib.blake2b(repr(hashes).encode(), digest_size=6).hexdigest()


def _files_of(path: Path) -> list[tuple[str, Path]]:
    """The files of a folder by their names in it; a file itself, without a name."""
    if not path.is_dir():
        return [("", path)]
    return [(file.relative_to(path).as_posix(), file) for file in sorted(path.rglob("*")) if file.is_file()]


@lru_cache(maxsize=4096)
def _content(file: Path, size: int, mtime: int) -> str:
    if size > WHOLE_BYTES:
        return hash_weights(file)
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=6)).hexdigest()


def hash_settings(settings: dict[str, Any]) -> str:
    """16 hex digits of plain values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def check_encoded(abouts: Iterable[About], recipe: Recipe, setting: str) -> None:
    """Checks that sets were encoded by the recipe's frozen parts. Weights missing on this machine are not compared.
    RecipeError names what differs, there and here.

    Args:
        abouts: what the manifests of encoded shards say.
        setting: where the shards stand in the recipe, for messages."""
    here = frozen_settings(recipe)
    for about in abouts:
        held = {key: about.settings.get(key) for key in here}
        if held["made_by"] != MADE_BY:
            told = "its manifest does not say what encoded these samples. Encode them with `lingen encode`."
            raise RecipeError(f"{setting}: {told}")
        if found := frozen_differences(held, here):
            raise RecipeError(
                f"{setting}: these samples were encoded by something else ({about.fingerprint}) than the recipe has "
                f"({hash_settings(here)}): {'; '.join(found)}. Encode them anew with `lingen encode --recipe`, or "
                "train with the recipe that they were encoded with."
            )


def _completed(here: Any, held: Any) -> Any:
    """`here`, with a path that is not on this machine as `held` has it: training on samples needs no encoder. A null of
    diffusers' there is of ``~``, which earlier versions did not follow."""
    if isinstance(here, dict) and isinstance(held, dict):
        untold = here.get("name") == held.get("name") == "diffusers" and held.get("path") is None
        return {
            key: held.get(key) if key == "path" and (value is None or untold) else _completed(value, held.get(key))
            for key, value in here.items()
        }
    if isinstance(here, list) and isinstance(held, list):
        return [_completed(*pair) for pair in itertools.zip_longest(here, held)][: len(here)]
    return here


def frozen_differences(held: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """`differences` of two `frozen_settings`, as JSON keeps them. Weights missing on this machine are not compared."""
    held, wanted = (json.loads(json.dumps(one)) for one in (held, wanted))
    return differences(_named(held), _named(_completed(wanted, held)))


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    """With a mapping for the list of text encoders, so that a message can name single settings."""
    encoders = settings["text"] if isinstance(settings.get("text"), list) else []
    return {**settings, "text": {str(number): encoder or "trained along" for number, encoder in enumerate(encoders)}}


def differences(held: dict[str, Any], wanted: dict[str, Any], path: str = "") -> list[str]:
    """``key: one there, other here`` for each value in which two mappings differ."""
    found = []
    for key in dict.fromkeys([*held, *wanted]):
        one, other = held.get(key), wanted.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{path}{key}.")
        elif one != other:
            there, here = (json.dumps(value, ensure_ascii=False) for value in (one, other))
            found.append(f"{path}{key} is {there} there and {here} here")
    return found
