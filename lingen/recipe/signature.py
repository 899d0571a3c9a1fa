"""The signature is the schema: one rule for the sections of a recipe and for the constructors of its parts.

A dataclass's fields, or a constructor's keyword-only parameters, are the settings that a recipe may give: name, type
hint, default, and a line of documentation in ``Annotated[hint, "line"]``. Nothing here imports torch.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from lingen.recipe.registry import SettingError, did_you_mean

REQUIRED = inspect.Parameter.empty
"""The default of a setting that has none."""

Path = tuple[str | int, ...]
Found = list[tuple[Path, str]]
"""Mistakes: where below the value that was checked, and one sentence."""

SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
PLURALS = {bool: "true or false", int: "whole numbers", float: "numbers", str: "texts"}
LISTS = (list, set, frozenset, collections.abc.Sequence, collections.abc.Iterable)
MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


class Setting(NamedTuple):
    """One setting of a part."""

    hint: Any
    default: Any
    doc: str


def settings_of(part: Callable[..., Any], *, positional: bool = False) -> dict[str, Setting]:
    """Settings of a dataclass (its fields, but for derived ones) or of a class or function (keyword-only parameters).

    Args:
        positional: also take parameters that may be given by position, as constructors outside lingen have them.
    """
    if dataclasses.is_dataclass(part):
        space = vars(sys.modules[part.__module__])
        fields = [f for f in dataclasses.fields(part) if not f.metadata.get("derived")]
        return {f.name: _setting(f.type, _field_default(f), space) for f in fields}
    wanted = {inspect.Parameter.KEYWORD_ONLY} | ({inspect.Parameter.POSITIONAL_OR_KEYWORD} if positional else set())
    function = inspect.unwrap(part.__init__) if inspect.isclass(part) else inspect.unwrap(part)
    space = getattr(function, "__globals__", {})
    parameters = _parameters(part).values()
    return {p.name: _setting(p.annotation, p.default, space) for p in parameters if p.kind in wanted}


def check_settings(
    part: Callable[..., Any], settings: Mapping[str, Any], *, positional: bool = False
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Checks settings against a part's signature and fills in its defaults.

    Returns the filled settings, lists made tuples where the hint says so, and the mistakes as (dotted key, sentence).
    """
    if not callable(part):
        return {}, [("name", f"{_show(part)} is neither a class nor a function.")]
    filled, found = _check_keys(part, settings, positional)
    return filled, [(".".join(map(str, path)), text) for path, text in found]


def check_value(value: Any, hint: Any) -> tuple[Any, str | None]:
    """The value as its type hint wants it, and a sentence where it does not fit; what cannot be checked fits."""
    converted, found = _check(value, hint)
    return converted, " ".join(text if not path else f"{text} (at {path})" for path, text in found) or None


