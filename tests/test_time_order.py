"""What docs/model.md says of the order of time, at a small size: reach, stripes, and that the comparisons run."""

from __future__ import annotations

import torch

from tests.yardsticks.time_order import TEMPORAL, heard, review, samples, speed, stripes, trained

GRID = (16, 4, 4)


def test_who_hears_frame_0_at_the_clips_end():
    for name in TEMPORAL:
        frame_0 = {way: float(heard(way, name, GRID, 32, (0, 1), 0.0)[:, 0].sum()) for way in ("paper", "masked")}
        assert 0.04 < frame_0["paper"] < 0.2 and frame_0["masked"] < 1e-3
        folded = heard("folded", name, GRID, 32, (0, 1), 0.0)
        middle = len(folded) // 2
        assert folded[:, 0].sum() < 1e-3 and folded[middle + 1, -1] > 0.02  # the neighbour's last frame instead


def test_the_review_is_heard_as_far_as_heads_remember(tmp_path):
    far = {row["heads"]: row["from 256"] for row in review((4, 16, 16), 32, (0, 1), tmp_path / "review.png")}
    assert far["long_heads 0.25, norm per head"] > 100 * far["mamba_ssm"]
    assert (tmp_path / "review.png").stat().st_size > 5_000


def test_only_folded_columns_alternate():
    found = {(row["way"], row["conv"]): row["stripes"] for row in stripes((16, 4, 4), 32, (0,))}
    for conv in ("shared", "per_direction"):
        plain = max(found["paper", conv], found["masked", conv])  # what the ends of the whole sequence do
        assert plain < 0.01 and min(found["folded", conv], found["folded, masked", conv]) > 0.1


def test_the_task_hides_one_bit_in_each_columns_first_quarter():
    x, signal, bits = samples(64, (12, 2, 3), torch.Generator().manual_seed(0))
    where = x[..., 2] > 0
    assert (where.sum(1) == 1).all() and not where[:, 3:].any()
    assert torch.equal(x[..., 1].sum(1) > 0, bits > 0.5) and 0.9 < signal.std() < 1.1


def test_a_training_tells_all_measures():
    row = trained("masked", 0, (8, 2, 2), 16, 2, 2, 1e-2)
    assert 0 < row["stripes"] < 1 and 0.3 < row["right"] < 0.7 and row["last frame"] > 0.1


def test_pairs_of_forwards_are_ratios():
    rows = list(speed("quickstart_cpu", (2, 2, 2), 2, "cpu", ["masked"]))
    assert [row["way"] for row in rows] == ["masked"]
    assert all(len(row["ratios"]) == 2 and 0 < row["ratio"] < 50 for row in rows)
