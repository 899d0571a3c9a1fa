"""docs/architecture.md is true: every path and name that it shows is there, and its rooms are those of the house."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_house import FLOOR

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SAMPLING = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```$", "", PAGE, flags=re.M | re.S)
"""The page without its blocks of code."""


def path_of(text: str) -> Path | None:
    """The file or folder of this name in the repository or below lingen/."""
    return next((path for folder in (ROOT, ROOT / "lingen") if (path := folder / text).exists()), None)


def names_in(body: list[ast.stmt], above: str = "") -> Iterator[str]:
    """What is defined at the top of a file, and ``Class.method``."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield above + node.name
        if isinstance(node, ast.ClassDef):
            yield from names_in(node.body, f"{above}{node.name}.")
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        yield from (above + target.id for target in targets if isinstance(target, ast.Name))


def is_wrong(text: str) -> bool:
    """Whether something in backticks is a path, a name in a file or a name of lingen's, and does not exist."""
    if place := re.fullmatch(r"([\w/]+\.py):([\w.]+)", text):
        path = path_of(place[1])
        return path is None or place[2] not in names_in(ast.parse(path.read_text(encoding="utf-8")).body)
    if public := re.fullmatch(r"@?lingen\.(\w+)(?:\.(\w+)\(.*\))?", text):
        found = getattr(importlib.import_module("lingen"), public[1], None)
        return found is None or bool(public[2]) and not hasattr(found, public[2])
    is_path = re.fullmatch(r"[\w./-]+", text) and ("/" in text or text.endswith((".py", ".md", ".json")))
    return bool(is_path) and path_of(text) is None


def shown() -> list[str]:
    return [text for text in re.findall(r"`([^`\n]+)`", PROSE)]


def test_every_path_and_name_exists():
    wrong = [text for text in dict.fromkeys(shown()) if is_wrong(text)]
    assert not wrong, wrong


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", PROSE)
    assert links and not [link for link in links if not (ROOT / "docs" / link).exists()]


def test_the_map_shows_every_room_on_its_floor():
    rows = re.findall(r"^\| (\d+) \| `(\w+)(?:/|\.py)` \|", PROSE, flags=re.M)
    doors = {"__init__", "__main__"}
    assert {room: int(floor) for floor, room in rows} == {room: n for room, n in FLOOR.items() if room not in doors}
    assert rows == sorted(rows, key=lambda row: -int(row[0])) and len(rows) == len(set(rows))


def test_the_page_on_sampling_names_what_is_there():
    wrong = [text for text in re.findall(r"`([^`\n]+)`", SAMPLING) if re.match(r"[\w/]+\.py", text) and is_wrong(text)]
    assert not wrong, wrong


def test_the_page_on_sampling_lists_every_key_of_the_weights():
    import lingen
    from lingen.training.denoiser import LinGenModule

    section = SAMPLING[SAMPLING.index("| key |") : SAMPLING.index("## The score")]
    rows = [
        text for row in re.findall(r"^\| (`.*?`) \|", section, flags=re.M) for text in re.findall(r"`([^`]+)`", row)
    ]
    keys = LinGenModule(lingen.load_recipe("quickstart_cpu", stage="videos")).trained_state()
    patterns = {row: as_pattern(row) for row in rows}
    assert not [key for key in keys if not any(re.fullmatch(one, key) for one in patterns.values())]
    unused = [row for row, one in patterns.items() if not any(re.fullmatch(one, key) for key in keys)]
    assert unused == ["autoencoder.*"]
    assert "model.blocks.0.mixer.ma.memory.a_log" in keys and not re.fullmatch(
        patterns["model.norm.weight"], "model.normal"
    )


def as_pattern(row: str) -> str:
    """`model.blocks.N.{a,b}.*` of the table as a regular expression; `...` stands for a block's mixer."""
    text = re.escape(row).replace(r"\.\.\.", r"model\.blocks\.\d+\.mixer\.(ma|te)\.").replace(r"\*", ".+")
    text = re.sub(r"\\{(.*?)\\}", lambda found: f"({found[1].replace(',', '|')})", text)
    return re.sub(r"(?<=\.)N(?=\\)", r"\\d+", text)


@pytest.mark.parametrize(
    "text",
    ["recipe/nothing.py", "run.py:nothing", "training/callbacks.py:StepEdge.nothing", "lingen.nothing", "nothing/",
     '@lingen.MIXERS.nothing("mine")'],
)  # fmt: skip
def test_what_is_not_there_shows(text: str):
    assert is_wrong(text)
