"""Feature networks: what distances and the coherence of frames are measured in, deterministic and in float32."""

from pathlib import Path
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor, nn

from lingen.evaluation.i3d import i3d_logits
from lingen.media import as_floats
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import Registry

FEATURES = Registry(
    "feature network",
    "lingen.features",
    {"i3d": "lingen.evaluation.networks:VideoI3D", "efficientnet": "lingen.evaluation.networks:FrameNet"},
)
"""Modules with keyword settings (`path`, say), whose ``forward`` takes uint8 [b 3 t h w] and gives [b d]; one whose
``video`` is False gets single frames, t = 1."""


class VideoI3D(nn.Module):
    """The logits of I3D (Kinetics-400): with the Frechet distance, FVD."""

    video = True

    def __init__(self, *, path: str = "weights/i3d.safetensors"):
        super().__init__()
        self.held = nn.ParameterDict(_tensors(path, "i3d"))

    def forward(self, clips: UInt8[Tensor, "b 3 t h w"]) -> Float[Tensor, "b d"]:
        return i3d_logits(as_floats(clips), self.held)


class FrameNet(nn.Module):
    """Pooled features of EfficientNet-lite0 (ImageNet). A Frechet distance of these is no FID."""

    video = False
    network: Any

    def __init__(self, *, path: str = "weights/efficientnet.safetensors"):
        super().__init__()
        import timm

        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        self.network.load_state_dict(_tensors(path, "efficientnet"))
        self.network.reset_classifier(0)

    def forward(self, clips: UInt8[Tensor, "b 3 1 h w"]) -> Float[Tensor, "b d"]:
        return self.network((clips[:, :, 0].float() - 127) / 128)


def _tensors(path: str, name: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise RecipeError(f"{path} is not there: lingen data fetch {name}, or say where it is, --features {name}=PATH.")
    return load_file(path)


def network_of(words: str) -> nn.Module:
    """``NAME`` or ``NAME=PATH``, with NAME a registered one or ``module:Class``; frozen, in eval mode."""
    name, _, path = words.partition("=")
    return FEATURES.build({"name": name, **({"path": path} if path else {})}).eval().requires_grad_(False)
