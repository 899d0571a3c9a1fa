"""`lingen doctor --preflight` and `lingen fit --preflight`: what is looked at, what is named; no trace is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lingen.weights import read_weights
from tests.helpers.commands import run_command


@pytest.mark.slow
def test_training_is_the_same_after_a_preflight(tiny_recipe: Path, here: Path):
    """Two ranks, bit for bit; and nothing else lies in the folder."""
    weights, files = {}, {}
    for run, words in (("with", ["--preflight"]), ("without", [])):
        one = [
            "fit",
            "--recipe",
            str(tiny_recipe),
            "--run",
            run,
            "sample.prompts=[]",
            "--stage",
            "images",
            "trainer.devices=2",
            *words,
        ]
        done = run_command(*one, cwd=here)
        assert done.returncode == 0, done.stderr
        assert ("all-reduce GB/s" in done.stdout + done.stderr) == (run == "with")
        weights[run] = read_weights(here / run / "stages" / "images" / "weights.safetensors", "raw")
        files[run] = sorted(str(path.relative_to(here / run)) for path in (here / run).rglob("*"))
    assert files["with"] == files["without"]
    assert weights["with"].keys() == weights["without"].keys()
    assert all((weights["with"][name] == value).all() for name, value in weights["without"].items())


@pytest.mark.slow
def test_the_doctor_writes_nothing(tiny_recipe: Path, here: Path):
    before = sorted(here.rglob("*"))
    done = run_command("doctor", "--preflight", "--recipe", str(tiny_recipe), "--run", "r/new", "--json", cwd=here)
    told = json.loads(done.stdout)
    assert done.returncode == 0 and sorted(here.rglob("*")) == before
    ((node, values),) = told["nodes"].items()
    assert values["ranks"] == 1 and min(values["write"], values["free"], values["memory"]) > 0 and not told["faults"]
