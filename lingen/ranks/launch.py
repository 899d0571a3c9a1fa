"""Connects the ranks of a run, and holds what a recipe asks for to what srun or torchrun have started."""

import atexit
import logging
import os
import socket
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lingen.data.follow import end_with
from lingen.ranks.collectives import gather_objects, is_connected, on_first_rank, together
from lingen.ranks.environment import PARENT, OtherRankError, Rank, here
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import Recipe
from lingen.recipe.sizes import ranks_of

T = TypeVar("T")
log = logging.getLogger("lingen")

MEETING, TELL_AFTER = timedelta(minutes=10), timedelta(minutes=1)
"""How long ranks wait for each other to come, and after which time those that are missing are named."""
CUDA_BACKEND = "cpu:gloo,cuda:nccl"
"""Of the ranks' process group where tensors are on GPUs: plain values that they tell each other stay off them."""
PATIENCE = timedelta(minutes=60)
"""How long a rank waits for what another one does alone, such as an index of new shards."""


class RankEnvironment(LightningEnvironment):
    """The ranks for Lightning, which neither looks for them nor starts any itself (docs/upstream.md)."""

    creates_processes_externally = True

    def __init__(self) -> None:
        super().__init__()
        self.own = here()
        self.set_world_size(self.own.ranks)
        self.set_global_rank(self.own.rank)

    @property
    def main_address(self) -> str:
        return self.own.address

    @property
    def main_port(self) -> int:
        return self.own.port  # 0, of one process alone: any free one

    def local_rank(self) -> int:
        return self.own.local_rank

    def node_rank(self) -> int:
        return self.own.node

    def teardown(self) -> None:
        """Variables of a launcher stay: the next stage has the same ranks."""


def join() -> None:
    """Connects this process to the other ranks, where its environment says that there are some; once.

    Raises:
        RecipeError: rank 0 cannot be reached, or the ranks lie on the nodes in a way that does not work."""
    own = here()
    if is_connected() or own.ranks == 1:
        return
    if own.rank:
        _be_quiet()
    if PARENT in os.environ:
        end_with(int(os.environ[PARENT]))
    try:
        socket.getaddrinfo(own.address, own.port)
    except OSError as error:
        if own.local_rank:  # of ranks that do not speak the first of a node says so
            raise OtherRankError(f"{own.address} has no address") from error
        raise _no_meeting(own, f"this name has no address on {socket.gethostname()}") from error
    try:
        store = _store(own)
        store.set(f"here/{own.rank}", str(own.node))
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        raise _no_meeting(own, " ".join(str(error).split())[:300]) from error
    if own.by != "lingen":  # which sees each of those that it starts
        meet(own, store)
    connect(own, store)
    agree(own)


