"""Mamba2 and MATE against independent forms of themselves, and the sharp edges that facts.md names."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from lingen.blocks import Mixer
from lingen.blocks.mamba2 import Mamba2, ScanMemory
from lingen.blocks.mate import MATE
from lingen.blocks.scan import permutation
from lingen.blocks.temporal_swin import TemporalSwin
from lingen.kernels.pool import pool
from lingen.kernels.ssd import ssd
from lingen.recipe.bounds import FREE
from lingen.recipe.errors import SettingError
from lingen.recipe.passed_on import passes_on
from lingen.recipe.registry import MIXERS
from lingen.recipe.signature import bare, check_settings
from tests.helpers.closeness import assert_close, relative_error

DIM = 12
SMALL = {"state_dim": 4, "head_dim": 6, "dt_max": 0.5}


def tokens(*grid, dtype=torch.float64, batch=2):
    return torch.randn(batch, *grid, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def mamba2(layer=0, **settings):
    torch.manual_seed(layer)
    return Mamba2(DIM, layer, **SMALL | settings).double()


def one_direction(mixer, x, direction, flip_review):
    """The form of the paper's Figure 2: pooled tokens are projected, laid in front, scanned and thrown away."""
    inner, channels, heads = mixer.sizes
    sequences = []
    for is_clip, source in [(False, pool(x, mixer.review)), (True, x)] if mixer.review else [(True, x)]:
        order, _ = permutation(mixer.order, tuple(source.shape[1:4]), x.device)
        streams = mixer.in_proj(source.flatten(1, 3)[:, order])[..., inner:]
        mine = slice(None) if mixer.centred else slice(direction * channels, (direction + 1) * channels)
        weight, bias = mixer.conv1d.weight[mine], mixer.conv1d.bias[mine]
        taps = weight.shape[-1]
        before = taps // 2 if mixer.centred else taps - 1
        flipped = direction == 1 and (is_clip or flip_review)
        xbc, dt = streams.split([channels, heads], -1)
        if flipped and not mixer.centred:
            xbc = xbc.flip(1)
        # Masked, each column of a temporal order is a sequence of its own; one frame has no columns.
        column = source.shape[1] if mixer.masked and str(mixer.order).endswith("t") and source.shape[1] > 1 else None
        pieces = xbc.mT.split(column or xbc.shape[1], -1)
        padded = (F.pad(piece, (before, taps - 1 - before)) for piece in pieces)
        xbc = F.silu(torch.cat([F.conv1d(piece, weight, bias, groups=channels) for piece in padded], -1).mT)
        if flipped and mixer.centred:
            xbc = xbc.flip(1)
        sequences.append(torch.cat([xbc, dt.flip(1) if flipped else dt], -1))
    if flip_review and direction == 1:
        sequences.reverse()
    size = mixer.groups * mixer.state_dim
    xs, b, c, dt = torch.cat(sequences, 1).split([inner, size, size, heads], -1)
    y = ssd(
        xs.unflatten(-1, (heads, -1)), dt, -mixer.memory.a_log[direction].exp(), b.unflatten(-1, (mixer.groups, -1)),
        c.unflatten(-1, (mixer.groups, -1)), mixer.memory.d[direction], mixer.memory.dt_bias[direction],
        kernel="reference",
    ).flatten(2)  # fmt: skip
    n = x[0, ..., 0].numel()
    y = y[:, :n].flip(1) if flip_review and direction == 1 else y[:, -n:]
    return y.flip(1) if direction == 1 and not flip_review else y


