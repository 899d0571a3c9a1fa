"""README and the numbers on pages state only what is so: blocks are executed here, numbers have a file behind them."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

import lingen
from tests.helpers.commands import ROOT, run_command

README = (ROOT / "README.md").read_text(encoding="utf-8")


def page(name: str) -> str:
    """A page of docs/."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    """The code blocks of a language, in order; "" for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)
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


def test_the_block_is_as_short_as_promised_and_python_parses():
    mixer = next(block for block in blocks("python") if "my_mixers.py" in block)
    assert len(mixer.strip().splitlines()) <= 17
    for block in blocks("python"):
        ast.parse(block)


def test_yaml_example_is_a_recipe(tmp_path: Path):
    smallest, full = blocks("yaml", page("how-to/recipes.md"))[:2]
    (tmp_path / "smallest.yaml").write_text(smallest)
    assert lingen.load_recipe(tmp_path / "smallest.yaml", stage="videos").model.depth == 2
    (tmp_path / "example.yaml").write_text(full)
    assert lingen.stages_of(tmp_path / "example.yaml") == ["images", "clips"]
    assert lingen.load_recipe(tmp_path / "example.yaml", stage="clips").data.mix.video == 100


def test_the_shown_mistakes_are_what_lingen_says(tmp_path: Path):
    """The sentences, not the file names."""
    shown = blocks("", page("how-to/recipes.md"))[0]
    (tmp_path / "wrong.yaml").write_text("model: {detph: 4}\ndata: {synthetic: shapes}\n")
    with pytest.raises(lingen.RecipeError) as wrong:
        lingen.load_recipe(tmp_path / "wrong.yaml")
    assert wrong.value.problems[0].split(": ", 1)[1] == shown.splitlines()[0].split(": ", 1)[1]
    with pytest.raises(lingen.RecipeError) as unknown:
        lingen.load_recipe("quickstart_cpu", ["model.mixer=mamba"])
    assert unknown.value.problems[0] == shown.splitlines()[1]


def test_recipes_and_mixers_on_pages_are_the_registered_ones():
    from lingen.recipe.reading import shipped_recipes

    for name, known in (("concepts/index.md", lingen.MIXERS.names()), ("how-to/laptop-to-68s.md", shipped_recipes())):
        assert set(re.findall(r"^\| `(\w+)` \|", page(name), flags=re.M)) == {*known}


def test_the_score_has_a_source():
    results = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text())
    assert {"device", "versions", "date", "commit", "command", "rows"} <= results.keys()
    for attribute in ("colour", "motion", "shape"):
        line = next(line for line in page("index.md").splitlines() if line.startswith(f"| {attribute} |"))
        shares = [row["sampled"][attribute]["share"] for row in results["rows"]]
        told = f"{min(shares):.0%} to {max(shares):.0%}"
        assert line.split("|")[2].strip() == told
        assert attribute != "motion" or f"{told} of its clips move as they were told" in README
        assert attribute != "shape" or f"{told} have the shape" in README


def test_the_numbers_of_speed_have_a_source():
    """Every number of the table is that of a committed result file."""
    table = README[README.index("## Speed") :]
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
    section = page("how-to/own-autoencoder.md")
    measured = json.loads((ROOT / "docs" / "tae" / "metrics.json").read_text())
    psnr = {row["what"]: row["psnr"] for row in measured["rows"]}
    assert f"{psnr['tae_small']:.1f} dB" in section and f"has {psnr['bicubic, space and time']:.1f} (" in section
    rows = json.loads((ROOT / "docs" / "results" / "tae.json").read_text())["rows"]
    (clip,) = (row for row in rows if row.get("way") == "exact" and row.get("frames") == 1088)
    assert f"{clip['encode_s']:.2f} s to encode and {clip['decode_s']:.2f} s to decode" in section
    for row in measured["rows"]:
        assert f"| {row['what']} | {row['numbers']:.2%} | {row['psnr']:.2f} | {row['ssim']:.3f} |" in page(
            "tae/README.md"
        )
