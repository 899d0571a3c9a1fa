"""`lingen bench tae`: long clips through an autoencoder on the fly, how far its ways are apart, and the targets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lingen_yardsticks import autoencoder as bench
from lingen_yardsticks.autoencoder import PIECE_FRAMES, bench_autoencoder, clip, prepared
from lingen_yardsticks.build import draw_weights
from lingen_yardsticks.place import place_of
from lingen_yardsticks.results import Results
from lingen_yardsticks.show import PAGE

from lingen.autoencoder.pixels import Pixels
from lingen.autoencoder.tae import TAE
from lingen.cli import main
from lingen.media import as_frames
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import AUTOENCODERS

CPU = torch.device("cpu")
TINY = {"strides": (2, 2, 2), "width": 8, "multipliers": (1, 2), "blocks": 1, "channels": 4, "chunk": 2}
WORDS = ["--recipe", "tae_8x8x8", *(f"autoencoder.{key}={json.dumps(value)}" for key, value in TINY.items())]
GIVEN = {"frames": (33, 40), "size": (16, 24)}


def measured(tmp_path: Path, component: dict, **changes) -> list[dict]:
    quiet = lambda line: None  # noqa: E731
    place = place_of("cpu", changes.pop("precision", None), 1e-9)
    ready = prepared(component, place, quiet, **{**GIVEN, **changes})
    results = Results(tmp_path / "out.json", {"autoencoder": ready[0].settings}, CPU, quiet)
    bench_autoencoder(*ready, results)
    return results.rows


def tae_component(**changes) -> dict:
    return {"name": "tae", **TINY, **changes}


def rows_of(rows, name):
    return [row for row in rows if row["name"] == name]


# the clip


def test_the_clip_moves_and_every_frame_is_of_its_number_alone():
    pieces = list(clip(2 * PIECE_FRAMES + 3, (8, 10), CPU))
    assert [piece.shape[2] for piece in pieces] == [PIECE_FRAMES, PIECE_FRAMES, 3]
    video = torch.cat(pieces, 2)
    assert video.shape == (1, 3, 2 * PIECE_FRAMES + 3, 8, 10) and video.abs().max() <= 1
    assert (video.diff(dim=2).abs().mean((0, 1, 3, 4)) > 0.01).all()  # no two frames are equal
    assert torch.equal(torch.cat(list(clip(PIECE_FRAMES + 5, (8, 10), CPU)), 2), video[:, :, : PIECE_FRAMES + 5])


class Watched(Pixels):
    """Notes in which order its pieces come and go; it keeps none."""

    def __init__(self):
        super().__init__()
        self.seen: list[int] = []

    def encode_stream(self, pieces):
        for piece in pieces:
            self.seen.append(piece.shape[2])
            yield self.encode(piece)

    def decode_stream(self, latents):
        for piece in latents.split(5, 2):
            yield self.decode(piece)


def test_the_frames_that_are_timed_are_the_clips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    shown: list[np.ndarray] = []
    monkeypatch.setattr(bench, "as_frames", lambda piece: shown.append(as_frames(piece)) or shown[-1])
    watched = Watched()
    monkeypatch.setattr(AUTOENCODERS, "build", lambda component: watched)
    row = measured(tmp_path, {"name": "pixels"}, frames=(71,), ways=("exact",))[0]
    assert watched.seen[:5] == [
        PIECE_FRAMES,
        PIECE_FRAMES,
        PIECE_FRAMES,
        PIECE_FRAMES,
        7,
    ]  # a warm-up of 64, then the clip
    expected = np.concatenate([as_frames(piece) for piece in clip(71, GIVEN["size"], CPU)])
    assert np.array_equal(np.concatenate(shown)[64 : 64 + 71], expected)
    assert row["weights"] == "own" and row["latents"] == [3, 71, 16, 24]


def test_an_autoencoder_that_loses_frames_is_no_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    watched = Watched()
    watched.decode_stream = lambda latents: iter([latents[:, :, 1:]])  # type: ignore[method-assign]
    monkeypatch.setattr(AUTOENCODERS, "build", lambda component: watched)
    with pytest.raises(ValueError, match="1 of 33 frames are missing"):
        measured(tmp_path, {"name": "pixels"}, ways=("exact",))


# rows


def test_rows_of_every_way_and_length(tmp_path: Path):
    rows = measured(tmp_path, tae_component())
    clips = rows_of(rows, "clip")
    assert [(row["way"], row["frames"]) for row in clips] == [
        (way, frames) for way in ("exact", "tiled", "whole") for frames in (33, 40)
    ]
    for row in clips:
        assert row["ms"] == pytest.approx(1e3 * (row["encode_s"] + row["decode_s"]), rel=1e-3)
        assert row["frames_per_second"] == pytest.approx(1e3 * row["frames"] / row["ms"], rel=1e-3)
        assert row["latents"] == [4, -(-row["frames"] // 2), 8, 12] and row["weights"] == "random"
        assert row["size"] == [16, 24] and row["dtype"] == "float32"
        assert "gib" not in row and "encode_gib" not in row  # known on CUDA only
    lines = PAGE["autoencoder"].lines({"a": {"rows": rows}})
    assert len(lines) == 7 and {len(line) for line in lines} == {len(set(lines[0]))}


def test_agreement_is_exact_and_tiles_differ(tmp_path: Path):
    rows = rows_of(measured(tmp_path, tae_component(), frames=(2,)), "agreement")
    assert [(row["dtype"], row["frames"]) for row in rows] == [
        (dtype, frames) for dtype in ("float32", "float64") for frames in (1, 2, 7, 33)
    ]
    for row in rows:
        limit = 1e-10 if row["dtype"] == "float64" else 1e-3
        assert row["exact_latents"] < limit and row["exact_pixels"] < limit and row["exact_psnr"] > 80
        assert row["tiled_pixels"] > 0.01 and row["tiled_psnr"] < 60
    lines = PAGE["agreement"].lines({"a": {"rows": rows}})
    assert len(lines) == 9 and {len(line) for line in lines} == {len(set(lines[0]))}


def test_whole_is_one_call_and_keeps_nothing_for_a_backward_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Without gradients TAE would go piece by piece of itself, and the ways would be compared with themselves."""
    tae, seen = TAE(**TINY), []
    draw_weights(tae)
    tae.load_state_dict(tae.state_dict())
    tae.encoder.register_forward_hook(lambda one, given, out: seen.append((given[0].shape[2], out)))
    monkeypatch.setattr(AUTOENCODERS, "build", lambda component: tae)
    measured(tmp_path, tae_component(), frames=(12,), ways=("whole",))
    assert {frames for frames, _ in seen} == {12}
    assert not any(out.requires_grad for _, out in seen)


