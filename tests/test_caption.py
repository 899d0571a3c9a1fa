"""`lingen data caption` with tiny random models of real classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lingen.cli import main
from lingen.data import manifest
from lingen.data.shards import read_shard, write_shards
from lingen.prepare.caption import Captioner, Captioning, caption
from lingen.prepare.captions import Captions
from lingen.prepare.check import check_folders
from lingen.prepare.cut import ClipRequirements
from lingen.prepare.filters import Filters
from lingen.prepare.index import index_folder
from lingen.prepare.journal import Part
from lingen.prepare.pack import Packing, look_for_footage, pack
from lingen.recipe.errors import RecipeError
from tests.helpers.captioners import blip, qwen
from tests.helpers.files import killed_before
from tests.helpers.footage import film, frames

pytest.importorskip("transformers")
WANTED = ClipRequirements((((32, 48),),), 8.0, (8,))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"blip": blip(folder / "blip"), "qwen": qwen(folder / "qwen")}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips and a picture; one of the clips has a caption."""
    folder = tmp_path_factory.mktemp("raw")
    for name, source in (("a", "testsrc2"), ("b", "mandelbrot"), ("c", "testsrc")):
        film(folder / "films" / f"{name}.mp4", (source, 1), fps=8, size=(32, 48))
    (folder / "films" / "b.txt").write_text("a fractal")
    (folder / "pictures").mkdir()
    Image.fromarray(next(frames("rgbtestsrc", 1))).save(folder / "pictures" / "p.png")
    sources = look_for_footage([folder / "films"], [folder / "pictures"], WANTED).sources
    job = Packing(sources, Captions(), WANTED, Filters(still=None, frozen=None, jerky=None), keep_uncaptioned=True)
    pack(job, folder / "raw")
    return folder / "raw"


def captions_in(folder: Path) -> dict[str, dict]:
    return {
        sample["__key__"]: json.loads(sample["json"])
        for path in sorted(folder.glob("*.tar"))
        for sample in read_shard(path)
    }


@pytest.mark.parametrize("name", ["blip", "qwen"])
def test_what_has_no_caption_gets_several(models: dict[str, Path], raw: Path, tmp_path: Path, name: str) -> None:
    how = Captioning(models[name], "describe the clip" if name == "qwen" else "", captions=3, max_tokens=8)
    report = caption(raw, tmp_path, how)
    assert report.made == {"video": 3, "image": 1} and report.looked_at == 4
    told = captions_in(tmp_path)
    assert told["b-0000"]["caption"] == "a fractal" and "captioner" not in told["b-0000"]
    rows = {row.key: row for row in manifest.rows(tmp_path / manifest.NAME)}
    before = {row.key: row for row in manifest.rows(raw / manifest.NAME)}
    for key in ("a-0000", "c-0000", "p"):
        captions = told[key]["captions"]
        assert 1 <= len(captions) == len(set(captions)) <= 3 and all(captions)
        assert told[key]["captioner"] == name and told[key]["source"].startswith(("films/", "pictures/"))
        assert (rows[key].captions, rows[key].caption_length) == (len(captions), len(captions[0]))
        assert rows[key].hash == before[key].hash
    about = manifest.about(tmp_path / manifest.NAME)
    assert about.settings["captioner"]["model"] == name and about.settings["made_by"] == "lingen data pack"
    assert about.fingerprint != manifest.about(raw / manifest.NAME).fingerprint


def test_a_killed_run_and_parts_say_the_same(models: dict[str, Path], raw: Path, tmp_path: Path) -> None:
    how = Captioning(models["blip"], captions=2, max_tokens=8, shard_mb=0)
    caption(raw, tmp_path / "whole", how)
    with killed_before("video-00001.tar"):
        caption(raw, tmp_path / "killed", how)
    caption(raw, tmp_path / "killed", how)
    for number in (2, 1):
        caption(raw, tmp_path / "parts", how._replace(part=Part(number, 2)))
    whole = captions_in(tmp_path / "whole")
    assert captions_in(tmp_path / "killed") == whole == captions_in(tmp_path / "parts") and len(whole) == 4


def test_samples_of_one_key_in_two_shards(models: dict[str, Path], raw: Path, tmp_path: Path) -> None:
    samples = [one for path in sorted(raw.glob("video-*.tar")) for one in read_shard(path)][:2]
    for number, sample in enumerate(samples):
        told = {"__key__": "0000", "json": {"caption": f"clip {number}"}}
        write_shards([{**sample, **told}], str(tmp_path / "raw" / f"{number}-%d.tar"))
    index_folder(tmp_path / "raw", 0)
    for _ in range(2):  # the same call again
        report = caption(tmp_path / "raw", tmp_path / "out", Captioning(models["blip"], max_tokens=8))
        assert report.made == {"video": 2}
    assert [told["caption"] for told in captions_in(tmp_path / "out").values()] == ["clip 0", "clip 1"]
    assert not check_folders([tmp_path / "out"], "full").faults


def test_captions_are_written_anew_on_demand(models: dict[str, Path], raw: Path, tmp_path: Path) -> None:
    caption(raw, tmp_path, Captioning(models["blip"], max_tokens=8, replace=True))
    told = captions_in(tmp_path)["b-0000"]
    assert told["captions"] != ["a fractal"] and "caption" not in told


def test_a_json_that_is_no_mapping_is_replaced(models: dict[str, Path], raw: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    write_shards(
        [
            {k: v for k, v in sample.items() if k != "json"} | {"json": "[1]", "txt": "a fractal"}
            for sample in read_shard(raw / "video-00000.tar")
        ],
        str(tmp_path / "raw" / "video-%05d.tar"),
    )
    index_folder(tmp_path / "raw", 0)
    for replace, told in ((False, [1]), (True, dict)):
        caption(
            tmp_path / "raw", out := tmp_path / str(replace), Captioning(models["blip"], max_tokens=8, replace=replace)
        )
        assert all(one == told or type(one) is told for one in captions_in(out).values()) and captions_in(out)


def test_a_model_that_says_nothing_is_a_counted_drop(models: dict[str, Path], raw: Path, tmp_path: Path) -> None:
    captioner = Captioner(Captioning(models["blip"]))
    captioner._say = lambda inputs, options: ["  "[:0]]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no caption: the model said nothing"):
        captioner.describe(np.zeros((1, 32, 32, 3), np.uint8), 0)


def test_what_is_no_model(raw: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match="is no folder"):
        Captioner(Captioning(tmp_path / "nowhere"))
    with pytest.raises(RecipeError, match="holds no image-text model"):
        Captioner(Captioning(raw))
    with pytest.raises(RecipeError, match="has no manifest.parquet"):
        caption(tmp_path, tmp_path / "out", Captioning(models["blip"]))


def test_the_command(models: dict[str, Path], raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "caption", str(raw), "--model", str(models["blip"]), "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "out"), "--max-tokens", "8"]) == 0
    assert "4 samples from 4 samples" in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "out"), "--captions", "0"]) == 2
    assert main([*words, "--out", str(tmp_path / "out"), "--max-tokens", "9"]) == 2
    assert "captioner.max_tokens is 8 there and 9 here" in capsys.readouterr().err
