"""A JSON Schema of recipes for editors, from the same signatures that the loader checks."""

import dataclasses
import inspect
import types
from collections import ChainMap
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import COMPONENTS, Registry
from lingen.recipe.sections import Component, Recipe
from lingen.recipe.signature import LISTS, MAPPINGS, REQUIRED, Path, bare, bounds_of, settings_of

Schema = dict[str, Any]
WORDS = {bool: "boolean", int: "integer", float: "number", str: "string"}
REFERENCE = {"type": "string", "pattern": r"\$\{"}
"""``${section.key}`` may stand for any number."""


def json_schema() -> Schema:
    """JSON Schema (draft 2020-12) of a recipe, with every part registered here. A broken plugin has only its name."""
    definitions = {_key(registry): _component_schema(registry) for registry in COMPONENTS.values()}
    recipe = _part_schema(Recipe, ())
    stage = {key: value for key, value in recipe["properties"].items() if key not in ("name", "stage", "stages")}
    definitions["stage"] = {"type": ["object", "null"], "properties": stage, "additionalProperties": False}
    recipe["properties"]["stages"]["additionalProperties"] = {"$ref": "#/$defs/stage"}
    extends = {"type": "string", "description": "name or path of a complete recipe to start from"}
    recipe["properties"] = {"extends": extends} | recipe["properties"]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "lingen recipe"}
    return head | recipe | {"$defs": definitions}


def _part_schema(
    part: Callable[..., Any], path: Path | None, limits: Schema | None = None, given: Collection[str] | None = None
) -> Schema:
    """The settings of a section or of a part (`given`: see `settings_of`); `path` is where a section stands in the
    recipe, `limits` as below."""
    properties = {}
    for name, setting in settings_of(part, given).items():
        registry = COMPONENTS.get((*path, name)) if path is not None else None
        below = (*path, name) if path is not None else None
        one = _component_use(registry, bare(setting.hint)) if registry else _hint_schema(setting.hint, below, limits)
        plain = setting.default is not REQUIRED and not dataclasses.is_dataclass(setting.default)
        notes: Schema = {"description": setting.doc} if setting.doc else {}
        properties[name] = one | notes | ({"default": setting.default} if plain else {})
    section = {"type": "object", "properties": properties, "additionalProperties": False}
    return section | {"description": (inspect.getdoc(part) or "").partition("\n")[0]}


def _component_use(registry: Registry, hint: Any) -> Schema:
    one = {"$ref": f"#/$defs/{_key(registry)}"}
    many = {"type": "array", "items": one}
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    listed = any(get_origin(member) is list for member in members)
    return {"anyOf": [one, *([many] if listed else []), *([{"type": "null"}] if type(None) in members else [])]}


def _component_schema(registry: Registry) -> Schema:
    """A bare word, or a mapping with a name and that part's settings."""
    known, custom = registry.names(), {"type": "string", "pattern": ":"}
    forms: list[Schema] = [{"enum": known}, custom]
    for name in known:
        try:
            one = _part_schema(registry[name], None, given=registry.given)
        except RecipeError:
            one = {"type": "object", "properties": {}}
        one["properties"] = {"name": {"const": name}} | one["properties"]
        forms.append(one | {"required": ["name"]})
    forms.append({"type": "object", "properties": {"name": custom}, "required": ["name"]})
    unnamed = {"type": "object", "not": {"required": ["name"]}, "description": "settings of the part named elsewhere"}
    return {"anyOf": [*forms, unnamed], "description": registry.kind}


def _hint_schema(hint: Any, path: Path | None = None, limits: Schema | None = None) -> Schema:
    """The values of a type; `limits` are the keywords of bounds that hold for each number in them."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        own = [bound.schema for bound in bounds_of(hint)]
        return _hint_schema(arguments[0], path, dict(ChainMap(*own, limits or {})))
    if hint in (int, float):
        return {"anyOf": [{"type": WORDS[hint]} | (limits or {}), REFERENCE]}
    if hint in WORDS:
        return {"type": WORDS[hint]}
    if hint is type(None):
        return {"type": "null"}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_hint_schema(member, path, limits) for member in arguments]}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _part_schema(hint, path, limits)
    if origin is tuple and Ellipsis not in arguments:
        items = [_hint_schema(one, None, limits) for one in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if (origin or hint) in (tuple, *LISTS):
        return {"type": "array", "items": _hint_schema(arguments[0], None, limits)} if arguments else {"type": "array"}
    if (origin or hint) in MAPPINGS:
        values = {} if hint is Component or not arguments else _hint_schema(arguments[1])
        return {"type": "object"} | ({"additionalProperties": values} if values else {})
    return {}


def _key(registry: Registry) -> str:
    return registry.kind.replace(" ", "_")
