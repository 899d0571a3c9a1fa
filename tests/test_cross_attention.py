"""Cross-attention: Triton against SDPA on normed copies, in values and in every gradient."""

import pytest
import torch

from lingen.kernels.choice import has_triton
from lingen.kernels.cross_attention import TextKeys, cross_attention
from lingen.recipe.errors import RecipeError
from tests.helpers.closeness import assert_close

needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
EPS = 1e-6
# Clips, tokens, text tokens, heads, width of a head, share of real text.
CASES = [
    (2, 50, 37, 2, 8, 0.6),
    # Several blocks of queries and keys, and two parts of the queries; the last ones are cut.
    (1, 150, 90, 1, 20, 0.8),
    (2, 7, 3, 1, 7, 1.0),
]


def operands(case, device, dtype=torch.float32):
    """Queries inside wider rows, keys and values of one projection, gains, mask, the gradient that comes back."""
    b, n, m, heads, width, share = case
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(b, n, heads * width + 3, generator=generator)
    kv = torch.randn(b, m, 2 * heads * width, generator=generator)
    gains = 0.5 + torch.rand(2, width, generator=generator)
    mask = torch.rand(b, m, generator=generator) < share
    mask[:, m // 2] = mask[0, -1] = True
    seed = torch.randn(b, n, heads, width, generator=generator)
    return wide.to(device, dtype), kv.to(device, dtype), gains.to(device), mask.to(device), seed.to(device, dtype)


def run(case, dtype, device, kernel):
    """Outputs and gradients by name; the reference runs in float64 on the same numbers."""
    heads, width = case[3:5]
    wide, kv, gains, mask, seed = operands(case, device, dtype)
    if kernel == "reference":
        wide, kv, gains, seed = wide.double(), kv.double(), gains.double(), seed.double()
    parts = {"q": wide, "kv": kv, "q_weight": gains[0], "k_weight": gains[1]}
    parts = {name: part.detach().requires_grad_() for name, part in parts.items()}
    q = parts["q"][..., 1:-2].unflatten(-1, (heads, width))
    k, v = parts["kv"].unflatten(-1, (2, heads, width)).unbind(2)
    out = cross_attention(q, TextKeys(k, v, mask), parts["q_weight"], parts["k_weight"], eps=EPS, kernel=kernel)
    gradients = torch.autograd.grad(out, list(parts.values()), seed)
    return {"out": out.detach()} | dict(zip(parts, gradients, strict=True))


@pytest.fixture
def small_blocks(monkeypatch):
    from lingen.kernels import cross_attention_triton as triton_twin

    small = {name: (64, 64, 4, 1) for name in triton_twin.LAUNCH}
    monkeypatch.setattr(triton_twin, "LAUNCH", small)
    monkeypatch.setattr(triton_twin, "PROGRAMS", 4)


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_is_the_reference(case, device, small_blocks):
    got, want = run(case, torch.float32, device, "triton"), run(case, torch.float32, device, "reference")
    assert {part.dtype for part in got.values()} == {torch.float32}
    assert_close("triton", want, got, 1e-5)


@needs_triton
@pytest.mark.parametrize("dtype, limit", [(torch.float16, 1e-3), (torch.bfloat16, 5e-3)])
def test_triton_in_16_bits(dtype, limit, device):
    if device == "cpu" and dtype == torch.bfloat16:
        # The interpreter cuts digits off where a GPU rounds, always towards zero: such errors add up.
        limit *= 3
    got, want = run(CASES[0], dtype, device, "triton"), run(CASES[0], dtype, device, "reference")
    weights = {name for name in want if name.endswith("weight")}
    assert {name: part.dtype for name, part in got.items()} == {
        name: torch.float32 if name in weights else dtype for name in want
    }
    assert_close("triton", want, got, {name: limit * (2 if name in weights else 1) for name in want})


@needs_triton
@pytest.mark.usefixtures("poisoned")
def test_masked_text_has_no_say_and_no_gradient(device):
    assert torch.empty(3, device=device).isnan().all()
    case = (2, 20, 40, 2, 8, 0.3)
    wide, kv, gains, mask, seed = operands(case, device)
    q = wide[..., :16].unflatten(-1, (2, 8))
    kv[~mask] = torch.inf
    kv.requires_grad_()
    k, v = kv.unflatten(-1, (2, 2, 8)).unbind(2)
    out = cross_attention(q, TextKeys(k, v, mask), *gains.unbind(), eps=EPS, kernel="triton")
    alone = [
        cross_attention(
            one[None],
            TextKeys(k[i, real][None], v[i, real][None], real[None, real]),
            *gains,
            eps=EPS,
            kernel="reference",
        )
        for i, (one, real) in enumerate(zip(q, mask, strict=True))
    ]
    assert_close("output", torch.cat(alone), out, 1e-5)
    gradient = torch.autograd.grad(out, kv, seed)[0]
    assert (gradient[~mask] == 0).all() and gradient.isfinite().all() and (gradient[mask] != 0).any()


@needs_triton
def test_scores_of_any_size_stay_finite(device):
    """Gains of 30 make scores of thousands: a softmax of one key, and no overflow on the way back."""
    case = (1, 20, 18, 1, 16, 0.9)
    wide, kv, gains, mask, seed = operands(case, device)
    wide, kv, gains = (u.requires_grad_() for u in (wide, kv, gains * 30))
    k, v = kv.unflatten(-1, (2, 1, 16)).unbind(2)
    out = cross_attention(wide[..., None, :16], TextKeys(k, v, mask), *gains.unbind(), eps=EPS, kernel="triton")
    for gradient in torch.autograd.grad(out, (wide, kv, gains), seed):
        assert gradient.isfinite().all()


@pytest.mark.gpu
def test_the_same_bits_again_at_a_real_size(device):
    if device == "cpu":
        pytest.skip("the interpreter runs one program after the other; the order only varies on a GPU")
    case = (1, 4352, 333, 4, 128, 0.7)
    first, second = (run(case, torch.bfloat16, device, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    want = run(case, torch.bfloat16, device, "reference")
    assert_close("triton", want, first, 5e-3)


def test_the_reference_is_the_formula():
    case = CASES[0]
    wide, kv, gains, mask, _ = operands(case, "cpu", torch.float64)
    q = wide[..., :16].unflatten(-1, (2, 8))
    k, v = kv.unflatten(-1, (2, 2, 8)).unbind(2)
    got = cross_attention(q, TextKeys(k, v, mask), *gains.double(), eps=EPS, kernel="auto")
    q, k = (u / (u.square().mean(-1, keepdim=True) + EPS).sqrt() * gain for u, gain in zip((q, k), gains, strict=True))
    weights = torch.einsum("bnke,bmke->bknm", q, k).div(8**0.5).exp() * mask[:, None, None, :]
    want = torch.einsum("bknm,bmke->bnke", weights / weights.sum(-1, keepdim=True), v)
    assert_close("output", want, got, 1e-12)


def test_runs_on_meta():
    q, k, weight = torch.empty(2, 5, 3, 8, device="meta"), torch.empty(2, 4, 3, 8, device="meta"), torch.empty(8)
    mask = torch.ones(2, 4, dtype=torch.bool, device="meta")
    weight = weight.to("meta")
    assert cross_attention(q, TextKeys(k, k, mask), weight, weight, eps=EPS).shape == q.shape


@needs_triton
def test_mistakes_are_sentences(device):
    wide, kv, gains, mask, _ = operands((1, 3, 2, 1, 300, 1.0), device)
    q, (k, v) = wide[..., None, :300], kv.unflatten(-1, (2, 1, 300)).unbind(2)
    with pytest.raises(RecipeError, match="kernel='triton' takes heads of at most 256, not 300: raise num_heads"):
        cross_attention(q, TextKeys(k, v, mask), *gains.unbind(), eps=EPS, kernel="triton")
    with pytest.raises(RecipeError, match="no cross-attention kernel called 'flash'. Known: auto, reference"):
        cross_attention(q, TextKeys(k, v, mask), *gains.unbind(), eps=EPS, kernel="flash")
