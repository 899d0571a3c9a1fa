"""Where this process stands among the ranks of a run, as its environment says it. Standard library only: the command
line asks before torch is imported."""

import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PARENT = "LINGEN_PARENT"
"""Variable of a rank that another process of lingen started: the number of that process."""
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, and lingen itself, tell a rank that they start."""
OF_TASKS = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS")
"""What srun tells a task; a batch script, which is no task, lacks the first one."""

LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo/transport")
"""Words in errors of torch that mean that another rank is gone."""


@dataclass(frozen=True)
class Rank:
    """One rank among all."""

    by: str = "itself"
    """What started the ranks: srun, torchrun, lingen; `itself`: nothing did."""
    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    node: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    """Where rank 0 is."""
    port: int = 0

    @property
    def per_node(self) -> int:
        """Ranks of a node, where all have as many."""
        return self.ranks // self.nodes


class OtherRankError(RuntimeError):
    """Another rank could not do something that all need; it says why itself."""


class UnfitError(RuntimeError):
    """The preflight found what keeps a run from training, on all ranks.

    Args:
        text: what is wrong, and the cure.
        nodes: that cannot train, where others may; none: it is the same everywhere.
        hung: a thread of a rank may hang for ever."""

    def __init__(self, text: str, nodes: Sequence[str] = (), hung: bool = False):
        super().__init__(text)
        self.nodes, self.hung = list(nodes), hung


def is_lost_rank(error: BaseException) -> bool:
    """Whether a rank noticed only that another one is gone."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError"):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)


_started: list[Rank] = []
"""This process, where it has started the other ranks."""


def here() -> Rank:
    """This process."""
    return _started[0] if _started else rank_of(os.environ)


def take(own: Rank | None) -> None:
    """Notes that this process has started other ranks, and so is one of them; None: they have ended."""
    _started[:] = [own] if own else []


def rank_of(env: Mapping[str, str]) -> Rank:
    """The rank that an environment tells of. A step of one task is nobody's rank: it may start ranks of its own."""
    if all(name in env for name in OF_LAUNCHERS):
        rank, ranks, local_rank, per_node = (int(env[name]) for name in OF_LAUNCHERS[:4])
        own = Rank(
            by="lingen" if PARENT in env else "torchrun", rank=rank, ranks=ranks, local_rank=local_rank,
            node=int(env.get("GROUP_RANK", rank // per_node)),
            nodes=int(env.get("GROUP_WORLD_SIZE", ranks // per_node)),
            address=env["MASTER_ADDR"], port=int(env["MASTER_PORT"]),
        )  # fmt: skip
    elif all(name in env for name in OF_TASKS):
        nodes = int(env.get("SLURM_STEP_NUM_NODES", "1"))
        first = first_host(env.get("SLURM_STEP_NODELIST", "")) if nodes > 1 else "127.0.0.1"
        # Of each step of each job its own, below the ports that a system gives to connections.
        port = 10_000 + (61 * int(env.get("SLURM_JOB_ID", "0")) + int(env["SLURM_STEP_ID"])) % 20_000
        own = Rank(
            by="srun", rank=int(env["SLURM_PROCID"]), ranks=int(env["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(env["SLURM_LOCALID"]), node=int(env["SLURM_NODEID"]), nodes=nodes,
            address=env.get("MASTER_ADDR", first), port=int(env.get("MASTER_PORT", port)),
        )  # fmt: skip
    else:
        return Rank()
    return own if own.ranks > 1 else Rank()


def first_host(nodes: str) -> str:
    """``gpu[007-009,12],cpu1`` -> ``gpu007``: the first of SLURM's list of hosts."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


def who() -> str:
    """``rank 3 on host: `` before what another rank than the first has to say; nothing for the first one."""
    own = here()
    return f"rank {own.rank} on {socket.gethostname()}: " if own.rank else ""
