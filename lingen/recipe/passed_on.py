"""Settings that a part passes on to the parts inside of it: declared in their signatures, and read from its own."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from lingen.recipe.signature import bare

Part = TypeVar("Part", bound=type)


def passes_on(*parts: Callable[..., Any], **defaults: Any) -> Callable[[Part], Part]:
    """Class decorator: the keyword-only settings of other parts are settings of this one, too.

    They stand in its signature behind its own, with the types, bounds, marks and defaults that they are declared with
    in the other parts, so that they are checked, filled in and documented from there. The constructor takes all of them
    as one mapping, its last argument `flat`, but for those that it declares itself, too; one that is inherited takes
    them as they are. A setting of several parts offers the choices of all and comes last.
    TypeError where parts disagree about the default or the type of a setting; and in the constructor, as for any other,
    for a setting that does not exist.

    Args:
        defaults: those that are others here."""
    found: dict[str, list[inspect.Parameter]] = {}
    for part in parts:
        for name, parameter in inspect.signature(part).parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                found.setdefault(name, []).append(parameter)
    joined = {name: _merged(same) for name, same in sorted(found.items(), key=lambda one: len(one[1]) > 1)}
    joined |= {name: joined[name].replace(default=value) for name, value in defaults.items()}

    def decorate(part: Part) -> Part:
        construct = part.__init__  # type: ignore[misc]
        own, is_own = dict(inspect.signature(construct).parameters), "__init__" in vars(part)
        settings = {name: one for name, one in joined.items() if not is_own or name not in own}
        kept = [one for name, one in own.items() if name != "flat" and name not in settings]
        signature = inspect.Signature([*kept, *settings.values()])

        @functools.wraps(construct)
        def constructing(*positional: Any, **given: Any) -> None:
            bound = signature.bind(*positional, **given)
            bound.apply_defaults()
            flat = {name: bound.arguments.pop(name) for name in settings}
            construct(*bound.args, **bound.kwargs, **({"flat": flat} if is_own else flat))

        constructing.__signature__ = signature  # type: ignore[attr-defined]
        part.__init__ = constructing  # type: ignore[misc]
        return part

    return decorate


def _merged(same: list[inspect.Parameter]) -> inspect.Parameter:
    first, hints = same[0], [parameter.annotation for parameter in same]
    if any(parameter.default != first.default for parameter in same):
        raise TypeError(f"'{first.name}' has several defaults: {', '.join(repr(one.default) for one in same)}.")
    if all(hint == hints[0] for hint in hints):
        return first
    if not all(get_origin(bare(hint)) is Literal for hint in hints):
        raise TypeError(f"'{first.name}' has several types: {', '.join(map(str, hints))}.")
    choices = dict.fromkeys(choice for hint in hints for choice in get_args(bare(hint)))
    joined: Any = Literal[tuple(choices)]
    for note in getattr(hints[0], "__metadata__", ()):
        joined = Annotated[joined, note]
    return first.replace(annotation=joined)
