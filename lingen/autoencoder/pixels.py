"""No autoencoder: latents are pixels. For tiny recipes that run without any download."""

from typing import Annotated

from jaxtyping import Float
from torch import Tensor, nn

from lingen.recipe.registry import SettingError


class Pixels(nn.Module):
    """Latents are the pixels themselves, times `scale`; nothing is compressed or lost.

    Raises SettingError for a scale that is not above 0.
    """

    strides = (1, 1, 1)
    channels = 3

    def __init__(self, *, scale: Annotated[float, "factor that brings the spread of latents near 1"] = 1.0):
        super().__init__()
        if not scale > 0:
            raise SettingError("scale", f"scale={scale} must be above 0.")
        self.scale = scale

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 3 t h w"]:
        """Pixels in -1..1 -> latents in -scale..scale."""
        return video * self.scale

    def decode(self, latents: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b 3 t h w"]:
        """Inverse of `encode`."""
        return latents / self.scale
