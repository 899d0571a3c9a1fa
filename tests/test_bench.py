"""The complexity receipt: what is counted grows as the papers say, and what is measured is fitted and told rightly."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from lingen_yardsticks import timing
from lingen_yardsticks.build import built, denoiser, sample_inputs, tflop_of
from lingen_yardsticks.exponent import crossover, fit_exponent
from lingen_yardsticks.mixer_flops import mixer_flops
from lingen_yardsticks.parts import milliseconds_by_part, part_of_kernel, triton_kernels
from lingen_yardsticks.place import Place
from lingen_yardsticks.receipt import by_flops, by_time, meets, part_fits, says
from lingen_yardsticks.scaling import GRIDS, QUICK_GRIDS
from lingen_yardsticks.timing import saved_bytes
from torch.utils.flop_counter import FlopCounterMode

from lingen.cli import main
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import MIXERS
from lingen.recipe.sections import LinGenConfig
from tests.helpers.closed_forms import closed_form

CPU = torch.device("cpu")
HERE = Place(CPU, torch.float32, 0.5)


LINEAR = ["linear_attention", "mamba2", "mate", "temporal_swin"]


def flops(mixer, grid, dim, layer=1):
    return sum(mixer_flops(mixer, dim, layer, grid).values())


@pytest.mark.parametrize("mixer", LINEAR)
def test_flops_are_linear_from_8k_to_278k_tokens(mixer: str):
    tokens = [math.prod(grid) for grid in GRIDS]
    assert tokens[0] == 8704 and tokens[-1] == 278_528
    assert fit_exponent(tokens, [flops(mixer, grid, 64) for grid in GRIDS]).exponent <= 1.05


def test_attentions_flops_are_quadratic():
    small, large = (mixer_flops("attention", 64, 1, grid)["products"] for grid in (GRIDS[1], GRIDS[4]))
    assert large == 16 * small
    assert small == 4 * math.prod(GRIDS[1]) ** 2 * 64  # q k^T and p v


@pytest.mark.parametrize("dim", [64, 2560])
@pytest.mark.parametrize("mixer", MIXERS.names())
def test_counted_flops_agree_with_the_closed_formula(mixer: str, dim: int):
    for grid in (*GRIDS, *QUICK_GRIDS, (1, 3, 3), (1, 8, 8), (7, 5, 3), (34, 44, 24)):
        for layer in (0, 1):
            formula = closed_form(mixer, grid, dim, layer)
            assert formula == flops(mixer, grid, dim, layer), (grid, layer)


def test_closed_formulas_know_the_settings():
    for component in (
        {"name": "mate", "te": None, "review": None},
        {"name": "mate", "ma": None, "window": (4, 4, 4)},
        {"name": "mamba2", "bidirectional": False, "expand": 1, "groups": 2, "state_dim": 32},
        {"name": "linear_attention", "num_heads": 4},
    ):
        for grid in ((20, 16, 16), (1, 4, 4)):
            assert closed_form(component, grid, 128) == flops(component, grid, 128)
    assert closed_form("somewhere:Mixer", (1, 1, 1), 8) is None


@pytest.mark.parametrize("mixer", ["mate", "attention"])
def test_flops_of_a_model_are_those_that_it_executes(mixer: str):
    config = LinGenConfig(dim=64, depth=3, mixer={"name": mixer}, channels=4, text_dims=(48,), max_grid=(4, 8, 8))
    model, inputs = denoiser(config, HERE), sample_inputs(config, (4, 8, 8), CPU)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with torch.enable_grad():
            model(*inputs)
    assert tflop_of(config, (4, 8, 8), HERE) == counter.get_total_flops() / 1e12


@pytest.mark.parametrize("mixer", LINEAR)
def test_activation_memory_grows_at_most_linearly(mixer: str):
    kept = []
    for frames in (16, 64):
        torch.manual_seed(0)
        layer = MIXERS.build(mixer, 32, 1)
        kept.append(saved_bytes(layer, [torch.randn(1, frames, 8, 8, 32, requires_grad=True)], layer.parameters()))
    assert kept[1] <= 4.2 * kept[0]


def test_an_exponent_is_recovered_with_its_interval():
    tokens = [1000, 2000, 4000, 8000]
    exact = fit_exponent(tokens, [n**1.5 for n in tokens])
    assert exact.exponent == exact.low == exact.high == 1.5
    noisy = fit_exponent(tokens, [n * factor for n, factor in zip(tokens, (1.1, 0.9, 1.05, 1.0), strict=True)])
    assert noisy.low < 1 < noisy.high
    with pytest.raises(ValueError, match="at least three"):
        fit_exponent([1, 2], [1, 2])


def test_curves_cross_where_they_are_equal():
    tokens = [100, 1000, 10_000]
    assert crossover(tokens, [n**2 / 500 for n in tokens], tokens) == pytest.approx(500)
    assert crossover(tokens, [n**2 for n in tokens], tokens) is None
    assert crossover(tokens, [n**0.5 for n in tokens], tokens) is None


def row(tokens: int, ms: float | None):
    return {"tokens": tokens, "ms": ms, "grid": [tokens, 1, 1]}


def test_crossover_compares_what_both_were_measured_on():
    attention = [row(n, n**2 / 500) for n in (100, 1000, 10_000)] + [row(100_000, None)]
    other = [row(n, n) for n in (1000, 100, 100_000, 10_000)]
    assert meets(attention, other) == {"tokens": 500, "says": "attention takes longer from 500 tokens on"}
    longer = meets(attention, [row(n, 0.001) for n in (100, 1000)])
    assert longer == {"says": "attention takes longer at all sizes, from 100 tokens on"}
    assert "takes less at all sizes" in meets(attention, [row(n, 1e9) for n in (100, 1000)])["says"]
    assert meets(attention, [row(7, 1.0)]) == {"says": "no size was measured for both"}


class Hidden(torch.nn.Module):
    """Linear at first sight: its quadratic product is small next to its projection."""

    def __init__(self, dim, layer):
        super().__init__()
        self.proj = torch.nn.Linear(dim, dim)

    def forward(self, x):
        x = self.proj(x)
        thin = x.flatten(1, 3)[..., :1]
        return x + (thin @ thin.mT @ thin).view(*x.shape[:4], 1)


def test_hidden_quadratic_parts_are_called_out_and_linear_ones_not():
    own = f"{__name__}:Hidden"
    called = by_flops([own, "attention", *LINEAR], 512, GRIDS)
    assert {(one["mixer"], one["part"]) for one in called} == {(own, "products"), ("attention", "products")}
    assert all(one["exponent"] == pytest.approx(2, abs=1e-3) and one["sure"] for one in called)
    assert "tokens^2.00" in says(called[0])


def test_parts_are_called_out_by_their_time():
    tokens = (1000, 2000, 4000, 8000)
    splits = [(n, {"scan": n * 1.0, "copies": n**1.2, "norms": n**3 * 1e-12}) for n in tokens]
    fits = part_fits(splits)
    assert set(fits) == {"scan", "copies"}  # what takes no time is left out
    (copies,) = by_time({"mine": fits})
    assert copies["part"] == "copies" and copies["exponent"] == pytest.approx(1.2) and copies["sure"]
    assert part_fits(splits[:2]) == {}


def test_kernels_are_grouped_by_what_they_are_for():
    for name, part in {
        "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT": "matrix products",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas": "matrix products",
        "aten::bmm": "matrix products",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64>>(Flash_fwd_params)": "attention",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention)": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_1x1x1_kernel0_0": "attention",
        "_chunk_scan_fwd_kernel": "scan",
        "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<4>": "conv",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float>": "copies",
        "triton_poi_fused_add_mul_0": "compiled elementwise",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "elementwise",
    }.items():
        assert part_of_kernel(name) == part, name
    own = triton_kernels()
    assert own and all(part_of_kernel(name) == part for name, part in own.items())


def test_time_is_split_into_parts():
    layer, x = MIXERS.build("attention", 32, 0), torch.randn(1, 8, 8, 8, 32)
    parts = milliseconds_by_part(lambda: layer(x), CPU)
    assert {"attention", "matrix products"} <= set(parts) and min(parts.values()) >= 0


def test_rounds_stay_within_their_budget(monkeypatch: pytest.MonkeyPatch):
    """Short work runs often, long work once, what is cold without a warm-up; in turns."""
    took = {"short": 1.0, "long": 400.0, "cold": 5000.0}
    log: list[str] = []
    monkeypatch.setattr(timing, "milliseconds", lambda work, device: took[work()])
    works = {name: lambda name=name: log.append(name) or name for name in took}
    costs = timing.costs(works, HERE, cold=["cold"])
    assert {name: cost.runs for name, cost in costs.items()} == {"short": timing.MOST_RUNS, "long": 1, "cold": 1}
    assert {name: cost.ms for name, cost in costs.items()} == took
    assert log[:5] == ["short", "long", "short", "long", "cold"] and log.count("cold") == 1


def test_what_needs_more_memory_than_there_is_is_left_out():
    def too_much():
        raise torch.OutOfMemoryError("no")

    assert timing.or_none(too_much) is None and timing.or_none(lambda: 3) == 3
    for cold in ((), ("large",)):
        (small,) = timing.costs({"large": too_much, "small": lambda: None}, HERE, cold).items()
        assert small[0] == "small" and small[1].gib is None and small[1].runs == timing.MOST_RUNS


def test_weights_are_drawn_on_the_device_in_their_dtype():
    """As on a GPU: constructed on meta, so that 4B parameters never exist in float32."""
    mixer = built(
        lambda: MIXERS.build({"name": "mate", "state_dim": 4, "head_dim": 8}, 16, 0),
        HERE._replace(dtype=torch.bfloat16),
    )
    with torch.device("meta"):
        empty = MIXERS.build({"name": "mate", "state_dim": 4, "head_dim": 8}, 16, 0)
    from lingen_yardsticks.build import draw_weights

    empty.to_empty(device=CPU)
    draw_weights(empty)
    assert {name for name, p in mixer.named_parameters() if p.dtype == torch.float32} == {
        "ma.memory.a_log", "ma.memory.d", "ma.memory.dt_bias",
    }  # fmt: skip
    assert all(p.isfinite().all() for p in empty.parameters())
    steps = torch.nn.functional.softplus(empty.ma.memory.dt_bias)
    assert steps.min() >= 0.9e-3 and steps.max() <= 0.11
    assert empty(torch.randn(1, 2, 3, 3, 16)).square().mean() > 1e-4


@pytest.mark.slow
def test_bench_scaling_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sizes = ["8x8x8", "16x8x8", "32x8x8", "64x8x8"]
    words = ["--mixers", "attention", "temporal_swin", "--dim", "16", "--budget", "0.05"]
    assert main(["bench", "scaling", *words, "--sizes", *sizes, "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "temporal_swin" in captured.out and "512 tokens" in captured.err
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert {"device", "versions", "date", "commit", "command", "rows", "fits"} <= result.keys()
    assert str(tmp_path) not in json.dumps(result)
    for mixer, exponent in (("attention", 2), ("temporal_swin", 1)):
        assert set(result["fits"][mixer]) == {"flops", "time", "memory"}
        assert set(result["fits"][mixer]["memory"]) == {"exponent", "low", "high"}
        assert result["fits"][mixer]["flops"]["exponent"] == pytest.approx(exponent, abs=0.2)
        assert {"name", "mixer", "dtype", "tokens", "ms", "gib", "tflop", "parameters"} <= result["rows"][0].keys()
    assert any(one["part"] == "products" and one["sure"] for one in result["faster_than_linear"])
    with (tmp_path / "scaling.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(result["rows"]) == 8
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "scaling.md").read_text()
    assert "| attention | 1." in page and "DiT-4B over LinGen-4B" in page
    (tmp_path / "scaling.md").unlink()
    assert main(["bench", "scaling", "--render", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "scaling.md").read_text() == page


def test_mistakes_of_bench_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for words, sentence in (
        (["scaling", "--sizes", "3x3x3"], "An exponent needs at least three sizes"),
        (["scaling", "--mixers", "mat"], "There is no mixer called 'mat'. Did you mean 'mate'?"),
        (["scaling", "--render"], "to render; name its folder with --out."),
        (["scaling", "--sizes", "3x3"], "'3x3' is no grid"),
        (["model", "--recipe", "t2v_68s"], "Name the size: --grid 34x32x32, or --stage with one of t2i_256"),
        (["stock", "--recipe", "quickstart_cpu", "model.mixer=attention"], "has no mixer 'mate'"),
        (["show", "--results", str(tmp_path)], "There are no result files"),
    ):
        out = ["--out", str(tmp_path / "none")] if words[0] != "show" else []
        assert main(["bench", *words, *out]) == 2, words
        assert sentence in capsys.readouterr().err.splitlines()[-1], words
    assert issubclass(RecipeError, ValueError)