def test_random_weights_let_every_layer_have_its_say(tmp_path: Path):
    """As they are made, the layers along time pass everything unchanged, and no way would see a seam."""
    said: list[str] = []
    tae, weights = bench._built(tae_component(), CPU, said.append)
    assert weights == "random" and "Random weights" in said[0] and tae.loaded
    assert all(p.abs().max() > 0 for name, p in tae.named_parameters() if p.ndim > 1)


def test_own_weights_are_read_where_they_are(tmp_path: Path):
    from safetensors.torch import save_file

    tae = TAE(**TINY)
    file = tmp_path / "w.safetensors"
    state = {f"averaged.autoencoder.{name}": value.contiguous() for name, value in tae.state_dict().items()}
    save_file(state, str(file), {"format": "lingen"})
    found, weights = bench._built(tae_component(path=str(file)), CPU, print)
    assert weights == "own" and not found.loaded
    rows = measured(tmp_path, tae_component(path=str(file)), frames=(4,), ways=("exact",))
    assert {row["weights"] for row in rows} == {"own"}
    held = json.loads((tmp_path / "out.json").read_text())
    assert held["autoencoder"]["width"] == 8 and str(tmp_path) not in json.dumps(held)


def test_an_autoencoder_that_has_no_layers_before_it_is_read_needs_its_weights(tmp_path: Path):
    with pytest.raises(RecipeError, match="missing: diffusers"):
        measured(tmp_path, {"name": "diffusers", "class_name": "AutoencoderKLWan"})
    with pytest.raises(RecipeError, match="keeps the first frame alone"):
        wan = AUTOENCODERS.build({"name": "diffusers", "class_name": "AutoencoderKLWan"})
        bench._ways(bench.ClipBench(wan, {"name": "diffusers"}, "own", (64, 64), place_of("cpu", None, 1)), (), (32,))


