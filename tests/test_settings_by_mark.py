"""Every setting of a denoiser's and of an autoencoder's recipe, by its mark: a change of an identity is refused, one of
a course acts, and a free one changes no bit of a weight.

A setting that is added to lingen needs a row here, or a reason why it has none.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lingen.plan.loading import load_curriculum
from lingen.recipe import load_stages
from lingen.recipe.bounds import COURSE, FREE, IDENTITY, Mark
from lingen.recipe.errors import RecipeError
from lingen.recipe.marks import TRAINER, entries_of
from lingen.run import fit
from lingen.run_folder import record
from lingen.run_folder.folder import RunFolder
from lingen.run_folder.identity import described
from lingen.weights import read_weights
from tests.helpers.closeness import assert_close

SETS = "data.synthetic={name: shapes, clips: 6, images: 6, held_out: 2}"
SMALL = {
    "quickstart_cpu": (
        SETS, "model.dim=16", "model.depth=1", "model.mixer.state_dim=4", "model.mixer.head_dim=8", "text.0.dim=8",
        "train.optimizer=adamw",
        "text.0.buckets=64", "data.batch={image: 2, video: 1}", "stages.videos.data.mix={image: 1, video: 1}",
        "train.warmup=1", "trainer.precision=32-true", "trainer.logger=false", "score.clips=0", "sample.prompts=[]",
        "reconstruction.features.path=FOLDER/one", "stages.images.train.steps=1",
    ),
    "tae_8x8x8": (
        SETS, "autoencoder={strides: [2, 4, 4], channels: 4, width: 8, blocks: 1}",
        "data.shards={image: null, video: null}", "data.validation={image: null, video: null}", "data.workers=0",
        "data.batch={image: 2, video: 1}", "data.mix={image: 1, video: 1}", "data.frames=9", "data.size=[16, 16]",
        "stages.detail.data.size=[16, 16]", "stages.detail.data.batch={image: 2, video: 1}", "train.warmup=1",
        "reconstruction.perceptual=0", "reconstruction.features.path=FOLDER/one", "reconstruction.l1=2",
        "reconstruction.discriminator_width=4", "reconstruction.discriminator_layers=1", "stages.short.train.steps=1",
        "stages.detail.reconstruction.adversarial_start=0", "trainer.precision=32-true", "trainer.accelerator=cpu",
        "trainer.logger=false",
    ),
}  # fmt: skip
"""Recipe -> what makes it small; the last stage is the one that is tried."""

CHANGED: dict[str, str | tuple[str, ...]] = {
    # identity
    "seed": "1", "init": "FOLDER/weights.safetensors", "trains": (
        "trains=autoencoder", "autoencoder={name: tae, strides: [2, 4, 4], channels: 4, width: 8, blocks: 1}",
        "reconstruction.adversarial=0",
    ),
    "model.dim": "32", "model.depth": "2", "model.mixer.name": ("model.mixer=mamba2", "model.mixer.head_dim=8"),
    "model.mixer.state_dim": "8", "model.mixer.head_dim": "4", "model.mixer.window": "[2, 2, 2]",
    "model.mixer.ma": "null", "model.mixer.te": "null", "model.mixer.branch_gate": "each", "model.mixer.scan": "thw",
    "model.mixer.groups": "2", "model.mixer.expand": "4", "model.mixer.dt_min": "1e-4", "model.mixer.dt_max": "0.2",
    "model.mixer.long_heads": "0.5", "model.mixer.a_min": "1e-3", "model.mixer.a_max": "8",
    "model.mixer.norm": "per_head", "model.mixer.conv": "per_direction", "model.mixer.conv_width": "3",
    "model.mixer.conv_ends": "masked", "model.mixer.review": "[1, 1, 1]",
    "model.mixer.review_reverse": "plain", "model.mixer.bidirectional": "false", "model.mixer.num_heads": "4",
    "model.num_heads": "2", "model.ffn_dim": "64", "model.patch": "[1, 8, 8]", "model.predict": "velocity",
    "model.gate_init": "0.5", "model.position_std": "0.6", "model.pool_text": "false", "model.max_grid": "[8, 8, 8]",
    "autoencoder.name": "autoencoder={name: 'lingen.autoencoder.pixels:Pixels'}", "autoencoder.scale": "2",
    "text.0.name": ("text=bytes", "text.0.dim=8"), "text.0.dim": "16", "text.0.buckets": "32",
    "text.0.max_tokens": "16", "text.0.depth": "1", "text.0.parts": "true",
    "data.shards.image": ("data.shards={image: FOLDER/one.tar, video: FOLDER/one.tar}",),
    "data.shards.video": ("data.shards={image: FOLDER/one.tar, video: FOLDER/one.tar}",),
    "data.synthetic.name": "'lingen.data.synthetic:Shapes'", "data.synthetic.clips": "7",
    "data.synthetic.images": "7", "data.synthetic.held_out": "3", "data.synthetic.seed": "1", "data.frames": "4",
    "data.lengths": "[4]", "data.size": "[16, 24]", "data.sizes": "[[16, 24]]", "data.fps": "4",
    "data.fps_prefix": "true", "data.block": "2", "train.keep_optimizer": "true",
    "train.optimizer.name": "train.optimizer=muon", "train.loss.name": "train.loss=huber",
    "train.loss.by_time": "[1, 2]",
    "reconstruction.l1": "0.5",
    "reconstruction.perceptual": "0.2", "reconstruction.features.name": "reconstruction.features=none",
    "reconstruction.features.path": "FOLDER/two", "reconstruction.perceptual_frames": "2",
    "reconstruction.kl": "1e-5", "reconstruction.outlier": "2", "reconstruction.outlier_radius": "2",
    "reconstruction.adversarial": "0.1", "reconstruction.adaptive_max": "10",
    "reconstruction.discriminator_start": (
        "reconstruction.discriminator_start=3", "reconstruction.adversarial_start=9",
    ),
    "reconstruction.adversarial_start": ("reconstruction.adversarial_start=2001",),
    "reconstruction.discriminator_width": "8", "reconstruction.discriminator_layers": "2",
    "autoencoder.strides": "[1, 4, 4]", "autoencoder.channels": "8", "autoencoder.width": "16",
    "autoencoder.path": "FOLDER/tae.safetensors", "autoencoder.multipliers": "[1, 1, 1]", "autoencoder.blocks": "2",
    "autoencoder.attention": "false", "autoencoder.reach": "1",
    # course
    "data.mix.image": "0", "data.mix.video": "3", "data.mix_by": "samples", "data.batch.image": "1",
    "data.batch.video": "2",
    "time.distribution": "uniform", "time.mean": "1", "time.std": "2", "time.shift": "1", "train.lr": "1e-5",
    "train.warmup": "5", "train.decay.name": "train.decay=wsd",
    "train.optimizer.eps": "1e-2", "train.weight_decay": "0.5", "train.betas": "[0.5, 0.6]",
    "train.clip_grad": "1e-3", "train.accumulate": "2", "train.ema": "0.01", "train.text_drop": "1",
    "reconstruction.discriminator_lr": "1e-2", "trainer.precision": "bf16-mixed",
    # free
    "name": "another", "imports": "[colorsys]", "model.checkpointing": "true",
    "data.validation.image": "FOLDER/image.tar",
    "data.validation.video": "FOLDER/video.tar", "data.max_dropped": "0.5", "data.remote.timeout": "5",
    "data.remote.attempts": "2", "data.remote.cache_gb": "1", "data.workers": "1", "data.cache_mb": "0",
    "train.max_nonfinite": "1", "train.log_every": "1", "train.checkpoint_every": "1", "train.validate_every": "1",
    "train.keep_checkpoints": "1", "train.keep_every": "1", "train.watchdog": "60", "train.on_spike": "skip",
    "train.evaluate_every": "2",
    "train.validation_samples": "1", "train.sample_every": "1", "sample.steps": "2", "sample.guidance": "1.5",
    "sample.guidance_interval": "[0.1, 0.9]", "sample.guidance_rescale": "0.5", "sample.solver": "heun",
    "sample.schedule": "linear_quadratic", "sample.emulated_steps": "20", "sample.precision": "32-true",
    "sample.guidance_batch": "true", "sample.decode": "tiled", "sample.tile": "[16, 16]", "sample.seed": "1",
    "sample.prompts": "[a red circle]", "rewrite.name": "gemma", "rewrite.path": "FOLDER", "rewrite.max_tokens": "32",
    "rewrite.temperature": "1", "rewrite.seed": "1", "rewrite.batch": "2", "score.clips": "1", "score.split": "tune",
    "trainer.accelerator": "auto", "trainer.logger": "tensorboard", "trainer.benchmark": "true",
    "trainer.deterministic": "true", "trainer.profiler": "simple", "trainer.detect_anomaly": "true",
    "autoencoder.chunk": "1", "autoencoder.checkpointing": "true",
    # only rounding
    "model.mixer.kernel": "reference", "trainer.strategy": "ddp", "train.compile": "graph",
}  # fmt: skip
"""Setting -> another legal value, or the overrides that make it another one."""
OF_TAE = CHANGED | {
    "autoencoder.name": (
        "autoencoder={name: 'lingen.autoencoder.tae:TAE', strides: [2, 4, 4], channels: 4, width: 8, blocks: 1}",
    ),
    "reconstruction.discriminator_start": (
        "stages.detail.reconstruction.discriminator_start=3",
        "stages.detail.reconstruction.adversarial_start=9",
    ),
    "reconstruction.adversarial_start": ("stages.detail.reconstruction.adversarial_start=1",),
}
LAST = {"quickstart_cpu": "videos", "tae_8x8x8": "detail"}
"""The stage that is tried."""

REASONS = {
    "stage": "the name of a stage: other stages are another run, see below",
    "train.steps": "every fit here asks for more of them",
    "train.optimizer.momentum": "Muon's, held to torch's in tests/test_extend.py",
    "trainer.devices": "several processes: tests/test_resume.py kills a run of two ranks, which goes on with one",
    "trainer.num_nodes": "several machines; counted as devices are, see tests/test_record.py",
    "trainer.max_time": "a clock",
    "trainer.callbacks": "lingen brings none: tests/test_extend.py has some",
    "data.synthetic": "the autoencoder's recipe has its data set here as settings of their own",
}
"""Settings that are not changed here, and why."""

ROUNDING = ("model.mixer.kernel", "trainer.strategy", "train.compile")
"""Free settings that may change the last bits, and no more."""
LIMIT = 1e-6


def overrides_of(key: str, folder: Path, name: str = "quickstart_cpu") -> list[str]:
    changed = (OF_TAE if name == "tae_8x8x8" else CHANGED)[key]
    words = [changed] if isinstance(changed, str) else list(changed)
    written = [word if "=" in word else f"{key}={word}" for word in words]
    return [word.replace("FOLDER", str(folder)) for word in written]


def marks(name: str, folder: Path) -> dict[str, Mark]:
    """Of every setting that the last stage of a recipe has, small or as it is shipped, and of the Trainer's."""
    small = load_stages(name, small_of(name, folder))[-1]
    own = entries_of(load_stages(name)[-1]) | entries_of(small)
    found = {key: entry.mark for key, entry in own.items()}
    found |= {f"trainer.{key}": mark for key, mark in TRAINER.items()}
    return {key: mark for key, mark in found.items() if key != "data.synthetic"}


