"""The page of a study, driven in headless Chromium as raters do: keyboard, reload, a second rater, then the report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lingen.cli import main
from lingen.evaluation.study import QUESTIONS, make_study
from lingen.evaluation.study_report import report_votes
from tests.helpers.study import PROMPTS, write_clips

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[test]'")
pytest.importorskip("statsmodels", reason="statsmodels is not installed: pip install '.[eval]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Any]:
    """A page of Chromium; what its scripts raise fails the test."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        one = browser.new_context(accept_downloads=True, viewport={"width": 1280, "height": 800}).new_page()
        errors: list[Any] = []
        one.on("pageerror", lambda error: errors.append(error))
        yield one
        browser.close()
        assert not errors


def made(folder: Path) -> tuple[Path, dict[str, Any]]:
    for seed, name in enumerate("AB"):
        write_clips(folder / name, PROMPTS, seed)
    key, _ = make_study([folder / "A", folder / "B"], PROMPTS, folder / "study.html")
    return folder / "study.html", key


def begin(page: Any, name: str) -> None:
    page.get_by_label("Your name or number").fill(name)
    page.keyboard.press("Enter")
    page.locator("#rate").wait_for()


def answer(page: Any, key: dict[str, Any], system: int, axes: int = 4) -> None:
    """Answers the pair that is shown by the keyboard: known answers as they are, else for one system."""
    page.wait_for_function("ready")
    trial = key["trials"][page.evaluate("plan[index].id")]
    shown = page.evaluate("plan[index].clips")
    want = trial["known"]["answer"] if "known" in trial else next(
        name for name in shown if key["clips"][name]["system"] == system
    )  # fmt: skip
    for _ in range(axes):
        page.keyboard.press("2" if want == "tie" else "1" if shown[0] == want else "3")


def rate(page: Any, key: dict[str, Any], system: int) -> None:
    while page.locator("#rate").is_visible():
        answer(page, key, system)
        is_practice = page.evaluate("practice()")
        page.keyboard.press("Enter")
        if is_practice:
            assert page.locator("#status").inner_text().startswith("Right.")
            page.keyboard.press("Enter")


def download(page: Any, name: str, folder: Path) -> Path:
    with page.expect_download() as found:
        page.get_by_role("button", name=name).click()
    path = folder / found.value.suggested_filename
    found.value.save_as(path)
    return path


@pytest.mark.slow
def test_two_raters_a_reload_and_the_report(page: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, key = made(tmp_path)
    page.goto(file.as_uri())
    begin(page, 'Ada, "one"')
    answer(page, key, 0, axes=2)
    before = page.evaluate("[plan, index, voteOf(plan[index])]")
    page.reload()
    page.locator("#rate").wait_for()
    assert page.evaluate("[plan, index, voteOf(plan[index])]") == before
    answer(page, key, 0, axes=2)
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    rate(page, key, 0)
    page.reload()
    first = download(page, "Download answers", tmp_path)
    page.get_by_role("button", name="Another person rates").click()
    begin(page, "Bo")
    rate(page, key, 1)
    second = download(page, "Download answers", tmp_path)
    words = ["study", "report", str(first), str(second), "--key", str(tmp_path / "study.key.json")]
    assert main(words) == 0
    assert "overall" in capsys.readouterr().out
    found = report_votes([first, second], tmp_path / "study.key.json")
    assert found["raters"] == ['ada, "one"', "bo"] and [row["axis"] for row in found["pairs"]] == list(QUESTIONS)
    for row in found["pairs"]:
        assert row["n"] == 2 * len(PROMPTS) and row["win"]["value"] == row["loss"]["value"] == 0.5
        assert (row["ahead"], row["behind"]) == (1, 1)


@pytest.mark.slow
def test_both_clips_play_together_and_back_changes_a_vote(page: Any, tmp_path: Path) -> None:
    file, key = made(tmp_path)
    page.goto(file.as_uri())
    begin(page, "Ada")
    page.wait_for_function("videos.every((one) => one.currentTime > 0.3)")
    left, right = page.evaluate("videos.map((one) => one.currentTime)")
    assert abs(left - right) < 0.15
    for _ in range(3):
        answer(page, key, 0)
        page.keyboard.press("Enter")
        page.keyboard.press("Enter")
    trial = page.evaluate("plan[index].id")
    answer(page, key, 0)
    vote = page.evaluate("voteOf(plan[index]).choices.text")
    page.keyboard.press("Enter")
    page.wait_for_function("ready")
    page.keyboard.press("b")
    page.wait_for_function("ready")
    assert page.evaluate("plan[index].id") == trial
    other = {"left": "Right", "tie": "Left", "right": "Left"}[vote]
    page.locator("#axis-text").get_by_label(other).check()
    page.reload()
    begun = page.evaluate(f"voteOf(plan.find((one) => one.id === '{trial}')).choices.text")
    assert begun == other.lower()


@pytest.mark.slow
def test_two_tabs_overwrite_nothing(page: Any, tmp_path: Path) -> None:
    file, key = made(tmp_path)
    page.goto(file.as_uri())
    begin(page, "Ada")
    other = page.context.new_page()
    other.goto(file.as_uri())
    other.locator("#rate").wait_for()
    answer(page, key, 0)
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    answer(page, key, 0)
    other.wait_for_function("ready")
    assert other.evaluate("voteOf(plan[0]).done"), "what one tab stored, the other one sees"
    page.reload()
    page.locator("#rate").wait_for()
    assert page.evaluate("index") == 1 and page.evaluate("complete(voteOf(plan[1]))")
    other.close()


@pytest.mark.slow
def test_a_wrong_practice_answer_is_told_and_stays(page: Any, tmp_path: Path) -> None:
    file, key = made(tmp_path)
    page.goto(file.as_uri())
    begin(page, "Ada")
    page.wait_for_function("ready")
    known = key["trials"][page.evaluate("plan[0].id")]["known"]
    wrong = "2" if known["answer"] != "tie" else "1"
    for _ in QUESTIONS:
        page.keyboard.press(wrong)
    page.keyboard.press("Enter")
    assert page.locator("#status").inner_text().startswith("Look again") and known["hint"] in page.content()
    before = page.evaluate("voteOf(plan[0]).choices")
    page.keyboard.press("3" if wrong == "1" else "1")
    assert page.evaluate("voteOf(plan[0]).choices") == before


def test_the_page_tells_no_side(tmp_path: Path) -> None:
    file, key = made(tmp_path)
    text = file.read_text(encoding="utf-8")
    assert "__" not in text.split("<script")[1]
    for word in ("secret", str(tmp_path), '"pair"', '"system"', "http://", "https://"):
        assert word not in text, word
    assert text.count('id="clip-') == 2 * len(PROMPTS)
