"""Movie Gen's temporal autoencoder: known by its sizes, so that recipes with it can be checked and planned."""

from typing import Annotated, NoReturn

from jaxtyping import Float
from torch import Tensor, nn

from lingen.blocks.layers import check_sizes
from lingen.registry import RecipeError, SettingError


class TAE(nn.Module):
    """Temporal autoencoder (Movie Gen, arXiv 2410.13720, section 3.1.1); network and weights come in a later release.

    Constructing it is enough for `lingen show` and `lingen plan`; `encode` and `decode` raise RecipeError.
    Raises SettingError for strides or channels below 1.
    """

    def __init__(
        self,
        *,
        path: Annotated[str | None, "its weights"] = None,
        strides: Annotated[tuple[int, int, int], "pixels per latent in t, h, w"] = (8, 8, 8),
        channels: Annotated[int, "channels of a latent"] = 16,
    ):
        super().__init__()
        check_sizes("strides", strides)
        if channels < 1:
            raise SettingError("channels", f"channels={channels} must be 1 or more.")
        self.path = path
        self.strides = tuple(strides)
        self.channels = channels

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b c _t _h _w"]:
        """Raises RecipeError."""
        self.check_ready()

    def decode(self, latents: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b 3 _t _h _w"]:
        """Raises RecipeError."""
        self.check_ready()

    def check_ready(self) -> NoReturn:
        """What a run asks before it starts. Raises RecipeError."""
        raise RecipeError(
            "The autoencoder 'tae' can be planned with but not run: its network and weights come in a later release. "
            "Meanwhile train in pixel space with 'autoencoder: pixels'."
        )
