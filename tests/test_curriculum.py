"""LinGen's six stages, shrunken, to the end and through every hand-over."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch

import lingen
from lingen.plan.forecast import stage_grids
from lingen.prepare.index import index_folder
from lingen.recipe import load_stages
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import PerKind
from lingen.recipe.sizes import ranks_of, round_of
from lingen.run import fit
from lingen.run_folder.folder import RunFolder
from lingen.training.denoiser import LinGenModule
from lingen.weights import read_weights

SMALL = """
extends: t2v_68s
model:
  dim: 16
  depth: 2
  mixer: {state_dim: 4, head_dim: 8, window: [2, 2, 2]}
  ffn_dim: 32
  patch: [2, 4, 4]
  checkpointing: false
autoencoder: pixels
text: [{name: words, dim: 8, buckets: 64}, {name: bytes, dim: 8, depth: 1}]
data:
  shards: {image: null, video: null}
  synthetic: {name: shapes, clips: 6, images: 6, held_out: 2}
  mix: {image: 1, video: 2}
  batch: {image: 2, video: 1}
  size: [32, 32]
  fps: 8
  workers: 0
train: {log_every: 1, sample_every: 0, validate_every: 0, validation_samples: 2}
sample: {steps: 2, schedule: uniform, prompts: [a red circle moves right]}
trainer: {precision: 32-true, strategy: auto, accelerator: cpu, devices: 1, num_nodes: 1, logger: false}
stages:
  t2i_256:     {data: {size: [16, 16], batch: {image: 2}}, train: {steps: 3, warmup: 1}}
  t2v_256_17s: {data: {frames: 8, size: [16, 16], batch: {image: 2, video: 2}}, train: {steps: 3, warmup: 1}}
  t2v_512_17s: {data: {frames: 8}, train: {steps: 3, warmup: 1}}
  t2v_512_34s: {data: {frames: 16}, train: {steps: 3, warmup: 1}}
  t2v_512_68s: {data: {frames: 32}, train: {steps: 3, warmup: 1}}
  quality:     {data: {frames: 32, shards: {video: null}}, train: {steps: 3, warmup: 1}}
"""


def test_all_stages_of_videos_mix_in_images_of_their_own_size_1_to_100():
    stages = load_stages("t2v_68s")
    assert [one.data.size for one in stages[1:5]] == [(256, 256), *[(512, 512)] * 3]
    for one in stages[1:5]:
        grids, steps, batch = stage_grids(one), round_of(one.data), one.data.batch
        assert grids["image"] == (1, *grids["video"][1:])
        assert steps.video * batch.video == 100 * steps.image * batch.image
        assert (steps.image + steps.video) / steps.image < 1 / (
            1 - one.train.betas[1]
        )  # Adam has not forgotten the last
    assert [round_of(one.data) for one in (stages[0], stages[-1])] == [
        PerKind(image=1, video=0),
        PerKind(image=0, video=1),
    ]


def test_3000_curated_clips_are_not_learnt_by_heart():
    quality = load_stages("t2v_68s")[-1]
    epochs = quality.train.steps * quality.data.batch.video * ranks_of(quality) / 3000
    assert 500 <= quality.train.steps <= 1000 and epochs == pytest.approx(30, abs=0.5)


@pytest.mark.slow
def test_six_stages_hand_over_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LINGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "small.yaml").write_text(SMALL)
    stages = lingen.stages_of(tmp_path / "small.yaml")
    assert stages == ["t2i_256", "t2v_256_17s", "t2v_512_17s", "t2v_512_34s", "t2v_512_68s", "quality"]
    started: dict[str, dict[str, torch.Tensor]] = {}
    start = LinGenModule.on_fit_start

    def note(self: LinGenModule) -> None:
        started[str(self.recipe.stage)] = {name: value.clone() for name, value in self.trained_state().items()}
        start(self)

    monkeypatch.setattr(LinGenModule, "on_fit_start", note)
    folder = RunFolder(fit(tmp_path / "small.yaml", run=tmp_path / "run"))
    for before, after in zip(stages, stages[1:], strict=False):
        raw = read_weights(folder.weights(before), "raw")
        assert all(torch.equal(value, started[after][name]) for name, value in raw.items()), after
    assert read_weights(folder.weights("t2i_256"), "raw")["model.positions.t"].shape[0] == 16  # 32 frames, patch 2
    with folder.metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    assert [(row["stage"], row["step"]) for row in rows] == [
        (stage, str(step)) for stage in stages for step in (1, 2, 3)
    ]
    assert {row["stage"] for row in rows if row["loss/image"]} == set(stages) - {"quality"}
    for stage in stages:
        assert (folder.samples(stage, 3) / "00.mp4").is_file()
    clip = next(lingen.generate(folder.path, "a blue square grows"))
    assert clip.shape == (32, 32, 32, 3)


def test_a_later_stage_without_a_sample_is_refused_before_the_first_trains(
    tiny_recipe: Path, tiny_shards: Path, tmp_path: Path
):
    shutil.copytree(tiny_shards, tmp_path / "shards")
    index_folder(tmp_path / "shards", 0)
    with pytest.raises(RecipeError, match=r"^stage clips: data.shards.video: none of 16 samples fits this stage"):
        fit(
            tiny_recipe,
            [f"data.shards.video={tmp_path}/shards/video-*.tar", "stages.clips.data.frames=400"],
            run=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.batch.video=17"], "are fewer than the 17 of one step .*; set data.batch.video=16, or pack more videos"),
        (["stages.clips.train.accumulate=17"], "lower train.accumulate to at most 16, or pack more videos"),
        (
            ["trainer.devices=3", "data.batch.video=6"],
            r"18 of one step .6 a batch, 3 ranks, .*batch.video=5",
        ),
    ],
)
def test_a_later_stage_that_starves_is_refused_before_the_first_trains(
    tiny_recipe: Path, tmp_path: Path, overrides: list[str], told: str
):
    with pytest.raises(RecipeError, match=f"(?s)^stage clips would starve: 16 .*{told}"):
        fit(tiny_recipe, overrides, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
