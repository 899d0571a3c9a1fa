"""The votes of a study's raters: read, held against the key, and what is odd about them in sentences."""

import csv
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lingen.evaluation.study import QUESTIONS
from lingen.recipe.errors import RecipeError
from lingen.recipe.text import read_text_file

VOTE_COLUMNS = ("study", "rater", "session", "trial", "left", "right", "axis", "choice", "seconds", "time")
PASSED, KNOWN_LEAST = 0.75, 3
"""Share of the known answers that a rater who counts has given, and of how many at least."""
Vote = dict[str, str]


def read_votes(files: Sequence[str | Path], key: dict[str, Any]) -> tuple[list[Vote], list[str]]:
    """Votes on pairs, one for each rater, trial and axis, of raters who passed the training; and notes on what is odd.
    RecipeError for a file that holds anything but votes of this study."""
    found: dict[tuple[str, str, str], Vote] = {}
    sources: dict[str, set[str]] = defaultdict(set)
    odd: Counter[str] = Counter()
    for file in files:
        for row in _rows(Path(file), key):
            sources[row["rater"]] |= {f"file {file}", f"browser {row['session']}"}
            vote = row["rater"], row["trial"], row["axis"]
            if before := found.get(vote):
                same = all(before[name] == row[name] for name in ("left", "choice"))
                odd["stand twice and count once" if same else "contradict another one; the latest counts"] += 1
            found[vote] = max(before or row, row, key=lambda one: one["time"])
    notes = [f"{count} votes {what}." for what, count in odd.items()]
    votes: list[Vote] = []
    for rater, names in sources.items():
        if len(names) > 2:
            notes.append(f"{rater} comes from {', '.join(sorted(names))}: taken as one person.")
        kept, told = _judged([vote for vote in found.values() if vote["rater"] == rater], key)
        votes, notes = votes + kept, notes + [f"{rater} {told}"] * bool(told)
    return votes, notes


def _judged(votes: list[Vote], key: dict[str, Any]) -> tuple[list[Vote], str]:
    """The votes of a rater that count, and what is to be said of them."""
    known = [(vote, key["trials"][vote["trial"]].get("known", {})) for vote in votes]
    right = [vote.get(vote["choice"], "tie") == one["answer"] for vote, one in known if one.get("axis") == vote["axis"]]
    if len(right) < KNOWN_LEAST or sum(right) < PASSED * len(right):
        return [], f"failed the training and is left out: {sum(right)} of {len(right)} known answers are right."
    kept, pairs = [vote for vote, one in known if not one], sum("pair" in one for one in key["trials"].values())
    asked = min(pairs, key["per_rater"] or pairs) * len(QUESTIONS)
    return kept, f"gave {len(kept)} of {asked} answers, which count." if len(kept) < asked else ""


def _rows(file: Path, key: dict[str, Any]) -> list[Vote]:
    rows = list(csv.DictReader(read_text_file(file).splitlines()))
    if not rows or not set(VOTE_COLUMNS) <= rows[0].keys():
        raise RecipeError(f"{file} holds no votes; what the page downloads begins with {','.join(VOTE_COLUMNS)}.")
    for line, row in enumerate(rows, 2):
        if row["study"] != key["study"]:
            raise RecipeError(f"{file} holds votes of study {row['study']}; the key is that of {key['study']}.")
        shown = key["trials"].get(row["trial"], {}).get("shown", [])
        is_whole = sorted(shown) == sorted([row["left"] or "", row["right"] or ""]) and bool(row["time"])
        if not is_whole or row["axis"] not in QUESTIONS or row["choice"] not in ("left", "tie", "right"):
            raise RecipeError(f"{file}, line {line}, is no vote of this study. Was it edited? Download it again.")
        row["rater"] = " ".join(row["rater"].split()).casefold()
    return rows
