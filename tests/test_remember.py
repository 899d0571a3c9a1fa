"""Whether a layer keeps one bit over a clip, at a length that a CPU trains in seconds; the study is
`tests.yardsticks.remember`."""

import pytest
import torch

from tests.yardsticks.remember import clips, study


@pytest.mark.parametrize("task", ["remember", "forget"])
def test_the_bit_that_is_asked_for_is_the_last_one(task):
    x, told = clips(task, 64, (2, 4, 8), torch.Generator().manual_seed(0))
    written = x[..., 0].flatten(1)
    counts = (written != 0).sum(1)
    assert counts.min() == 1 and counts.max() == (1 if task == "remember" else 4)
    for row, bit in zip(written, told, strict=True):
        places = row.nonzero().flatten()
        assert places.max() < (8 if task == "remember" else 56)
        assert row[places[-1]] == 2 * bit - 1
    assert 0.2 < told.mean() < 0.8 and (x[..., 1].abs() > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["remember", "forget"])
def test_long_heads_keep_a_bit_behind_the_review_and_a_longer_clip_does_not_blow_up_the_state(task):
    """At 576 tokens, as t2v_68s sets its heads. With `mamba_ssm` for them both fail."""
    found = study("long 0.25, per head", task, (4, 12, 12), 0, 1e-2, "cpu", review=True)
    assert found["loss"] < 0.5
    assert found["state at 4x"] < 3 and found["head at 4x"] < 3


@pytest.mark.slow
def test_at_4608_tokens_the_heads_of_t2v_68s_keep_the_bit_and_a_clip_four_times_as_long_loses_none():
    """With `mamba_ssm` for them the loss is that of chance, 1."""
    found = study("long 0.25", "remember", (8, 24, 24), 0, 1e-2, "cpu", review=True)
    assert found["loss"] < 0.5 and found["loss at 4x"] < 0.5
    assert found["state at 4x"] < 3 and found["head at 4x"] < 3
