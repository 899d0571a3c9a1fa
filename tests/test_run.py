"""The curriculum: resume after a kill, hand-over, ranks, guards. Real runs of tiny models on real shards."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image, ImageSequence

import lingen
from lingen.cli import main
from lingen.data.ledger import DataError
from lingen.media import gif_of, read_video, save_video
from lingen.run import fit
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.intact import Checkpoint
from lingen.sampling.files import sample_again
from lingen.sampling.notes import read_notes
from lingen.sampling.samples import log_samples
from lingen.training.denoiser import LinGenModule
from lingen.training.health import NonFiniteError
from lingen.training.rows import MetricsFile
from lingen.training.trainer import few_threads
from lingen.training.weights import load_denoiser
from lingen.weights import find_weights, read_metadata, read_weights
from tests.helpers.closeness import assert_close
from tests.helpers.commands import lingen_command, run_command, wait_for


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(run: Path) -> dict[tuple[str, str], str]:
    return {(row["stage"], row["step"]): row["loss"] for row in rows(run) if row.get("loss")}


def weights(run: Path) -> dict[str, torch.Tensor]:
    path = find_weights(run)
    return {f"{copy}.{name}": value for copy in ("raw", "averaged") for name, value in read_weights(path, copy).items()}


def test_fit_leaves_everything_in_the_run_folder(tiny_run: Path):
    assert {row["stage"] for row in rows(tiny_run)} == {"images", "clips"}
    assert [row["step"] for row in rows(tiny_run) if row["stage"] == "clips" and row["loss"]] == ["2", "4", "6"]
    columns = rows(tiny_run)[0].keys()
    assert {
        "loss/video",
        "loss/image",
        "grad_norm",
        "grad_norm/image",
        "lr",
        "tokens_per_second",
        "validation/loss",
    } <= columns
    assert any(name.startswith("loss/time_") for name in columns)
    assert {"mixer/00/ma_rms", "mixer/01/te_rms", "mixer/01/horizon"} <= columns
    about = json.loads((tiny_run / "run.json").read_text())
    assert (
        about["versions"]["torch"] == torch.__version__.split("+")[0] or about["versions"]["torch"] == torch.__version__
    )
    for stage in ("images", "clips"):
        metadata = read_metadata(tiny_run / "stages" / stage / "weights.safetensors")
        assert metadata["stage"] == stage
    assert (tiny_run / "samples" / "clips-0000006" / "00.mp4").stat().st_size > 500
    assert (tiny_run / "samples" / "clips-0000006" / "sheet.png").is_file()
    ledger = json.loads((tiny_run / "ledger.json").read_text())
    assert ledger["seen"] >= 6
    reloaded = lingen.load_recipe(tiny_run / "recipe.yaml", stage="clips")
    assert reloaded.model == load_denoiser(tiny_run).recipe.model


def test_same_command_again_does_nothing_and_more_steps_go_on(tiny_recipe: Path, tiny_run: Path, tmp_path: Path):
    short = tmp_path / "short"
    fit(tiny_recipe, ["stages.clips.train.steps=2"], run=short)
    before = losses(short)
    fit(tiny_recipe, ["stages.clips.train.steps=2"], run=short)
    assert losses(short) == before
    fit(tiny_recipe, run=short)
    assert losses(short) == losses(tiny_run)
    for name, value in weights(tiny_run).items():
        assert torch.equal(value, weights(short)[name]), name


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_and_the_same_command_give_the_same_run(tiny_recipe: Path, tmp_path: Path, workers: int):
    overrides = [
        f"data.workers={workers}", "train.checkpoint_every=2", "train.log_every=1", "stages.clips.train.steps=9",
        "train.sample_every=0", "sample.prompts=[]",
    ]  # fmt: skip
    fit(tiny_recipe, overrides, run=tmp_path / "straight")

    words = ["fit", "--recipe", str(tiny_recipe), *overrides]
    killed = tmp_path / "killed"
    process = subprocess.Popen(lingen_command(*words, "--run", str(killed)), start_new_session=True)
    wait_for(lambda: RunFolder(killed).checkpoints("clips"), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not RunFolder(killed).weights("clips").is_file(), "the kill came too late to prove anything"
    again = run_command(*words, "--run", str(killed))
    assert again.returncode == 0, again.stderr
    assert losses(killed) == losses(tmp_path / "straight")
    for name, value in weights(tmp_path / "straight").items():
        assert torch.equal(value, weights(killed)[name]), name


def test_sample_keys_are_the_same_after_a_resume(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[str, int, str, tuple[str, ...]]] = []
    step = LinGenModule.training_step

    def note(self, batch, batch_idx):
        seen.append((self.recipe.stage, batch.step, batch.kind, tuple(batch.keys)))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LinGenModule, "training_step", note)
    fit(tiny_recipe, run=tmp_path / "straight")
    straight, seen[:] = list(seen), []
    fit(tiny_recipe, ["stages.clips.train.steps=3"], run=tmp_path / "halves")
    fit(tiny_recipe, run=tmp_path / "halves")
    assert seen == straight
    assert {kind for _, _, kind, _ in straight} == {"image", "video"}


def test_a_signal_saves_at_the_steps_edge(tiny_recipe: Path, tmp_path: Path):
    """From outside, at a moment of chance; tests/test_signals.py goes through the moments."""
    run = tmp_path / "run"
    words = [
        "fit",
        "--recipe",
        str(tiny_recipe),
        "--run",
        str(run),
        "stages.clips.train.steps=100000",
        "train.checkpoint_every=3",
    ]
    process = subprocess.Popen(lingen_command(*words), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: RunFolder(run).checkpoints("clips"), process)
    process.send_signal(signal.SIGUSR1)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr
    assert RunFolder(run).checkpoints("clips")


@pytest.mark.slow
def test_two_ranks_equal_one_rank_of_twice_the_batch(tiny_recipe: Path, tmp_path: Path):
    common = ["data.workers=0", "train.text_drop=0.5", "trainer.precision=64-true"]
    fit(tiny_recipe, [*common, "data.batch.image=4", "data.batch.video=4"], run=tmp_path / "one")
    two = run_command(
        "fit", "--recipe", str(tiny_recipe), *common, "--run", str(tmp_path / "two"), "data.batch.image=2",
        "data.batch.video=2", "trainer.devices=2", "trainer.strategy=ddp",
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    for stage in ("images", "clips"):
        a, b = (
            read_weights(tmp_path / run / "stages" / stage / "weights.safetensors", "raw") for run in ("one", "two")
        )
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    for key, value in losses(tmp_path / "one").items():
        assert float(value) == pytest.approx(float(losses(tmp_path / "two")[key]), rel=1e-6)
    ledgers = [json.loads((tmp_path / run / "ledger.json").read_text()) for run in ("one", "two")]
    assert ledgers[0]["seen"] == ledgers[1]["seen"]


def test_accumulated_batches_equal_one_large_batch(tiny_recipe: Path, tmp_path: Path):
    double = ["trainer.precision=64-true"]  # AdamW divides by |gradient|: in float32 the rounding of tiny ones shows
    fit(tiny_recipe, [*double, "data.batch.image=4", "data.batch.video=4"], run=tmp_path / "large", stage="clips")
    fit(
        tiny_recipe,
        [*double, "data.batch.image=2", "data.batch.video=2", "train.accumulate=2"],
        run=tmp_path / "small",
        stage="clips",
    )
    large, small = (read_weights(find_weights(tmp_path / run), "raw") for run in ("large", "small"))
    torch.testing.assert_close(small, large, rtol=1e-6, atol=1e-6)


def test_hand_over_takes_raw_weights_and_seeds_the_average(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started: dict[str, dict[str, torch.Tensor]] = {}
    start = LinGenModule.on_fit_start

    def note(self):
        start(self)
        started[self.recipe.stage] = {name: value.clone() for name, value in self.average.weights().items()}
        assert self.average.updates == 0

    monkeypatch.setattr(LinGenModule, "on_fit_start", note)
    folder = RunFolder(fit(tiny_recipe, run=tmp_path / "run"))
    raw = read_weights(folder.weights("images"), "raw")
    averaged = read_weights(folder.weights("images"), "averaged")
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)
    for name, value in started["clips"].items():
        assert torch.equal(value, raw[name]), name


def test_a_stage_trained_on_tells_the_later_ones_that_began_before(tiny_recipe: Path, tmp_path: Path, capsys):
    run, told = tmp_path / "run", "stage images was trained on, but stage clips began from what that was before"
    words = ["fit", "--recipe", str(tiny_recipe), "--run", str(run)]
    assert main(words) == 0 and told not in capsys.readouterr().err
    before, steps = find_weights(run).read_bytes(), 1 + RunFolder(run).finished_steps("images")
    assert main([*words, f"stages.images.train.steps={steps}"]) == 0 and told in capsys.readouterr().err
    assert RunFolder(run).finished_steps("images") == steps and find_weights(run).read_bytes() == before


def test_keep_optimizer_carries_the_moments_over(tiny_recipe: Path, tmp_path: Path):
    runs = {"kept": ["stages.clips.train.keep_optimizer=true"], "fresh": []}
    ends = {}
    for name, overrides in runs.items():
        folder = RunFolder(fit(tiny_recipe, ["train.lr=0", *overrides], run=tmp_path / name))
        ends[name] = Checkpoint(folder.checkpoints("clips")[-1])
    steps = {name: {one["step"] for one in end.state["optimizer"].values()} for name, end in ends.items()}
    assert steps == {"kept": {2 + 6}, "fresh": {6}}
    kept, fresh = (end.read("exp_avg.model.patchify.weight") for end in ends.values())
    start = Checkpoint(RunFolder(tmp_path / "kept").checkpoints("images")[-1]).read("exp_avg.model.patchify.weight")
    assert_close("exp_avg", kept - fresh, 0.9**6 * start, 1e-5)  # the gradients are the same


def test_moments_to_keep_that_are_damaged_are_refused(tiny_recipe: Path, tmp_path: Path):
    kept, folder = ["stages.clips.train.keep_optimizer=true"], RunFolder(tmp_path / "run")
    fit(tiny_recipe, kept, run=folder.path, stage="images")
    for file in folder.checkpoints("images")[-1].glob("*.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(lingen.RecipeError, match="holds none that is whole; .* is passed over: rank-00000.* has 0 byt"):
        fit(tiny_recipe, kept, run=folder.path)


def test_init_starts_from_given_weights(tiny_recipe: Path, tiny_run: Path, tmp_path: Path):
    run = fit(
        tiny_recipe,
        [f"init={tiny_run}", "stages.images.train.steps=1", "train.lr=0"],
        run=tmp_path / "tuned",
        stage="images",
    )
    given, tuned = read_weights(find_weights(tiny_run), "raw"), read_weights(RunFolder(run).weights("images"), "raw")
    for name, value in given.items():
        assert torch.equal(value, tuned[name]), name


def test_another_recipe_in_the_same_folder_is_refused(
    tiny_recipe: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(lingen.RecipeError, match="holds a run of another recipe"):
        fit(tiny_recipe, ["model.depth=1"], run=tiny_run)
    assert main(["fit", "--recipe", str(tiny_recipe), "--run", str(tiny_run), "seed=5"]) == 2
    said = capsys.readouterr().err
    assert "holds a run of another recipe" in said and "Traceback" not in said


NAN_MIXER = """
import torch
class Broken(torch.nn.Module):
    def __init__(self, dim, layer, *, gain: float = 1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(dim))
    def forward(self, x):
        # Only on grids of training: the trial before it, on 2 x 4 x 4 tokens, would refuse the part.
        return x * self.weight * (float("nan") if x.shape[2] != 4 else 1.0)
