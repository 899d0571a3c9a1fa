"""Result files, the commands that write them, and how they are told beside the targets."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lingen_yardsticks.paper import VARIANTS
from lingen_yardsticks.place import FP8
from lingen_yardsticks.results import Results, command_line
from lingen_yardsticks.show import PAGE, fill, read

from lingen.cli import main
from lingen.cli.bench import yardstick
from lingen.kernels.choice import has_triton
from tests.helpers.commands import ROOT
from tests.yardsticks.times import pair

TARGETS, MA, TESA, CUDNN = (getattr(yardstick("targets"), name) for name in ("TARGETS", "MA", "TESA", "CUDNN"))
HEAD = {"device": "a GPU", "versions": {}, "date": "2026-01-02", "commit": "abc", "command": "lingen bench model"}
CPU = torch.device("cpu")


def test_results_grow_row_by_row(tmp_path: Path):
    said: list[str] = []
    results = Results(tmp_path / "deep" / "x.json", {"dim": 8}, CPU, said.append, commit="abc")
    for tokens in (10, 20):
        results.add({"tokens": tokens, "ms": 1.23456789, "gib": None, "name": "forward", "extra": {"a": 1e-9 / 3}})
        held = json.loads((tmp_path / "deep" / "x.json").read_text())
        assert held["rows"][-1] == {"name": "forward", "tokens": tokens, "ms": 1.2346, "extra": {"a": 3.3333e-10}}
    assert list(held["rows"][0])[:2] == ["name", "tokens"] and len(held["rows"]) == len(said) == 2
    assert {"device", "versions", "date", "commit", "command", "rows"} <= held.keys() and held["commit"] == "abc"


def test_the_command_says_nothing_of_this_machine():
    words = ["/a/b/lingen", "bench", "scaling", "--out", "/a/b", "--dim", "8", "--commit=abc", "--out=/c", "x=a b"]
    assert command_line(words) == "lingen bench scaling --dim 8 'x=a b'"
    words = ["/a/__main__.py", "gpus", "--keep", "/a/b", "--acts", "speed", "--json=/c"]
    assert command_line(words, "python -m tests.soak") == "python -m tests.soak gpus --acts speed"


def forward(ms: float, **more):
    row = {"name": "forward", "mixer": "mate", "kernel": "auto", "dtype": "bfloat16", "tokens": 139_264, "batch": 1}
    return row | {"ms": ms, "gib": 20.0, "depth": 28, "seconds_per_100": ms / 10, "tflop": 1.0} | more


def verdicts(*rows, **more):
    files = {"run": HEAD | {"rows": list(rows)} | more}
    return {line[0]: line[5:] for line in PAGE["targets"].lines(files)}


def test_targets_are_reached_or_missed_by_so_much():
    twin = {"mixer": "attention", "kernel": CUDNN, "depth": 38}
    told = verdicts(forward(2000.0), forward(13_000.0, **twin), forward(2365.0, tokens=34_816))
    assert told["100 forwards, 68 s (s)"] == ["200", "reached", "run"]
    assert told["100 forwards, 17 s (s)"] == ["236", "missed by 346.2%", "run"]
    assert told["DiT / LinGen, 68 s, cuDNN compiled (x)"] == ["6.5", "reached", "run"]
    assert told["peak memory, 68 s (GiB)"] == ["20", "reached", "run"]
    assert told["100 forwards, 68 s, fp8 (s)"] == ["", "not measured", ""]
    told = verdicts(forward(1500.0), forward(13_000.0, **twin), forward(1600.0, dtype=FP8))
    assert told["DiT / LinGen, 68 s, cuDNN compiled (x)"] == ["8.67", "reached, stretch too", "run"]
    assert told["100 forwards, 68 s, fp8 (s)"] == ["160", "stretch missed by 10.3%", "run"]


def test_stock_lingen_and_batches_of_two_are_not_taken_for_ours():
    told = verdicts(forward(2000.0), forward(3100.0, kernel="stock, compiled"), forward(4200.0, batch=2))
    assert told["100 forwards, 68 s (s)"][0] == "200"


def test_ratios_to_stock_parts_review_tokens_and_exponents():
    rows = [
        {"name": name, "kernel": kernel, "tokens": 34_816, "ms": ms, "train_ms": 3 * ms, "mixer": "ma"}
        for name, kernel, ms in ((MA, "stock", 12.0), (MA, "auto", 3.0), (TESA, "stock", 5.0), (TESA, "auto", 2.0))
    ]
    review = {"name": "variant", "variant": "without review tokens", "tokens": 34_816, "ms": 495, "default_ms": 500}
    fits = {"mate": {"time": {"exponent": 1.01, "low": 1, "high": 1.02}}}
    long = {"name": "x", "mixer": "mate", "tokens": 278_528}
    told = verdicts(*rows, review, long, fits=fits)
    assert told[f"{MA}, 17 s, forward (x stock)"][:2] == ["4", "reached"]
    assert told[f"{TESA}, 17 s, forward (x stock)"][:2] == ["2.5", "missed by 16.7%"]
    assert told["review tokens, 17 s (% of a forward)"][:2] == ["1", "reached"]
    assert told["time of mate ~ tokens^"][:2] == ["1.01", "reached"]
    assert verdicts(long | {"tokens": 16_384}, fits=fits)["time of mate ~ tokens^"][1] == "not measured"


def test_training_has_its_bars():
    parts = {"forward": 40.0, "callbacks": 6.0, "loop": 3.0, "data": 1.0}
    fit = {"name": "fit", "recipe": "emoji_64", "kind": "image", "compile": "graph", "ms": 25.0, "busy": 0.6}
    fit |= {"parts": parts}
    large = {"name": "gpus", "act": "speed", "gpus": 1, "overrides": [], "stage": "t2v_512_68s"}
    large |= {"tokens_per_second": 15e3}
    half = {**large, "overrides": ["model.depth=14"], "checkpointing": "false", "mfu": 0.44, "tokens_per_second": 30e3}
    told = verdicts(fit, {**fit, "compile": "off", "ms": 180.0}, large, half)
    assert told["emoji_64, image step (ms)"][:2] == ["25", "reached"]
    assert told["emoji_64, image step, GPU busy (%)"][:2] == ["60", "missed by 25.0%"]
    assert told["emoji_64, image step, loop (% of a timed step)"][:2] == ["20", "missed by 100.0%"]
    assert told["LinGen-4B trains, 68 s (tokens/s)"][:2] == ["15,000", "reached"]
    assert told["LinGen-4B of half the depth trains, 17 s, nothing recomputed (% MFU)"][:2] == ["44", "reached"]
    assert told["LinGen-4B trains, 17 s (tokens/s)"][1] == "not measured"


def test_the_newest_file_counts():
    old, new = (
        HEAD | {"date": date, "rows": [forward(ms)]} for date, ms in (("2026-01-01", 1.0), ("2026-02-01", 2000.0))
    )
    lines = {line[0]: line for line in PAGE["targets"].lines({"a": new, "b": old})}
    assert lines["100 forwards, 68 s (s)"][5:] == ["200", "reached", "a"]


def test_the_issues_bars_are_all_there():
    reach = {target.name: (target.reach, target.stretch) for target in TARGETS}
    assert reach["100 forwards, 17 s"] == (53, None) and reach["100 forwards, 17 s, fp8"] == (None, 36)
    assert reach["DiT / LinGen, 68 s, FlashAttention-2 eager"][0] == 10.5 and reach["peak memory, 68 s"][0] == 22
    assert [variant.paper_seconds for variant in VARIANTS] == [102, 94, 99, 144, 65, 98]


@pytest.mark.parametrize(("name", "folder"), [("performance.md", "results"), ("performance_h100.md", "results/h100")])
def test_the_pages_tables_are_those_of_the_committed_files(name: str, folder: str):
    """After new results: lingen bench show --markdown docs/performance.md"""
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert fill(page, read(ROOT / "docs" / folder)) == page and "Not measured yet" not in page
    assert folder != "results" or all(f"<!-- table: {table} -->" in page for table in PAGE)


def test_every_committed_result_says_when_and_by_which_code_and_command():
    """A file, or each of its parts; the theatre's judge is in a form of its own (docs/theatre.md)."""
    for file in (ROOT / "docs" / "results").rglob("*.json"):
        held = json.loads(file.read_text(encoding="utf-8"))
        for part in [held] if "command" in held else held.values():
            if file.stem != "theatre_judge":
                assert {"date", "commit", "command"} <= part.keys(), file.name


