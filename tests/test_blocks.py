"""What every mixer must do, whichever is registered; then the layers and the windows."""

import inspect
import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from lingen.blocks.layers import RMSNorm, SwiGLU, head_count
from lingen.blocks.temporal_swin import TemporalSwin
from lingen.kernels.window_attention import rotary_table, rotate
from lingen.recipe.errors import SettingError
from lingen.recipe.registry import MIXERS
from tests.helpers.closeness import assert_close

DIM = 16
GRIDS = [(1, 1, 1), (1, 4, 6), (3, 5, 7), (2, 4, 4)]
LAYERS = range(4)
# Small numbers where a mixer's own defaults are made for large widths.
SMALL = {"head_dim": 8, "state_dim": 4, "window": (2, 3, 4), "dt_max": 0.5}


def build(name, layer=0, dim=DIM, **settings):
    torch.manual_seed(layer)
    known = inspect.signature(MIXERS[name]).parameters
    return MIXERS.build({"name": name} | {key: v for key, v in SMALL.items() if key in known} | settings, dim, layer)


def tokens(grid, batch=2, dim=DIM, dtype=torch.float32):
    return torch.randn(batch, *grid, dim, generator=torch.Generator().manual_seed(7)).to(dtype)


conformance = pytest.mark.parametrize("name, grid", list(itertools.product(MIXERS.names(), GRIDS)))


@conformance
def test_shape_and_finite_gradients_everywhere(name, grid):
    for layer in LAYERS:
        mixer, x = build(name, layer), tokens(grid).requires_grad_()
        y = mixer(x)
        assert y.shape == x.shape and y.dtype == x.dtype
        y.square().sum().backward()
        for part, parameter in [("input", x), *mixer.named_parameters()]:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), f"{part} in layer {layer}"


@conformance
def test_clips_of_a_batch_do_not_see_each_other(name, grid):
    for layer in LAYERS:
        mixer, x = build(name, layer).double(), tokens(grid, batch=3, dtype=torch.float64)
        together = mixer(x)
        alone = torch.cat([mixer(clip[None]) for clip in x])
        assert_close(f"layer {layer}", alone, together, 1e-12)
        other = torch.cat([x[:1], torch.randn_like(x[1:])])
        assert_close(f"layer {layer} beside other clips", together[0], mixer(other)[0], 1e-12)


@conformance
def test_strides_of_the_input_do_not_matter(name, grid):
    for layer in LAYERS:
        mixer, x = build(name, layer).double(), tokens(grid, dtype=torch.float64)
        strided = x.permute(4, 3, 1, 2, 0).contiguous().permute(4, 2, 3, 1, 0)
        assert_close(f"layer {layer}", mixer(x), mixer(strided), 1e-12)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", MIXERS.names())
def test_low_precision_is_near_float64(name, dtype, limit):
    mixer, x = build(name, 1).to(dtype), tokens((3, 5, 7), dtype=dtype)
    got = mixer(x)
    assert got.dtype == dtype
    assert_close(name, mixer.double()(x.double()), got, limit)


