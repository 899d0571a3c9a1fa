"""`trainer.strategy`: whether each rank keeps the whole model (auto, ddp) or a part of it (fsdp, hsdp)."""

from typing import Any, cast

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lingen.ranks.launch import CUDA_BACKEND
from lingen.recipe.sections import Recipe

SHARDED = ("fsdp", "hsdp")
"""The strategies that split the model over ranks."""


def strategy_of(recipe: Recipe) -> str | Strategy:
    """What lightning.Trainer takes for the strategy of a loaded stage."""
    name = str(recipe.trainer.get("strategy", "auto")).lower()
    if name not in SHARDED:
        return name
    low = torch.bfloat16 if str(recipe.trainer.get("precision")) in ("bf16-mixed", "bf16") else None
    return Sharded(inside_nodes=name == "hsdp", low=low)


class Sharded(DDPStrategy):
    """FSDP2: each rank holds and moves its rows of every parameter (`lingen.training.sharding`).

    Processes, devices and reductions are those of Lightning's DDP strategy; there is no wrapper around the module.

    Args:
        inside_nodes: shards are spread over the devices of a node, and each node holds a replica; else over all ranks.
        low: the dtype that blocks are gathered in; None for their own."""

    def __init__(self, *, inside_nodes: bool, low: torch.dtype | None):
        super().__init__()
        self.inside_nodes, self.low = inside_nodes, low

    def _get_process_group_backend(self) -> str:
        return CUDA_BACKEND if self.root_device.type == "cuda" else super()._get_process_group_backend()

    def mesh(self, kind: str, nodes: int, each: int) -> DeviceMesh:
        """The ranks, `each` on so many nodes: one axis, or (nodes, devices of a node)."""
        if self.inside_nodes:
            return init_device_mesh(kind, (nodes, each), mesh_dim_names=("replicas", "shards"))
        return init_device_mesh(kind, (nodes * each,), mesh_dim_names=("shards",))

    def model_to_device(self) -> None:
        """Shards what is trained, unit by unit, before the rest is moved: the whole never lies on one device."""
        module = cast(Any, self.lightning_module)
        if module.trainer.state.fn == TrainerFn.FITTING:
            mesh = self.mesh(self.root_device.type, self.num_nodes, self.num_processes)
            module.shard(mesh, self.root_device, self.low)
        super().model_to_device()

    def configure_ddp(self) -> None:
        """Nothing: gradients are reduced by the units themselves."""

    def teardown(self) -> None:
        """As DDP's, but what is sharded stays where it is: its mesh is of this device."""
        module, self._lightning_module, self.optimizers = self._lightning_module, None, []
        try:
            super().teardown()
        finally:
            self._lightning_module = module
