"""Video autoencoders: from pixels to latents and back."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Autoencoder(Protocol):
    """What the registry AUTOENCODERS holds: an `nn.Module` whose constructor takes only settings and reads no file.

    Latents should have a standard deviation near 1, as the noise has. t frames give ceil(t / strides[0]) latent frames
    (an image is t = 1), and `decode` may give up to strides[0] - 1 frames more than were encoded: the caller drops
    them.

    One whose weights lie on disk has `missing() -> list[lingen.frozen.Missing]`, and reads them when they are first
    needed. One that can work piece by piece has `encode_stream(pieces)` and `decode_stream(latents)`, which yield what
    `encode` and `decode` give, in order; where not all settings let it, a property `streams` says whether it can. One
    whose first latent frame holds a single frame (t frames give 1 + (t - 1) / strides[0]) says
    `first_frame_alone = True`, and `frame_unit` where the others do not come by strides[0]. One that `lingen fit` can
    train has `posterior(video) -> (mean, log variance)`, `reconstruct(latents) -> video` and `last_layer`, none of
    which reads a file, and buffers `mean` and `std` [c].
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


def streams(autoencoder: Any) -> bool:
    """Can the autoencoder work piece by piece?"""
    has = hasattr(autoencoder, "encode_stream") and hasattr(autoencoder, "decode_stream")
    return has and getattr(autoencoder, "streams", True)
