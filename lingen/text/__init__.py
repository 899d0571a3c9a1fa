"""Text encoders, and what is said to them."""

from typing import Protocol

from jaxtyping import Bool, Float
from torch import Tensor


class TextEncoder(Protocol):
    """What the registry TEXT_ENCODERS holds: an `nn.Module` whose constructor takes only settings and reads no file.

    A part that is `trainable` is trained with the denoiser; any other is frozen and runs without gradients.
    """

    dim: int
    """Width of a token."""
    trainable: bool

    def encode(self, texts: list[str]) -> tuple[Float[Tensor, "b n w"], Bool[Tensor, "b n"]]:
        """Tokens and which of them are real. An empty text has none; n is at least 1."""
        ...


def with_frame_rate(caption: str, fps: float) -> str:
    """The caption behind its frame rate, 'FPS-16. A red ball.', as in Movie Gen; fps 0 (an image): as it is.

    An empty caption leaves the frame rate alone, so that guidance does not amplify it.
    """
    return f"FPS-{fps:g}. {caption}".rstrip() if fps else caption
