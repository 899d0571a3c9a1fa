"""Encoded samples: latents and text embeddings from the members of a shard.

``KEY.latents.npy`` holds the latents [c t h w]. ``KEY.text0.npy``, ``KEY.text1.npy``, ... hold, for each text encoder
of the recipe, its tokens [m w] of every caption, one caption behind the other, and behind them those of no text, which
stands for a caption that is left out. ``tokens`` and ``null`` of the JSON say how many belong to each:
``{"captions": [...], "tokens": {"0": [7, 12], "1": [30, 41]}, "null": {"0": 0, "1": 4}}``. An encoder that is trained
with the denoiser has none: it reads the captions. Older sets have no ``null``. Never pickled; half precision is enough
(ours)."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import default_collate

from lingen.data.captions import captions_of, json_of
from lingen.recipe.signature import check_value

LATENTS_NPY = "latents.npy"
TEXT = "text{}.npy"
COUNTS = tuple[dict[str, list[int]], dict[str, int | None]]
"""What the JSON says of each encoder: how many tokens each caption has, and no text."""
EXPONENT_BITS = {np.dtype("<f2"): ("<u2", 0x7C00), np.dtype("<f4"): ("<u4", 0x7F800000)}
"""The types that are read: as whole numbers, and the bits that are all set where a number is not finite (IEEE 754)."""


class StoredTokens(NamedTuple):
    """The tokens that frozen text encoders made of a sample's captions."""

    captions: Mapping[int, Sequence[Tensor]]
    """Number of a text encoder -> its tokens [n w] of each caption."""
    null: Mapping[int, Tensor]
    """Number of a text encoder -> its tokens [n w] of no text; encoders without stored ones are absent."""


class LatentRequirements(NamedTuple):
    """What the encoded samples of a recipe must hold."""

    channels: int
    strides: tuple[int, int, int]
    """Frames and pixels per latent in t, h, w."""
    text: frozenset[int]
    """Numbers of the text encoders that are not trained along."""

    def latents(self, shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """Size (c, t, h, w) of the latents of a clip of this many frames, this height and width."""
        t, h, w = (math.ceil(n / stride) for n, stride in zip(shape, self.strides, strict=True))
        return self.channels, t, h, w


def read_encoded(
    members: dict[str, bytes], shape: tuple[int, int, int], wanted: LatentRequirements
) -> tuple[Tensor, list[str], StoredTokens]:
    """Latents [c t h w], captions and their tokens of a clip of this many frames, this height and width. ValueError:
    ``no latents``, ``broken latents``, ``latents not finite``, and as `captions_of`."""
    latents, captions = read_sample_latents(members), captions_of(members)
    text = read_text(members, len(captions))
    if tuple(latents.shape) != wanted.latents(shape):
        size = list(wanted.latents(shape))
        raise ValueError(f"broken latents: {list(latents.shape)} where the recipe's autoencoder gives {size}")
    if missing := wanted.text - text.captions.keys():
        raise ValueError(f"no latents: the text of encoder {min(missing)} is missing")
    null = {number: tokens for number, tokens in text.null.items() if number in wanted.text}
    return latents, captions, StoredTokens({number: text.captions[number] for number in wanted.text}, null)


def read_sample_latents(members: Mapping[str, bytes]) -> Tensor:
    """The latents [c t h w] of a sample. ValueError: ``no latents``, ``broken latents``, ``latents not finite``."""
    if LATENTS_NPY not in members:
        raise ValueError(f"no latents: no {LATENTS_NPY} among {', '.join(sorted(members)) or 'nothing'}")
    return _read_npy(members[LATENTS_NPY], LATENTS_NPY, axes=4)


def read_text(members: Mapping[str, bytes], captions: int) -> StoredTokens:
    """The tokens of each of its `captions`, for those encoders that it holds tokens of. ValueError as above."""
    about = json_of(members)
    (lengths_of, nulls), wrong = check_value([about.get("tokens"), about.get("null")], COUNTS)
    if wrong:
        raise ValueError(f"broken latents: the JSON's tokens and null: {wrong}")
    each: dict[int, Sequence[Tensor]] = {}
    nothing: dict[int, Tensor] = {}
    for number, lengths in lengths_of.items():
        name = TEXT.format(number)
        if name not in members:
            raise ValueError(f"no latents: no {name}, of which the JSON tells")
        tokens = _read_npy(members[name], name, axes=2)
        null = nulls.get(number)
        counts = lengths if null is None else [*lengths, null]
        if len(lengths) != captions or sum(counts) != len(tokens) or min(counts) < 0:
            behind = "" if null is None else f" and {null} of no text"
            raise ValueError(
                f"broken latents: {name} holds {len(tokens)} tokens, not {lengths} of {captions} captions{behind}"
            )
        parts = tokens.split(counts)
        each[int(number)] = parts[:captions]
        if null is not None:
            nothing[int(number)] = parts[captions]
    return StoredTokens(each, nothing)


def _read_npy(data: bytes | memoryview, name: str, axes: int) -> Tensor:
    """Floating point numbers in NumPy's format. Nothing is allocated by what the header claims, nothing unpickled."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(stream)
    except ValueError as error:
        raise ValueError(f"broken latents: {name}: {error}") from error
    size = len(data) - stream.tell()
    if dtype not in EXPONENT_BITS or is_fortran or len(shape) != axes or math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"broken latents: {name} claims {dtype} {list(shape)} and has {size} bytes")
    bits, exponent = EXPONENT_BITS[dtype]
    numbers = np.frombuffer(data, bits, offset=stream.tell())
    if len(numbers) and (numbers & exponent).max() == exponent:  # ten times as fast as isfinite on each number
        raise ValueError(f"latents not finite: {name} holds NaN or infinity")
    array = numbers.view(dtype).reshape(shape)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def pad_text(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens [n w] of each sample of a batch -> tokens [b n w], zeros behind shorter ones, and their mask [b n]."""
    lengths = torch.tensor([len(text) for text in texts])
    longest = max(1, int(lengths.max()))
    tokens = default_collate([pad(text, (0, 0, 0, longest - len(text))) for text in texts])
    return tokens, torch.arange(longest) < lengths[:, None]


Padded = dict[int, tuple[Tensor, Tensor]]
"""Number of a text encoder -> tokens [b n w] and mask [b n]."""


def pad_tokens(samples: Sequence[StoredTokens], told: Sequence[int]) -> tuple[Padded, Padded]:
    """The tokens of a batch: of the chosen caption of each sample, and of no text. An encoder whose tokens of no text
    are missing in any sample is not in the second."""
    captions = {
        number: pad_text([one.captions[number][which] for one, which in zip(samples, told, strict=True)])
        for number in samples[0].captions
    }
    stored = [number for number in captions if all(number in one.null for one in samples)]
    return captions, {number: pad_text([one.null[number] for one in samples]) for number in stored}
