"""A study without a browser: what its page is made of, odd votes, and the numbers of its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingen.cli import main
from lingen.evaluation.clips import find_clips
from lingen.evaluation.study import QUESTIONS, make_study
from lingen.media import save_video
from lingen.recipe.errors import RecipeError
from tests.helpers.study import PROMPTS, read_json, rightly, write_clips, write_votes

pytest.importorskip("statsmodels", reason="statsmodels is not installed: pip install '.[eval]'")

from scipy.optimize import minimize
from statsmodels.stats.inter_rater import fleiss_kappa
from statsmodels.stats.proportion import proportion_confint

from lingen.evaluation.study_report import _shares, agreement, davidson, preference_of, report_votes, spread
from tests.soak.study import TASTES, ballot_of, coverage


@pytest.fixture
def sides(tmp_path: Path) -> list[Path]:
    return [write_clips(tmp_path / name, PROMPTS, seed) for seed, name in enumerate("AB")]


@pytest.fixture
def key(sides: list[Path], tmp_path: Path) -> dict[str, Any]:
    return make_study(sides, PROMPTS, tmp_path / "study.html")[0]


def test_the_same_study_is_made_again_and_no_other_takes_its_place(sides: list[Path], tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    words = ["study", "make", *map(str, sides), "--prompts", str(prompts), "--out", str(tmp_path / "x.html")]
    assert main(words) == 0
    before = [(tmp_path / name).read_bytes() for name in ("x.html", "x.key.json")]
    assert main(words) == 0 and before == [(tmp_path / name).read_bytes() for name in ("x.html", "x.key.json")]
    assert main([*words, "--seed", "1"]) == 2
    assert before == [(tmp_path / name).read_bytes() for name in ("x.html", "x.key.json")]


def test_three_sides_embed_each_clip_once(sides: list[Path], tmp_path: Path):
    third = write_clips(tmp_path / "C", PROMPTS, 2, repeat=2)
    with pytest.raises(RecipeError, match="lacks 3 clips"):
        make_study([*sides, third], PROMPTS, tmp_path / "x.html")
    for file in sorted(third.glob("*.mp4"))[1::2]:
        file.unlink()
    key, notes = make_study([*sides, third], PROMPTS[:2], tmp_path / "x.html")
    assert sum("pair" in one for one in key["trials"].values()) == 6
    assert (tmp_path / "x.html").read_text().count('id="clip-') == 6
    assert len(notes) == 3 and all("other prompts" in note for note in notes)


@pytest.mark.parametrize("what, told", [
    ("missing", "lacks 1 clips: 'a red circle moves right' "), ("empty", "no folder with clips"),
    ("broken", "cannot be read"),
    ("doubled", "holds two clips of"), ("copied", "same clip"), ("one folder", "two or more different"),
])  # fmt: skip
def test_wrong_clips_are_told(sides: list[Path], tmp_path: Path, what: str, told: str):
    first, other = sorted(sides[1].glob("*.mp4"))[0], sorted(sides[0].glob("*.mp4"))[0]
    if what == "missing":
        first.unlink()
    elif what == "empty":
        sides[1] = tmp_path / "nothing"
    elif what == "broken":
        first.write_bytes(first.read_bytes()[:-700])
    elif what == "doubled":
        first.with_name("again.mp4").write_bytes(first.read_bytes())
    elif what == "copied":
        first.write_bytes(other.read_bytes())
    else:
        sides[1] = sides[0]
    with pytest.raises(RecipeError, match=told):
        make_study(sides, PROMPTS, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_clips_of_other_programs_have_their_prompts_beside_them(sides: list[Path], tmp_path: Path):
    """As `lingen eval` reads them: the title counts where there is no NAME.txt, the name where there is neither."""
    there = tmp_path / "C"
    for number, prompt in enumerate(PROMPTS):
        with_title = {"title": prompt} if number == 1 else {"title": "Untitled"} if number == 0 else {}
        name = f"{prompt}-7" if number == 2 else f"{number}"
        save_video(np.full((12, 48, 64, 3), 40 * number, np.uint8), there / f"{name}.mp4", 8, **with_title)
    (there / "0.txt").write_text(f"{PROMPTS[0]}\n")
    assert {clip.key for clip in find_clips(there, named=True)} == {(prompt, 0) for prompt in PROMPTS}
    assert len(make_study([sides[0], there], PROMPTS, tmp_path / "x.html")[0]["clips"]) == 2 * len(PROMPTS)
    assert {clip.prompt for clip in find_clips(there)} == {PROMPTS[0], ""}


def test_unequal_clips_and_a_large_page_are_told(sides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lingen.evaluation.study.LARGE_PAGE", 1e3)
    write_clips(sides[1], PROMPTS[:1], 1, frames=16)
    notes = make_study(sides, PROMPTS, tmp_path / "x.html")[1]
    assert len(notes) == 2 and "unequal" in notes[0] and "too large for mail" in notes[1]


def test_a_report_counts_what_was_voted(key: dict[str, Any], tmp_path: Path):
    files = [
        write_votes(tmp_path / f"{name}.csv", key, name, rightly(side))
        for name, side in zip("xyz", (0, 0, 1), strict=True)
    ]
    found = report_votes(files, tmp_path / "study.key.json")
    assert [row["axis"] for row in found["pairs"]] == list(QUESTIONS) and found["notes"][:-1] == []
    for row in found["pairs"]:
        assert row["n"] == 9 and row["win"]["value"] == pytest.approx(2 / 3) and row["tie"]["value"] == 0
        assert (row["ahead"], row["behind"], row["p"], row["p_holm"]) == (2, 1, 1.0, 1.0)
        low, high = row["win"]["interval"]
        assert low < 1 / 3 and high > 0.9, "three raters who disagree tell little"
    assert [row["value"] > 0 for row in found["strengths"]] == [True, False] * 4


def test_odd_votes_are_told(key: dict[str, Any], tmp_path: Path):
    def failing(axis: str, trial: dict[str, Any], clips: dict[str, Any]) -> str:
        return "tie"

    x = write_votes(tmp_path / "x.csv", key, "X ", rightly(0))
    again = write_votes(tmp_path / "again.csv", key, "x", rightly(0))
    changed = write_votes(tmp_path / "changed.csv", key, "x", rightly(1), session="t", time="2026-02-01", trials=6)
    part = write_votes(tmp_path / "part.csv", key, "part", rightly(0), trials=6)
    bad = write_votes(tmp_path / "bad.csv", key, "bad", failing)
    found = report_votes([x, again, part, bad], tmp_path / "study.key.json")
    notes = "\n".join(found["notes"])
    assert "32 votes stand twice" in notes and "x comes from browser s, file" in notes
    assert "part gave 4 of 12 answers" in notes and "bad failed the training and is left out: 1 of 5" in notes
    assert found["raters"] == ["part", "x"] and found["pairs"][0]["n"] == 4
    found = report_votes([changed, x], tmp_path / "study.key.json")
    assert "4 votes contradict another one; the latest counts." in found["notes"]
    assert found["pairs"][0]["win"]["value"] == pytest.approx(2 / 3)
    with pytest.raises(RecipeError, match="No vote on a pair is left. bad failed"):
        report_votes([bad], tmp_path / "study.key.json")


def test_files_of_no_votes_or_another_study_are_told(sides: list[Path], key: dict[str, Any], tmp_path: Path, capsys):
    other = make_study(sides, PROMPTS, tmp_path / "other.html", seed=1)[0]
    assert other["study"] != key["study"]
    theirs = write_votes(tmp_path / "theirs.csv", other, "x", rightly(0))
    edited = write_votes(tmp_path / "edited.csv", key, "x", rightly(0))
    edited.write_text(edited.read_text().replace("overall", "over all", 1))
    (tmp_path / "none.csv").write_text("a,b\n1,2\n")
    told = {
        "theirs": f"study {other['study']}",
        "edited": "line 2, is no vote",
        "none": "holds no votes",
        "gone": "cannot be read",
    }
    for name, words in told.items():
        assert main(["study", "report", str(tmp_path / f"{name}.csv"), "--key", str(tmp_path / "study.key.json")]) == 2
        assert words in capsys.readouterr().err
    assert main(["study", "report", str(edited), "--key", str(theirs)]) == 2
    assert "no key of" in capsys.readouterr().err
    assert read_json(tmp_path / "study.key.json") == {**key, "trials": read_json(tmp_path / "study.key.json")["trials"]}


def test_davidson_is_the_maximum_of_the_likelihood():
    """Against scipy's general minimiser of the chances as Davidson writes them; three systems, unequal votes."""
    counts = np.array([30, 12, 18, 25, 9, 6, 14, 20, 16.0])

    def loss(x: np.ndarray) -> float:
        total, tie = 0.0, np.exp(x[3])
        for number, (one, other) in enumerate([(0, 1), (0, 2), (1, 2)]):
            a, b = np.exp(x[one]), np.exp(x[other])
            parts = np.array([a, tie * np.sqrt(a * b), b])
            total -= counts[3 * number : 3 * number + 3] @ np.log(parts / parts.sum())
        return float(total + 0.05 * (x**2).sum())

    best = minimize(loss, np.zeros(4), tol=1e-12).x[:3]
    np.testing.assert_allclose(davidson(counts[None], 3)[0], best - best.mean(), atol=1e-5)
    assert np.isfinite(davidson(np.array([[50.0, 0, 0]]), 2)).all()


