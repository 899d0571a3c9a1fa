"""Window attention: Triton against the softmax spelled out, values and every gradient by name; TemporalSwin with it."""

import pytest
import torch

from lingen.blocks.layers import clamp
from lingen.blocks.temporal_swin import TemporalSwin, window_padding
from lingen.kernels.choice import has_triton
from lingen.kernels.fp8 import Fp8Linear, quantize
from lingen.kernels.window_attention import window_attention, window_rows
from lingen.recipe.errors import RecipeError
from tests.helpers.closeness import assert_close

needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
EPS = 1e-6
# Grid, window, heads, width of a head, shifted, tokens of a block.
CASES = [
    ((7, 5, 3), (3, 4, 2), 2, 8, True, 128),
    ((1, 4, 3), (8, 2, 3), 1, 7, False, 128),
    # Several blocks, the last one cut; in its first window two blocks of three are padding.
    ((4, 3, 3), (3, 3, 3), 1, 20, True, 16),
]


def arguments(grid, window, shifted, heads):
    window = clamp(window, grid)
    return {"window": window, "padding": window_padding(grid, window, shifted), "num_heads": heads, "eps": EPS}


def operands(grid, heads, width, device, dtype=torch.float32, batch=2):
    """Rows that are wider than q, k and v; gains; the gradient that comes back."""
    generator = torch.Generator().manual_seed(0)
    row = 3 * heads * width
    wide = torch.randn(batch, *grid, row + 5, generator=generator)
    gains = 0.5 + torch.rand(2, width, generator=generator)
    seed = torch.randn(batch, *grid, heads * width, generator=generator)
    return wide.to(device, dtype), gains.to(device), seed.to(device, dtype)


def run(case, dtype, device, kernel):
    """Outputs and gradients by name; the reference runs in float64 on the same numbers."""
    grid, window, heads, width, shifted, _ = case
    wide, gains, seed = operands(grid, heads, width, device, dtype)
    if kernel == "reference":
        wide, gains, seed = wide.double(), gains.double(), seed.double()
    parts = dict(zip(("qkv", "q_weight", "k_weight"), (wide, *gains.unbind()), strict=True))
    parts = {name: part.detach().requires_grad_() for name, part in parts.items()}
    qkv = parts["qkv"][..., 2 : 2 + 3 * heads * width]
    settings = arguments(grid, window, shifted, heads)
    out = window_attention(qkv, parts["q_weight"], parts["k_weight"], **settings, kernel=kernel)
    gradients = torch.autograd.grad(out, list(parts.values()), seed)
    return {"out": out.detach()} | dict(zip(parts, gradients, strict=True))


def set_block(monkeypatch, tokens):
    from lingen.kernels import window_attention_triton

    monkeypatch.setattr(window_attention_triton, "BLOCK", {2: tokens, 4: tokens})


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_is_the_reference(case, device, monkeypatch):
    set_block(monkeypatch, case[-1])
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
def test_every_number_is_written_and_no_other(device):
    """Into views of wider rows, as a fused layer would have it."""
    from lingen.kernels import window_attention_triton as triton_twin
    from lingen.kernels.window_attention import rotary_table

    grid, heads, width = (3, 4, 2), 2, 8
    wide, gains, seed = operands(grid, heads, width, device)
    settings = arguments(grid, (2, 3, 2), True, heads)
    rows = window_rows(grid, settings["window"], settings["padding"], wide.device)
    table = rotary_table(settings["window"], width, torch.float32, wide.device)
    given = wide[..., :48], *gains.unbind(), *table, rows, heads, EPS
    for call, columns in ((triton_twin.forward, 16), (lambda *a, **k: triton_twin.backward(seed, *a, **k), 48)):
        poisoned = torch.full((2, *grid, columns + 7), torch.nan, device=device)
        call(*given, out=poisoned[..., 3 : 3 + columns])
        assert poisoned[..., 3 : 3 + columns].isfinite().all()
        assert poisoned[..., :3].isnan().all() and poisoned[..., 3 + columns :].isnan().all()


