"""`lingen bench fit`: the parts of a recipe's own loop, a part of the user's among them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lingen.cli import main
from lingen.plan.forecast import plan
from lingen.recipe import load_recipe

SLOW_MIXER = '''
import time
from torch import nn

class Sleeper(nn.Module):
    """Takes 20 ms."""

    def __init__(self, dim: int, layer: int):
        super().__init__()
        self.scale = nn.Linear(dim, dim)

    def forward(self, x):
        if x.device.type != "meta":
            time.sleep(0.02)
        return self.scale(x)
'''


def test_a_slow_part_of_the_users_shows(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sleeper.py").write_text(SLOW_MIXER)
    monkeypatch.syspath_prepend(str(tmp_path))
    out, overrides = tmp_path / "fit.json", ["model.mixer=sleeper:Sleeper", "model.depth=2"]
    assert main(["bench", "fit", "--recipe", str(tiny_recipe), "--steps", "3", "--out", str(out), *overrides]) == 0
    rows = {row["kind"]: row for row in json.loads(out.read_text())["rows"]}
    recipe = load_recipe(tiny_recipe, stage="clips")
    assert list(rows) == ["image", "video"] and not list(tmp_path.rglob("metrics.csv"))
    for kind, row in rows.items():
        tokens = plan(recipe).tokens[kind] * getattr(recipe.data.batch, kind)
        assert (row["stage"], row["tokens"]) == ("clips", tokens)
        assert row["tokens_per_second"] == pytest.approx(1e3 * tokens / row["ms"], rel=1e-3)
        assert set(row["parts"]) == {"data", "forward", "backward", "optimizer", "average", "callbacks", "loop"}
        assert row["parts"]["forward"] >= 40  # two layers
        assert row["ms"] >= 40 and row["compile"] == "off" and "mfu" not in row
