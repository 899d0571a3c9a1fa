"""What the votes of a study say: shares and strengths with intervals, signs of raters, agreement, raters still needed.

Raters and prompts are both a sample, crossed: a variance is that by raters plus that by prompts minus what is left of
either (mean squares of a two-way table; Cameron, Gelbach and Miller 2011); intervals are Student's."""

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from lingen.evaluation.statistics import check_extra, holm
from lingen.evaluation.study import QUESTIONS, read_key
from lingen.recipe.errors import RecipeError
from lingen.recipe.text import read_text_file

SIGNIFICANT, POWER, PENALTY, STEP = 0.05, 0.8, 0.1, 1e-3
RATER, PROMPT, TRIAL, PAIR, VOTED = range(5)
"""Columns of a ballot: whole numbers [n 5], a row for each vote. Outcome 0: the pair's first system wins, 1: tie."""
VOTE_COLUMNS = ("study", "rater", "session", "trial", "left", "right", "axis", "choice", "seconds", "time")
PASSED, KNOWN_LEAST = 0.75, 3
"""Share of the known answers that a rater who counts has given, and of how many at least."""
Vote = dict[str, str]


def report_votes(files: Sequence[str | Path], key_file: str | Path, margin: float = 0.1) -> dict[str, Any]:
    """Compares the systems of a study on each axis: `pairs` and `strengths` (rows), `notes` (sentences), `raters`.

    Args:
        margin: a difference of the shares of wins and losses that should show (power 80%, level 5%).
    Raises:
        RecipeError: a file is none of this study, no vote is left, or the extra `eval` is not installed."""
    check_extra()
    key = read_key(key_file)
    votes, notes = read_votes(files, key)
    if not votes:
        raise RecipeError(" ".join(["No vote on a pair is left.", *notes]))
    systems, rows, strengths = key["systems"], [], []
    for axis in QUESTIONS:
        ballot = ballot_of([vote for vote in votes if vote["axis"] == axis], key)
        for number, (one, other) in enumerate(combinations(systems, 2)):
            if len(own := ballot[ballot[:, PAIR] == number]):
                rows.append({"axis": axis, "of": one, "against": other, **preference_of(own, margin)})
        for name, value, reach in zip(systems, *strengths_of(ballot, len(systems)), strict=True) if len(ballot) else ():
            strengths.append({"axis": axis, "of": name, "value": value, "interval": [value - reach, value + reach]})
    for row, corrected in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = corrected
    sides = [vote["choice"] for vote in votes if vote["choice"] != "tie"]
    notes.append(f"left was chosen in {sides.count('left') / max(1, len(sides)):.0%} of {len(sides)} decided votes.")
    counted = {"study": key["study"], "margin": margin, "raters": sorted({vote["rater"] for vote in votes})}
    return {**counted, "pairs": rows, "strengths": strengths, "notes": notes}


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


def ballot_of(votes: Sequence[Vote], key: dict[str, Any]) -> np.ndarray:
    """Votes on pairs of one axis -> [n 5], see `VOTED`."""
    pairs, rows = [list(pair) for pair in combinations(range(len(key["systems"])), 2)], []
    for vote in votes:
        trial = key["trials"][vote["trial"]]
        chosen = vote["choice"] != "tie" and key["clips"][vote[vote["choice"]]]["system"]
        outcome = 1 if chosen is False else 2 * (chosen != trial["pair"][0])
        rows.append((vote["rater"], trial["prompt"], vote["trial"], pairs.index(trial["pair"]), outcome))
    named = [list(dict.fromkeys(column)) for column in zip(*rows, strict=True)][:3]
    return np.array([[*map(list.index, named, row[:3]), *row[3:]] for row in rows], int).reshape(-1, 5)


def spread(ballot: np.ndarray, pairs: int, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, ...]:
    """Of a statistic (counts of outcomes [n, pairs * 3] -> [n k]): half its 95% interval, and its variances by raters,
    by prompts, and of what is left of either, each [k]; by how much a vote moves it (infinitesimal jackknife). In
    Satterthwaite's degrees a variance a counts as a^2 - rest^2 [ours]: else raters who are alike widen intervals."""
    from scipy import stats

    votes, found, sizes = 3 * ballot[:, PAIR] + ballot[:, VOTED], [], []
    moved = statistic(np.bincount(votes, minlength=3 * pairs) + STEP * np.eye(3 * pairs + 1, 3 * pairs))
    for columns in ([RATER], [PROMPT], [RATER, PROMPT]):
        groups = np.unique(ballot[:, columns], axis=0, return_inverse=True)[1].reshape(-1)
        shifts = np.zeros((groups.max() + 1, moved.shape[1]))
        np.add.at(shifts, groups, (moved[votes] - moved[-1]) / STEP)
        sizes.append(max(1, len(shifts) - 1))
        found.append((shifts**2).sum(axis=0) * len(shifts) / sizes[-1])
    (raters, prompts, rest), left = found, sizes[2] - sizes[0] - sizes[1]
    rest = np.maximum(0, sizes[2] * rest - sizes[0] * raters - sizes[1] * prompts) / left if left > 0 else rest
    total, own = np.maximum(raters, rest) + np.maximum(prompts, rest) - rest, rest**2 / max(1, left)
    own = own + sum(np.maximum(0, one**2 - rest**2) / size for one, size in zip(found[:2], sizes[:2], strict=True))
    degrees = np.maximum(1, total**2 / np.maximum(own, 1e-30))
    return stats.t.ppf(1 - SIGNIFICANT / 2, degrees) * np.sqrt(total), raters, prompts, rest


