"""From weights to clips and files: generate, sample, decode."""

from __future__ import annotations

import inspect
import json
import os
import re
import stat
import weakref
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lingen
from lingen import flow
from lingen.cli import main
from lingen.data.synthetic import COLOURS, MOTIONS, SHAPES, captions
from lingen.media import contact_sheet, save_video
from lingen.recipe.errors import RecipeError
from lingen.run import fit
from lingen.run_folder.folder import RunFolder
from lingen.sampling import clips as sampling
from lingen.sampling import files as output
from lingen.sampling.asked import untrained
from lingen.sampling.clips import (
    Take,
    clip_size,
    decode_frames,
    encode_prompts,
    sample_latents,
    sample_takes,
    takes_of,
)
from lingen.training.denoiser import LinGenModule
from lingen.training.weights import load_denoiser
from lingen.weights import find_weights
from tests.helpers.commands import ROOT, run_python
from tests.helpers.media import read_about
from tests.helpers.ranks import run_ranks
from tests.yardsticks.times import joined


@pytest.fixture
def run(tiny_run: Path) -> Path:
    return tiny_run


def test_a_clip_for_each_prompt(run: Path):
    clips = list(lingen.generate(run, ["a red square", "a blue circle moves up"], seed=1))
    assert [clip.shape for clip in clips] == [(4, 8, 8, 3)] * 2
    assert all(clip.dtype == np.uint8 for clip in clips)
    assert next(lingen.generate(run, "a red square", seed=1)).tolist() == clips[0].tolist()


def test_the_seed_decides_and_weights_file_and_folder_agree(run: Path):
    one, again, other = (next(lingen.generate(run, "a red square", seed=s)) for s in (3, 3, 4))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert np.array_equal(one, next(lingen.generate(find_weights(run), "a red square", seed=3)))


PROMPTS = ["a red square", "a blue circle moves up", "a red square", "x"]
"""Of several lengths; one comes twice."""


def solved(module: LinGenModule, takes: Sequence[Take]) -> torch.Tensor:
    """Latents of the takes in one batch."""
    clip = clip_size(module)
    texts = joined(encode_prompts(module, [take.words for take in takes], clip))
    return sample_latents(module, takes, texts, clip, module.recipe.sample)


def test_latents_are_the_same_alone_in_a_list_and_in_a_batch(run: Path):
    module, takes = load_denoiser(run), takes_of(PROMPTS)
    alone = [solved(module, [take])[0] for take in takes]
    backwards = takes[::-1]
    listed = list(sample_takes(module, backwards, clip_size(module), module.recipe.sample))
    assert all(torch.equal(a, b) for a, b in zip(alone, listed[::-1], strict=True))
    batch, mirrored = solved(module, takes), solved(module, backwards)
    torch.testing.assert_close(batch, torch.stack(alone), rtol=1e-5, atol=1e-5)
    assert torch.equal(batch, mirrored.flip(0))
    assert not torch.equal(alone[0], alone[2])  # the second time that a prompt is asked for


def test_noise_is_a_function_of_seed_words_and_repetition(run: Path, monkeypatch: pytest.MonkeyPatch):
    module, takes, found = load_denoiser(run), takes_of(PROMPTS), []
    monkeypatch.setattr(flow, "solve", lambda velocity, noise, *rest: found.append(noise) or noise)
    for some in (takes, takes[1:3], takes[2:3]):
        solved(module, some)
    torch.manual_seed(5)
    assert torch.equal(found[0][1:3], found[1]) and torch.equal(found[1][1:], found[2])
    keys = [(seed, words, number) for seed in (0, 1) for words in ("a", "a ", "\u00e9", "e\u0301") for number in (0, 1)]
    noises = {tuple(flow.clip_noise((2, 3), *key).flatten().tolist()) for key in keys}
    assert len(noises) == len(keys)
    first = flow.clip_noise((4,), 0, "a red square", 0)  # of another run of Python, on another day
    torch.testing.assert_close(first, torch.tensor([0.437819, -0.042411, 0.603820, 0.614493]), rtol=1e-6, atol=1e-6)


def test_repetitions_are_counted_over_the_list():
    takes = takes_of(["a", "b", "a"], repeat=2)
    assert [(take.words, take.repetition) for take in takes] == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("b", 1),
        ("a", 2),
        ("a", 3),
    ]
    assert [take.repetition for take in takes_of(["a", "b"], ["long", "long"])] == [0, 1]  # of what the encoders read


