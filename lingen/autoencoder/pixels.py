"""No autoencoder: latents are pixels. For tiny recipes that run without any download."""

from typing import Annotated

from jaxtyping import Float
from torch import Tensor, nn

from lingen.recipe.bounds import IDENTITY, Above
from lingen.recipe.signature import checked


@checked
class Pixels(nn.Module):
    """Latents are the pixels themselves, times `scale`; nothing is compressed or lost."""

    strides = (1, 1, 1)
    channels = 3

    def __init__(
        self, *, scale: Annotated[float, Above(0), IDENTITY, "factor that brings the spread of latents near 1"] = 1.0
    ):
        super().__init__()
        self.scale = scale

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 3 t h w"]:
        """Pixels in -1..1 -> latents in -scale..scale."""
        return video * self.scale

    def decode(self, latents: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 3 t h w"]:
        """Inverse of `encode`."""
        return latents / self.scale
