"""Runs beside each other: `lingen sweep`, `compare` and `ablate`."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lingen.cli import main
from lingen.data.datamodule import ClipData
from lingen.plan.forecast import flop_a_step, plan
from lingen.plan.loading import load_curriculum, load_for_training
from lingen.recipe.errors import RecipeError
from lingen.run_folder import lock
from lingen.run_folder.folder import RunFolder
from lingen.studies import ablation
from lingen.studies.compare import Compared, Curve, compare_runs, read_at, read_compared, stretches_of, tables_of
from lingen.studies.grid import GridRun, combinations_of, values_of
from lingen.studies.report import page_of
from tests.helpers.commands import lingen_command, wait_for

# a grid


def test_commas_inside_of_brackets_separate_nothing():
    assert values_of("1e-4, [8, 4],{a: [1, 2], b: 3}") == ["1e-4", "[8, 4]", "{a: [1, 2], b: 3}"]
    assert values_of("shards-{000,001}.tar") == ["shards-{000,001}.tar"]


def test_a_grid_is_every_combination_and_each_has_a_name_of_its_own():
    runs = combinations_of(["train.lr=1e-4,3e-4", "model.depth=2", "init=a/b,a_b", "seed=0,1"])
    assert len(runs) == 8
    assert runs["train.lr=1e-4,init=a_b,seed=1"] == ["train.lr=1e-4", "model.depth=2", "init=a_b", "seed=1"]


@pytest.mark.parametrize(
    "words", [["seed=0"], ["seed=0,"], ["seed=0,0"], ["seed=0,1", "seed=2"], ["seed=0,1", "seed=2,3"]]
)
def test_a_grid_that_says_too_little_or_one_thing_twice_is_refused(words: list[str]):
    with pytest.raises(RecipeError):
        combinations_of(words)


def test_all_runs_are_checked_before_the_first_starts(tiny_recipe: Path, here: Path, capsys):
    assert main(["sweep", "--recipe", str(tiny_recipe), "model.depth=1,two", "train.lr=1e-3,-1", "--out", "grid"]) == 2
    told = capsys.readouterr().err
    assert "model.depth=1,train.lr=-1" in told and "model.depth=two,train.lr=1e-3" in told
    assert not Path("grid").exists()


def test_a_run_of_another_recipe_in_the_folder_is_told_before_anything_is_trained(
    tiny_recipe: Path, tiny_run: Path, here: Path, capsys
):
    shutil.copytree(tiny_run, "grid/seed=0")
    assert main(["sweep", "--recipe", str(tiny_recipe), "seed=0,1", "model.dim=32", "--out", "grid"]) == 2
    assert "model.dim is 32 here and" in (told := capsys.readouterr().err) and "another folder with --out" in told
    assert not Path("grid/seed=1").exists()


def test_an_array_is_one_task_for_each_run(tiny_recipe: Path, here: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here))
    words = ["--recipe", str(tiny_recipe), "seed=0,1", "train.lr=1e-3,2e-3", "--out", "grid", "--dry-run", "--array"]
    assert main(["sweep", *words, "--", "--time", "2:00:00"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=1-4\n" in script and "#SBATCH --time=2:00:00\n" in script
    assert "sweep --recipe" in script and '--part "$SLURM_ARRAY_TASK_ID/4"' in script.replace("'", "")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert main(["sweep", *words[:4], "--", "--time", "1"]) == 2


@pytest.mark.slow
def test_a_run_that_fails_or_is_anothers_does_not_stop_the_rest_and_a_larger_grid_goes_on(
    tiny_recipe: Path, here: Path, capsys
):
    sweep = ["sweep", "--recipe", str(tiny_recipe), "train.max_nonfinite=1", "--out", "grid"]
    with lock.locked(Path("grid/train.lr=5e-3")):  # as another sweep does
        assert main([*sweep, "train.lr=1e30,5e-3,1e-3"]) == 1
    told = capsys.readouterr()
    assert "2 of 3 runs are not done: train.lr=1e30; train.lr=5e-3" in told.err and "train.lr=1e-3" in told.out
    assert not Path("grid/train.lr=5e-3/run.json").exists()
    before = {path: path.stat().st_mtime_ns for path in Path("grid/train.lr=1e-3").rglob("*") if path.is_file()}
    assert main([*sweep, "train.lr=1e-3,2e-3"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}, "a finished run was touched"
    assert "train.lr=2e-3" in capsys.readouterr().out and Path("grid/compare.html").stat().st_size < 5e6


@pytest.mark.slow
def test_a_sweep_that_is_stopped_saves_the_run_and_starts_no_other(tiny_recipe: Path, here: Path):
    words = ["sweep", "--recipe", str(tiny_recipe), "seed=5,6", "train.steps=400", "--out", "grid"]
    with subprocess.Popen(lingen_command(*words), stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: list(Path("grid").glob("seed=5/metrics.csv")), process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 75
        finally:
            process.kill()
    assert list(Path("grid/seed=5").glob("stages/*/step-*")), "it did not save"
    assert not Path("grid/seed=6").exists()


# comparing


@pytest.fixture
def two_runs(tiny_run: Path, here: Path) -> list[Path]:
    """A finished run, moved, and one with names that a page must escape, which diverged and was never finished."""
    one, other = here / "moved" / "one", here / "moved" / "<b>&$x_1$"
    for path in (one, other):
        shutil.copytree(tiny_run, path)
    shutil.rmtree(other / "stages")
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "of_another_version: {new: '<img src=x onerror=alert(1)><script>'}\n")
    with (other / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[-1]["loss"] = "nan"
    with (other / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return [one, other]


def test_runs_of_other_versions_unfinished_and_diverged_ones_compare(two_runs: list[Path], capsys):
    assert main(["compare", "moved", "--metric", "loss", "--json", "--out", "page.html"]) == 0
    found = json.loads(capsys.readouterr().out)  # JSON has no NaN
    other, one = found["runs"]
    assert one["state"] == "finished" and other["state"] != "finished"
    assert one["parameters"] and other["parameters"] is None, "a recipe that cannot be loaded has unknown parameters"
    assert one["value"] is not None and other["value"] is None and other["curve"][-1][1] is None
    assert found["differ"] == {"of_another_version.new": ["<img src=x onerror=alert(1)><script>", "-"]}
    page = Path("page.html").read_text()
    assert (
        "<b>" not in page
        and "<script" not in page
        and "<img src=x" not in page
        and "&lt;b&gt;&amp;" in page
        and "<svg" in page
    )
    assert "data:image/jpeg;base64," in page and len(page) < 5e6


def test_flops_and_steps_are_those_of_all_stages(tiny_run: Path):
    (run,) = read_compared([tiny_run])
    stages = load_curriculum(tiny_run / "recipe.yaml").stages
    assert run.about["steps"] == sum(one.train.steps for one in stages)
    assert run.about["flop"] == pytest.approx(sum(one.train.steps * flop_a_step(one, plan(one)) for one in stages))
    parts = plan(stages[-1]).parameters
    assert run.about["parameters"] == sum(parts.values())
    assert (
        run.about["without_text_encoders"] == run.about["parameters"] - parts["text encoders"] < run.about["parameters"]
    )
    curve = run.curve("loss", "flops")
    places = [place for place, *_ in curve]
    assert places == sorted({*places}) and places[-1] == run.about["flop"]
    assert curve[-1][2:] == ("clips", 6)


def curve_of(*rows: tuple[float, float], stage: str = "main", begin: float = 0) -> Curve:
    """Rows (step of the run, value) of a stage that began at a step."""
    return [(float(step), value, stage, round(step - begin)) for step, value in rows]


def test_a_curve_is_read_between_its_rows_and_never_beyond():
    curve = curve_of((10, 4.0), (20, 2.0), (30, math.nan))
    assert read_at(curve, 15) == (3.0, "stage main, between rows")
    assert read_at(curve, 20) == (2.0, "stage main")
    assert read_at(curve, 25)[0] is None
    assert read_at(curve, 5) == (None, "no row near")
    assert read_at(curve, 31) == (None, "no row near")
    assert read_at([], 5) == (None, "no row near")


def test_no_line_is_drawn_over_the_border_of_stages_or_a_wide_gap():
    images = curve_of((20, 0.7), (40, 0.6), stage="images")
    videos = curve_of((140, 0.2), (240, 0.1), (1040, 0.06), stage="videos", begin=40)
    curve = [*images, *videos]
    assert stretches_of(curve) == [images, videos[:2], videos[2:]] and stretches_of([]) == []
    assert read_at(curve, 30)[0] == pytest.approx(0.65)
    assert read_at(curve, 110) == (None, "no row near")
    assert read_at(curve, 500) == (None, "no row near")
    assert read_at(curve, 1040) == (0.06, "stage videos")


def run_of(name: str, borders: dict[str, tuple[int, int]], held: dict[int, float], loss: float) -> Compared:
    """A run with a loss every 10 steps, by stage -> (first step, last), and a loss of held-out samples at some."""
    points = []
    for stage, (begin, end) in borders.items():
        for step in range(begin + 10, end + 1, 10):
            row = {"stage": stage, "step": str(step - begin), "loss": str(loss)}
            points.append((step, 1e6 * step, row | ({"validation/loss": str(held[step])} if step in held else {})))
    return Compared(RunFolder(Path(name)), list(borders), {"run": name}, {}, {}, points)


def test_the_better_run_is_not_ranked_behind_by_a_line_over_a_border():
    """As a newcomer met it: the long run has a loss of held-out samples at the ends of its stages alone, and a line
    between these two said 0.56 where it stood at 0.23 or less."""
    long = run_of("long", {"images": (0, 40), "videos": (40, 1040)}, {40: 0.59, 1040: 0.06}, 0.2259)
    short = run_of("short", {"images": (0, 10), "videos": (10, 110)}, {10: 0.8, 110: 0.3545}, 0.3236)
    found = compare_runs([long, short], None, "steps")
    assert (found["metric"], found["place"]) == ("loss", 110), "where all runs have a row"
    assert [one["value"] for one in found["runs"]] == pytest.approx([0.2259, 0.3236])
    found = compare_runs([long, short], "validation/loss", "steps")
    assert [one["value"] for one in found["runs"]] == [None, 0.3545] and found["place"] == 110
    told = [row["validation/loss at 110 steps"] for row in tables_of(found)[0]]
    assert told == ["- (no row near)", "0.3545 (stage videos)"]
    lines = re.findall(
        r'<path d="([^"]+)" clip-path="[^"]+" style="fill: none; stroke: #', page_of(found, [long, short])
    )
    assert len(lines) == 4, "a dot for each row"
    assert [len({*re.findall(r"[ML] (\S+ \S+)", one)}) for one in lines] == [1] * 4, "and no line"


def test_a_loss_of_held_out_samples_is_compared_where_all_runs_have_one():
    every = [run_of(str(n), {"main": (0, 400)}, {100: 3.0, 200: 2.0, 400: 1.0}, 1.0) for n in range(2)]
    short = run_of("short", {"main": (0, 210)}, {100: 3.5, 210: 2.5}, 1.0)
    found = compare_runs([*every, short], None, "flops")
    assert (found["metric"], found["place"]) == ("validation/loss", 2.1e8)
    assert [one["value"] for one in found["runs"]] == [1.95, 1.95, 2.5]
    assert found["runs"][0]["read"] == "stage main, between rows"
    late = run_of("late", {"images": (0, 90), "main": (90, 400)}, {90: 3.0, 400: 1.0}, 1.0)
    found = compare_runs([*every, late], None, "steps")
    assert (found["metric"], found["place"]) == ("validation/loss", 400)
    assert compare_runs([late, short], None, "steps")["metric"] == "loss"


def test_the_stage_of_each_value_is_told(two_runs: list[Path], capsys: pytest.CaptureFixture[str]):
    assert main(["compare", "moved/one", "--metric", "loss"]) == 0
    told = capsys.readouterr().out
    assert "(stage clips)" in told and "without_text_encoders" in told


def test_what_is_no_run_and_what_no_run_has_is_refused(tiny_run: Path, here: Path, capsys):
    assert main(["compare", str(here)]) == 2
    assert "is no run folder, and holds none" in capsys.readouterr().err
    assert main(["compare", str(tiny_run), "--metric", "los"]) == 2
    assert "no run has it. Did you mean 'loss'? Known: " in capsys.readouterr().err
    assert main(["compare", str(tiny_run), "--metric", "stage"]) == 2
    assert "--metric stage: no run has it." in capsys.readouterr().err


def test_a_page_of_large_pictures_stays_small(two_runs: list[Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lingen.studies.report.MOST_BYTES", 100)
    runs = read_compared(two_runs)
    page = page_of(compare_runs(runs, "loss", "steps"), runs)
    assert "data:image" not in page and "left out" in page


# ablations


@pytest.mark.parametrize("name", [name for name in ablation.VARIANTS])
def test_every_variant_loads_and_differs(name: str):
    """On the recipe of the paper's length, whose two stages mix images and videos."""
    fixed = ["model.depth=4"]
    _, words = ablation.variant_of(name, "quickstart_cpu", fixed)
    base, other = (load_curriculum("quickstart_cpu", [*fixed, *more]) for more in ([], words))
    assert words and base != other
    if name == "attention":
        flop = [flop_a_step(one.stages[-1], plan(one.stages[-1])) for one in (base, other)]
        assert other.base.model.depth != 4 and abs(flop[1] / flop[0] - 1) < 0.5 / other.base.model.depth


