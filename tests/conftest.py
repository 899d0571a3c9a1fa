"""What holds in every test: checked shapes, one thread, Triton's interpreter without a GPU; and shared fixtures."""

import gc
import itertools
import os
import socket

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests of the command line read its plain lines.
os.environ.setdefault("COLUMNS", "200")

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import lingen.cli.bench  # noqa: F401  # loads lingen_yardsticks, which tests import
from lingen.recipe import registry
from tests.helpers.files import times_of
from tests.helpers.interpreter import one_patch_a_launch, products_of_bfloat16
from tests.helpers.shapes import watch
from tests.helpers.tiny import write_broken_shard, write_recipe, write_shapes

if not torch.cuda.is_available():
    # Before triton is imported: without a GPU the kernels run in Triton's interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)
watch()
# The cores may be busy with other things.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
PORTS = itertools.cycle(range(start := 10_000 + 97 * os.getpid() % 20_000, start + 2_000))
"""Of this process, below those that a system gives to connections (32,768 on Linux)."""


def is_free(port: int) -> bool:
    """Whether nothing listens at a port of this machine."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) != 0


if find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
    products_of_bfloat16()
    one_patch_a_launch()


def pytest_collection_finish() -> None:
    """What was imported stays: nobody need look through it for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says whether real SLURM was tried: without its packages nobody would notice that it was not."""
    stats = {kind: terminalreporter.stats.get(kind, []) for kind in ("passed", "failed", "error", "skipped")}
    of_slurm = {kind: [one for one in found if "test_slurm.py" in one.nodeid] for kind, found in stats.items()}
    ran = len({one.nodeid for kind in ("passed", "failed", "error") for one in of_slurm[kind]})
    if ran:
        terminalreporter.write_line(f"slurm: ran {ran} tests")
    elif of_slurm["skipped"]:
        reason = of_slurm["skipped"][0].longrepr[-1].removeprefix("Skipped: ")
        terminalreporter.write_line(f"slurm: skipped, because {reason}")


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run: a limit is kept or not, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def rendezvous(monkeypatch: pytest.MonkeyPatch):
    """A port of the test's own, where ranks meet. Lightning would take a free one of those that the system also
    gives to connections, and until the ranks meet a connection of another test may have got it."""
    monkeypatch.setenv("MASTER_PORT", str(next(filter(is_free, PORTS))))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch):
    """What a test registers is gone after it."""
    for one in (registry.MIXERS, registry.SCANS, registry.AUTOENCODERS, registry.TEXT_ENCODERS, registry.PERCEPTUAL):
        for name in ("_parts", "_origin"):
            monkeypatch.setattr(one, name, dict(getattr(one, name)))


@pytest.fixture
def poisoned():
    """New memory holds NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels are tested: CUDA, or the CPU through Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own, in which it runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own; nothing is there yet."""
    monkeypatch.setenv("LINGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def broken_shard(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> str:
    return write_broken_shard(tmp_path_factory.mktemp("broken"), tiny_shards)


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_shards: Path) -> Path:
    """Two stages that train in a second."""
    return write_recipe(tmp_path / "tiny.yaml", tiny_shards)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Iterator[Path]:
    """A finished run of the tiny recipe for tests that read it: none may change a file of it."""
    from lingen.run import fit

    folder = tmp_path_factory.mktemp("finished")
    run = fit(write_recipe(folder / "tiny.yaml", tiny_shards), run=folder / "run")
    before = times_of(run)
    yield run
    assert times_of(run) == before, "a test changed the run that others read"
