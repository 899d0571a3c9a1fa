"""What a run is: sweeps get folders of their own, another identity is refused, another course acts and is on record."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen.cli import main
from lingen.data.manifest import NAME
from lingen.plan.loading import load_curriculum
from lingen.prepare.index import index_folder
from lingen.recipe import load_stages
from lingen.recipe.errors import RecipeError
from lingen.run import Reporter, fit, fit_curriculum
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.identity import alike, described, fingerprint, identity_of, other_course
from lingen.run_folder.intact import Checkpoint
from lingen.training.denoiser import LinGenModule
from lingen.training.weights import recipe_of
from tests.helpers.files import times_of

ONE = ["stages.images.train.steps=1", "stages.clips.train.steps=2", "train.log_every=1", "sample.prompts=[]"]
TOOLS = Path(__file__).parent / "tools"


class Heard(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def trained(recipe: Path, *overrides: str, run: Path | None = None) -> tuple[RunFolder, list[str]]:
    heard = Heard()
    folder = fit_curriculum(load_curriculum(recipe, [*ONE, *overrides]), run=run, reporter=heard)
    return folder, heard.said


def history(folder: RunFolder) -> list[tuple[str, int, dict[str, Any]]]:
    return [(one["stage"], one["step"], one["changes"]) for one in json.loads(folder.about.read_text())["history"]]


def group(folder: RunFolder, step: int, stage: str = "clips") -> dict[str, Any]:
    state = Checkpoint(folder.checkpoint(stage, step)).state
    return {"schedule": state["schedules"][0]["base_lrs"][0], **state["settings"][0]}


# default folders


def test_a_sweep_gets_a_folder_each_and_the_same_command_goes_on(tiny_recipe: Path, here: Path):
    sweep = [[], ["train.lr=1e-5"], ["time.shift=2"], ["train.ema=0.5"]]
    runs = [trained(tiny_recipe, *one) for one in sweep]
    paths = [folder.path for folder, _ in runs]
    assert len(set(paths)) == 4 and all(path.parent == Path("runs") for path in paths)
    assert not any("--run" in line for line in runs[0][1])
    for (_, said), change in zip(
        runs[1:], ("train.lr 0.01 -> 1e-05", "time.shift 1.0 -> 2.0", "train.ema 0.9 -> 0.5"), strict=True
    ):
        assert [line for line in said if f"differs in {change}. --run {paths[0]} would" in line], said
    for (folder, _), lr in zip(runs[:2], (1e-2, 1e-5), strict=True):
        assert [stage.train.lr for stage in load_stages(folder.recipe)] == [lr, lr]
        assert group(folder, 2)["initial_lr"] == lr
    before = times_of(paths[0])
    again, said = trained(tiny_recipe)
    assert again.path == paths[0] and times_of(paths[0]) == before
    assert [line for line in said if "is finished" in line] and not any("--run" in line for line in said)


def test_a_default_folder_of_an_earlier_version_is_named_and_goes_on_with_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
):
    old = shutil.copytree(TOOLS / "old_run", here / "runs" / "quickstart_cpu-addf31d6")
    recipe, heard = old / "recipe.yaml", Heard()
    fit_curriculum(load_curriculum(recipe, ["stages.videos.train.steps=7"]), run=None, reporter=heard, stage="images")
    assert any(f"--run {Path('runs') / old.name}" in line for line in heard.said)
    with pytest.raises(RecipeError, match="model.dim is 8 here and 16 there"):
        fit(recipe, ["model.dim=8"], run=old)
    fit(recipe, ["train.lr=1e-3"], run=old)
    kept = json.loads((old / "run.json").read_text())
    assert [one["step"] for one in kept["history"]] == [0, 3] and "identity" in kept
    assert kept["history"][1]["changes"] == {"train.lr": [0.002, 0.001]}


# identity


def test_files_count_by_content(tiny_recipe: Path, tiny_run: Path, tiny_shards: Path, tmp_path: Path):
    shards = shutil.copytree(tiny_shards, tmp_path / "moved")
    weights = shutil.copy(RunFolder(tiny_run).weights("clips"), tmp_path / "one.safetensors")

    def identity(*overrides: str) -> dict[str, Any]:
        return identity_of(load_stages(tiny_recipe, overrides)[1])

    usual = identity(f"init={weights}")
    moved = [f"data.shards={{image: {shards}/image-*.tar, video: {shards}/video-*.tar}}"]
    assert identity(f"init={tiny_run}", *moved) == usual
    renamed = shutil.move(weights, tmp_path / "other.safetensors")
    assert identity(f"init={renamed}") == usual
    with Path(renamed).open("r+b") as file:
        file.seek(-9, 2)
        file.write(b"\1")
    assert identity(f"init={renamed}")["init"] != usual["init"]
    index_folder(shards, 0)
    indexed = identity(f"data.shards.video={shards}", f"data.shards.image={shards}")
    again = shutil.move(shards, tmp_path / "again")
    assert identity(f"data.shards.video={again}", f"data.shards.image={again}") == indexed
    (again / "video-00001.tar").unlink()
    (again / NAME).unlink()
    index_folder(again, 0)
    assert identity(f"data.shards.video={again}")["data.shards.video"] != indexed["data.shards.video"]
    gone = identity(f"init={tmp_path}/none.safetensors")
    assert gone["init"] == {"content": None} and alike(gone["init"], usual["init"])


def test_other_data_in_the_same_place_are_another_run(tiny_recipe: Path, tiny_shards: Path, tmp_path: Path):
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    data = f"data.shards={{image: {shards}/image-*.tar, video: {shards}/video-*.tar}}"
    folder, _ = trained(tiny_recipe, data, run=tmp_path / "run")
    shutil.copy(shards / "video-00000.tar", shards / "video-00001.tar")
    with pytest.raises(RecipeError, match="data.shards.video is content .* here and content"):
        trained(tiny_recipe, data, run=folder.path)


THIRD = """
import torch
class Mine(torch.nn.Module):
    def __init__(self, dim, layer, *, gain: float = 1.0, table: str = "none"):
        super().__init__()
        self.weight, self.gain = torch.nn.Parameter(torch.ones(dim)), gain
    def forward(self, x):
        return x * self.weight * self.gain
