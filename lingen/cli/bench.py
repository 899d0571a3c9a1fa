"""Measurements, ``lingen bench ...``: they and what lingen is measured against lie in tests/yardsticks."""

import importlib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "tests" / "yardsticks"
PACKAGE = "lingen_yardsticks"
"""Its name once it is loaded: one that nobody else has, as "tests" would be."""


def yardstick(name: str) -> ModuleType:
    """A module of tests/yardsticks, such as ``stock``."""
    if PACKAGE not in sys.modules:
        spec = spec_from_file_location(PACKAGE, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])
        assert spec is not None and spec.loader is not None
        sys.modules[PACKAGE] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACKAGE])
    return importlib.import_module(f"{PACKAGE}.{name}")


if FOLDER.is_dir():  # a checkout: an installed package does not hold it
    yardstick("commands")  # which register themselves
    yardstick("model_commands")
    yardstick("eval_commands")
