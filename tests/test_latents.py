"""Reading encoded samples: what is refused, texts of several captions and lengths, and text that is left out."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch

from lingen.data.latents import LATENTS_NPY, StoredTokens, pad_text, pad_tokens, read_sample_latents, read_text
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
    found = read_sample_latents({LATENTS_NPY: npy(GOOD.astype(dtype))})
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
        read_sample_latents({LATENTS_NPY: data})


def test_the_largest_numbers_are_finite() -> None:
    for dtype in (np.float16, np.float32):
        largest = np.full((1, 1, 2, 2), np.finfo(dtype).max, dtype)
        assert read_sample_latents({LATENTS_NPY: npy(-largest)}).numpy().max() == -np.finfo(dtype).max


def test_no_latents() -> None:
    with pytest.raises(ValueError, match="no latents: no latents.npy among mp4, txt"):
        read_sample_latents({"mp4": b"", "txt": b""})


def test_the_tokens_of_each_caption() -> None:
    tokens = np.arange(10, dtype=np.float16).reshape(5, 2)
    members = {"text1.npy": npy(tokens), "json": json.dumps({"tokens": {"1": [2, 3]}}).encode()}
    found = read_text(members, 2)
    assert [one.tolist() for one in found.captions[1]] == [tokens[:2].tolist(), tokens[2:].tolist()]
    assert found.captions.keys() == {1} and not found.null
    assert read_text({}, 2) == ({}, {})
    with pytest.raises(ValueError, match=r"text1.npy holds 5 tokens, not \[2, 3\] of 3 captions"):
        read_text(members, 3)
    with pytest.raises(ValueError, match="no latents: no text1.npy, of which the JSON tells"):
        read_text({"json": members["json"]}, 2)


@pytest.mark.parametrize("count", [0, 2])
def test_the_tokens_of_no_text_lie_behind_those_of_the_captions(count: int) -> None:
    tokens = np.arange(2 * (5 + count), dtype=np.float16).reshape(-1, 2)
    about = {"tokens": {"1": [2, 3]}, "null": {"1": count}}
    found = read_text({"text1.npy": npy(tokens), "json": json.dumps(about).encode()}, 2)
    assert [one.tolist() for one in found.captions[1]] == [tokens[:2].tolist(), tokens[2:5].tolist()]
    assert found.null[1].tolist() == tokens[5:].tolist() and found.null[1].shape == (count, 2)


@pytest.mark.parametrize(("lengths", "null", "told"), [
    ([2, 3], 2, "not [2, 3] of 2 captions and 2 of no text"),
    ([2, 3], None, "not [2, 3] of 2 captions"),
    ([6, 2], -2, "not [6, 2] of 2 captions and -2 of no text"),
])  # fmt: skip
def test_tokens_of_no_text_that_do_not_add_up(lengths: list[int], null: int | None, told: str) -> None:
    about = {"tokens": {"0": lengths}, "null": {"0": null}}
    members = {"text0.npy": npy(np.ones((6, 2), np.float16)), "json": json.dumps(about).encode()}
    with pytest.raises(ValueError) as caught:
        read_text(members, 2)
    assert str(caught.value) == f"broken latents: text0.npy holds 6 tokens, {told}"


def test_a_json_that_says_something_else_is_a_drop() -> None:
    assert read_text({"json": b"[1]"}, 1) == ({}, {})
    for about in ({"tokens": [1]}, {"tokens": {"0": 5}}, {"tokens": {"0": [5]}, "null": {"0": "x"}}, {"null": 3}):
        with pytest.raises(ValueError, match="broken latents: the JSON's tokens and null: Expected"):
            read_text({"json": json.dumps(about).encode(), "text0.npy": npy(np.ones((5, 2), np.float16))}, 1)


def tokens_of(length: int, null: int | None) -> StoredTokens:
    """One caption of this length and, where it is not None, no text of that one."""
    return StoredTokens({0: [torch.ones(length, 3)]}, {} if null is None else {0: torch.full((null, 3), 7.0)})


def test_a_batch_has_no_text_where_all_samples_have() -> None:
    text, null = pad_tokens([tokens_of(4, 2), tokens_of(1, 2)], [0, 0])
    assert text[0][0].shape == (2, 4, 3) and text[0][1].sum(1).tolist() == [4, 1]
    assert null[0][0].tolist() == [[[7.0] * 3] * 2] * 2 and null[0][1].all()
    tokens, mask = pad_tokens([tokens_of(4, 0)], [0])[1][0]  # an image's: none at all
    assert tokens.shape == (1, 1, 3) and not mask.any()
    text, null = pad_tokens([tokens_of(4, 2), tokens_of(1, None)], [0, 0])
    assert text.keys() == {0} and null == {}


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
    several = torch.full((2, 1, 4), 5.0), torch.tensor([[True], [False]])
    found, real = replace_rows((tokens, mask), [0, 2], several)
    assert found[2, :, 0].tolist() == [5, 0] and real.tolist() == [[True, False], [True, True], [False, False]]
    assert tokens.shape == (3, 2, 4) and replace_rows((tokens, mask), [], None) == (tokens, mask)
