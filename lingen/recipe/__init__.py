"""A recipe in words: registries, sections, layers and what may stand in them; nothing here imports torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lingen.plan.loading import Curriculum, load_curriculum, load_for_training, load_recipe, load_stages
    from lingen.plan.loading import stages_of as stages_of
    from lingen.plan.loading import to_yaml as to_yaml

__all__ = ["Curriculum", "load_curriculum", "load_for_training", "load_recipe", "load_stages", "stages_of", "to_yaml"]


def __getattr__(name: str) -> Any:
    """Loading builds a recipe's parts on the meta device, which is the business of `lingen.plan`."""
    if name in __all__:
        from lingen.plan import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'lingen.recipe' has no attribute '{name}'")