"""


def test_a_loss_that_is_not_finite_stops_with_step_and_keys(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "broken_mixer.py").write_text(NAN_MIXER)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NonFiniteError, match=r"3 steps in a row, up to step 3 of stage 'clips'.*\.tar:"):
        fit(tiny_recipe, ["model.mixer=broken_mixer:Broken"], run=tmp_path / "run", stage="clips")


@pytest.mark.parametrize("stopped_at", [None, 1])
def test_a_stage_without_a_single_finite_step_has_not_trained(
    tiny_recipe: Path, here: Path, stopped_at: int | None, capsys
):
    """Though it is shorter than `max_nonfinite`, and even where it went on from a checkpoint of its own."""
    (here / "broken_mixer.py").write_text(NAN_MIXER)
    words = [
        "fit",
        "--recipe",
        str(tiny_recipe),
        "--run",
        "run",
        "--stage",
        "images",
        "model.mixer=broken_mixer:Broken",
    ]
    if stopped_at is not None:
        assert main([*words, "train.checkpoint_every=1"]) == 1
        assert [path.name for path in RunFolder(here / "run").checkpoints("images")] == ["step-00000001"]
    assert main(words) == 1
    assert "not finite in 2 steps in a row, up to step 2 of stage 'images'" in " ".join(capsys.readouterr().err.split())
    assert not RunFolder(here / "run").weights("images").exists()
    assert not RunFolder(here / "run").checkpoint("images", 2).exists()


def test_too_many_broken_samples_stop_the_run_and_name_the_first(tiny_recipe: Path, broken_shard: Path, tmp_path: Path):
    with pytest.raises(DataError, match="broken"):
        fit(
            tiny_recipe,
            [f"data.shards.video={broken_shard}", "data.max_dropped=0"],
            run=tmp_path / "strict",
            stage="clips",
        )
    kept = fit(
        tiny_recipe, [f"data.shards.video={broken_shard}", "data.max_dropped=1"], run=tmp_path / "lax", stage="clips"
    )
    assert sum(json.loads(RunFolder(kept).ledger.read_text())["dropped"].values()) > 0


def test_decay_pulls_only_at_matrices(tiny_recipe: Path):
    module = LinGenModule(lingen.load_recipe(tiny_recipe, stage="clips"))
    decayed, free = module.parameter_groups()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert decayed["weight_decay"] > 0 and free["weight_decay"] == 0
    free_names = {names[id(p)] for p in free["params"]}
    assert {name for name in free_names if name.endswith(("a_log", "dt_bias", ".d", "norm.weight"))}
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(module.trained_parameters())


def test_mfu_is_logged_where_the_peak_is_known(tiny_recipe: Path):
    from lingen.plan.forecast import peak_flops, plan

    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA Unheard-of") is None
    recipe = lingen.load_recipe(tiny_recipe, stage="clips")
    module = LinGenModule(recipe)
    of_model, of_hardware = module.flop_of_training("video")
    assert of_model == of_hardware == 3 * plan(recipe).flops["video"] > 0
    again = LinGenModule(lingen.load_recipe(tiny_recipe, ["model.checkpointing=true"], stage="clips"))
    assert again.flop_of_training("video") == (of_model, pytest.approx(of_model * 4 / 3))


def test_mfu_and_hfu_of_the_fastest_step_that_can_be_are_1_at_most(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch):
    """A step that takes what a GPU at its peak would for all that is computed, recomputation included."""
    from lingen.plan.forecast import peak_flops, plan

    recipe = lingen.load_recipe(tiny_recipe, ["model.checkpointing=true"], stage="clips")
    module, computed = LinGenModule(recipe), plan(recipe).training_flops["video"]
    monkeypatch.setattr(LinGenModule, "device", torch.device("cuda"))
    monkeypatch.setattr(LinGenModule, "global_step", 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    module._trainer = SimpleNamespace(world_size=2, global_step=2)
    of_model, of_hardware = module.flop_of_training("video")
    module.meter.count("mfu", 2 * of_model)  # a sample of each of two ranks
    module.meter.count("hfu", 2 * of_hardware)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    module._started = (-computed / peak_flops("NVIDIA H200"), 0)
    values = module.collect_metrics()
    assert (values["mfu"], values["hfu"]) == (pytest.approx(3 / 4), pytest.approx(1))


def test_fit_is_public_and_tells_how_a_signal_ended_it(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first call is stopped in its second stage and says so; the second one goes on and returns the run folder."""
    step = LinGenModule.training_step

    def stopped(self, batch, batch_idx):
        if self.recipe.stage == "clips" and self.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(LinGenModule, "training_step", stopped)
        lingen.fit(tiny_recipe, run=tmp_path / "run")
    assert ended.value.code == 75 and RunFolder(tmp_path / "run").checkpoints("clips")
    assert lingen.fit(tiny_recipe, ["train.log_every=1"], run=tmp_path / "run") == tmp_path / "run"
    assert RunFolder(tmp_path / "run").finished(["images", "clips"]) == ["images", "clips"]
    with pytest.raises(lingen.RecipeError, match="There is no stage called 'clip'. Did you mean 'clips'"):
        lingen.fit(tiny_recipe, run=tmp_path / "other", stage="clip")


