"""`train.evaluate_every`: clips of held-out captions are measured while a run trains."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from lingen.data.synthetic import captions, draw_clip
from lingen.metrics.measures import measure_clip
from lingen.recipe import load_recipe
from lingen.recipe.errors import RecipeError
from lingen.run import fit
from lingen.run_folder.folder import RunFolder
from lingen.sampling import samples
from lingen.weights import read_weights

EVERY = [
    "stages.clips.train.evaluate_every=2",
    "data.size=[16, 16]",
    "train.sample_every=0",
    "sample.prompts=[]",
    "sample.steps=2",
    "train.log_every=1",
]


def evaluations(run: Path) -> list[dict[str, str]]:
    """The rows that have them, by stage and step."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("evaluation/clips")]
    return [{k: v for k, v in row.items() if k in ("stage", "step") or k.startswith("evaluation/")} for row in rows]


def test_measures_of_a_clip_need_no_network():
    prompt = captions()[0]
    clip = draw_clip(prompt, (32, 32), 8, np.random.default_rng(0))
    found = measure_clip(clip, 8, prompt)
    assert found["text: all"] == 1 and found["motion"] > 0 and found["coherence@1, pixels"] > 0.9
    assert {"flicker", "colour drift", "sharpness drift", "identity drift, pixels"} < found.keys()
    assert set(measure_clip(clip[:1], 8, prompt)) == {"text: colour", "text: shape", "text: motion", "text: all"}
    assert measure_clip(clip[:, :8, :8], 8, "a cockatoo") == {}


def test_a_recipe_without_held_out_captions_cannot_be_evaluated(tiny_recipe: Path):
    assert load_recipe(tiny_recipe, EVERY, "clips").train.evaluate_every == 2
    with pytest.raises(RecipeError, match="Only clips of a denoiser's held-out captions"):
        load_recipe(tiny_recipe, ["train.evaluate_every=2"], "clips")


@pytest.mark.slow
def test_evaluation_is_told_changes_nothing_and_goes_on_after_a_signal(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain, straight, stopped = (tmp_path / name for name in ("plain", "straight", "stopped"))
    fit(tiny_recipe, [*EVERY, "stages.clips.train.evaluate_every=0"], run=plain)
    fit(tiny_recipe, EVERY, run=straight)
    found = evaluations(straight)
    places = [(row["stage"], int(row["step"])) for row in found]
    assert evaluations(plain) == [] and len(set(places)) == len(places)
    assert places == [("clips", step) for step in (2, 4, 6)]
    assert all(float(row["evaluation/motion"]) > 0 for row in found)

    seen = []

    def signalled(*args: object) -> dict[str, float]:
        seen.append(args)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGTERM)
        return measure_clip(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(samples, "measure_clip", signalled)
    with pytest.raises(SystemExit) as stop:
        fit(tiny_recipe, EVERY, run=stopped)
    assert stop.value.code == 75 and len(evaluations(stopped)) == 0
    fit(tiny_recipe, EVERY, run=stopped)
    assert evaluations(stopped) == found
    for copy in ("raw", "averaged"):
        want, *others = (read_weights(RunFolder(run).weights("clips"), copy) for run in (plain, straight, stopped))
        assert all(torch.equal(want[name], other[name]) for other in others for name in want)
