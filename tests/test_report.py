"""`lingen report`: the page of a run, and the README beside it."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from lingen.cli import main
from lingen.plan.loading import load_curriculum, to_yaml
from lingen.recipe.reading import shipped_folder
from lingen.run_folder.folder import RunFolder
from lingen.studies.compare import Compared, leaves
from lingen.studies.report import _settings, write_report


class Page(HTMLParser):
    """Headings, alternative texts and addresses of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.headings: list[str] = []
        self.alts: list[str | None] = []
        self.addresses: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in, given = tag, dict(attrs)
        self.addresses += [str(given[name]) for name in ("src", "href") if name in given]
        self.alts += [given.get("alt")] if tag == "img" else []

    def handle_data(self, data: str) -> None:
        if self._in in ("h1", "h2") and data.strip():
            self.headings.append(data)


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "a <run>"))


def test_a_page_tells_of_the_run_and_needs_nothing_else(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(run)]) == 0 and capsys.readouterr().out.strip() == str(run / "report.html")
    text = (run / "report.html").read_text()
    page = Page(text)
    assert len(text) < 5_000_000 and page.headings[0].startswith("a <run>: a run of ")
    assert page.headings[1:] == ["Curves", "Clips", "Samples", "Settings"]
    assert page.alts == ["a red square"] * len(page.alts) and page.alts
    own = re.compile("#|data:image/jpeg;base64,")  # places of the drawings themselves, and pictures
    assert all(own.match(address) for address in page.addresses)
    assert "finished. Stages: images 2 of 2 steps, clips 6 of 6 steps." in text and ">nan<" not in text
    assert re.search("<td>model.depth<td>2", text) and "<td>reconstruction." not in text
    assert re.search(r"<th>most memory of a.*<td>rank [\d.]+ GiB", text, flags=re.S)


def test_a_score_stands_beside_what_chance_reaches(run: Path):
    rate = {"share": 0.5, "low": 0.2, "high": 0.8, "chance": 1 / 3}
    (run / "score.json").write_text(json.dumps({"sampled": {"clips": 36, "shape": rate}, "real": {}}))
    text = write_report(run).read_text()
    assert "<th>attribute<th>right<th>by chance<tr><td>shape<td>50% (20% to 80%)<td>33%" in text


def test_a_run_that_goes_on_has_a_page(run: Path):
    """Without clips, ledger and weights of the last stage, and with a row that is being written."""
    shutil.rmtree(run / "samples")
    shutil.rmtree(run / "stages/clips")
    (run / "ledger.json").unlink()
    with (run / "metrics.csv").open("a") as file:
        file.write("clips,")
    assert Page(write_report(run).read_text()).headings[1:] == ["Curves", "Settings"]


def test_settings_are_told_as_stages_take_them():
    """A value that a stage has of its own, and one for all stages in the place of a stage's own."""
    base = load_curriculum("quickstart_cpu", ["stages.videos.train.steps=40", "score.clips=4"]).base
    settings = dict(leaves(yaml.safe_load(to_yaml(base))))
    told = _settings(Compared(RunFolder(Path("run")), [], {}, settings, {}, []))
    rows = dict(re.findall("<td>([a-z_.]+)<td>([^<]*<td>[^<]*)", told.partition("<details>")[0]))
    assert rows["stages.videos.train.steps"].split("<td>") == ["40", "600"]
    assert rows["stages.videos.score.clips"].split("<td>") == ["4", "36"]
    assert len(rows) == 3


def test_what_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} is no run folder" in capsys.readouterr().err


def test_the_readme_names_each_file(run: Path):
    names = [path.name for path in run.iterdir() if path.name not in ("README.md", "report.html")]
    readme = (run / "README.md").read_text()
    assert readme == (shipped_folder("templates") / "run_readme.md").read_text() and len(names) > 4
    assert [name for name in names if name not in readme] == []


def test_a_page_that_cannot_be_made_fails_no_run(
    tiny_recipe: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lingen.studies.report.write_text", full)
    words = ["fit", "--recipe", str(tiny_recipe), "--run", "run", "--stage", "images", "sample.prompts=[]"]
    assert main(words) == 0
    assert "report.html was not made ([Errno 28] No space left" in capsys.readouterr().err
    assert (here / "run/stages/images/weights.safetensors").is_file() and not (here / "run/report.html").exists()
