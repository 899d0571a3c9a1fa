"""Signatures as schemas: one rule for the sections of a recipe and for the constructors of its parts.

A dataclass's fields, or a constructor's keyword-only parameters, are the settings that a recipe may give: name, type
hint, default, and in ``Annotated[hint, AtLeast(1), Mark.COURSE, "line"]`` its bounds, its mark (see
`lingen.recipe.bounds`) and a line of documentation. Nothing here imports torch."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import repeat
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, dataclass_transform, get_args, get_origin

from lingen.recipe.bounds import Bound, Mark
from lingen.recipe.errors import SettingError, did_you_mean

REQUIRED = inspect.Parameter.empty
"""The default of a setting that has none."""

Part = TypeVar("Part")
Path = tuple[str | int, ...]
SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
PLURALS = {bool: "true or false", int: "whole numbers", float: "numbers", str: "texts"}
LISTS = (list, set, frozenset, collections.abc.Sequence, collections.abc.Iterable)
MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
CHECKED = (*SCALARS, type(None), None, tuple, *LISTS, *MAPPINGS, Literal, Annotated, Union, types.UnionType)
"""What values are checked against, beside dataclasses; other hints let every value pass."""


class Mistake(NamedTuple):
    """Where below the value that was checked, and one sentence."""

    path: Path
    text: str
    typed: bool = False
    """The value is of its type: only a bound refuses it."""

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path))

    def below(self, key: str | int) -> Mistake:
        return self._replace(path=(key, *self.path))


Found = list[Mistake]


class Setting(NamedTuple):
    """One setting of a part."""

    hint: Any
    """As it is written: bare, or ``Annotated``."""
    default: Any
    doc: str
    mark: Mark | None
    """None where none is written."""


def settings_of(part: Callable[..., Any], given: Collection[str] | None = None) -> dict[str, Setting]:
    """Settings of a dataclass (its fields but for derived ones) or of a class or function: its keyword-only arguments,
    or, where arguments are `given` by others, all but those."""
    if dataclasses.is_dataclass(part):
        space = vars(sys.modules[part.__module__])
        fields = [f for f in dataclasses.fields(part) if not f.metadata.get("derived")]
        made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
        return {f.name: _setting(f.type, made.get(f.name, f.default), space) for f in fields}
    function = inspect.unwrap(part.__init__) if inspect.isclass(part) else inspect.unwrap(part)
    space = getattr(function, "__globals__", {})
    kinds = [inspect.Parameter.KEYWORD_ONLY, *([inspect.Parameter.POSITIONAL_OR_KEYWORD] if given is not None else [])]
    parameters = [p for p in _parameters(part).values() if p.kind in kinds and p.name not in (given or ())]
    return {p.name: _setting(p.annotation, p.default, space) for p in parameters}


def check_settings(
    part: Callable[..., Any], settings: Mapping[str, Any], given: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], Found]:
    """Checks settings against a part's signature and fills in its defaults. Returns the filled settings, lists made
    tuples where the hint says so, and the mistakes.

    Args:
        given: as for `settings_of`; argument -> what gives it."""
    if not callable(part):
        return {}, [Mistake(("name",), f"{_show(part)} is neither a class nor a function.")]
    known = settings_of(part, given)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in _parameters(part).values())
    ours = {key: f"'{key}' is not set here but by {(given or {})[key]}." for key in settings if key in (given or ())}
    extra = {key: value for key, value in settings.items() if key not in known and key not in ours}
    found = [Mistake((key,), text) for key, text in ours.items()]
    found += [] if takes_any else [Mistake((key,), _unknown(key, part, known)) for key in extra]
    filled = dict(extra) if takes_any else {}
    for key, setting in known.items():
        if key in settings:
            filled[key], mistakes = _check(settings[key], setting.hint)
            found += [one.below(key) for one in mistakes]
        elif given is not None and not isinstance(setting.default, (*SCALARS, type(None), type(REQUIRED))):
            pass  # YAML cannot hold it
        elif setting.default is REQUIRED:
            found.append(Mistake((key,), f"'{part.__name__}' needs '{key}': {describe(setting.hint)}."))
        else:
            filled[key] = setting.default
    return filled, found


def checked(part: Any) -> Any:
    """Decorator: a constructor or function itself refuses numbers out of bounds and unknown choices, as the loader
    does. It raises SettingError for the settings that it is given by keyword."""
    is_class = inspect.isclass(part)
    construct = part.__init__ if is_class else part

    @functools.wraps(construct)
    def checking(*positional: Any, **given: Any) -> Any:
        known = {key: setting.hint for key, setting in settings_of(part).items() if key in given}
        found = [one.below(key) for key, hint in known.items() for one in _unfit(given[key], hint)]
        if found:
            raise refusal(found, f"'{part.__name__}'")
        return construct(*positional, **given)

    if not is_class:
        return checking
    part.__init__ = checking
    return part


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def section(part: type[Part]) -> type[Part]:
    """Decorator: a section of a recipe, or of a file like one: a frozen dataclass of keyword arguments, `checked`."""
    made: type[Part] = checked(dataclasses.dataclass(frozen=True, kw_only=True)(part))
    return made


def refusal(found: Found, part: str) -> SettingError:
    """The error of a part's constructor for mistakes in its settings; `part` says which, e.g. ``mixer 'mate'``."""
    return SettingError(str(found[0].path[0]), *(f"{one.text} (at {one.key} of {part})" for one in found))


