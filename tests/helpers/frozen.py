"""A frozen autoencoder and a frozen text encoder for the tests, as small as they can be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


class Pooling(nn.Module):
    """Latents are means of 2 x 4 x 4 pixels, times `gain`; a bright clip gives NaN where `nan_above` says so."""

    strides = (2, 4, 4)
    channels = 3

    def __init__(self, *, gain: float = 1.0, nan_above: float = 2.0):
        super().__init__()
        self.gain, self.nan_above = gain, nan_above

    def encode(self, video: Tensor) -> Tensor:
        if video.shape[2] % 2:
            video = torch.cat([video, video[:, :, -1:]], 2)
        latents = nn.functional.avg_pool3d(video, self.strides) * self.gain
        return latents.masked_fill((video.mean((1, 2, 3, 4)) > self.nan_above)[:, None, None, None, None], torch.nan)

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents / self.gain, scale_factor=self.strides)


class Letters(nn.Module):
    """A row of a table of weights for each letter."""

    trainable = False

    def __init__(self, *, path: str | None = None, dim: int = 6):
        super().__init__()
        self.path, self.dim = path, dim

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        table = torch.from_numpy(np.fromfile(Path(str(self.path)), np.float32).reshape(-1, self.dim))
        n = max([1, *map(len, texts)])
        ids = torch.tensor([[min(255, ord(letter)) for letter in text.ljust(n)] for text in texts])
        return table[ids], torch.arange(n) < torch.tensor([len(text) for text in texts])[:, None]
