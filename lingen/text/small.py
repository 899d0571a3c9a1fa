"""Small text encoders that need no download and are trained with the denoiser [ours]."""

import re
import zlib
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from lingen.blocks.layers import head_count, undecayed
from lingen.recipe.bounds import IDENTITY, AtLeast
from lingen.recipe.signature import checked
from lingen.text import Cut, padded

_START = 256  # the id after the last byte
_PART = re.compile(r"\b(?:then|after\s+that)\b(?:\W+(?:then|after\s+that)\b)*+(?=\W+\w)")
"""A run of words that begins a part: what follows it are words of the part, so that none is "then" alone."""
_words = re.compile(r"\w+").findall


class _Small(nn.Module):
    """An embedding plus a learned position, and `depth` layers of a transformer encoder, if any.

    Subclasses say which `ids` a text has, of how many, and at how many `places` at most."""

    trainable = True

    def __init__(self, dim: int, ids: int, places: int, depth: int):
        super().__init__()
        self.dim = dim
        self.embedding = nn.Embedding(ids, dim)
        undecayed(self.embedding.weight)
        self.position = undecayed(nn.Parameter(torch.randn(places, dim) * 0.1))
        self.layers: nn.TransformerEncoder | None = None
        if depth:
            layer = nn.TransformerEncoderLayer(
                dim, head_count(dim, None), 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
            for copy in self.layers.layers:
                undecayed(copy.self_attn.in_proj_weight)

    def _hidden(self, ids: Tensor, seen: Tensor) -> Float[Tensor, "b n w"]:
        """Tokens of ids; each sees those of the mask `seen`, one at least, as a softmax over nothing is NaN."""
        hidden = self.embedding(ids) + self.position[: ids.shape[1]]
        return hidden if self.layers is None else self.layers(hidden, src_key_padding_mask=~seen)

    def encode(self, texts: list[str]) -> tuple[Float[Tensor, "b n w"], Shaped[Tensor, "b n"]]:
        """Tokens of the longest text's length, at least 1; an empty text is masked all over."""
        own: Any = self
        return own.embed(*(one.to(self.position.device) for one in own.read_ids(texts)))


@checked
class Words(_Small):
    """Hashed lower-case words: an embedding plus a learned position, for captions of few words; with `depth` a small
    transformer encoder tells each word of the others.

    Two words may share a bucket; with 4,096 buckets and 20 words the chance of that is 5%."""

    def __init__(
        self,
        *,
        dim: Annotated[int, AtLeast(1), IDENTITY, "width of a token"] = 96,
        buckets: Annotated[int, AtLeast(1), IDENTITY, "rows of the embedding, into which words are hashed"] = 4096,
        max_tokens: Annotated[int, AtLeast(1), IDENTITY, "words that are read; the rest is cut, with a warning"] = 32,
        depth: Annotated[int, AtLeast(0), IDENTITY, "layers of the encoder; 0: none, each word for itself"] = 0,
        parts: Annotated[bool, IDENTITY, "'then' and 'after that' begin parts, shown one after the other"] = False,
    ):
        super().__init__(dim, buckets, max_tokens, depth)
        self.cut, self.parts = Cut("words", max_tokens), parts

    def read_ids(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """What `embed` takes, on the CPU."""
        marked = (_PART.sub(r"|\g<0>", text.lower().replace("|", " ")) for text in texts)
        parts = [[part for part in map(_words, text.split("|")) if part] for text in marked]
        buckets, few = self.embedding.num_embeddings, len(self.position) if self.position.is_cuda else None
        rows = [[zlib.crc32(word.encode()) % buckets for part in row for word in part] for row in parts]
        ids, mask = padded(self.cut(rows), few_up_to=few)
        if self.parts:
            numbers = [[n for n, part in enumerate(row, 1) for _ in part] for row in parts]
            mask = padded([row[: self.cut.limit] for row in numbers], few_up_to=few)[0]
        return ids, mask

    def embed(self, ids: Tensor, mask: Tensor) -> tuple[Float[Tensor, "b n w"], Shaped[Tensor, "b n"]]:
        return self._hidden(ids, (mask != 0) | ~mask.any(1, keepdim=True)), mask  # no text attends to its padding


@checked
class Bytes(_Small):
    """UTF-8 bytes through a small transformer encoder: any language, spelling included."""

    def __init__(
        self,
        *,
        dim: Annotated[int, AtLeast(1), IDENTITY, "width of a token"] = 96,
        depth: Annotated[int, AtLeast(1), IDENTITY, "layers of the encoder"] = 2,
        max_tokens: Annotated[int, AtLeast(1), IDENTITY, "bytes that are read; the rest is cut, with a warning"] = 256,
    ):
        super().__init__(dim, _START + 1, max_tokens + 1, depth)
        self.cut = Cut("bytes", max_tokens)

    def read_ids(self, texts: list[str]) -> tuple[Tensor, ...]:
        """What `embed` takes, on the CPU: a start, then the bytes."""
        cut = self.cut([list(text.encode("utf-8", "replace")) for text in texts])
        # The start lets an empty text, too, attend to something.
        few_up_to = len(self.position) if self.position.is_cuda else None
        ids, real = padded([[_START, *text] for text in cut], few_up_to=few_up_to)
        return ids, real, torch.tensor([not text for text in cut])

    def embed(self, ids: Tensor, real: Tensor, empty: Tensor) -> tuple[Float[Tensor, "b n w"], Bool[Tensor, "b n"]]:
        return self._hidden(ids, real), real & ~empty[:, None]
