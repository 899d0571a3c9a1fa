"""Evaluates an autoencoder on a recipe's clips, beside bicubic scaling to as many numbers."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lingen.autoencoder import Autoencoder
from lingen.autoencoder.ways import PIECE_FRAMES, decode, encode, tiles_of, way_for, ways_of
from lingen.data import synthetic as drawn
from lingen.data.batch import Batch, Progress, no_progress
from lingen.data.buckets import Pool
from lingen.data.datamodule import ClipData
from lingen.files import check_place, write_json
from lingen.frozen import check_ready, missing_of
from lingen.media import as_floats, as_frames, beside, contact_sheet, error_frames, save_video, sheet_frames
from lingen.metrics.reconstruction import LEAST_SIDE, Comparison, Quality, average, bicubic, bicubic_shape, mse_to_psnr
from lingen.provenance import git_commit, versions
from lingen.recipe.errors import RecipeError
from lingen.recipe.registry import AUTOENCODERS, PERCEPTUAL
from lingen.recipe.sections import PerKind, Recipe

PAPER = {"video": {"psnr": 32.25, "ssim": 0.909}, "image": {"psnr": 32.16, "ssim": 0.923}}
"""Movie Gen's TAE (arXiv 2410.13720, section 3.1.1) on its authors' clips of 512 pixels: for scale only."""
CLIPS_SHOWN, COLUMNS = 3, 8
"""Clips of each kind in the picture, and frames of each clip."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for."""

    clips: int = 8
    """Clips of each kind."""
    way: str | None = None
    """One of `WAYS`; None: exact where the autoencoder has streams, else whole."""
    tile: tuple[int, int] | None = None
    """Height and width in pixels of the tiles of the way ``tiled``; None: space is not cut."""
    compare: bool = False
    device: str = "cpu"


