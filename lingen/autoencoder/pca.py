"""Principal components of blocks of pixels: an autoencoder that is linear, found in closed form, and never trained."""

import math
from collections.abc import Iterable
from importlib.resources import files
from typing import Annotated

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lingen.autoencoder.stored import StoredAutoencoder, check_sides
from lingen.blocks.layers import cut_patches, join_patches
from lingen.media import as_floats
from lingen.recipe.bounds import CONTENT, IDENTITY, AtLeast
from lingen.recipe.sections import Triple
from lingen.recipe.signature import checked


@checked
class PCA(StoredAutoencoder):
    """The first principal components of blocks of t x h x w pixels, each divided by the square root of its spread: a
    latent counts the more, the more of the picture it holds, and still details are not drowned in noise [ours].

    Every block is taken alone, so pieces of a clip give what the whole clip gives. Frames that are missing in the last
    block are its last one again."""

    name = "pca"
    without_path = "set autoencoder.path to a file of what lingen.autoencoder.pca.PCA.fit found."
    may_be_fresh = False

    def __init__(
        self,
        *,
        path: Annotated[str | None, IDENTITY, CONTENT, "weights: a file of what `PCA.fit` found"] = None,
        strides: Annotated[Triple, AtLeast(1), IDENTITY, "pixels of a block in t, h, w"] = (4, 8, 8),
        channels: Annotated[int, AtLeast(1), IDENTITY, "components that are kept"] = 80,
    ):
        super().__init__()
        self.path, self.strides, self.channels = path, strides, channels
        numbers = 3 * math.prod(strides)
        self.register_buffer("basis", torch.zeros(channels, numbers))
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("std", torch.ones(channels))

    basis: Tensor

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b c _t _h _w"]:
        """Pixels in -1..1 -> latents, ceil(t / strides[0]) frames of them."""
        self._load_once()
        missing = -check_sides(video, self.strides, self.name).shape[2] % self.strides[0]
        video = torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2) if missing else video
        weight = (self.basis / self.std[:, None]).to(video.dtype)
        with torch.autocast(video.device.type, enabled=False):
            latents = (cut_patches(video, self.strides) - self.mean.to(video.dtype)) @ weight.T
        return latents.movedim(-1, 1).contiguous()

    def decode(self, latents: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b 3 _t _h _w"]:
        """Latents -> pixels, about -1..1; strides[0] frames for each latent frame."""
        self._load_once()
        weight = (self.basis * self.std[:, None]).to(latents.dtype)
        with torch.autocast(latents.device.type, enabled=False):
            blocks = latents.movedim(1, -1) @ weight + self.mean.to(latents.dtype)
        return join_patches(blocks, self.strides)

    @classmethod
    def fit(cls, clips: Iterable[UInt8[Tensor, "b 3 t h w"]], strides: Triple, channels: int) -> "PCA":
        """The components of clips whose sides the strides divide, held in memory one batch at a time."""
        found, count = cls(strides=strides, channels=channels), 0
        total = found.mean.double()
        squares = torch.outer(total, total)
        for clip in clips:
            blocks = cut_patches(as_floats(clip), strides).flatten(0, 3)
            total, squares, count = total + blocks.sum(0), squares + blocks.T @ blocks, count + len(blocks)
        found.mean.copy_(total / count)
        values, vectors = torch.linalg.eigh(squares / count - torch.outer(total, total) / count**2)
        found.basis.copy_(vectors.flip(1)[:, :channels].T)
        spread = values.flip(0)[:channels].clamp(min=1e-12).sqrt()
        found.std.copy_((spread * spread.mean()).sqrt())  # a mean square of 1 over all latents
        found.loaded = True
        return found


@checked
class PCATheatre(PCA):
    """`pca` with weights that come with lingen: 80 components of 4x8x8 pixels of the emoji theatre."""

    name = "pca_theatre"

    def __init__(self) -> None:
        super().__init__(path=str(files("lingen.autoencoder") / "weights" / "pca_theatre.safetensors"))
