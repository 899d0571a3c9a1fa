"""Feature networks: what distances and the coherence of frames are measured in, deterministic and in float32."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn

from lingen.media import as_floats

Sizes = tuple[int, ...]


class VideoI3D(nn.Module):
    """The logits of I3D of Kinetics-400 (Carreira and Zisserman, arXiv 1705.07750); with the Frechet distance, FVD
    (Unterthiner et al., arXiv 1812.01717). Padding is TensorFlow's SAME, unlike PyTorch's. At least 9 frames.

    Args:
        path: the tensors of `lingen data fetch i3d`, under their first names."""

    video = True

    def __init__(self, *, path: str = "weights/i3d.safetensors"):
        super().__init__()
        self.held = nn.ParameterDict(load_file(path))

    def forward(self, clips: UInt8[Tensor, "b 3 t 224 224"]) -> Float[Tensor, "b 400"]:
        x = pooled(self._unit(as_floats(clips), "Conv3d_1a_7x7", 2), (1, 3, 3), (1, 2, 2))
        x = pooled(self._unit(self._unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
        for name in ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c"):
            x = self._inception(x, f"Mixed_{name}")
            if name in ("3c", "4f"):
                x = pooled(x, (3 if name == "3c" else 2,) * 3, (2, 2, 2))
        kernel, bias = (self.held[f"Logits/Conv3d_0c_1x1/Conv_0/{one}"] for one in ("kernel", "bias"))
        return F.conv3d(F.avg_pool3d(x, (2, 7, 7), 1), kernel, bias).mean((2, 3, 4))

    def _inception(self, x: Tensor, name: str) -> Tensor:
        """Four branches beside each other."""
        first = [self._unit(x, f"{name}/Branch_{number}/Conv3d_0a_1x1") for number in range(3)]
        wide = [self._unit(first[number], f"{name}/Branch_{number}/Conv3d_0b_3x3") for number in (1, 2)]
        last = self._unit(pooled(x, (3, 3, 3), (1, 1, 1)), f"{name}/Branch_3/Conv3d_0b_1x1")
        return torch.cat([first[0], *wide, last], 1)

    def _unit(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        """Convolution, batch norm without a scale, ReLU."""
        kernel = self.held[f"{name}/Conv_0/kernel"]
        x = F.conv3d(same(x, kernel.shape[2:], (stride,) * 3), kernel, stride=stride)
        mean, var, bias = (self.held[f"{name}/BatchNorm_0/{one}"] for one in ("mean", "var", "bias"))
        return F.relu(F.batch_norm(x, mean, var, bias=bias, eps=1e-3))


def pooled(x: Tensor, sizes: Sizes, strides: Sizes) -> Tensor:
    return F.max_pool3d(same(x, sizes, strides, -torch.inf), sizes, strides)


def same(x: Tensor, sizes: Sizes, strides: Sizes, value: float = 0.0) -> Tensor:
    """Pads t, h, w so that each side becomes ceil(side / stride); an odd row more goes to the end."""
    pads: list[int] = []
    for side, size, stride in list(zip(x.shape[2:], sizes, strides, strict=True))[::-1]:
        total = max((-(-side // stride) - 1) * stride + size - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


class FrameNet(nn.Module):
    """Pooled features of EfficientNet-lite0 (ImageNet). A Frechet distance of these is no FID."""

    video = False
    network: Any

    def __init__(self, *, path: str = "weights/efficientnet.safetensors"):
        super().__init__()
        import timm

        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        self.network.load_state_dict(load_file(path))
        self.network.reset_classifier(0)

    def forward(self, clips: UInt8[Tensor, "b 3 1 h w"]) -> Float[Tensor, "b d"]:
        return self.network((clips[:, :, 0].float() - 127) / 128)