def test_a_variant_of_ones_own_and_one_that_does_not_exist():
    assert ablation.variant_of("mine:a=1,b=[2, 3]", "quickstart_cpu", []) == ("mine", ["a=1", "b=[2, 3]"])
    with pytest.raises(RecipeError, match="Did you mean 'no_te'"):
        ablation.variant_of("no_tee", "quickstart_cpu", [])


def test_runs_of_one_seed_see_the_same_samples_times_and_noise(tiny_recipe: Path, here: Path):
    """What is said to be paired is: the batches and the draws behind them, of every stage."""
    runs = [GridRun(RunFolder(here / "x"), load_for_training(str(tiny_recipe), ["seed=3", *words])) for words in
            ([], ["model.mixer.te=null"], ["seed=4"])]  # fmt: skip
    assert ablation.drawn_otherwise(runs[0], runs[1]) == []
    assert ablation.drawn_otherwise(runs[0], runs[2]) == ["seed"]
    for number in range(len(runs[0].curriculum.stages)):
        seen = []
        for run in runs:
            recipe = run.curriculum.stages[number]
            module, data = recipe.subject.build_module(recipe), ClipData(recipe)
            batch = next(iter(data.batches()))
            _, times = module.losses(batch, str(recipe.stage))
            seen.append((batch.captions, batch.clips.float().sum().item(), times.tolist()))
        assert seen[0] == seen[1] != seen[2]


