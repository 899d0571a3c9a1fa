"""Nested mappings that remember where each value was written, so that a mistake can name its file and line."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from lingen.recipe.signature import Path


class Origin(NamedTuple):
    """Where a value was written."""

    where: str
    """``file:line``, ``file``, or ``command line``"""
    key: str
    """The dotted key as it was written, e.g. ``stages.t2i.model.depth``."""


class Problem(NamedTuple):
    """One mistake in a recipe or on the command line."""

    where: str
    text: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" + (f" (at {self.key})" if self.key else "")


class Layered:
    """A tree of dicts, lists and scalars with the origin of each node. Later layers are merged over it."""

    def __init__(self, tree: dict[str, Any], origins: dict[Path, Origin]):
        self.tree = tree
        self.origins = origins

    def copy(self) -> Layered:
        return Layered(copy.deepcopy(self.tree), dict(self.origins))

    def origin(self, path: Path) -> Origin:
        """Origin of the node at `path`, or of the nearest node above it."""
        for cut in range(len(path), -1, -1):
            if path[:cut] in self.origins:
                where, key = self.origins[path[:cut]]
                return Origin(where, ".".join([*([key] if key else []), *map(str, path[cut:])]))
        return Origin("default", ".".join(map(str, path)))

    def problem(self, path: Path, text: str) -> Problem:
        """A mistake at `path`, with the place where that was written."""
        where, key = self.origin(path)
        return Problem(where, text, key)

    def get(self, path: Path) -> Any:
        """The node at `path`; None where there is none."""
        node: Any = self.tree
        for key in path:
            if isinstance(node, dict) and key in node:
                node = node[key]
            elif isinstance(node, list) and isinstance(key, int) and key < len(node):
                node = node[key]
            else:
                return None
        return node

    def put(self, path: Path, value: Any, source: Layered, source_path: Path) -> None:
        """Replaces the node at `path`, origins included, by a node of another tree."""
        parent = self.get(path[:-1])
        parent[path[-1]] = copy.deepcopy(value)
        size, source_size = len(path), len(source_path)
        self.origins = {p: origin for p, origin in self.origins.items() if p[:size] != path}
        self.origins |= {path + p[source_size:]: o for p, o in source.origins.items() if p[:source_size] == source_path}
        self.origins.setdefault(path, source.origin(source_path))

    def wrap(self, path: Path, value: Any, key: str | int) -> None:
        """Puts a mapping or list around the node at `path`, which stands under `key` in it and was written there."""
        origin = self.origin(path)
        self.put(path, value, self, path)
        self.origins[path] = self.origins[(*path, key)] = origin

    def pop(self, key: str) -> Layered:
        """Takes one top-level mapping out, as a tree of its own; its origins keep the full keys."""
        value = self.tree.pop(key, None)
        origins = {p[1:]: origin for p, origin in self.origins.items() if p[:1] == (key,)}
        self.origins = {p: origin for p, origin in self.origins.items() if p[:1] != (key,)}
        origins.setdefault((), Origin(self.origin(()).where, key))
        return Layered({} if value is None else value, origins)

    def merge(self, over: Layered) -> list[Problem]:
        """Lays `over` on top: mappings are merged, all else is replaced. A mapping with another ``name`` is another
        part, so it replaces the old one with its settings; a mapping with numbers as keys changes entries of a list. A
        list of parts replaces a part or a list of parts, and a part a list: each keeps the settings of the one that had
        its name."""
        return list(self._merge((), over.tree, over, ()))

    def _merge(self, path: Path, value: Any, over: Layered, source: Path) -> Iterator[Problem]:
        base = self.get(path)
        named = bool(path) and _is_part(value)
        same_part = not named or isinstance(base, dict) and value["name"] == base.get("name")
        if isinstance(value, dict) and isinstance(base, dict) and same_part:
            self.origins.setdefault(path, over.origin(source))
            for key, item in value.items():
                yield from self._merge((*path, key), item, over, (*source, key))
        elif isinstance(value, dict) and isinstance(base, list) and not named:
            for key, item in value.items():
                if str(key).isdigit() and int(key) < len(base):
                    yield from self._merge((*path, int(key)), item, over, (*source, key))
                else:
                    name = ".".join(map(str, path))
                    text = f"{name} is a list of {len(base)}; say {name}.0 for its first entry."
                    yield over.problem((*source, key), text)
        elif (_are_parts(value) and (_is_part(base) or _are_parts(base))) or (named and _are_parts(base)):
            yield from self._merge_parts(path, value, over, source)
        else:
            self.put(path, value, over, source)

    def _merge_parts(self, path: Path, value: Any, over: Layered, source: Path) -> Iterator[Problem]:
        """Puts parts where others were, each over the settings of the one that had its name; where several had it and
        differ, one over the other in their order, and there must be as many."""
        before, held, given = self.copy(), _numbered(self.get(path)), _numbered(value)
        self.put(path, value, over, source)
        seen: Counter[str] = Counter()
        for key, part in given:
            name, number = part["name"], seen[part["name"]]
            seen[name] += 1
            same = [one for one in held if one[1]["name"] == name]
            differ = any(old != same[0][1] for _, old in same)
            if differ and len(same) != sum(one["name"] == name for _, one in given):
                dotted = ".".join(map(str, path))
                text = f"{dotted} has {len(same)} '{name}' with different settings, and which stay is not said; "
                yield over.problem((*source, *key), f"{text}give {len(same)}, or change one, as {dotted}.0.")
            elif same:
                place, old = same[number] if differ else same[0]
                self.put((*path, *key), old, before, (*path, *place))
                yield from self._merge((*path, *key), part, over, (*source, *key))


def _numbered(parts: Any) -> list[tuple[Path, dict[str, Any]]]:
    """The parts of a list with their numbers, or the one part with none."""
    return [((), parts)] if isinstance(parts, dict) else [((number,), part) for number, part in enumerate(parts)]


def _is_part(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("name"), str)


def _are_parts(node: Any) -> bool:
    return isinstance(node, list) and bool(node) and all(map(_is_part, node))


def read_yaml(text: str, shown: str) -> tuple[Layered, list[Problem]]:
    """A recipe as a tree whose origins are ``shown:line``, and its mistakes of form."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f"{shown}:{error.problem_mark.line + 1}" if error.problem_mark else shown
        return Layered({}, {}), [Problem(line, f"This is not valid YAML: {error.problem}.")]
    except yaml.YAMLError as error:
        return Layered({}, {}), [Problem(shown, f"This is not valid YAML: {str(error).splitlines()[0]}.")]
    except RecursionError:
        return Layered({}, {}), [Problem(shown, "This is no recipe: it is nested too deeply.")]
    if root is None:
        return Layered({}, {}), [Problem(shown, "The file is empty; a recipe has sections such as model and data.")]
    if not isinstance(root, yaml.MappingNode):
        return Layered({}, {}), [Problem(f"{shown}:{root.start_mark.line + 1}", "A recipe is a mapping of sections.")]
    origins: dict[Path, Origin] = {(): Origin(shown, "")}
    problems = list(_walk(root, (), origins, shown, ()))
    tree, failed = ({}, []) if problems else _values(text, origins, shown)
    return Layered(tree, origins), problems + failed


