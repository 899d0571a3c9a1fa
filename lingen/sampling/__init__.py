"""From prompts to clips: latents, pixels, files. What finds the demo's weights stands here, without torch."""

from pathlib import Path

from lingen.recipe.errors import RecipeError
from lingen.weights import find_weights

BUILT_IN = Path(__file__).with_name("theatre") / "denoiser.safetensors"
"""Of the emoji theatre, where an installation has it; its autoencoder lies beside it."""


def find_demo(weights: str | Path | None) -> Path:
    """The denoiser's file: in a folder of both models, a run folder, or itself; None: `BUILT_IN`. RecipeError where
    there is none."""
    if weights is None and not BUILT_IN.is_file():
        raise RecipeError(
            "This installation has no weights of the emoji theatre: train them with `lingen fit --recipe theatre_128`, "
            "and name the run with --checkpoint (in Python: weights)."
        )
    file = BUILT_IN if weights is None else Path(weights) / BUILT_IN.name
    return file if file.is_file() else find_weights(weights or file)