def test_no_images_is_not_called_paired():
    _, words = ablation.variant_of("no_images", "quickstart_cpu", [])
    runs = [GridRun(RunFolder(Path("x")), load_for_training("quickstart_cpu", more)) for more in ([], words)]
    assert any(key.startswith("data.mix") for key in ablation.drawn_otherwise(*runs))


def fake(monkeypatch: pytest.MonkeyPatch, here: Path, curves: dict[tuple[str, int], list[float]]) -> ablation.Runs:
    """Runs whose metric at steps 1, 2, ... is given."""

    class Read:
        def __init__(self, values: list[float]):
            self.values = values

        def curve(self, metric: str, axis: str) -> Curve:
            return curve_of(*enumerate(self.values, 1))

    runs = {}
    for number, key in enumerate(curves):
        folder = RunFolder(here / str(number))
        folder.path.mkdir()
        if curves[key]:
            folder.about.touch()
        runs[key] = GridRun(folder, None)  # type: ignore[arg-type]
    found = {str(run.folder.path): Read(curves[key]) for key, run in runs.items()}
    monkeypatch.setattr(ablation, "read_compared", lambda paths: [found[str(path)] for path in paths])
    return runs


def test_differences_are_paired_by_seed_at_equal_places(here: Path, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    base, noise = rng.normal(size=5), 0.01 * rng.normal(size=5)
    curves = {("baseline", s): [9.0, float(base[s]), 7.0] for s in range(5)}
    curves |= {("worse", s): [9.0, float(base[s] + 0.1 + noise[s])] for s in range(5)}
    curves |= {("same", s): [9.0, float(base[s] + noise[s - 1])] for s in range(5)}
    worse, same = ablation.effects_of(fake(monkeypatch, here, curves), "loss", "steps")
    expected = stats.ttest_rel(base + 0.1 + noise, base)
    assert worse["value"] == pytest.approx(0.1 + noise.mean()) and worse["place"] == 2
    assert worse["interval"] == pytest.approx(list(expected.confidence_interval()))
    assert worse["p"] == pytest.approx(2 * expected.pvalue) and worse["says"] == "differs"
    assert same["says"] == "not shown at this scale"


def test_one_seed_and_diverged_or_missing_runs_show_nothing(here: Path, monkeypatch: pytest.MonkeyPatch):
    curves = {("baseline", 0): [1.0], ("baseline", 1): [2.0], ("nan", 0): [math.nan], ("nan", 1): [2.5]}
    curves |= {("missing", 0): [], ("missing", 1): []}
    nan, missing = ablation.effects_of(fake(monkeypatch, here, curves), "loss", "steps")
    assert (nan["n"], nan["lost"], nan["value"], nan["interval"]) == (1, 1, 0.5, None)
    assert (missing["n"], missing["lost"], missing["value"]) == (0, 2, None)
    assert {nan["says"], missing["says"]} == {"not shown at this scale"}


def test_a_variant_that_changes_nothing_shows_nothing(here: Path, monkeypatch: pytest.MonkeyPatch):
    curves = {(name, seed): [1.0 + seed] for name in ("baseline", "same") for seed in range(3)}
    (same,) = ablation.effects_of(fake(monkeypatch, here, curves), "loss", "steps")
    assert (same["value"], same["interval"], same["says"]) == (0.0, None, "not shown at this scale")


def test_a_validation_loss_needs_held_out_samples_and_becomes_a_curve(tiny_recipe: Path):
    assert ablation.validating("quickstart_cpu", ["train.steps=1000"], "validation/loss") == [
        "train.validate_every=100"
    ]
    assert ablation.validating("quickstart_cpu", [], "loss") == []
    with pytest.raises(RecipeError, match="no held-out samples"):
        ablation.validating(
            str(tiny_recipe), ["data.validation.image=null", "data.validation.video=null"], "validation/loss"
        )


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_the_detectable_effect_is_found_in_four_of_five_studies(seeds: int):
    rng = np.random.default_rng(seeds)
    apart = rng.normal(ablation.detectable(seeds), 1.0, size=(4000, seeds))
    found = stats.ttest_1samp(apart, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.02)


def test_the_metric_is_the_one_that_was_noted_first(here: Path):
    ablation.put_down(here, "loss")
    ablation.put_down(here, "loss")
    with pytest.raises(RecipeError, match="names loss as the metric"):
        ablation.put_down(here, "validation/loss")


def test_an_ablation_says_what_it_costs_before_it_trains(tiny_recipe: Path, here: Path, capsys):
    words = ["ablate", "--recipe", str(tiny_recipe), "--seeds", "4", "--metric", "loss", "--dry-run", "--out", "a"]
    assert main([*words, "--variants", "no_te", "train.lr=1e-3", "mine:train.lr=1e-2"]) == 0
    told = capsys.readouterr().err
    assert "12 runs, " in told and "unknown before a first run" in told
    assert f"{ablation.detectable(4):.3g} standard deviations" in told and not Path("a").exists()