def test_repeat_makes_different_clips(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    three = list(lingen.generate(run, "a red square", repeat=3))
    assert len({clip.tobytes() for clip in three}) == 3
    assert np.array_equal(list(lingen.generate(run, ["a red square"] * 3))[2], three[2])
    with pytest.raises(ValueError, match="at least 1 clip, got repeat=0"):
        next(lingen.generate(run, "x", repeat=0))
    words = ["sample", "--run", str(run), "--prompt", "a red square", "--prompt", "x", "--repeat", "2"]
    assert main([*words, "--out", str(tmp_path / "y.mp4")]) == 0
    told = capsys.readouterr().out.split()
    ends = (".mp4", ".png", ".latents.safetensors")
    assert told == [str(tmp_path / f"y-0{number}{end}") for number in range(4) for end in ends]
    assert all(Path(file).is_file() for file in told)
    files = told[::3]
    assert [(about["prompt"], about["repetition"]) for about in (read_about(Path(file))[1] for file in files)] == [
        ("a red square", 0), ("a red square", 1), ("x", 0), ("x", 1),
    ]  # fmt: skip
    assert len({str(frames(Path(file))) for file in files}) == 4


def test_length_size_steps_and_guidance(run: Path, monkeypatch: pytest.MonkeyPatch):
    assert next(lingen.generate(run, "a red square", seconds=1.5)).shape == (12, 8, 8, 3)  # trained on 0.5 s
    assert next(lingen.generate(run, "a red square", size=(16, 12))).shape == (4, 16, 12, 3)
    assert next(lingen.generate(run, "a red square", seconds=1 / 8)).shape == (1, 8, 8, 3)
    module = load_denoiser(run)
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
        ({"steps": 0}, "at least 1, got 0. .at steps of"),
        ({"guidance": float("inf")}, "a finite number, got inf. .at guidance of"),
        ({"seconds": float("inf")}, "a finite number of seconds, got inf"),
        ({"seconds": float("nan")}, "a finite number of seconds, got nan"),
        ({"size": 64}, r"two whole numbers, \(height, width\) in pixels, got 64"),
        ({"size": (8.0, 8.0)}, "two whole numbers"),
        ({"size": (8,)}, "two whole numbers"),
    ],
)
def test_what_a_model_cannot_make(run: Path, asked: dict, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampling, "clip_size", inspect.unwrap(clip_size))  # the types watched would speak first
    with pytest.raises(ValueError, match=words):
        next(lingen.generate(run, "a red square", **asked))


def test_a_prompt_is_a_text(run: Path):
    with pytest.raises(TypeError, match="A prompt is a text, got 3"):
        next(lingen.generate(run, ["a red square", 3]))


def test_sample_writes_what_a_browser_plays(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "x.mp4"
    assert main(["sample", "--run", str(run), "--prompt", "a réd square", "--seed", "7", "--out", str(out)]) == 0
    assert capsys.readouterr().out.split()[0] == str(out)
    with av.open(str(out)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)
        assert len(list(file.decode(stream))) == 4
    data = out.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    title, about = read_about(out)
    assert title == about["prompt"] == "a réd square"
    assert about["seed"] == 7 and about["steps"] == 2 and about["guidance"] == 2.0 and about["schedule"] == "uniform"
    assert about["weights"] == str(find_weights(run)) and about["versions"]["torch"]
    assert about["frames"] == 4 and about["size"] == [8, 8] and about["fps"] == 8 and "prompts" not in about
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


def test_a_rewritten_prompt_is_what_the_text_encoders_see(run: Path, tmp_path: Path):
    tensors = {}
    for name, prompt, rewritten in (("a", "a red square", ["a blue circle"]), ("b", "a blue circle", [])):
        (file,) = output.sample_to_files(run, [prompt], tmp_path / f"{name}.mp4", seed=3, rewritten=rewritten)
        title, about = read_about(file)
        assert title == about["prompt"] == prompt and about.get("rewritten") == (rewritten or [None])[0]
        tensors[name] = load_file(file.with_suffix(".latents.safetensors"))["latents"]
    assert torch.equal(tensors["a"], tensors["b"])


def test_the_files_of_a_clip_are_for_whom_the_umask_says(run: Path, tmp_path: Path):
    before = os.umask(0o027)
    try:
        (file,) = output.sample_to_files(run, ["a red square"], tmp_path / "x.mp4")
    finally:
        os.umask(before)
    modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("x.mp4", "x.png", "x.latents.safetensors"), 0o640)