def test_show_prints_and_fills(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run.json").write_text(json.dumps(HEAD | {"rows": [forward(2000.0)]}))
    assert main(["bench", "show", "--results", str(tmp_path)]) == 0
    assert "reached" in capsys.readouterr().out
    assert main(["bench", "show", "--results", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[2]["ours"] == "200"
    page = tmp_path / "page.md"
    page.write_text(
        "Before\n<!-- table: forwards -->\nold\n<!-- end -->\nafter\n<!-- table: kernels -->\n<!-- end -->\n"
    )
    assert main(["bench", "show", "--results", str(tmp_path), "--markdown", str(page)]) == 0
    text = page.read_text()
    assert "| mate | 28 | auto | bfloat16 | 139,264 | 1 | 200 | 20 |" in text and "old" not in text
    assert text.startswith("Before\n") and "Not measured yet." in text and "\nafter\n" in text
    page.write_text("<!-- table: nothing -->\n<!-- end -->\n")
    assert main(["bench", "show", "--results", str(tmp_path), "--markdown", str(page)]) == 2


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str):
    """A bench command on the CPU; what its result file holds."""
    monkeypatch.setattr(sys, "argv", ["lingen", "bench", *words])
    out = tmp_path / "out.json"
    assert main(["bench", *words, "--device", "cpu", "--out", str(out), "--budget", "0.01"]) == 0
    result = json.loads(out.read_text())
    assert result["command"].startswith(f"lingen bench {words[0]}")
    return result["rows"]


@pytest.mark.slow
def test_bench_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    words = ["--recipe", "quickstart_cpu", "--grid", "1x2x2", "--twins", "all", "--run50", "--variants"]
    rows = run(tmp_path, monkeypatch, "model", *words, "sample.steps=2", "model.depth=2")
    assert "one of batch 2" in capsys.readouterr().out or any(row.get("passes") == "two of batch 1" for row in rows)
    forwards = [row for row in rows if row["name"] == "forward"]
    assert all(row["tokens"] == 4 and row["ms"] > 0 and row["seconds_per_100"] > 0 for row in forwards)
    assert forwards[0]["finite"] and forwards[0]["mixer"] == "mate" and forwards[0]["kernel"] == "auto"
    assert {row["kernel"] for row in forwards if row["mixer"] == "attention"} > {"sdpa, eager"}
    assert {row["depth"] for row in forwards if row["mixer"] == "attention"} == {3}
    assert {row["variant"] for row in rows if row["name"] == "variant"} == {variant.name for variant in VARIANTS}
    assert {"sampling", "part"} <= {row["name"] for row in rows}
    assert sum(row["share"] for row in rows if row["name"] == "part") == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_bench_stock_and_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = run(tmp_path, monkeypatch, "stock", "--recipe", "quickstart_cpu", "--grid", "2x4x4")
    assert [(row["name"], row["kernel"]) for row in rows] == [(n, k) for n in (MA, TESA) for k in ("stock", "auto")]
    assert all(row["ms"] > 0 and row["train_ms"] > 0 for row in rows)
    assert all(row["kept_gib"] > 0 for row in rows if row["kernel"] == "auto")
    rows = run(tmp_path, monkeypatch, "training", "--recipe", "quickstart_cpu", "--grid", "2x4x4")
    ours = next(row for row in rows if (row["name"], row["kernel"]) == ("training", "auto"))
    assert ours["tokens_per_second"] == pytest.approx(1e3 * 32 / ours["ms"] / ours["depth"], rel=1e-3)
    assert "mfu" not in ours  # no peak of a CPU is known


@pytest.mark.slow
def test_bench_kernels_and_mixers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = run(tmp_path, monkeypatch, "kernels", "--grid", "2x4x4")
    assert rows[0]["name"] == "ceilings" and rows[0]["gb_per_s"] > 0
    names = {"scan", "conv", "gated norm", "pool", "window attention", "cross-attention", "swiglu", "gate, add"}
    assert names <= {row["name"] for row in rows}
    for row in rows[1:]:
        assert row["error"] < 1e-6 and max(row["gradient_errors"].values()) < 1e-5, row["name"]
        assert row["floor_ms"] > 0 and row["ms"] > 0
    rows = run(tmp_path, monkeypatch, "mixers", "--grid", "2x4x4", "--dim", "32")
    assert {row["mixer"] for row in rows} == {"attention", "temporal_swin", "mamba2", "mate", "linear_attention"}


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_a_triton_twin_is_measured_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["--only", "swiglu", "--grid", "1x2x2", "--dim", "32"]
    if torch.cuda.is_available():
        pytest.skip("on CUDA, lingen bench kernels itself")
    rows = run(tmp_path, monkeypatch, "kernels", *words)
    assert {row["kernel"] for row in rows[1:]} == {"triton", "reference"}
    assert all(row["error"] < 1e-5 for row in rows[1:])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["kernels", "--only", "nope"], "There is no operation called 'nope'. Known: "),
        (["model", "--recipe", "quickstart_cpu", "--twins", "nope"], "There is no twin called 'nope'. Known: all, dit"),
        (["scaling", "--quick", "--device", "cuda"], "--quick measures on the CPU"),
        (["mixers", "--device", "tpu"], "There is no device 'tpu'"),
        (["training", "--recipe", "quickstart_cpu", "--layers", "9"], "say layers of 0 to 3"),
        (["training", "--recipe", "quickstart_cpu", "--layers", "x"], "say layers of 0 to 3"),
        (["mixers", "--grid", "0x4x4"], "'0x4x4' is no grid"),
        (["scaling", "--dim", "0"], "'0' is no whole number above 0"),
        (["mixers", "--budget", "-1"], "'-1' is no number above 0"),
        (["mixers", "--mixers", "mamba2", "--dim", "7"], "head_dim=64 does not divide"),
    ],
)
def test_a_wrong_use_is_one_sentence(words, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    assert says in capsys.readouterr().err


def test_the_quickstart_before_and_after_is_what_the_page_says():
    """From the counts that are kept; the bounds by hand, for motion: 2.9 over captions, 3.1 over pairs of runs."""
    before, now = (ROOT / "docs" / "results" / f"quickstart_{name}.json" for name in ("before", "now"))
    rows = {row["attribute"]: row for row in pair([before], [now])}
    text = (ROOT / "docs" / "model.md").read_text()
    for name, row in rows.items():
        bound = row["worse by at most, over captions"]
        shares = [f"{row[side]:.1f}%".replace("100.0", "100") for side in ("before", "now")]
        assert f"| {name} | {' | '.join(shares)} | " in text and f"({bound:g}) |" in text
    assert rows["motion"]["by pair"] == [9.9, -5.1, -7.1, 2.2, -3.8, -1.0, -3.2, 8.7, 0.0, -1.0, -1.6]
    assert rows["motion"]["worse by at most, over pairs"] == 3.1
    kept = [json.loads(path.read_text())["rows"] for path in (before, now)]
    sides = [np.array([[*run["motion by caption"].values()] for run in runs]) / 13 for runs in kept]
    worse = (sides[0] - sides[1]).mean(0)
    most = worse.mean() + 1.714 * worse.std(ddof=1) / 24**0.5  # Student's t of 23 degrees, 95%
    assert rows["motion"]["worse by at most, over captions"] == pytest.approx(100 * most, abs=0.1)
