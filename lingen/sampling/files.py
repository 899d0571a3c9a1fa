"""The files of sampling: latents first, then MP4 and contact sheet, so that a failed decode loses no sampled clip."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lingen.data.batch import Progress
from lingen.files import check_target
from lingen.frozen import check_ready
from lingen.kernels.choice import best_device
from lingen.media import contact_sheet, save_video, sheet_frames
from lingen.ranks.environment import Rank
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import AUTOENCODERS
from lingen.recipe.sections import SampleConfig
from lingen.run_folder.folder import RunFolder
from lingen.sampling import clips
from lingen.sampling.asked import untrained
from lingen.sampling.notes import Notes, notes_of, notes_on, read_notes
from lingen.training.modules import TextToVideo
from lingen.training.weights import load_denoiser
from lingen.weights import find_weights, write_tensors


def sample_to_files(
    source: str | Path, prompts: Sequence[str], out: str | Path, *, seed: int | None = None, steps: int | None = None,
    guidance: float | None = None, seconds: float | None = None, size: tuple[int, int] | None = None, repeat: int = 1,
    progress: Progress | None = None, rewritten: Sequence[str] = (), own: Rank | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Path]:  # fmt: skip
    """Samples `repeat` clips of each prompt into ``out`` (``out-00.mp4``, ``out-01.mp4``, ... for several); yields the
    MP4s one by one.

    Beside each stand ``.latents.safetensors`` and ``.png`` (contact sheet). The MP4's title is the prompt, its comment
    JSON with all that is needed to make it again (`lingen.sampling.notes`).

    Args:
        rewritten: what is shown to the text encoders instead of each prompt; it is noted as `rewritten`.
        own: this process among ranks that share the clips; only its own are made and yielded.
        say: is told what the weights were not trained for.
    Raises:
        RecipeError: no weights at `source` or of a frozen part, no prompt, or `out` is no .mp4 that can be written.
        ValueError: a size or length that the model cannot make."""
    takes = clips.takes_of(prompts, rewritten, repeat)
    if not takes:
        raise RecipeError("There is no prompt. Give --prompt, or --prompts with a file of one prompt a line.")
    paths = clip_paths(out, len(takes))
    weights, words = find_weights(source), [take.words for take in takes]
    if own is not None:
        takes, paths = takes[own.rank :: own.ranks], paths[own.rank :: own.ranks]
    if not takes:  # more ranks than clips
        return
    module = load_denoiser(weights)
    settings = clips.settings_with(module.recipe.sample, seed=seed, steps=steps, guidance=guidance)
    clip = clips.clip_size(module, seconds, size)
    for line in untrained(module.recipe, weights, words, clip.frames, clip.size):
        say(line)
    shared = notes_of(module, weights, clip, settings)
    yield from _write_takes(module, takes, paths, clip, settings, shared, progress)


def sample_again(
    made: str | Path, out: str | Path, source: str | Path | None = None, *,
    say: Callable[[str], None] = lambda line: None, progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Makes a clip again from what its MP4 notes: on the same machine with the same versions, the same bits.

    Args:
        made: an MP4 of `lingen sample`, or of the samples of a run.
        out: the .mp4 to write.
        source: the weights, where they no longer lie where the clip was made: a weights file, or a run folder, of
            which the clip's stage is taken.
        say: is told what differs from when the clip was made: versions, device, threads.
    Raises:
        RecipeError: the MP4 has no notes, its weights are not there, or those there (or those of a frozen part) are
            others."""
    paths, noted = clip_paths(out, 1), read_notes(made)
    weights = Path(noted.weights)
    if source is not None:
        own = RunFolder(Path(source)).weights(str(noted.stage))
        weights = own if own.is_file() else find_weights(source)
    elif not weights.is_file():
        raise RecipeError(
            f"The weights that made {made} are no longer at {noted.weights}. Say where they are: --run DIR or "
            "--checkpoint F."
        )
    module = load_denoiser(weights)
    shared = notes_of(module, weights, noted.clip, noted.settings)
    noted.check_same(shared, weights)
    for line in noted.differing(notes_on(shared, noted.take, best_device())):
        say(f"differs from when the clip was made: {line}")
    (file,) = _write_takes(module, [noted.take], paths, noted.clip, noted.settings, shared, progress)
    return file


