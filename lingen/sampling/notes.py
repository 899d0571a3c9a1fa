"""What a clip says about itself, so that it can be made again: its weights, text, seed, settings and versions."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import av
import torch

from lingen.data.fingerprint import frozen_differences, frozen_settings
from lingen.provenance import versions
from lingen.recipe.bounds import Above, AtLeast, Finite
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import SampleConfig
from lingen.recipe.signature import as_plain, check_value, settings_of
from lingen.sampling.clips import ClipSize, Take
from lingen.training.modules import TextToVideo
from lingen.training.state import whole_of
from lingen.training.weights import averaged_state
from lingen.weights import hash_tensors

NOTES_FORMAT = "lingen-clip-1"
Notes = dict[str, Any]
"""Plain values: the JSON in the comment of an MP4, and `about` in a latents file."""


def notes_of(module: TextToVideo, weights: Path, clip: ClipSize, settings: SampleConfig) -> Notes:
    """What all clips of one sampling share; in training all ranks ask for it. To be asked before anything is sampled:
    with `sample.precision` the denoiser's weights may change.

    Args:
        weights: the file that holds the weights, or will hold them.
        settings: the recipe's, with what was given in their place."""
    recipe = json.dumps(as_plain(module.recipe), sort_keys=True)
    how = {key: value for key, value in as_plain(settings).items() if key != "prompts"}
    return {
        "format": NOTES_FORMAT, "recipe": module.recipe.name, "stage": module.recipe.stage,
        "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(), "weights": str(weights.resolve()),
        "weights_sha256": hash_tensors(averaged_state(module), whole_of), "frozen": frozen_settings(module.recipe),
        **how, "frames": clip.frames, "size": list(clip.size), "fps": clip.fps,
    }  # fmt: skip


def notes_on(shared: Notes, take: Take, device: torch.device) -> Notes:
    """The notes of one clip. `rewritten` is there where that was asked for."""
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    rewritten = {} if take.rewritten is None else {"rewritten": take.rewritten}
    own = {"device": place, "threads": torch.get_num_threads(), "versions": versions()}
    return {"prompt": take.prompt, **rewritten, "repetition": take.repetition, **shared, **own}


@dataclass(frozen=True, kw_only=True)
class Noted:
    """The notes of a clip, read and checked."""

    prompt: str
    rewritten: str | None = None
    repetition: Annotated[int, AtLeast(0)]
    recipe: str
    recipe_sha256: str
    stage: str | None
    weights: str
    weights_sha256: str
    frozen: dict[str, Any]
    frames: Annotated[int, AtLeast(1)]
    size: tuple[int, int]
    fps: Annotated[float, Finite(), Above(0)]
    device: str
    threads: int
    versions: dict[str, str]
    settings: SampleConfig

    @property
    def take(self) -> Take:
        return Take(self.prompt, self.rewritten, self.repetition)

    @property
    def clip(self) -> ClipSize:
        return ClipSize(self.frames, self.size, self.fps)

    def check_same(self, now: Notes, source: Path) -> None:
        """RecipeError where the weights, or those of a frozen part, are not those that made the clip."""
        if now["weights_sha256"] != self.weights_sha256:
            raise RecipeError(
                f"{source} holds other weights ({now['weights_sha256'][:12]}) than the clip was made with "
                f"({self.weights_sha256[:12]}: stage {self.stage} of '{self.recipe}', then at {self.weights}). Give "
                "--checkpoint F with a file that holds those: the stage's weights.safetensors, or what `lingen export "
                "--precision fp32` made of it."
            )
        changed = frozen_differences(self.frozen, now["frozen"])
        if changed:
            raise RecipeError(
                f"The clip was made with other frozen parts: {'; '.join(changed)}. Put back the weights that it was "
                "made with."
            )

    def differing(self, now: Notes) -> list[str]:
        """Half sentences about what may make the clip another one in its last bits."""
        pairs = {
            "device": (self.device, now["device"]), "threads": (self.threads, now["threads"]),
            "recipe": (self.recipe_sha256, now["recipe_sha256"]),
            **{name: (one, now["versions"].get(name)) for name, one in self.versions.items()},
            **{name: (None, one) for name, one in now["versions"].items() if name not in self.versions},
        }  # fmt: skip
        return [f"{name} was {there}, is {here}" for name, (there, here) in pairs.items() if there != here]


def read_notes(path: str | Path) -> Noted:
    """The notes in an MP4. RecipeError where it has none, or none that can be read."""
    try:
        with av.open(str(path)) as file:
            comment = file.metadata.get("comment", "")
    except (OSError, av.FFmpegError) as error:
        raise RecipeError(f"{path} cannot be read as an MP4 of `lingen sample`: {error}.") from error
    try:
        notes = json.loads(comment)
    except ValueError:
        notes = None
    if not isinstance(notes, dict) or notes.get("format") != NOTES_FORMAT:
        raise RecipeError(
            f"{path} does not say how it was made: its comment holds no notes of `lingen sample`. Files that another "
            "program wrote anew lose them, and clips of older versions of lingen lack some."
        )
    settings = {key: notes.pop(key) for key in settings_of(SampleConfig) if key in notes}
    known = {key: value for key, value in notes.items() if key in settings_of(Noted)}
    noted, wrong = check_value({**known, "settings": settings}, Noted)
    if wrong:
        raise RecipeError(f"The notes in {path} are damaged: {wrong}")
    return cast(Noted, noted)