def as_plain(value: Any) -> Any:
    """Dataclasses as dicts of their settings, tuples as lists: what YAML and JSON can hold."""
    if dataclasses.is_dataclass(value):
        return {name: as_plain(getattr(value, name)) for name in settings_of(type(value))}
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    return [as_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def describe(hint: Any, many: bool = False) -> str:
    """A type hint in words, e.g. ``3 whole numbers or null``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return describe(arguments[0], many)
    if hint in SCALARS:
        return (PLURALS if many else SCALARS)[hint]
    if hint is None or hint is type(None):
        return "null"
    if origin is Literal:
        return " or ".join(_show(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(member, many) for member in arguments)
    if origin is tuple and Ellipsis not in arguments:
        same = len(set(arguments)) == 1
        return f"{len(arguments)} {describe(arguments[0], many=True)}" if same else f"a list of {len(arguments)}"
    if (origin or hint) in (tuple, *LISTS):
        return f"a list of {describe(arguments[0], many=True)}" if arguments else "a list"
    if (origin or hint) in MAPPINGS or dataclasses.is_dataclass(hint):
        return "mappings" if many else "a mapping"
    return getattr(hint, "__name__", str(hint))


def _field_default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def _parameters(part: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(part).parameters
    except (TypeError, ValueError):  # written in C: nothing is known of it
        return {}


def _setting(annotation: Any, default: Any, space: dict[str, Any]) -> Setting:
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, dict(space))  # what `from __future__ import annotations` put off
        except Exception:  # a name that only a type checker imports: such a setting is not checked
            annotation = Any
    if annotation is REQUIRED:
        annotation = Any
    doc = next((note for note in getattr(annotation, "__metadata__", ()) if isinstance(note, str)), "")
    return Setting(get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation, default, doc)


def _check_keys(
    part: Callable[..., Any], settings: Mapping[str, Any], positional: bool = False
) -> tuple[dict[str, Any], Found]:
    known = settings_of(part, positional=positional)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in _parameters(part).values())
    extra = {key: value for key, value in settings.items() if key not in known}
    found: Found = [] if takes_any else [((key,), _unknown(key, part, known)) for key in extra]
    filled = dict(extra) if takes_any else {}
    for key, setting in known.items():
        if key in settings:
            filled[key], mistakes = _check(settings[key], setting.hint)
            found += [((key, *path), text) for path, text in mistakes]
        elif setting.default is REQUIRED:
            found.append(((key,), f"'{part.__name__}' needs '{key}': {describe(setting.hint)}."))
        else:
            filled[key] = setting.default
    return filled, found


def _unknown(key: str, part: Callable[..., Any], known: Mapping[str, Setting]) -> str:
    name = getattr(part, "__name__", str(part))
    if dataclasses.is_dataclass(part) and key in {f.name for f in dataclasses.fields(part)}:
        return f"Key '{key}' of '{name}' is worked out from the rest of the recipe; take it out."
    return f"Key '{key}' not in '{name}'.{did_you_mean(key, known)}" + ("" if known else " It has no settings.")


def _check(value: Any, hint: Any) -> tuple[Any, Found]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _check(value, arguments[0])
    if origin in (Union, types.UnionType):
        return _check_union(value, hint, arguments)
    if origin is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in arguments)
        return value, [] if fits else [((), _expected(hint, value) + did_you_mean(str(value), map(str, arguments)))]
    if hint in SCALARS:
        return _check_scalar(value, hint)
    if hint is None or hint is type(None):
        return value, [] if value is None else [((), _expected(hint, value))]
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _check_section(value, hint)
    if (origin or hint) is tuple:
        return _check_tuple(value, hint, arguments)
    if (origin or hint) in LISTS:
        return _check_items(value, hint, arguments)
    if (origin or hint) in MAPPINGS:
        return _check_mapping(value, hint, arguments)
    return value, []


def _check_scalar(value: Any, hint: type) -> tuple[Any, Found]:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value), []
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)) and value == value:
        return value, []
    cure = " Put it in quotes." if hint is str and isinstance(value, (bool, int, float)) else ""
    return value, [((), _expected(hint, value) + cure)]


def _check_union(value: Any, hint: Any, members: tuple[Any, ...]) -> tuple[Any, Found]:
    known = [member for member in members if _checkable(member)]
    if all(member is type(None) for member in known):
        return value, []
    tried = [_check(value, member) for member in known]
    fitting = [converted for converted, found in tried if not found]
    if fitting:
        return next((converted for converted in fitting if type(converted) is type(value)), fitting[0]), []
    alike = [found for member, (_, found) in zip(known, tried, strict=True) if _same_shape(value, member)]
    return value, alike[0] if len(alike) == 1 else [((), _expected(hint, value))]


def _check_section(value: Any, section: type) -> tuple[Any, Found]:
    if value is None:  # a section whose lines are all commented out
        value = {}
    if not isinstance(value, Mapping):
        return value, [((), f"Expected a mapping with the settings of '{section.__name__}', got {_show(value)}.")]
    filled, found = _check_keys(section, value)
    if found:
        return value, found
    try:
        return section(**filled), []
    except SettingError as error:  # of its `__post_init__`
        return value, [((error.setting,), str(error))]


def _check_tuple(value: Any, hint: Any, arguments: tuple[Any, ...]) -> tuple[Any, Found]:
    if not arguments or arguments[-1] is Ellipsis:
        items, found = _check_items(value, hint, arguments)
        return (tuple(items) if isinstance(items, list) else items), found
    if not isinstance(value, (list, tuple)):
        return value, [((), _expected(hint, value))]
    if len(value) != len(arguments):
        return value, [((), f"Expected {describe(hint)}, got {len(value)}.")]
    checked = [_check(item, one) for item, one in zip(value, arguments, strict=True)]
    return tuple(item for item, _ in checked), _below(checked)


def _check_items(value: Any, hint: Any, arguments: tuple[Any, ...]) -> tuple[Any, Found]:
    if not isinstance(value, (list, tuple)):
        return value, [((), _expected(hint, value))]
    checked = [_check(item, arguments[0] if arguments else Any) for item in value]
    return [item for item, _ in checked], _below(checked)


def _check_mapping(value: Any, hint: Any, arguments: tuple[Any, ...]) -> tuple[Any, Found]:
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        return value, [((), _expected(hint, value))]
    checked = {key: _check(item, arguments[1] if arguments else Any) for key, item in value.items()}
    found = [((key, *path), text) for key, (_, mistakes) in checked.items() for path, text in mistakes]
    return {key: item for key, (item, _) in checked.items()}, found


def _below(checked: list[tuple[Any, Found]]) -> Found:
    return [((index, *path), text) for index, (_, found) in enumerate(checked) for path, text in found]


def _checkable(hint: Any) -> bool:
    kind = get_origin(hint) or hint
    known = (*SCALARS, type(None), None, tuple, *LISTS, *MAPPINGS, Literal, Annotated, Union, types.UnionType)
    return kind in known or dataclasses.is_dataclass(hint)


def _same_shape(value: Any, hint: Any) -> bool:
    kind = get_origin(hint) or hint
    if isinstance(value, (list, tuple)):
        return kind in (tuple, *LISTS)
    return isinstance(value, Mapping) and (kind in MAPPINGS or dataclasses.is_dataclass(hint))


def _expected(hint: Any, value: Any) -> str:
    return f"Expected {describe(hint)}, got {_show(value)}."


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else text[:77] + "..."
