"""The block around a mixer (arXiv 2412.09856, Figure 2): norms, the timestep's modulation, text and feed-forward."""

from collections import Counter
from functools import partial
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lingen.blocks import Mixer
from lingen.blocks.layers import RMSNorm, SwiGLU, head_count, stays_float32, undecayed
from lingen.kernels.cross_attention import TextKeys, cross_attention, text_keys
from lingen.kernels.fp8 import Quantized, as_its, input_dtype
from lingen.kernels.kept import ALL, twice
from lingen.kernels.modulate import modulate
from lingen.recipe.registry import MIXERS
from lingen.recipe.sections import Component, LinGenConfig

PART_BYTES = 544 * 2**20
"""Bytes that the hidden activations of the feed-forward may take where no gradient is wanted [ours]. At width 6,912 in
16 bits it makes parts of 13,312 tokens, whose 2,560 wide products fill an H100 (104 x 10 tiles of 128 x 256 on 132
multiprocessors) 7.88 times."""
PART_MULTIPLE = 512
"""Tokens of a part are a multiple of this: whole tiles of a matrix product."""


class Block(nn.Module):
    """Mixer, cross-attention to the text, SwiGLU, each on a normed input and added to the stream (Figure 2).

    The timestep scales and shifts the first and the last one's input and gates their output: a row for each of the six
    in `modulation`, added to what all blocks share. The cross-attention sees no timestep and has no gate.

    Everything after the mixer treats each token alone. Where no gradient is wanted, it runs on parts of the clip, so
    that queries and hidden activations of all tokens never exist at once.

    Where it does not keep `ALL` for the backward pass, but a lower level (`lingen.kernels.kept`), it is computed again
    there. It does so itself: where its weights are sharded, they are there in both computations."""

    def __init__(self, config: LinGenConfig, mixer: Any, layer: int):
        super().__init__()
        dim = config.dim
        self.modulation = ModulationRows(dim, config.gate_init)
        self.mixer_norm, self.text_norm, self.ffn_norm = RMSNorm(dim), RMSNorm(dim), RMSNorm(dim)
        self.mixer: Mixer = MIXERS.build(mixer, dim, layer)
        self.cross_attention = CrossAttention(dim, config.num_heads, config.gate_init)
        self.ffn = SwiGLU(dim, config.ffn_dim or max(64, 64 * round(2.7 * dim / 64)))

    def forward(
        self,
        x: Float[Tensor, "b t h w d"],
        positions: Float[Tensor, "t h w d"],
        modulation: Float[Tensor, "b f 6 d"],
        text: Float[Tensor, "b n d"],
        mask: Bool[Tensor, "b _ n"],
        level: int = ALL,
    ) -> Float[Tensor, "b t h w d"]:
        if level < ALL:
            # While a graph is recorded the state of the random numbers cannot be read; it is without random numbers.
            keep = not (x.is_cuda and torch.cuda.is_current_stream_capturing())
            inputs = x, positions, modulation, text, mask
            how: dict[str, Any] = {"preserve_rng_state": keep, "context_fn": partial(twice, level)}
            return checkpoint(self.forward, *inputs, use_reentrant=False, **how)
        shift, scale, *rows = (modulation + self.modulation.weight).unbind(2)
        norm, dtype = self.mixer_norm, input_dtype(self.mixer, x)
        # Only the mixer holds its input, so that it is freed when the update is computed.
        update = self.mixer(
            modulate(x, weight=norm.weight, shift=shift, scale=scale, positions=positions, eps=norm.eps, dtype=dtype)[1]
        )
        keys = self.cross_attention.keys(text, mask)
        if torch.is_grad_enabled():
            return self._after_mixer(x, update, rows, keys)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if max(rows[0].shape[1], mask.shape[1]) > 1 or x[..., 0].numel() <= self._part(x):
            return self._after_mixer(x, update, rows, keys, out)
        streams = [stream.flatten(1, 3) for stream in (x, update, out)]
        size = self._part(x)
        for clip, first in product(range(len(x)), range(0, streams[0].shape[1], size)):
            one, tokens = slice(clip, clip + 1), slice(first, first + size)
            before, added, after = (stream[one, None, None, tokens] for stream in streams)
            self._after_mixer(before, added, [row[one] for row in rows], keys.of(one), after)
        return out

    def _after_mixer(
        self, x: Float[Tensor, "b t h w d"], update: Float[Tensor, "b t h w d"],
        modulation: list[Float[Tensor, "b f d"]], text: TextKeys, out: Float[Tensor, "b t h w d"] | None = None,
    ) -> Float[Tensor, "b t h w d"]:  # fmt: skip
        """The stream after the block, from the stream before it and the mixer's update; written to `out`."""
        gate, shift, scale, ffn_gate = modulation
        norm, dtype = self.text_norm, input_dtype(self.cross_attention, x)
        x, normed = modulate(x, update=update, weight=norm.weight, gate=gate, eps=norm.eps, dtype=dtype, out=out)
        update = self.cross_attention.attend(normed, text)
        norm, dtype = self.ffn_norm, input_dtype(self.ffn, x)
        x, normed = modulate(
            x, update=update, weight=norm.weight, shift=shift, scale=scale, eps=norm.eps, dtype=dtype, out=out
        )
        return modulate(x, update=self.ffn(normed), gate=ffn_gate, out=out)[0]

    def _part(self, x: Tensor) -> int:
        """The number of tokens whose hidden activations (gate, up and their product) take `PART_BYTES`."""
        token = 3 * self.ffn.out_proj.in_features * input_dtype(None, x).itemsize
        return max(1, PART_BYTES // token // PART_MULTIPLE) * PART_MULTIPLE


@stays_float32
class ModulationRows(nn.Module):
    """A block's own part of the six rows that modulate it: only the gates start at `gate`, the others at 0."""

    def __init__(self, dim: int, gate: float):
        super().__init__()
        rows = torch.tensor([0, 0, 1, 0, 0, 1]) * gate
        self.weight = undecayed(nn.Parameter(rows[:, None].repeat(1, dim)))


class CrossAttention(nn.Module):
    """Each token of the grid attends to the text tokens that are unmasked for its clip (f = 1) or frame; queries and
    keys are RMS-normed. Each row of `mask` must hold a True. The output starts scaled by `gate_init`: at 0 the text has
    no effect at first."""

    wants_fp8 = as_its("q_proj")

    def __init__(self, dim: int, num_heads: int | None, gate_init: float):
        super().__init__()
        self.num_heads = head_count(dim, num_heads)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.kv_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.q_norm = RMSNorm(dim // self.num_heads)
        self.k_norm = RMSNorm(dim // self.num_heads)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        with torch.no_grad():
            self.out_proj.weight.mul_(gate_init)

    def keys(self, text: Float[Tensor, "b n d"], mask: Bool[Tensor, "b f n"]) -> TextKeys:
        """Keys and values of the text, prepared once: a row for each clip, or for each of its f frames."""
        k, v = self.kv_proj(text).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        if (frames := mask.shape[1]) > 1:
            k, v = (one.repeat_interleave(frames, 0) for one in (k, v))
        return text_keys(k, v, mask.flatten(0, 1), self.k_norm.weight, eps=self.k_norm.eps)

    def attend(self, x: Float[Tensor, "b t h w d"] | Quantized, text: TextKeys) -> Float[Tensor, "b t h w d"]:
        """The attention of the grid's tokens to the text that `keys` prepared, projected."""
        q = self.q_proj(x).view(len(text.k), -1, self.num_heads, text.k.shape[-1])
        out = cross_attention(q, text, self.q_norm.weight, self.k_norm.weight, eps=self.q_norm.eps)
        return self.out_proj(out.flatten(2)).view(*x.shape[:4], -1)


def mixers_of(config: LinGenConfig) -> list[tuple[Component | str, int]]:
    """(component, layer) of each block. A list of mixers is cycled; `layer` counts the blocks whose mixer has the same
    name, so that in a hybrid each mixer goes through all of its scan orders and shifts."""
    cycle = config.mixer if isinstance(config.mixer, list | tuple) else [config.mixer]
    seen: Counter[str] = Counter()
    layers: list[tuple[Component | str, int]] = []
    for index in range(config.depth):
        component = cycle[index % len(cycle)]
        name = mixer_name(component)
        layers.append((component, seen[name]))
        seen[name] += 1
    return layers


def mixer_name(component: Component | str) -> str:
    """Of a component, or of a bare word for one."""
    return component if isinstance(component, str) else str(component["name"])
