"""Pages can be read by everyone: language, title, words for pictures and fields, order of headings, contrast (WCAG 2.1,
AA). The pages are looked at as Chromium shows them, scripts and styles included, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lingen.evaluation.study import make_study
from lingen.studies.report import write_report
from tests.helpers.study import PROMPTS, write_clips
from tests.test_site import Page, site  # noqa: F401

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

FAULTS = """() => {
  const found = [], shown = (one) => one.checkVisibility({checkOpacity: true, checkVisibilityCSS: true});
  const named = (one) => one.outerHTML.slice(0, 100);
  if (!document.documentElement.lang) found.push("no language");
  if (!document.title) found.push("no title");
  for (const one of document.querySelectorAll("img, video, svg[role=img]"))
    if (!one.alt && !one.ariaLabel && !one.querySelector("title") && !one.closest("[aria-hidden=true]"))
      found.push("no words for " + named(one));
  for (const one of document.querySelectorAll("input:not([type=hidden]), select, textarea"))
    if (shown(one) && !one.labels?.length && !one.ariaLabel && !one.getAttribute("aria-labelledby"))
      found.push("no label: " + named(one));
  for (const one of document.querySelectorAll("button, a[href]"))
    if (shown(one) && !(one.innerText.trim() || one.ariaLabel || one.title || one.querySelector("img[alt], svg title")))
      found.push("no name: " + named(one));
  const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
  for (const id of new Set(ids.filter((one, n) => ids.indexOf(one) !== n))) found.push("twice: id " + id);
  let level = 0;
  for (const one of [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].filter(shown)) {
    if (+one.tagName[1] > level + 1) found.push("a level is skipped before " + named(one));
    level = +one.tagName[1];
  }
  const numbers = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const over = (top, below) => top.slice(0, 3).map((v, n) => v * (top[3] ?? 1) + below[n] * (1 - (top[3] ?? 1)));
  const ground = (one) => {
    if (!one) return [255, 255, 255];
    const own = numbers(getComputedStyle(one).backgroundColor);
    return (own[3] ?? 1) === 1 ? own : over(own, ground(one.parentElement));
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text; (text = walker.nextNode()); ) {
    const one = text.parentElement, style = getComputedStyle(one);
    if (!text.data.trim() || !shown(one) || one.closest("svg, script, style, :disabled")) continue;
    const below = ground(one), ink = over(numbers(style.color), below);
    const [a, b] = [light(ink), light(below)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && +style.fontWeight >= 700);
    const told = `contrast ${ratio.toFixed(2)}: "${text.data.trim().slice(0, 40)}" ` + named(one);
    if (ratio < (large ? 3 : 4.5)) found.push(told);
  }
  return [...new Set(found)];
}"""
"""What is wrong with the page that is open."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[test]'")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the path")
    with sync_api.sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


def faults_of(browser: Any, file: Path, scheme: str = "light") -> list[str]:
    page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
    page.goto(file.as_uri())
    found = page.evaluate(FAULTS)
    page.close()
    return found


@pytest.fixture(scope="module")
def report(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("report") / "run")))


def test_a_faulty_page_shows(browser: Any, tmp_path: Path):
    page = tmp_path / "bad.html"
    page.write_text("<h1>a</h1><h3>b</h3><img src=x><input><p style='color:#999'>grey</p><p id=a></p><p id=a></p>")
    told = "\n".join(faults_of(browser, page))
    for fault in ("no language", "no title", "skipped before <h3>", "no words for <img", "no label: <input",
                  "contrast 2.85", "twice: id a"):  # fmt: skip
        assert fault in told
    page.write_text(
        "<html lang=en><title>t</title><h1>a</h1><h2>b</h2><label>x <input></label><p style='color:#595959'>g"
    )
    assert faults_of(browser, page) == []


def test_the_report_without_a_browser(report: Path):
    page = Page(report)
    assert not page.faults and page.headings[0] == 1 and set(page.headings[1:]) == {2}


def test_the_report(browser: Any, report: Path):
    assert faults_of(browser, report) == []


def test_a_study(browser: Any, tmp_path: Path):
    for seed, name in enumerate("AB"):
        write_clips(tmp_path / name, PROMPTS[:2], seed)
    make_study([tmp_path / "A", tmp_path / "B"], PROMPTS[:2], tmp_path / "study.html")
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto((tmp_path / "study.html").as_uri())
    assert page.evaluate(FAULTS) == []
    page.get_by_label("Your name or number").fill("Ada")
    page.keyboard.press("Enter")
    page.locator("#rate").wait_for()
    assert page.evaluate(FAULTS) == []
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_site(browser: Any, site: Path, scheme: str):  # noqa: F811
    """Pages that have between them all colours of code, tables, links and pictures."""
    names = ("index", "how-to/own-mixer", "how-to/fine-tune", "cluster", "compare", "evaluation", "reference/recipe")
    faults = {name: faults_of(browser, site / f"{name}.html", scheme) for name in names}
    assert not any(faults.values()), faults
