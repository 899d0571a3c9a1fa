"""LinGen, the denoiser (arXiv 2412.09856, Figure 2): patchify, blocks of a swappable mixer, unpatchify."""

import logging
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from lingen.blocks.block import Block, mixers_of
from lingen.blocks.layers import RMSNorm, cut_patches, join_patches, stays_float32, undecayed
from lingen.blocks.positions import Positions, resize_tables
from lingen.blocks.recompute import activation_bytes, kept_by_blocks
from lingen.flow import along
from lingen.kernels.choice import device_type, full_precision
from lingen.kernels.fp8 import input_dtype
from lingen.kernels.kept import ALL
from lingen.kernels.modulate import modulate
from lingen.recipe.sections import LinGenConfig, Triple

log = logging.getLogger("lingen")

__all__ = ["LinGen", "Text", "token_grid", "resize_tables"]

TIME_FEATURES, PHASE_FEATURES = 256, 32
SMALLEST_TIME_LEFT = 0.05
"""Floor of 1 - time where the clean clip is predicted, see `LinGen`."""

Text = tuple[tuple[Float[Tensor, "b _ _"], Shaped[Tensor, "b _"]], ...]
"""One (tokens [b n w], mask [b n]) per text encoder; n and w differ between encoders, a False is padding. Of an encoder
that tells `parts` the mask holds numbers: 0 for padding, else of the part, from 1."""