def _shares(counts: np.ndarray) -> np.ndarray:
    """Counts [draws 3] of win, tie, loss -> [draws 4]: their shares, and wins minus losses."""
    shares = counts / counts.sum(axis=1, keepdims=True)
    return np.concatenate([shares, shares[:, :1] - shares[:, 2:]], axis=1)


def preference_of(ballot: np.ndarray, margin: float) -> dict[str, Any]:
    """Two systems on one axis, from the votes on this pair. Wilson's intervals count as many votes as would vary so
    much if they were independent (Korn and Graubard 1998), where all agree as many as there are raters or prompts.
    `raters_needed`: so many more, for the same prompts; None where these differ too much, or for a single rater."""
    from scipy import stats
    from statsmodels.stats.proportion import proportion_confint

    ballot = ballot * np.array([1, 1, 1, 0, 1])
    raters, prompts = (len(np.unique(ballot[:, column])) for column in (RATER, PROMPT))
    values = _shares(np.bincount(ballot[:, VOTED], minlength=3)[None])[0]
    half, by_rater, by_prompt, rest = spread(ballot, 1, _shares)
    normal = stats.norm.ppf(1 - SIGNIFICANT / 2)
    row: dict[str, Any] = {"n": len(ballot), "raters": raters, "agreement": agreement(ballot)}
    alike = max(1, min({raters, prompts} - {1}, default=1))
    for name, value, reach, low in zip(("win", "tie", "loss", "net"), values, half, (0, 0, 0, -1), strict=True):
        share, reach = (value - low) / (1 - low), reach / (1 - low)  # of the way from `low` to 1 [ours]
        worth = share * (1 - share) * (normal / reach) ** 2 if reach > 1e-6 else alike
        ends = proportion_confint(share * worth, worth, method="wilson")
        row[name] = {"value": float(value), "interval": [float(low + (1 - low) * end) for end in ends]}
    signs = np.sign(np.bincount(ballot[:, RATER], 1 - ballot[:, VOTED]))
    row |= {"ahead": int((signs > 0).sum()), "behind": int((signs < 0).sum())}
    row["p"] = float(stats.binomtest(row["ahead"], max(1, row["ahead"] + row["behind"])).pvalue)
    room = (margin / (normal + stats.norm.ppf(POWER))) ** 2 - max(0.0, by_prompt[3] - rest[3])
    is_known = raters > 1 and room > 0
    return row | {"raters_needed": max(0, math.ceil(raters * by_rater[3] / room) - raters) if is_known else None}


def agreement(ballot: np.ndarray) -> float | None:
    """Krippendorff's alpha (2004, nominal) over trials with two votes or more; None where there is nothing to compare.
    With as many votes on each it is Fleiss' kappa but for a term of 1/votes."""
    counts = np.zeros((ballot[:, TRIAL].max() + 1, 3))
    np.add.at(counts, (ballot[:, TRIAL], ballot[:, VOTED]), 1)
    counts = counts[counts.sum(axis=1) > 1]
    sizes, total = counts.sum(axis=1), counts.sum()
    expected = total**2 - (counts.sum(axis=0) ** 2).sum()
    differ = ((sizes**2 - (counts**2).sum(axis=1)) / (sizes - 1)).sum()
    return float(1 - differ * (total - 1) / expected) if expected else None


def strengths_of(ballot: np.ndarray, systems: int) -> tuple[list[float], list[float]]:
    """Logarithms of the systems' strengths by `davidson`, and half their 95% intervals."""
    pairs = systems * (systems - 1) // 2
    counts = np.bincount(3 * ballot[:, PAIR] + ballot[:, VOTED], minlength=3 * pairs)[None]
    return davidson(counts, systems)[0].tolist(), spread(ballot, pairs, lambda c: davidson(c, systems))[0].tolist()


def davidson(counts: np.ndarray, systems: int) -> np.ndarray:
    """Bradley and Terry's model with ties (Davidson 1970): win : tie : loss = a : n * sqrt(a * b) : b for strengths a
    and b, fitted by Newton's method; a small penalty keeps the strengths of who never loses finite.

    Args:
        counts: [draws, pairs * 3] of win, tie, loss, pairs in the order of `itertools.combinations`.
    Returns:
        Logarithms of strengths [draws systems], of mean 0."""
    design = np.zeros((counts.shape[1] // 3, 3, systems + 1))
    for number, (one, other) in enumerate(combinations(range(systems), 2)):
        design[number, 0, one] = design[number, 2, other] = design[number, 1, systems] = 1
        design[number, 1, [one, other]] = 0.5
    counts, found = counts.reshape(len(counts), -1, 3), np.zeros((len(counts), systems + 1))
    sizes = counts.sum(axis=2)
    for _ in range(30):
        chances = np.exp(np.einsum("pok,dk->dpo", design, found))
        chances /= chances.sum(axis=2, keepdims=True)
        mean = np.einsum("dpo,pok->dpk", chances, design)
        slope = np.einsum("dpo,pok->dk", counts - sizes[..., None] * chances, design) - PENALTY * found
        curve = np.einsum("dp,dpo,pok,pol->dkl", sizes, chances, design, design, optimize=True)
        curve -= np.einsum("dp,dpk,dpl->dkl", sizes, mean, mean) - PENALTY * np.eye(systems + 1)
        found += (step := np.clip(np.linalg.solve(curve, slope[..., None])[..., 0], -1, 1))
        if abs(step).max() < 1e-8:
            break
    return found[:, :systems] - found[:, :systems].mean(axis=1, keepdims=True)
