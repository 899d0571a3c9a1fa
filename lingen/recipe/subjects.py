"""What a recipe can train: whatever differs between the two stands in a row of this table, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lingen.recipe.registry import import_object

if TYPE_CHECKING:
    from lingen.recipe.sections import Recipe


def _later(path: str) -> Callable[..., Any]:
    """What higher rooms know is named as ``module:function`` and imported when it is called, as a registry does, so
    that words need no torch."""
    return lambda *args, **settings: import_object(path)(*args, **settings)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A thing to train."""

    section: str
    """The section of a recipe that says how it is built."""
    encoded: bool
    """May it train on shards of latents, with patches of them as tokens? Else it reads pixels, and has no tokens."""
    build_module: Callable[[Recipe], Any]
    """The LightningModule of a stage."""
    build_weights: Callable[[Recipe], Any]
    """What a stage trains and hands to the next, an nn.Module on the meta device. SettingError or RecipeError where it
    cannot be built or trained."""
    frozen_parts: Callable[..., list[Any]]
    """``(recipe, *, begun=False)``: what a stage uses as it is, on the meta device, so that nothing is read. `begun`:
    there is a checkpoint of the stage, so it needs no weights to start from."""
    plan: Callable[[Recipe], Any]
    """The forecast of a stage."""
    has_critic: Callable[[Recipe], bool]
    """Is a critic trained beside it?"""


SUBJECTS = {
    "denoiser": Subject(
        section="model", encoded=True, build_module=_later("lingen.training.denoiser:LinGenModule"),
        build_weights=_later("lingen.plan.trial:denoiser_on_meta"), plan=_later("lingen.plan.forecast:plan_denoiser"),
        frozen_parts=_later("lingen.plan.trial:parts_of_denoiser"), has_critic=lambda recipe: False,
    ),
    "autoencoder": Subject(
        section="autoencoder", encoded=False, build_module=_later("lingen.training.autoencoder:AutoencoderModule"),
        build_weights=_later("lingen.plan.trial:autoencoder_on_meta"),
        plan=_later("lingen.plan.forecast:plan_autoencoder"),
        frozen_parts=_later("lingen.plan.trial:parts_of_autoencoder"),
        has_critic=lambda recipe: bool(recipe.reconstruction.adversarial),
    ),
}  # fmt: skip
"""`trains` of a recipe -> what it trains."""
