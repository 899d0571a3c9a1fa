"""`lingen encode`: what comes out is what the frozen parts would have made at each step, and says what made it."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lingen.cli import main
from lingen.data import manifest
from lingen.data.batch import Batch
from lingen.data.datamodule import ClipData
from lingen.data.fingerprint import (
    check_encoded,
    frozen_differences,
    frozen_settings,
    hash_settings,
    hash_weights,
)
from lingen.data.latents import LatentRequirements as EncodedSample
from lingen.data.latents import read_encoded
from lingen.data.manifest import About
from lingen.data.shards import read_shard, write_shards
from lingen.data.sources import Reader
from lingen.doctor import examine
from lingen.frozen import Missing
from lingen.prepare.captions import Captions
from lingen.prepare.check import check_folders
from lingen.prepare.cut import ClipRequirements
from lingen.prepare.encode import Encoders, Encoding, _load, encode_shards, tasks_of
from lingen.prepare.filters import Filters
from lingen.prepare.index import index_folder
from lingen.prepare.journal import Part
from lingen.prepare.pack import Packing, look_for_footage, pack
from lingen.recipe import load_stages
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import Recipe
from lingen.text import with_frame_rate
from lingen.training.denoiser import LinGenModule
from lingen.training.inputs import missing_parts
from tests.helpers import frozen
from tests.helpers.files import contents, killed_before
from tests.helpers.footage import film

RECIPE = """
model: {{dim: 16, depth: 1, mixer: attention, patch: [1, 2, 2], gate_init: 1.0}}
autoencoder: {{name: "tests.helpers.frozen:Pooling"}}
text: [{{name: "tests.helpers.frozen:Letters", path: "{folder}/letters.f32"}}, {{name: words, dim: 8, buckets: 64}}]
data:
  shards: {{image: "{folder}/raw/image-*.tar", video: "{folder}/raw/video-*.tar"}}
  mix: {{image: 1, video: 2}}
  batch: {{image: 2, video: 2}}
  size: [16, 16]
  fps: 8
  workers: 0
