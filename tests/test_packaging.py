"""What is handed out: the source distribution, and what the project says of itself."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path, PurePath

import pytest
import yaml

import lingen
from tests.helpers.commands import ROOT
from tests.tools import pythons

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "pyproject.toml", "mkdocs.yml",
          "PKG-INFO", "lingen/py.typed", "lingen/evaluation/study.html", "recipes/t2v_68s.yaml",
          "lingen/autoencoder/weights/tae_small.safetensors", "templates/model_card.md", "docs/index.md",
          "tests/conftest.py")  # fmt: skip


def test_the_source_distribution_holds_all_that_is_needed_and_nothing_else(tmp_path: Path):
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install '.[test]'")
    words = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as tar:
        held = {str(PurePath(*PurePath(one.name).parts[1:])): one for one in tar.getmembers()}
    assert not set(NEEDED) - held.keys()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    wanted = {name for name in tracked if name.startswith(("lingen/", "recipes/", "templates/", "tests/", "docs/"))}
    assert not [name for name in wanted - held.keys() if (ROOT / name).is_file()]
    tops = {PurePath(name).parts[0] for name in held}
    assert tops <= {PurePath(name).parts[0] for name in NEEDED} | {".gitignore"}
    assert not [name for name in held.keys() - wanted if "__pycache__" in name or name.endswith((".mp4", ".tar"))]
    assert all(one.isfile() and one.size < 16e6 for one in held.values())


def test_versions_of_python_are_said_as_they_were_tried():
    said = {
        one.rpartition(" ")[2]
        for one in PROJECT["classifiers"]
        if one.startswith("Programming Language :: Python :: 3.")
    }
    assert said == {"3.11"} and PROJECT["requires-python"] == ">=3.11"
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in said or sys.version_info > (3, 11)
    assert set(pythons.VERSIONS) >= said


def test_a_python_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]):
    assert pythons.main(["3.99"]) == 0
    assert capsys.readouterr().out == "Python 3.99: untried: not on this machine\n"
    assert pythons.interpreter_of("3.99") is None


def test_the_citation_names_the_paper():
    held = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert held["cff-version"] == "1.2.0" and held["authors"] == [{"name": "lingen contributors"}]
    assert held["license"] == PROJECT["license"]
    assert (
        held["version"] == lingen.__version__ and f"version {lingen.__version__}," in (ROOT / "README.md").read_text()
    )
    (paper,) = held["references"]
    assert paper["url"] == "https://arxiv.org/abs/2412.09856"
    assert "LinGen" in paper["title"] and paper["identifiers"][0]["value"] == "arXiv:2412.09856"
