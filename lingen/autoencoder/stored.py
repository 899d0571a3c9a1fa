"""The weights of a temporal autoencoder on disk: whether they fit, and if not, which settings they were made with."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from lingen.frozen import Missing, check_ready
from lingen.recipe.sections import Triple
from lingen.weights import WeightsError, find_weights, read_metadata

PREFIXES = ("averaged.autoencoder.", "raw.autoencoder.")
"""Prefixes under which `lingen.weights` stores an autoencoder's weights; the first that occurs in a file is read."""

TensorShapes = dict[str, tuple[int, ...]]


class StoredAutoencoder(nn.Module):
    """An autoencoder whose weights lie at `path`, a file or run folder, and are read when they are first needed."""

    name: str
    path: str | None
    strides: Triple
    mean: Tensor
    std: Tensor
    loaded = False
    without_path: str
    """The cure where no path is given."""
    may_be_fresh = True
    """Whether it can work with weights that were just drawn."""

    def missing(self) -> list[Missing]:
        """What is missing for it to run, found without reading weights."""
        if self.path is None:
            return [] if self.loaded else [Missing(self.name, "-", self.without_path)]
        shapes = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        cure = unfit_weights(Path(self.path), shapes)
        return [Missing(self.name, self.path, cure)] if cure else []

    def load(self) -> None:
        """Reads the weights at `path`. Raises RecipeError where they are missing or do not fit."""
        check_ready([self])
        self.load_state_dict(read_part(Path(str(self.path))))

    def _load_once(self) -> None:
        if not (self.loaded or self.mean.is_meta or self.path is None and self.may_be_fresh):
            self.load()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Weights that are loaded explicitly, such as those of a checkpoint, replace the ones at `path`.
        self.loaded |= f"{prefix}mean" in state_dict
        super()._load_from_state_dict(state_dict, prefix, *rest)


def check_sides(video: Tensor, strides: Triple, name: str) -> Tensor:
    """The clip as it is; ValueError for a height or width that the strides of the autoencoder `name` do not divide."""
    (h, w), across = video.shape[3:], strides[1:]
    if h % across[0] or w % across[1]:
        raise ValueError(
            f"The autoencoder '{name}' cannot take frames of {h}x{w} pixels: height and width must be multiples of "
            f"{across[0]} and {across[1]}."
        )
    return video


def unfit_weights(path: Path, own: TensorShapes) -> str | None:
    """A sentence with the cure where the weights at `path` are missing or have other shapes; reads headers only.

    Args:
        path: a weights file or a run folder.
        own: the shapes of the weights that are wanted, by name."""
    try:
        file = find_weights(path)
        read_metadata(file)
    except WeightsError as error:
        return f"{error.what} {_cure(path)}"
    stored = read_shapes(file)
    if stored == own:
        return None
    if not stored:
        return f"it holds no autoencoder. {_cure(path)}"
    told, wanted = settings_from_shapes(stored), settings_from_shapes(own)
    wrong = {key: value for key, value in told.items() if value != wanted.get(key, value)}
    if "strides" in wrong:
        wrong.pop("multipliers", None)  # they follow from the strides, unless a recipe gives them
    if not wrong:
        return "its layers are not those of this version of lingen. Train it anew."
    typed = partial(json.dumps, separators=(",", ":"))  # as on a command line
    sets = [f"autoencoder.{key}={typed(value)} (not {typed(wanted[key])})" for key, value in wrong.items()]
    return f"its weights are of other sizes. Set {' and '.join(sets)}, or autoencoder.path to weights that fit."


def _cure(path: Path) -> str:
    """A sentence on how to get weights to `path`, where nothing exists."""
    fit = "`lingen fit --recipe tae_8x8x8"
    if path.exists():
        return f"Set autoencoder.path to what {fit}` wrote."
    if path.suffix == ".safetensors":
        then = f"then `lingen export RUN --out {path}`"
        return f"Train one with {fit}`, {then}; or set autoencoder.path to another."
    return f"Train one with {fit} --run {path}`, or set autoencoder.path to another."


def settings_from_shapes(shapes: TensorShapes) -> dict[str, Any]:
    """The settings with which a TAE has weights of these shapes; empty where no TAE has them."""

    def found(pattern: str) -> list[tuple[int, ...]]:
        return [shape for name, shape in sorted(shapes.items()) if re.fullmatch(f"encoder.layers.{pattern}", name)]

    widths = [shape[0] for shape in found(r"level\d+_block0\.space\.conv2\.weight")]
    if "basis" in shapes:  # of `pca`
        return {"channels": shapes["basis"][0], "strides": f"blocks of {shapes['basis'][1] // 3} pixels"}
    if not widths or "mean" not in shapes or "encoder.layers.enter.weight" not in shapes:
        return {}
    width = shapes["encoder.layers.enter.weight"][0]
    time, space = (2 ** len(found(rf"level\d+_down\.{axis}\.weight")) for axis in ("time", "space"))
    bias = found(r"middle_attention\.time\.bias")
    return {
        "strides": (time, space, space),
        "channels": shapes["mean"][0], "width": width,
        "multipliers": tuple(one // width for one in widths),
        "blocks": len(found(r"level0_block\d+\.space\.conv2\.weight")), "attention": bool(bias),
        **({"reach": bias[0][1] // 2} if bias else {}),
    }  # fmt: skip


def read_shapes(file: Path) -> TensorShapes:
    """Shapes of the autoencoder's weights in a file, by name; empty where it has none."""
    with safe_open(str(file), "pt") as opened:
        return {name: tuple(opened.get_slice(key).get_shape()) for key, name in _keys(opened).items()}


def read_part(path: Path) -> dict[str, Tensor]:
    """name -> weight (CPU) of the autoencoder in a weights file or run folder: the averaged copy where there is one."""
    with safe_open(str(find_weights(path)), "pt") as opened:
        return {name: opened.get_tensor(key) for key, name in _keys(opened).items()}


def _keys(opened: Any) -> dict[str, str]:
    """Key in the file -> name in the autoencoder."""
    keys = list(opened.keys())
    prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in keys)), None)
    if prefix is None and {"mean", "std"} <= {*keys}:  # a folder of `lingen export --to diffusers`
        prefix = ""
    return {} if prefix is None else {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