train: {{steps: 3, text_drop: 0.5}}
trainer: {{accelerator: cpu, devices: 1, logger: false}}
stages:
  short: {{data: {{frames: 4}}}}
  long: {{data: {{frames: 8}}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw shards: a clip of 24 frames, two of 8 and one of 4, two pictures; a recipe and a table of weights."""
    folder = tmp_path_factory.mktemp("encode")
    scenes = {"a": ("testsrc2", 3), "b": ("testsrc", 1), "c": ("mandelbrot", 1), "d": ("rgbtestsrc", 0.5)}
    for name, scene in scenes.items():
        film(folder / "films" / f"{name}.mp4", scene, fps=8, size=(32, 48))
    rows = [{"key": key, "captions": [f"{key} moves", f"this is {key}"][: 1 + (key == "a")]} for key in scenes]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = ClipRequirements((((16, 16),),), 8.0, (24, 8, 4))
    filters = Filters(black=None, frozen=None, still=None, jerky=None, duplicates=None)
    sources = look_for_footage([folder / "films"], [], wanted).sources
    pack(Packing(sources, Captions(folder / "captions.jsonl"), wanted, filters), folder / "raw")
    np.random.default_rng(0).standard_normal((256, 6)).astype(np.float32).tofile(folder / "letters.f32")
    (folder / "r.yaml").write_text(RECIPE.format(folder=folder))
    return folder


VIDEO = "data.mix.image=0"


@pytest.fixture(scope="module")
def stages(folder: Path) -> list[Recipe]:
    return load_stages(folder / "r.yaml", [VIDEO])


@pytest.fixture(scope="module")
def encoded(folder: Path, stages: list[Recipe]) -> Path:
    encode_shards(stages, folder / "encoded", Encoding(precision="float32"))
    return folder / "encoded"


def encoded_stages(folder: Path, *overrides: str) -> list[Recipe]:
    return load_stages(folder / "r.yaml", [VIDEO, f"data.shards.video={folder}/encoded/video-*.tar", *overrides])


def test_every_clip_that_fits_is_encoded_once(encoded: Path, stages: list[Recipe]) -> None:
    rows = list(manifest.rows(encoded / manifest.NAME))
    assert {row.kind for row in rows} == {"latents"} and {(row.height, row.width) for row in rows} == {(16, 16)}
    keys = sorted(row.key for row in rows)
    short = [f"a-0000-4x16x16-{i:02d}" for i in range(6)] + [f"{x}-0000-4x16x16-{i:02d}" for x in "bc" for i in (0, 1)]
    long = [f"a-0000-8x16x16-{i:02d}" for i in range(3)] + ["b-0000-8x16x16-00", "c-0000-8x16x16-00"]
    assert keys == sorted([*short, "d-0000-4x16x16-00", *long])
    assert [row.captions for row in rows if row.key.startswith("a-0000-8")] == [2, 2, 2]


def by_source(batches: list[Batch]) -> dict[str, tuple[torch.Tensor, str, Any]]:
    return {
        key.split(":")[1]: (batch.clips[i], batch.captions[i], {n: (t[i], m[i]) for n, (t, m) in batch.text.items()})
        for batch in batches
        for i, key in enumerate(batch.keys)
    }


def test_it_is_what_the_frozen_parts_make(folder: Path, encoded: Path, stages: list[Recipe]) -> None:
    recipe = encoded_stages(folder)[1]
    module = LinGenModule(recipe)
    found = by_source(list(islice(ClipData(recipe).batches(), 6)))
    assert len(found) == 5
    raw = ClipData(stages[1])
    raw.setup()
    for task in tasks_of(stages[1:], "video", Part()):
        latents, caption, text = found[task.key]
        clip = _load(Reader(stages[1].data.remote), task)
        expected = module.encode_clips(clip.pixels[None])[0]
        assert torch.equal(latents, expected) and latents.shape == (3, 4, 4, 4)
        assert caption in clip.captions
        tokens, mask = module.encode_text([caption], 8.0)[0]
        assert text.keys() == {0}  # words is trained along
        assert torch.equal(text[0][0][text[0][1]], tokens[0][mask[0]])


def test_windows_follow_one_another(folder: Path, encoded: Path) -> None:
    recipe = encoded_stages(folder)[1]
    found = by_source(list(islice(ClipData(recipe).batches(), 6)))
    first, second, third = (found[f"a-0000-8x16x16-{i:02d}"][0] for i in range(3))
    assert not torch.equal(first, second) and not torch.equal(second, third)
    halves = by_source(list(islice(ClipData(encoded_stages(folder)[0]).batches(), 12)))
    assert torch.equal(torch.cat([halves[f"a-0000-4x16x16-{i:02d}"][0] for i in (2, 3)], 1), second)


def test_losses_do_not_change(folder: Path, encoded: Path, stages: list[Recipe]) -> None:
    """Encoded or raw, with the text of half of the samples left out."""
    recipe = encoded_stages(folder)[1]
    module = LinGenModule(recipe)
    pixels = {
        task.key: _load(Reader(stages[1].data.remote), task).pixels for task in tasks_of(stages[1:], "video", Part())
    }
    for batch in islice(ClipData(recipe).batches(), 5):
        raw = batch._replace(clips=torch.stack([pixels[key.split(":")[1]] for key in batch.keys]), text={})
        losses = module.losses(batch, "long")[0]
        assert torch.isfinite(losses).all()
        torch.testing.assert_close(module.losses(raw, "long")[0], losses, rtol=1e-6, atol=1e-8)


def test_no_text_is_stored_with_every_sample(folder: Path, encoded: Path) -> None:
    """It is what the encoder makes of a caption that is left out; encoders that are trained along have none."""
    recipe = encoded_stages(folder)[1]
    tokens, mask = LinGenModule(recipe).encode_text([""], 8.0)[0]
    assert mask.sum() == len("FPS-8.")
    for batch in islice(ClipData(recipe).batches(), 3):
        assert batch.null.keys() == batch.text.keys() == {0}
        assert all(torch.equal(one[real], tokens[0][mask[0]]) for one, real in zip(*batch.null[0], strict=True))


def test_no_text_of_images_has_no_tokens(stages: list[Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    encoders, asked = Encoders(stages[0], "cpu", "float32"), []
    encode_texts: Any = encoders.text[0].encode
    monkeypatch.setattr(encoders.text[0], "encode", lambda texts: asked.append(texts) or encode_texts(texts))
    wanted = EncodedSample(3, (2, 4, 4), frozenset({0}))
    for fps, expected in ((0.0, ""), (8.0, "FPS-8."), (0.0, ""), (8.0, "FPS-8.")):
        members = encoders.members(torch.zeros(3, 1, 4, 4), ["one", "three"], fps, "here")
        found = read_encoded(members, (1, 16, 16), wanted)[2]
        texts = [with_frame_rate(caption, fps) for caption in ("one", "three")]
        assert [len(one) for one in (*found.captions[0], found.null[0])] == [*map(len, texts), len(expected)]
    assert [texts for texts in asked if len(texts) == 1] == [[""], ["FPS-8."]]  # asked once for each frame rate


def test_sets_of_before_load(
    folder: Path, encoded: Path, stages: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold no tokens of no text: the encoder is asked, as it was then, and the losses are the same."""
    members_now = Encoders.members

    def members_then(*args: Any) -> dict[str, bytes]:
        members = members_now(*args)
        about = json.loads(members["json"])
        assert about.pop("null") == {"0": len("FPS-8.")}
        stream = io.BytesIO()
        np.save(stream, np.load(io.BytesIO(members["text0.npy"]))[: sum(about["tokens"]["0"])])
        return {**members, "text0.npy": stream.getvalue(), "json": json.dumps(about).encode()}

    monkeypatch.setattr(Encoders, "members", members_then)
    encode_shards(stages, tmp_path, Encoding(precision="float32"))
    recipes = [encoded_stages(folder)[1], encoded_stages(folder, f"data.shards.video={tmp_path}/video-*.tar")[1]]
    module = LinGenModule(recipes[0])
    now, then = (list(islice(ClipData(recipe).batches(), 3)) for recipe in recipes)
    for one, other in zip(now, then, strict=True):
        assert one.null and other.null == {} and one.captions == other.captions
        assert torch.equal(module.losses(one, "long")[0], module.losses(other, "long")[0])


def test_half_precision(folder: Path, stages: list[Recipe], encoded: Path, tmp_path: Path) -> None:
    encode_shards(stages, tmp_path, Encoding())
    sizes = [sum(row.length for row in manifest.rows(out / manifest.NAME)) for out in (tmp_path, encoded)]
    assert sizes[0] < sizes[1]
    half = load_stages(folder / "r.yaml", [VIDEO, f"data.shards.video={tmp_path}/video-*.tar"])
    one, other = (by_source(list(islice(ClipData(s[1]).batches(), 6))) for s in (half, encoded_stages(folder)))
    assert one.keys() == other.keys()
    for key, (latents, _, _) in one.items():
        assert latents.dtype == torch.float16
        torch.testing.assert_close(latents.float(), other[key][0], rtol=1e-5, atol=1e-3)


def test_a_killed_run_goes_on(stages: list[Recipe], tmp_path: Path) -> None:
    how = Encoding(precision="float32", shard_mb=0)
    encode_shards(stages, tmp_path / "whole", how)
    with killed_before("video-00005.tar"):
        encode_shards(stages, tmp_path / "killed", how)
    done = []
    encode_shards(stages, tmp_path / "killed", how, lambda at, total: done.append((at, total)))
    assert done[-1] == (16, 16) and done[0][0] > 5
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_parts_and_workers_make_the_same_set(stages: list[Recipe], encoded: Path, tmp_path: Path) -> None:
    unused = {"name": "theatre", "seed": 9}  # where there are shards nothing is drawn
    others = [replace(stage, data=replace(stage.data, synthetic=unused)) for stage in stages]
    for number in (2, 1, 3):
        how = Encoding(precision="float32", part=Part(number, 3), workers=2 * (number == 2))
        encode_shards(others if number == 3 else stages, tmp_path, how)
    whole, parts = ({row.key: row.hash for row in manifest.rows(out / manifest.NAME)} for out in (encoded, tmp_path))
    assert parts == whole


@pytest.mark.parametrize("shards", ["{}", "{}/*.tar"])
def test_nothing_trains_on_a_set_of_which_parts_are_missing(
    shards: str, stages: list[Recipe], folder: Path, tmp_path: Path
) -> None:
    encode_shards(stages, tmp_path / "set", Encoding(precision="float32", part=Part(1, 2)))
    recipe = load_stages(folder / "r.yaml", [VIDEO, f"data.shards.video={shards.format(tmp_path / 'set')}"])[0]
    with pytest.raises(RecipeError, match=r"data.shards.video: .*not all parts of it have ended; start what makes it"):
        ClipData(recipe).setup()
    encode_shards(stages, tmp_path / "set", Encoding(precision="float32", part=Part(2, 2)))
    ClipData(recipe).setup()


@pytest.mark.parametrize(("override", "told"), [
    ("autoencoder.gain=2.0", "autoencoder.gain is 1.0 there and 2.0 here"),
    ("data.fps_prefix=false", "fps_prefix is true there and false here"),
    ("text.0.path={folder}/other.f32", 'text.0.path is "'),
    ("text.0.dim=12", "text.0.dim is 6 there and 12 here"),
])  # fmt: skip
def test_another_encoder_is_an_error_that_names_both(folder: Path, encoded: Path, override: str, told: str) -> None:
    (folder / "other.f32").write_bytes((folder / "letters.f32").read_bytes()[::-1])
    recipe = encoded_stages(folder, override.format(folder=folder))[0]
    with pytest.raises(RecipeError) as caught:
        ClipData(recipe).setup()
    message = str(caught.value)
    assert told in message and message.startswith("data.shards.video: these samples were encoded by something else (")
    assert "Encode them anew with `lingen encode --recipe`" in message


def test_the_same_weights_elsewhere_are_the_same(folder: Path, encoded: Path, tmp_path: Path) -> None:
    (tmp_path / "moved.f32").write_bytes((folder / "letters.f32").read_bytes())
    recipe = encoded_stages(folder, f"text.0.path={tmp_path}/moved.f32")[0]
    ClipData(recipe).setup()
    assert frozen_settings(recipe)["text"][1] is None
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "a").write_bytes(bytes(1 << 20))
    before = hash_weights(weights)
    (weights / "a").write_bytes(bytes((1 << 20) - 1) + b"\1")
    assert hash_weights(weights) != before


def test_only_what_is_declared_a_path_is_taken_for_weights(
    stages: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies in the current folder; and a path that begins with ~ is followed, as diffusers' loader does."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("wan/vae", "vae", "fp32", "AutoencoderKLWan"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").write_text(name)
    given = {"name": "diffusers", "class_name": "AutoencoderKLWan", "path": "~/wan", "subfolder": "vae"}
    recipe = replace(stages[0], autoencoder={**given, "precision": "fp32"})
    told = frozen_settings(recipe)["autoencoder"]
    assert told == {**given, "precision": "fp32", "path": hash_weights(tmp_path / "wan")}
    before = frozen_settings(recipe) | {"autoencoder": {**told, "path": None}}  # of versions that did not follow it
    assert frozen_differences(before, frozen_settings(recipe)) == []
    check_encoded([About(hash_settings(before), before)], recipe, "data.shards.video")
    (tmp_path / "wan/vae/weights").write_text("other")
    with pytest.raises(RecipeError, match=r"autoencoder\.path is"):
        check_encoded([About("", {**before, "autoencoder": told})], recipe, "data.shards.video")


def test_weights_that_come_with_lingen_count_too(stages: list[Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(stages[0], autoencoder={"name": "tae_small", "chunk": 4})
    before = frozen_settings(recipe)["autoencoder"]
    assert set(before) == {"name", "weights"}
    monkeypatch.setattr("lingen.data.fingerprint.hash_weights", lambda path: f"another {path.name}")
    assert frozen_settings(recipe)["autoencoder"] != before


def test_training_needs_no_weights_of_text_encoders(
    folder: Path, encoded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the weights are not, they are not compared and not read; all else is compared as ever."""
    recipe = encoded_stages(folder, "text.0.path=nowhere/letters.f32")[1]
    wider = encoded_stages(folder, "text.0.path=nowhere/letters.f32", "text.0.dim=12")[0]
    module = LinGenModule(recipe)
    monkeypatch.setattr(frozen.Letters, "encode", lambda self, texts: pytest.fail("the encoder was asked"))
    for batch in islice(ClipData(recipe).batches(), 3):
        assert torch.isfinite(module.losses(batch, "long")[0]).all()
    with pytest.raises(RecipeError, match=r"something else .*: text.0.dim is 6 there and 12 here\. Encode"):
        ClipData(wider).setup()


def test_fit_needs_the_frozen_parts_for_clips_alone(
    folder: Path, encoded: Path, stages: list[Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = [Missing("letters", "nowhere", "Bring them.")]
    monkeypatch.setattr(frozen.Letters, "missing", lambda self: lacking, raising=False)
    assert missing_parts(stages[0]) == lacking
    assert missing_parts(encoded_stages(folder, "sample.prompts=[]")[0]) == []
    (one,) = missing_parts(encoded_stages(folder, "sample.prompts=[x]")[0])
    assert one.cure.startswith("Bring them (needed for clips alone")
    assert examine(encoded_stages(folder, "sample.prompts=[]")).missing == []
    assert len(examine(encoded_stages(folder, "sample.prompts=[x]")).missing) == 1


def test_an_autoencoder_is_not_trained_on_latents(folder: Path, encoded: Path) -> None:
    recipe = replace(encoded_stages(folder)[0], trains="autoencoder")
    with pytest.raises(RecipeError, match="data.shards.video: an autoencoder is trained on pixels"):
        ClipData(recipe).setup()


def test_shards_that_say_nothing_of_their_encoder(folder: Path, encoded: Path, tmp_path: Path) -> None:
    rows = list(manifest.rows(encoded / manifest.NAME))
    for path in encoded.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest.write(tmp_path / manifest.NAME, rows, manifest.About())
    recipe = load_stages(folder / "r.yaml", [VIDEO, f"data.shards.video={tmp_path}/video-*.tar"])[0]
    with pytest.raises(RecipeError, match="does not say what encoded these samples"):
        ClipData(recipe).setup()


def test_what_cannot_be_encoded_is_counted_by_key(folder: Path, tmp_path: Path) -> None:
    bright = load_stages(folder / "r.yaml", [VIDEO, "autoencoder.nan_above=0.0"])
    report = encode_shards(bright, tmp_path / "nan", Encoding())
    assert 0 < report.left_out["latents not finite"] < 16 == report.looked_at
    assert sum(report.made.values()) + report.left_out["latents not finite"] == 16
    assert ": latents not finite: as float16 they hold NaN" in report.named["latents not finite"][0]
    large = load_stages(folder / "r.yaml", [VIDEO, "autoencoder.gain=1e6"])
    assert not encode_shards(large, tmp_path / "large", Encoding()).made


def test_all_that_is_missing_is_named_before_it_begins(
    stages: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in (frozen.Pooling, frozen.Letters):
        lacks = [Missing(part.__name__, "-", "Get it.")]
        monkeypatch.setattr(part, "missing", lambda self, lacks=lacks: lacks, raising=False)
    with pytest.raises(RecipeError, match=r"missing: Pooling -: Get it.\n.*missing: Letters -: Get it."):
        encode_shards(stages, tmp_path / "out", Encoding())
    assert not (tmp_path / "out").exists()


def test_stages_must_agree(folder: Path, tmp_path: Path) -> None:
    other = load_stages(folder / "r.yaml", [VIDEO, "stages.long.data.fps_prefix=false"])
    with pytest.raises(RecipeError, match="Stages 'short' and 'long' encode in different ways: fps_prefix"):
        encode_shards(other, tmp_path, Encoding())


def sets_of_one_name(folder: Path, tmp_path: Path) -> Path:
    """A recipe with a stage on each of two folders whose shards, and the samples in them, have the same names."""
    for name, cut in (("A", slice(0, 2)), ("B", slice(1, 3))):
        samples = [one for path in sorted((folder / "raw").glob("video-*.tar")) for one in read_shard(path)][cut]
        named = [{**one, "__key__": f"{number:04d}"} for number, one in enumerate(samples)]
        write_shards(named, str(tmp_path / name / "video-%05d.tar"))
        index_folder(tmp_path / name, 0)
    text = RECIPE.partition("stages:")[0].format(folder=folder)
    shards = [f"{{data: {{frames: 4, shards: {{video: {tmp_path / name}}}}}}}" for name in "AB"]
    (tmp_path / "r.yaml").write_text(f"{text}stages:\n  one: {shards[0]}\n  two: {shards[1]}\n")
    return tmp_path / "r.yaml"


def test_samples_of_one_name_in_several_places_are_all_encoded(folder: Path, tmp_path: Path) -> None:
    stages = load_stages(sets_of_one_name(folder, tmp_path), [VIDEO])
    tasks = tasks_of(stages, "video", Part())
    assert {(task.where, task.window) for task in tasks} == {
        (f"{name}/video-00000.tar:000{i}", window)
        for name, i, windows in (("A", 0, 6), ("A", 1, 2), ("B", 0, 2), ("B", 1, 2))
        for window in range(windows)
    }
    assert [task.key for task in tasks][:8] == [f"0000-4x16x16-{i:02d}" for i in range(6)] + [
        "0001-4x16x16-00",
        "0001-4x16x16-01",
    ]
    for _ in range(2):  # the same call again finds all of them done
        report = encode_shards(stages, tmp_path / "out", Encoding())
        assert report.made == {"latents": 12}
        checked = check_folders([tmp_path / "out"], "full")
        assert checked.samples == 12 and not checked.faults


def test_a_clip_lies_in_one_part_alone(folder: Path) -> None:
    """Also where the second stage has buckets that the first one has not."""
    stages = load_stages(folder / "r.yaml", [VIDEO, "stages.short.data.frames=8", "stages.long.data.lengths=[16]"])
    whole = [task.key for task in tasks_of(stages, "video", Part())]
    parts = [task.key for number in (1, 2) for task in tasks_of(stages, "video", Part(number, 2))]
    assert sorted(parts) == sorted(whole) and len(set(whole)) == len(whole)


@pytest.mark.slow
def test_the_command_and_fit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = str(folder / "r.yaml"), str(tmp_path / "encoded")
    assert main(["encode", "--recipe", recipe, VIDEO, "--out", out, "--device", "cpu"]) == 0
    assert (
        "16 samples from 16 clips: of each sample all that fit, for each shape that a stage takes"
        in capsys.readouterr().out
    )
    words = ["fit", "--recipe", recipe, VIDEO, f"data.shards.video={out}/video-*.tar", "--run", str(tmp_path / "run")]
    assert main([*words, "sample.prompts=[]"]) == 0
    assert (tmp_path / "run" / "stages" / "long" / "weights.safetensors").is_file()
    capsys.readouterr()
    assert main([*words[:-1], str(tmp_path / "other"), "autoencoder.gain=2.0"]) == 2
    assert "autoencoder.gain is 1.0 there and 2.0 here" in capsys.readouterr().err
    assert main(["encode", "--recipe", recipe, VIDEO, "--out", out, "--device", "cuda:99"]) == 2


def test_the_five_lines_of_three_sets(folder: Path, tmp_path: Path) -> None:
    """docs/how-to/own-footage.md, with a small recipe in the place of t2v_68s."""
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "own-footage.md").read_text()
    lines = page.partition("<!-- runs: three sets -->")[2].split("```")[1].splitlines()[1:]
    quality = "  quality: {data: {frames: 8, batch: {video: 1}, shards: {image: null}, mix: {image: 0, video: 1}}}\n"
    (tmp_path / "r.yaml").write_text(RECIPE.format(folder=folder) + quality)
    for name, films in (("films", "ab"), ("chosen", "c")):
        (tmp_path / name).mkdir()
        for film_name in films:
            shutil.copy(folder / "films" / f"{film_name}.mp4", tmp_path / name)
            (tmp_path / name / f"{film_name}.txt").write_text(f"{film_name} moves")
    (tmp_path / "pictures").mkdir()
    for value in (120, 160, 200):
        pixels = np.random.default_rng(value).integers(0, value, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{value}.png")
        (tmp_path / "pictures" / f"{value}.txt").write_text("noise")
    more = {"pack": ["--still", "off", "--frozen", "off", "--jerky", "off"], "encode": ["--device", "cpu"]}
    with contextlib.chdir(tmp_path):
        for line in lines:
            _, *words = shlex.split(line.replace("--recipe t2v_68s", "--recipe r.yaml"))
            extra = next((more[word] for word in words if word in more), ["--run", "run", "sample.prompts=[]"])
            assert main([*words, *extra]) == 0, line
        rows = list(manifest.rows(Path("encoded/main") / manifest.NAME))
        assert len(rows) == len({row.key for row in rows}) and {row.frames for row in rows} == {1, 4, 8}
        assert {row.frames for row in manifest.rows(Path("encoded/quality") / manifest.NAME)} == {8}
        assert Path("run/stages/quality/weights.safetensors").is_file()