@pytest.mark.gpu
def test_the_same_bits_again_at_a_real_size(device):
    if device == "cpu":
        pytest.skip("the interpreter runs one program after the other; the order only varies on a GPU")
    case = ((17, 16, 16), (8, 4, 4), 4, 128, True, 128)
    first, second = (run(case, torch.bfloat16, device, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    want = run(case, torch.bfloat16, device, "reference")
    assert_close("triton", want, first, 5e-3)


@pytest.mark.parametrize("kernel", ["sdpa", "auto"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plain_twins_agree(case, kernel):
    grid, window, heads, width, shifted, _ = case
    wide, gains, _ = operands(grid, heads, width, "cpu", torch.float64)
    settings = arguments(grid, window, shifted, heads)
    got, want = (
        window_attention(wide[..., : 3 * heads * width], *gains.double().unbind(), **settings, kernel=one)
        for one in (kernel, "reference")
    )
    assert_close("output", want, got, 1e-12)


def test_the_reference_stays_exact_under_autocast():
    grid, heads, width = (2, 3, 4), 2, 8
    wide, gains, _ = operands(grid, heads, width, "cpu")
    settings = arguments(grid, (2, 2, 2), False, heads)
    plain = window_attention(wide[..., :48], *gains.unbind(), **settings, kernel="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(window_attention(wide[..., :48], *gains.unbind(), **settings, kernel="reference"), plain)


@pytest.mark.parametrize("grid, window", [((7, 5, 3), (3, 4, 2)), ((1, 4, 6), (8, 4, 4)), ((34, 9, 9), (8, 4, 4))])
@pytest.mark.parametrize("shifted", [False, True])
def test_each_token_lies_in_one_window_and_each_window_holds_one(grid, window, shifted):
    window = clamp(window, grid)
    rows = window_rows(grid, window, window_padding(grid, window, shifted), torch.device("cpu"))
    assert rows.shape[1] == window[0] * window[1] * window[2]
    assert torch.equal(rows[rows >= 0].sort().values, torch.arange(grid[0] * grid[1] * grid[2], dtype=torch.int32))
    assert (rows >= 0).any(1).all()
    t, h, w = (torch.where(rows >= 0, place, -1) for place in torch.unravel_index(rows.clamp_min(0), grid))
    for axis, place in zip(window, (t, h, w), strict=True):
        spread = place.amax(1) - torch.where(place >= 0, place, 10_000).amin(1)
        assert spread.max() < axis


@needs_triton
def test_temporal_swin_with_triton(device):
    mixer = TemporalSwin(24, 1, window=(2, 3, 4), num_heads=2, kernel="triton").to(device)
    x = torch.randn(2, 3, 4, 5, 24, device=device, requires_grad=True)
    parts = {"x": x} | dict(mixer.named_parameters())
    seed = torch.randn_like(x)
    out = mixer(x)
    got = [out, *torch.autograd.grad(out, list(parts.values()), seed)]
    mixer.kernel = "reference"
    mixer = mixer.double()
    parts = {"x": x.detach().double().requires_grad_()} | dict(mixer.named_parameters())
    out = mixer(parts["x"])
    want = [out, *torch.autograd.grad(out, list(parts.values()), seed.double())]
    names = ("out", *parts)
    assert_close("triton", dict(zip(names, want, strict=True)), dict(zip(names, got, strict=True)), 1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_onto_is_the_sum(autocast):
    torch.manual_seed(0)
    mixer, x = TemporalSwin(16, 1, window=(2, 3, 4)), torch.randn(2, 3, 4, 5, 16)
    names = ["x", "onto", *(name for name, _ in mixer.named_parameters())]

    def compute(fused):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            parts = [x.clone().requires_grad_(), torch.ones_like(x).requires_grad_(), *mixer.parameters()]
            other = torch.nn.functional.linear(parts[1], torch.eye(16) * 0.5)  # bfloat16 under autocast, as a branch is
            out = mixer(parts[0], other) if fused else other + mixer(parts[0])
        return {"out": out} | dict(zip(names, torch.autograd.grad(out.float().square().sum(), parts), strict=True))

    got, want = compute(True), compute(False)
    assert got["out"].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert_close("the sum", want, got, 1e-2 if autocast else 1e-5)


def test_onto_of_another_width_keeps_the_wider():
    mixer, x, onto = TemporalSwin(16, 0, window=(2, 3, 4)), torch.randn(1, 2, 3, 4, 16), torch.randn(1, 2, 3, 4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, want = mixer(x, onto), onto + mixer(x)
    assert out.dtype == torch.float32 and torch.equal(out, want)


def test_onto_is_summed_in_place_without_autograd():
    mixer, x, onto = TemporalSwin(16, 0, window=(2, 3, 4)), torch.randn(1, 2, 3, 4, 16), torch.randn(1, 2, 3, 4, 16)
    with torch.no_grad():
        want = onto + mixer(x)
        out = mixer(x, onto)
        assert out.data_ptr() == onto.data_ptr()
        assert_close("the sum", want, out, 1e-6)
        strided = torch.randn(1, 16, 2, 3, 4).permute(0, 2, 3, 4, 1)
        assert_close("the sum", strided + mixer(x), mixer(x, strided), 1e-6)
    kept = onto.clone()
    mixer(x, onto)
    assert torch.equal(onto, kept)


def test_projections_in_8_bits(device):
    """As for sampling: 8-bit rows in, and an output projection that cannot sum onto anything by itself."""
    torch.manual_seed(0)
    mixer = TemporalSwin(32, 1, window=(2, 3, 4)).to(device, torch.bfloat16)
    x, onto = torch.randn(2, 1, 3, 4, 5, 32, device=device, dtype=torch.bfloat16)
    want = mixer(x).double()
    assert not mixer.wants_fp8
    mixer.in_proj, mixer.out_proj = Fp8Linear(mixer.in_proj), Fp8Linear(mixer.out_proj)
    assert mixer.wants_fp8
    with torch.no_grad():
        got = mixer(quantize(x))
        assert_close("in 8 bits", want, got, 0.1)
        assert torch.equal(mixer(quantize(x), onto), onto + got)


@needs_triton
def test_mistakes_are_sentences(device):
    wide, gains, _ = operands((2, 2, 2), 1, 257, device)
    settings = arguments((2, 2, 2), (2, 2, 2), False, 1)
    call = wide[..., : 3 * 257], *gains.unbind()
    with pytest.raises(RecipeError, match="kernel='triton' takes heads of at most 256, not 257: raise num_heads"):
        window_attention(*call, **settings, kernel="triton")
    assert window_attention(*call, **settings).isfinite().all()
    with pytest.raises(RecipeError, match="no window attention kernel called 'stock'. Known: auto, reference, sdpa"):
        window_attention(*call, **settings, kernel="stock")
    with pytest.raises(RecipeError, match="computes in float32, bfloat16 or float16, not torch.float64"):
        window_attention(wide[..., :24].double(), *gains[:, :8].unbind(), **settings, kernel="triton")