class LinGen(nn.Module):
    """Predicts the velocity of flow matching; time 0 is noise, 1 is data.

    The positions enter the normed input of each mixer and never the residual stream. Timestep and modulation are
    computed in float32 at least, under autocast too.

    A text encoder that tells the parts of a text, such as "a bee flies, then a cow jumps", has each frame attend to its
    own part alone, whose mean `pool_text` takes, and how far that part has come joins the timestep's embedding [ours].

    With `predict: clip` the last layer puts out the clean clip, which is easier to learn where a patch holds more
    numbers than a token, because it holds no noise; `forward` still returns a velocity, (clip - latents) / max(1 -
    time, 0.05). The floor keeps both the sampler and the weight 1 / (1 - time)^2, which a loss in velocity puts on the
    clip's error, finite (at most 400). Training and sampling share the formula, so the velocity stays right above time
    0.95 as well: there the best output is latents + 0.05 velocity, a point a little beyond the clip.

    Where `checkpointing` is a number of GiB, `lingen.blocks.recompute.kept_by_blocks` says for the tokens of the batch
    what of each block is kept for the backward pass. RecipeError or SettingError for a
    mixer or a setting that does not exist or does not fit the width.

    Args:
        config: the model's settings, with the derived fields filled."""

    def __init__(self, config: LinGenConfig):
        super().__init__()
        self.config = config
        self._kept: dict[tuple[int, bool, str], list[int]] = {}
        dim, numbers = config.dim, config.channels * math.prod(config.patch)
        self.patchify = nn.Linear(numbers, dim)
        self.positions = Positions(config.max_grid, dim, config.position_std)
        self.time = TimeEmbedding(dim)
        self.text = TextJoin(dim, config.text_dims)
        self.pool_text = nn.Linear(dim, dim) if config.pool_text else None
        self.phase = _zeroed(nn.Linear(PHASE_FEATURES, dim)) if config.text_parts else None
        self.blocks = nn.ModuleList(Block(config, mixer, layer) for mixer, layer in mixers_of(config))
        self.norm = RMSNorm(dim)
        self.modulation = undecayed(nn.Parameter(torch.zeros(2, dim)))
        self.unpatchify = _zeroed(nn.Linear(dim, numbers))

    def forward(
        self, latents: Float[Tensor, "b c t h w"], time: Float[Tensor, "b *frames"], text: Text, condition: Any = None
    ) -> Float[Tensor, "b c t h w"]:
        """Velocity at `latents` and `time`, in the latents' dtype. ValueError names what does not fit the model.

        Args:
            latents: an image has t = 1.
            time: [b], or [b t] with a time for each latent frame.
            text: one (tokens, mask) per encoder. A row without any unmasked token is told "no text" by a learned token.
            condition: reserved for image-to-video."""
        self._check(latents, time, text, condition)
        if torch.is_grad_enabled() and any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            torch.set_autocast_cache_enabled(False)  # until autocast ends: each weight, and its copy, is used once
        grid = self.grid_of(latents.shape[2:])
        tokens, parts = self.text(text, len(latents))
        seen, phase = seen_by_frames(parts, 1 if self.phase is None else grid[0])
        pooled = None
        if self.pool_text is not None:
            weight = seen.to(tokens.dtype)[..., None]
            pooled = _linear(self.pool_text, (tokens[:, None] * weight).sum(2) / weight.sum(2))
        if self.phase is not None:
            pooled = _linear(self.phase, waves(phase)) + (0 if pooled is None else pooled)
        # [b] -> [b 1]; [b t] -> the mean over each token's frames.
        frames = self.config.patch[0]
        of_token = _repeat_last(time, 1, frames).unflatten(1, (-1, frames)).mean(2) if time.ndim > 1 else time[:, None]
        embedding, modulation = self.time(of_token, pooled)
        # The residual stream keeps the dtype of the weights: float32 under autocast.
        dtype = self.patchify.weight.dtype
        x = self.patchify(cut_patches(_repeat_last(latents, 2, frames), self.config.patch).to(dtype)).to(dtype)
        positions = self.positions(grid).to(x.dtype)
        for block, level in zip(self.blocks, self._levels(x), strict=False):
            x = block(x, positions, modulation, tokens, seen, level)
        shift, scale = (embedding[:, :, None] + self.modulation).unbind(2)
        dtype = torch.promote_types(dtype, torch.float32)  # that of `_linear`
        _, normed = modulate(x, weight=self.norm.weight, shift=shift, scale=scale, eps=self.norm.eps, dtype=dtype)
        assert isinstance(normed, Tensor)
        out = _linear(self.unpatchify, normed)
        out = join_patches(out, self.config.patch)[:, :, : latents.shape[2]].to(latents.dtype)
        if self.config.predict == "velocity":
            return out
        return (out - latents) / along(1 - time, latents).clamp(min=SMALLEST_TIME_LEFT).to(latents.dtype)

    def grid_of(self, size: Sequence[int]) -> Triple:
        """Tokens (t, h, w) of latents of size (t, h, w). ValueError where the patch does not divide them."""
        return token_grid(size, self.config.patch)

    def _levels(self, x: Tensor) -> Sequence[int]:
        """What each block keeps for the backward pass."""
        if not torch.is_grad_enabled():
            return [ALL] * len(self.blocks)
        where = x[..., 0].numel(), input_dtype(None, x).itemsize == 2, device_type(x)
        if where not in self._kept:
            levels = self._kept[where] = kept_by_blocks(self.config, *where)
            if not isinstance(self.config.checkpointing, bool):
                size = activation_bytes(self.config, where[0], levels, *where[1:])
                _say(*map(levels.count, range(ALL + 1)), size)
        return self._kept[where]

    def _check(self, latents: Tensor, time: Tensor, text: Text, condition: Any) -> None:
        b, c, t = latents.shape[:3]
        if condition is not None:
            raise ValueError("condition is reserved for image-to-video and must be None.")
        if c != self.config.channels:
            raise ValueError(f"The latents have {c} channels; this model takes {self.config.channels}.")
        if tuple(time.shape) not in ((b,), (b, t)):
            raise ValueError(f"time has shape {list(time.shape)}; give [{b}], or [{b}, {t}] for one per latent frame.")
        rows, widths = {len(tokens) for tokens, _ in text}, [tokens.shape[-1] for tokens, _ in text]
        if widths != list(self.config.text_dims):
            raise ValueError(f"text has tokens of widths {widths}; this model takes {list(self.config.text_dims)}.")
        if rows - {b}:
            raise ValueError(f"text has {min(rows - {b})} rows for {b} latents; give one row for each.")


@stays_float32
class TimeEmbedding(nn.Module):
    """Timestep -> an embedding, and the six modulation vectors that all blocks share; in float32 at least.

    Sines and cosines of 1000 time, then two linear layers (DiT, arXiv 2212.09748); one projection to 6 x width instead
    of one for each block (PixArt-alpha, arXiv 2310.00426), which starts at zero."""

    def __init__(self, dim: int):
        super().__init__()
        self.hidden = nn.Linear(TIME_FEATURES, dim)
        self.out = nn.Linear(dim, dim)
        self.modulation = _zeroed(nn.Linear(dim, 6 * dim))

    def forward(
        self, time: Float[Tensor, "b _"], pooled: Float[Tensor, "b _ d"] | None
    ) -> tuple[Float[Tensor, "b f d"], Float[Tensor, "b f 6 d"]]:
        dtype = torch.promote_types(self.out.weight.dtype, torch.float32)
        half = TIME_FEATURES // 2
        frequencies = torch.exp(torch.arange(half, device=time.device, dtype=dtype) * (-math.log(1e4) / half))
        angle = 1000 * time.to(dtype)[..., None] * frequencies
        embedding = _linear(self.out, F.silu(_linear(self.hidden, torch.cat([angle.cos(), angle.sin()], -1))))
        if pooled is not None:
            embedding = embedding + pooled
        return embedding, _linear(self.modulation, F.silu(embedding)).unflatten(-1, (6, -1))


