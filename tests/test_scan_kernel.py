"""The scan's kernels against the recurrence in float64: outputs and every gradient by name."""

from importlib.util import find_spec

import pytest
import torch

from lingen.kernels.scan import chunk_of, rows_of, scan, scan_state
from lingen.recipe.errors import RecipeError
from tests.helpers.closeness import assert_close, relative_error

CASES = [
    # n, heads, width, groups, state, ways
    (1, 2, 16, 1, 16, 2),
    (37, 2, 4, 1, 5, 2),
    (105, 4, 16, 2, 16, 2),
    (70, 3, 16, 1, 8, 1),
]
pytestmark = pytest.mark.usefixtures("poisoned")
WEIGHTS = ("a", "d", "dt_bias")
GPU_CASES = [(35904, 8, 64, 1, 128, 2), (1000, 6, 80, 3, 20, 2), (3000, 4, 64, 1, 128, 1)]


def operands(n, heads, width, groups, state, ways, dtype, device, batch=2):
    draw = torch.Generator().manual_seed(n)
    channels = heads * width + 2 * groups * state
    wide = torch.randn(batch, n, channels + heads + 3, generator=draw)  # dt is a slice of a wider projection
    parts = {
        "u": wide[..., :channels] * 0.5,
        "dt": wide[..., channels : channels + heads],
        "a": -torch.rand(ways, heads, generator=draw) * 4 - 0.1,
        "d": torch.randn(ways, heads, generator=draw),
        "dt_bias": torch.randn(ways, heads, generator=draw) - 2,
        "initial_state": torch.randn(batch, ways, heads, width, state, generator=draw) * 0.3,
    }
    low = {"u", "dt"}
    parts = {name: part.to(device, dtype if name in low else torch.float32) for name, part in parts.items()}
    index = torch.randperm(n, generator=draw).to(device)
    seed = torch.randn(batch, n, heads * width, generator=draw).to(device, dtype)
    return parts, index, seed, {"groups": groups, "state_dim": state}


def run(parts, index, seed, sizes, kernel):
    parts = {name: part.detach().requires_grad_() for name, part in parts.items()}
    n = parts["u"].shape[1]
    rows = rows_of(n, kernel, parts["u"].dtype)
    u = torch.nn.functional.pad(parts["u"], (0, 0, 0, rows - n))
    y = scan(u, *(parts[name] for name in ("dt", "a", "d", "dt_bias")), index, parts["initial_state"], **sizes,
             kernel=kernel)  # fmt: skip
    assert (y[:, n:] == 0).all()
    found = torch.autograd.grad(y[:, :n], list(parts.values()), seed)
    return {"y": y[:, :n].detach()} | dict(zip(parts, found, strict=True))


