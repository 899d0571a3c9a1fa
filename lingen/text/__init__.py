"""Text encoders, and how captions are prepared for them: rows of ids, one for each text, cut, counted, and stacked."""

import logging
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

log = logging.getLogger("lingen")


@runtime_checkable
class TextEncoder(Protocol):
    """What the registry TEXT_ENCODERS holds: an `nn.Module` whose constructor takes only settings and reads no file.

    What else one may have: `trainable = True`, where it is trained with the denoiser, any other being frozen and run
    without gradients; `missing() -> list[lingen.frozen.Missing]`, where its weights lie on disk, from which it reads
    them when they are first needed; `release()`, which gives them up until then. A trained one whose `encode` is
    `read_ids(texts)`, tensors of the CPU, and `embed(*tensors)` of them on its device lets a step be a CUDA graph. A
    trained one with `parts = True` numbers the parts of a text, which the clip shows one after the other: its mask is
    of int64, 0 for padding, else the part from 1 on, none left out."""

    dim: int
    """Width of a token."""

    def encode(self, texts: list[str]) -> tuple[Float[Tensor, "b n w"], Shaped[Tensor, "b n"]]:
        """Tokens and which of them are real. An empty text has none; n is at least 1."""
        ...


def with_frame_rate(caption: str, fps: float) -> str:
    """The caption behind its frame rate, 'FPS-16. A red ball.', as in Movie Gen; fps 0 (an image): as it is. An empty
    caption leaves the frame rate alone, so that guidance does not amplify it."""
    return f"FPS-{fps:g}. {caption}".rstrip() if fps else caption


class Cut:
    """Cuts sequences at `limit`, counts those that were longer, and says so the first time."""

    def __init__(self, unit: str, limit: int):
        self.unit, self.limit, self.count = unit, limit, 0

    def __call__(self, rows: list[list[int]]) -> list[list[int]]:
        long = [len(row) for row in rows if len(row) > self.limit]
        if long and not self.count:
            log.warning(
                "A text of %d %s was cut to %d (text.max_tokens); others may be, too, and are not named.",
                long[0], self.unit, self.limit,
            )  # fmt: skip
        self.count += len(long)
        return [row[: self.limit] for row in rows]


def padded(
    rows: list[list[int]], device: torch.device | str = "cpu", few_up_to: int | None = None
) -> tuple[Tensor, Tensor]:
    """ids [b n] with zeros behind the real ones, mask [b n]; n is at least 1.

    Args:
        few_up_to: n is a multiple of 16 or this number: so there are few shapes.
    """
    n = max([1, *map(len, rows)])
    n = n if few_up_to is None else min(-(-n // 16) * 16, few_up_to)
    ids = torch.tensor([row + [0] * (n - len(row)) for row in rows], dtype=torch.long).view(len(rows), n)
    mask = torch.tensor([[i < len(row) for i in range(n)] for row in rows], dtype=torch.bool).view(len(rows), n)
    return ids.to(device), mask.to(device)


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
