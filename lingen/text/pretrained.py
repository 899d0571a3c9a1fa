"""LinGen's three frozen text encoders: known by their widths, so that recipes with them can be checked and planned."""

from typing import Annotated, NoReturn

from jaxtyping import Bool, Float
from torch import Tensor, nn

from lingen.registry import RecipeError, SettingError


class _Frozen(nn.Module):
    """What the three share. `encode` raises RecipeError until the frozen parts arrive."""

    dim: int
    trainable = False

    def __init__(self, path: str | None, max_tokens: int):
        super().__init__()
        if max_tokens < 1:
            raise SettingError("max_tokens", f"max_tokens={max_tokens} must be 1 or more.")
        self.path = path
        self.max_tokens = max_tokens

    def encode(self, texts: list[str]) -> tuple[Float[Tensor, "b n w"], Bool[Tensor, "b n"]]:
        """Raises RecipeError."""
        self.check_ready()

    def check_ready(self) -> NoReturn:
        """What a run asks before it starts. Raises RecipeError."""
        raise RecipeError(
            f"The text encoder '{type(self).__name__.lower()}' can be planned with but not run: it arrives with "
            "the frozen parts in a later release. Meanwhile use 'words' or 'bytes', which are trained along."
        )


class UL2(_Frozen):
    """UL2's encoder (arXiv 2205.05131), width 4096: what the prompt means. It comes in a later release."""

    dim = 4096

    def __init__(
        self,
        *,
        path: Annotated[str | None, "its weights"] = None,
        max_tokens: Annotated[int, "tokens that are read (ours)"] = 512,
    ):
        super().__init__(path, max_tokens)


class ByT5(_Frozen):
    """ByT5-small's encoder (arXiv 2105.13626), width 1472: bytes, for written text. It comes in a later release."""

    dim = 1472

    def __init__(
        self,
        *,
        path: Annotated[str | None, "its weights"] = None,
        max_tokens: Annotated[int, "bytes that are read (ours)"] = 256,
    ):
        super().__init__(path, max_tokens)


class MetaCLIP(_Frozen):
    """MetaCLIP-H14's text tower (arXiv 2309.16671), width 1280: how the clip looks. It comes in a later release."""

    dim = 1280

    def __init__(
        self,
        *,
        path: Annotated[str | None, "its weights"] = None,
        max_tokens: Annotated[int, "tokens that are read; the long-prompt variant takes 256"] = 77,
    ):
        super().__init__(path, max_tokens)
