"""The emoji theatre: held-out combinations, exact captions, clips that are a function of their number."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import save_file

import lingen
from lingen import flow
from lingen.blocks.layers import cut_patches, join_patches
from lingen.cli import main
from lingen.data import manifest
from lingen.data.acting import SPRITE, SPRITE_FRAMES, DrawnIndex, load_sprites, perform
from lingen.data.buckets import pool_of
from lingen.data.datamodule import ClipData
from lingen.data.order import BatchOrder
from lingen.data.theatre import (
    ACTIONS,
    ACTORS,
    LIGHTS,
    SCENES,
    SPLITS,
    Event,
    Split,
    Storyboard,
    Theatre,
    caption_of,
    known_words,
    split_of,
    splits_in,
    storyboard,
)
from lingen.prepare.encode import Encoding, encode_shards
from lingen.prepare.journal import Part
from lingen.recipe import load_stages, to_yaml
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import DataConfig, PerKind, Recipe
from lingen.text.small import Words
from lingen.training.denoiser import LinGenModule
from lingen.training.weights import load_denoiser, save_weights
from lingen.weights import BUILT_IN
from tests.helpers.closeness import assert_close
from tests.helpers.tiny import as_theatre
from tests.yardsticks import theatre as judging
from tests.yardsticks import theatre_judge

REPORT = "1664458191316f98005909df547500fdc235416c3be7ee72bec4f818a906f823"
"""SHA-256 of the captions of the clips to report on, fixed before anything was trained on the theatre."""


@pytest.fixture(scope="session")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sheet of plain round actors, each of its own colour, darker in the second half of its animation."""
    rows, columns = np.mgrid[:SPRITE, :SPRITE] - SPRITE / 2
    round_ = np.uint8(255 * (rows**2 + columns**2 < (0.45 * SPRITE) ** 2))
    sheet = np.zeros((len(ACTORS), SPRITE, SPRITE_FRAMES, SPRITE, 4), np.uint8)
    sheet[..., 3] = round_[:, None]
    for number in range(len(ACTORS)):
        sheet[number, ..., :3] = (37 * number % 256, 101 * number % 256, 211 * number % 256)
    sheet[:, :, SPRITE_FRAMES // 2 :, :, :3] //= 2
    path = tmp_path_factory.mktemp("theatre") / "sprites.png"
    Image.fromarray(sheet.reshape(len(ACTORS) * SPRITE, -1, 4), "RGBA").save(path, compress_level=1)
    return str(path)


def recipe(sprites: str, frames: int = 8, **data: object) -> Recipe:
    component = {"name": "theatre", "sprites": sprites, "clips": 40, "held_out": 6, "seed": 0}
    config = DataConfig(
        synthetic=component, size=(32, 32), frames=frames, fps=4.0, mix=PerKind(image=0, video=1),
        batch=PerKind(video=4), workers=0,
    )  # fmt: skip
    return Recipe(data=replace(config, **data))


def boards(split: Split, seconds: float = 4.0, count: int = 400) -> list[Storyboard]:
    return [storyboard(split, 0, number, seconds) for number in range(count)]


def test_each_actor_has_one_held_out_action_in_each_split_and_trains_nearly_all_scenes():
    for who in ACTORS:
        assert Counter(split_of("action", who, action) for action in ACTIONS) == {"train": 9, "tune": 1, "report": 1}
        assert Counter(split_of("scene", who, scene) for scene in SCENES)["train"] == 5
    for one in (ACTIONS, SCENES):
        held_out = Counter(name for name in one for who in ACTORS if _split_of(who, name) == "report")
        assert len(held_out) == len(one)


def _split_of(who: str, name: str) -> Split:
    return split_of("action" if name in ACTIONS else "scene", who, name)


def test_a_held_out_order_of_two_actions_is_trained_the_other_way_around():
    held_out = [(one, other) for one in ACTIONS for other in ACTIONS if split_of("order", one, other) != "train"]
    assert Counter(split_of("order", *pair) for pair in held_out) == {"tune": 8, "report": 8}
    assert all(split_of("order", other, one) == "train" for one, other in held_out)


@pytest.mark.parametrize("seconds", [4.0, 16.0, 60.0])
def test_training_sees_nothing_that_is_held_out_and_no_split_sees_the_other_ones(seconds: float):
    assert all(splits_in(board) == {"train"} for board in boards("train", seconds))
    for split, other in (("tune", "report"), ("report", "tune")):
        found = [splits_in(board) for board in boards(split, seconds, 100)]
        assert all(split in one and other not in one for one in found)
    assert not {caption_of(board) for board in boards("train", seconds)} & {
        caption_of(board) for split in SPLITS[1:] for board in boards(split, seconds)
    }


def test_the_clips_to_report_on_are_those_that_were_fixed_before_any_training():
    lines = [caption_of(board) for seconds in (4.0, 16.0, 60.0) for board in boards("report", seconds, 512)]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == REPORT


def test_training_holds_every_word_of_the_held_out_captions():
    words = {word for board in boards("train", count=3000) for word in caption_of(board).replace(",", "").split()}
    held_out = {word for board in boards("report") for word in caption_of(board).replace(",", "").split()}
    assert held_out <= words <= known_words()
    assert {word for name in ACTORS for word in name.split()} <= words


def test_the_words_of_the_recipe_have_a_row_each():
    (text,) = load_stages("theatre_128")[0].text
    encoder = Words(**{key: value for key, value in text.items() if key != "name"})
    words = sorted(known_words())
    rows, _ = encoder.read_ids(words)
    assert rows.shape == (len(words), 1) and len(set(rows.flatten().tolist())) == len(words)
    longest = max((caption_of(board) for board in boards("train", 60.0)), key=lambda text: len(text.split()))
    assert encoder.read_ids([longest])[0].shape[1] < text["max_tokens"] and not encoder.cut.count


def test_captions_say_all_events_in_order():
    board = Storyboard(
        (
            Event("honeybee", "", "fly", "left", "meadow", "dusk"),
            Event("rocket", "", "rise", "", "meadow", "dusk"),
            Event("ant", "polar bear", "follow", "right", "space", "night"),
        ),
        "left",
    )
    assert caption_of(board) == (
        "a honeybee flies left over a meadow at dusk, then a rocket takes off, then an ant follows a polar bear to the "
        "right in space at night, the camera pans left"
    )
    told = [caption_of(board, np.random.default_rng(seed)) for seed in range(9)]
    assert len(set(told)) == 9
    for text in told:
        places = [text.index(word) for word in ("honeybee", "rocket", "ant ", "polar bear")]
        assert places == sorted(places)


def test_numbers_of_events_go_with_the_length():
    for seconds, least, most in ((0.1, 1, 1), (4.0, 1, 2), (16.0, 1, 8), (60.0, 5, 12), (600.0, 12, 12)):
        found = {len(board.events) for board in boards("train", seconds, 300)}
        assert (min(found), max(found)) == (least, most)
    assert all(len({event.scene for event in board.events}) == 1 for board in boards("train", 4.0))
    assert any(len({event.scene for event in board.events}) > 2 for board in boards("train", 60.0))


def test_a_clip_is_a_function_of_its_split_and_number(sprites: str):
    data = ClipData(recipe(sprites))
    batches = [batch for batch, _ in zip(data.batches(), range(3), strict=False)]
    assert batches[0].clips.shape == (4, 3, 8, 32, 32) and batches[0].clips.dtype == torch.uint8
    again = ClipData(recipe(sprites))
    late = next(iter(again.batches(start=2)))
    assert torch.equal(late.clips, batches[2].clips) and late.captions == batches[2].captions
    assert late.keys == batches[2].keys
    for key, clip in zip(late.keys, late.clips, strict=True):
        number = int(key.rpartition(":")[2])
        frames, captions = DrawnIndex.of(Theatre(sprites=sprites), "train").draw(number, (8, 32, 32), 4.0)
        assert torch.equal(frames, clip)
        assert late.captions[late.keys.index(key)] in captions


def test_validation_is_the_split_to_tune_on(sprites: str):
    data = ClipData(recipe(sprites))
    (first, *_) = data.val_dataloader()
    frames, captions = DrawnIndex.of(Theatre(sprites=sprites), "tune").draw(0, (8, 32, 32), 4.0)
    assert torch.equal(frames, first.clips[0])
    assert first.captions[0] in captions


def test_clips_of_several_lengths_are_dealt_out_with_as_many_frames_of_each(sprites: str):
    asked = recipe(sprites, frames=64, lengths=[16, 4]).data
    drawn = DrawnIndex.of(Theatre(sprites=sprites, clips=2000), "train")
    pool = pool_of(drawn, asked, "video", lambda shape: shape.frames, "")
    assert [shape.frames for shape in pool.shapes] == [64, 16, 4] and pool.batches == [4, 16, 64]
    assert sorted(np.concatenate(pool.rows).tolist()) == list(range(2000)), "each clip in one length"
    shares = [len(rows) * shape.frames for rows, shape in zip(pool.rows, pool.shapes, strict=True)]
    assert max(shares) < 1.05 * min(shares)
    ranks = BatchOrder({"video": pool.lanes}, asked.mix, ("seed", 0), world=2)
    for step in range(20):
        one, other = (ranks.place(step, rank=rank) for rank in range(2))
        assert one.bucket == other.bucket and not {*one.numbers} & {*other.numbers}
    data = ClipData(recipe(sprites, frames=16, lengths=[8, 4], batch=PerKind(video=1)))
    batches = [batch for _, batch in zip(range(6), data.train_dataloader(), strict=False)]
    assert {batch.clips.shape[2] for batch in batches} == {16, 8, 4}
    assert len({key for batch in batches for key in batch.keys}) == sum(len(batch.keys) for batch in batches)


def test_all_parts_of_what_is_encoded_are_drawn_alike(sprites: str, tmp_path: Path):
    def encode(number: int, **component: object) -> None:
        drawn = {"name": "theatre", "sprites": sprites, "clips": 4, "held_out": 1, "seed": 0, **component}
        encode_shards([recipe(sprites, synthetic=drawn)], tmp_path / "set", Encoding(part=Part(number, 2)))

    encode(1)
    with pytest.raises(RecipeError, match="begun in another way: data.synthetic.seed is 0 there and 5 here"):
        encode(2, seed=5)
    moved = tmp_path / "moved.png"
    moved.write_bytes(Path(sprites).read_bytes())
    encode(2, sprites=str(moved))
    assert len(list(manifest.rows(tmp_path / "set" / manifest.NAME))) == 4


def test_mistakes_are_told_before_anything_runs(sprites: str, tmp_path: Path):
    absent = recipe(str(tmp_path / "none" / "sprites.webp"))
    for do in (ClipData(absent).check, ClipData(absent).setup):
        with pytest.raises(RecipeError, match="fetch them with `lingen data fetch theatre --out .*none`"):
            do()
    Image.new("RGBA", (8, 8)).save(tmp_path / "small.png")
    with pytest.raises(RecipeError, match="does not hold this version's actors"):
        load_sprites(str(tmp_path / "small.png"))


def test_an_image_is_a_moment_of_one_event(sprites: str):
    data = ClipData(recipe(sprites, mix=PerKind(image=1, video=1), batch=PerKind(image=3, video=2)))
    data.setup()
    shapes = {
        tuple(clip.shape) for batch, _ in zip(data.train_dataloader(), range(4), strict=False) for clip in batch.clips
    }
    assert shapes == {(3, 1, 32, 32), (3, 8, 32, 32)}
    index = DrawnIndex.of(Theatre(sprites=sprites), "train")
    images = [index.draw(number, (1, 64, 64), 4.0) for number in range(60)]
    assert torch.equal(images[7][0], index.draw(7, (1, 64, 64), 4.0)[0])
    assert not any(", then" in caption or ". then" in caption for _, captions in images for caption in captions[:1])
    # Sprites are dimmed in the second half of their animation: both halves are shown.
    event = Event("dog", "", "turn", "", "snow", "day")
    board, held = Storyboard((event,), ""), load_sprites(sprites)
    lights = {
        perform(board, 1, 6.0, (64, 64), held, np.random.default_rng(seed))[0, 40, 32].tobytes() for seed in range(12)
    }
    assert len(lights) > 1


@pytest.mark.parametrize("action", ACTIONS)
def test_actions_move_as_their_names_say(action: str, sprites: str):
    event = Event("dog", "cat" if action == "follow" else "", action, "right", "snow", "day")
    found = _places(perform_one(event, sprites), "dog")
    first, middle, last = found[1], found[len(found) // 2], found[-2]
    if action in ("cross", "fly", "follow", "enter", "leave"):
        seen = [place for place in found if place is not None]
        assert seen[-1][0] > seen[0][0] + 10
    if action == "enter":
        assert found[0] is None or found[0][0] < 10
        assert last is not None
    if action in ("leave", "rise"):
        assert last is None or last[2] < 0.2 * first[2]
    if action == "rise":
        assert middle is not None and middle[1] < first[1]
    if action == "fall":
        assert first is None or first[1] < last[1] - 20
    if action == "jump":
        assert max(y for _, y, _ in found) - min(y for _, y, _ in found) > 10
    if action in ("grow", "shrink"):
        assert (last[2] > 3 * first[2]) == (action == "grow") and (first[2] > 3 * last[2]) == (action == "shrink")
    if action == "turn":
        assert abs(first[0] - last[0]) < 1 and abs(first[2] - last[2]) < 0.1 * first[2]


def perform_one(event: Event, sprites: str) -> np.ndarray:
    return perform(Storyboard((event,), ""), 24, 6.0, (64, 64), load_sprites(sprites), np.random.default_rng(1))


def _places(clip: np.ndarray, who: str) -> list[tuple[float, float, float] | None]:
    """Middle (x, y) and area of an actor's colour in each frame; None where it is not seen."""
    number = list(ACTORS).index(who)
    colour = np.array([37 * number % 256, 101 * number % 256, 211 * number % 256])
    found: list[tuple[float, float, float] | None] = []
    for frame in clip.astype(int):
        own = np.abs(frame - colour).sum(-1) < 12
        own |= np.abs(frame - colour // 2).sum(-1) < 12
        rows, columns = np.nonzero(own)
        found.append((columns.mean(), rows.mean(), own.sum()) if own.sum() > 8 else None)
    return found


def test_each_scene_and_light_looks_its_own_way(sprites: str):
    means = []
    for scene in SCENES:
        for light in LIGHTS:
            clip = perform_one(Event("dog", "", "turn", "", scene, light), sprites)
            means.append(clip[0].reshape(-1, 3)[::7].mean(0))
    distances = np.linalg.norm(np.array(means)[:, None] - np.array(means), axis=-1) + 99 * np.eye(len(means))
    assert distances.min() > 2


def test_actors_that_look_alike_and_missing_ones_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (len(ACTORS), 8, 1, 8, 4), np.uint8) | np.array([0, 0, 0, 255], np.uint8)
    sheet = small.repeat(SPRITE // 8, 1).repeat(SPRITE // 8, 3).repeat(SPRITE_FRAMES, 2)

    def asked() -> list[str]:
        path = tmp_path / "sprites.png"
        path.unlink(missing_ok=True)
        Image.fromarray(sheet.reshape(len(ACTORS) * SPRITE, -1, 4), "RGBA").save(path, compress_level=1)
        load_sprites.cache_clear()
        return ["--recipe", "theatre_128", f"data.synthetic.sprites={path}", "data.synthetic.clips=3000"]

    assert main(["data", "check", *asked(), "data.workers=0"]) == 0
    sheet[7] = sheet[3, :, :, ::-1]
    words = asked()
    assert main(["data", "check", *words, "data.workers=0"]) == 1
    names = list(ACTORS)
    assert f"the actors '{names[3]}' and '{names[7]}' look alike" in capsys.readouterr().err
    words[2] = f"data.synthetic.sprites={tmp_path / 'none.webp'}"
    assert main(["doctor", *words]) == 1
    assert "lingen data fetch theatre" in "".join(capsys.readouterr())


def test_the_demo_marks_words_that_it_does_not_know_and_writes_what_is_asked(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    out, weights = tmp_path / "clip.webp", as_theatre(tiny_run, tmp_path)
    words = ["demo", "a", "honeybea", "jumps", "a xylophone bee", "--checkpoint", str(weights)]
    words += ["--seconds", "1", "--steps", "1"]
    assert main([*words, "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        "1 seconds of: a honeybea(?) jumps a xylophone(?) bee(?)",
        "'honeybea' is not known. Did you mean 'honeybee'?",
    ]
    assert said[2:4] == ["'xylophone' is not known.", "'bee' is not known. Did you mean 'honeybee'?"]
    assert said[4:] == [str(out), str(out.with_suffix(".png"))]
    with Image.open(out) as picture:
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)])
    clip = lingen.sample_demo("a honeybea jumps", seconds=1, steps=1, weights=weights)
    assert clip.dtype == np.uint8 and clip.shape == frames.shape
    assert main(["demo", "a dog jumps", "--out", str(tmp_path / "clip.avi")]) == 2
    capsys.readouterr()
    assert main(["demo", " ", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("Say what the clip shows, such as: lingen demo ")
    monkeypatch.setitem(BUILT_IN, "theatre_128", tmp_path / "none")
    assert main(["demo", "a dog jumps", "--out", str(out)]) == 2
    assert "this installation has no weights of it" in capsys.readouterr().err
    assert main(["demo", "a red circle", "--checkpoint", str(tiny_run)]) == 2
    told = capsys.readouterr()
    assert "it was not trained on the emoji theatre. Its clips are made by `lingen sample" in told.err
    assert not told.out


def test_the_weights_that_come_with_lingen_know_day_from_night_and_places(tmp_path: Path):
    night, day = (
        lingen.sample_demo(f"a pig turns around in the {place}", seconds=1, steps=4)
        for place in ("desert at night", "snow by day")
    )
    assert night.shape == (12, 128, 128, 3)
    assert day.mean() > night.mean() + 80
    sky, sand = night[:, :60].mean((0, 1, 2)), night[:, 110:].mean((0, 1, 2))
    assert sky[2] > 1.5 * sky[0] and sand[2] < sand[0] + 10  # a blue sky over sand that is not blue


def test_the_demo_speaks_before_torch_is_imported(tiny_run: Path, tmp_path: Path):
    weights = as_theatre(tiny_run, tmp_path)
    code = (
        "import builtins, os, sys; from lingen.cli import main; own = builtins.print\n"
        "builtins.print = lambda *a, **k: (own('torch' in sys.modules, *a, flush=True), os._exit(0))\n"
        "main(['demo', 'a dog jumps', '--checkpoint', sys.argv[1]])"
    )
    told = subprocess.run([sys.executable, "-c", code, str(weights)], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "False 4 seconds of: a dog jumps"


def test_words_that_know_their_neighbours_tell_an_empty_text_from_none():
    torch.manual_seed(0)
    words = Words(dim=16, depth=1)
    tokens, mask = words.encode(["a dog follows a cat", "a cat follows a dog", ""])
    assert torch.isfinite(tokens).all() and mask.sum(1).tolist() == [5, 5, 0]
    alone, _ = words.encode(["a cat follows a dog"])
    assert torch.allclose(alone[0], tokens[1], atol=1e-5)
    changed, _ = words.encode(["a dog follows a bear"])
    assert not torch.allclose(changed[0, 1], tokens[0, 1], atol=1e-4)  # the dog hears of whom it follows
    plain, _ = Words(dim=16).encode(["a dog follows a cat", "a dog follows a bear"])
    assert torch.equal(plain[0, 1], plain[1, 1])


def test_judges_see_each_event_and_what_it_shows(sprites: str):
    events, targets = theatre_judge.drawn("tune", 3, sprites, theatre_judge.LENGTHS[2])
    board = storyboard("tune", 1, 3, 60.0)
    assert events.shape == (len(board.events), 3, theatre_judge.FRAMES, theatre_judge.SIDE, theatre_judge.SIDE)
    assert [list(ACTORS)[row[0]] for row in targets.tolist()] == [event.who for event in board.events]
    judge = theatre_judge.EventJudge(width=8).eval()
    found = theatre_judge.verdicts(judge, events, "coarse")
    assert found.shape == targets.shape
    perfect = judging.summary([board], [targets])["rates"]
    assert perfect["all"]["share"] == perfect["who"]["share"] == 1.0
    wrong = targets.clone()
    wrong[0, 0] = (wrong[0, 0] + 1) % len(ACTORS)
    worse = judging.summary([board], [wrong])
    assert worse["rates"]["all"]["share"] == 0.0 and worse["rates"]["action"]["share"] == 1.0
    assert len(worse["confusions"]["who"]) == 1


def test_the_judge_of_actors_sees_frames_in_any_order_and_who_follows_on_the_right():
    torch.manual_seed(0)
    judge = theatre_judge.EventJudge(width=8).eval()
    frames, ways = torch.randn(2, 5, 3, 64, 64), theatre_judge.WAYS
    left, right = (torch.full((2,), ways.index(one)) for one in ("left", "right"))
    found = judge.actors(frames, left)
    assert torch.allclose(judge.actors(frames[:, [3, 1, 4, 0, 2]], left), found, atol=1e-5)
    assert torch.allclose(judge.actors(frames.flip(-1), right), found, atol=1e-5)
    assert not torch.allclose(judge.actors(frames, right), found, atol=1e-5)
    torch.manual_seed(1)
    moved = theatre_judge.moved(frames[:, :1].expand(2, 5, 3, 64, 64))
    assert moved.shape == frames.shape and not torch.allclose(moved[:, 0], moved[:, 1])


def test_clips_are_made_once_and_judged_beside_real_ones(
    sprites: str, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clips, judge, out = tmp_path / "clips.npz", tmp_path / "judge.safetensors", tmp_path / "theatre.json"
    torch.manual_seed(0)
    save_file(theatre_judge.EventJudge().state_dict(), judge)
    words = ["--weights", str(as_theatre(tiny_run, tmp_path)), "--prompts", "3", "--sheet", "2", "--steps", "1"]
    asked = [["sample", *words, "--out", str(clips)], ["sample", *words, "--seed", "1", "--out", str(clips) + "1.npz"]]
    judged = ["--judge", str(judge), "--sprites", sprites, "--clips", str(clips), "--again", str(clips) + "1.npz"]
    for line in (*asked, ["score", *judged, "--out", str(out)]):
        monkeypatch.setattr(sys, "argv", ["theatre", *line, "--device", "cpu"])
        judging.main()
    held = json.loads(out.read_text())
    events = sum(len(board.events) for _, board in judging.asked(3, 4.0))
    assert held["rates"]["who"]["of"] == held["real clips"]["who"]["of"] == events
    assert held["distance of two seeds"] > 0 and held["prompts"] == 3
    (used,) = (tmp_path / "theatre_uses.jsonl").read_text().splitlines()
    assert json.loads(used)["all"] == held["rates"]["all"]["share"]
    with Image.open(out.with_suffix(".webp")) as sheet:
        assert sheet.n_frames > 1
    words = [
        "nearest",
        "--clips",
        str(clips),
        "--sprites",
        sprites,
        "--count",
        "3",
        "--out",
        str(tmp_path / "near.png"),
    ]
    monkeypatch.setattr(sys, "argv", ["theatre", *words])
    capsys.readouterr()
    judging.main()
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 2 and all(number < 3 and distance > 0 for distance, number in found)
    wrongs = {"--sheet 0": "--sheet is 1 to 3", "--batch 0": "1 or more", "--events 3": "4 s are 1 to 2"}
    for wrong, told in wrongs.items():
        monkeypatch.setattr(sys, "argv", ["theatre", *asked[0], *wrong.split()])
        with pytest.raises(SystemExit):
            judging.main()
        assert told in capsys.readouterr().err


def finer_of(override: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[LinGenModule, LinGenModule]:
    """An earlier model, by one setting of the recipe, and what `theatre finer` makes of its weights."""
    told = load_stages("theatre_128", [override])[1]
    before = LinGenModule(told)
    torch.nn.init.normal_(before.model.unpatchify.weight)
    save_weights(folder / "before.safetensors", before, to_yaml(told), 1)
    words = ["--weights", str(folder / "before.safetensors"), "--out", str(folder / "start.safetensors")]
    monkeypatch.setattr(sys, "argv", ["theatre", "finer", *words])
    judging.main()
    return before, load_denoiser(folder / "start.safetensors")


def test_weights_of_two_frames_a_token_start_a_model_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    coarse, fine = finer_of("model.patch=[2,1,1]", tmp_path, monkeypatch)
    assert fine.recipe.model.patch == (1, 1, 1)
    one = torch.randn(1, 80, 1, 2, 2)
    twice = cut_patches(one.expand(1, 80, 2, 2, 2), (2, 1, 1))
    tokens = fine.model.patchify(cut_patches(one, (1, 1, 1)))
    assert_close("patchify", tokens, coarse.model.patchify(twice), 1e-5)
    out = join_patches(coarse.model.unpatchify(tokens), (2, 1, 1)).mean(2, keepdim=True)
    assert_close("unpatchify", join_patches(fine.model.unpatchify(tokens), (1, 1, 1)), out, 1e-5)


def test_weights_that_know_no_parts_start_a_model_that_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before, start = finer_of("text.0.parts=false", tmp_path, monkeypatch)
    assert start.recipe.text[0]["parts"] and before.model.phase is None
    clip, time = torch.randn(1, 80, 2, 4, 4), torch.tensor([0.3])
    one, two = (
        [module.model(clip, time, module.encode_text([words], 0.0)) for module in (before, start)]
        for words in ("a cow leaves", "a cow leaves, then a bee flies")
    )
    assert_close("one event", *one, 1e-5)
    assert (two[0] - two[1]).abs().max() > 1e-4


def test_stories_have_the_events_that_were_asked_for_and_a_row_each(tmp_path: Path):
    numbers, stories = zip(*judging.asked(2, 60.0, events=6), strict=True)
    assert {len(story.events) for story in stories} == {6} and 0 <= numbers[0] < numbers[1]
    assert stories == tuple(storyboard("report", 0, number, 60.0) for number in numbers)
    found = [theatre_judge.targets_of(story.events) for story in stories]
    clips = [np.full((60, 16, 16, 3), shade, np.uint8) for shade in (50, 200)]
    judging.show_stories(clips, tmp_path / "stories.webp", list(stories), found)
    with Image.open(tmp_path / "stories.webp") as sheet:
        assert sheet.size == (6 * 2 * 16, 2 * (16 + 26 + 6))


def test_judged_clips_are_shown_side_by_side_with_what_is_wrong(tmp_path: Path):
    boards = [board for _, board in judging.asked(3, 4.0)]
    targets = [theatre_judge.targets_of(board.events) for board in boards]
    wrong = [targets[0], (targets[1] + 1) % 2, targets[2]]
    clips = [np.tile(np.arange(0, 100, 20, np.uint8)[:, None, None, None], (1, 128, 128, 3))] * 3
    judging.show(clips, tmp_path / "sheet.webp", boards, wrong, columns=2)
    with Image.open(tmp_path / "sheet.webp") as sheet:
        assert sheet.size == (256, 2 * (128 + 72)) and sheet.n_frames == 5
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    red = (pixels[..., 0] - pixels[..., 1] > 80).any(0)
    assert red[128:].any() and not red[:128].any()


def test_the_recipe_trains_and_solves_at_the_times_at_which_a_clip_is_decided():
    """Between 0.003 and 0.03 (docs/theatre.md, "The times decided")."""
    recipe = load_stages("theatre_128")[1]
    times = flow.Times(recipe.time, 12 * 16 * 16)
    drawn = times.draw(20_000, torch.Generator().manual_seed(0))
    assert 0.29 < (drawn < 0.03).float().mean() < 0.33 and 0.01 < (drawn < 0.003).float().mean()
    assert (times.schedule(recipe.sample)[:-1] < 0.029).sum() == 6