def explicit(mixer, x):
    plain = mixer.review_reverse == "plain"
    y = sum(one_direction(mixer, x, direction, plain and direction == 1) for direction in range(mixer.directions))
    _, inverse = permutation(mixer.order, tuple(x.shape[1:4]), x.device)
    z = mixer.in_proj(x)[..., : mixer.sizes[0]]
    gated = (y[:, inverse].unflatten(1, x.shape[1:4]) * F.silu(z)).unflatten(-1, (mixer.norm_groups, -1))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + mixer.norm.eps)
    return mixer.out_proj(normed.flatten(-2) * mixer.norm.weight)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"conv": "per_direction"},
        {"review_reverse": "plain"},
        {"review_reverse": "plain", "conv": "per_direction", "review": (3, 2, 4)},
        {"bidirectional": False},
        {"groups": 2, "scan": "hilbert", "conv_width": 3},
        {"review": None, "scan": "zigzag"},
        {"review": (1, 1, 1), "expand": 1, "conv_width": 1},
        {"conv_ends": "masked", "scan": "hwt", "review": (1, 2, 2)},
        {"conv_ends": "masked", "scan": "wht", "conv": "per_direction"},
        {"conv_ends": "masked"},
    ],
    ids=str,
)
def test_review_as_prefix_and_as_initial_state_agree(settings):
    for layer, grid in enumerate([(3, 5, 7), (1, 4, 3), (4, 2, 2), (1, 1, 1)]):
        mixer, x = mamba2(layer, **settings), tokens(*grid).requires_grad_()
        got, want = mixer(x), explicit(mixer, x)
        assert_close("output", want, got, 1e-12)
        parts = {"input": x} | dict(mixer.named_parameters())
        seed = torch.randn_like(got)
        mine, theirs = (
            dict(zip(parts, torch.autograd.grad(y, list(parts.values()), seed), strict=True)) for y in (got, want)
        )
        assert_close("gradient of", theirs, mine, 1e-11)


@pytest.mark.parametrize("groups", [1, 2])
def test_causal_mode_is_the_mamba2_of_transformers(groups):
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    if groups > 1 and "group_size" not in inspect.signature(modeling.MambaRMSNormGated).parameters:
        pytest.skip("this transformers (such as 5.17) norms over all groups at once; mamba_ssm and ours over each")
    configuration = modeling.Mamba2Config(
        hidden_size=DIM, num_heads=4, head_dim=6, state_size=4, expand=2, n_groups=groups, chunk_size=8,
        num_hidden_layers=1,
    )  # fmt: skip
    theirs = modeling.Mamba2Mixer(configuration, layer_idx=0).float()
    ours = mamba2(scan="thw", review=None, bidirectional=False, groups=groups).float()
    names = {"A_log": "memory.a_log", "D": "memory.d", "dt_bias": "memory.dt_bias"}
    torch.nn.init.normal_(theirs.D)
    torch.nn.init.uniform_(theirs.norm.weight, 0.5, 2)
    weights = {names.get(name, name): weight for name, weight in theirs.state_dict().items()}
    ours.load_state_dict({name: weight.view_as(ours.state_dict()[name]) for name, weight in weights.items()})
    x = tokens(3, 5, 2, dtype=torch.float32)
    assert_close("output", theirs(x.flatten(1, 3)).view_as(x), ours(x), 1e-5)


def test_causal_mode_sees_no_later_token():
    mixer, x = mamba2(scan="thw", review=None, bidirectional=False), tokens(2, 2, 3).requires_grad_()
    seen = torch.autograd.grad(mixer(x).flatten(1, 3)[:, 5].sum(), x)[0].flatten(1, 3).abs().amax((0, 2))
    assert (seen[:6] > 0).all() and (seen[6:] == 0).all()


def test_both_directions_see_every_token():
    mixer, x = mamba2(review=None), tokens(2, 2, 3).requires_grad_()
    seen = torch.autograd.grad(mixer(x)[:, 0, 1, 1].square().sum(), x)[0]
    assert (seen.abs().amax((0, 4)) > 0).all()


def test_kernels_agree_inside_the_mixer():
    x = tokens(3, 4, 5)
    assert_close("output", mamba2(kernel="reference")(x), mamba2(kernel="chunked")(x), 1e-12)


