"""The discriminator that an autoencoder is trained against."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lingen.autoencoder.temporal import ClipConv
from lingen.blocks.layers import RMSNorm

SLOPE = 0.2
WIDEST_LAYER = 8
"""Largest width of a layer, in units of the first one's width."""


class Discriminator(nn.Module):
    """Scores overlapping pieces of a short clip: above 0 for real, below for reconstructed.

    PatchGAN (arXiv 1611.07004) over time too: layers halve height and width, all but the first one also the frames,
    rounded up, so that an image is a clip of one frame. Norms are over the channels of one position [ours]: unlike
    those over a batch, they let neither samples nor frames see each other. With 3 layers a score sees 54 x 54 pixels.

    Args:
        width: channels of the first layer.
        layers: how many halve height and width."""

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        widths = [width * min(2**layer, WIDEST_LAYER) for layer in range(layers + 1)]
        self.first = ClipConv(3, width, 4, (1, 2, 2))
        pairs = zip(widths[:-2], widths[1:-1], strict=True)
        self.halving = nn.ModuleList(ClipConv(a, b, 4, (2, 2, 2), bias=False) for a, b in pairs)
        self.middle = ClipConv(widths[-2], widths[-1], 3, bias=False)
        self.norms = nn.ModuleList(RMSNorm(width) for width in widths[1:])
        self.last = ClipConv(widths[-1], 1, 3)

    def forward(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 1 _t _h _w"]:
        """Pixels in -1..1 -> scores. Height and width are at least 2^layers."""
        x = F.leaky_relu(self.first(video), SLOPE)
        for conv, norm in zip([*self.halving, self.middle], self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x).movedim(1, -1)).movedim(-1, 1), SLOPE)
        return self.last(x)
