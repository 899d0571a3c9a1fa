"""Text encoders, and how captions are prepared for them."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@runtime_checkable
class TextEncoder(Protocol):
    """What the registry TEXT_ENCODERS holds: an `nn.Module` whose constructor takes only settings and reads no file.

    What else one may have: `trainable = True`, where it is trained with the denoiser, any other being frozen and run
    without gradients; `missing() -> list[lingen.frozen.Missing]`, where its weights lie on disk, from which it reads
    them when they are first needed; `release()`, which gives them up until then. A trained one whose `encode` is
    `read_ids(texts)`, tensors of the CPU, and `embed(*tensors)` of them on its device lets a step be a CUDA graph."""

    dim: int
    """Width of a token."""

    def encode(self, texts: list[str]) -> tuple[Float[Tensor, "b n w"], Bool[Tensor, "b n"]]:
        """Tokens and which of them are real. An empty text has none; n is at least 1."""
        ...


def with_frame_rate(caption: str, fps: float) -> str:
    """The caption behind its frame rate, 'FPS-16. A red ball.', as in Movie Gen; fps 0 (an image): as it is. An empty
    caption leaves the frame rate alone, so that guidance does not amplify it."""
    return f"FPS-{fps:g}. {caption}".rstrip() if fps else caption


def replace_rows(
    text: tuple[Tensor, Tensor], rows: list[int], other: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Tokens [b n w] and mask [b n] with some rows replaced by the one row of `other` (None where there are none)."""
    if other is None:
        return text
    tokens, mask = text
    more = max(0, other[0].shape[1] - tokens.shape[1])
    tokens, mask = torch.nn.functional.pad(tokens, (0, 0, 0, more)), torch.nn.functional.pad(mask, (0, more))
    tokens[rows], mask[rows] = 0, False
    tokens[rows, : other[0].shape[1]], mask[rows, : other[1].shape[1]] = other[0].to(tokens), other[1]
    return tokens, mask
