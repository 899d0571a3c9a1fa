"""How far a fast path is from its slow twin: one measure, and a failure that says what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

FLOOR = 1e-8
"""Below this RMS, what is wanted counts as having this one: a difference to zeros is not infinitely large."""

Values = Tensor | Sequence["Values"] | Mapping[str, "Values"]
"""A tensor, or several in order or by name."""


def relative_error(want: Tensor, got: Tensor, floor: float = FLOOR) -> float:
    """RMS of the difference over RMS of what is wanted, the latter floored; in float64. NaN where either holds one."""
    assert got.shape == want.shape, f"shape {list(got.shape)} instead of {list(want.shape)}"
    want, got = (one.detach().to("cpu", torch.float64) for one in (want, got))
    return ((got - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(floor)).item()


def assert_close(
    name: str, want: Values, got: Values, limit: float | Mapping[str, float], *, floor: float = FLOOR
) -> None:
    """Every tensor's `relative_error` is below the limit, and its shape and dtype are those wanted.

    ``want`` may be float64 whatever ``got`` is: an exact twin. Of several tensors, as outputs or gradients by name,
    there must be as many and the same names, and all that differ are told at once; limits by name name them all.
    What is empty, or not finite on either side, is never close.
    """
    wrong = list(_differences(name, want, got, limit, floor))
    assert not wrong, "\n".join(["not close:", *wrong])


def _differences(
    name: str, want: Values, got: Values, limit: float | Mapping[str, float], floor: float
) -> Iterator[str]:
    if isinstance(want, Tensor) and isinstance(got, Tensor):
        assert not isinstance(limit, Mapping), f"{name} is one tensor and takes one limit"
        difference = _difference(want, got, limit, floor)
        if difference:
            yield f"{name}: {difference}"
        return
    wants, gots = _by_name(want), _by_name(got)
    if wants is None or gots is None or wants.keys() != gots.keys() or not wants:
        yield f"{name}: {_kind(got)} instead of {_kind(want)}"
        return
    for key, one in wants.items():
        yield from _differences(
            f"{name} {key}", one, gots[key], limit[key] if isinstance(limit, Mapping) else limit, floor
        )


def _by_name(values: Values) -> Mapping[str, Values] | None:
    if isinstance(values, Mapping):
        return values
    if isinstance(values, list | tuple):
        return {str(number): value for number, value in enumerate(values)}
    return None


def _kind(values: Values) -> str:
    named = _by_name(values)
    return type(values).__name__ if named is None else f"values called {', '.join(named) or 'nothing'}"


def _difference(want: Tensor, got: Tensor, limit: float, floor: float) -> str:
    """What is wrong with one tensor; "" where nothing is."""
    if got.shape != want.shape:
        return f"shape {list(got.shape)} instead of {list(want.shape)}"
    if got.dtype != want.dtype and want.dtype != torch.float64:
        return f"{got.dtype} instead of {want.dtype}"
    if not want.numel():
        return "empty: nothing is compared"
    for side, values in (("what is wanted", want), ("what came", got)):
        broken = int((~values.isfinite()).sum())
        if broken:
            return f"{broken} of {values.numel()} numbers in {side} are not finite"
    error = relative_error(want, got, floor)
    return "" if error < limit else f"relative error {error:.3g}, limit {limit:.3g}"
