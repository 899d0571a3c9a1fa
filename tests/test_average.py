"""Averaged weights: both forms against sums in closed form, over a stop, and refused widths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import lingen
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import PowerAverage
from lingen.run_folder.folder import RunFolder
from lingen.training.average import AveragedWeights, power_of_width
from lingen.weights import read_weights
from tests.helpers.closeness import assert_close


def test_average_warms_up_and_restores():
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = AveragedWeights({"p": parameter}, decay=0.99)
    with torch.no_grad():
        parameter.fill_(1.0)
    average.update()
    expected = torch.full((3,), 0.9)  # 1 - (1 + 0) / (10 + 0)
    assert_close("average", expected, average.weights()["p"], 1e-6)
    with average.applied():
        assert_close("parameter", expected, parameter, 1e-6)
    assert torch.equal(parameter, torch.ones(3))
    for _ in range(2000):
        average.update()
    assert_close("average", torch.ones(3), average.weights()["p"], 5e-6)


def averaged(average: AveragedWeights, parameter: torch.Tensor, values: np.ndarray) -> float:
    """The average after updates with these values."""
    for value in values:
        with torch.no_grad():
            parameter.fill_(float(value))
        average.update()
    return float(average.weights()["p"])


@pytest.mark.parametrize("width", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("steps", [1, 7, 400])
def test_a_power_function_weighs_as_its_closed_form_says(width: float, steps: int):
    parameter = torch.nn.Parameter(torch.tensor(1e6))  # where it begins is forgotten at once
    values = np.random.default_rng(0).standard_normal(steps)
    found = averaged(AveragedWeights({"p": parameter}, PowerAverage(width=width)), parameter, values)
    edges = (np.arange(steps + 1) / steps) ** (power_of_width(width) + 1)
    assert found == pytest.approx(float(np.sum(np.diff(edges) * values)), abs=2e-6)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.2, 0.28])
def test_the_width_is_the_deviation_of_the_age(width: float):
    place = (np.arange(200_000) + 0.5) / 200_000
    weight = place ** power_of_width(width)
    weight /= weight.sum()
    mean = np.sum(weight * place)
    assert np.sqrt(np.sum(weight * (place - mean) ** 2)) == pytest.approx(width, rel=1e-4)


def test_a_stage_that_is_stopped_keeps_its_average(tiny_recipe: Path, tmp_path: Path):
    words = ["train.ema={width: 0.1}", "train.checkpoint_every=1", "sample.prompts=[]"]
    straight = lingen.fit(tiny_recipe, words, run=tmp_path / "straight")
    steps = lingen.load_recipe(tiny_recipe, stage="clips").train.steps
    stopped = tmp_path / "stopped"
    lingen.fit(tiny_recipe, [*words, f"stages.clips.train.steps={steps - 1}"], run=stopped)
    lingen.fit(tiny_recipe, words, run=stopped)
    for copy in ("raw", "averaged"):
        one, other = (read_weights(RunFolder(run).weights("clips"), copy) for run in (straight, stopped))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), copy


def test_a_width_that_no_average_has_is_refused(tiny_recipe: Path):
    for words, why in {"{width: 0.5}": "0.28", "{width: 0}": "0.001", "{}": "width", "{power: 2}": "power"}.items():
        with pytest.raises(RecipeError, match=why):
            lingen.load_recipe(tiny_recipe, [f"train.ema={words}"], stage="clips")