def test_agreement_is_fleiss_kappa_but_for_small_numbers():
    random = np.random.default_rng(0)
    outcomes = random.choice(3, size=(6, 40), p=[0.6, 0.1, 0.3])
    outcomes[:4, :15] = 0
    kappa = fleiss_kappa(np.stack([(outcomes == one).sum(0) for one in range(3)], 1))
    n = outcomes.size
    assert agreement(ballot_of(outcomes)) == pytest.approx(1 - (1 - kappa) * (n - 1) / n)
    assert agreement(ballot_of(outcomes)[:40]) is None, "a single rater agrees with nobody"


def test_intervals_are_wilsons_where_nothing_clusters_and_wider_where_raters_differ():
    random = np.random.default_rng(0)
    outcomes = random.choice(3, size=(25, 40), p=[0.5, 0.2, 0.3])
    plain = proportion_confint((outcomes == 0).sum(), outcomes.size, method="wilson")
    got = preference_of(ballot_of(outcomes), 0.1)["win"]["interval"]
    np.testing.assert_allclose(got, plain, atol=0.02)
    outcomes[:12], outcomes[12:] = 0, 2
    low, high = preference_of(ballot_of(outcomes), 0.1)["win"]["interval"]
    assert high - low > 0.3


def test_raters_needed_shrink_with_the_margin_and_may_be_out_of_reach():
    outcomes = np.random.default_rng(0).choice(3, size=(6, 40), p=[0.4, 0.2, 0.4])
    wide, near = (preference_of(ballot_of(outcomes), margin)["raters_needed"] for margin in (0.3, 0.1))
    assert wide == 0 and near > 10
    outcomes[:, :20], outcomes[:, 20:] = 0, 2
    assert preference_of(ballot_of(outcomes), 0.05)["raters_needed"] is None, "the prompts differ too much"
    assert preference_of(ballot_of(outcomes[:1]), 0.05)["raters_needed"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name, raters, prompts", [("strong effects", 5, 20), ("weak effects", 20, 10)])
def test_intervals_cover(name: str, raters: int, prompts: int):
    """Three standard errors of 95% in 200 studies are 4.6 points; ties, which raters hardly differ in, cover more."""
    found = coverage(1, 200, raters, prompts, TASTES[name])
    assert all(0.904 <= found[what] <= 0.996 for what in ("win", "loss", "net", "strength")), found
    assert found["tie"] >= 0.904


def test_variances_are_the_mean_squares_of_the_table():
    outcomes = np.random.default_rng(0).choice(3, size=(6, 9), p=[0.5, 0.2, 0.3])
    wins = (outcomes == 0) * 1.0
    by_rater, by_prompt = wins.mean(1, keepdims=True), wins.mean(0, keepdims=True)
    rest = ((wins - by_rater - by_prompt + wins.mean()) ** 2).sum() / (5 * 8) / 54
    got = [found[0] for found in spread(ballot_of(outcomes), 1, _shares)[1:]]
    np.testing.assert_allclose(got, [by_rater.var(ddof=1) / 6, by_prompt.var(ddof=1) / 9, rest], rtol=2e-3)


def test_votes_that_all_agree_are_as_many_as_raters_or_prompts():
    row = preference_of(ballot_of(np.zeros((5, 20), int)), 0.1)
    low, high = proportion_confint(5, 5, method="wilson")
    np.testing.assert_allclose(row["win"]["interval"], (low, high))
    np.testing.assert_allclose(row["net"]["interval"], (2 * low - 1, 2 * high - 1))