def test_what_does_not_fit_is_said_and_longer_clips_are_not_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Full(Watched):
        def decode_stream(self, latents):
            if latents.shape[2] > 33:
                raise torch.OutOfMemoryError("full")
            yield from super().decode_stream(latents)

    monkeypatch.setattr(AUTOENCODERS, "build", lambda component: Full())
    rows = rows_of(measured(tmp_path, {"name": "pixels"}, frames=(80, 40, 33), ways=("exact", "whole")), "clip")
    assert [(row["way"], row["frames"], "ms" in row) for row in rows] == [
        ("exact", 33, True), ("exact", 40, False), ("whole", 33, True), ("whole", 40, True), ("whole", 80, True),
    ]  # fmt: skip
    assert rows[1]["note"] == "out of memory" and "encode_s" in rows[1] and "decode_s" not in rows[1]
    assert "out of memory" in PAGE["autoencoder"].lines({"a": {"rows": rows}})[2]


# targets


def clips(way: str, *sizes: tuple[int, float, float]) -> list[dict]:
    row = {"name": "clip", "autoencoder": "tae_small", "way": way, "size": [512, 512]}
    return [row | {"frames": n, "encode_gib": a, "decode_gib": b} for n, a, b in sizes]


def test_targets_of_constant_memory():
    rows = clips("exact", (272, 2.0, 3.0), (1088, 2.1, 3.6))
    head = {"device": "a GPU", "versions": {}, "date": "2026-01-02", "commit": "abc", "command": "lingen bench tae"}
    told = {line[0]: line[5:] for line in PAGE["targets"].lines({"tae": head | {"rows": rows}})}
    assert told["memory to encode 68 s, exact (x that of 17 s)"] == ["1.05", "reached", "tae"]
    assert told["memory to decode 68 s, exact (x that of 17 s)"] == ["1.2", "missed by 9.1%", "tae"]


# the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "tae.json"
    words = ["--quick", "--frames", "4", "--size", "8x8", "--ways", "exact", "--budget", "1e-9", "--out", str(out)]
    assert main(["bench", "tae", *WORDS, *words]) == 0
    held = json.loads(out.read_text())
    assert held["autoencoder"]["name"] == "tae" and held["device"].startswith("CPU")
    assert {row["name"] for row in held["rows"]} == {"clip", "agreement"}
    assert "encode, s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--autoencoder", "nope"], "There is no autoencoder called 'nope'"),
        (["--recipe", "tae_8x8x8", "--autoencoder", "tae"], "either --recipe R"),
        (["autoencoder.width=8"], "'autoencoder.width=8' changes a recipe"),
        (
            [*WORDS, "--size", "15x16"],
            "--size 15x16: height and width of what 'tae' takes must be multiples of 2 and 2",
        ),
        (["--autoencoder", "pixels", "--ways", "exact"], "cannot go the way 'exact'; it has tiled, whole"),
        (["--quick", "--device", "cuda"], "--quick measures on the CPU"),
        (["--frames", "0"], "'0' is no whole number above 0"),
        (["--size", "x"], "no height x width"),
        (["--autoencoder", "diffusers"], "'diffusers' needs strides"),
    ],
)
def test_a_wrong_use_is_one_sentence(words, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "tae", "--device", "cpu", *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "bench").exists()


def test_an_autoencoder_without_layers_of_its_own_is_measured(tmp_path: Path):
    rows = measured(tmp_path, {"name": "pixels"}, frames=(4,))
    assert [row["way"] for row in rows_of(rows, "clip")] == ["tiled", "whole"]
    assert {row["weights"] for row in rows} == {"own"}
    assert all(row["tiled_pixels"] < 1e-6 for row in rows_of(rows, "agreement"))


def test_products_in_bfloat16_where_that_is_asked_for(tmp_path: Path):
    rows = measured(tmp_path, tae_component(), frames=(4,), ways=("exact",), precision="bf16")
    assert rows_of(rows, "clip")[0]["dtype"] == "bfloat16"
    lower, wide = ({row["frames"]: row for row in rows if row["dtype"] == d} for d in ("bfloat16", "float64"))
    assert lower[33]["exact_pixels"] < 0.1 and wide[33]["exact_pixels"] < 1e-10
