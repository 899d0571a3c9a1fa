"""Does it keep lingen's contract?"""

from NAME import CLASS

from lingen.testing import check_text_encoder


def test_it_is_a_text_encoder():
    check_text_encoder(CLASS, dim=8)


def test_an_empty_text_has_no_tokens():
    tokens, mask = CLASS(dim=8).encode(["red", ""])
    assert tokens.shape == (2, 3, 8) and mask.tolist() == [[True] * 3, [False] * 3]
