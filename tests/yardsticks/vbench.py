"""Totals of VBench (Huang et al., arXiv 2311.17982) from the files that it wrote, as its `cal_final_score.py` adds up;
but what is missing is no 0 there: it leaves its total out."""

import json
from pathlib import Path

from lingen.recipe.errors import RecipeError
from lingen.recipe.text import read_text_file

QUALITY = {
    "subject_consistency": (0.1462, 1.0), "background_consistency": (0.2615, 1.0), "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975), "dynamic_degree": (0.0, 1.0), "aesthetic_quality": (0.0, 1.0),
    "imaging_quality": (0.0, 1.0),
}  # fmt: skip
SEMANTIC = dict.fromkeys(
    ("object_class", "multiple_objects", "human_action", "color", "spatial_relationship"), (0.0, 1.0)
) | {
    "scene": (0.0, 0.8222), "appearance_style": (0.0009, 0.2855), "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}  # fmt: skip
"""Dimension -> the values that count as 0 and as 1."""


def vbench_scores(path: Path) -> dict[str, float]:
    """Dimension -> mean (0..1) in a result file, or in all below a folder. RecipeError for none, for one twice, and for
    what is no share."""
    found: dict[str, float] = {}
    for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
        try:
            held = json.loads(read_text_file(file))
        except ValueError as error:
            raise RecipeError(f"{file} is no JSON: {error}.") from error
        for name in [one for one in (*QUALITY, *SEMANTIC) if isinstance(held, dict) and one in held]:
            value = held[name][0] if isinstance(held[name], list) and held[name] else held[name]
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise RecipeError(f"{name} is {value} in {file}, not 0 to 1. Of a percentage, write a hundredth.")
            if found.setdefault(name, value) != value:
                raise RecipeError(
                    f"{name} is {found[name]} and {value} below {path}. Leave the files of one run there."
                )
    if not found:
        raise RecipeError(f"{path} holds no dimension of VBench: name its *_eval_results.json, or their folder.")
    return found


def vbench_totals(scores: dict[str, float]) -> dict[str, float | None]:
    """``{quality, semantic, total}`` (0..1), each None where one of its dimensions is missing."""
    quality, semantic = (_mean(scores, group) for group in (QUALITY, SEMANTIC))
    total = None if quality is None or semantic is None else (4 * quality + semantic) / 5
    return {"quality": quality, "semantic": semantic, "total": total}


def _mean(scores: dict[str, float], group: dict[str, tuple[float, float]]) -> float | None:
    if not group.keys() <= scores.keys():
        return None
    weights = {name: 0.5 if name == "dynamic_degree" else 1.0 for name in group}
    parts = (weights[name] * (scores[name] - low) / (high - low) for name, (low, high) in group.items())
    return sum(parts) / sum(weights.values())
