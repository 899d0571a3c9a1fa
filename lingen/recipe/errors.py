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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with a leading space, or nothing where no known word is close."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
