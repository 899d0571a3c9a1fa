"""Reading encoded samples: what is refused, texts of several captions and lengths, and text that is left out."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch

from lingen.data.latents import LATENTS, pad_text, read_latents, read_text
from lingen.text import replace_rows


def npy(array: Any, **how: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **how)
    return stream.getvalue()


def claiming(shape: str) -> bytes:
    """16 bytes behind a header that claims another shape."""
    text = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(16)


GOOD = np.arange(8, dtype=np.float16).reshape(2, 1, 2, 2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents_come_as_they_were(dtype: type) -> None:
    found = read_latents({LATENTS: npy(GOOD.astype(dtype))})
    assert found.tolist() == GOOD.tolist() and found.numpy().dtype == dtype
    found[0] = 1  # they are the reader's own


@pytest.mark.parametrize(("data", "message"), [
    (claiming("(1000000, 1000000, 1000000, 1000)"), "broken latents: .* claims float16 .*1000000.* and has 16 bytes"),
    (claiming("(2, 1, 2, 3)"), "broken latents"),
    (claiming("(-1, 1, 2, 2)"), "broken latents"),
    (npy(GOOD)[:-2], "broken latents"),
    (npy(GOOD) + b"xx", "broken latents"),
    (npy(GOOD.reshape(2, 2, 2)), "broken latents"),
    (npy(np.asfortranarray(np.ones((2, 3, 2, 2), np.float16))), "broken latents"),
    (npy(GOOD.astype(np.int16)), "broken latents: .* claims int16"),
    (npy(np.array([[[[{}]]]], object), allow_pickle=True), "broken latents: .* claims object"),
    (b"\x80\x04N.", "broken latents"),
    (b"", "broken latents"),
    (npy(np.full_like(GOOD, -np.inf)), "latents not finite: .* holds NaN or infinity"),
    (npy(np.full(GOOD.shape, np.nan, np.float32)), "latents not finite"),
])  # fmt: skip
def test_what_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_latents({LATENTS: data})


def test_the_largest_numbers_are_finite() -> None:
    for dtype in (np.float16, np.float32):
        largest = np.full((1, 1, 2, 2), np.finfo(dtype).max, dtype)
        assert read_latents({LATENTS: npy(-largest)}).numpy().max() == -np.finfo(dtype).max


def test_no_latents() -> None:
    with pytest.raises(ValueError, match="no latents: no latents.npy among mp4, txt"):
        read_latents({"mp4": b"", "txt": b""})


def test_the_tokens_of_each_caption() -> None:
    tokens = np.arange(10, dtype=np.float16).reshape(5, 2)
    members = {"text1.npy": npy(tokens), "json": json.dumps({"tokens": {"1": [2, 3]}}).encode()}
    found = read_text(members, 2)
    assert [one.tolist() for one in found[1]] == [tokens[:2].tolist(), tokens[2:].tolist()] and found.keys() == {1}
    assert read_text({}, 2) == {}
    with pytest.raises(ValueError, match=r"text1.npy holds 5 tokens, not \[2, 3\] of 3 captions"):
        read_text(members, 3)
    with pytest.raises(ValueError, match="no latents: no text1.npy, of which the JSON tells"):
        read_text({"json": members["json"]}, 2)


def test_texts_of_a_batch_are_padded() -> None:
    tokens, mask = pad_text([torch.ones(2, 3), torch.ones(0, 3), torch.ones(4, 3)])
    assert tokens.shape == (3, 4, 3) and mask.sum(1).tolist() == [2, 0, 4] and tokens.sum((1, 2)).tolist() == [6, 0, 12]
    tokens, mask = pad_text([torch.ones(0, 3)])
    assert tokens.shape == (1, 1, 3) and not mask.any()


def test_text_that_is_left_out_is_replaced() -> None:
    tokens, mask = torch.ones(3, 2, 4), torch.ones(3, 2, dtype=torch.bool)
    empty = torch.full((1, 3, 4), 7.0), torch.tensor([[True, True, False]])
    found, real = replace_rows((tokens, mask), [1], empty)
    assert found[1, :, 0].tolist() == [7, 7, 7] and real[1].tolist() == [True, True, False]
    assert found[0, :, 0].tolist() == [1, 1, 0] and real[2].tolist() == [True, True, False]
    assert tokens.shape == (3, 2, 4) and replace_rows((tokens, mask), [], None) == (tokens, mask)
