"""A video autoencoder for lingen: `autoencoder: NAME` in a recipe, once it is installed (`pip install -e .`)."""

from typing import Annotated

from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from lingen.recipe.bounds import IDENTITY, AtLeast
from lingen.recipe.signature import checked


@checked
class CLASS(nn.Module):
    """Squares of pixels become channels; nothing is lost. What an autoencoder owes and may offer:
    `lingen.autoencoder.Autoencoder`."""

    def __init__(self, *, square: Annotated[int, AtLeast(1), IDENTITY, "height and width of a square"] = 2):
        super().__init__()
        self.strides = (1, square, square)
        self.channels = 3 * square**2

    def encode(self, video: Tensor) -> Tensor:
        """Pixels [b 3 t h w] in -1..1 -> latents [b c t h/square w/square]; their spread should be near 1."""
        return 2 * pixel_unshuffle(video.transpose(1, 2), self.strides[1]).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pixels."""
        return pixel_shuffle(latents.transpose(1, 2) / 2, self.strides[1]).transpose(1, 2)
