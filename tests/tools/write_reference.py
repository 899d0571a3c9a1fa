"""Writes what docs/ takes from the code, reference/ and llms.txt: ``python -m tests.tools.write_reference``."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

import lingen
from lingen.cli.command import COMMANDS, UNSAID, Argument
from lingen.cli.recipes import parts
from lingen.recipe.bounds import IDENTITY, Bound, Mark
from lingen.recipe.marks import TRAINER
from lingen.recipe.registry import COMPONENTS, Registry, registries
from lingen.recipe.sections import Recipe
from lingen.recipe.signature import REQUIRED, Setting, as_plain, bare, bounds_of, describe, settings_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
MADE = "Made from the code by `python -m tests.tools.write_reference`; change it there."
SOURCES = ("paper", "Movie Gen", "LDM", "VQGAN", "TAE", "EDM2", "mamba_ssm", "ours")
"""Words of a setting's line that name where its value comes from."""
CONTRACTS = {
    "lingen.blocks": ["Mixer"],
    "lingen.autoencoder": ["Autoencoder", "StreamingAutoencoder", "TrainableAutoencoder"],
    "lingen.text": ["TextEncoder"],
    "lingen.testing": ["check_mixer", "check_scan", "check_text_encoder", "check_autoencoder"],
}


Place = tuple[str | int, ...]


class Row(NamedTuple):
    """A setting as the tables show it."""

    key: str
    type: str
    bounds: str
    default: str
    mark: str
    source: str
    about: str


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Rows as Markdown."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, tuple("---" for _ in head), *map(tuple, cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings_table(rows: list[Row]) -> str:
    """Rows of settings; columns in which all cells are empty are left out."""
    heads = ("Key", "Type", "Bounds", "Default", "Mark", "Source", "What it is")
    kept = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    return table(tuple(heads[i] for i in kept), [tuple(row[i] for i in kept) for row in rows])


def rows_of(
    part: Callable[..., Any], place: Place, values: Mapping[str, Any], above: Mark, limits: list[Bound], told: str = ""
) -> Iterator[Row]:
    """The settings of a section; `values` are those that hold where the section is not named."""
    for name, setting in settings_of(part).items():
        here, hint = (*place, name), bare(setting.hint)
        mark, bounds = setting.mark or above, bounds_of(setting.hint) or limits
        value = values.get(name, setting.default)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            inner = {} if value is REQUIRED else vars(value)
            yield from rows_of(hint, here, inner, mark, bounds, setting.doc)
        else:
            about = " ".join(filter(None, (told and f"{told}:", setting.doc or name)))
            yield row_of(".".join(map(str, here)), setting._replace(default=value), mark, bounds, about, _kind(here))


def row_of(key: str, setting: Setting, mark: Mark, bounds: list[Bound], about: str, kind: str | None = None) -> Row:
    default = "required" if setting.default is REQUIRED else f"`{_as_yaml(setting.default)}`"
    limits = " and ".join(bound.text for bound in bounds)
    return Row(f"`{key}`", kind or _type(setting.hint), limits, default, mark.value, _source(about), escaped(about))


def _type(hint: Any) -> str:
    inside = [one for one in (bare(hint), *get_args(bare(hint))) if isinstance(one, type)]
    sections = [one for one in inside if dataclasses.is_dataclass(one)]
    return describe(hint) + "".join(f" of {', '.join(f'`{name}`' for name in settings_of(one))}" for one in sections)


def _kind(place: Place) -> str | None:
    registry = COMPONENTS.get(place)
    return registry and f"{registry.kind}: its name, or a mapping with `name` and its settings"


def _as_yaml(value: Any) -> str:
    return json.dumps(as_plain(value), ensure_ascii=False).replace('"', "")


def _source(about: str) -> str:
    return ", ".join(word for word in SOURCES if re.search(rf"\b{re.escape(word)}\b", about))