def _write_takes(
    module: TextToVideo, takes: Sequence[clips.Take], paths: Sequence[Path], clip: clips.ClipSize,
    settings: SampleConfig, shared: Notes, progress: Progress | None,
) -> Iterator[Path]:  # fmt: skip
    """Each clip's latents, with everything that decoding needs to know, and then what `decode_file` makes of them."""
    sampled = clips.sample_takes(module, takes, clip, settings, best_device(), progress)
    for take, path, latents in zip(takes, paths, sampled, strict=True):
        metadata = {
            "format": LATENTS_FORMAT, "autoencoder": module.recipe.autoencoder, "frames": clip.frames, "fps": clip.fps,
            "about": notes_on(shared, take, module.device),
            "decoding": {"way": settings.decode, "tile": settings.tile},
        }  # fmt: skip
        kept = path.with_suffix(LATENTS_SUFFIX)
        write_tensors(kept, {"latents": latents}, {name: json.dumps(value) for name, value in metadata.items()})
        yield decode_file(kept, path)


LATENTS_SUFFIX = ".latents.safetensors"
LATENTS_FORMAT = "lingen-latents"


def clip_paths(out: str | Path, count: int, beside: Sequence[str] = (".png", LATENTS_SUFFIX)) -> list[Path]:
    """The MP4 of each of `count` clips: ``x.mp4`` for a single one, else ``x-00.mp4``, ``x-01.mp4``, ...

    Args:
        beside: suffixes of the files that are written beside each MP4.
    Raises:
        RecipeError: one of the files cannot be written."""
    path = check_target(out, ".mp4")
    paths = [path] if count == 1 else [path.with_name(f"{path.stem}-{n:02d}{path.suffix}") for n in range(count)]
    for one in paths:
        for end in (path.suffix, *beside):
            target = one.with_suffix(end)
            check_target(target, target.suffix)
    return paths


def decode_file(
    latents: str | Path, out: str | Path, way: str | None = None, tile: tuple[int, int] | None = None
) -> Path:
    """Decodes a latents file, frame by frame into an MP4, with a contact sheet beside it.

    Args:
        way, tile: in place of the `sample.decode` and `sample.tile` that it was sampled with.
    Raises:
        RecipeError: the file holds no latents of lingen, the autoencoder's weights are missing, or `out` is no .mp4
            that can be written."""
    (path,) = clip_paths(out, 1, [".png"])
    tensor, metadata = read_latents(latents)
    autoencoder = AUTOENCODERS.build(metadata["autoencoder"]).eval().requires_grad_(False).to(best_device())
    check_ready([autoencoder])
    decoding = metadata.get("decoding", {}) if way is None and tile is None else {"way": way or "auto", "tile": tile}
    frames = clips.decode_frames(autoencoder, tensor.to(best_device(), torch.float32), metadata["frames"], **decoding)
    about = metadata["about"]
    shown: list[np.ndarray] = []
    keep = sheet_frames(metadata["frames"])

    def passed_on() -> Iterator[np.ndarray]:
        for number, frame in enumerate(frames):
            shown.extend([frame] * (number in keep))
            yield frame

    save_video(passed_on(), path, metadata["fps"], title=about["prompt"], about=about)
    contact_sheet([np.stack(shown)], path.with_suffix(".png"), [about["prompt"]], about=about)
    return path


def read_latents(path: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """Latents [c t h w] (CPU), and metadata with all that decoding needs to know. RecipeError for any other file."""
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
