"""Does it keep lingen's contract?"""

from NAME import NAME

from lingen.testing import check_scan


def test_it_is_a_scan_order():
    check_scan(NAME)


def test_the_last_frame_comes_first():
    assert NAME(2, 1, 2).tolist() == [2, 3, 0, 1]
