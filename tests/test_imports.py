"""Modules that register parts: `imports` in a recipe and --import on the command line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from lingen.cli import main
from lingen.recipe import load_recipe, to_yaml
from lingen.recipe.errors import RecipeError
from lingen.recipe.reading import RecipeText, read_draft
from tests.helpers.commands import ROOT, run_command

MODULE = '''\
import torch
from torch import nn

import lingen


@lingen.MIXERS.register("gain_of_a_module")
class Gain(nn.Module):
    """Every token times one learned gain."""

    def __init__(self, dim: int, layer: int, *, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), gain))

    def forward(self, x):
        return x * self.weight
'''


@pytest.fixture
def module(here: Path) -> Path:
    """A folder that holds my_mixers.py, for processes of their own."""
    (here / "my_mixers.py").write_text(MODULE)
    return here


@pytest.mark.slow
def test_a_registered_part_trains_and_samples_from_the_command_line(module: Path, tiny_recipe: Path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    mate = "{name: mate, state_dim: 4, head_dim: 8, window: [2, 2, 2]}"
    text = tiny_recipe.read_text().replace(mate, "gain_of_a_module")
    own = module / "own.yaml"
    own.write_text("imports: [my_mixers]\n" + text)
    for recipe, words in ((own, []), (tiny_recipe, ["--import", "my_mixers", "model.mixer=gain_of_a_module"])):
        run = f"run-{recipe.stem}"
        done = run_command(
            "fit", "--recipe", str(recipe), "--run", run, "--stage", "images", *words, cwd=module, env=env
        )
        assert done.returncode == 0, done.stderr
        assert "imports: [my_mixers]" in (module / run / "recipe.yaml").read_text()
    # What a run stores names the module, so that nobody has to name it again.
    sampled = ("sample", "--run", run, "--prompt", "a", "--out", f"{run}.mp4", "--steps", "1")
    done = run_command(*sampled, cwd=module, env=env)
    assert done.returncode == 0 and (module / f"{run}.mp4").is_file(), done.stderr
    away = module / f"away-{run}"
    away.mkdir()
    done = run_command(*sampled[:2], str(module / run), *sampled[3:], cwd=away, env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Cannot import 'my_mixers': there is no module 'my_mixers' in the current folder" in done.stderr


def test_imports_add_up(here: Path):
    for name in ("lingen_test_one", "lingen_test_two", "lingen_test_three"):
        (here / f"{name}.py").write_text("")
    (here / "below.yaml").write_text("extends: null\ndata: {synthetic: shapes}\nimports: [lingen_test_one]\n")
    (here / "above.yaml").write_text("extends: below.yaml\nimports: [lingen_test_two, lingen_test_one]\n")
    draft = read_draft("above.yaml", ['imports=["lingen_test_three"]'])
    assert draft.base.tree["imports"] == ["lingen_test_one", "lingen_test_two", "lingen_test_three"]
    assert {f"lingen_test_{one}" for one in ("one", "two", "three")} <= sys.modules.keys()
    places = [draft.base.origin(("imports", number)).where for number in range(3)]
    assert places == ["below.yaml:3", "above.yaml:2", "command line"]


def test_a_filled_recipe_keeps_its_imports(here: Path):
    (here / "lingen_test_kept.py").write_text("")
    filled = load_recipe("quickstart_cpu", ["imports=[lingen_test_kept]"])
    again = load_recipe(RecipeText(to_yaml(filled), "here", filled.name))
    assert again == filled and again.imports == ["lingen_test_kept"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("lingen_test_gone", None, "there is no module 'lingen_test_gone' in the current folder or installed"),
        ("lingen_test_boom", "\n1 / 0\n", "it raises ZeroDivisionError at lingen_test_boom.py:2: division by zero"),
        ("lingen_test_quits", "import sys; sys.exit(0)", "it raises SystemExit at lingen_test_quits.py:1: 0"),
        ("lingen_test_typo", "class:\n", "SyntaxError: invalid syntax (lingen_test_typo.py, line 1)"),
        ("lingen_test_lacks", "import lingen_no_such", "there is no module 'lingen_no_such'"),
        ("lingen_test_path.py", "", "this is a path; write the module's name"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(here: Path, capsys, name: str, text: str | None, told: str):
    if text is not None:
        (here / f"{name.removesuffix('.py')}.py").write_text(text)
    (here / "r.yaml").write_text(f"imports:\n  - {name}\nmodel: {{mixer: what_it_would_register}}\n")
    for command in ("show", "doctor", "fit"):
        assert main([command, "--recipe", "r.yaml"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"r.yaml:2: Cannot import '{name}': ") and line.endswith("(at imports.0)")
    assert main(["list", "mixers", "--import", name]) == 2
    assert capsys.readouterr().err.startswith(f"--import {name}: Cannot import")
    if name != "lingen_test_lacks":
        assert told in line
    else:
        assert "it raises ModuleNotFoundError at lingen_test_lacks.py:1: No module named 'lingen_no_such'" in line


def test_imports_are_names(here: Path):
    for wrong in ("imports=7", "imports=[7]", "imports=my_mixers"):
        with pytest.raises(RecipeError, match="Expected"):
            load_recipe("quickstart_cpu", [wrong])


def test_list_shows_what_a_module_brings(module: Path, capsys):
    (module / "lingen_test_listed.py").write_text(MODULE.replace("gain_of_a_module", "gain_listed"))
    assert main(["list", "mixers", "--json", "--import", "lingen_test_listed"]) == 0
    rows = {row["name"]: row["origin"] for row in json.loads(capsys.readouterr().out)}
    assert rows["gain_listed"] == "lingen_test_listed"


def test_an_unknown_key_without_a_near_match_lists_the_known_ones(capsys):
    for word, known in (("zzzzzz=1", "name, stage, imports"), ("train.zzzzzz=1", "steps, optimizer, loss"),
                        ("autoencoder.zzzzzz=1", "scale"), ("model.mixer.zzzzzz=1", "ma, te")):  # fmt: skip
        assert main(["show", "--recipe", "quickstart_cpu", word]) == 2
        error = capsys.readouterr().err
        assert f"Known: {known}" in error