@pytest.mark.parametrize(
    "settings",
    [{}, {"scan": "hilbert", "groups": 2}, {"conv": "per_direction", "scan": "wth"}, {"bidirectional": False},
     {"review_reverse": "plain", "scan": "thw"}, {"review": None, "conv_width": 3},
     {"conv_ends": "masked", "scan": "hwt", "review": (1, 2, 2)},
     {"conv_ends": "masked", "scan": "wht", "conv": "per_direction"}, {"norm": "per_head", "head_dim": 4}],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("poisoned")
def test_triton_inside_the_mixer(settings, device, monkeypatch):
    """All kernels together against plain float64: outputs and every gradient by name."""
    if device == "cpu":  # the interpreter walks past the sequence's end, to the end of a program's run
        conv_triton = pytest.importorskip("lingen.kernels.conv_triton", reason="Triton is not installed")
        for launch in conv_triton.LAUNCH.values():
            monkeypatch.setitem(launch, "POSITIONS", 16)
    settings = {"dt_max": 0.1} | settings  # float32 loses digits where a head forgets within a token
    exact = mamba2(1, **settings)
    fast = mamba2(1, **settings | {"kernel": "triton"}).float()
    fast.load_state_dict(exact.state_dict())
    exact.to(device), fast.to(device)
    found = []
    for mixer in (exact, fast):
        grid = (3, 5, 7) if device == "cuda" else (2, 3, 5)
        x = tokens(*grid, dtype=mixer.out_proj.weight.dtype).to(device).requires_grad_()
        parts = {"input": x} | dict(mixer.named_parameters())
        y = mixer(x)
        seed = torch.sin(torch.arange(y.numel(), device=device)).view_as(y).to(y.dtype)
        found.append({"y": y} | dict(zip(parts, torch.autograd.grad(y, list(parts.values()), seed), strict=True)))
    assert_close("triton", *found, 1e-4)


@pytest.mark.parametrize("conv", ["shared", "per_direction"])
@pytest.mark.parametrize("scan", ["hwt", "wht", "thw"])
def test_a_masked_conv_keeps_a_last_frame_from_the_next_columns_first(scan, conv):
    """With a state that remembers nothing, a token hears what the conv gives it, and no more."""
    x = tokens(6, 2, 3).requires_grad_()
    heard = {}
    for ends in ("joined", "masked"):
        mixer = mamba2(scan=scan, conv=conv, conv_ends=ends, review=None)
        with torch.no_grad():
            mixer.memory.a_log.fill_(12.0)
        seen = torch.autograd.grad(mixer(x)[:, 5, 0, 0].square().sum(), x)[0].square().sum((0, 2, 3, 4))
        heard[ends] = (seen / seen.sum()).tolist()
    if scan == "thw":
        assert heard["masked"] == heard["joined"]
    else:
        assert heard["joined"][0] > 1e-2 and heard["masked"][0] < 1e-12
        assert min(heard["masked"][4:]) > 1e-2


def test_sizes_at_the_width_of_the_large_model():
    with torch.device("meta"):
        mixer = Mamba2(2560, 0)
    assert mixer.in_proj.weight.shape == (10576, 2560) and mixer.in_proj.bias is None
    assert mixer.memory.a_log.shape == mixer.memory.d.shape == mixer.memory.dt_bias.shape == (2, 80)


def test_what_must_be_float32_is():
    torch.set_default_dtype(torch.bfloat16)
    try:
        mixer = Mamba2(DIM, 0, **SMALL)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in (mixer.memory.a_log, mixer.memory.d, mixer.memory.dt_bias)} == {torch.float32}
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    assert mixer(tokens(2, 3, 3, dtype=torch.bfloat16)).isfinite().all()


def drawn(**settings):
    torch.manual_seed(3)
    return Mamba2(64, 0, head_dim=1, state_dim=4, **settings)


def test_time_steps_start_in_their_range():
    mixer = drawn(dt_min=1e-5, dt_max=1e-4)
    steps = F.softplus(mixer.memory.dt_bias)
    assert steps.min() > 0.99e-5 and steps.max() < 1.01e-4 and steps.std() > 1e-5


def test_without_long_heads_a_scan_starts_as_mamba_ssms():
    """Bit for bit: mamba_ssm draws A from U(1, 16); and no other parameter moves with the share."""
    none = drawn(long_heads=0)
    torch.manual_seed(3)
    torch.nn.Linear(64, none.in_proj.out_features, bias=False)
    torch.nn.Conv1d(none.sizes[1], none.sizes[1], 4, groups=none.sizes[1])
    assert torch.equal(none.memory.a_log, torch.empty(2, 128).uniform_(1, 16).log())
    assert torch.equal(
        none.memory.dt_bias, torch.empty(2, 128).uniform_(math.log(1e-3), math.log(0.1)).exp().expm1().log()
    )
    some = dict(drawn(long_heads=0.25).named_parameters())
    for name, value in none.named_parameters():
        assert torch.equal(value, some[name]) is (name != "memory.a_log"), name