def read_override(text: str) -> tuple[Layered, list[Problem]]:
    """``model.depth=4`` as a tree. The value is read as in a recipe: numbers, lists, mappings, null."""
    place = "command line"
    key, equals, value = text.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path):
        return Layered({}, {}), [Problem(place, f"'{text}' is no override; say key=value, e.g. model.depth=4.")]
    content, problems = _values(f"value: {value}", {(): Origin(place, "")}, place)
    tree: Any = content.get("value")
    origins: dict[Path, Origin] = {path[:cut]: Origin(place, ".".join(path[:cut])) for cut in range(len(path) + 1)}
    for name in reversed(path):
        tree = {name: tree}
    return Layered(tree, origins), [Problem(place, p.text, key) for p in problems]


def resolve(layered: Layered, defaults: dict[str, Any]) -> list[Problem]:
    """Replaces every ``${key}`` by what it names, in place; what is not written has its default."""
    if not any(_interpolations(layered.tree, ())):
        return []
    from omegaconf import OmegaConf

    whole = Layered(copy.deepcopy(defaults), {})
    whole.merge(layered)
    config = OmegaConf.create(whole.tree)
    problems = []
    for path, text in list(_interpolations(layered.tree, ())):
        node: Any = config
        try:
            for key in path:
                node = node[key]
        except Exception as error:  # also RecursionError and any error of a resolver
            problems.append(layered.problem(path, _why_unresolved(text, error)))
            continue
        value = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        layered.get(path[:-1])[path[-1]] = value
    return problems


