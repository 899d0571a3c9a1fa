"""What the yardsticks are compiled from: plain twins and stock blocks, and how long a twin may take to get ready."""

from __future__ import annotations

import time
from importlib.util import find_spec

import pytest
import torch

from lingen.cli.bench import yardstick
from lingen.kernels.scan import chunk_of
from tests.helpers.commands import ROOT, run_python

KERNELS = yardstick("kernels")
CASES, ODD_GRID, LayerSizes = KERNELS.CASES, KERNELS.ODD_GRID, KERNELS.LayerSizes
CPU = torch.device("cpu")


def compiled(what: str) -> list[str]:
    return run_python("-W", "error:Dynamo detected", "-m", "tests.helpers.compiled", what, cwd=ROOT).splitlines()


def test_plain_twins_compile_without_a_break_or_a_warning():
    """But those of the windows, whose rows and angles come from caches: not asked here."""
    assert compiled("twins") == [case.name for case in CASES if "reference" in case.twins]


def test_errors_are_measured_over_more_than_one_chunk():
    for dtype in (torch.float32, torch.bfloat16):
        n = LayerSizes(ODD_GRID, 32).n
        assert n > chunk_of(n, dtype) and n % chunk_of(n, dtype)


def test_a_twin_that_does_not_get_ready_is_left_out():
    said: list[str] = []
    assert not KERNELS.is_ready("slow", [lambda: None, lambda: time.sleep(20)], said.append, limit=0.2)
    assert said.pop() == "slow is left out: TimeoutError: it was not ready after 0.2 s"
    assert KERNELS.is_ready("fast", [lambda: None], said.append, limit=0.2) and said.pop().startswith(
        "fast is ready after 0.0 s"
    )
    time.sleep(0.3)  # the alarm is off


@pytest.mark.slow
def test_the_stock_block_is_itself_when_compiled():
    assert len(compiled("block")) > 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: what broke is what inductor does there")
@pytest.mark.skipif(find_spec("mamba_ssm") is None, reason="needs mamba_ssm, whose scan a stock block has on CUDA")
def test_the_stock_block_is_itself_when_compiled_for_cuda():
    assert len(compiled("cuda")) > 20


def test_a_share_of_the_peak_needs_one(monkeypatch: pytest.MonkeyPatch):
    training = yardstick("training")
    assert training.share_of_peak(5e14, CPU) == {}
    monkeypatch.setattr(training, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    want = {"mfu": pytest.approx(5e14 / 989e12), "mfu_of": "989 TFLOP/s (dense bfloat16)"}
    assert training.share_of_peak(5e14, CPU) == want
