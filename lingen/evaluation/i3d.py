"""I3D of Kinetics-400 (Carreira and Zisserman, arXiv 1705.07750), the network of FVD (Unterthiner et al., arXiv
1812.01717). Names are those of its first publication. Padding is TensorFlow's SAME, which differs from PyTorch's."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Sizes = tuple[int, ...]
MIXED = {
    "3b": (192, (64, 96, 128, 16, 32, 32)), "3c": (256, (128, 128, 192, 32, 96, 64)),
    "4b": (480, (192, 96, 208, 16, 48, 64)), "4c": (512, (160, 112, 224, 24, 64, 64)),
    "4d": (512, (128, 128, 256, 24, 64, 64)), "4e": (512, (112, 144, 288, 32, 64, 64)),
    "4f": (528, (256, 160, 320, 32, 128, 128)),
    "5b": (832, (256, 160, 320, 32, 128, 128)), "5c": (832, (384, 192, 384, 48, 128, 128)),
}  # fmt: skip
"""Name -> channels that enter an inception block, and those that leave its six convolutions."""


def pooled(x: Tensor, sizes: Sizes, strides: Sizes) -> Tensor:
    return F.max_pool3d(same(x, sizes, strides, -torch.inf), sizes, strides)


def same(x: Tensor, sizes: Sizes, strides: Sizes, value: float = 0.0) -> Tensor:
    """Pads t, h, w so that each side becomes ceil(side / stride); an odd row more goes to the end."""
    pads: list[int] = []
    for side, size, stride in list(zip(x.shape[2:], sizes, strides, strict=True))[::-1]:
        total = max((-(-side // stride) - 1) * stride + size - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, size, stride, bias=False)
        self.norm = nn.BatchNorm3d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(same(x, self.conv.kernel_size, self.conv.stride))))


class Inception(nn.ModuleDict):
    """Four branches beside each other."""

    def __init__(self, inputs: int, widths: Sizes):
        a, b, c, d, e, f = widths
        first, second = "Conv3d_0a_1x1", "Conv3d_0b_3x3"
        super().__init__({f"Branch_{n}/{first}": Unit(inputs, width) for n, width in enumerate((a, b, d))})
        self.update({f"Branch_1/{second}": Unit(b, c, 3), f"Branch_2/{second}": Unit(d, e, 3)})
        self["Branch_3/Conv3d_0b_1x1"] = Unit(inputs, f)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three, *others = self.values()
        shown = pooled(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([one(x), others[0](two(x)), others[1](three(x)), others[2](shown)], 1)


class InceptionI3D(nn.ModuleDict):
    """[b 3 t 224 224] in -1..1, of at least 9 frames -> 400 logits [b 400], the features of FVD."""

    def __init__(self) -> None:
        stem = {"Conv3d_1a_7x7": Unit(3, 64, 7, 2), "Conv3d_2b_1x1": Unit(64, 64), "Conv3d_2c_3x3": Unit(64, 192, 3)}
        super().__init__(stem | {f"Mixed_{name}": Inception(*channels) for name, channels in MIXED.items()})
        self["Logits/Conv3d_0c_1x1"] = nn.Sequential(OrderedDict(conv=nn.Conv3d(1024, 400, 1)))

    def forward(self, x: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 400"]:
        *blocks, last = self.items()
        for name, block in blocks:
            x = block(x)
            if name in ("Conv3d_1a_7x7", "Conv3d_2c_3x3"):
                x = pooled(x, (1, 3, 3), (1, 2, 2))
            elif name in ("Mixed_3c", "Mixed_4f"):
                x = pooled(x, (3 if name == "Mixed_3c" else 2,) * 3, (2, 2, 2))
        return last[1](F.avg_pool3d(x, (2, 7, 7), 1)).mean((2, 3, 4))
