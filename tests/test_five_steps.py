"""What a refactor must not change: the bits of five training steps, and that an earlier commit's run folder goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.tools import five_steps

TOOLS = Path(__file__).parent / "tools"

KEPT = json.loads(five_steps.RECORD.read_text())
SAME_MACHINE = KEPT["environment"] == five_steps.environment()


def check(found: five_steps.Described, kept: five_steps.Described) -> None:
    """Bit for bit on the kind of machine that made the record; elsewhere by the norms."""
    lines = five_steps.differences(found, kept, bits=SAME_MACHINE)
    assert not lines, "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", five_steps.RUNS)
def test_five_steps_give_the_same_weights(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LINGEN_CACHE", str(tmp_path / "cache"))
    check(five_steps.trained(recipe, tmp_path / "run"), KEPT[recipe])


def test_a_run_folder_of_an_earlier_commit_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It was killed after step 3 of 6 of its second stage; the end is that of a run that was never stopped."""
    from lingen.run import fit

    monkeypatch.setenv("LINGEN_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(TOOLS / "old_run", tmp_path / "old_run")
    fit(folder / "recipe.yaml", run=folder)
    found = {name: value for name, value in five_steps.run_tensors(folder).items() if name.startswith("videos.")}
    check(found, KEPT["old_run"])


def test_a_change_of_one_bit_shows():
    name, (mark, norm) = next(iter(KEPT["old_run"].items()))
    changed = KEPT["old_run"] | {name: ["another", norm * 1.01]}
    assert five_steps.differences(changed, KEPT["old_run"], bits=True) == [
        f"{name}: other bits (norm {norm * 1.01}, was {norm})"
    ]
    assert five_steps.differences(changed, KEPT["old_run"], bits=False)
    assert five_steps.differences({}, {name: [mark, norm]}, bits=True) == [f"{name}: missing"]
