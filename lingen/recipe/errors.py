"""Mistakes of users, told in sentences that name the place and the cure."""

import difflib
from collections.abc import Collection, Iterable


class RecipeError(ValueError):
    """One or more mistakes in a recipe, an override or a run folder; each is one plain sentence in `problems`."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class SettingError(RecipeError):
    """A constructor refuses a setting; `problems` may tell of others beside it."""

    def __init__(self, setting: str, *problems: str):
        super().__init__(*problems)
        self.setting = setting


def no_such(kind: str, name: str, known: Collection[str]) -> str:
    """``There is no stage called 'x'. Did you mean 'y'? Known: y, z.``"""
    return f"There is no {kind} called '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}."


SYNONYMS = {
    "train": "fit", "generate": "sample", "learning_rate": "lr", "batch_size": "batch",
    "num_layers": "depth", "hidden_size": "dim", "guidance_scale": "guidance", "num_inference_steps": "steps",
}  # fmt: skip
"""What other tools call a command, a flag or a setting -> what it is called here."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with a leading space, or nothing where no known word means the same or is close. To mean
    the same, dashes, section and value count for nothing: ``--learning-rate`` means ``train.lr=1``."""
    names, plain = list(known), str(word).strip("-").replace("-", "_")
    same = [one for one in names if one.partition("=")[0].rpartition(".")[2].strip("-") == SYNONYMS.get(plain, plain)]
    close = same or difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
