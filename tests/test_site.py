"""The site of docs/: its commands run, what comes from the code is up to date, its links lead somewhere, and everyone
can read it, from the disk too."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

import lingen
from lingen.cli import main
from lingen.cli.command import COMMANDS, UNSAID, parse_arguments
from tests.helpers.commands import ROOT
from tests.test_docs import is_wrong
from tests.test_readme import README
from tests.tools.draw_concepts import PICTURES, draw
from tests.tools.write_reference import PAGES

DOCS = ROOT / "docs"
PROSE = [
    "index.md",
    "faq.md",
    "peers.md",
    "concepts/index.md",
    *(f"how-to/{one.name}" for one in DOCS.glob("how-to/*")),
]
"""Pages that are written by hand and whose commands are run here; README has those for the others."""


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each block of code, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), flags=re.M | re.S)


@pytest.mark.parametrize("path", PAGES)
def test_what_comes_from_the_code_is_up_to_date(path: str):
    """After a change: python -m tests.tools.write_reference"""
    assert text_of(path) == PAGES[path]()


def test_the_pictures_are_drawn_and_shown(tmp_path: Path):
    """After a change: python -m tests.tools.draw_concepts, and look at them."""
    drawn = [path.name for path in draw(tmp_path)]
    shown = re.findall(r"!\[[^\]]+\]\((\w+\.png)\)", text_of("concepts/index.md"))
    assert sorted(shown) == sorted(drawn) == sorted(path.name for path in DOCS.glob("concepts/*.png"))
    assert len(drawn) == len(PICTURES) and all((tmp_path / name).stat().st_size > 5_000 for name in drawn)


def test_the_first_page_has_the_two_command_lines_of_readme():
    of_readme = re.findall(r"^```sh\n(.*?)^```$", README, flags=re.M | re.S)[:2]
    assert [text for language, text in blocks("index.md") if language == "bash"] == of_readme


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the first page was followed: its run is that of all other pages."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        follow("index.md")
        assert (folder / "green_square.mp4").stat().st_size > 500
    return folder


def follow(page: str) -> None:
    """Writes a page's files, runs its commands and its Python, in order, in the current folder."""
    for language, text in blocks(page):
        named = re.match(r"# ([\w./]+\.(?:py|yaml))\n", text)
        if named:
            Path(named[1]).write_text(text, encoding="utf-8")
        elif language == "sh":
            for line in text.strip().splitlines():
                command, *words = shlex.split(line)
                assert command == "lingen" and main(words) == 0, line
        elif language == "python":
            exec(compile(text, page, "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("page", [one for one in PROSE if one != "index.md"])
def test_commands_run(page: str, followed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(followed)
    monkeypatch.syspath_prepend(str(followed))
    follow(page)


@pytest.mark.slow
def test_every_file_of_a_run_is_explained(followed: Path):
    page = text_of("how-to/read-a-run.md")
    named = re.findall(r"`([^`\n]+)`", page[: page.index("## The numbers")])
    run = followed / "runs" / "tiny"
    for path in (one.relative_to(run) for one in run.rglob("*") if one.is_file()):
        parts = [re.sub(r"^(images|videos)(?=-|$)", "NAME", part) for part in path.parts]
        assert any(f"{part}/" in named or "/".join(parts) in named or part in named
                   or "/".join(parts[:2]) + "/" in named for part in parts), path  # fmt: skip


@pytest.mark.parametrize("page", [*PROSE, *sorted(one.name for one in DOCS.glob("*.md") if one.name not in PROSE)])
def test_commands_that_are_only_shown_are_understood(page: str):
    """Where commands are run here `text` shows others, and nothing else; elsewhere it shows what is printed, too."""
    shown = ("text",) if page in PROSE else ("text", "sh")
    for line in (line for language, text in blocks(page) if language in shown for line in text.strip().splitlines()):
        if not line.startswith("lingen "):
            assert page not in PROSE, line
            continue
        args = parse_arguments(shlex.split(line, comments=True)[1:])
        if getattr(args, "recipe", None):
            lingen.stages_of(args.recipe, args.overrides)


@pytest.mark.parametrize("page", PROSE)
def test_paths_and_commands_exist(page: str):
    prose = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)
    shown = re.findall(r"`([^`\n]+)`", prose)
    wrong = [text for text in shown if re.match(r"(lingen|tests|docs|recipes)/", text) and is_wrong(text)]
    commands = [text for text in shown if text.startswith("lingen ") and not is_command(text)]
    assert not wrong + commands, wrong + commands


def is_command(text: str) -> bool:
    words = shlex.split(text)[1:]
    words = words[1:] if words[0] in ("help", "version") and words[1:] else words
    known = [*COMMANDS, *UNSAID, "bench", "version", "COMMAND"]
    return any(words[: len(name.split())] == name.split() for name in known)


def test_each_yes_beside_other_systems_has_its_file_or_command():
    rows = re.findall(r"^\| (.+?) \| (.+?) \|(?: [^|]+ \|){9}$", text_of("peers.md"), flags=re.M)
    told = [(what, cell) for what, cell in rows if cell not in ("lingen", "---")]
    assert len(told) > 25
    assert not [what for what, cell in told if not re.search(r"`[^`]+`", cell)]


class Page(HTMLParser):
    """What a built page links to, loads, and shows to those who cannot see it."""

    def __init__(self, file: Path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.names: set[str] = set()
        self.faults: list[str] = []
        self.headings: list[int] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in given}
        self.names |= {attributes[name] for name in ("id", "name") if name in attributes}
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if tag in ("script", "img", "iframe") and "src" in attributes:
            self.loads.append(attributes["src"])
        if tag == "link" and attributes.get("rel") in ("stylesheet", "preconnect", "icon"):
            self.loads.append(attributes["href"])
        if tag == "html" and not attributes.get("lang"):
            self.faults.append("no language")
        if tag == "img" and not attributes.get("alt"):
            self.faults.append(f"a picture without words: {attributes.get('src')}")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("mkdocs") is None or find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("built")
    words = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        "mkdocs.yml",
        "--site-dir",
        str(folder),
    ]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # of the theme, about the future of MkDocs
    done = subprocess.run(words, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


def test_every_link_and_file_of_the_site_is_there(site: Path):
    pages = {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}
    assert len(pages) > 25
    broken = []
    for file, page in pages.items():
        for link in page.links + page.loads:
            parts = urlparse(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            missing = not target.is_file() or (
                parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].names
            )
            broken += [f"{file.relative_to(site)}: {link}"] if missing else []
    assert not broken, broken


def test_the_site_needs_no_network_and_can_be_searched(site: Path):
    elsewhere = {load for file in site.rglob("*.html") for load in Page(file).loads if urlparse(load).scheme}
    assert not elsewhere
    assert "rotary_major" in (site / "search" / "search_index.js").read_text(encoding="utf-8")


def test_the_site_can_be_read_by_everyone(site: Path):
    """Words for pictures, a language, and headings that skip no level."""
    faults = []
    for file in site.rglob("*.html"):
        page = Page(file)
        skips = [b for a, b in zip(page.headings, page.headings[1:], strict=False) if b > a + 1]
        told = page.faults + [f"a heading of level {level} below none of {level - 1}" for level in skips]
        told += ["not one title"] if page.headings.count(1) != 1 else []
        faults += [f"{file.relative_to(site)}: {one}" for one in told]
    assert not faults, faults


def test_llms_txt_leads_to_pages(site: Path):
    links = re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text(encoding="utf-8"))
    assert len(links) > 25 and not [link for link in links if not (site / link).is_file()]


@pytest.mark.skipif(find_spec("codespell_lib") is None, reason="codespell is not installed: pip install '.[docs]'")
def test_spelling():
    """Of pages, and of what people read in the code: docstrings, messages, templates, recipes."""
    files = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "lingen", "templates", "recipes"]
    files += [str(file) for file in DOCS.rglob("*.md")]
    done = subprocess.run([sys.executable, "-m", "codespell_lib", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