"""


def test_settings_of_third_parties_are_identity_and_their_files_count_by_content(tiny_recipe: Path, here: Path):
    (here / "third_party.py").write_text(THIRD)
    (here / "table.txt").write_text("1 2 3")
    mixer = "model.mixer={name: 'third_party:Mine', table: table.txt}"
    folder, _ = trained(tiny_recipe, mixer, run=here / "run")
    with pytest.raises(RecipeError, match="model.mixer.gain is 2.0 here and 1.0 there"):
        trained(tiny_recipe, mixer, "model.mixer.gain=2", run=folder.path)
    (here / "table.txt").rename(here / "renamed.txt")
    trained(tiny_recipe, mixer, "model.mixer.table=renamed.txt", run=folder.path)
    (here / "renamed.txt").write_text("1 2 4")
    with pytest.raises(RecipeError, match="model.mixer.table is content"):
        trained(tiny_recipe, mixer, "model.mixer.table=renamed.txt", run=folder.path)


def test_a_setting_that_the_record_does_not_know_is_that_of_its_recipe(tiny_recipe: Path, tmp_path: Path):
    """A later version has a setting more: what was trained before had its default."""
    folder, _ = trained(tiny_recipe, run=tmp_path / "run")
    about = json.loads(folder.about.read_text())
    for stage in STAGES:
        del about["identity"][stage]["model.gate_init"], about["course"][stage]["train.clip_grad"]
    folder.about.write_text(json.dumps(about))
    trained(tiny_recipe, run=folder.path)
    with pytest.raises(RecipeError, match=r"model.gate_init is 0.5 here"):
        trained(tiny_recipe, "model.gate_init=0.5", run=folder.path)


# course


def test_another_course_acts_from_its_step_and_is_on_record(tiny_recipe: Path, tmp_path: Path):
    folder, _ = trained(tiny_recipe, run=tmp_path / "run")
    change = ["stages.clips.train.steps=4", "train.lr=1e-5", "train.weight_decay=0.5", "train.betas=[0.8, 0.9]"]
    _, said = trained(tiny_recipe, *change, run=folder.path)
    assert [
        line for line in said if "stage clips goes on from step 2 with" in line and "train.lr 0.01 -> 1e-05" in line
    ]
    now = group(folder, 4)
    assert (now["initial_lr"], now["lr"], now["schedule"], now["weight_decay"]) == (1e-5, 1e-5, 1e-5, 0.5)
    assert list(now["betas"]) == [0.8, 0.9]
    stage, step, changes = history(folder)[-1]
    assert (stage, step, changes["train.lr"], changes["train.steps"]) == ("clips", 2, [0.01, 1e-5], [2, 4])
    assert "images" not in [one for one, at, _ in history(folder) if at]
    # the finished stage keeps what trained it, in the recipe of the folder and in that of the weights
    for stages in (load_stages(folder.recipe), load_stages_of(folder)):
        assert {one.stage: one.train.lr for one in stages} == {"images": 0.01, "clips": 1e-5}
    before = times_of(folder.path)
    trained(tiny_recipe, *change, run=folder.path)  # the same command: nothing is left to do
    fit(folder.recipe, run=folder.path)
    assert times_of(folder.path) == before


def load_stages_of(folder: RunFolder) -> list[Any]:
    return [recipe_of(folder.weights(stage)) if stage == "clips" else load_stages(folder.recipe)[0] for stage in STAGES]


STAGES = ("images", "clips")


@pytest.mark.parametrize("override", ["train.lr=1e-5", "stages.images.train.lr=1e-5", "stages.clips.train.steps=1"])
def test_a_finished_stage_keeps_its_course(
    tiny_recipe: Path, tiny_run: Path, override: str, capsys: pytest.CaptureFixture[str]
):
    """`tiny_run` itself checks that no file of it is written."""
    assert main(["fit", "--recipe", str(tiny_recipe), "--run", str(tiny_run), override]) == 2
    said = capsys.readouterr().err
    assert "is finished at step" in said and "--run" in said and "Traceback" not in said
    key, value = override.removeprefix("stages.images.").removeprefix("stages.clips.").split("=")
    assert f"{key} " in said and f"-> {value.replace('1e-5', '1e-05')}" in said


def test_a_stage_that_has_not_begun_takes_its_new_course_without_a_word(tiny_recipe: Path, tmp_path: Path):
    run = tmp_path / "run"
    fit(tiny_recipe, ONE, run=run, stage="images")
    folder, said = trained(tiny_recipe, "stages.clips.train.lr=1e-3", run=run)
    assert not any("goes on" in line for line in said) and group(folder, 2)["initial_lr"] == 1e-3
    assert history(folder)[-1] == ("clips", 0, {"train.lr": [0.01, 0.001]})


def test_steps_below_those_that_are_trained_are_refused(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step = LinGenModule.training_step

    def stopped(self: LinGenModule, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 4:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(LinGenModule, "training_step", stopped)
        fit(tiny_recipe, ["train.checkpoint_every=1"], run=tmp_path / "run", stage="clips")
    before = times_of(tmp_path / "run")
    with pytest.raises(RecipeError, match="'clips' has been trained for 4 steps, more than train.steps=3"):
        fit(tiny_recipe, ["stages.clips.train.steps=3"], run=tmp_path / "run", stage="clips")
    assert times_of(tmp_path / "run") == before
    assert history(RunFolder(tmp_path / "run")) == [("clips", 0, {})]


def test_a_finished_run_is_finished_on_a_machine_with_other_devices(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    auto = ["trainer.devices=auto", "trainer.accelerator=auto"]
    stages = load_stages(tiny_recipe, auto)
    usual = described(stages)
    folder, _ = trained(tiny_recipe, "trainer.devices=auto", run=tmp_path / "run")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert fingerprint(described(stages)) == fingerprint(usual)
    change = other_course(usual["clips"].course, described(stages)["clips"].course)
    assert change == {"samples.image": [2, 16], "samples.video": [2, 16]}
    before = times_of(folder.path)
    fit_curriculum(load_curriculum(tiny_recipe, [*ONE, *auto]), run=folder.path)
    assert times_of(folder.path) == before


def test_free_settings_change_while_a_run_goes_on(tiny_recipe: Path, tmp_path: Path):
    trained(tiny_recipe, run=tmp_path / "run")
    more = [
        "stages.clips.train.steps=3",
        "model.checkpointing=true",
        "data.remote.timeout=5",
        "model.mixer.kernel=reference",
    ]
    folder, said = trained(tiny_recipe, *more, run=tmp_path / "run")
    assert not any("checkpointing" in line or "kernel" in line for line in said)
    assert history(folder)[-1][2] == {"train.steps": [2, 3]}
    assert load_stages(folder.recipe)[1].model.checkpointing is True


def test_devices_are_no_change_as_long_as_a_step_holds_as_many_samples(tiny_recipe: Path):
    def course(*overrides: str) -> dict[str, Any]:
        return described(load_stages(tiny_recipe, overrides))["clips"].course

    usual = course()
    assert other_course(usual, course("trainer.devices=2", "data.batch={image: 1, video: 1}")) == {}
    assert other_course(usual, course("train.accumulate=2", "data.batch={image: 1, video: 1}")) == {}
    images = ["stages.clips.data.mix={image: 1, video: 0}"]
    assert other_course(course(*images), course(*images, "data.batch.video=8")) == {}
    assert other_course(usual, course("trainer.devices=2")) == {"trainer.devices": [1, 2]}
    assert other_course(usual, course("trainer.devices=auto", "trainer.num_nodes=1", "trainer.precision=32")) == {}


# the stream of samples


@pytest.mark.parametrize(
    "change",
    [
        ["data.batch={image: 1, video: 3}"],
        ["train.accumulate=3"],
        ["data.mix={image: 2, video: 1}"],
        ["stages.clips.data.mix.image=0"],
        ["train.accumulate=2", "data.batch.video=1", "data.mix.video=1"],
    ],
)
def test_no_sample_is_lost_or_repeated_by_a_change(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: list[str]
):
    """Five steps, five of another course, and the old course again up to the 40th."""
    notes: list[dict[str, Any]] = []
    step = LinGenModule.training_step

    def note(self: LinGenModule, batch: Any, batch_idx: int) -> Any:
        slots, settings = batch.slots.tolist(), self.recipe.train.accumulate
        notes.append({"step": batch.step, "kind": batch.kind, "slots": slots, "keys": batch.keys, "each": settings})
        assert self.global_step == batch.step
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LinGenModule, "training_step", note)
    common = ["train.log_every=100", "train.sample_every=0", "sample.prompts=[]"]
    for steps, overrides in ((5, []), (10, change), (40, [])):
        fit(tiny_recipe, [*common, f"train.steps={steps}", *overrides], run=tmp_path / "run", stage="clips")
    assert Counter(note["step"] for note in notes) == {note["step"]: note["each"] for note in notes}
    assert sorted({note["step"] for note in notes}) == list(range(40))
    slots = [slot for note in notes for slot in note["slots"]]
    assert slots == list(range(len(slots)))
    streams = defaultdict(list)
    for one in notes:
        streams[one["kind"]] += one["keys"]
    for kind, keys in streams.items():
        assert len(keys) > 16, kind
        for start in range(0, len(keys), 16):
            epoch = keys[start : start + 16]
            assert len(set(epoch)) == len(epoch), f"{kind}: {epoch}"


def test_precision_changes_while_a_run_goes_on(tiny_recipe: Path, tmp_path: Path):
    trained(tiny_recipe, run=tmp_path / "run")
    for steps, precision, dtype in ((3, "64-true", torch.float64), (4, "bf16-mixed", torch.float32)):
        more = [f"stages.clips.train.steps={steps}", f"trainer.precision={precision}"]
        folder, said = trained(tiny_recipe, *more, run=tmp_path / "run")
        assert any(f"-> {precision}" in line for line in said)
        stored = Checkpoint(folder.checkpoint("clips", steps))
        assert {stored.dtype(name) for name in stored.tensors if name.startswith("raw.")} == {dtype}


def test_validation_comes_at_the_same_steps_after_a_change_of_accumulate(tiny_recipe: Path, tmp_path: Path):
    common = ["train.validate_every=2", "train.checkpoint_every=1"]
    trained(tiny_recipe, *common, "stages.clips.train.steps=3", run=tmp_path / "run")
    more = ["stages.clips.train.steps=8", "train.accumulate=2", "data.batch={image: 1, video: 1}"]
    folder, _ = trained(tiny_recipe, *common, *more, run=tmp_path / "run")
    with folder.metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == "clips"]
    assert [row["step"] for row in rows if row["validation/loss"]] == ["2", "4", "6", "8"]


def test_a_first_start_that_was_killed_is_no_other_run(tiny_recipe: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json.1-abc.partial").write_text("{")
    trained(tiny_recipe, run=run)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(RecipeError, match="exists and is no run folder"):
        trained(tiny_recipe, run=tmp_path / "other")
    RunFolder(run).about.write_text("{")
    with pytest.raises(RecipeError, match=r"run.json: it is no record of a run"):
        trained(tiny_recipe, run=run)