def recipe_page() -> str:
    """docs/reference/recipe.md"""
    intro = f"""# Recipe keys

<!-- {MADE} -->

Every key that a recipe may have. Strength: defaults, then `extends`, the recipe, the stage, and `key=value` on the
command line, which goes into every stage, or with `stages.NAME.` in front into one. `lingen show --recipe R --stage S`
prints a recipe with all of them.

**Mark** says what a change does in a run folder that has begun: `identity` makes another run and is refused, `course`
acts from the step at which the run goes on and is written down, `free` changes nothing that is learned
([what a run is](../architecture.md#what-a-run-is)). **Source** is what the line names ("paper" is LinGen's); where it
is empty, the source is what the section's first lines name, and a number that no paper gives is ours.

The same table for editors: `lingen show --schema`, which is `recipes/recipe.schema.json`.
"""
    top, sections = [], []
    for name, setting in settings_of(Recipe).items():
        hint, mark = bare(setting.hint), setting.mark or IDENTITY
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            rows = list(rows_of(hint, (name,), vars(setting.default), mark, bounds_of(setting.hint)))
            doc = as_markdown(inspect.getdoc(hint) or "")
            sections.append(f"## {name}\n\n{doc}\n\n{settings_table(rows)}\n")
        else:
            top.append(row_of(name, setting, mark, bounds_of(setting.hint), setting.doc or name, _kind((name,))))
    marks = [(f"`trainer.{name}`", mark.value) for name, mark in TRAINER.items()]
    trainer = f"""## trainer

Arguments of `lightning.Trainer` under their own names, checked against its signature. `strategy` also takes
[those of lingen](../strategies.md). Whatever does not stand here is part of what a run is (identity):

{table(("Key", "Mark"), marks)}
"""
    return "\n".join([intro, f"## Top level\n\n{settings_table(top)}\n", *sections, trainer])


def parts_page() -> str:
    """docs/reference/parts.md"""
    pages = [
        f"""# Parts and their settings

<!-- {MADE} -->

What a recipe can name. `lingen list mixers` and its kin show the same, and parts of packages that you have installed
besides. Marks are those of [recipe keys](recipe.md).
"""
    ]
    for title, registry in registries().items():
        where = " and ".join(f"`{'.'.join(map(str, at))}`" for at, one in COMPONENTS.items() if one is registry)
        pages.append(f"## {title[0].upper()}{title[1:]}\n\n" + (f"Named at {where}.\n" if where else
                     "Named by the setting `scan` of a mixer.\n"))  # fmt: skip
        if title == "scans":
            rows = [(f"`{row['name']}`", row["about"]) for row in parts("scans") if row["origin"] == "lingen"]
            pages.append(table(("Name", "What it is"), rows) + "\n")
            continue
        pages += [part_section(registry, name) for name in registry.names() if registry.origin(name) == "lingen"]
    return "\n".join(pages)


def part_section(registry: Registry, name: str) -> str:
    """A registered part: what its docstring says, and its settings."""
    part = registry[name]
    doc, told = split_settings(inspect.getdoc(part) or "")
    for other in registry.names():  # a part that passes settings on does not explain them again
        if registry.origin(other) == "lingen":
            elsewhere = split_settings(inspect.getdoc(registry[other]) or "")[1]
            told |= {key: f"as of `{other}`" for key in elsewhere if key not in told}
    rows = [
        row_of(key, setting, setting.mark or IDENTITY, bounds_of(setting.hint), setting.doc or told.get(key, ""))
        for key, setting in settings_of(part).items()
    ]
    body = settings_table([row._replace(source="") for row in rows]) if rows else "It has no settings."
    return f"### {name}\n\n{as_markdown(doc)}\n\n{body}\n"


def split_settings(doc: str) -> tuple[str, dict[str, str]]:
    """A docstring without its "Settings:", and what that says of each."""
    head, _, tail = doc.partition("\nSettings:\n")
    told: dict[str, str] = {}
    block, _, rest = tail.partition("\n\n")
    names: list[str] = []
    for line in block.splitlines():
        if found := re.match(r"    (\w[\w, ]*): (.*)", line):
            names = found[1].split(", ")
            told |= dict.fromkeys(names, found[2])
        else:
            told |= {name: f"{told[name]} {line.strip()}" for name in names}
    return f"{head.rstrip()}\n\n{rest}".strip(), told