def _interpolations(node: Any, path: Path) -> Iterator[tuple[Path, str]]:
    if isinstance(node, str) and "${" in node:
        yield path, node
    elif isinstance(node, (dict, list)):
        for key, item in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _interpolations(item, (*path, key))


def _why_unresolved(text: str, error: Exception) -> str:
    from omegaconf.errors import GrammarParseError, InterpolationKeyError

    if isinstance(error, RecursionError) or "Recursive interpolation" in str(error):
        return f"Interpolation {text} leads back to itself."
    if isinstance(error, InterpolationKeyError):
        return f"Interpolation {text} names a key that the recipe does not have."
    if isinstance(error, GrammarParseError):
        return f"Interpolation {text} is not well formed; write ${{section.key}}."
    return f"Interpolation {text} failed: {str(error).splitlines()[0]}."


def _values(text: str, origins: dict[Path, Origin], shown: str) -> tuple[dict[str, Any], list[Problem]]:
    """Values by OmegaConf's loader, for which 1e-4 is a number (in YAML 1.1 it is text)."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        return tree, []
    except yaml.MarkedYAMLError as error:
        line = f"{shown}:{error.problem_mark.line + 1}" if error.problem_mark and len(origins) > 1 else shown
        return {}, [Problem(line, f"This is not valid YAML: {error.problem}.")]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        key = getattr(error, "full_key", None) or ""
        where, name = Layered({}, origins).origin(tuple(key.split(".")) if key else ())
        return {}, [Problem(where, f"This value cannot be read: {str(error).splitlines()[0]}.", name)]


def _walk(node: Any, path: Path, origins: dict[Path, Origin], shown: str, above: tuple[Any, ...]) -> Iterator[Problem]:
    """Notes the line of every key and entry; yields duplicates and keys that are not text."""
    import yaml

    if node in above:
        yield Problem(f"{shown}:{node.start_mark.line + 1}", "An alias holds itself.", ".".join(map(str, path)))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            origins[(*path, index)] = _origin(item, (*path, index), shown)
            yield from _walk(item, (*path, index), origins, shown, (*above, node))
    elif isinstance(node, yaml.MappingNode):
        for name, item in node.value:
            if name.tag == "tag:yaml.org,2002:merge":
                continue
            if name.tag != "tag:yaml.org,2002:str":
                text = f"Key {name.value or name.tag} is not text; put it in quotes."
                yield Problem(f"{shown}:{name.start_mark.line + 1}", text, ".".join(map(str, path)))
                continue
            here = (*path, name.value)
            origin = _origin(name, here, shown)
            if here in origins:
                text = f"Key '{name.value}' is written twice, first at {origins[here].where}."
                yield Problem(origin.where, text, origin.key)
            origins[here] = origin
            yield from _walk(item, here, origins, shown, (*above, node))


def _origin(node: Any, path: Path, shown: str) -> Origin:
    return Origin(f"{shown}:{node.start_mark.line + 1}", ".".join(map(str, path)))
