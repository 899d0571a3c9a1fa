"""Movie Gen's temporal autoencoder (TAE), which streams clips of any length in constant memory, exactly."""

from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from lingen.autoencoder.network import NetworkSizes, decoder, encoder
from lingen.autoencoder.stored import StoredAutoencoder, check_sides
from lingen.autoencoder.temporal import Stream, regroup
from lingen.frozen import Missing
from lingen.recipe.bounds import CONTENT, FREE, IDENTITY, AtLeast
from lingen.recipe.sections import Triple
from lingen.recipe.signature import checked

Chunk = Annotated[int, AtLeast(1), FREE, "latent frames that are encoded or decoded at once; memory grows with it"]


@checked
class TAE(StoredAutoencoder):
    """Temporal autoencoder (Movie Gen, arXiv 2410.13720, section 3.1.1): a VAE whose latents are smaller in t, h and w.

    Unlike Movie Gen's it needs no tiles along time: every layer sees a finite number of frames to each side and has a
    streaming form, so that pieces give what the whole clip would give (ours; see `temporal`).

    `encode` returns (posterior mean - `mean`) / `std`, with the statistics of each channel that training measured.

    Raises SettingError for settings that make no sense together."""

    name = "tae"
    without_path = (
        "train one with `lingen fit --recipe tae_8x8x8` and set autoencoder.path to its run folder, or use "
        "'autoencoder: tae_small'."
    )

    def __init__(
        self,
        *,
        path: Annotated[str | None, IDENTITY, CONTENT, "weights: a file or run folder that `lingen fit` wrote"] = None,
        strides: Annotated[Triple, AtLeast(1), IDENTITY, "pixels per latent in t, h, w: powers of two"] = (8, 8, 8),
        channels: Annotated[int, AtLeast(1), IDENTITY, "channels of a latent"] = 16,
        width: Annotated[int, AtLeast(1), IDENTITY, "channels of the first level"] = 128,
        multipliers: Annotated[
            tuple[int, ...] | None,
            AtLeast(1),
            IDENTITY,
            "width of each level in units of the first; null: 1, 2, 4, 4, ... as strides need",
        ] = None,
        blocks: Annotated[int, AtLeast(1), IDENTITY, "residual blocks in each level; the decoder has one more"] = 2,
        attention: Annotated[bool, IDENTITY, "attention in a frame and along time where frames are smallest"] = True,
        reach: Annotated[int, AtLeast(0), IDENTITY, "latent frames that attention along time looks to each side"] = 2,
        chunk: Chunk = 2,
        checkpointing: Annotated[bool, FREE, "in training recompute residual blocks instead of keeping them"] = False,
    ):
        super().__init__()
        self.sizes = NetworkSizes(strides, channels, width, multipliers, blocks, attention, reach)
        self.path, self.chunk = path, chunk
        self.strides, self.channels = self.sizes.strides, channels
        self.encoder = encoder(self.sizes, checkpointing)
        self.decoder = decoder(self.sizes, checkpointing)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        for parameter in self.parameters():  # channels last, as the grid tensors are
            if parameter.ndim > 3:
                layout = torch.channels_last if parameter.ndim == 4 else torch.channels_last_3d
                parameter.data = parameter.data.contiguous(memory_format=layout)

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b c _t _h _w"]:
        """Pixels in -1..1 -> latents. With gradients on the clip is taken whole, else piece by piece."""
        if torch.is_grad_enabled():
            self._load_once()
            return self._scaled(self.posterior(video)[0])
        return torch.cat(list(self.encode_stream([video])), 2)

    def decode(self, latents: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b 3 _t _h _w"]:
        """Latents -> pixels, about -1..1, not clamped; strides[0] frames for each latent frame."""
        if torch.is_grad_enabled():
            self._load_once()
            return self.reconstruct(self._raw(latents))
        return torch.cat(list(self.decode_stream(latents)), 2)

    def encode_stream(self, pieces: Iterable[Float[Tensor, "b 3 _t h w"]]) -> Iterator[Float[Tensor, "b c _t _h _w"]]:
        """Consecutive pieces of a clip, of any lengths -> its latents, in pieces. Runs without gradients. Raises
        ValueError for a clip without frames, or of a size that the strides do not divide."""
        self._load_once()
        stream = Stream()
        most = self.chunk * self.strides[0]
        for piece, stream.last in regroup(pieces, most):
            for moments in self.encoder.stream(check_sides(piece, self.strides, self.name), stream, most):
                yield self._scaled(moments.chunk(2, 1)[0])

    def decode_stream(self, latents: Float[Tensor, "b c t h w"]) -> Iterator[Float[Tensor, "b 3 _t _h _w"]]:
        """Latents of a whole clip -> its pixels, in pieces. Runs without gradients. Raises ValueError for no frames."""
        self._load_once()
        stream = Stream()
        for piece, stream.last in regroup([latents], self.chunk):
            yield from self.decoder.stream(self._raw(piece), stream, self.chunk)

    def _scaled(self, raw: Tensor) -> Tensor:
        return ((raw - self.mean.view(-1, 1, 1, 1)) / self.std.view(-1, 1, 1, 1)).contiguous()

    def _raw(self, latents: Tensor) -> Tensor:
        return latents * self.std.view(-1, 1, 1, 1) + self.mean.view(-1, 1, 1, 1)

    def posterior(
        self, video: Float[Tensor, "b 3 t h w"]
    ) -> tuple[Float[Tensor, "b c _t _h _w"], Float[Tensor, "b c _t _h _w"]]:
        """Mean and log variance (-30..20) of the raw latents, before `mean` and `std`; float32 at least."""
        moments = self.encoder(check_sides(video, self.strides, self.name))
        mean, logvar = moments.to(torch.promote_types(moments.dtype, torch.float32)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def reconstruct(self, raw: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b 3 _t _h _w"]:
        """Raw latents -> pixels."""
        return self.decoder(raw)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the layer that gives pixels: training compares the gradients of its losses there."""
        return self.decoder.leave.weight


@checked
class TAESmall(TAE):
    """A temporal autoencoder whose weights come with lingen: 8x8x8 pixels a latent, 16 channels, a quarter as wide."""

    name = "tae_small"

    def __init__(self, *, chunk: Chunk = 4):
        packaged = files("lingen.autoencoder") / "weights" / "tae_small.safetensors"
        super().__init__(path=str(packaged), width=32, blocks=2, chunk=chunk)

    def missing(self) -> list[Missing]:
        """Its weights, where the installation lacks them."""
        if not Path(str(self.path)).is_file():
            return [Missing(self.name, "-", "this installation of lingen has no weights for it: install lingen anew.")]
        return super().missing()