def compare(case, dtype, device, limits):
    parts, index, seed, sizes = operands(*case, dtype, device)
    exact = {name: part.double() for name, part in parts.items()}
    want = run(exact, index, seed.double(), sizes, "chunked")
    got = run(parts, index, seed, sizes, "triton")
    assert got["y"].dtype == dtype
    limits = {name: limits.get(name, limits["y"]) for name in want}
    if dtype == torch.bfloat16:
        # The gradient of dt_bias is the sum of dt's over all tokens, which nearly cancel: it is held against those.
        far = (got.pop("dt_bias") - want.pop("dt_bias")).norm() / want["dt"].norm()
        assert far < limits.pop("dt_bias"), f"dt_bias: {far:.2e} of the gradients that it sums"
    over = [name for name in WEIGHTS if name in want and relative_error(want[name], got[name]) >= limits[name]]
    if over and dtype == torch.bfloat16 and device == "cuda" and find_spec("mamba_ssm"):
        # The gradient of a is a small difference of large sums: mamba_ssm's own error on the same numbers is the bar.
        stock = run(parts, index, seed, sizes, "stock")
        limits |= {name: max(limits[name], 1.5 * relative_error(want[name], stock[name])) for name in over}
    assert_close("triton", want, got, limits)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunked_is_the_recurrence(case):
    operand = operands(*case, torch.float64, "cpu")
    operand = ({name: part.double() for name, part in operand[0].items()}, *operand[1:])
    want, got = (run(*operand, kernel) for kernel in ("reference", "chunked"))
    assert_close("chunked", want, got, 1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_is_the_recurrence(case, device):
    compare(case, torch.float32, device, {"y": 1e-5} | dict.fromkeys(WEIGHTS, 1e-4))


def test_heads_with_small_states_are_read_in_shorter_chunks():
    low, full = torch.bfloat16, torch.float32
    assert [chunk_of(9999, low, size) for size in (32 * 32, 64 * 32, 64 * 64, 64 * 128)] == [64, 128, 128, 256]
    assert [chunk_of(n, low, 32 * 32) for n in (20, 40, 70)] == [32, 64, 64] and chunk_of(9999, full) == 64
    for n in (1, 33, 65, 300, 1536):  # rows are whole chunks whatever the heads are
        assert {rows_of(n, "triton", low) % chunk_of(n, low, size) for size in (256, 4096, 8192)} == {0}


@pytest.mark.parametrize("case", [CASES[2], (300, 2, 16, 1, 16, 1), (200, 1, 64, 1, 32, 2)], ids=str)
def test_triton_in_bfloat16(case, device):
    """More than one chunk in the second: a decay's gradient must not be a difference to states in 16 bits. Chunks of
    128 in the third."""
    # The interpreter cuts digits off where a GPU rounds: twice the error.
    factor = 1 if device == "cuda" else 2
    weights = dict.fromkeys(WEIGHTS, 1e-2 * factor)
    compare(case, torch.bfloat16, device, {"y": 5e-3 * factor, **weights})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: too large for the interpreter")
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes(case, dtype):
    weights = dict.fromkeys(WEIGHTS, 1e-4 if dtype == torch.float32 else 1e-2)
    compare(case, dtype, "cuda", {"y": 1e-4 if dtype == torch.float32 else 5e-3, **weights})


@pytest.mark.parametrize("ways", [1, 2])
def test_state_alone_is_what_a_scan_carries_on(ways):
    """Reading a review first is starting from the state that it leaves."""
    case = (12, 4, 3, 2, 5, ways)
    parts, index, _, sizes = operands(*case, torch.float64, "cpu")
    parts = {name: part.double() for name, part in parts.items()}
    got = scan_state(parts["u"], parts["dt"], parts["a"], parts["dt_bias"], index, **sizes)
    for way in range(ways):
        # One more token that adds nothing and forgets nothing, with c = a unit vector, reads the state.
        for number in range(5):
            u = torch.nn.functional.pad(parts["u"], (0, 0, 0, 1))
            u[:, -1, -5:] = u[:, -1, -10:-5] = torch.eye(5, dtype=u.dtype)[number]
            dt = torch.cat([parts["dt"][:, index], torch.full_like(parts["dt"][:, :1], -1e9)], 1)
            one = [parts[name][way : way + 1] for name in ("a", "d", "dt_bias")]
            y = scan(u, dt, *one, **sizes, kernel="reference")[:, -1].unflatten(-1, (4, 3))
            assert_close(f"state {number} of way {way}", got[:, way, ..., number], y, 1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_leaves_the_same_state(case, device):
    parts, index, _, sizes = operands(*case, torch.float32, device)
    n = parts["u"].shape[1]
    found = []
    for kernel, dtype in (("chunked", torch.float64), ("triton", torch.float32)):
        used = [parts[name].to(dtype).requires_grad_() for name in ("u", "dt", "a", "dt_bias")]
        u = torch.nn.functional.pad(used[0], (0, 0, 0, rows_of(n, kernel, dtype) - n))
        state = scan_state(u, *used[1:], index, **sizes, kernel=kernel)
        gradients = torch.autograd.grad(state, used, torch.cos(state.detach()))
        found.append(dict(zip(("state", "u", "dt", "a", "dt_bias"), (state, *gradients), strict=True)))
    assert_close("triton", *found, 1e-5)


def test_mistakes_are_sentences(device):
    parts, index, _, sizes = operands(5, 2, 4, 1, 4, 2, torch.float32, device)
    rest = [parts[name] for name in ("dt", "a", "d", "dt_bias")]
    with pytest.raises(RecipeError, match="no scan kernel called 'tritn'. Known: auto, reference, chunked, triton"):
        scan(parts["u"], *rest, index, **sizes, kernel="tritn")
    with pytest.raises(ValueError, match="u has 5 rows; 5 tokens take 32 with kernel='triton'"):
        scan(parts["u"], *rest, index, **sizes, kernel="triton")
    wide = torch.zeros(1, 256, 200 + 2 * 4, device=device)
    small = [torch.zeros(1, 5, 1, device=device), *(-torch.ones(1, 1, device=device) for _ in range(3))]
    with pytest.raises(RecipeError, match="in heads of up to 128; this head has 200 x 4. kernel='auto' takes another"):
        scan(wide, *small, state_dim=4, kernel="triton")
    assert scan(wide[:, :5], *small, state_dim=4).shape == (1, 5, 200)
    with pytest.raises(RecipeError, match="computes in float32, bfloat16 or float16, not torch.float64"):
        scan(parts["u"].double(), *rest, index, **sizes, kernel="triton")