def test_curves_of_a_logger_go_on_over_stages(tiny_recipe: Path, tmp_path: Path):
    """Steps are those of the whole run, and a tag says which stage a value is of; metrics.csv counts by stage."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit(tiny_recipe, ["trainer.logger=tensorboard", "train.log_every=1"], run=tmp_path / "run")
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert [one.step for one in events.Scalars("images/loss")] == [1, 2]
    assert [one.step for one in events.Scalars("clips/loss")] == [3, 4, 5, 6, 7, 8]
    assert [one.step for one in events.Images("clips/samples")] == [8]
    (moving,) = events.Images("clips/samples/00")
    with Image.open(io.BytesIO(moving.encoded_image_string)) as gif:
        frames, _ = read_video((RunFolder(run).samples("clips", 6) / "00.mp4").read_bytes())
        assert (moving.step, gif.format, gif.height) == (8, "GIF", moving.height)
        assert getattr(gif, "n_frames", 1) == len(frames) > 1
    with RunFolder(run).metrics.open(newline="") as file:
        rows = [(row["stage"], row["step"]) for row in csv.DictReader(file)]
    assert rows == [("images", "1"), ("images", "2"), *(("clips", str(step)) for step in range(1, 7))]


def test_a_gif_of_a_long_clip_is_small_and_takes_as_long(tmp_path: Path):
    clip = np.random.default_rng(0).integers(0, 255, (100, 520, 300, 3), np.uint8)
    with Image.open(io.BytesIO(gif_of(save_video(clip, tmp_path / "clip.mp4", 20)))) as shown:
        durations = [one.info["duration"] for one in ImageSequence.all_frames(shown)]
    assert (shown.size, len(durations), sum(durations)) == ((100, 174), 64, pytest.approx(5000, rel=0.1))


def test_wandb_gets_the_sheet_and_the_clips(tmp_path: Path):
    """With Lightning's own methods replaced: the service has not been asked."""

    class Heard(WandbLogger):
        def __init__(self) -> None:
            self.told: list[Any] = []

        def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
            self.told.append((key, [Path(one).name for one in images], step))

        log_video = log_image

    for name in ("00.mp4", "01.mp4", "sheet.png"):
        (tmp_path / name).touch()
    logger = Heard()
    module: Any = SimpleNamespace(loggers=[logger], recipe=SimpleNamespace(stage="clips"), steps_before=2)
    log_samples(module, tmp_path / "sheet.png", 6)
    wanted = [("clips/samples", ["sheet.png"], 8), ("clips/samples/clips", ["00.mp4", "01.mp4"], 8)]
    assert logger.told == wanted


