"""From prompts to clips: latents, pixels, files. What finds the demo's weights stands here, without torch."""

from pathlib import Path

from lingen.recipe.errors import RecipeError
from lingen.recipe.reading import RecipeText, read_draft
from lingen.weights import OF_TRAINING, WeightsError, find_weights, read_metadata

BUILT_IN = Path(__file__).with_name("theatre") / "denoiser.safetensors"
"""Of the emoji theatre, where an installation has it; its autoencoder lies beside it."""


def find_demo(weights: str | Path | None) -> Path:
    """The denoiser's file: in a folder of both models, a run folder, or itself; None: `BUILT_IN`. RecipeError where
    there is none, or it was trained on other data."""
    if weights is None and not BUILT_IN.is_file():
        raise RecipeError(
            "This installation has no weights of the emoji theatre. Train some on a GPU: `lingen data fetch theatre` "
            "(340 MB), `lingen fit --recipe theatre_128`; then name the run with --checkpoint (in Python: weights). On "
            "a laptop take `lingen fit --recipe quickstart_cpu` and `lingen sample`."
        )
    file = BUILT_IN if weights is None else Path(weights) / BUILT_IN.name
    file = file if file.is_file() else find_weights(weights or file)
    text = RecipeText(read_metadata(file, OF_TRAINING)["recipe"], f"the recipe in {file}", file.stem)
    draft = read_draft(text)  # a stage that reads encoded clips of the theatre does not draw them
    if "theatre" not in (one.get(("data", "synthetic", "name")) for one in (draft.base, *draft.stages.values())):
        told = "it was not trained on the emoji theatre. Its clips are made by"
        raise WeightsError(file, f"{told} `lingen sample --checkpoint {file}`.")
    return file
