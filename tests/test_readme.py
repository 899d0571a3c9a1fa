"""README states only what runs: its blocks are taken from the file and executed or parsed here."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

import lingen
from lingen.cli.command import parse_arguments
from tests.helpers.commands import ROOT, run_command

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The code blocks of a language, in order; "" for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
    return [text for name, text in found if name == language]


def words_of(line: str) -> list[str]:
    """What follows `lingen` in a command, to be run with this interpreter instead of README's virtual environment."""
    command, *words = shlex.split(line)
    assert command == ".venv/bin/lingen", f"README's commands use its own virtual environment: {line}"
    return words


def test_the_first_two_blocks_install_fit_sample_and_test():
    """They are what .ci/run executes word for word; here only their form."""
    first, second = blocks("sh")[:2]
    assert len(first.strip().splitlines()) == len(second.strip().splitlines()) == 1
    assert "pip install ." in first and "lingen fit" in first and "lingen sample" in first
    assert "[test]" in second and "pytest" in second
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_the_other_commands_run(tmp_path: Path):
    mixer = next(block for block in blocks("python") if "my_mixers.py" in block)
    (tmp_path / "my_mixers.py").write_text(mixer)
    for line in (line for block in blocks("sh")[2:] for line in block.strip().splitlines()):
        done = run_command(*words_of(line), cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert done.stdout.strip(), line


def test_commands_for_gpus_and_clusters_are_understood():
    lines = [line.removeprefix("srun ") for block in blocks("text") for line in block.strip().splitlines()]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "lingen"
        args = parse_arguments(words[1:])
        if getattr(args, "recipe", None):
            lingen.stages_of(args.recipe, args.overrides)


def test_the_block_is_as_short_as_promised_and_python_parses():
    mixer = next(block for block in blocks("python") if "my_mixers.py" in block)
    assert len(mixer.strip().splitlines()) <= 17
    for block in blocks("python"):
        ast.parse(block)


@pytest.mark.slow
def test_python_example_runs(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lingen.run import fit

    monkeypatch.chdir(tmp_path)
    fit(tiny_recipe, run="runs/quickstart")
    example = next(block for block in blocks("python") if "lingen.generate" in block)
    exec(example, {})
    assert (tmp_path / "green_square.mp4").stat().st_size > 500


def test_yaml_example_is_a_recipe(tmp_path: Path):
    (tmp_path / "example.yaml").write_text(blocks("yaml")[0])
    assert lingen.stages_of(tmp_path / "example.yaml") == ["images", "clips"]
    assert lingen.load_recipe(tmp_path / "example.yaml", stage="clips").data.mix.video == 100


def test_the_shown_mistakes_are_what_lingen_says(tmp_path: Path):
    """The sentences, not the file names."""
    shown = blocks("")[0]
    (tmp_path / "wrong.yaml").write_text("model: {detph: 4}\ndata: {synthetic: shapes}\n")
    with pytest.raises(lingen.RecipeError) as wrong:
        lingen.load_recipe(tmp_path / "wrong.yaml")
    assert wrong.value.problems[0].split(": ", 1)[1] == shown.splitlines()[0].split(": ", 1)[1]
    with pytest.raises(lingen.RecipeError) as unknown:
        lingen.load_recipe("quickstart_cpu", ["model.mixer=mamba"])
    assert unknown.value.problems[0] == shown.splitlines()[1]


def test_recipes_and_mixers_in_readme_are_the_registered_ones():
    named = set(re.findall(r"^\| `(\w+)` \|", README, flags=re.M))
    from lingen.recipe.reading import shipped_recipes

    assert named == {*lingen.MIXERS.names(), *shipped_recipes()}


def test_the_score_in_readme_has_a_source():
    results = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text())
    assert {"device", "versions", "date", "commit", "command", "rows"} <= results.keys()
    for attribute in ("colour", "motion", "shape"):
        line = next(line for line in README.splitlines() if line.startswith(f"| {attribute} |"))
        shares = [row["sampled"][attribute]["share"] for row in results["rows"]]
        assert line.split("|")[2].strip() == f"{min(shares):.0%} to {max(shares):.0%}"


def test_the_numbers_of_speed_have_a_source():
    """Every number of the table is that of a committed result file."""
    table = README[README.index("## Speed") : README.index("## On a cluster")]
    found = {}
    for name in ("model", "fp8"):
        for row in json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())["rows"]:
            if row["name"] == "forward" and row["batch"] == 1:  # the last one is that of the rounds with the twins
                found[row["kernel"], row["dtype"], row["tokens"]] = row
    lines = {
        "bfloat16 |": ("auto", "bfloat16"),
        "fp8`)": ("auto", "float8_e4m3fn"),
        "cuDNN": ("cudnn, compiled", "bfloat16"),
        "FlashAttention-2": ("flash-attention-2, eager", "bfloat16"),
    }
    for word, key in lines.items():
        line = next(line for line in table.splitlines() if word in line and line.startswith("|"))
        for tokens in (34_816, 139_264):
            seconds = found[*key, tokens]["ms"] / 10
            assert f" {seconds:,.0f} s " in line or f" {seconds:,.1f} s " in line, (word, seconds)
        if key[0] == "auto":
            assert f" {found[*key, 139_264]['gib']:.1f} GiB " in line, word
    fits = json.loads((ROOT / "docs" / "results" / "scaling.json").read_text())["fits"]["mate"]
    for cost in ("time", "memory"):
        assert f"tokens^{fits[cost]['exponent']:.2f}" in table


def test_the_numbers_of_the_autoencoder_have_a_source():
    section = README[README.index("## Autoencoder") : README.index("## Speed")]
    measured = json.loads((ROOT / "docs" / "tae" / "metrics.json").read_text())
    psnr = {row["what"]: row["psnr"] for row in measured["rows"]}
    assert f"{psnr['tae_small']:.1f} dB" in section and f"has {psnr['bicubic, space and time']:.1f} (" in section
    rows = json.loads((ROOT / "docs" / "results" / "tae.json").read_text())["rows"]
    (clip,) = (row for row in rows if row.get("way") == "exact" and row.get("frames") == 1088)
    assert f"{clip['encode_s']:.2f} s to encode and {clip['decode_s']:.2f} s to decode" in section
    page = (ROOT / "docs" / "tae" / "README.md").read_text()
    for row in measured["rows"]:
        assert f"| {row['what']} | {row['numbers']:.2%} | {row['psnr']:.2f} | {row['ssim']:.3f} |" in page
