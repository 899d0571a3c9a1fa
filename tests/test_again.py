"""A clip says how it was made, and is made again; clips during training, of the command and of Python are the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import lingen
from lingen.cli import main
from lingen.media import save_video
from lingen.run import fit
from lingen.sampling.notes import read_notes
from lingen.weights import export_weights, find_weights, hash_tensors, read_metadata, read_weights, write_tensors
from tests.helpers.media import read_about
from tests.helpers.tiny import write_recipe

PROMPT = "a red square"


def frames(path: Path) -> np.ndarray:
    from lingen.media import read_video

    return read_video(path.read_bytes())[0]


@pytest.fixture(scope="module")
def clip(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second of two clips, of which every setting was given."""
    out = tmp_path_factory.mktemp("made") / "x.mp4"
    words = ["--seed", "5", "--steps", "3", "--guidance", "1.5", "--seconds", "0.75", "--size", "12x8", "--repeat", "2"]
    assert main(["sample", "--run", str(tiny_run), "--prompt", PROMPT, *words, "--out", str(out)]) == 0
    return out.with_name("x-01.mp4")


def test_a_clip_is_made_again_bit_for_bit(clip: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sample", "--again", str(clip)]) == 0
    told = capsys.readouterr()
    again = clip.with_name("x-01-again.mp4")
    assert told.out.split()[0] == str(again) and "differs" not in told.err
    assert frames(again).shape == (6, 12, 8, 3) and np.array_equal(frames(again), frames(clip))
    assert not np.array_equal(frames(again), frames(clip.with_name("x-00.mp4")))
    assert read_about(again) == read_about(clip)
    assert read_about(again)[1]["repetition"] == 1


def test_a_rewritten_prompt_is_made_again(tiny_run: Path, tmp_path: Path):
    from lingen.sampling.files import sample_again, sample_to_files

    (file,) = sample_to_files(tiny_run, ["x"], tmp_path / "x.mp4", rewritten=[PROMPT])
    assert read_notes(file).take.words == PROMPT
    again = sample_again(file, tmp_path / "y.mp4")
    assert read_about(again) == read_about(file) and np.array_equal(frames(again), frames(file))


def test_the_weights_may_lie_elsewhere_but_must_be_the_same(
    clip: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    notes = read_about(clip)[1]
    moved = save_video(frames(clip), tmp_path / "moved.mp4", 8, about={**notes, "weights": "/nowhere/weights"})
    exact, rounded = (export_weights(tiny_run, tmp_path / f"{form}.safetensors", form) for form in ("fp32", "bf16"))
    assert main(["sample", "--again", str(moved)]) == 2
    assert "no longer at /nowhere/weights. Say where they are: --run DIR or" in capsys.readouterr().err
    for place in (["--run", str(tiny_run)], ["--checkpoint", str(exact)]):
        assert main(["sample", "--again", str(moved), *place, "--out", str(tmp_path / "y.mp4")]) == 0
        assert np.array_equal(frames(tmp_path / "y.mp4"), frames(clip))
    capsys.readouterr()
    assert main(["sample", "--again", str(moved), "--checkpoint", str(rounded)]) == 2
    said = capsys.readouterr().err
    assert f"{rounded} holds other weights (" in said and f"({notes['weights_sha256'][:12]}: stage clips" in said
    assert "Give --checkpoint F" in said and len(said.splitlines()) == 1


def test_the_hash_is_of_names_and_numbers(tiny_run: Path, tmp_path: Path):
    weights = read_weights(find_weights(tiny_run), "averaged")
    assert hash_tensors(weights) == hash_tensors(dict(reversed(weights.items())))
    name, value = next(iter(weights.items()))
    touched = value.clone()
    touched.view(-1)[-1] += 1e-6
    for other in ({**weights, name: touched}, {**weights, name: value.half()}, {**weights, name: value[None]}):
        assert hash_tensors(other) != hash_tensors(weights)


def test_a_stage_of_a_run_is_found_by_its_name(tiny_run: Path, tmp_path: Path):
    """The run went on to a later stage since."""
    from lingen.sampling.files import sample_again, sample_to_files

    (file,) = sample_to_files(tiny_run / "stages" / "images" / "weights.safetensors", [PROMPT], tmp_path / "x.mp4")
    moved = tmp_path / "run"
    shutil.copytree(tiny_run, moved)
    again = sample_again(file, tmp_path / "y.mp4", moved)
    assert np.array_equal(frames(again), frames(file))


def test_what_differs_is_said(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    notes = read_about(clip)[1]
    old = {**notes, "threads": 7, "versions": {**notes["versions"], "torch": "1.0"}}
    made = save_video(frames(clip), tmp_path / "old.mp4", 8, about=old)
    assert main(["sample", "--again", str(made), "--out", str(tmp_path / "y.mp4")]) == 0
    said = capsys.readouterr().err
    assert "threads was 7, is 1" in said and "torch was 1.0, is " in said and said.count("differs") == 2


def test_other_frozen_parts_are_refused(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    notes = read_about(clip)[1]
    other = {**notes, "frozen": {**notes["frozen"], "autoencoder": {"name": "pixels", "path": "0123"}}}
    made = save_video(frames(clip), tmp_path / "other.mp4", 8, about=other)
    assert main(["sample", "--again", str(made)]) == 2
    assert 'other frozen parts: autoencoder.path is "0123" there and null here' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["FOREIGN"], "foreign.mp4 does not say how it was made: its comment holds no notes of `lingen sample`."),
        (["TEXT"], "text.mp4 cannot be read as an MP4"),
        (["nowhere.mp4"], "nowhere.mp4 cannot be read as an MP4"),
        (["DAMAGED"], "The notes in"),
        (["CLIP", "--seed", "3", "--prompt", "x"], "leave out --prompt, --seed."),
        (["CLIP", "--run", "a", "--checkpoint", "b"], "either --run DIR or --checkpoint F, or neither"),
        (["CLIP", "--out", "x.gif"], "does not end with .mp4"),
    ],
)
def test_mistakes(clip: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    foreign = save_video(frames(clip), tmp_path / "foreign.mp4", 8, about={"prompt": PROMPT, "seed": 3})
    damaged = save_video(frames(clip), tmp_path / "damaged.mp4", 8, about={"format": "lingen-clip-1", "size": 3})
    (tmp_path / "text.mp4").write_text("no film")
    places = {"FOREIGN": foreign, "DAMAGED": damaged, "TEXT": tmp_path / "text.mp4", "CLIP": clip}
    assert main(["sample", "--again", *(str(places.get(word, word)) for word in words)]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("key", ["prompt", "repetition", "steps", "tile", "size", "frames", "versions", "weights"])
def test_damaged_notes_are_said(clip: Path, tmp_path: Path, key: str):
    notes = read_about(clip)[1]
    for broken in ({**notes, key: {"x": [None]}}, {name: value for name, value in notes.items() if name != key}):
        made = save_video(frames(clip), tmp_path / "broken.mp4", 8, about=broken)
        if broken.get(key) is None and key in ("steps", "tile"):
            assert read_notes(made).clip.frames == 6  # it has a default
        else:
            with pytest.raises(lingen.RecipeError, match="The notes in .* are damaged"):
                read_notes(made)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the recipe trains on the CPU, and the command takes the GPU")
def test_training_command_and_python_make_the_same_clip(tiny_shards: Path, tmp_path: Path):
    """With averaged weights that differ from the raw ones, for a prompt that comes twice."""
    prompts = [PROMPT, "a blue circle moves left", PROMPT]
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_shards)
    run = fit(recipe, [f"sample.prompts={json.dumps(prompts)}", "train.sample_every=4"], run=tmp_path / "run")
    weights = find_weights(run)
    raw, averaged = (read_weights(weights, copy) for copy in ("raw", "averaged"))
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)
    told = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert main(["sample", "--run", str(run), *told, "--out", str(tmp_path / "x.mp4")]) == 0
    shown = list(lingen.generate(lingen.load_model(run), prompts))
    for number, clip in enumerate(shown):
        during, sampled = run / "samples" / "clips-0000006" / f"{number:02d}.mp4", tmp_path / f"x-{number:02d}.mp4"
        python = save_video(clip, tmp_path / "python.mp4", 8)
        assert np.array_equal(frames(during), frames(sampled)) and np.array_equal(frames(during), frames(python))
        assert read_about(during) == read_about(sampled)
    assert main(["sample", "--again", str(during), "--out", str(tmp_path / "again.mp4")]) == 0
    assert np.array_equal(frames(tmp_path / "again.mp4"), frames(during))
    # Of step 4 the weights are not kept, and that is noticed.
    with pytest.raises(lingen.RecipeError, match="holds other weights"):
        from lingen.sampling.files import sample_again

        sample_again(run / "samples" / "clips-0000004" / "00.mp4", tmp_path / "z.mp4")


def test_load_model_reads_runs_exports_and_weights(tiny_run: Path, tmp_path: Path):
    weights = find_weights(tiny_run)
    averaged = read_weights(weights, "averaged")
    export = export_weights(tiny_run, tmp_path / "e.safetensors", "fp32")
    for source in (tiny_run, weights, export, str(export)):
        module = lingen.load_model(source)
        assert isinstance(module, lingen.LinGenModule) and not module.training and module.device.type == "cpu"
        state = module.trained_state()
        assert state.keys() == averaged.keys() and all(torch.equal(state[name], averaged[name]) for name in state)
    half = lingen.load_model(export_weights(tiny_run, tmp_path / "h.safetensors"), dtype=torch.bfloat16)
    assert half.model.patchify.weight.dtype == torch.bfloat16 and half.model.time.out.weight.dtype == torch.float32
    assert next(lingen.generate(half, PROMPT)).shape == (4, 8, 8, 3)


def test_load_model_says_what_it_cannot_load(tiny_run: Path, tmp_path: Path):
    with pytest.raises(lingen.RecipeError, match="there is no run folder or weights file"):
        lingen.load_model(tmp_path / "nowhere")
    with pytest.raises(lingen.RecipeError, match="it is no run folder: it has no run.json"):
        lingen.load_model(tmp_path)
    with pytest.raises(ValueError, match="torch.float32 or torch.bfloat16, got torch.float16"):
        lingen.load_model(tiny_run, dtype=torch.float16)
    metadata = read_metadata(find_weights(tiny_run))
    raw = {f"raw.{name}": value for name, value in read_weights(find_weights(tiny_run), "raw").items()}
    write_tensors(tmp_path / "raw.safetensors", raw, metadata)
    with pytest.raises(lingen.RecipeError, match="do not fit this recipe's model.*missing"):
        lingen.load_model(tmp_path / "raw.safetensors")
