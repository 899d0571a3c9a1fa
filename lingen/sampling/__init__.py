"""From prompts to clips: latents, pixels, files. What finds the demo's weights stands here, without torch."""

from pathlib import Path

from lingen.recipe.reading import RecipeText, read_draft
from lingen.weights import OF_TRAINING, WeightsError, find_weights, read_metadata


def find_demo(weights: str | Path) -> Path:
    """`find_weights`; WeightsError also where they were trained on other data than the emoji theatre."""
    file = find_weights(weights)
    text = RecipeText(read_metadata(file, OF_TRAINING)["recipe"], f"the recipe in {file}", file.stem)
    draft = read_draft(text)  # a stage that reads encoded clips of the theatre does not draw them
    if "theatre" not in (one.get(("data", "synthetic", "name")) for one in (draft.base, *draft.stages.values())):
        told = "it was not trained on the emoji theatre. Its clips are made by"
        raise WeightsError(file, f"{told} `lingen sample --checkpoint {file}`.")
    return file
