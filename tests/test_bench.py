"""The complexity receipt: what is counted grows as the papers say. Nothing here is timed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lingen.bench.scaling import fit_exponent, flops, saved_bytes
from lingen.cli import main
from lingen.registry import MIXERS

GRIDS = [(34, 16, 16), (34, 32, 32), (68, 32, 32), (136, 32, 32)]
"""256x256 17 s and 512x512 17, 34 and 68 s: 8,704 to 139,264 tokens."""


@pytest.mark.parametrize("mixer", ["mate", "mamba2", "temporal_swin"])
def test_flops_are_linear_from_8k_to_139k_tokens(mixer: str):
    tokens = [math.prod(grid) for grid in GRIDS]
    assert fit_exponent(tokens, [flops(mixer, grid, 64) for grid in GRIDS]).exponent <= 1.05


def test_attentions_flops_are_quadratic():
    projections = {grid: 2 * math.prod(grid) * 4 * 64 * 64 for grid in GRIDS}
    small, large = (flops("attention", grid, 64) - projections[grid] for grid in (GRIDS[1], GRIDS[3]))
    assert large == 16 * small
    assert small == 4 * math.prod(GRIDS[1]) ** 2 * 64  # q k^T and p v


@pytest.mark.parametrize("mixer", ["mate", "mamba2", "temporal_swin"])
def test_activation_memory_grows_at_most_linearly(mixer: str):
    kept = []
    for frames in (16, 64):
        torch.manual_seed(0)
        kept.append(saved_bytes(MIXERS.build(mixer, 32, 1), torch.randn(1, frames, 8, 8, 32, requires_grad=True)))
    assert kept[1] <= 4.2 * kept[0]


def test_an_exponent_is_recovered_with_its_interval():
    tokens = [1000, 2000, 4000, 8000]
    exact = fit_exponent(tokens, [n**1.5 for n in tokens])
    assert exact.exponent == exact.low == exact.high == 1.5
    noisy = fit_exponent(tokens, [n * factor for n, factor in zip(tokens, (1.1, 0.9, 1.05, 1.0), strict=True)])
    assert noisy.low < 1 < noisy.high
    with pytest.raises(ValueError, match="at least three"):
        fit_exponent([1, 2], [1, 2])


@pytest.mark.slow
def test_bench_scaling_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "scaling", "--mixers", "temporal_swin", "--dim", "16", "--out", str(tmp_path)]) == 0
    assert "temporal_swin" in capsys.readouterr().out
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert {"device", "versions", "date", "commit", "rows", "fits"} <= result.keys()
    assert set(result["fits"]["temporal_swin"]) == {"flops", "time", "memory"}
    assert set(result["fits"]["temporal_swin"]["memory"]) == {"exponent", "low", "high"}
    assert len((tmp_path / "scaling.csv").read_text().splitlines()) == 1 + len(result["rows"])
