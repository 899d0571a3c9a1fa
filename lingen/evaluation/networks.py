"""Feature networks: what distances and the coherence of frames are measured in, deterministic and in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from lingen.evaluation.i3d import InceptionI3D
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import Registry
from lingen.weights import hash_tensors

FEATURES = Registry(
    "feature network",
    "lingen.features",
    {name: f"lingen.evaluation.networks:{kind}" for name, kind in (("i3d", "VideoI3D"), ("efficientnet", "FrameNet"))},
)
"""Modules with keyword settings (`path`, say), whose ``forward`` takes uint8 [b 3 t h w] and gives [b d]; one whose
``video`` is False gets single frames, t = 1."""


class VideoI3D(nn.Module):
    """The logits of I3D (Kinetics-400): with the Frechet distance, FVD."""

    video = True

    def __init__(self, *, path: str = "weights/i3d.safetensors"):
        super().__init__()
        self.network = _loaded(InceptionI3D(), path, "i3d")

    def forward(self, clips: UInt8[Tensor, "b 3 t h w"]) -> Float[Tensor, "b d"]:
        return self.network(clips.float() / 127.5 - 1)


class FrameNet(nn.Module):
    """Pooled features of EfficientNet-lite0 (ImageNet). A Frechet distance of these is no FID."""

    video = False

    def __init__(self, *, path: str = "weights/efficientnet.safetensors"):
        super().__init__()
        import timm

        self.network = _loaded(timm.create_model("tf_efficientnet_lite0", pretrained=False), path, "efficientnet")
        self.network.reset_classifier(0)

    def forward(self, clips: UInt8[Tensor, "b 3 1 h w"]) -> Float[Tensor, "b d"]:
        return self.network((clips[:, :, 0].float() - 127) / 128)


def _loaded(network: Any, path: str, name: str) -> Any:
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise RecipeError(
            f"The weights of '{name}' are not at {path}: lingen data fetch {name}; or say where they are, --features "
            f"{name}=PATH."
        )
    network.load_state_dict(load_file(path))
    return network


def network_of(words: str) -> nn.Module:
    """``NAME`` or ``NAME=PATH``, with NAME a registered one or ``module:Class``; frozen, in eval mode."""
    name, _, path = words.partition("=")
    return FEATURES.build({"name": name, **({"path": path} if path else {})}).eval().requires_grad_(False)


def hash_network(network: nn.Module) -> str:
    """Its class, and 12 digits of the hash of its weights."""
    return f"{type(network).__name__}-{hash_tensors(network.state_dict())[:12]}"


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 and the same kernels every time, so that features of a GPU and of a CPU agree to 1e-3."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
