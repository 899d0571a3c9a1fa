"""The files of sampling: latents first, then MP4 and contact sheet, so that a failed decode loses no sampled clip."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lingen.files import check_target
from lingen.frozen import check_ready
from lingen.kernels.choice import best_device
from lingen.media import contact_sheet, save_video, sheet_frames
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import AUTOENCODERS
from lingen.sampling.clips import Progress, clip_size, decode_frames, encode_and_place, sample_latents, settings_with
from lingen.training.weights import load_module
from lingen.weights import find_weights, read_metadata, write_tensors


def sample_to_files(
    source: str | Path,
    prompts: Sequence[str],
    out: str | Path,
    *,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seconds: float | None = None,
    size: tuple[int, int] | None = None,
    progress: Progress | None = None,
    rewritten: Sequence[str] = (),
) -> Iterator[Path]:
    """Samples each prompt into ``out`` (``out-00.mp4``, ``out-01.mp4``, ... for several); yields the MP4s one by one.

    Beside each stand ``.latents.safetensors`` and ``.png`` (contact sheet). The MP4's title is the prompt, its comment
    JSON with prompt, seed, steps, guidance, weights and recipe hash. The text encoders come first, one after the other,
    and only then the denoiser is put on the GPU.

    Args:
        rewritten: what is shown to the text encoders instead of each prompt; it is noted as `rewritten`.
    Raises:
        RecipeError: no weights at `source` or of a frozen part, no prompt, or `out` is no .mp4 that can be written.
        ValueError: a size or length that the model cannot make.
    """
    if not prompts:
        raise RecipeError("There is no prompt. Give --prompt, or --prompts with a file of one prompt a line.")
    paths = clip_paths(out, len(prompts))
    weights = find_weights(source)
    recipe_hash = hashlib.sha256(read_metadata(weights)["recipe"].encode()).hexdigest()[:12]
    module = load_module(weights)
    settings = settings_with(module.recipe.sample, seed=seed, steps=steps, guidance=guidance)
    clip = clip_size(module, seconds, size)
    words = encode_and_place(module, list(rewritten) or prompts, clip, best_device())
    for index, (prompt, path) in enumerate(zip(prompts, paths, strict=True)):
        row = words.rows(slice(index, index + 1))
        latents = sample_latents(module, row, clip, settings, first=index, progress=progress)
        about = {
            "prompt": prompt,
            **({"rewritten": rewritten[index]} if rewritten else {}),
            "seed": settings.seed,
            "number": index,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "recipe": module.recipe.name,
            "recipe_sha256": recipe_hash,
            "stage": module.recipe.stage,
        }
        kept = save_latents(
            path.with_suffix(LATENTS_SUFFIX),
            latents[0],
            module.recipe.autoencoder,
            clip.frames,
            clip.fps,
            about,
            {"way": settings.decode, "tile": settings.tile},
        )
        yield decode_file(kept, path)


LATENTS_SUFFIX = ".latents.safetensors"
LATENTS_FORMAT = "lingen-latents"


def clip_paths(out: str | Path, count: int, beside: Sequence[str] = (".png", LATENTS_SUFFIX)) -> list[Path]:
    """The MP4 of each of `count` clips: ``x.mp4`` for a single one, else ``x-00.mp4``, ``x-01.mp4``, ...

    Args:
        beside: suffixes of the files that are written beside each MP4.
    Raises:
        RecipeError: one of the files cannot be written.
    """
    path = check_target(out, ".mp4")
    paths = [path] if count == 1 else [path.with_name(f"{path.stem}-{n:02d}{path.suffix}") for n in range(count)]
    for one in paths:
        for end in (path.suffix, *beside):
            target = one.with_suffix(end)
            check_target(target, target.suffix)
    return paths


def save_latents(
    path: Path,
    latents: Tensor,
    autoencoder: dict[str, Any],
    frames: int,
    fps: float,
    about: dict[str, Any],
    decoding: dict[str, Any],
) -> Path:
    """Writes latents [c t h w] with everything that decoding needs to know; `decoding`: the arguments of
    `decode_frames` behind the frames."""
    metadata = {
        "format": LATENTS_FORMAT,
        "autoencoder": autoencoder,
        "frames": frames,
        "fps": fps,
        "about": about,
        "decoding": decoding,
    }
    write_tensors(path, {"latents": latents}, {name: json.dumps(value) for name, value in metadata.items()})
    return path


def decode_file(
    latents: str | Path, out: str | Path, way: str | None = None, tile: tuple[int, int] | None = None
) -> Path:
    """Decodes a latents file, frame by frame into an MP4, with a contact sheet beside it.

    Args:
        way, tile: in place of the `sample.decode` and `sample.tile` that it was sampled with.
    Raises:
        RecipeError: the file holds no latents of lingen, the autoencoder's weights are missing, or `out` is no .mp4
            that can be written.
    """
    clip_paths(out, 1, [".png"])
    tensor, metadata = read_latents(latents)
    autoencoder = AUTOENCODERS.build(metadata["autoencoder"]).eval().requires_grad_(False).to(best_device())
    check_ready([autoencoder])
    decoding = metadata.get("decoding", {}) if way is None and tile is None else {"way": way or "auto", "tile": tile}
    frames = decode_frames(autoencoder, tensor.to(best_device(), torch.float32), metadata["frames"], **decoding)
    about = metadata["about"]
    shown: list[np.ndarray] = []
    keep = sheet_frames(metadata["frames"])
    path = save_video(_noting(frames, keep, shown), out, metadata["fps"], title=about["prompt"], about=about)
    contact_sheet([np.stack(shown)], Path(out).with_suffix(".png"), [about["prompt"]])
    return path


def read_latents(path: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """Latents [c t h w] (CPU) and metadata that `save_latents` wrote. RecipeError for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != json.dumps(LATENTS_FORMAT):
                what = "weights, not" if metadata.get("format") == "lingen" else "no"
                raise RecipeError(f"{path} holds {what} latents of `lingen sample`; those end with {LATENTS_SUFFIX}.")
            return file.get_tensor("latents"), {name: json.loads(value) for name, value in metadata.items()}
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{path} cannot be read as latents of `lingen sample`: {error}.") from error


def _noting(frames: Iterable[np.ndarray], keep: set[int], shown: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Passes frames on and stores those whose number is in `keep`."""
    for number, frame in enumerate(frames):
        if number in keep:
            shown.append(frame)
        yield frame
