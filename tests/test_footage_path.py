"""Real footage all the way: fetch, pack, check, stats, caption-free, encode, fit, each by its command."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from lingen.cli import main
from lingen.data import manifest
from lingen.data.decode import decode_video
from lingen.prepare.fetch import fetch


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The six films that `lingen data fetch footage` brings, as files with their captions beside them."""
    folder = tmp_path_factory.mktemp("footage")
    fetched = fetch("footage", folder / "shards").folder
    for shard in fetched.glob("*video*.tar"):
        with tarfile.open(shard) as tar:
            tar.extractall(folder / "films", filter="data")
    return folder / "films"


@pytest.mark.slow
def test_from_films_to_training(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = ["--recipe", "footage_64"]

    def run(*words: str) -> str:
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert "near-duplicate" not in run("data", "pack", *recipe, "--videos", films, "--out", "data/packed")
    rows = {row.key: row for row in manifest.rows(Path("data/packed") / manifest.NAME)}
    # bikes.mp4 has five cuts; its last shot is too short for a second
    shots = [json.loads(about)["start"] for about in _abouts(Path("data/packed"), "bikes-")]
    assert shots == [0.0, 1.2, 3.04, 5.48, 7.48]
    assert {key.rsplit("-")[0] for key in rows} == {path.stem for path in films.glob("*.mp4")}
    assert all(row.captions == 1 and (row.height, row.fps) == (64, 8.0) for row in rows.values())
    assert "nothing wrong" in run("data", "check", *recipe, "--decode")
    assert f"{len(rows)}" in run("data", "stats", "data/packed", "--out", "stats")
    assert Image.open("stats/samples.jpg").width > 900
    run("encode", *recipe, "--out", "data/encoded")
    short = ["stages.short.train.steps=2", "stages.long.train.steps=2", "sample.prompts=[]"]
    for name, shards in (("raw", "data/packed"), ("encoded", "data/encoded")):
        run("fit", *recipe, *short, f"data.shards.video={shards}", "--run", f"runs/{name}")
        ledger = json.loads(Path(f"runs/{name}/ledger.json").read_text())
        assert ledger["used"] > 0 and not ledger["dropped"]


def _abouts(folder: Path, prefix: str) -> list[bytes]:
    found = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found += [tar.extractfile(m).read() for m in tar if m.name.startswith(prefix) and m.name.endswith(".json")]  # type: ignore[union-attr]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("start", [0.0, 0.4, 0.9])
def test_a_film_of_an_old_x264_is_decoded_from_any_start(films: Path, start: float) -> None:
    """cockatoo.mp4 (4:4:4, x264 before build 151): from its later key frames alone, FFmpeg decodes it wrongly."""
    data = (films / "cockatoo.mp4").read_bytes()
    clip = decode_video(data, frames=16, size=(36, 64), fps=20.0, start=start)
    whole = decode_video(data, frames=280, size=(36, 64), fps=20.0, start=0.0).pixels
    first = int(start * clip.starts)
    assert (clip.pixels == whole[:, first : first + 16]).all()