def test_metrics_join_a_step_and_drop_what_is_trained_again(tmp_path: Path):
    path, heard = tmp_path / "metrics.csv", []
    rows = MetricsFile(path, "one", 0, heard.append)
    rows.write(1, {"loss": 2.0})
    rows.write(1, {"validation/loss": 3.0})
    rows.write(2, {"loss": 1.0})
    assert path.read_text().splitlines() == ["stage,step,loss,validation/loss", "one,1,2.0,3.0", "one,2,1.0,"]
    MetricsFile(path, "two", 0, heard.append).write(1, {"loss": 0.5})
    MetricsFile(path, "one", 1, heard.append).write(2, {"loss": 0.9})
    assert path.read_text().splitlines()[1:] == ["one,1,2.0,3.0", "two,1,0.5,", "one,2,0.9,"]
    assert heard[1] == {"stage": "one", "step": 1, "validation/loss": 3.0}


def test_columns_of_metrics_have_one_order_whoever_comes_first(tmp_path: Path):
    """What is read first stands first, measures of a kind beside each other; a file of an earlier version joins in."""
    path = tmp_path / "metrics.csv"
    path.write_text("stage,step,data/used,mixer/10/ma_rms,loss,mixer/02/ma_rms\none,1,4.0,0.5,2.0,0.25\n")
    rows = MetricsFile(path, "one", 1, lambda row: None)
    rows.write(2, {"time/own_max": 1.0, "loss/time_0.1_0.25": 3.0, "loss/time_0_0.1": 4.0, "lr": 0.1, "loss": 1.0})
    rows.write(2, {"validation/loss": 5.0})
    lines = path.read_text().splitlines()
    first = "stage,step,loss,loss/time_0_0.1,loss/time_0.1_0.25,validation/loss,lr"
    assert lines[0] == f"{first},time/own_max,data/used,mixer/02/ma_rms,mixer/10/ma_rms"
    assert lines[1:] == ["one,1,2.0,,,,,,4.0,0.25,0.5", "one,2,1.0,4.0,3.0,5.0,0.1,1.0,,,"]


