"""Video autoencoders: from pixels to latents and back."""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor


class Autoencoder(Protocol):
    """What the registry AUTOENCODERS holds: an `nn.Module` whose constructor takes only settings and reads no file.

    Latents should have a standard deviation near 1, as the noise has. t frames give ceil(t / strides[0]) latent frames
    (an image is t = 1), and `decode` may give up to strides[0] - 1 frames more than were encoded: the caller drops
    them.
    """

    strides: tuple[int, int, int]
    """Pixels per latent in t, h, w; height and width must be multiples."""
    channels: int
    """c of the latents."""

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b c _t _h _w"]:
        """Pixels in -1..1 -> latents."""
        ...

    def decode(self, latents: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b 3 _t _h _w"]:
        """Latents -> pixels, about -1..1, not clamped."""
        ...
