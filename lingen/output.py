"""What sampling leaves on disk: latents first, then MP4 and contact sheet: a failed decode costs no sampling."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingen.registry import AUTOENCODERS, RecipeError
from lingen.sampling import Progress, best_device, clip_size, decode, sample_latents, settings_with
from lingen.video import contact_sheet, save_video
from lingen.weights import find_weights, load_module, read_metadata


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
) -> Iterator[Path]:
    """Samples each prompt into ``out`` (``out-00.mp4``, ``out-01.mp4``, ... for several); yields the MP4s one by one.

    Beside each stand ``.latents.safetensors`` and ``.png`` (contact sheet). The MP4's title is the prompt, its comment
    JSON with prompt, seed, steps, guidance, weights and recipe hash.

    Raises:
        RecipeError: no weights at `source`, or no prompt.
        ValueError: a size or length that the model cannot make.
    """
    if not prompts:
        raise RecipeError("There is no prompt. Give --prompt, or --prompts with a file of one prompt a line.")
    weights = find_weights(source)
    recipe_hash = hashlib.sha256(read_metadata(weights)["recipe"].encode()).hexdigest()[:12]
    module = load_module(weights, device=best_device())
    settings = settings_with(module.recipe.sample, seed=seed, steps=steps, guidance=guidance)
    clip = clip_size(module, seconds, size)
    for index, prompt in enumerate(prompts):
        latents = sample_latents(module, [prompt], clip, settings, first=index, progress=progress)
        about = {
            "prompt": prompt,
            "seed": settings.seed,
            "number": index,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "recipe": module.recipe.name,
            "recipe_sha256": recipe_hash,
            "stage": module.recipe.stage,
        }
        path = numbered(Path(out), index, len(prompts))
        kept = save_latents(
            path.with_suffix(".latents.safetensors"),
            latents[0],
            module.recipe.autoencoder,
            clip.frames,
            clip.fps,
            about,
        )
        yield decode_file(kept, path)


def numbered(path: Path, index: int, count: int) -> Path:
    """``x.mp4`` for a single clip, else ``x-03.mp4``."""
    return path if count == 1 else path.with_name(f"{path.stem}-{index:02d}{path.suffix}")


def save_latents(
    path: Path, latents: Tensor, autoencoder: dict[str, Any], frames: int, fps: float, about: dict[str, Any]
) -> Path:
    """Writes latents [c t h w] with everything that decoding needs to know."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "lingen-latents", "autoencoder": autoencoder, "frames": frames, "fps": fps, "about": about}
    save_file(
        {"latents": latents.contiguous().cpu()},
        str(path),
        {name: json.dumps(value) for name, value in metadata.items()},
    )
    return path


def decode_file(latents: str | Path, out: str | Path) -> Path:
    """Decodes a latents file into an MP4 and a contact sheet beside it.

    Raises:
        RecipeError: the file holds no latents of lingen.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(latents), "pt") as file:
            metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            tensor = file.get_tensor("latents")
    except (OSError, SafetensorError, ValueError) as error:
        raise RecipeError(f"{latents} cannot be read as latents of `lingen sample`: {error}") from error
    if metadata.get("format") != "lingen-latents":
        raise RecipeError(f"{latents} holds no latents of `lingen sample`.")
    autoencoder = AUTOENCODERS.build(metadata["autoencoder"]).eval().to(best_device())
    clip = next(decode(autoencoder, tensor[None].to(best_device(), torch.float32), metadata["frames"]))
    about = metadata["about"]
    contact_sheet([clip], Path(out).with_suffix(".png"), [about["prompt"]])
    return save_video(clip, out, metadata["fps"], title=about["prompt"], about=about)
