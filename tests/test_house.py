"""The floor plan of lingen/ is kept: every import goes down, and those that go up are named here with their reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

HOUSE = Path(__file__).resolve().parents[1] / "lingen"

FLOORS = (
    ("tables", "recipe"),
    ("files", "provenance"),
    ("media", "frozen", "weights"),
    ("kernels",),
    ("blocks", "flow"),
    ("model", "autoencoder"),
    ("data", "plan"),
    ("text", "metrics"),
    ("ranks",),
    ("run_folder",),
    ("training", "testing"),
    ("sampling",),
    ("prepare", "run"),
    ("doctor", "launch", "evaluation"),
    ("studies",),
    ("cli",),
    ("__init__", "__main__"),
)
"""Rooms from the ground up. A room imports rooms of lower floors, and itself; neighbours on a floor do not meet."""

LISTED: dict[tuple[str, str], str] = {
    ("recipe", "plan"): "load_recipe tries a recipe's parts on the meta device; lingen.recipe offers its name lazily",
    ("cli", "__init__"): "the version",
}
"""Imports that go up, or across a floor, and why."""

CIRCLES: list[set[str]] = [
    # A plain twin asks for the Triton one when it is taken; that one shares the plain one's sizes, states and products.
    {"lingen.kernels.pool", "lingen.kernels.pool_triton"},
]
"""Files that import each other, and why."""

AT_THE_TOP = 13
"""Files at the top of lingen/, at most."""


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """Modules of lingen that a file imports, at its top or inside of functions, with the line. What only a type checker
    sees does not count."""
    package = ("lingen", *file.relative_to(HOUSE).parts[:-1])
    pending: list[ast.AST] = [ast.parse(file.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == "lingen")
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            if module.split(".")[0] == "lingen":
                named = (f"{module}.{alias.name}" for alias in node.names)
                yield from ((name if module == "lingen" or is_module(name) else module, node.lineno) for name in named)
        else:
            pending += ast.iter_child_nodes(node)


def is_module(name: str) -> bool:
    path = HOUSE.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def room_of(module: str) -> str:
    """``lingen.data.order`` -> ``data``; a name that lingen itself offers, such as the version -> ``__init__``."""
    name = module.split(".")[1] if "." in module else "__init__"
    return name if (HOUSE / name).is_dir() or (HOUSE / f"{name}.py").is_file() else "__init__"


def rooms() -> Iterator[tuple[str, Path]]:
    for file in sorted(HOUSE.rglob("*.py")):
        first = file.relative_to(HOUSE).parts[0]
        yield first.removesuffix(".py"), file


def arrows() -> dict[tuple[str, str], list[str]]:
    """(room, room that it imports) -> places."""
    found: dict[tuple[str, str], list[str]] = {}
    for room, file in rooms():
        for module, line in imports(file):
            if room_of(module) != room:
                found.setdefault((room, room_of(module)), []).append(f"{file.relative_to(HOUSE)}:{line} {module}")
    return found


FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def test_every_room_has_its_floor():
    assert {room for room, _ in rooms()} == set(FLOOR)


def test_imports_go_down():
    up = {
        (room, other): places
        for (room, other), places in arrows().items()
        if FLOOR[other] >= FLOOR[room] and (room, other) not in LISTED
    }
    assert not up, "\n".join(f"{room} -> {other}: {'; '.join(places)}" for (room, other), places in up.items())


def test_what_is_listed_is_there():
    assert LISTED.keys() <= arrows().keys()


def circles(needs: dict[str, set[str]]) -> list[set[str]]:
    """The largest sets of modules that all lead back to each other (strongly connected ones of more than one)."""
    reach: dict[str, set[str]] = {}
    for start in needs:
        seen: set[str] = set()
        pending = [start]
        while pending:
            new = needs[pending.pop()] & needs.keys() - seen
            seen |= new
            pending += new
        reach[start] = seen
    found = {frozenset(other for other in reach[one] if one in reach[other]) for one in needs if one in reach[one]}
    return [set(circle) for circle in found]


def test_files_import_each_other_in_no_circle():
    """At the top of a file or inside of functions, within a room too."""
    needs: dict[str, set[str]] = {}
    for _, file in rooms():
        name = ".".join(("lingen", *file.relative_to(HOUSE).with_suffix("").parts)).removesuffix(".__init__")
        needs[name] = {module for module, _ in imports(file)} - {name}
    assert sorted(map(sorted, circles(needs))) == sorted(map(sorted, CIRCLES))


def test_a_circle_shows():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]


def test_each_folder_says_what_lives_there():
    folders = {file.parent for _, file in rooms()} - {HOUSE}
    for folder in folders:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert text and text.split("\n")[0].endswith((".", ":")), folder.name


def test_the_top_is_small():
    files = [file.name for file in HOUSE.iterdir() if file.is_file()]
    assert len(files) <= AT_THE_TOP, sorted(files)


def test_recipes_are_words():
    """Nothing in recipe/ imports torch, nor a room that does."""
    for room, file in rooms():
        if room == "recipe":
            tree = ast.parse(file.read_text())
            names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
            names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            assert not {name.split(".")[0] for name in names} & {"torch", "lightning", "numpy"}, file.name


def test_an_arrow_up_shows(tmp_path: Path, monkeypatch):
    """The test can fail: a lazy import of the command line inside a kernel is found."""
    house = tmp_path / "lingen"
    (house / "kernels").mkdir(parents=True)
    (house / "cli").mkdir()
    (house / "kernels" / "scan.py").write_text("def f():\n    from lingen.cli import command\n    return command\n")
    monkeypatch.setattr(f"{__name__}.HOUSE", house)
    assert arrows() == {("kernels", "cli"): ["kernels/scan.py:2 lingen.cli"]}
