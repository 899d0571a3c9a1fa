"""Text encoders: tokens, masks, and what happens to empty and to long texts."""

import logging

import pytest
import torch

from lingen.recipe.errors import RecipeError, SettingError
from lingen.recipe.registry import TEXT_ENCODERS
from lingen.text import with_frame_rate
from lingen.text.small import Bytes, Words

SMALL = ["words", "bytes"]
FROZEN = [name for name in TEXT_ENCODERS.names() if name not in SMALL]
WIDTHS = {"ul2": 4096, "byt5": 1472, "metaclip": 1024}


def build(name, **settings):
    torch.manual_seed(0)
    return TEXT_ENCODERS.build({"name": name, "dim": 16, **settings})


@pytest.mark.parametrize("name", SMALL)
def test_tokens_and_masks_have_the_promised_shapes(name):
    encoder = build(name)
    tokens, mask = encoder.encode(["a red circle", "", "été"])
    assert encoder.trainable and encoder.dim == 16
    assert tokens.shape == (3, mask.shape[1], 16) and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == ([3, 0, 1] if name == "words" else [13, 0, 6])
    assert torch.isfinite(tokens).all()


@pytest.mark.parametrize("name", SMALL)
def test_empty_texts_alone_still_make_a_sequence(name):
    tokens, mask = build(name).encode(["", "", ""])
    assert tokens.shape == (3, 1, 16) and not mask.any()


@pytest.mark.parametrize("name", SMALL)
def test_a_text_does_not_depend_on_its_neighbours_in_the_batch(name):
    encoder = build(name).double()
    alone, _ = encoder.encode(["red"])
    beside, mask = encoder.encode(["a much longer caption than the other", "red"])
    torch.testing.assert_close(beside[1][mask[1]], alone[0])


@pytest.mark.parametrize("name", SMALL)
def test_word_order_matters(name):
    encoder = build(name)
    assert not torch.allclose(*(encoder.encode([text])[0] for text in ("red on blue", "blue on red")))


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_every_parameter_and_an_empty_text_has_none(name):
    encoder = build(name)
    tokens, mask = encoder.encode(["a red circle", ""])
    (tokens * torch.randn_like(tokens))[mask].sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in encoder.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_the_encoder_gives_the_same_in_training_and_in_evaluation(name):
    encoder = build(name)
    trained = encoder.train().encode(["a red circle", "red", ""])
    with torch.no_grad():
        evaluated = encoder.eval().encode(["a red circle", "red", ""])
    assert torch.equal(trained[1], evaluated[1])
    torch.testing.assert_close(evaluated[0][evaluated[1]], trained[0][trained[1]].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "unit"), [("words", "words"), ("bytes", "bytes")])
def test_a_long_text_is_cut_counted_and_said_once(name, unit, caplog):
    encoder = build(name, max_tokens=4)
    with caplog.at_level(logging.WARNING, "lingen"):
        tokens, mask = encoder.encode(["one two three four five six", "a b", "1 2 3 4 5"])
        encoder.encode(["one two three four five"])
    assert mask.shape[1] == (4 if name == "words" else 5)
    assert encoder.cut.count == 3
    (record,) = caplog.records
    assert f"{unit} was cut to 4 (text.max_tokens)" in record.getMessage()


def test_words_ignore_case_and_punctuation():
    encoder = Words(dim=8)
    assert torch.equal(encoder.encode(["A red, circle!"])[0], encoder.encode(["a RED circle"])[0])


def test_words_of_the_embedded_data_do_not_share_a_bucket():
    from lingen.data.synthetic import COLOURS, MOTIONS, SHAPES

    words = {word for part in (*COLOURS, *SHAPES, *MOTIONS, "a fps 8 16 24") for word in part.split()}
    words |= set("a fps 8 16 24".split())
    ids, _ = Words().read_ids(sorted(words))
    assert len(set(ids.flatten().tolist())) == len(words)


def test_parts_of_a_text_are_numbered_and_never_without_words():
    encoder = Words(dim=8, parts=True, max_tokens=9)
    story = "Then a bee flies, then a cow leaves. After that a ship"
    tokens, parts = encoder.encode([story, "a cow by the sea", "", "before, and then, then then"])
    assert parts.tolist() == [
        [1, 1, 1, 1, 2, 2, 2, 2, 3],  # cut: what is left is still numbered from 1 on
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [0] * 9,
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
    ]
    plain, mask = build("words", dim=8, max_tokens=9).encode([story])
    assert tokens.shape == (4, 9, 8) and torch.isfinite(tokens).all() and mask.dtype == torch.bool
    assert plain.shape[1] == parts.shape[1], "parts change no word"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a bee, then after that a cow", [1, 1, 2, 2, 2, 2, 2]),
        ("a bee, and then, after that, then a cow", [1, 1, 1, 2, 2, 2, 2, 2, 2]),
        ("a bee after\nthat | a cow", [1, 1, 2, 2, 2, 2]),
        ("a cat jumps now and then.", [1] * 6),
        ("then " * 5, [1] * 5),
    ],
)
def test_no_part_of_a_text_is_a_joining_word_alone(text, parts):
    assert Words(dim=8, parts=True).encode([text])[1].tolist() == [parts]


def test_bytes_tell_accents_apart_and_take_any_text():
    encoder = Bytes(dim=8)
    tokens, mask = encoder.encode(["ete", "été", "红色", "\ud800"])
    assert mask.sum(1).tolist() == [4, 6, 7, 2] and torch.isfinite(tokens).all()


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_encoders_are_planned_with_where_their_weights_are_not(name):
    with torch.device("meta"):
        planned = TEXT_ENCODERS.build({"name": name, "path": "nowhere", "max_tokens": 8})
    assert (planned.dim, planned.trainable) == (WIDTHS.get(name, planned.dim), False)
    assert not planned.state_dict() and not list(planned.parameters())
    encoder = TEXT_ENCODERS.build({"name": name, "path": "nowhere"})
    (missing,) = encoder.missing()
    assert missing[:2] == (name, "nowhere") and "download " in missing.cure
    with pytest.raises(RecipeError, match=f"missing: {name} nowhere: .*download"):
        encoder.encode(["a red circle"])


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (name, setting)
        for name, more in (("words", "buckets"), ("bytes", "depth"))
        for setting in ("dim", "max_tokens", more)
    ]
    + [(name, "max_tokens") for name in FROZEN],
)
def test_settings_below_one_are_named(name, setting):
    with pytest.raises(SettingError, match=rf"at least 1, got 0. \(at {setting} of") as error:
        TEXT_ENCODERS.build({"name": name, setting: 0})
    assert error.value.setting == setting


@pytest.mark.parametrize(
    ("caption", "fps", "said"),
    [
        ("A red ball.", 16.0, "FPS-16. A red ball."),
        ("A red ball.", 12.5, "FPS-12.5. A red ball."),
        ("A red ball.", 0.0, "A red ball."),
        ("", 16.0, "FPS-16."),
        ("", 0.0, ""),
    ],
)
def test_the_frame_rate_stands_before_the_caption(caption, fps, said):
    assert with_frame_rate(caption, fps) == said