def test_the_last_stages_sheet_is_named_first(tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["fit", "--recipe", str(tiny_recipe), "--run", str(tmp_path / "run"), "stages.clips.train.sample_every=3"]
    assert main(words) == 0
    sheets = [Path(line).parent.name for line in capsys.readouterr().out.splitlines() if line.endswith("sheet.png")]
    assert sheets == ["clips-0000006", "clips-0000003", "images-0000002"]


def test_a_score_keeps_each_clip_and_goes_with_its_weights(tiny_recipe: Path, tmp_path: Path):
    """Every judged clip is a film that can be made again; weights that were trained on do not have an old score."""
    words = ["data.synthetic=shapes", "stages.images.train.steps=1", "sample.prompts=[]", "sample.steps=2"]
    run = fit(tiny_recipe, [*words, "score.clips=3", "stages.clips.train.steps=1"], run=tmp_path / "run")
    folder = RunFolder(run)
    made = run / "samples/score-0000001"
    assert [path.name for path in sorted(made.iterdir())] == [
        "00.mp4", "01.mp4", "02.mp4", "score.json", "sheet.png",
    ]  # fmt: skip
    noted = [read_notes(path) for path in sorted(made.glob("*.mp4"))]
    assert len({one.prompt for one in noted}) == 3 and folder.score.read_text() == (made / "score.json").read_text()
    again = sample_again(made / "01.mp4", tmp_path / "again.mp4")
    assert (read_video(again.read_bytes())[0] == read_video((made / "01.mp4").read_bytes())[0]).all()
    fit(tiny_recipe, [*words, "score.clips=0", "stages.clips.train.steps=2"], run=run)
    assert not folder.score.exists() and (made / "score.json").is_file()


def test_the_learning_rate_of_a_row_is_that_of_its_step(tiny_recipe: Path, tmp_path: Path):
    words = ["train.lr=0.004", "train.warmup=4", "train.log_every=1", "stages.images.train.steps=5"]
    run = fit(tiny_recipe, [*words, "sample.prompts=[]"], run=tmp_path / "run", stage="images")
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    found = {int(row["step"]): float(row["lr"]) for row in rows if row["lr"]}
    assert found == pytest.approx({1: 0.001, 2: 0.002, 3: 0.003, 4: 0.004, 5: 0.004})


@pytest.mark.parametrize(
    ("words", "env", "inside"),
    [
        ([], None, 1),
        ([], "2", 2),  # the user says how many
        (["data.batch.video=64"], None, 2),  # 221,184 numbers
        (["trainer.accelerator=gpu"], None, 2),
    ],
)
def test_steps_too_small_for_two_threads_have_one(words, env, inside, monkeypatch: pytest.MonkeyPatch):
    recipe = lingen.load_recipe("quickstart_cpu", words, stage="videos")
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if env:
        monkeypatch.setenv("OMP_NUM_THREADS", env)
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), few_threads(recipe):
            assert torch.get_num_threads() == inside
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
