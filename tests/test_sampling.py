"""From weights to clips and files: generate, sample, decode."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

import lingen
from lingen import output
from lingen.cli import main
from lingen.run import fit
from lingen.sampling import sample_latents
from lingen.video import contact_sheet, read_about, save_video
from lingen.weights import find_weights, load_module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    from conftest import TINY

    folder = tmp_path_factory.mktemp("sampling")
    (folder / "tiny.yaml").write_text(TINY.format(folder=tiny_shards))
    return fit(folder / "tiny.yaml", run=folder / "run").folder.path


def test_a_clip_for_each_prompt(run: Path):
    clips = list(lingen.generate(run, ["a red square", "a blue circle moves up"], seed=1))
    assert [clip.shape for clip in clips] == [(4, 8, 8, 3)] * 2
    assert all(clip.dtype == np.uint8 for clip in clips)
    assert next(lingen.generate(run, "a red square", seed=1)).tolist() == clips[0].tolist()


def test_the_seed_decides_and_weights_file_and_folder_agree(run: Path):
    one, again, other = (next(lingen.generate(run, "a red square", seed=s)) for s in (3, 3, 4))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert np.array_equal(one, next(lingen.generate(find_weights(run), "a red square", seed=3)))


def test_a_batch_changes_nothing(run: Path):
    from lingen.sampling import clip_size

    module = load_module(run)
    size, settings = clip_size(module), module.recipe.sample
    both = sample_latents(module, ["a red square", "a blue circle"], size, settings)
    second = sample_latents(module, ["a blue circle"], size, settings, first=1)
    assert np.allclose(both[1], second[0], atol=1e-5)


def test_length_size_steps_and_guidance(run: Path, monkeypatch: pytest.MonkeyPatch):
    assert next(lingen.generate(run, "a red square", seconds=1.5)).shape == (12, 8, 8, 3)  # trained on 0.5 s
    assert next(lingen.generate(run, "a red square", size=(16, 12))).shape == (4, 16, 12, 3)
    assert next(lingen.generate(run, "a red square", seconds=1 / 8)).shape == (1, 8, 8, 3)
    module = load_module(run)
    calls: list[int] = []
    forward = module.model.forward
    monkeypatch.setattr(
        module.model, "forward", lambda latents, *rest: calls.append(len(latents)) or forward(latents, *rest)
    )
    next(lingen.generate(module, "a red square", steps=3, guidance=1.0))
    assert calls == [1, 1, 1]
    calls.clear()
    next(lingen.generate(module, "a red square", steps=2, guidance=3.0))
    assert calls == [2, 2]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"size": (10, 8)}, "multiple of 4.*Closest: 8x8"),
        ({"seconds": 0.01}, "less than one frame"),
        ({"steps": 0}, "at least 1 step"),
    ],
)
def test_what_a_model_cannot_make(run: Path, asked: dict, words: str):
    with pytest.raises(ValueError, match=words):
        next(lingen.generate(run, "a red square", **asked))


def test_sample_writes_what_a_browser_plays(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "x.mp4"
    assert main(["sample", "--run", str(run), "--prompt", "a réd square", "--seed", "7", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with av.open(str(out)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)
        assert len(list(file.decode(stream))) == 4
    data = out.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    title, about = read_about(out)
    assert title == about["prompt"] == "a réd square"
    assert about["seed"] == 7 and about["steps"] == 2 and len(about["recipe_sha256"]) == 12
    assert out.with_suffix(".png").is_file() and out.with_suffix(".latents.safetensors").is_file()


def test_decode_gives_the_same_clip(run: Path, tmp_path: Path):
    out, again = tmp_path / "x.mp4", tmp_path / "again.mp4"
    assert main(["sample", "--run", str(run), "--prompt", "a red square", "--out", str(out)]) == 0
    assert main(["decode", str(out.with_suffix(".latents.safetensors")), "--out", str(again)]) == 0
    assert frames(out) == frames(again)
    assert read_about(out) == read_about(again)


def frames(path: Path) -> list[list[int]]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24").tolist() for frame in file.decode(video=0)]


def test_latents_are_there_when_decoding_fails(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> Path:
        raise MemoryError

    monkeypatch.setattr(output, "decode_file", fails)
    with pytest.raises(MemoryError):
        list(output.sample_to_files(run, ["a red square"], tmp_path / "x.mp4"))
    monkeypatch.undo()
    assert output.decode_file(tmp_path / "x.latents.safetensors", tmp_path / "x.mp4").stat().st_size > 500


def test_a_file_of_prompts_is_numbered(run: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a red square\n\na blue circle\n")
    words = ["sample", "--checkpoint", str(find_weights(run)), "--prompts", str(tmp_path / "prompts.txt")]
    assert main([*words, "--out", str(tmp_path / "x.mp4")]) == 0
    assert [read_about(tmp_path / f"x-0{n}.mp4")[0] for n in (0, 1)] == ["a red square", "a blue circle"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "x"], "either --run DIR or --checkpoint F"),
        (["--run", "RUN", "--checkpoint", "RUN", "--prompt", "x"], "either --run DIR or --checkpoint F"),
        (["--run", "RUN"], "There is no prompt"),
        (["--run", "nowhere", "--prompt", "x"], "no run folder or weights file at nowhere"),
        (["--run", "EMPTY", "--prompt", "x"], "has no run.json"),
        (["--checkpoint", "OTHER", "--prompt", "x"], "cannot be read as safetensors"),
        (["--run", "RUN", "--prompt", "x", "--size", "big"], "height x width"),
        (["--run", "RUN", "--prompt", "x", "--size", "9x8"], "multiple of 4"),
        (["--run", "RUN", "--prompts", "nowhere.txt"], "cannot be read"),
    ],
)
def test_mistakes(run: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").write_text("not weights")
    places = {"RUN": str(run), "EMPTY": str(tmp_path / "empty"), "OTHER": str(tmp_path / "other")}
    assert main(["sample", *(places.get(word, word) for word in words), "--out", str(tmp_path / "x.mp4")]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


def test_an_unfinished_run_is_said_to_be_one(tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = fit(tiny_recipe, run=tmp_path / "run", stage="images").folder
    run.weights("images").unlink()
    assert main(["sample", "--run", str(run.path), "--prompt", "x"]) == 2
    assert "No stage" in capsys.readouterr().err


def test_save_video_pads_streams_and_refuses(tmp_path: Path):
    rng = np.random.default_rng(0)
    path = save_video((rng.integers(0, 255, (7, 9, 3), np.uint8) for _ in range(3)), tmp_path / "odd.mp4", 12.5)
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert (stream.height, stream.width, float(stream.average_rate)) == (8, 10, 12.5)
    with pytest.raises(ValueError, match="no frames"):
        save_video(np.zeros((0, 8, 8, 3), np.uint8), tmp_path / "none.mp4", 8)
    with pytest.raises(ValueError, match="uint8"):
        save_video(np.zeros((1, 8, 8, 3)), tmp_path / "float.mp4", 8)
    assert not (tmp_path / "none.mp4").exists() and not (tmp_path / "float.mp4").exists()
    title = "ein rötes Quadrat « 赤 »"
    save_video(np.zeros((1, 8, 8, 3), np.uint8), path, 8, title=title, about={"prompt": title})
    assert read_about(path) == (title, {"prompt": title})


def test_contact_sheet_is_large_enough_to_see(tmp_path: Path):
    from PIL import Image

    sheet = contact_sheet([np.zeros((16, 8, 8, 3), np.uint8)] * 2, tmp_path / "sheet.png", ["one", "two"])
    with Image.open(sheet) as image:
        assert image.width >= 8 * 96 and image.height >= 2 * 96


def test_weights_of_another_model_are_refused(run: Path, tiny_recipe: Path):
    from lingen.module import LinGenModule
    from lingen.weights import load_into, read_weights

    other = LinGenModule(lingen.load_recipe(tiny_recipe, ["model.dim=24"], stage="clips"))
    with pytest.raises(lingen.RecipeError, match="do not fit this recipe's model.*of another shape"):
        load_into(other, read_weights(find_weights(run), "raw"), run)
    about = json.loads((run / "run.json").read_text())
    assert about["stages"] == ["images", "clips"]