@pytest.mark.parametrize("share, every", [(0.25, 4), (0.5, 2), (1.0, 1)])
def test_every_so_many_heads_are_long_in_both_directions(share, every):
    a = drawn(long_heads=share, a_min=1e-4, a_max=4).memory.a_log.exp()
    is_long = torch.arange(128) % every == every - 1
    assert (a[:, is_long] <= 1).all() and a[:, is_long].min() > 0.99e-4
    assert (a[:, ~is_long] >= 1).all() and (every == 1 or 3.5 < a[:, ~is_long].max() < 4)
    logs = a[:, is_long].log() / math.log(1e-4)  # log-uniform: these are uniform in [0, 1]
    assert abs(logs.mean() - 0.5) < 3 * 12**-0.5 / logs.numel() ** 0.5


@pytest.mark.parametrize(
    "heads, share, count", [(1, 0.25, 0), (2, 0.25, 1), (3, 0.25, 1), (10, 0.25, 3), (10, 0.1, 1), (7, 0.0, 0)]
)
def test_the_nearest_number_of_heads_is_long(heads, share, count):
    memory = ScanMemory(1, heads)
    memory.draw(1e-3, 0.1, share, 1e-6, 16)
    assert (memory.a_log < 0).sum() == count


def test_the_horizon_is_weighted_by_what_is_written():
    """Against the response itself: what is left of a write, summed over the lags, over what it was."""
    memory = ScanMemory(1, 3)
    with torch.no_grad():
        memory.a_log.copy_(torch.tensor([[16.0, 1.0, 0.01]]).log())
        memory.dt_bias.copy_(torch.tensor([[0.1, 0.01, 1e-5]]).expm1().log())
    a, dt = memory.a_log.double().exp(), F.softplus(memory.dt_bias.double())
    lags = torch.logspace(-3, 9, 100_001, dtype=torch.float64)
    left = (dt * torch.exp(-lags[:, None] * dt * a)).sum(1)
    want = torch.trapezoid(left, lags) / dt.sum()
    assert memory.horizon().shape == () and abs(memory.horizon() / want - 1) < 1e-3
    assert memory.horizon() < 0.001 * (1 / (dt * a)).max()  # the head that remembers longest hardly writes


def test_long_heads_reach_where_small_steps_do_not():
    reach = {name: drawn(**settings).horizon() for name, settings in {
        "usual": {"long_heads": 0}, "small steps": {"long_heads": 0, "dt_min": 1e-5}, "long": {"a_min": 7e-4},
    }.items()}  # fmt: skip
    assert reach["small steps"] < 3 * reach["usual"] and reach["long"] > 100 * reach["usual"]


def review_share(mixer, x, place):
    """Share of the output at a token that the review tokens make."""
    with_review, review = mixer(x), mixer.review
    mixer.review = None
    without = mixer(x)
    mixer.review = review
    return relative_error(*(y.flatten(1, 3)[:, place] for y in (with_review, without)))


def test_how_far_the_review_reaches_depends_on_the_decay():
    """facts.md, sharp edge 1: with the usual heads the overview is forgotten within a frame."""
    x = tokens(16, 16, 8, batch=1)
    shares = {}
    for share in (0.0, 0.25):
        mixer = mamba2(scan="thw", bidirectional=False, dt_max=0.1, state_dim=16, long_heads=share, a_min=7e-4)
        with torch.no_grad():
            mixer.memory.d.zero_()  # what the scan remembers, without the token itself
            shares[share] = [review_share(mixer, x, place) for place in (0, 2000)]
    (near, far), (near_long, far_long) = shares[0.0], shares[0.25]
    assert near > 0.05 and far < near * 1e-3
    assert far_long > near_long * 0.05 and far_long > 100 * far


def test_a_norm_for_each_head_keeps_a_loud_one_from_drowning_the_others():
    x = tokens(2, 3, 4)
    found = {}
    for norm in ("shared", "per_head"):
        mixer = mamba2(norm=norm, expand=1)
        heads = mixer.sizes[2]
        assert mixer.norm_groups == (heads if norm == "per_head" else 1)
        mixer.out_proj = torch.nn.Identity()
        before = mixer(x).unflatten(-1, (heads, -1))
        with torch.no_grad():
            mixer.memory.d[:, 0] += 1e3  # the first head is loud
        after = mixer(x).unflatten(-1, (heads, -1))
        found[norm] = relative_error(before[..., 1:, :], after[..., 1:, :])
    assert found["shared"] > 0.9 and found["per_head"] < 1e-12


