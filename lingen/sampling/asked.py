"""What is asked of weights that was not in their training. No torch here."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from lingen.data import synthetic, theatre
from lingen.recipe.sections import Recipe
from lingen.run_folder.folder import RunFolder
from lingen.weights import read_run


def untrained(
    recipe: Recipe, weights: Path, prompts: Sequence[str], frames: int, size: tuple[int, int]
) -> Iterator[str]:
    """A sentence for each thing that a stage's weights were not trained for: a later stage, a length, a size (height,
    width), words. Those are known where lingen draws the clips (`data.synthetic`) and `words` reads their captions."""
    data, file = recipe.data, weights.resolve()
    run = RunFolder(file.parent.parent.parent)
    if file == run.weights(str(recipe.stage)) and run.about.is_file():
        if (last := read_run(run.about)["stages"][-1]) != recipe.stage:
            yield f"These are the weights of stage {recipe.stage}, not of the last one of the recipe, {last}."
    lengths = [1] * bool(data.mix.image) + [data.frames, *data.lengths] * bool(data.mix.video)
    sizes = [data.size, *data.sizes]
    if frames not in lengths or size not in sizes:
        own = f"{_listed(lengths)} frames of {_listed(f'{h}x{w}' for h, w in sizes)} pixels"
        told = f"The clip has {frames} frames of {size[0]}x{size[1]} pixels; trained were {own}"
        yield f"{told}: it may fall apart."
    drawn = {"shapes": lambda: " ".join(synthetic.captions()).split(), "theatre": theatre.known_words}
    name = None if data.shards.image or data.shards.video else (data.synthetic or {}).get("name")
    if name in drawn and all(one["name"] == "words" for one in recipe.text):
        if unknown := unknown_words(" ".join(prompts), drawn[name]()):
            yield f"No caption of training (data.synthetic={name}) has the words: {', '.join(unknown)}."


def _listed(values: Iterable[object]) -> str:
    return " or ".join(map(str, dict.fromkeys(values)))


def unknown_words(text: str, known: Collection[str]) -> list[str]:
    """The words of a text, each once, that are not among the known ones, whatever their case."""
    return [word for word in dict.fromkeys(re.findall(r"\w+", text)) if word.lower() not in known]
