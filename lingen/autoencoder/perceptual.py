"""Perceptual distances: how far two images are apart in the features of a network trained to recognise things."""

from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lingen.frozen import Missing, check_ready
from lingen.recipe.bounds import CONTENT, IDENTITY
from lingen.recipe.errors import RecipeError

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG16's convolutions (arXiv 1409.1556, configuration D); a max-pool stands between two blocks."""


class Trunk(nn.ModuleDict):
    """VGG16's 13 convolutions, ``conv1_1`` to ``conv5_3``. `taps` returns the output of each of the five blocks.

    Args:
        ceil: whether pooling keeps the last row or column of an odd height or width."""

    def __init__(self, *, ceil: bool):
        inputs = (3, *chain(*BLOCKS))
        names = [f"conv{b}_{i}" for b, block in enumerate(BLOCKS, 1) for i in range(1, len(block) + 1)]
        widths = zip(inputs[:-1], inputs[1:], strict=True)
        super().__init__({name: nn.Conv2d(a, b, 3, padding=1) for name, (a, b) in zip(names, widths, strict=True)})
        self.ceil = ceil
        self.requires_grad_(False).eval()

    def taps(self, x: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n c _h _w"]]:
        found: list[Tensor] = []
        for name, conv in self.items():
            if name.endswith("_1") and found:
                x = F.max_pool2d(x, 2, ceil_mode=self.ceil)
            x = F.relu(conv(x), inplace=not x.requires_grad)
            if name == f"conv{len(found) + 1}_{len(BLOCKS[len(found)])}":
                found.append(x)
        return found


def unit_difference(a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """(a / ||a|| - b / ||b||)^2 norms over channels and at least 1e-4, in float32 or wider."""
    a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
    a, b = (x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-8) for x in (a, b))
    return (a - b).square()


class VGG16Distance(nn.Module):
    """2 - 2 cos of the angle between two images' features, a mean over positions and the five taps of a VGG16.

    The VGG16 is the trunk of an edge detector (HED, arXiv 1504.06375), ImageNet's fine-tuned for edges; every channel
    and tap counts the same. So this is not LPIPS, whose weights were fitted to people's judgements: compare
    its values only with each other. `lingen data fetch vgg16` makes the weights; they are read at the first call."""

    means: Tensor

    def __init__(self, *, path: Annotated[str, IDENTITY, CONTENT, "its weights"] = "weights/vgg16.safetensors"):
        super().__init__()
        self.path = path
        self.trunk: Trunk | None = None
        self.register_buffer("means", torch.tensor([104.00699, 116.66877, 122.67892]).view(3, 1, 1), persistent=False)

    def missing(self) -> list[Missing]:
        fault = _file_fault(Path(self.path))
        cure = f"{fault} Run `lingen data fetch vgg16 --out {Path(self.path).parent}`, or name the file in its `path`."
        return [Missing("vgg16", self.path, cure)] if fault else []

    def forward(self, a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n"]:
        """Distances of pairs of images in -1..1: 0 for equal ones, at most 2."""
        if self.trunk is None:
            with torch.inference_mode(False):  # or a validation that comes first would leave no weights to train with
                self.trunk = self._load().to(a.device)
        pairs = zip(self.trunk.taps(self._caffe(a)), self.trunk.taps(self._caffe(b)), strict=True)
        return torch.stack([unit_difference(x, y).sum(1).mean((1, 2)) for x, y in pairs]).mean(0)

    def _caffe(self, images: Tensor) -> Tensor:
        """RGB in -1..1 -> BGR in 0..255 less the means, as Caffe's networks want it."""
        return (images.flip(1) + 1) * 127.5 - self.means

    def _load(self) -> Trunk:
        check_ready([self])
        trunk = Trunk(ceil=True)  # as HED's pools do
        trunk.load_state_dict(load_file(self.path))
        return trunk


def _file_fault(path: Path) -> str:
    """A sentence for why a file does not hold the trunk's weights; empty where it does. Reads its header only."""
    if not path.is_file():
        return "The file is not there."
    with torch.device("meta"):
        wanted = {name: list(value.shape) for name, value in Trunk(ceil=True).state_dict().items()}
    try:
        with safe_open(str(path), "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        return f"The file cannot be read as safetensors ({error})."
    return "" if shapes == wanted else "The file does not hold the 13 convolutions of VGG16."


class LPIPS(nn.Module):
    """LPIPS, net VGG, version 0.1 (arXiv 1801.03924, eq. 1): ImageNet's VGG16 as torchvision has it, and the weights of
    channels that were fitted to people's judgements, which torchmetrics brings along. Read at the first call."""

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        *,
        path: Annotated[str | None, IDENTITY, CONTENT, "vgg16-397923af.pth; null: torch hub's cache folder"] = None,
    ):
        super().__init__()
        self.path = path
        self.trunk: Trunk | None = None
        self.heads: nn.ParameterList | None = None
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    @property
    def file(self) -> Path:
        return Path(self.path or f"{torch.hub.get_dir()}/checkpoints/vgg16-397923af.pth")

    def missing(self) -> list[Missing]:
        cure = "Put torchvision's weights of VGG16 (vgg16-397923af.pth) there, or name the file in its `path`."
        return [] if self.file.is_file() else [Missing("lpips", str(self.file), cure)]

    def forward(self, a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n"]:
        """Distances of pairs of images in -1..1 of at least 16 x 16 pixels: 0 for equal ones."""
        if self.trunk is None or self.heads is None:
            with torch.inference_mode(False):
                trunk, heads = self._load()
                self.trunk, self.heads = trunk.to(a.device), heads.to(a.device)
        pairs = zip(*(self.trunk.taps((x - self.shift) / self.scale) for x in (a, b)), self.heads, strict=True)
        return torch.stack([(head * unit_difference(x, y)).sum(1).mean((1, 2)) for x, y, head in pairs]).sum(0)

    def _load(self) -> tuple[Trunk, nn.ParameterList]:
        check_ready([self])
        trunk = Trunk(ceil=False)
        saved = torch.load(self.file, map_location="cpu", weights_only=True)
        convolutions = [value for name, value in saved.items() if name.startswith("features.")]
        if [value.shape for value in convolutions] != [value.shape for value in trunk.state_dict().values()]:
            raise RecipeError(f"{self.file} does not hold torchvision's VGG16 (at lpips.path).")
        trunk.load_state_dict(dict(zip(trunk.state_dict(), convolutions, strict=True)))
        fitted = files("torchmetrics") / "functional/image/lpips_models/vgg.pth"
        heads = torch.load(str(fitted), map_location="cpu", weights_only=True)
        weights = [heads[f"lin{tap}.model.1.weight"][0] for tap in range(len(BLOCKS))]
        return trunk, nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in weights)


class NoDistance(nn.Module):
    """Always 0: no perceptual distance."""

    def missing(self) -> list[Missing]:
        return []

    def forward(self, a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n"]:
        return a.new_zeros(len(a))