def small_of(name: str, folder: Path, steps: int = 2) -> list[str]:
    words = (*SMALL[name], f"stages.{LAST[name]}.train.steps={steps}")
    return [word.replace("FOLDER", str(folder)) for word in words]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path, tiny_run: Path) -> Iterator[Path]:
    """A folder with a run of two steps of each recipe, and files to name."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINGEN_CACHE", str(folder / "cache"))
        (folder / "one").write_text("one")
        (folder / "two").write_text("two")
        shutil.copy(RunFolder(tiny_run).weights("clips"), folder / "weights.safetensors")
        for name, shard in (("one", "video-00000"), ("video", "video-00001"), ("image", "image-00000")):
            shutil.copy(tiny_shards / f"{shard}.tar", folder / f"{name}.tar")
        for name in SMALL:
            fit(name, small_of(name, folder), run=folder / name)
        shutil.copy(RunFolder(folder / "tae_8x8x8").weights("detail"), folder / "tae.safetensors")
        yield folder


def state_after(begun: Path, name: str, overrides: list[str], out: Path) -> dict[str, torch.Tensor]:
    """Weights and their average two steps later."""
    shutil.copytree(begun / name, out)
    fit(name, [*small_of(name, begun, 4), *overrides], run=out)
    file = RunFolder(out).weights(LAST[name])
    copies = {copy: read_weights(file, copy) for copy in ("raw", "averaged")}
    return {f"{copy}.{key}": value for copy, of in copies.items() for key, value in of.items()}


@pytest.fixture(scope="module")
def usual(begun: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: state_after(begun, name, [], begun / f"{name}-usual") for name in SMALL}


def test_every_setting_has_another_value_or_a_reason(begun: Path):
    known = {key for name in SMALL for key in marks(name, begun)}
    assert sorted(known - CHANGED.keys() - REASONS.keys()) == []
    assert sorted((CHANGED.keys() | REASONS.keys()) - known - {"data.synthetic"}) == []


@pytest.mark.parametrize("name", SMALL)
def test_another_identity_is_refused_by_name(begun: Path, name: str):
    tried = [key for key, mark in marks(name, begun).items() if mark is IDENTITY and key in CHANGED]
    tried = [key for key in tried if name == "quickstart_cpu" or key.startswith(("autoencoder.", "reconstruction."))]
    accepted = []
    for key in tried:
        curriculum = load_curriculum(name, [*small_of(name, begun), *overrides_of(key, begun, name)])
        try:
            record.start(RunFolder(begun / name), curriculum, described(curriculum.stages), LAST[name])
            accepted.append(key)
        except RecipeError as error:
            if f"{key} is " not in str(error) and " more" not in str(error):
                accepted.append(f"{key}: {error}")
    assert accepted == [] and len(tried) > (50 if name == "quickstart_cpu" else 15)


def test_other_stages_are_another_run(begun: Path):
    (begun / "fewer.yaml").write_text("extends: quickstart_cpu\nstages: {videos: {}, more: {}}\n")
    words = [word for word in small_of("quickstart_cpu", begun) if not word.startswith("stages.")]
    with pytest.raises(RecipeError, match="stages is "):
        fit(begun / "fewer.yaml", words, run=begun / "quickstart_cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_another_course_acts(begun: Path, usual: dict[str, Any], name: str, tmp_path: Path):
    """From the same checkpoint two more steps lead elsewhere."""
    own = {key for key, mark in marks(name, begun).items() if mark is COURSE and key in CHANGED}
    if name == "tae_8x8x8":  # of an autoencoder's own
        own = {"reconstruction.discriminator_lr", "train.lr", "train.ema", "data.batch.image", "data.mix.video"}
    else:
        own -= {"reconstruction.discriminator_lr"}
    idle = []
    for key in sorted(own):
        changed = [f"stages.{LAST[name]}.{word}" for word in overrides_of(key, begun, name)]
        found = state_after(begun, name, changed, tmp_path / key)
        if all(torch.equal(value, found[one]) for one, value in usual[name].items()):
            idle.append(key)
        shutil.rmtree(tmp_path / key)
    assert idle == []


@pytest.mark.filterwarnings("ignore:You passed `deterministic")
@pytest.mark.parametrize("name", SMALL)
def test_free_settings_change_no_bit(begun: Path, usual: dict[str, Any], name: str, tmp_path: Path):
    """All of them at once."""
    free = [key for key, mark in marks(name, begun).items() if mark is FREE and key not in ROUNDING]
    if torch.cuda.is_available():
        free.remove("trainer.accelerator")  # which would train elsewhere
    if name == "tae_8x8x8":
        free = [key for key in free if not key.startswith(("score.", "model.", "train.evaluate_every"))]
    changed = [word for key in free for word in overrides_of(key, begun, name)]
    try:
        found = state_after(begun, name, changed, tmp_path / "run")
    finally:  # the Trainer sets them for the whole process
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
    assert [key for key, value in usual[name].items() if not torch.equal(value, found[key])] == []


@pytest.mark.parametrize("key", ROUNDING)
def test_kernel_strategy_and_graphs_change_only_rounding(begun: Path, usual: dict[str, Any], key: str, tmp_path: Path):
    found = state_after(begun, "quickstart_cpu", overrides_of(key, begun), tmp_path / "run")
    for one, value in usual["quickstart_cpu"].items():
        assert_close(one, value, found[one], LIMIT)
