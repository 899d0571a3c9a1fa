"""What lingen is measured against (stock parts, DiT twins, other loaders) lies beside the tests: tests/yardsticks."""

import importlib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from lingen.recipe.errors import RecipeError

FOLDER = Path(__file__).parents[2] / "tests" / "yardsticks"
PACKAGE = "lingen_yardsticks"
"""Its name once it is loaded: one that nobody else has, as "tests" would be."""


def yardstick(name: str) -> ModuleType:
    """A module of tests/yardsticks, such as ``stock``. RecipeError where lingen was installed without its tests."""
    if PACKAGE not in sys.modules:
        file = FOLDER / "__init__.py"
        if not file.is_file():
            raise RecipeError(
                "What lingen is compared with here lies in tests/yardsticks, which an installed package does not hold: "
                "run this command from a checkout of lingen, installed with pip install -e ."
            )
        spec = spec_from_file_location(PACKAGE, file, submodule_search_locations=[str(FOLDER)])
        assert spec is not None and spec.loader is not None
        sys.modules[PACKAGE] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACKAGE])
    return importlib.import_module(f"{PACKAGE}.{name}")
