"""Checkpoints of several ranks, each with its rows, read again by another number of them; ranks are processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lingen.run import fit
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.intact import Checkpoint, check_intact, newest_intact
from tests.helpers.ranks import steps_of_ranks

SHORT = ["train.checkpoint_every=1", "train.log_every=1", "sample.prompts=[]", "data.workers=0"]

RANKS = '''
import errno, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from lingen.run_folder import saver as saving
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.intact import Checkpoint
from lingen.ranks.collectives import OtherRankError
from lingen.run_folder.saver import Saver
from lingen.training.state import state_by_name
from lingen.run_folder.storage import fill_rows

folder = RunFolder(Path("run"))

def build(seed, mesh):
    """A sharded model after two steps: rows that no number of ranks divides, buffers, some ranks without a row."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2))
    fully_shard(module, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")[-len(mesh):]))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(2):
        module(torch.arange(20.0).view(4, 5).sin()).square().sum().backward()
        optimizer.step()
    held = {f"raw.{name}": value for name, value in module.state_dict().items()}
    for name, values in state_by_name(module, optimizer).items():
        held |= {f"{key}.{name}": value for key, value in values.items() if isinstance(value, torch.Tensor)}
    return held

def whole(held):
    found = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in held.items()}
    return {name: value.detach().clone().contiguous() for name, value in found.items()}

def save(mesh, step):
    held = build(step, mesh)
    found = whole(held)
    if dist.get_rank() == 0:
        save_file(found, f"whole-{step}.safetensors")
    saver = Saver(folder, "one", 9)
    assert saver.prepare(held, pinned=False) is None
    saver.begin(step, held, {"step": step}, {})
    for value in held.values():  # training goes on
        value.zero_()
    saver.finish()

def load(mesh, step):
    held = build(1000, mesh)
    kept, stored = load_file(f"whole-{step}.safetensors"), Checkpoint(folder.checkpoint("one", step))
    assert not torch.equal(whole(held)["raw.0.weight"], kept["raw.0.weight"])
    for name, value in held.items():
        fill_rows(value, stored, name)
    for name, value in whole(held).items():
        assert torch.equal(value, kept[name]), name

def full(mesh, step):
    """The last rank's disk has no room."""
    held, write = build(0, mesh), saving.write_file
    def refuse(path, chunks):
        if dist.get_rank() == dist.get_world_size() - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, chunks)
    saving.write_file = refuse
    saver = Saver(folder, "one", 9)
    saver.prepare(held, pinned=False)
    saver.begin(step, held, {}, {})
    try:
        saver.finish()
    except (OSError, OtherRankError) as error:
        os.write(1, f"{type(error).__name__} {error}\\n".encode())  # at once: ranks share a pipe

def rank_of(act, mesh, step, rank, world):
    dist.init_process_group("gloo", init_method=f"file://{Path(f'meet-{act}-{step}-{world}').absolute()}", rank=rank,
                            world_size=world)
    globals()[act](mesh, int(step))
    dist.barrier()
    os._exit(0)

for word in sys.argv[1:]:  # ranks are forks, so that torch is imported once
    act, sizes, step = word.split(":")
    mesh = tuple(map(int, sizes.split("x")))
    world = torch.tensor(mesh).prod().item()
    ranks = []
    for rank in range(world):
        ranks.append(os.fork())
        if not ranks[-1]:
            try:
                rank_of(act, mesh, step, rank, world)
            finally:
                os._exit(1)
    assert [os.waitpid(rank, 0)[1] for rank in ranks] == [0] * world, word
'''


def run_ranks(where: Path, *acts: str) -> str:
    """What ranks print; `acts` are ``what:mesh:step``, one after the other."""
    (where / "ranks.py").write_text(RANKS)
    words = [sys.executable, "-W", "ignore", "ranks.py", *acts]
    with subprocess.Popen(words, cwd=where, stdout=-1, stderr=-1, text=True, start_new_session=True) as ranks:
        try:
            out, err = ranks.communicate(timeout=200)
        except BaseException:
            os.killpg(ranks.pid, signal.SIGKILL)
            raise
    assert ranks.returncode == 0, err
    return out


@pytest.mark.slow
def test_another_number_of_ranks_reads_the_same_numbers(tmp_path: Path):
    run_ranks(tmp_path, "save:2:1", "load:1:1", "load:3:1", "save:3:2", "load:2:2", "save:2x2:3", "load:2:3")
    for step, ranks in ((1, 2), (2, 3), (3, 4)):
        path = RunFolder(tmp_path / "run").checkpoint("one", step)
        check_intact(path)
        stored, kept = Checkpoint(path), load_file(tmp_path / f"whole-{step}.safetensors")
        assert set(stored.tensors) == set(kept)
        for name, value in kept.items():
            assert torch.equal(stored.read(name), value), name
        sizes = [one["size"] for one in stored.about["files"].values()]
        assert len(sizes) == ranks and min(sizes) > max(sizes) / 4  # all have a part in it


@pytest.mark.slow
def test_a_full_disk_of_one_rank_is_told_by_all_and_leaves_the_one_before(tmp_path: Path):
    said = sorted(run_ranks(tmp_path, "save:2:2", "full:2:3").splitlines())
    told = f"[Errno {errno.ENOSPC}] No space left on device: 'run/stages/one/step-00000003'"
    assert said == [f"OSError {told}", f"OtherRankError rank 1: OSError: {told}"]
    assert [path.name for path in (tmp_path / "run" / "stages" / "one").iterdir()] == ["step-00000002"]
    assert newest_intact(RunFolder(tmp_path / "run"), "one")[0] is not None


@pytest.mark.slow
def test_a_sharded_run_goes_on_bit_for_bit_and_whole_from_the_same_numbers(tiny_recipe: Path, tmp_path: Path):
    """The average, the moments and their counts come along: from two ranks of fsdp to two again, and to one process."""
    common = [*SHORT, "trainer.accelerator=cpu", "trainer.strategy=fsdp", "stages.images.train.steps="]

    def trial(run: str, steps: int, *more: str) -> dict[str, Any]:
        overrides = [*common[:-1], f"{common[-1]}{steps}", *more]
        return {"recipe": str(tiny_recipe), "overrides": overrides, "run": tmp_path / run, "stage": "images"}

    steps_of_ranks([trial("straight", 4), trial("halves", 2), trial("halves", 4)], 2)
    ends = [Checkpoint(RunFolder(tmp_path / run).checkpoint("images", 4)) for run in ("straight", "halves")]
    assert ends[0].state == ends[1].state and ends[0].state["average_updates"] == 4
    for name in ends[0].tensors:
        assert torch.equal(ends[0].read(name), ends[1].read(name)), name
    still = [*SHORT, "train.lr=0", "stages.images.train.steps=5"]
    fit(tiny_recipe, still, run=tmp_path / "halves", stage="images")
    later = Checkpoint(RunFolder(tmp_path / "halves").checkpoint("images", 5))
    assert {one["step"] for one in later.state["optimizer"].values()} == {5.0} and later.state["average_updates"] == 5
    for name in later.tensors:
        if name.startswith("raw."):
            assert torch.equal(later.read(name), ends[1].read(name)), name