def check_value(value: Any, hint: Any) -> tuple[Any, str | None]:
    """The value converted to its type hint, and a sentence where it does not fit; hints that cannot be checked pass."""
    converted, found = _check(value, hint)
    return converted, " ".join(one.text if not one.path else f"{one.text} (at {one.key})" for one in found) or None


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
    if _is_union(hint):
        return " or ".join(describe(member, many) for member in arguments)
    if origin is tuple and Ellipsis not in arguments:
        same = len(set(arguments)) == 1
        return f"{len(arguments)} {describe(arguments[0], many=True)}" if same else f"a list of {len(arguments)}"
    if (origin or hint) in (tuple, *LISTS):
        return f"a list of {describe(arguments[0], many=True)}" if arguments else "a list"
    if (origin or hint) in MAPPINGS or dataclasses.is_dataclass(hint):
        return "mappings" if many else "a mapping"
    return getattr(hint, "__name__", str(hint))


def bare(hint: Any) -> Any:
    """A type hint without what ``Annotated`` says of it."""
    return bare(get_args(hint)[0]) if get_origin(hint) is Annotated else hint


def bounds_of(hint: Any) -> list[Bound]:
    """The bounds that are written beside a type."""
    return [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Bound)]


def _parameters(part: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(part).parameters
    except (TypeError, ValueError):  # written in C: it has no signature
        return {}


def _setting(annotation: Any, default: Any, space: dict[str, Any]) -> Setting:
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, dict(space))  # resolves the strings of `from __future__ import annotations`
        except Exception:  # a name that only a type checker imports: such a setting is not checked
            annotation = Any
    annotation = Any if annotation is REQUIRED else annotation
    default = REQUIRED if default is dataclasses.MISSING else default
    notes = getattr(annotation, "__metadata__", ())
    doc = next((note for note in notes if isinstance(note, str)), "")
    return Setting(annotation, default, doc, next((note for note in notes if isinstance(note, Mark)), None))


def _unknown(key: str, part: Callable[..., Any], known: Mapping[str, Setting]) -> str:
    name = getattr(part, "__name__", str(part))
    if dataclasses.is_dataclass(part) and key in {f.name for f in dataclasses.fields(part)}:
        return f"Key '{key}' of '{name}' is worked out from the rest of the recipe; take it out."
    others = f" Known: {', '.join(known)}." if known else " It has no settings."
    return f"Key '{key}' not in '{name}'.{did_you_mean(key, known) or others}"


