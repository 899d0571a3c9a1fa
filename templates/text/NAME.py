"""A text encoder for lingen: `text: NAME` in a recipe, once this package is installed (`pip install -e .`)."""

from typing import Annotated

import torch
from torch import Tensor, nn

from lingen.blocks.layers import undecayed
from lingen.recipe.bounds import IDENTITY, AtLeast
from lingen.recipe.signature import checked


@checked
class CLASS(nn.Module):
    """Letters, looked up in a table that is trained along. The contract: `lingen.text.TextEncoder`."""

    trainable = True

    def __init__(
        self,
        *,
        dim: Annotated[int, AtLeast(1), IDENTITY, "width of a token"] = 64,
        max_tokens: Annotated[int, AtLeast(1), IDENTITY, "letters that are read"] = 64,
    ):
        super().__init__()
        self.dim, self.max_tokens = dim, max_tokens
        self.table = nn.Embedding(128, dim)
        undecayed(self.table.weight)

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens [b n w], and which are real, bool [b n]; an empty text has none, and n is at least 1."""
        codes = [[ord(letter) % 128 for letter in text[: self.max_tokens]] for text in texts]
        longest = max(1, *map(len, codes)) if codes else 1
        device = self.table.weight.device
        ids = torch.tensor([one + [0] * (longest - len(one)) for one in codes], device=device)
        mask = torch.tensor([[place < len(one) for place in range(longest)] for one in codes], device=device)
        return self.table(ids), mask
