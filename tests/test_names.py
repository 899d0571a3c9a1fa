"""A public name means one thing: none is defined in two modules of lingen/, but for those that are listed here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

HOUSE = Path(__file__).resolve().parents[1] / "lingen"

OF_EACH_KERNEL = {
    "forward": "a kernel's forward pass without autograd",
    "backward": "its gradients",
    "LAUNCH": "how its Triton functions are launched",
    "TUNING": "the same, where a launch depends on sizes",
    "PROGRAMS": "the most programs that share the work",
    "WARPS": "warps of a program",
}
"""Names that every file of Triton kernels may define for itself, and what they mean in each."""

NO_NOUNS = ("TypeVar", "ParamSpec", "getLogger")
"""What is made by calling these may be called the same everywhere: type variables and loggers."""


def called(node: ast.expr | None) -> str:
    """The last word of the function that an expression calls; empty where it calls none."""
    return ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""


def public_names(body: list[ast.stmt]) -> Iterator[str]:
    """Functions, classes and constants at the top of a module, inside of `if` and `try` too. A function that declares a
    command does not count: it has the command's name."""
    for node in body:
        names: list[str] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [] if any(called(mark) == "command" for mark in node.decorator_list) else [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and called(node.value) not in NO_NOUNS:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [part for target in targets for part in ast.walk(target)]
            names = [part.id for part in found if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
        elif isinstance(node, ast.If | ast.Try):
            yield from public_names([*node.body, *node.orelse])
        yield from (name for name in names if not name.startswith("_"))


def repeated_names(house: Path) -> dict[str, list[str]]:
    """Public name -> the files that define it, where it may mean several things. `X.py` and `X_triton.py` are twins and
    mean the same; so do all files of kernels with a name of `OF_EACH_KERNEL`."""
    files: dict[str, list[str]] = {}
    meanings: dict[str, set[Path]] = {}
    for file in sorted(house.rglob("*.py")):
        twin, is_kernel = file.with_stem(file.stem.removesuffix("_triton")), file.stem.endswith("_triton")
        for name in dict.fromkeys(public_names(ast.parse(file.read_text()).body)):
            files.setdefault(name, []).append(file.relative_to(house).as_posix())
            meanings.setdefault(name, set()).add(house if is_kernel and name in OF_EACH_KERNEL else twin)
    return {name: files[name] for name in files if len(meanings[name]) > 1}


def test_a_public_name_is_defined_once():
    repeated = repeated_names(HOUSE)
    assert not repeated, "\n".join(f"{name}: {', '.join(files)}" for name, files in sorted(repeated.items()))


def test_what_is_listed_is_there():
    """In at least two files of kernels: else the list says more than it must."""
    bodies = [ast.parse(file.read_text()).body for file in sorted(HOUSE.rglob("*_triton.py"))]
    for name in OF_EACH_KERNEL:
        assert sum(name in set(public_names(body)) for body in bodies) > 1, name


def test_a_repeated_name_shows(tmp_path: Path):
    """The test can fail, and what may be repeated is not found."""
    texts = {
        "order": "class Place: ...\nT = TypeVar('T')\nlog = logging.getLogger('lingen')\n_kept = 1\n",
        "place": "if True:\n    Place: type = int\nT = TypeVar('T')\nlog = logging.getLogger('lingen')\n_kept = 2\n",
        "pool": "def pool(): ...\n",
        "pool_triton": "def pool(): ...\ndef backward(): ...\ndef forward(): ...\nWIDEST, LAUNCH = 8, {}\n",
        "norm_triton": "def backward(): ...\ndef forward(): ...\nWIDEST = 8\nLAUNCH = {}\n",
        "command": "@command('shows it')\ndef pool(args): ...\n",
        "timing": "def forward(): ...\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert repeated_names(tmp_path) == {
        "Place": ["order.py", "place.py"],
        "WIDEST": ["norm_triton.py", "pool_triton.py"],
        "forward": ["norm_triton.py", "pool_triton.py", "timing.py"],
    }
