"""I3D of Kinetics-400 (Carreira and Zisserman, arXiv 1705.07750), the network of FVD (Unterthiner et al., arXiv
1812.01717), as a function of its tensors under their first names. Padding is TensorFlow's SAME, unlike PyTorch's."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

I3DTensors = Mapping[str, Tensor] | nn.ParameterDict
Sizes = tuple[int, ...]


def i3d_logits(x: Float[Tensor, "b 3 t 224 224"], held: I3DTensors) -> Float[Tensor, "b 400"]:
    """-1..1, at least 9 frames -> logits, the features of FVD. `held`: the tensors of `lingen data fetch i3d`."""
    x = pooled(unit(x, held, "Conv3d_1a_7x7", 2), (1, 3, 3), (1, 2, 2))
    x = pooled(unit(unit(x, held, "Conv3d_2b_1x1"), held, "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    for name in ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c"):
        x = inception(x, held, f"Mixed_{name}")
        if name in ("3c", "4f"):
            x = pooled(x, (3 if name == "3c" else 2,) * 3, (2, 2, 2))
    kernel, bias = (held[f"Logits/Conv3d_0c_1x1/Conv_0/{one}"] for one in ("kernel", "bias"))
    return F.conv3d(F.avg_pool3d(x, (2, 7, 7), 1), kernel, bias).mean((2, 3, 4))


def inception(x: Tensor, held: I3DTensors, name: str) -> Tensor:
    """Four branches beside each other."""
    first = [unit(x, held, f"{name}/Branch_{number}/Conv3d_0a_1x1") for number in range(3)]
    wide = [unit(first[number], held, f"{name}/Branch_{number}/Conv3d_0b_3x3") for number in (1, 2)]
    last = unit(pooled(x, (3, 3, 3), (1, 1, 1)), held, f"{name}/Branch_3/Conv3d_0b_1x1")
    return torch.cat([first[0], *wide, last], 1)


def unit(x: Tensor, held: I3DTensors, name: str, stride: int = 1) -> Tensor:
    """Convolution, batch norm without a scale, ReLU."""
    kernel = held[f"{name}/Conv_0/kernel"]
    x = F.conv3d(same(x, kernel.shape[2:], (stride,) * 3), kernel, stride=stride)
    mean, var, bias = (held[f"{name}/BatchNorm_0/{one}"] for one in ("mean", "var", "bias"))
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