@pytest.mark.parametrize("name", MIXERS.names())
def test_autocast_is_near_float32(name):
    mixer, x = build(name, 1), tokens((3, 5, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mixer(x)
    assert_close(name, mixer(x), got.float(), 3e-2)


@pytest.mark.parametrize("name", MIXERS.names())
def test_built_and_run_on_meta(name):
    for layer in LAYERS:
        with torch.device("meta"):
            mixer, x = build(name, layer), torch.empty(2, 3, 5, 7, DIM)
        assert all(parameter.is_meta for parameter in mixer.parameters())
        assert mixer(x).shape == x.shape


@pytest.mark.parametrize("name", MIXERS.names())
def test_defaults_fit_a_real_width(name):
    with torch.device("meta"):
        assert MIXERS.build(name, 2560, 0)(torch.empty(1, 3, 4, 5, 2560)).shape == (1, 3, 4, 5, 2560)


@pytest.mark.parametrize("name", MIXERS.names())
def test_the_same_seed_gives_the_same_weights(name):
    first, second = build(name, 1).state_dict(), build(name, 1).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


class Stack(nn.Module):
    """Pre-norm residual blocks, as deep as the large recipes."""

    def __init__(self, name, depth=24):
        super().__init__()
        self.mixers = nn.ModuleList(build(name, layer, dim=8) for layer in range(depth))
        self.norms = nn.ModuleList(RMSNorm(8) for _ in range(depth))

    def forward(self, x):
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return x


@pytest.mark.parametrize("name", MIXERS.names())
def test_gradients_stay_finite_at_depth_24_in_bfloat16(name):
    stack, x = Stack(name).bfloat16(), tokens((4, 3, 3), dim=8, dtype=torch.bfloat16).requires_grad_()
    stack(x).float().square().mean().backward()
    for part, parameter in [("input", x), *stack.named_parameters()]:
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() < 1e4, part


@pytest.mark.parametrize("grid", [(3, 5, 7), (6, 4, 2), (1, 4, 6), (5, 1, 9)])
@pytest.mark.parametrize("layer", (0, 1))
def test_temporal_swin_is_masked_full_attention(grid, layer):
    mixer, x = build("temporal_swin", layer, num_heads=2).double(), tokens(grid, dtype=torch.float64)
    wanted = swin_by_pairs(mixer, x, (2, 3, 4), shifted=layer == 1)
    assert_close("output", wanted, mixer(x), 1e-12)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    mine, twins = (
        dict(zip(names, torch.autograd.grad(y.square().sum(), parameters), strict=True)) for y in (mixer(x), wanted)
    )
    assert_close("gradient of", twins, mine, 1e-12)


def swin_by_pairs(mixer, x, window, shifted):
    """Twin: every pair of tokens of the whole grid, allowed where both lie in one window."""
    grid = x.shape[1:4]
    places = torch.cartesian_prod(*map(torch.arange, grid))
    allowed = torch.ones(len(places), len(places), dtype=torch.bool)
    for axis, n, size in zip(range(3), grid, window, strict=True):
        if n > size:
            # Windows end where the list of borders says, worked out here by counting from the middle of the axis.
            count = -(-n // size)
            first = size - (count * size - n) // 2
            borders = range(first - size // 2 if shifted else first, n, size)
            number = torch.tensor([sum(i >= border for border in borders if border > 0) for i in range(n)])
            inside = number[places[:, axis]]
            allowed &= inside[:, None] == inside[None]
    q, k, v = mixer.in_proj(x).flatten(1, 3).unflatten(-1, (3, mixer.num_heads, -1)).unbind(2)
    table = rotary_table(tuple(grid), q.shape[-1], x.dtype, x.device)
    q, k = rotate(mixer.q_norm(q), table), rotate(mixer.k_norm(k), table)
    out = scaled_dot_product_attention(*(u.transpose(1, 2) for u in (q, k, v)), attn_mask=allowed)
    return mixer.out_proj(out.transpose(1, 2).flatten(2)).view_as(x)


@pytest.mark.parametrize("layer", (0, 1))
def test_windows_never_wrap(layer):
    mixer, x = build("temporal_swin", layer).double(), tokens((7, 8, 9), dtype=torch.float64).requires_grad_()
    for axis in (1, 2, 3):
        last = mixer(x).select(axis, -1).square().sum()
        seen = torch.autograd.grad(last, x)[0].select(axis, 0)
        assert seen.abs().max() == 0


def test_a_clamped_axis_is_not_shifted():
    even, odd = (build("temporal_swin", layer, window=(8, 4, 4)) for layer in (0, 1))
    odd.load_state_dict(even.state_dict())
    x = tokens((1, 4, 3))
    assert torch.equal(even(x), odd(x))
    assert not torch.allclose(even(tokens((1, 4, 5))), odd(tokens((1, 4, 5))))


def test_shift_reaches_what_no_window_did():
    x = tokens((4, 1, 1)).requires_grad_()
    for layer, reached in ((0, False), (1, True)):
        mixer = TemporalSwin(DIM, layer, window=(2, 1, 1))
        seen = torch.autograd.grad(mixer(x)[:, 1].square().sum(), x)[0][:, 2]
        assert (seen.abs().max() > 0) == reached


def test_rotary_sees_only_differences_in_each_axis():
    table = rotary_table((3, 4, 5), 14, torch.float64, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 14, dtype=torch.float64).expand(2, 1, 60, 1, 14)
    scores = (rotate(q, table)[0, :, 0] @ rotate(k, table)[0, :, 0].T).view(3, 4, 5, 3, 4, 5)
    for (i, j), axis in itertools.product([((0, 0, 0), (1, 2, 3)), ((1, 0, 2), (0, 3, 0))], range(3)):
        step = [int(axis == other) for other in range(3)]
        moved = [tuple(a + b for a, b in zip(place, step, strict=True)) for place in (i, j)]
        if all(p < n for place in moved for p, n in zip(place, (3, 4, 5), strict=True)):
            torch.testing.assert_close(scores[i][j], scores[moved[0]][moved[1]], rtol=1e-5, atol=1e-8)
    assert len({round(scores[0, 0, 0][place].item(), 9) for place in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}) == 4


@pytest.mark.parametrize("dim, heads", [(2560, 20), (512, 4), (96, 3), (64, 2), (16, 2), (8, 1), (7, 1), (1, 1)])
def test_head_width_shrinks_with_the_width(dim, heads):
    assert head_count(dim, None) == heads


def test_norms_and_swiglu():
    x = torch.randn(3, 12, dtype=torch.float64)
    assert_close("RMSNorm", x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), RMSNorm(12).double()(x), 1e-12)
    assert RMSNorm(12)(x.bfloat16()).dtype == torch.bfloat16
    swiglu = SwiGLU(12, 32)
    assert swiglu(x.float()).shape == x.shape and sum(p.numel() for p in swiglu.parameters()) == 3 * 12 * 32


@pytest.mark.parametrize(
    "name, setting, value, words",
    [
        ("attention", "num_heads", 3, "num_heads=3 does not divide the width 16; choose one of 1, 2, 4, 8, 16."),
        ("temporal_swin", "num_heads", 0, r"at least 1 or null, got 0. \(at num_heads of"),
        ("temporal_swin", "window", (8, 0, 4), r"at least 1, got 0. \(at window.1 of"),
        ("mamba2", "head_dim", 5, r"head_dim=5 does not divide expand \* width = 2 \* 16 = 32."),
        ("mamba2", "groups", 3, "groups=3 does not divide the 4 heads"),
        ("mamba2", "state_dim", 0, r"at least 1, got 0. \(at state_dim of"),
        ("mamba2", "review", (2, 0, 2), r"at least 1, got 0. \(at review.1 of"),
        ("mamba2", "dt_min", 1.0, "dt_min=1.0 must be at most dt_max=0.5"),
        ("mamba2", "scan", "zigzig", "Did you mean 'zigzag'"),
        ("mate", "window", (8, 4, 0), "window"),
        ("mate", "review", (0, 1, 1), "review"),
    ],
)
def test_a_wrong_setting_is_named(name, setting, value, words):
    with pytest.raises(SettingError, match=words) as caught:
        build(name, **{setting: value})
    assert caught.value.setting == setting