def _check(value: Any, hint: Any) -> tuple[Any, Found]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        converted, found = _check(value, arguments[0])
        return converted, [*found, *_out_of_bounds(converted, hint)]
    if _is_union(hint):
        return _check_union(value, hint, arguments)
    if origin is Literal:
        value = "off" if value is False and "off" in arguments else value  # how YAML reads that word
        fits = any(value == choice and type(value) is type(choice) for choice in arguments)
        return value, [] if fits else _expected(hint, value, did_you_mean(str(value), map(str, arguments)))
    if hint in SCALARS:
        return _check_scalar(value, hint)
    if hint is None or hint is type(None):
        return value, [] if value is None else _expected(hint, value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _check_section(value, hint)
    if (origin or hint) in (tuple, *LISTS, *MAPPINGS):
        return _check_entries(value, hint, origin or hint, arguments)
    return value, []


def _unfit(value: Any, hint: Any) -> Found:
    """What bounds and choices refuse of a value that is taken to be of its type."""
    return _check(value, bare(hint))[1] if get_origin(bare(hint)) is Literal else _out_of_bounds(value, hint)


def _out_of_bounds(value: Any, hint: Any) -> Found:
    """Numbers that the hint's bounds refuse: the value itself, or those in a list or section."""
    members = get_args(bare(hint)) if _is_union(bare(hint)) else ()
    instead = "".join(f" or {describe(one)}" for one in members if one not in (int, float))
    return list(_refused(value, bounds_of(hint), instead))


def _refused(value: Any, bounds: list[Bound], instead: str = "") -> Iterator[Mistake]:
    items = vars(value) if dataclasses.is_dataclass(value) else value
    if isinstance(items, (Mapping, list, tuple)):
        pairs = items.items() if isinstance(items, Mapping) else enumerate(items)
        yield from (one.below(key) for key, item in pairs for one in _refused(item, bounds))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        told = [f"Expected {bound.text}{instead}, got {value:g}." for bound in bounds if not bound.holds(value)]
        yield from (Mistake((), text, typed=True) for text in told[:1])


def _check_scalar(value: Any, hint: type) -> tuple[Any, Found]:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value), []
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)) and value == value:
        return value, []
    cure = " Put it in quotes." if hint is str and isinstance(value, (bool, int, float)) else ""
    return value, _expected(hint, value, cure)


def _check_union(value: Any, hint: Any, members: tuple[Any, ...]) -> tuple[Any, Found]:
    known = [one for one in members if (get_origin(one) or one) in CHECKED or dataclasses.is_dataclass(one)]
    if all(member is type(None) for member in known):
        return value, []
    tried = [_check(value, member) for member in known]
    fitting = [converted for converted, found in tried if not found]
    if fitting:
        return next((converted for converted in fitting if type(converted) is type(value)), fitting[0]), []
    pairs = zip(known, (found for _, found in tried), strict=True)
    alike = [found for one, found in pairs if _same_shape(value, one) or all(mistake.typed for mistake in found)]
    return value, alike[0] if len(alike) == 1 else _expected(hint, value)


def _check_section(value: Any, section: Any) -> tuple[Any, Found]:
    if value is None:  # a section whose lines are all commented out
        value = {}
    if not isinstance(value, Mapping):
        text = f"Expected a mapping with the settings of '{section.__name__}', got {_show(value)}."
        return value, [Mistake((), text)]
    filled, found = check_settings(section, value)
    if not all(one.typed for one in found):
        return value, found
    try:
        # Numbers out of bounds are in `found`; what does not go together is told beside them.
        made = object.__new__(section)
        inspect.unwrap(section.__init__)(made, **filled)
        return made, found
    except SettingError as error:  # of its `__post_init__`
        return value, [*found, Mistake((error.setting,), str(error))]


def _check_entries(value: Any, hint: Any, kind: Any, arguments: tuple[Any, ...]) -> tuple[Any, Found]:
    """Each entry of a list, a tuple or a mapping; a tuple of a given length has a hint for each."""
    is_mapping, each = kind in MAPPINGS, bool(arguments) and kind is tuple and arguments[-1] is not Ellipsis
    value = {} if value is None and is_mapping else value
    if not isinstance(value, Mapping if is_mapping else (list, tuple)):
        return value, _expected(hint, value)
    if each and len(value) != len(arguments):
        return value, [Mistake((), f"Expected {describe(hint)}, got {len(value)}.")]
    hints = arguments if each else repeat(arguments[is_mapping] if arguments else Any)
    items = value if isinstance(value, Mapping) else dict(enumerate(value))
    checked = {key: _check(item, one) for (key, item), one in zip(items.items(), hints, strict=False)}
    found = [one.below(key) for key, (_, mistakes) in checked.items() for one in mistakes]
    if is_mapping:
        return {key: item for key, (item, _) in checked.items()}, found
    return (tuple if kind is tuple else list)(item for item, _ in checked.values()), found


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _same_shape(value: Any, hint: Any) -> bool:
    kind = get_origin(hint) or hint
    if isinstance(value, (list, tuple)):
        return kind in (tuple, *LISTS)
    return isinstance(value, Mapping) and (kind in MAPPINGS or dataclasses.is_dataclass(hint))


def _expected(hint: Any, value: Any, cure: str = "") -> Found:
    return [Mistake((), f"Expected {describe(hint)}, got {_show(value)}.{cure}")]


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else text[:77] + "..."