class TextJoin(nn.Module):
    """A linear layer and a LayerNorm for each encoder's tokens, then one sequence of all (Movie Gen, section 3.1.4).

    In front stands a learned null token, unmasked only in rows that have no text, which are the rows of guidance. With
    the tokens comes the part of the text that each belongs to: 0 for padding, -1 for one that belongs to all."""

    def __init__(self, dim: int, widths: Sequence[int]):
        super().__init__()
        self.projections = nn.ModuleList(nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim)) for width in widths)
        self.null = nn.Parameter(torch.randn(dim))

    def forward(self, text: Text, rows: int) -> tuple[Float[Tensor, "b n d"], Int[Tensor, "b n"]]:
        tokens, masks = [self.null.expand(rows, 1, -1)], []
        for project, (encoded, mask) in zip(self.projections, text, strict=True):
            # Padding may hold anything, NaN included, and NaN times zero is NaN.
            clean = encoded.masked_fill(mask[..., None] == 0, 0).to(self.null.dtype)
            tokens.append(project(clean).to(self.null.dtype))
            masks.append(-mask.long() if mask.dtype == torch.bool else mask)
        real = torch.cat(masks, 1) if masks else torch.zeros(rows, 0, dtype=torch.long, device=self.null.device)
        return torch.cat(tokens, 1), torch.cat([real.any(1, keepdim=True).long() - 1, real], 1)


def seen_by_frames(
    parts: Int[Tensor, "b n"], frames: int
) -> tuple[Bool[Tensor, "b {frames} n"], Float[Tensor, "b {frames}"]]:
    """Which text tokens each frame sees, and how much of its part has passed there, 0 to 1. The parts of a text follow
    each other in equal shares of the clip, and each frame sees its own, as in TALC (arXiv 2405.04682); a single frame
    sees all.

    Args:
        parts: as `TextJoin` numbers them."""
    at = (torch.arange(frames, device=parts.device) + 0.5) / frames * parts.amax(1, keepdim=True).clamp(min=1)
    of_all = parts != 0 if frames == 1 else parts < 0
    return of_all[:, None] | (parts[:, None] == at.floor()[..., None] + 1), at % 1


def waves(phase: Float[Tensor, "b t"]) -> Float[Tensor, "b t f"]:
    """Sines and cosines of half a turn to `PHASE_FEATURES` / 4 turns in one phase [ours]."""
    angle = phase[..., None] * torch.arange(1, PHASE_FEATURES // 2 + 1, device=phase.device) * math.pi
    return torch.cat([angle.sin(), angle.cos()], -1)


def _zeroed(layer: nn.Linear) -> nn.Linear:
    for one in layer.parameters():
        nn.init.zeros_(one)
    return layer


@lru_cache
def _say(inputs: int, narrow: int, products: int, everything: int, size: int) -> None:
    log.info(
        "checkpointing: %d blocks keep their input alone, %d also narrow products, %d all products and %d everything; "
        "activations of about %.3g GiB",
        inputs, narrow, products, everything, size / 2**30,
    )  # fmt: skip


def token_grid(size: Sequence[int], patch: Sequence[int]) -> Triple:
    """Tokens (t, h, w) of latents of size (t, h, w); fewer frames than a patch has, such as an image, are one token.
    ValueError names the axis that the patch does not divide."""
    for axis, n, p in zip(("frames", "height", "width"), size, patch, strict=True):
        if n % p and not (axis == "frames" and n < p):
            raise ValueError(f"The latents' {axis} {n} is no multiple of the patch's {p} (patch: {list(patch)}).")
    t, h, w = (-(-n // p) for n, p in zip(size, patch, strict=True))
    return t, h, w


def _repeat_last(x: Tensor, axis: int, length: int) -> Tensor:
    missing = max(0, length - x.shape[axis])
    return torch.cat([x, *[x.narrow(axis, -1, 1)] * missing], axis) if missing else x


def _linear(layer: nn.Linear, x: Float[Tensor, "*any i"]) -> Float[Tensor, "*any o"]:
    """The layer in float32 at least, under autocast and with bfloat16 weights too."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    with full_precision(x):
        return F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
