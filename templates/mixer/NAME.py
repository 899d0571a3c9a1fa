"""A token mixer for lingen: `model.mixer: NAME` in a recipe, once this package is installed (`pip install -e .`)."""

from typing import Annotated

from torch import Tensor, nn

from lingen.recipe.bounds import IDENTITY, AtLeast
from lingen.recipe.signature import checked


@checked
class CLASS(nn.Module):
    """Every token plus a weighted mean of its frame. What a mixer owes and may offer: `lingen.blocks.Mixer`."""

    def __init__(
        self, dim: int, layer: int, *, heads: Annotated[int, AtLeast(1), IDENTITY, "weighted means side by side"] = 4
    ):
        super().__init__()
        self.score = nn.Linear(dim, heads, bias=False)
        self.out = nn.Linear(heads * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [b t h w d], an image is t = 1 -> the same shape."""
        frames = x.flatten(2, 3)  # [b t (h w) d]
        share = self.score(frames).softmax(2)
        means = (share.transpose(2, 3) @ frames).flatten(2)  # [b t (heads d)]
        return x + self.out(means)[:, :, None, None]
