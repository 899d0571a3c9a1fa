"""Samples that are drawn when they are asked for, in the place of an index of shards."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from lingen.data.acting import draw_board
from lingen.data.buckets import Shape
from lingen.data.index import RECORD, Index
from lingen.data.locations import Location
from lingen.data.theatre import Split, Theatre


class DrawnClip(NamedTuple):
    """A clip and what its captions say."""

    pixels: UInt8[Tensor, "3 t h w"]
    captions: list[str]


@dataclass(frozen=True)
class DrawnIndex(Index):
    """The clips of a split of the emoji theatre; see `drawn_index`."""

    theatre: Theatre = Theatre()
    split: Split = "train"

    def key(self, number: int) -> str:
        return f"{number:08d}"

    def draw(self, number: int, shape: Shape, fps: float) -> DrawnClip:
        """The clip of a number: the same in every process, whatever was drawn before."""
        theatre = self.theatre
        clip, captions = draw_board(number, shape, fps, split=self.split, seed=theatre.seed, sprites=theatre.sprites)
        return DrawnClip(torch.from_numpy(np.ascontiguousarray(clip.transpose(3, 0, 1, 2))), captions)


def drawn_index(theatre: Theatre, split: Split) -> DrawnIndex:
    """As many clips as the settings say, which take no memory: all have the same record."""
    records = np.broadcast_to(np.zeros(1, RECORD), theatre.clips if split == "train" else theatre.held_out)
    return DrawnIndex(
        [Location("theatre", split)], records, np.zeros(0, np.uint8), ["theatre"], theatre=theatre, split=split
    )