def commands_page() -> str:
    """docs/reference/commands.md"""
    pages = [
        f"""# Commands

<!-- {MADE} -->

`lingen COMMAND --help` prints the same. `key=value` words change the recipe wherever they stand. Exit codes: 0 done,
1 failed, 2 wrong use (before time is spent), 75 asked to be started again, 130 interrupted. `lingen bench` needs a
checkout.
"""
    ]
    for name, one in sorted(COMMANDS.items()):
        more = (" [key=value ...]" if one.takes_overrides else "") + (" [-- COMMAND ...]" if one.takes_command else "")
        words = name if UNSAID.get(name.split()[0]) != name.split()[-1] else f"{name.split()[0]} [{name.split()[-1]}]"
        pages.append(f"## {name}\n\n`lingen {words} [options]{more}`\n\n{one.help[0].upper()}{one.help[1:]}.\n")
        if rows := [argument_row(each) for each in one.arguments]:
            pages.append(table(("Argument", "Default", "What it is"), rows) + "\n")
    return "\n".join(pages)


def argument_row(each: Argument) -> tuple[str, str, str]:
    flags, options = each
    takes = options.get("metavar") or (
        "{" + ",".join(map(str, options["choices"])) + "}" if options.get("choices") else ""
    )
    takes = " ".join(takes) if isinstance(takes, tuple) else takes
    named = [f"{flag} {takes}".strip() if flag.startswith("-") else takes or flag for flag in flags]
    default = options.get("default")
    default = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
    about = escaped(options.get("help", "").replace("%%", "%"))
    return ", ".join(f"`{one}`" for one in named), "" if default in (None, "", False) else f"`{default}`", about


def python_page() -> str:
    """docs/reference/python.md"""
    pages = [
        f"""# Python

<!-- {MADE} -->

The public names of `lingen`, imported when they are first used, and the contracts that parts of yours are held to.
Letters of a shape: b batch, t h w the grid, d width, c channels, n a sequence.
"""
    ]
    for name in sorted(lingen.__all__, key=str.lower):
        pages.append(object_section(f"lingen.{name}", getattr(lingen, name)))
    pages.append("## Contracts\n\nWhat a part of yours owes, and what it may offer besides; there is no base class.\n")
    for module, names in CONTRACTS.items():
        space = importlib.import_module(module)
        pages += [object_section(f"{module}.{name}", getattr(space, name), "###") for name in names]
    return "\n".join(pages)


def object_section(name: str, thing: Any, heading: str = "##") -> str:
    """A class with its own public methods, a function, or a registry."""
    if isinstance(thing, Registry):
        text = f"The registry of {thing.kind}s; entry points of other packages: `{thing.group}`."
        known = ", ".join(f"`{one}`" for one in thing.names() if thing.origin(one) == "lingen")
        return f"{heading} {name}\n\n{text} It knows {known}; see [parts](parts.md).\n"
    node = ast.parse(inspect.cleandoc("\n" + inspect.getsource(inspect.unwrap(thing)))).body[0]
    told = [f"{heading} {name}\n"]
    if isinstance(node, ast.FunctionDef):
        told.append(f"```python\n{signature_of(node)}\n```\n")
    told.append(as_markdown(inspect.getdoc(thing) or "") + "\n")
    if isinstance(node, ast.ClassDef):
        for one in (each for each in node.body if isinstance(each, ast.FunctionDef)):
            doc = ast.get_docstring(one)
            if one.name == "__init__" or (doc and (not one.name.startswith("_") or one.name == "__call__")):
                told.append(f"```python\n{signature_of(one)}\n```\n")
                told += [as_markdown(doc) + "\n"] if doc else []
    return "\n".join(told)