def _store(own: Rank) -> Any:
    """What the ranks share; it does not wait for them."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun holds it
        return next(iter(dist.rendezvous(f"tcp://{own.address}:{own.port}", own.rank, own.ranks, timeout=MEETING)))[0]
    return dist.TCPStore(
        own.address, own.port, own.ranks, own.rank == 0, MEETING, wait_for_workers=False, multi_tenant=True
    )


def meet(own: Rank, store: Any) -> None:
    """Waits until all ranks are there; rank 0 names those that are not.

    Raises:
        RecipeError: on rank 0, where some did not come. OtherRankError on the others."""
    if own.rank:
        try:
            return store.wait(["met"], MEETING + TELL_AFTER)
        except (dist.DistError, RuntimeError) as error:
            raise OtherRankError("not all ranks came") from error
    began, is_told = time.monotonic(), False
    while not store.check([f"here/{rank}" for rank in range(own.ranks)]):
        time.sleep(0.1)
        waited = timedelta(seconds=time.monotonic() - began)
        if waited > MEETING or waited > TELL_AFTER and not is_told:
            missing = [rank for rank in range(own.ranks) if not store.check([f"here/{rank}"])]
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            told = ", ".join(f"{rank} of node {rank // own.per_node}" for rank in missing[:4])
            if waited > MEETING:
                raise _no_meeting(own, f"within {waited.seconds} s these did not come: rank {told}{more}")
            log.warning("%d ranks are here; waits for rank %s%s", own.ranks - len(missing), told, more)
            is_told = True
    store.set("met", "")


def load_together(load: Callable[[], T]) -> T:
    """What each rank gets from its own `load`. Those that a launcher started connect first, so that a mistake is said
    once; those that rank 0 started come when it has loaded the same."""
    if here().by == "lingen":
        return load()
    join()
    return together(load)


def _no_meeting(own: Rank, why: str) -> RecipeError:
    return RecipeError(
        f"The {own.ranks} ranks cannot meet at {own.address}:{own.port}: {why}. Set MASTER_ADDR to an address of the "
        "first node that all nodes reach, MASTER_PORT to a port that is free there, and, where a node has several "
        "networks, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the name of one of them."
    )


def connect(own: Rank, store: Any) -> None:
    """Connects this process to the other ranks through a store that they share."""
    vars(rank_zero_only)["rank"] = own.rank
    backend = CUDA_BACKEND if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=own.rank, world_size=own.ranks, timeout=PATIENCE)
    atexit.register(disconnect)


def disconnect() -> None:
    """Ends the connection, if there is one."""
    if is_connected():
        dist.destroy_process_group()


def agree(own: Rank) -> None:
    """For all ranks, once they are connected: `check_layout`."""
    everyone = gather_objects(own)
    on_first_rank(lambda: check_layout(everyone))


def _be_quiet() -> None:
    """Only rank 0 speaks; an error that another one has alone, it says itself."""
    warnings.simplefilter("ignore")
    for name in ("lingen", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def check_layout(everyone: Sequence[Rank]) -> None:
    """RecipeError where the nodes do not have as many ranks each, or those of a node do not follow each other."""
    counts = Counter(one.node for one in everyone)
    first = everyone[0]
    if len(counts) != first.nodes or len(set(counts.values())) > 1:
        told = ", ".join(str(counts[node]) for node in range(first.nodes))
        raise RecipeError(
            f"The {first.ranks} ranks lie on {first.nodes} nodes as {told}; each node needs as many as the others. "
            "Start with srun -N NODES --ntasks-per-node=RANKS."
        )
    if any(one.rank != one.node * first.per_node + one.local_rank for one in everyone):
        raise RecipeError(
            "The ranks of a node do not follow each other. Start with srun --distribution=block, which gives ranks "
            f"0 to {first.per_node - 1} to the first node."
        )


# what the recipe asks for


def ranks_to_start(stages: Sequence[Recipe]) -> int:
    """How many ranks a run of these stages has, where this process has to start the others; 1: none is missing.
    RecipeError: the ranks that are there are not those that a stage asks for."""
    own, asked = here(), dict[str, tuple[int, int]]()
    for one in stages:
        nodes = int(one.trainer.get("num_nodes", 1))
        devices = ranks_here(one) // nodes
        asked[str(one.stage)] = devices, nodes
        if own.ranks > 1 and (devices, nodes) != (own.per_node, own.nodes) or own.ranks == 1 and nodes > 1:
            raise RecipeError(_other_ranks(own, str(one.stage), devices, nodes))
    if len(set(asked.values())) > 1:
        told = ", ".join(f"stage {stage} {devices}" for stage, (devices, _) in asked.items())
        raise RecipeError(
            f"The ranks are started once for all stages, but trainer.devices asks for others: {told}. Give all stages "
            "as many, or train one after the other with --stage."
        )
    there = torch.cuda.device_count()
    for one in stages:
        devices, _ = asked[str(one.stage)]
        if devices > max(1, there) and one.trainer.get("accelerator", "auto") in ("gpu", "cuda"):
            raise RecipeError(  # Lightning would say so on each of them
                f"Stage {one.stage} asks for {devices} GPUs of each machine (trainer.devices), but "
                f"{socket.gethostname()} shows {there or 'none'}. "
                + (f"Set trainer.devices={there}" if there else "Start it where there are some, or `lingen submit` it")
                + "; under srun, let each task see all GPUs of its node."
            )
        strategy = one.trainer.get("strategy")
        if isinstance(strategy, str) and any(way in strategy for way in ("spawn", "fork", "notebook")):
            raise RecipeError(
                f"Strategy '{strategy}' of stage {one.stage} starts its ranks in a way of its own, which lingen does "
                "not follow; set trainer.strategy=ddp."
            )
    return asked.popitem()[1][0] if asked and own.ranks == 1 else 1


def ranks_here(recipe: Recipe) -> int:
    """How many ranks lightning.Trainer makes of a stage on this machine."""
    on_gpus = recipe.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return ranks_of(recipe, torch.cuda.device_count() if on_gpus else 1)


def _other_ranks(own: Rank, stage: str, devices: int, nodes: int) -> str:
    """A sentence for a stage that asks for other ranks than there are."""
    asks, job = f"trainer.devices={devices} and trainer.num_nodes={nodes}", os.environ.get("SLURM_JOB_ID")
    srun, torchrun = f"-N{nodes} --ntasks-per-node={devices}", f"--nnodes={nodes} --nproc-per-node={devices}"
    if own.by == "itself":
        where = f"is no task of srun, though it runs in job {job}" if job else "runs alone"
        return (
            f"Stage {stage} asks for trainer.num_nodes={nodes}, but this process {where}. Start with srun {srun} "
            f"lingen fit ..., without SLURM with torchrun on each node (torchrun {torchrun} ...), or set "
            "trainer.num_nodes=1."
        )
    if own.by == "lingen":
        told = f"This process has started {own.ranks} ranks for a run before, but stage {stage} asks for {asks}."
        return f"{told} Train it in one of its own."
    launch = f"srun {srun}" if own.by == "srun" else f"torchrun {torchrun}"
    return (
        f"{own.by} has started {own.ranks} ranks, {own.per_node} on each of {own.nodes} nodes, but stage {stage} asks "
        f"for {asks}. Set trainer.devices={own.per_node} trainer.num_nodes={own.nodes}, or start with {launch}."
    )
