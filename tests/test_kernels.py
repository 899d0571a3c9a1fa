"""Every kernel against its slow twin: outputs, final states and every gradient by name."""

import sys
import types

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lingen.kernels.attention import attention
from lingen.kernels.ssd import ssd
from tests.helpers.closeness import assert_close

SHAPES = [(1, 1, 1), (7, 1, 4), (33, 2, 8), (40, 3, 16), (5, 1, 64)]


def operands(n, groups, *, batch=2, per_group=2, width=3, states=5, dtype=torch.float64):
    torch.manual_seed(n)
    heads = groups * per_group
    parts = {
        "x": torch.randn(batch, n, heads, width),
        "dt": torch.randn(batch, n, heads),
        "a": -torch.rand(heads) * 8,
        "b": torch.randn(batch, n, groups, states),
        "c": torch.randn(batch, n, groups, states),
        "d": torch.randn(heads),
        "dt_bias": torch.randn(heads),
        "initial_state": torch.randn(batch, heads, width, states),
    }
    return {name: part.to(dtype).requires_grad_() for name, part in parts.items()}


def gradients(outputs, parts):
    seeds = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype) for o in outputs]
    used = {name: part for name, part in parts.items() if part is not None and part.requires_grad}
    found = torch.autograd.grad(outputs, list(used.values()), seeds)
    return dict(zip(used, found, strict=True))


@pytest.mark.parametrize("n, groups, chunk", SHAPES)
@pytest.mark.parametrize("without", [(), ("d",), ("initial_state",), ("dt_bias", "d", "initial_state")])
def test_chunked_is_the_recurrence(n, groups, chunk, without):
    parts = operands(n, groups)
    parts |= dict.fromkeys(without)
    if "dt_bias" in without:
        parts["dt"] = parts["dt"].detach().abs().requires_grad_()
    fast = ssd(**parts, kernel="chunked", chunk=chunk)
    slow = ssd(**parts, kernel="reference")
    wanted = gradients([slow], parts)
    assert_close("output", slow, fast, 1e-12)
    assert_close("gradient of", wanted, gradients([fast], parts), 1e-12)


@pytest.mark.parametrize("n, chunk", [(150, 1), (9000, 2)])
def test_many_chunks_are_passed_on_in_groups(n, chunk):
    parts = operands(n, 1, batch=1, per_group=1, width=1, states=2)
    fast = ssd(**parts, chunk=chunk)
    slow = ssd(**parts, kernel="chunked", chunk=256)
    wanted = gradients([slow], parts)
    assert_close("output", slow, fast, 1e-12)
    assert_close("gradient of", wanted, gradients([fast], parts), 1e-12)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_low_precision_keeps_its_distance(dtype, limit):
    exact = operands(70, 2, dtype=torch.float32)
    given = {name: part.detach().to(dtype) for name, part in exact.items() if name != "initial_state"}
    want = ssd(**{name: part.double() for name, part in given.items()}, kernel="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ssd(**given, chunk=16)
    assert got.dtype == dtype
    assert_close("output", want, got, limit)


@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_short_steps_keep_their_digits_after_long_ones(chunk):
    """Float32 sums of dt * a lose them: 1e-3 off at 4,096 tokens, were the sums not kept in float64."""
    parts = operands(2000, 1, batch=1, dtype=torch.float32) | dict.fromkeys(("dt_bias", "d", "initial_state"))
    parts["dt"] = torch.exp(4 * parts["dt"].detach())
    want = ssd(**{name: part if part is None else part.double() for name, part in parts.items()}, chunk=chunk)
    assert_close("output", want, ssd(**parts, chunk=chunk), 1e-6)


@pytest.mark.parametrize("step", [0.0, 1e-6, 30.0, 1e4])
def test_gradients_stay_finite_at_extreme_steps(step):
    parts = operands(40, 1, dtype=torch.float32) | {"dt_bias": None}
    parts["dt"] = torch.full_like(parts["dt"], step).requires_grad_()
    for name, grad in gradients([ssd(**parts, chunk=8)], parts).items():
        assert grad.isfinite().all(), name


def test_a_clip_is_causal_and_alone():
    parts = operands(20, 1)
    x = parts["x"]
    grad = torch.autograd.grad(ssd(**parts, chunk=4)[0, 10].sum(), x)[0]
    assert grad[1].abs().max() == 0 and grad[0, 11:].abs().max() == 0
    assert (grad[0, :11].abs().amax((1, 2)) > 0).all()


def test_mistakes_are_sentences():
    parts = operands(4, 1)
    with pytest.raises(ValueError, match="'triton'. Known: auto, reference"):
        ssd(**parts, kernel="triton")
    with pytest.raises(ValueError, match="pip install mamba-ssm"):
        ssd(**parts, kernel="stock")
    with pytest.raises(ValueError, match="at least one token"):
        ssd(*(parts[name][:, :0] if name in "x dt b c" else parts[name] for name in ("x", "dt", "a", "b", "c")))
    with pytest.raises(ValueError, match="3 groups do not divide 2 heads"):
        ssd(**parts | {"b": parts["b"].repeat(1, 1, 3, 1), "c": parts["c"].repeat(1, 1, 3, 1)})
    q = torch.randn(1, 3, 2, 4)
    with pytest.raises(ValueError, match="no attention kernel called 'cuDNN'. Known: auto, sdpa, cudnn, flash"):
        attention(q, q, q, kernel="cuDNN")
    with pytest.raises(ValueError, match="needs flash-attn"):
        attention(q, q, q, kernel="flash")


def test_padding_is_seen_by_nobody():
    q, k, v = torch.randn(3, 2, 6, 2, 4)
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
    out = attention(q, k, v, real)
    for i, keep in enumerate(real):
        want = attention(q[i : i + 1, keep], k[i : i + 1, keep], v[i : i + 1, keep])
        torch.testing.assert_close(out[i : i + 1, keep], want, rtol=1e-5, atol=1e-6)


def fake_flash():
    """flash-attn's two functions, computed by SDPA: what is tested is how we call them."""

    def whole(q, k, v):
        return scaled_dot_product_attention(*(u.transpose(1, 2) for u in (q, k, v))).transpose(1, 2)

    def packed(q, k, v, ends_q, ends_k, longest_q, longest_k):
        assert ends_q.dtype == torch.int32 and (ends_q.diff() <= longest_q).all()
        cuts = [slice(i, j) for i, j in ends_q.unfold(0, 2, 1).tolist()]
        return torch.cat([whole(q[None, cut], k[None, cut], v[None, cut])[0] for cut in cuts])

    return types.SimpleNamespace(flash_attn_func=whole, flash_attn_varlen_func=packed)


def test_flash_packs_what_is_real(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash())
    q, k, v = torch.randn(3, 3, 5, 2, 8).bfloat16()
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0]]).bool()
    assert_close("whole", attention(q, k, v), attention(q, k, v, kernel="flash"), 5e-3)
    got, want = attention(q, k, v, real, kernel="flash"), attention(q, k, v, real)
    assert_close("what is real", want[real], got[real], 5e-3)
    assert (got[~real] == 0).all()
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        attention(q.float(), k.float(), v.float(), kernel="flash")