def test_one_text_encoder_is_let_go_before_the_next_is_read(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from lingen.text.local import LocalEncoder
    from lingen.training.denoiser import LinGenModule
    from tests.helpers import encoders as saved

    t5, bert = saved.t5(tmp_path / "t5"), saved.bert(tmp_path / "bert")
    text = f"text=[{{name: t5, path: {t5}, dim: 16}}, words, {{name: bert, path: {bert}, dim: 16, max_tokens: 32}}]"
    module = LinGenModule(lingen.load_recipe(tiny_recipe, [text], stage="clips")).eval()
    encoders, events, ready = [module.text[0], module.text[2]], [], LocalEncoder._ready

    def note(self, *place):
        events.append((self.name, [one.name for one in encoders if one._reader is not None and one is not self]))
        return ready(self, *place)

    monkeypatch.setattr(LocalEncoder, "_ready", note)
    words = encode_prompts(module, ["a red ball", "a blue square"], clip_size(module))
    assert {name for name, _ in events} == {"t5", "bert"} and [others for _, others in events if others] == []
    assert all(one._reader is None for one in encoders)
    assert [[mask.shape[0] for _, mask in one.text] for one in words] == [[1] * 3] * 2 and words[0].text[0][1].any()


class Pieces:
    """An autoencoder that streams: frame n of a clip is n. It counts which of its pieces are still held."""

    strides, channels = (2, 1, 1), 1

    def __init__(self) -> None:
        self.made: list[weakref.ref] = []
        self.held = 0

    def encode(self, video):
        raise NotImplementedError

    encode_stream = decode = encode

    def decode_stream(self, latents):
        for number in range(latents.shape[2]):
            self.held = max(self.held, sum(one() is not None for one in self.made))
            yield self._piece(2 * number)

    def _piece(self, first: int) -> torch.Tensor:
        piece = torch.tensor([first, first + 1]).view(1, 1, 2, 1, 1).expand(1, 3, 2, 4, 4) / 127.5 - 1
        self.made.append(weakref.ref(piece))
        return piece


def test_frames_come_one_by_one_and_a_piece_is_let_go_before_the_next():
    autoencoder = Pieces()
    frames = decode_frames(autoencoder, torch.zeros(1, 50, 4, 4), 7)
    assert next(frames).max() == 0 and len(autoencoder.made) == 1  # and nothing of the rest is decoded yet
    assert [frame[0, 0, 0] for frame in frames] == [1, 2, 3, 4, 5, 6]
    assert len(autoencoder.made) == 4 and autoencoder.held == 0


def test_an_autoencoder_says_whether_its_settings_let_it_stream():
    from lingen.autoencoder.ways import ways_of

    autoencoder = Pieces()
    assert ways_of(autoencoder) == ["exact", "tiled", "whole"]
    autoencoder.streams, autoencoder.decode = False, lambda latents: torch.ones(1, 3, 100, 4, 4)
    assert ways_of(autoencoder) == ["tiled", "whole"]
    assert next(decode_frames(autoencoder, torch.zeros(1, 50, 4, 4), 7)).min() == 255 and not autoencoder.made


def test_a_file_of_prompts_is_numbered(run: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a red square\n\na blue circle\n")
    words = ["sample", "--checkpoint", str(find_weights(run)), "--prompts", str(tmp_path / "prompts.txt")]
    assert main([*words, "--out", str(tmp_path / "x.mp4")]) == 0
    assert [read_about(tmp_path / f"x-0{n}.mp4")[0] for n in (0, 1)] == ["a red square", "a blue circle"]


@pytest.mark.slow
def test_ranks_share_the_clips_and_make_those_of_one_process(run: Path, tmp_path: Path):
    """Three clips on two ranks, which here a launcher starts; where there are several GPUs `sample` does."""
    words = ["-m", "lingen", "sample", "--run", str(run), "--repeat", "3", "--prompt", "a red square", "--out"]
    said = run_ranks([*words, str(tmp_path / "many.mp4")], 2)
    run_python(*words, str(tmp_path / "one.mp4"))
    assert [[n for n in range(3) if f"many-{n:02d}.mp4" in text] for text in said] == [[0, 2], [1]]
    for number in range(3):
        one, many = (
            output.read_latents(tmp_path / f"{name}-{number:02d}.latents.safetensors")[0] for name in ("one", "many")
        )
        assert torch.equal(one, many) and (tmp_path / f"many-{number:02d}.mp4").is_file()
    few = [*words[:5], *words[7:-1], "--out", str(tmp_path / "few.mp4")]  # the second rank has no part of one clip
    assert [text.count("few.mp4\n") for text in run_ranks(few, 2)] == [1, 0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "x"], "either --run DIR or --checkpoint F"),
        (["--run", "RUN", "--checkpoint", "RUN", "--prompt", "x"], "either --run DIR or --checkpoint F"),
        (["--run", "RUN"], "There is no prompt"),
        (["--run", "nowhere", "--prompt", "x"], "nowhere: there is no run folder or weights file."),
        (["--run", "EMPTY", "--prompt", "x"], "has no run.json"),
        (["--checkpoint", "OTHER", "--prompt", "x"], "it is cut off or no safetensors file"),
        (["--run", "RUN", "--prompt", "x", "--size", "big"], "height x width"),
        (["--run", "RUN", "--prompt", "x", "--size", "9x8"], "multiple of 4"),
        (["--run", "RUN", "--prompts", "nowhere.txt"], "cannot be read"),
        (["--run", "RUN", "--prompt", "x", "--seconds", "inf"], "--seconds: 'inf' is no number above 0."),
        (["--run", "RUN", "--prompt", "x", "--seconds", "nan"], "--seconds: 'nan' is no number above 0."),
        (["--run", "RUN", "--prompt", "x", "--guidance", "nan"], "--guidance: Expected a finite number, got nan.\n"),
        (["--run", "RUN", "--prompt", "x", "--steps", "0"], "--steps: "),
        (["--run", "RUN", "--prompt", "x", "--seed", "-1"], "--seed: "),
    ],
)
def test_mistakes(run: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").write_text("not weights")
    places = {"RUN": str(run), "EMPTY": str(tmp_path / "empty"), "OTHER": str(tmp_path / "other")}
    assert main(["sample", *(places.get(word, word) for word in words), "--out", str(tmp_path / "x.mp4")]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("folder", "folder is a folder; name a file to write, such as "),
        ("x.gif", "x.gif does not end with .mp4, which is what is written; name "),
        ("x", "x does not end with .mp4"),
        ("file/x.mp4", "file is a file, not a folder. Name another one."),
        ("sheet.mp4", "sheet.png is a folder"),
        ("x.mp4", "x-01.latents.safetensors is a folder"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "decode"])
def test_a_place_that_cannot_be_written_is_said_before_the_work(
    run: Path, tmp_path: Path, command: str, out: str, said: str, capsys: pytest.CaptureFixture[str]
):
    for name in ("folder", "sheet.png", "x-01.latents.safetensors"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    one = [["decode", "latents-that-are-not-read"], ["sample", "--run", str(run), "--prompt", "x"]]
    words = one[command == "sample"] + (["--prompt", "y"] if out == "x.mp4" and command == "sample" else [])
    if command == "decode" and out == "x.mp4":
        said = "latents-that-are-not-read cannot be read"  # it writes no latents, and one clip
    assert main([*words, "--out", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1 and sorted(tmp_path.rglob("*")) == before


def test_what_the_weights_were_not_trained_for_is_said(
    run: Path, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def said(*words: str, source: Path = run) -> str:
        out = tmp_path / "x.mp4"
        assert main(["sample", "--run", str(source), "--prompt", "a circle", "--out", str(out), *words]) == 0
        return capsys.readouterr().err

    assert not {"trained", "stage"} & set(re.findall(r"\w+", said()))
    told = "frames of {} pixels; trained were 1 or 4 frames of 8x8 pixels: it may fall apart."
    assert f"The clip has 4 {told.format('16x8')}" in said("--size", "16x8")
    assert f"The clip has 8 {told.format('8x8')}" in said("--seconds", "1")
    images = fit(tiny_recipe, run=tmp_path / "run", stage="images")
    assert "These are the weights of stage images, not of the last one of the recipe, clips." in said(source=images)
    assert lingen.load_model(images).recipe.data.frames == 4
    assert len(next(lingen.generate(images, ["x"]))) == 1
    assert len(next(lingen.generate(images, ["x"], seconds=0.5))) == 4
    with av.open(str(images / "samples" / "images-0000002" / "00.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 1


def test_words_that_no_caption_has_are_said():
    def told(prompt: str, *overrides: str) -> list[str]:
        recipe = lingen.load_recipe("quickstart_cpu", overrides, stage="videos")
        return list(untrained(recipe, Path("weights.safetensors"), [prompt], 8, (24, 24)))

    said = "No caption of training (data.synthetic=shapes) has the words: purple, elephant, shrinks."
    assert told("A purple elephant, a purple square shrinks") == [said]
    assert told("A red CIRCLE moves up") == [] and all(told(one) == [] for one in captions("report"))
    assert told("an elephant", "data.shards.video=x.tar", "data.shards.image=x.tar", "score.clips=0") == []


def test_the_words_of_the_quickstart_stand_where_a_newcomer_looks():
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (colour|shape|motion)s? of the quickstart \| (.*?) \|$", page, flags=re.M))
    found = {name: tuple(words.split(", ")) for name, words in rows.items()}
    assert found == {"colour": tuple(COLOURS), "shape": SHAPES, "motion": MOTIONS}


def test_a_folder_for_the_pipeline_is_said_to_be_one(tmp_path: Path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"Load it with lingen.LinGenPipeline.from_pretrained\("):
        lingen.load_model(tmp_path)


def test_what_holds_no_latents_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    weights = str(find_weights(run))
    assert main(["decode", weights, "--out", str(tmp_path / "x.mp4")]) == 2
    said = f"{weights} holds weights, not latents of `lingen sample`; those end with .latents.safetensors.\n"
    assert capsys.readouterr().err == said and not list(tmp_path.iterdir())


def test_an_unfinished_run_is_said_to_be_one(tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = fit(tiny_recipe, run=tmp_path / "run", stage="images")
    RunFolder(run).weights("images").unlink()
    assert main(["sample", "--run", str(run), "--prompt", "x"]) == 2
    assert "no stage of it is finished" in capsys.readouterr().err


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
    assert [one.name for one in tmp_path.iterdir()] == ["odd.mp4"]  # nor is a part of them left
    title = "ein rötes Quadrat « 赤 »"
    save_video(np.zeros((1, 8, 8, 3), np.uint8), path, 8, title=title, about={"prompt": title})
    assert read_about(path) == (title, {"prompt": title})


def test_contact_sheet_is_large_enough_to_see(tmp_path: Path):
    from PIL import Image

    sheet = contact_sheet([np.zeros((16, 8, 8, 3), np.uint8)] * 2, tmp_path / "sheet.png", ["one", "two"])
    with Image.open(sheet) as image:
        assert image.width >= 8 * 96 and image.height >= 2 * 96


def test_weights_of_another_model_are_refused(run: Path, tiny_recipe: Path):
    from lingen.training.denoiser import LinGenModule
    from lingen.training.weights import load_into
    from lingen.weights import read_weights

    other = LinGenModule(lingen.load_recipe(tiny_recipe, ["model.dim=24"], stage="clips"))
    with pytest.raises(lingen.RecipeError, match="do not fit this recipe's model.*of another shape"):
        load_into(other, read_weights(find_weights(run), "raw"), run)
    about = json.loads((run / "run.json").read_text())
    assert about["stages"] == ["images", "clips"]


def test_memory_freed_on_a_cpu_is_used_again():
    code = (
        "import resource, torch\n"
        "from lingen.kernels.choice import keep_memory\n"
        "keep_memory(torch.device('cpu'))\n"
        "torch.ones(2**24)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(50): torch.ones(2**24)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    faults, as_set = (
        int(run_python("-c", code, cwd=ROOT, env=kept | more))
        for more in ({}, {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_MAX_": "65536"})
    )
    if faults == as_set:
        pytest.skip("this allocator is not glibc's")
    assert 4 * faults < as_set, (faults, as_set)
