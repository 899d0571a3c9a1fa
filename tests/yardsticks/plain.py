"""The whole denoiser in plain PyTorch on the weights of ours: what the DiT twin and the stock LinGen are timed with.

None of lingen's kernels: norms, modulation and gates are written out for `torch.compile`, attention is torch's SDPA,
MATE is made of stock parts. A test holds it to `LinGen`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lingen.blocks.attention import Attention
from lingen.blocks.mamba2 import Mamba2
from lingen.blocks.mate import MATE
from lingen.blocks.temporal_swin import TemporalSwin
from lingen.model import LinGen, Text

from .stock import StockMamba2, StockSwin, rms_norm


class PlainBlock(nn.Module):
    """A block of `LinGen`: mixer, cross-attention, SwiGLU, each on a normed input (LinGen, Figure 2)."""

    def __init__(self, ours: Any):
        super().__init__()
        self.ours = ours
        self.mixer = plain_mixer(ours.mixer)

    def forward(
        self, x: Tensor, positions: Tensor, modulation: Tensor, text: Tensor, mask: Tensor, recompute: bool = False
    ) -> Tensor:
        if recompute:
            return checkpoint(self.forward, x, positions, modulation, text, mask, use_reentrant=False)
        """As `Block.forward`."""
        ours = self.ours
        rows = (modulation + ours.modulation.weight)[:, :, :, None, None]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = rows.unbind(2)
        mixed = self.mixer(_modulated(rms_norm(x, ours.mixer_norm) + positions, shift, scale))
        x = x + (mixed * gate).to(x.dtype)
        x = x + self._text(rms_norm(x, ours.text_norm), text, mask)
        hidden, up = ours.ffn.in_proj(_modulated(rms_norm(x, ours.ffn_norm), ffn_shift, ffn_scale)).chunk(2, -1)
        return x + (ours.ffn.out_proj(F.silu(hidden) * up) * ffn_gate).to(x.dtype)

    def _text(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        part, frames = self.ours.cross_attention, mask.shape[1]
        q = part.q_proj(x).reshape(len(x) * frames, -1, part.num_heads, part.q_norm.weight.shape[0])
        k, v = part.kv_proj(text).repeat_interleave(frames, 0).unflatten(-1, (2, part.num_heads, -1)).unbind(2)
        q, k, v = (u.transpose(1, 2) for u in (rms_norm(q, part.q_norm), rms_norm(k, part.k_norm), v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.flatten(0, 1)[:, None, None])
        return part.out_proj(out.transpose(1, 2).flatten(2)).view_as(x)


class PlainAttention(nn.Module):
    """Full attention by torch's SDPA, whose backend the caller chooses."""

    def __init__(self, ours: Attention):
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        ours = self.ours
        q, k, v = ours.in_proj(x).flatten(1, 3).unflatten(-1, (3, ours.num_heads, -1)).unbind(2)
        q, k, v = (u.transpose(1, 2) for u in (rms_norm(q, ours.q_norm), rms_norm(k, ours.k_norm), v))
        out = F.scaled_dot_product_attention(q, k, v)
        return ours.out_proj(out.transpose(1, 2).flatten(2)).view_as(x)


class PlainMATE(nn.Module):
    """The sum of the stock branches."""

    def __init__(self, ours: MATE):
        super().__init__()
        self.branches = nn.ModuleList(plain_mixer(part) for part in (ours.ma, ours.te) if part is not None)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = [branch(x) for branch in self.branches]
        return first + rest[0] if rest else first


_PLAIN: dict[type, Callable[[Any], nn.Module]] = {
    Attention: PlainAttention,
    Mamba2: StockMamba2,
    TemporalSwin: StockSwin,
    MATE: PlainMATE,
}


def plain_mixer(ours: nn.Module) -> nn.Module:
    """The mixer without lingen's kernels. ValueError for one that has no such twin."""
    if type(ours) not in _PLAIN:
        known = ", ".join(one.__name__ for one in _PLAIN)
        raise ValueError(f"{type(ours).__name__} has no plain twin; those that have one: {known}.")
    return _PLAIN[type(ours)](ours)


class PlainDenoiser(nn.Module):
    """`LinGen` with plain blocks, each a call of `run(block, ...)`, so that a compiler sees one block at a time.

    Args:
        ours: its patches, time, text and positions are used as they are.
        run: e.g. a compiled `run_block`.
    """

    def __init__(self, ours: LinGen, run: Callable[..., Tensor] | None = None):
        super().__init__()
        self.ours = ours
        self.blocks = nn.ModuleList(PlainBlock(block) for block in ours.blocks)
        self.run = run or run_block

    def forward(self, latents: Tensor, time: Tensor, text: Text) -> Tensor:
        """As `LinGen.forward`."""
        with blocks_of(self.ours, [_Call(self.run, block) for block in self.blocks]):
            out: Tensor = self.ours(latents, time, text)
        return out


def run_block(block: nn.Module, *inputs: Tensor) -> Tensor:
    """block(*inputs), as a function to compile."""
    out: Tensor = block(*inputs)
    return out


class _Call(nn.Module):
    def __init__(self, run: Callable[..., Tensor], block: nn.Module):
        super().__init__()
        self.run, self.block = run, block

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self.block, *inputs)


@contextmanager
def blocks_of(model: LinGen | PlainDenoiser, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """A denoiser whose blocks are others, or fewer, for a while."""
    own = model.blocks
    model.blocks = nn.ModuleList(blocks)
    try:
        yield
    finally:
        model.blocks = own


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (x * (1 + scale) + shift).to(x.dtype)