def mate(layer=0, **settings):
    torch.manual_seed(layer)
    return MATE(DIM, layer, **SMALL | {"window": (2, 3, 4)} | settings)


def test_mate_is_the_sum_of_its_branches():
    for layer in range(2):
        mixer, x = mate(layer), tokens(3, 4, 5, dtype=torch.float32)
        assert torch.equal(mixer(x), mixer.ma(x) + mixer.te(x))
        assert isinstance(mixer.ma, Mamba2) and isinstance(mixer.te, TemporalSwin)
        assert mixer.te.shifted == (layer == 1)


def test_mate_has_every_setting_of_its_branches():
    def settings(mixer):
        parameters = inspect.signature(mixer).parameters.values()
        return {p.name: (p.default, p.annotation) for p in parameters if p.kind is p.KEYWORD_ONLY}

    mine, own = settings(MATE), {"ma", "te", "branch_gate"}
    branches = settings(Mamba2) | settings(TemporalSwin)
    assert mine.keys() == branches.keys() | own
    for name in branches.keys() - {"kernel"}:
        assert mine[name] == branches[name], name
    offered = [kernel for branch in (Mamba2, TemporalSwin) for kernel in bare(settings(branch)["kernel"][1]).__args__]
    assert bare(mine["kernel"][1]).__args__ == tuple(dict.fromkeys(offered))
    assert mine["kernel"][1].__metadata__ == (FREE,)
    assert list(mine)[:4] == ["ma", "te", "branch_gate", "scan"] and list(mine)[-1] == "kernel"
    assert mine["kernel"][0] == settings(Mamba2)["kernel"][0] == settings(TemporalSwin)["kernel"][0]


def test_settings_that_are_passed_on_are_checked_as_if_they_were_its_own():
    with pytest.raises(TypeError, match="unexpected keyword argument 'wndow'"):
        mate(wndow=(2, 2, 2))
    with pytest.raises(SettingError, match=r"Expected at least 1, got 0. \(at window.1 of 'MATE'\)"):
        mate(window=(2, 0, 2))
    filled, found = check_settings(MATE, {"state_dim": 0, "window": [2, 2, 2], "kernel": "sdpa", "size": 3})
    assert [one.key for one in found] == ["size", "state_dim"]
    assert filled["window"] == (2, 2, 2) and filled["head_dim"] == 64 and filled["review"] == (2, 2, 2)


def test_parts_that_disagree_cannot_pass_their_settings_on():
    class One:
        def __init__(self, *, size: int = 1, name: str = "a"): ...

    class Other:
        def __init__(self, *, size: int = 2): ...

    class Third:
        def __init__(self, *, name: int = "a"): ...

    with pytest.raises(TypeError, match="'size' has several defaults: 1, 2"):
        passes_on(One, Other)
    with pytest.raises(TypeError, match="'name' has several types"):
        passes_on(One, Third)


@pytest.mark.parametrize("name", MIXERS.names())
def test_what_a_mixer_says_of_itself_is_so(name):
    mixer = MIXERS.build(name, 32, 0)
    assert isinstance(mixer, Mixer)
    takes_onto = "onto" in inspect.signature(mixer.forward).parameters
    assert getattr(mixer, "adds_onto", False) is takes_onto
    assert not getattr(mixer, "wants_fp8", False)
    if hasattr(mixer, "tile"):
        assert mixer.tile((3, 9, 9)) == (3, 4, 4) and mixer.tile((9, 3, 1)) == (8, 3, 1)


def test_the_probe_is_of_the_te_branchs_own_window():
    """Whether it is written flat or in the branch's own mapping."""
    flat, own = mate(3), mate(3, window=(8, 4, 4), te={"name": "temporal_swin", "window": (2, 3, 4)})
    assert torch.equal(flat.te.out_proj.weight, own.te.out_proj.weight)


