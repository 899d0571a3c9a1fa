"""Shapes are types, checked while testing: whoever writes them is held to them."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isgeneratorfunction

import jaxtyping
from beartype import BeartypeConf, beartype

from tests.helpers.commands import ROOT

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An integer is a float as well, as PEP 484 says."""


def watched() -> list[str]:
    """Every module of lingen that writes shapes, in whichever room."""
    files = sorted((ROOT / "lingen").rglob("*.py"))
    # A package's name would bring all below it, and what Triton compiles cannot be wrapped by a type checker.
    plain = [file for file in files if file.stem != "__init__" and not file.stem.endswith("_triton")]
    return [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in plain
        if "\nfrom jaxtyping import " in file.read_text(encoding="utf-8")
    ]


def watch() -> None:
    """Before any module of lingen is imported.

    Generators are left out: jaxtyping makes plain functions of them, and ``torch.no_grad()`` around one of those ends
    before its first step.
    """
    checked = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker: Callable) -> Callable:
        wrap = checked(typechecker=typechecker)
        return lambda one: one if isgeneratorfunction(one) else wrap(one)

    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook(watched(), f"{__name__}.check")