def signature_of(node: ast.FunctionDef) -> str:
    """``def name(...) -> ...``, an argument a line where it is long."""
    ahead = "".join(f"@{ast.unparse(one)}\n" for one in node.decorator_list if ast.unparse(one) == "property")
    back = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    whole = f"def {node.name}({ast.unparse(node.args)}){back}"
    if len(whole) <= 100:
        return ahead + whole
    given = node.args
    each = [ast.unparse(ast.arguments([], [one], None, [], [], None, [])) for one in given.args]
    for one, default in zip(reversed(range(len(each))), reversed(given.defaults), strict=False):
        each[one] += f" = {ast.unparse(default)}"
    if given.kwonlyargs:
        each.append("*")
    for only, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        each.append(ast.unparse(only) + (f" = {ast.unparse(default)}" if default else ""))
    return ahead + f"def {node.name}(\n" + "".join(f"    {one},\n" for one in each) + f"){back}"


def escaped(text: str) -> str:
    """Outside of backticks, what Markdown would take for emphasis or HTML."""
    pieces = text.split("`")
    return "`".join(
        piece if number % 2 else piece.replace("*", "\\*").replace("<", "&lt;") for number, piece in enumerate(pieces)
    )


def as_markdown(doc: str) -> str:
    """A docstring as Markdown: what is indented below "Args:" and the like becomes a list."""
    lines: list[str] = []
    in_list = False
    for line in escaped(doc.replace("``", "`")).splitlines():
        text, indent = line.strip(), len(line) - len(line.lstrip())
        starts = indent == 4 and bool(text)
        if starts and not text.startswith("- ") and not in_list and not re.match(r"[`\w][^:]*:", text):
            text = f"- {text}"
        elif starts and (text.startswith("- ") or re.match(r"[`\w][^:]*:", text)):
            text = "- " + text.removeprefix("- ")
        if text.startswith("- ") and not in_list:
            lines.append("")
        in_list = bool(text) and (text.startswith("- ") or in_list and indent > 0)
        if text and not indent and lines and lines[-1].lstrip().startswith(("- ", "  ")):
            lines.append("")
        lines.append(text if not in_list or text.startswith("- ") else f"  {text}")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def llms() -> str:
    """docs/llms.txt (llmstxt.org): what lingen is, and a line about every page of the site."""
    settings = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))
    told = [f"# {settings['site_name']}\n\n> {settings['site_description']}\n"]
    for entry in settings["nav"]:
        ((title, below),) = entry.items()
        told.append(f"## {title}\n")
        for file in [below] if isinstance(below, str) else [path for one in below for path in one.values()]:
            text = (DOCS / file).read_text(encoding="utf-8")
            heading = re.search(r"^# (.*)$", text, flags=re.M)
            told.append(f"- [{heading[1] if heading else file}]({_built(file)}): {first_sentence(text)}")
        told.append("")
    return "\n".join(told)


def _built(file: str) -> str:
    return file.removesuffix(".md").replace("README", "index") + ".html"


def first_sentence(page: str) -> str:
    """Of a page's prose, whole, without links and line breaks; of a page that is a table, the names of its columns."""
    prose = re.sub(r"<!--.*?-->|^```.*?^```$|^(#|!\[|\|)[^\n]*$", "", page, flags=re.M | re.S).strip()
    if not prose:
        return (
            "; ".join(cell.strip() for cell in re.findall(r"[^|\n]+", re.findall(r"^\|.*$", page, flags=re.M)[0])) + "."
        )
    one = " ".join(prose.partition("\n\n")[0].split())
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", one).replace("**", "")
    return re.sub(r":$", ".", re.split(r"(?<=[.?]) (?=[A-Z`])", plain)[0])


PAGES: dict[str, Callable[[], str]] = {
    "reference/recipe.md": recipe_page,
    "reference/parts.md": parts_page,
    "reference/commands.md": commands_page,
    "reference/python.md": python_page,
    "llms.txt": llms,
}
"""By their paths in docs/."""


if __name__ == "__main__":
    for path, page in PAGES.items():
        (DOCS / path).write_text(page(), encoding="utf-8")
        print(DOCS / path, file=sys.stderr)