def test_settings_reach_their_branch():
    mixer = mate(scan="hwt", review=None, window=(1, 2, 3), num_heads=3, conv="per_direction", kernel="reference")
    assert (mixer.ma.order, mixer.ma.review, mixer.ma.centred, mixer.ma.kernel) == ("hwt", None, False, "reference")
    assert (mixer.te.window, mixer.te.num_heads, mixer.te.kernel) == ((1, 2, 3), 3, "reference")
    assert mate(kernel="sdpa").te.kernel == "sdpa" and mate(kernel="sdpa").ma.kernel == "auto"


def test_a_branch_switches_off_or_is_another_mixer():
    x = tokens(2, 3, 4, dtype=torch.float32)
    alone = mate(te=None)
    assert alone.te is None and torch.equal(alone(x), alone.ma(x))
    alone = mate(ma=None)
    assert alone.ma is None and torch.equal(alone(x), alone.te(x))
    swapped = mate(ma={"name": "mamba2", "state_dim": 7}, te={"name": "attention", "num_heads": 2})
    assert swapped.ma.state_dim == 7 and swapped.ma.head_dim == 6 and swapped.te.num_heads == 2
    assert torch.equal(swapped(x), swapped.ma(x) + swapped.te(x))
    assert mate(te="attention", num_heads=3).te.num_heads == 3


def test_mistakes_of_mate_are_named():
    with pytest.raises(SettingError, match="ma and te are both null"):
        mate(ma=None, te=None)
    with pytest.raises(SettingError, match="kernel='sdpa' is offered by no branch that is switched on"):
        mate(te=None, kernel="sdpa")
    with pytest.raises(ValueError, match="Did you mean 'mamba2'"):
        mate(ma="mamba")
    with pytest.raises(SettingError, match="num_heads=5 does not divide the width 12"):
        mate(num_heads=5)


def test_branches_start_at_equal_rms():
    for layer in range(3):
        mixer, x = mate(layer), torch.randn(4, 2, 3, 4, DIM)
        ma, te = (branch(x).square().mean().sqrt() for branch in (mixer.ma, mixer.te))
        assert 0.8 < ma / te < 1.25


def test_equalising_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(0)
    Mamba2(DIM, 0, **SMALL)
    TemporalSwin(DIM, 0, window=(2, 3, 4))
    want = torch.rand(3)
    torch.manual_seed(0)
    MATE(DIM, 0, **SMALL, window=(2, 3, 4))
    assert torch.equal(torch.rand(3), want)


def test_a_gain_for_each_branch_starts_as_the_plain_sum():
    mixer, x = mate(branch_gate="each"), tokens(2, 3, 4, dtype=torch.float32)
    assert torch.equal(mixer(x), mixer.ma(x) + mixer.te(x))
    torch.nn.init.zeros_(mixer.te_gain)
    assert torch.equal(mixer(x), mixer.ma(x)) and mixer.te_gain.shape == (DIM,)


class Bare(torch.nn.Module):
    """A third party's mixer: random, and without an `out_proj`."""

    def __init__(self, dim, layer, *, gain: float = 2.0):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def forward(self, x):
        return x * self.gain + 0 * torch.rand_like(x)


def test_third_parties_fit_in_either_branch():
    own = {"name": f"{__name__}:Bare", "gain": 3.0}
    x = tokens(2, 3, 4, dtype=torch.float32)
    mixer = mate(te=own)
    assert torch.equal(mixer.te(x), 3 * x)
    mixer = mate(ma=own)
    assert 0.8 < mixer.te(x).square().mean().sqrt() / (3 * x).square().mean().sqrt() < 1.25


@pytest.mark.parametrize("name", ["mamba2", "temporal_swin", "mate"])
def test_memory_is_linear_in_tokens(name):
    """Bytes that autograd keeps: four times the frames cost at most 4.2 times as much."""

    def kept(frames):
        known = inspect.signature(MIXERS[name]).parameters
        settings = {key: v for key, v in (SMALL | {"window": (4, 3, 4)}).items() if key in known}
        mixer, storages = MIXERS.build({"name": name} | settings, DIM, 1), {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(1, frames, 6, 8, DIM, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = mixer(x)
        return sum(storages.values()) if y.numel() else 0

    assert kept(64) < 4.2 * kept(16)