def evaluate(recipe: Recipe, asked: Request, out: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Judges the recipe's autoencoder; writes ``metrics.json``, ``side_by_side.png`` and ``side_by_side.mp4``.
    RecipeError for missing weights or shards, shards of latents, sizes or ways that the autoencoder does not have, and
    an `out` that is a file; DataError where no sample fits.

    Args:
        recipe: a loaded stage.
        out: a folder.
    Returns:
        what metrics.json holds: `rows`, each the means over the clips of a kind; `clips`, the numbers of each clip;
        `compare`; `notes`, sentences that a reader should see."""
    check_place(out)
    recipe = _of_one_shape(recipe, asked.clips)
    judge = _Judge(recipe, asked, out)
    sources = {
        kind: _Source(recipe, kind, asked.clips) for kind in ("video", "image") if getattr(recipe.data.mix, kind)
    }
    (out / "side_by_side.mp4").unlink(missing_ok=True)  # images alone make no film
    total, done = sum(source.clips for source in sources.values()), 0
    for kind, source in sources.items():
        for batch in source.batches():
            judge.clip(kind, batch)
            done += 1
            progress(done, total)
        judge.notes += source.notes()
    result = {
        "recipe": recipe.name, "stage": recipe.stage, "autoencoder": recipe.autoencoder, "way": judge.way,
        "data": {kind: source.about(recipe) for kind, source in sources.items()}, **judge.result(),
        "paper": PAPER, "commit": git_commit(), "versions": versions(),
    }  # fmt: skip
    judge.picture()
    write_json(out / "metrics.json", result)
    return result


def _of_one_shape(recipe: Recipe, clips: int) -> Recipe:
    """Single clips of ``data.frames`` and ``data.size``, and so many held-out ones."""
    synthetic = recipe.data.synthetic
    if synthetic and "images" in synthetic:  # as many as are evaluated, which are the first of the held-out ones
        synthetic = {**synthetic, "clips": 1, "images": 1, "held_out": min(clips, drawn.settings(synthetic).held_out)}
    data = replace(recipe.data, lengths=[], sizes=[], batch=PerKind(), workers=0, synthetic=synthetic)
    return replace(recipe, data=data, train=replace(recipe.train, validation_samples=clips))


class _Source:
    """Clips of one kind: held-out ones, else those that are trained on."""

    def __init__(self, recipe: Recipe, kind: str, clips: int):
        mix = PerKind(image=int(kind == "image"), video=int(kind == "video"))
        self.kind = kind
        self.data = ClipData(replace(recipe, data=replace(recipe.data, mix=mix)))
        self.data.setup()
        held_out = self.data.validation.pools.get(kind)
        self.setting = f"data.{'shards' if held_out is None else 'validation'}.{kind}"
        self.pool: Pool = self.data.train.pools[kind] if held_out is None else held_out
        if self.pool.index.encoded:
            raise RecipeError(
                f"{self.setting} names shards of latents, and a reconstruction is compared with pixels: name shards of "
                f"clips, {self.setting}=..."
            )
        self.held_out = held_out is not None
        self.clips = min(clips, len(self.pool))
        self.drops: list[str] = []

    def batches(self) -> Iterator[Batch]:
        """Batches of one clip."""
        loaded = self.data.val_dataloader() if self.held_out else self.data.batches()
        for batch in islice(loaded, self.clips):
            self.drops += [f"{drop.where}: {drop.reason}" for drop in batch.drops]
            yield batch

    def notes(self) -> list[str]:
        """What a reader should know of these clips."""
        clips = "clip" if self.clips == 1 else "clips"
        which = f"held-out {clips}" if self.held_out else f"{clips} to train on: no held-out ones are named"
        told = [f"{self.kind}: {self.clips} {which} ({self.setting})"]
        told += [f"{self.kind}: left out {out.number} x {why}" for why, out in self.pool.left_out.items()]
        if self.drops:
            told.append(f"{self.kind}: {len(self.drops)} were replaced, such as {self.drops[0]}")
        return told

    def about(self, recipe: Recipe) -> dict[str, Any]:
        frames = recipe.data.frames if self.kind == "video" else 1
        fps = recipe.data.fps if self.kind == "video" else 0.0
        return {"setting": self.setting, "clips": self.clips, "frames": frames, "size": recipe.data.size, "fps": fps}


class _Judge:
    """The autoencoder on its device, and its scores, collected clip by clip; all settings are checked first."""

    def __init__(self, recipe: Recipe, asked: Request, out: Path):
        self.recipe, self.asked, self.out = recipe, asked, out
        self.name = recipe.autoencoder["name"]
        autoencoder = AUTOENCODERS.build(recipe.autoencoder)
        if min(recipe.data.size) < LEAST_SIDE:
            height, width = recipe.data.size
            least = f"{LEAST_SIDE} pixels a side are the least (at data.size)"
            raise RecipeError(f"Frames of {height}x{width} are too small to be compared: {least}.")
        self.way = way_for(autoencoder, asked.way, self.name)
        self.tiles = tiles_of(asked.tile, autoencoder.strides)
        check_ready([autoencoder])
        self.autoencoder: Autoencoder = autoencoder.to(asked.device).eval().requires_grad_(False)
        self.notes: list[str] = []
        self.perceptual = self._perceptual()
        self.scores: dict[tuple[str, str], list[Quality]] = {}
        self.numbers: dict[tuple[str, str], float] = {}
        """Numbers of the latents as a share of those of the clip."""
        self.clips: list[dict[str, Any]] = []
        self.between: dict[str, dict[str, list[float]]] = {}
        self.shown: dict[str, list[np.ndarray]] = {"video": [], "image": []}
        self.spread: dict[str, list[tuple[float, float]]] = {}

    def _perceptual(self) -> nn.Module | None:
        component = self.recipe.reconstruction.features
        network = PERCEPTUAL.build(component)
        missing = missing_of([network])
        if component["name"] == "none" or missing:
            why = "; ".join(f"{one.name} {one.path}: {one.cure}" for one in missing)
            self.notes.append(f"no perceptual distance: {why or 'reconstruction.features.name is none'}")
            return None
        return network.to(self.asked.device).eval().requires_grad_(False)

    @torch.no_grad()
    def clip(self, kind: str, batch: Batch) -> None:
        """Encodes, decodes and compares the one clip of a batch."""
        clip = batch.clips
        latents = encode(self.autoencoder, self._pieces(clip), self.way, self.tiles)
        if not torch.isfinite(latents).all():
            raise ValueError(f"The latents of {batch.keys[0]} hold NaN or infinity.")
        found = {self.name: self._score(clip, decode(self.autoencoder, latents, self.way, self.tiles), kind)}
        kept, full = latents.numel(), clip.numel()
        self.numbers[kind, self.name] = kept / full
        self.spread.setdefault(kind, []).append((float(latents.float().mean()), float(latents.float().std())))
        for what, in_time in (("bicubic, space", False), ("bicubic, space and time", True)):
            shape = bicubic_shape(clip.shape[2:], kept, in_time=in_time)
            if kept < full and (clip.shape[2] > 1 or not in_time):
                found[what] = self._score(clip, bicubic(self._pieces(clip), shape))
                self.numbers[kind, what] = 3 * math.prod(shape) / full
        for what, quality in found.items():
            self.scores.setdefault((kind, what), []).append(quality)
        self.clips.append({"kind": kind, "key": batch.keys[0], **{what: asdict(one) for what, one in found.items()}})
        if self.asked.compare:
            self._compare_ways(kind, clip)

    def _pieces(self, clip: Tensor) -> Iterator[Tensor]:
        """uint8 [1 3 t h w] -> pieces in -1..1 on the device."""
        return (as_floats(piece.to(self.asked.device)) for piece in clip.split(PIECE_FRAMES, 2))

    def _score(self, clip: Tensor, rebuilt: Iterator[Tensor], kind: str = "") -> Quality:
        """The score; the first clips of a kind that is named also go into the picture and the film."""
        comparison = Comparison(self.perceptual)
        shown = bool(kind) and len(self.shown[kind]) < 3 * CLIPS_SHOWN
        film = kind == "video" and not self.shown[kind]
        picks = sorted(sheet_frames(clip.shape[2], COLUMNS))
        stills: list[tuple[np.ndarray, np.ndarray]] = []

        def frames() -> Iterator[np.ndarray]:
            start = 0
            for pair in pairs(self._pieces(clip), rebuilt):
                comparison.add(*pair)
                if shown:
                    one, other = map(as_frames, pair)
                    here = [at - start for at in picks if start <= at < start + len(one)]
                    stills.extend((one[at], other[at]) for at in here)
                    start += len(one)
                    yield from beside(one, other)

        if film:
            save_video(frames(), self.out / "side_by_side.mp4", self.recipe.data.fps, title=f"clip | {self.name}")
        else:
            for _ in frames():
                pass
        if shown:
            one, other = (np.stack(side) for side in zip(*stills, strict=True))
            self.shown[kind] += [one, other, error_frames(one, other)]
        return comparison.result()

    def _compare_ways(self, kind: str, clip: Tensor) -> None:
        """Differences between the ways: PSNR of decodes of the same latents, relative RMS of latents of the same
        clip. Without a tile, nothing is cut and ``tiled`` is left out."""
        skipped = () if self.tiles else ("tiled",)
        ways = [way for way in reversed(ways_of(self.autoencoder)) if way not in skipped]
        encoded = {way: encode(self.autoencoder, self._pieces(clip), way, self.tiles).float() for way in ways}
        decoded = {way: torch.cat([*decode(self.autoencoder, encoded["whole"], way, self.tiles)], 2) for way in ways}
        decoded = {way: video[:, :, : clip.shape[2]].float().clamp(-1, 1) / 2 for way, video in decoded.items()}
        for number, way in enumerate(ways):
            for other in ways[:number]:
                held = self.between.setdefault(f"{kind}: {way} against {other}", {"psnr": [], "latents": []})
                held["psnr"].append(mse_to_psnr(float((decoded[way] - decoded[other]).square().mean())))
                difference = (encoded[way] - encoded[other]).square().mean() / encoded[other].square().mean()
                held["latents"].append(math.sqrt(float(difference)))

    def result(self) -> dict[str, Any]:
        rows = [
            {"kind": kind, "what": what, "numbers": self.numbers[kind, what], **average(scores)}
            for (kind, what), scores in self.scores.items()
        ]
        spread = {
            kind: {"mean": sum(a for a, _ in each) / len(each), "std": sum(b for _, b in each) / len(each)}
            for kind, each in self.spread.items()
        }
        between = {name: {what: sum(v) / len(v) for what, v in each.items()} for name, each in self.between.items()}
        return {"rows": rows, "latents": spread, "compare": between, "notes": self.notes, "clips": self.clips}

    def picture(self) -> None:
        """Rows: clip, reconstruction, four times their difference."""
        strips = [strip for kind in self.shown.values() for strip in kind]
        names = ["clip", self.name, "error x 4"] * (len(strips) // 3)
        contact_sheet(strips, self.out / "side_by_side.png", names, COLUMNS)


def pairs(clip: Iterator[Tensor], rebuilt: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Two streams of one clip in steps of the same frames; surplus frames of the second are dropped. ValueError where
    the second has fewer frames."""
    held: Tensor | None = None
    for piece in clip:
        while held is None or held.shape[2] < piece.shape[2]:
            more = next(rebuilt, None)
            if more is None:
                raise ValueError("The autoencoder gave fewer frames than the clip has.")
            held = more if held is None else torch.cat([held, more], 2)
        yield piece, held[:, :, : piece.shape[2]]
        held = held[:, :, piece.shape[2] :]
