"""Runs the frozen parts of a recipe on clips, and packs the results as the members of a sample."""

import io
import json
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lingen.data.latents import LATENTS_NPY, TEXT
from lingen.frozen import check_ready, is_trained
from lingen.media import as_floats
from lingen.recipe.registry import AUTOENCODERS, TEXT_ENCODERS
from lingen.recipe.sections import Recipe
from lingen.text import TextEncoder, with_frame_rate

STORED_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class Encoders:
    """The frozen parts of a recipe on a device.

    Args:
        recipe: any of the stages.
        device: where they run.
        precision: of what is kept, one of `STORED_DTYPES`; half is enough for latents of a spread near 1 (ours).
    Raises:
        RecipeError: a part lacks something; all of them are named."""

    def __init__(self, recipe: Recipe, device: str, precision: str):
        self.dtype = STORED_DTYPES[precision]
        self.prefix = recipe.data.fps_prefix
        self.device = torch.device(device)
        self.autoencoder = AUTOENCODERS.build(recipe.autoencoder)
        text = {number: TEXT_ENCODERS.build(component) for number, component in enumerate(recipe.text)}
        self.text = {number: part for number, part in text.items() if not is_trained(part)}
        parts: list[nn.Module] = [self.autoencoder, *self.text.values()]
        check_ready(parts)
        for part in parts:
            part.to(self.device).eval().requires_grad_(False)
        self._null: dict[float, dict[int, Tensor]] = {}
        """Frame rate -> number of a text encoder -> tokens [n w] of no text, which it is asked for once."""

    @torch.no_grad()
    def latents(self, clips: Sequence[Tensor]) -> Tensor:
        """uint8 [3 t h w] each -> latents [b c t h w]."""
        return self.autoencoder.encode(as_floats(torch.stack(list(clips)).to(self.device)))

    @torch.no_grad()
    def tokens(self, captions: Sequence[str], fps: float) -> dict[int, list[Tensor]]:
        """Number of a text encoder -> tokens [n w] of each caption."""
        texts = [with_frame_rate(caption, fps if self.prefix else 0.0) for caption in captions]
        found = {}
        for number, encoder in self.text.items():
            tokens, mask = cast(TextEncoder, encoder).encode(texts)
            found[number] = [one[real] for one, real in zip(tokens, mask, strict=True)]
        return found

    def members(self, latents: Tensor, captions: Sequence[str], fps: float, source: str) -> dict[str, bytes]:
        """The members of a sample, as `lingen.data.latents` reads them. ValueError for what is not finite here.

        Args:
            latents: [c t h w]
            captions: at least one.
            fps: of the clip, 0 for an image.
            source: where it came from, for the JSON."""
        if fps not in self._null:
            self._null[fps] = {number: nothing for number, (nothing,) in self.tokens([""], fps).items()}
        tokens, null = self.tokens(captions, fps), self._null[fps]
        about: dict[str, Any] = {"captions": list(captions), "source": source}
        about["tokens"] = {str(number): [len(one) for one in each] for number, each in tokens.items()}
        about["null"] = {str(number): len(nothing) for number, nothing in null.items()}
        told = {number: torch.cat([*each, null[number]]) for number, each in tokens.items()}
        text = {TEXT.format(number): self._npy(each, "text") for number, each in told.items()}
        stored = {LATENTS_NPY: self._npy(latents, "latents"), **text}
        return stored | {"json": json.dumps(about, ensure_ascii=False).encode()}

    def _npy(self, tensor: Tensor, what: str) -> bytes:
        tensor = tensor.to(self.dtype).cpu().contiguous()
        if not torch.isfinite(tensor).all():
            kind = str(self.dtype).removeprefix("torch.")
            raise ValueError(f"{what} not finite: as {kind} they hold NaN or infinity")
        buffer = io.BytesIO()
        np.save(buffer, tensor.numpy(), allow_pickle=False)
        return buffer.getvalue()
