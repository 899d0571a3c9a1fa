"""Video autoencoders: from pixels to latents and back."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeGuard, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Autoencoder(Protocol):
    """What the registry AUTOENCODERS holds: an `nn.Module` whose constructor takes only settings and reads no file.

    Latents should have a standard deviation near 1, as the noise has. t frames give ceil(t / strides[0]) latent frames
    (an image is t = 1), and `decode` may give up to strides[0] - 1 frames more than went in: the caller drops them.

    What else one may have: `missing() -> list[lingen.frozen.Missing]`, where its weights lie on disk, from which it
    reads them when they are first needed; `first_frame_alone = True`, where the first latent frame holds a single frame
    (t frames give 1 + (t - 1) / strides[0]), and `frame_unit` where the others do not come by strides[0]; what
    `StreamingAutoencoder` and `TrainableAutoencoder` name."""

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


class StreamingAutoencoder(Autoencoder, Protocol):
    """One that works piece by piece. Where not all of its settings let it, a property `streams` says whether it can."""

    def encode_stream(self, pieces: Iterable[Float[Tensor, "b 3 _t h w"]]) -> Iterator[Float[Tensor, "b c _t _h _w"]]:
        """What `encode` gives for the pieces together, in order."""
        ...

    def decode_stream(self, latents: Float[Tensor, "b c t h w"]) -> Iterator[Float[Tensor, "b 3 _t _h _w"]]:
        """What `decode` gives, in order."""
        ...


class TrainableAutoencoder(Autoencoder, Protocol):
    """One that `lingen fit` can train; but for `load`, nothing here reads a file."""

    path: str | None
    """Weights to start from; None: fresh ones."""
    mean: Tensor
    std: Tensor
    """Of the posterior's means, [c]; buffers."""

    @property
    def last_layer(self) -> Tensor:
        """The weights of the decoder's last layer."""
        ...

    def posterior(
        self, video: Float[Tensor, "b 3 t h w"]
    ) -> tuple[Float[Tensor, "b c _t _h _w"], Float[Tensor, "b c _t _h _w"]]:
        """Mean and log variance of the latents, as the network has them."""
        ...

    def reconstruct(self, raw: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b 3 _t _h _w"]:
        """Latents as the posterior has them -> pixels."""
        ...

    def load(self) -> None:
        """Reads the weights at `path`."""
        ...


# Asked by their methods: a check of the whole protocol does not see a module's buffers (Python 3.12).


def streams(autoencoder: Any) -> TypeGuard[StreamingAutoencoder]:
    """Whether the autoencoder can encode and decode a clip in pieces."""
    both = all(hasattr(autoencoder, name) for name in ("encode_stream", "decode_stream"))
    return both and getattr(autoencoder, "streams", True)
