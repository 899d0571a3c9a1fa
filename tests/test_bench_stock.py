"""The yardstick computes what lingen computes, else its speed says nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lingen_yardsticks.build import draw_weights

import lingen
from lingen.blocks.mamba2 import Mamba2
from lingen.blocks.temporal_swin import TemporalSwin
from lingen.cli.bench import yardstick
from lingen.model import LinGen
from lingen.recipe.sections import LinGenConfig
from tests.helpers.closeness import assert_close

PlainDenoiser = yardstick("plain").PlainDenoiser
StockMamba2, StockSwin = yardstick("stock").StockMamba2, yardstick("stock").StockSwin


def gradients(module, ours, x):
    """Of the input and of our weights, by name; the same seed for the output."""
    y = module(x)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    parts = {"input": x} | dict(ours.named_parameters())
    return y, dict(zip(parts, torch.autograd.grad(y, list(parts.values()), seed), strict=True))


def compare(ours, stock, grid):
    x = torch.randn(2, *grid, 16, requires_grad=True)
    (want, wanted), (got, gotten) = gradients(ours, ours, x), gradients(stock, ours, x)
    assert_close("output", want, got, 1e-5)
    assert_close("gradient of", wanted, gotten, 1e-4)


@pytest.mark.parametrize("grid", [(3, 5, 7), (1, 4, 3), (4, 2, 2)])
@pytest.mark.parametrize("review", [(2, 2, 2), None])
def test_stock_mamba2_is_ours(grid, review):
    for layer in range(4):
        torch.manual_seed(layer)
        ours = Mamba2(16, layer, state_dim=4, head_dim=8, dt_max=0.5, review=review)
        compare(ours, StockMamba2(ours), grid)


@pytest.mark.parametrize("grid", [(3, 5, 7), (1, 4, 6), (6, 8, 3), (2, 3, 4)])
@pytest.mark.parametrize("layer", [0, 1])
def test_stock_swin_is_ours(grid, layer):
    torch.manual_seed(layer)
    ours = TemporalSwin(16, layer, window=(2, 3, 4))
    torch.nn.init.uniform_(ours.q_norm.weight, 0.5, 2)
    compare(ours, StockSwin(ours), grid)


def test_other_settings_are_refused():
    with pytest.raises(ValueError, match="shared conv"):
        StockMamba2(Mamba2(16, 0, state_dim=4, head_dim=8, conv="per_direction"))


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("mixer", ["attention", "mate", "temporal_swin"])
def test_the_plain_denoiser_is_ours(mixer, parts):
    component = {"name": mixer} | ({"state_dim": 4, "head_dim": 8} if mixer == "mate" else {})
    sizes = {"channels": 4, "text_dims": (6,), "max_grid": (3, 4, 4)}
    config = LinGenConfig(dim=16, depth=2, mixer=component, text_parts=parts, **sizes)
    torch.manual_seed(0)
    model = LinGen(config)
    draw_weights(model)
    tokens, mask = torch.randn(2, 5, 6), torch.arange(5) < torch.tensor([[5], [3]])
    mask = torch.tensor([[1, 1, 2, 2, 3], [1, 2, 2, 0, 0]]) if parts else mask
    inputs = torch.randn(2, 4, 3, 6, 4), torch.tensor([0.2, 0.8]), ((tokens, mask),)
    with torch.no_grad():
        want, got = model(*inputs), PlainDenoiser(model)(*inputs)
    assert want.square().mean() > 0.01
    assert_close("velocity", want, got, 1e-5)
    assert len(model.blocks) == 2 and type(model.blocks[0]).__name__ == "Block"


def test_yardsticks_are_those_of_the_checkout_from_any_folder(tmp_path):
    """Another package named tests lies in the folder that lingen is started in."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("mine = 1\n")
    script = (
        "import sys; from lingen.cli.bench import yardstick; stock = yardstick('stock'); import tests; "
        "print(tests.mine, stock.StockSwin.__name__, yardstick('plain').StockSwin is stock.StockSwin)"
    )
    root = str(Path(lingen.__file__).parents[1])
    words = [sys.executable, "-c", f"import sys; sys.path[:0] = ['', {root!r}]; {script}"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.stdout == "1 StockSwin True\n", done.stderr


@pytest.mark.parametrize("words", [["stock", "--recipe", "quickstart_cpu"], ["show"], []])
def test_without_a_checkout_measurements_are_refused(words, tmp_path):
    """As an installed package has it: lingen/ without tests/ beside it."""
    (tmp_path / "lingen").symlink_to(Path(lingen.__file__).parent)
    command = [sys.executable, "-m", "lingen", "bench", *words]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=100)
    assert done.returncode == 2 and "run this command from a checkout of lingen" in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["lingen"]
