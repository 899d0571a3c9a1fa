"""The measure by which every fast path is judged lets nothing pass that it should not."""

import pytest
import torch

from tests.helpers.closeness import assert_close, relative_error

WANT = torch.tensor([3.0, 4.0, 0.0, 0.0])


def test_the_error_is_an_rms_over_an_rms_and_has_a_floor():
    assert relative_error(WANT, WANT + 0.25) == pytest.approx(0.25 / 2.5)
    assert relative_error(torch.zeros(4), torch.full((4,), 1e-6)) == pytest.approx(100)
    assert relative_error(torch.zeros(4), torch.full((4,), 1e-6), floor=1e-3) == pytest.approx(1e-3)


def test_what_is_near_enough_passes():
    near = WANT * (1 + 1e-6)
    assert_close("y", WANT, near, 1e-5)
    assert_close("y", WANT.double(), near.bfloat16(), 5e-3)  # an exact twin in float64
    assert_close("all", {"x": WANT, "rest": [WANT, WANT]}, {"rest": (near, near), "x": near}, 1e-5)
    assert_close("gradient of", {"a": WANT, "b": WANT}, {"a": WANT * 1.01, "b": near}, {"a": 0.02, "b": 1e-5})


@pytest.mark.parametrize(
    "want, got, says",
    [
        (WANT, WANT * 1.01, "y: relative error 0.01, limit 0.001"),
        (WANT, WANT[None], r"y: shape \[1, 4\] instead of \[4\]"),
        (WANT, WANT.double(), "y: torch.float64 instead of torch.float32"),
        (WANT, WANT.bfloat16(), "y: torch.bfloat16 instead of torch.float32"),
        (WANT, WANT.log(), "y: 2 of 4 numbers in what came are not finite"),
        (WANT / 0, WANT / 0, "y: 4 of 4 numbers in what is wanted are not finite"),
        (WANT[:0], WANT[:0], "y: empty: nothing is compared"),
        ({}, {}, "y: values called nothing instead of values called nothing"),
        ({"a": WANT, "b": WANT}, {"a": WANT}, "y: values called a instead of values called a, b"),
        ([WANT, WANT], [WANT], "y: values called 0 instead of values called 0, 1"),
        ([WANT], WANT, "y: Tensor instead of values called 0"),
        (WANT, None, "y: NoneType instead of Tensor"),
        ({"a": WANT, "b": WANT}, {"a": WANT * 2, "b": -WANT}, "y a: relative error 1, .*\ny b: relative error 2, "),
    ],
)
def test_what_differs_is_named(want, got, says):
    with pytest.raises(AssertionError, match=f"not close:\n{says}"):
        assert_close("y", want, got, 1e-3)


def test_each_name_needs_its_limit():
    with pytest.raises(KeyError, match="b"):
        assert_close("y", {"a": WANT, "b": WANT}, {"a": WANT, "b": WANT}, {"a": 1e-3})
