"""The models of a stage, trained or not: what makes clips needs no trainer, and importing Lightning takes seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from lingen import flow
from lingen.blocks.layers import decays
from lingen.frozen import is_trained
from lingen.media import as_floats
from lingen.model import LinGen, resize_tables
from lingen.ranks.heartbeat import sign
from lingen.recipe.registry import AUTOENCODERS, TEXT_ENCODERS
from lingen.recipe.sections import Recipe
from lingen.text import TextEncoder, replace_rows, with_frame_rate

if TYPE_CHECKING:
    from lingen.training.average import AveragedWeights

TokensByEncoder = Mapping[int, tuple[Tensor, Tensor]]
"""Number of a text encoder -> tokens [b n w] and their mask [b n]."""


class StageModules(nn.Module):
    """The modules of a stage. Frozen ones run without gradients and stay out of checkpoints.

    Args:
        recipe: a loaded stage."""

    optional: tuple[str, ...] = ()
    """Prefixes of names that only some stages have: weights to load may lack them, and may hold ones that are not
    used."""
    decayed: frozenset[str]
    """Names of the trained parameters that weight decay pulls at, noted before a strategy replaces them: tags are
    lost."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        self.average: AveragedWeights | None = None
        """While it trains."""

    def frozen_parts(self) -> dict[str, nn.Module]:
        """Prefix of the parameters' names -> the frozen parts."""
        raise NotImplementedError

    def fitted(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Trained weights of another stage, in the sizes of this one."""
        return weights

    def freeze_parts(self) -> None:
        """For the end of a constructor: no gradients for the frozen parts; of the others decay is noted."""
        for part in self.frozen_parts().values():
            part.requires_grad_(False).eval()
        self.decayed = frozenset(name for name, p in self.trained_parameters().items() if decays(p))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter that the optimiser moves."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def trained_state(self) -> dict[str, Tensor]:
        """`state_dict` without the frozen parts."""
        frozen = tuple(self.frozen_parts())
        return {name: value for name, value in self.state_dict().items() if not name.startswith(frozen)}

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for part in self.frozen_parts().values():
            part.eval()
        return self

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Inside the block the parameters hold the averaged values; a module loaded for sampling holds only those."""
        return self.average.applied() if self.average is not None else nullcontext()


class TextToVideo(StageModules):
    """A denoiser with its text encoders and its autoencoder: what clips are made with, and what `LinGenModule` trains.

    Trained parts are the denoiser and those text encoders that are `trainable`.

    Args:
        recipe: a loaded stage."""

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.model = LinGen(recipe.model)
        self.text = nn.ModuleList(TEXT_ENCODERS.build(component) for component in recipe.text)
        self.autoencoder = AUTOENCODERS.build(recipe.autoencoder)
        self.freeze_parts()

    @property
    def device(self) -> torch.device:
        """Of the denoiser."""
        return self.model.patchify.weight.device

    def frozen_parts(self) -> dict[str, nn.Module]:
        """Prefix of the parameters' names -> the frozen parts."""
        parts = {f"text.{i}.": encoder for i, encoder in enumerate(self.text) if not is_trained(encoder)}
        return {**parts, "autoencoder.": self.autoencoder}

    def fitted(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Positional tables of another size are resized (`resize_tables`)."""
        own = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
        resized = resize_tables(own, self.recipe.model)
        return weights | {f"model.{name}": value for name, value in resized.items()}

    def encode_clips(self, clips: Tensor) -> Tensor:
        """uint8 [b 3 t h w] -> latents [b c t h w]; what is latents already stays as it is."""
        if clips.is_floating_point():
            return clips
        with torch.no_grad():
            return self.autoencoder.encode(as_floats(clips))

    def encode_text(
        self, captions: list[str], fps: float, stored: TokensByEncoder = MappingProxyType({}),
        null: TokensByEncoder = MappingProxyType({}),
    ) -> tuple[tuple[Tensor, Tensor], ...]:  # fmt: skip
        """Captions -> one (tokens [b n w], mask [b n]) per encoder; fps 0 is an image. An empty caption is no text.

        Args:
            stored: number of an encoder -> what it made of these captions before; not read where a caption is empty.
            null: number of an encoder -> what it made of no text at this fps before, a row for each caption."""
        return tuple(
            self.encode_with(number, captions, fps, stored.get(number), null.get(number))
            for number in range(len(self.text))
        )

    def encode_with(
        self, number: int, captions: list[str], fps: float, stored: tuple[Tensor, Tensor] | None = None,
        null: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The tokens and mask of one encoder, as in `encode_text`."""
        sign()  # it may read its weights anew
        encoder = cast(TextEncoder, self.text[number])
        prefix = fps if self.recipe.data.fps_prefix else 0.0
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained(encoder)):
            if stored is None:
                return encoder.encode([with_frame_rate(caption, prefix) for caption in captions])
            kept = stored[0].to(self.model.patchify.weight.dtype), stored[1]
            empty = [row for row, caption in enumerate(captions) if not caption]
            if not empty:
                return kept
            if null is None:
                return replace_rows(kept, empty, encoder.encode([with_frame_rate("", prefix)]))
            return replace_rows(kept, empty, (null[0][empty], null[1][empty]))

    def times_of(self, latents: Sequence[int]) -> flow.Times:
        """Training and sampling times of latents of a size (t, h, w)."""
        return flow.Times(self.recipe.time, math.prod(self.model.grid_of(latents)))

    def latent_size(self, clip: Any) -> tuple[int, int, int]:
        """(frames, height, width) of a clip -> (t, h, w) of its latents; a last partial group of frames is one more."""
        return tuple(math.ceil(n / stride) for n, stride in zip(clip, self.autoencoder.strides, strict=True))  # type: ignore[return-value]
