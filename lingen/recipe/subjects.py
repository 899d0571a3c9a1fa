"""What a recipe can train: whatever differs between the two stands in a row of this table, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lingen.recipe.registry import import_object

if TYPE_CHECKING:
    from lingen.recipe.sections import Recipe


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A thing to train. What higher rooms know of it is named as ``module:object`` and imported when it is asked for,
    as a registry does, so that words need no torch."""

    section: str
    """The section of a recipe that says how it is built."""
    encoded: bool
    """May it train on shards of latents, with patches of them as tokens? Else it reads pixels, and has no tokens."""
    module: str
    """LightningModule: ``(recipe)``."""
    weights: str
    """``(recipe) -> nn.Module`` whose weights a stage hands to the next, on the meta device."""
    frozen: str
    """``(recipe, *, begun) -> list`` of what a stage uses as it is, on the meta device."""
    forecast: str
    """``(recipe) -> Plan``."""
    has_critic: Callable[[Recipe], bool]
    """Is a critic trained beside it?"""

    def build_module(self, recipe: Recipe) -> Any:
        """The LightningModule of a stage."""
        return import_object(self.module)(recipe)

    def build_weights(self, recipe: Recipe) -> Any:
        """What a stage trains, on the meta device. SettingError or RecipeError where it cannot be built or trained."""
        return import_object(self.weights)(recipe)

    def frozen_parts(self, recipe: Recipe, *, begun: bool = False) -> list[Any]:
        """What a stage uses as it is, on the meta device: nothing is read. `begun`: there is a checkpoint of the stage,
        so it needs no weights to start from."""
        return import_object(self.frozen)(recipe, begun=begun)

    def plan(self, recipe: Recipe) -> Any:
        """The forecast of a stage."""
        return import_object(self.forecast)(recipe)


SUBJECTS = {
    "denoiser": Subject(
        section="model", encoded=True, module="lingen.training.denoiser:LinGenModule",
        weights="lingen.plan.trial:denoiser_on_meta", frozen="lingen.plan.trial:parts_of_denoiser",
        forecast="lingen.plan.forecast:plan_denoiser", has_critic=lambda recipe: False,
    ),
    "autoencoder": Subject(
        section="autoencoder", encoded=False, module="lingen.training.autoencoder:AutoencoderModule",
        weights="lingen.plan.trial:autoencoder_on_meta", frozen="lingen.plan.trial:parts_of_autoencoder",
        forecast="lingen.plan.autoencoder:plan_autoencoder",
        has_critic=lambda recipe: bool(recipe.reconstruction.adversarial),
    ),
}  # fmt: skip
"""`trains` of a recipe -> what it trains."""
