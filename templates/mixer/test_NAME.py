"""Does it keep lingen's contract?"""

import pytest
from NAME import CLASS

from lingen.testing import check_mixer


@pytest.mark.parametrize("heads", [1, 4])
def test_it_is_a_mixer(heads: int):
    check_mixer(CLASS, heads=heads)
