"""A scan order for lingen: `model.mixer.scan: NAME` in a recipe, once it is installed (`pip install -e .`)."""

import torch
from torch import Tensor


def NAME(t: int, h: int, w: int) -> Tensor:
    """Frames from the last to the first, rows and columns as they are. Gives, for each place in the sequence, the flat
    index (frame * h + row) * w + column of the token that stands there: int64 [t*h*w]."""
    return torch.arange(t * h * w).view(t, h, w).flip(0).flatten()
