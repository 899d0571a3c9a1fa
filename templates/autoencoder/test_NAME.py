"""Does it keep lingen's contract?"""

import torch
from NAME import CLASS

from lingen.testing import check_autoencoder


def test_it_is_an_autoencoder():
    check_autoencoder(CLASS, square=4)


def test_nothing_is_lost():
    clip = torch.rand(1, 3, 2, 8, 8)
    torch.testing.assert_close(CLASS().decode(CLASS().encode(clip)), clip)
