"""``lingen bench tae``: clips of any length through an autoencoder and back, and how far its ways are apart."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lingen.autoencoder.tiling import Tiles
from lingen.autoencoder.ways import WAYS, decode, encode, ways_of
from lingen.bench.build import best_device, draw, dtype_name, precision_of
from lingen.bench.model import free
from lingen.bench.results import GIB, Results, Row, Say
from lingen.bench.run import PRECISIONS
from lingen.bench.timing import Work, allocated, interleaved, or_none, peak_bytes
from lingen.frozen import check_ready, missing_of
from lingen.media import as_frames
from lingen.metrics.reconstruction import psnr
from lingen.recipe.registry import AUTOENCODERS, RecipeError, SettingError
from lingen.recipe.sizes import check_frames

PIECE = 32
"""Frames that an encoder is handed at a time."""
WARM_UP = 64
"""Frames that go through unmeasured first, at most: pieces from the start, the middle and the end of a clip."""
TILES = Tiles()
"""Movie Gen's."""


@dataclass(frozen=True)
class Scale:
    """What is measured where nothing else is said."""

    frames: tuple[int, ...]
    size: tuple[int, int]
    compared: tuple[int, ...]
    """Lengths at which the ways are compared."""
    side: int
    """The most pixels a side of the frames that are compared."""


FULL = Scale((272, 1088), (512, 512), (1, 2, 7, 33, 100), 128)
QUICK = Scale((16, 64), (64, 64), (1, 2, 7, 33), 32)
"""On a CPU."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `lingen bench tae` was asked for; see its help."""

    autoencoder: dict[str, Any]
    """A component of a recipe."""
    frames: tuple[int, ...] = ()
    size: tuple[int, int] | None = None
    ways: tuple[str, ...] = ()
    precision: str | None = None
    device: str | None = None
    budget: float | None = None
    commit: str | None = None


@dataclass(frozen=True)
class ClipBench:
    """An autoencoder where it is measured."""

    autoencoder: Any
    about: Row
    """Begins its rows."""
    ways: Sequence[str]
    size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    """Of products: bfloat16 is by autocast, as where clips are sampled."""
    budget: float


def bench_autoencoder(asked: Request, out: Path, say: Say) -> Results:
    """A row for each way and length, shortest first, and one for each length at which the ways are compared.

    Raises RecipeError for settings, sizes, lengths and ways that the autoencoder does not take, before any is measured.
    """
    device = best_device(asked.device)
    scale = QUICK if device.type == "cpu" else FULL
    dtype = PRECISIONS[asked.precision] if asked.precision else precision_of(device)
    size, lengths = asked.size or scale.size, sorted(set(asked.frames or scale.frames))
    autoencoder, weights = _built(asked.autoencoder, device, say)
    ways = _ways(autoencoder, asked, size, lengths)
    about = {"name": "clip", "autoencoder": asked.autoencoder["name"], "weights": weights}
    bench = ClipBench(autoencoder, about, ways, size, device, dtype, asked.budget or 0.5)
    settings = {key: value for key, value in asked.autoencoder.items() if key != "path"}
    results = Results(out, {"autoencoder": settings}, device, say, asked.commit)
    streamed = [way for way in ways if way != "whole"]
    for way in streamed:
        _clips(bench, way, lengths, results)
    _compare(replace(bench, ways=streamed), scale, results)
    if "whole" in ways:  # last: it may take all the memory, and more
        _clips(bench, "whole", lengths, results)
    return results


def _built(component: dict[str, Any], device: torch.device, say: Say) -> tuple[Any, str]:
    """The autoencoder on its device, and which weights it has: random ones where its own are missing.

    Raises RecipeError where these are missing and it has no layers without them.
    """
    torch.manual_seed(0)
    try:
        with device:
            autoencoder: Any = AUTOENCODERS.build(component)
    except SettingError as error:
        raise RecipeError(f"{error} (at autoencoder.{error.setting})") from error
    autoencoder.to(device).eval().requires_grad_(False)
    missing = missing_of([autoencoder])
    if not missing:
        return autoencoder, "own"
    if not any(True for _ in autoencoder.parameters()):
        check_ready([autoencoder])
    draw(autoencoder)
    # Who is given weights reads none.
    autoencoder.load_state_dict(autoencoder.state_dict())
    say(f"Random weights, which change nothing about speed and memory; missing: {missing[0].name}: {missing[0].cure}")
    return autoencoder, "random"


def _ways(autoencoder: Any, asked: Request, size: tuple[int, int], lengths: Sequence[int]) -> list[str]:
    """The ways to go, in the order of `WAYS`."""
    name, across = asked.autoencoder["name"], autoencoder.strides[1:]
    if size[0] % across[0] or size[1] % across[1]:
        raise RecipeError(
            f"--size {size[0]}x{size[1]}: height and width of what '{name}' takes must be multiples of {across[0]} and "
            f"{across[1]}."
        )
    able = ways_of(autoencoder)
    wrong = [way for way in asked.ways if way not in able]
    if wrong:
        raise RecipeError(f"The autoencoder '{name}' cannot go the way '{wrong[0]}'; it has {', '.join(able)}.")
    ways = [way for way in able if way in (asked.ways or WAYS)]
    try:
        for frames in lengths:
            check_frames(frames, autoencoder)
        if "tiled" in ways:
            TILES.cells(autoencoder.strides, "overlap")
    except SettingError as error:
        raise RecipeError(f"{error} (autoencoder '{name}')") from error
    return ways


def _warm_up(autoencoder: Any, shortest: int) -> int:
    """Frames of the warm-up: no more than the shortest clip has, one more where the first latent frame holds one."""
    return min(shortest, WARM_UP + getattr(autoencoder, "first_frame_alone", False))


# long clips


def _clips(bench: ClipBench, way: str, lengths: Sequence[int], results: Results) -> None:
    """A warm-up, then a row for each length until one does not fit."""
    results.say(f"{way}: a warm-up")
    or_none(partial(_measure, bench, {}, way, _warm_up(bench.autoencoder, lengths[0])))
    for frames in lengths:
        row = results.add(_clip_row(bench, way, frames))
        free(bench.device)
        if "ms" not in row:
            return


def _clip_row(bench: ClipBench, way: str, frames: int) -> Row:
    """Without `ms`, and with a note, where the GPU has not enough memory."""
    row: Row = {**bench.about, "way": way, "frames": frames, "size": bench.size, "dtype": dtype_name(bench.dtype)}
    row["ms"] = or_none(partial(_measure, bench, row, way, frames))
    return row if row["ms"] is not None else row | {"note": "out of memory"}


def _measure(bench: ClipBench, row: Row, way: str, frames: int) -> float:
    """Milliseconds of encoding and decoding; the row gets the seconds, the memory and the latents' size.

    Encoding begins with a clip that is made on the device and ends with its latents on the CPU; decoding begins there
    and ends with frames in 8 bits on the CPU.
    """
    held: dict[str, Tensor] = {}

    def encoding() -> None:
        held["latents"] = encode(bench.autoencoder, clip(frames, bench.size, bench.device), way, TILES).cpu()

    def decoding() -> None:
        left = frames
        for piece in decode(bench.autoencoder, held["latents"].to(bench.device), way, TILES):
            left -= len(as_frames(piece[:, :, :left])) if left else 0
        if left:
            raise ValueError(f"{left} of {frames} frames are missing from what the autoencoder decoded.")

    total = 0.0
    for half, work in (("encode", encoding), ("decode", decoding)):
        with _modes(bench, way):
            ms, peak, above = _timed(bench, work)
        total += ms
        row |= {f"{half}_s": ms / 1e3, f"{half}_gib": above}
        row["gib"] = peak if peak is None else max(peak, row.get("gib", 0.0))
    row |= {"frames_per_second": 1e3 * frames / total, "latents": [*held["latents"].shape[1:]]}
    row["weights_gib"] = sum(one.nbytes for one in bench.autoencoder.state_dict().values()) / GIB
    return total


def _timed(bench: ClipBench, work: Work) -> tuple[float, float | None, float | None]:
    """Milliseconds, the peak of allocated GiB, and the peak above what was allocated before."""
    times: list[float] = []

    def run() -> None:
        times.extend(interleaved({"work": work}, bench.device, bench.budget, warm=False)["work"])

    if bench.device.type != "cuda":
        run()
        return statistics.median(times), None, None
    before = allocated(bench.device)
    peak = peak_bytes(run, bench.device)
    return statistics.median(times), peak / GIB, (peak - before) / GIB


@contextmanager
def _modes(bench: ClipBench, way: str) -> Iterator[None]:
    """Autocast in bfloat16. Gradients are off but for `whole`: without them TAE goes piece by piece of itself. The
    weights are frozen, so that nothing is kept for a backward pass."""
    lower = bench.dtype == torch.bfloat16
    with torch.set_grad_enabled(way == "whole"), torch.autocast(bench.device.type, torch.bfloat16, enabled=lower):
        yield


def clip(
    frames: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32
) -> Iterator[Float[Tensor, "1 3 _t h w"]]:
    """Waves in -1..1 that move, each colour's in a way of its own, in pieces of `PIECE` frames: made as they are asked
    for, every frame from its number alone."""
    y, x = (torch.arange(side, device=device, dtype=dtype) for side in size)
    colour = torch.arange(3, device=device, dtype=dtype).view(3, 1, 1, 1)
    for start in range(0, frames, PIECE):
        t = torch.arange(start, min(start + PIECE, frames), device=device, dtype=dtype).view(-1, 1, 1)
        across, down = 0.07 * x + (0.2 + 0.1 * colour) * t, 0.05 * y[:, None] - 0.13 * t + colour
        yield (across.sin() * down.cos())[None]


# how far the ways are apart


def _compare(bench: ClipBench, scale: Scale, results: Results) -> None:
    """In the run's precision and in float64, where a way that is exact differs by rounding alone."""
    strides = bench.autoencoder.strides[1:]
    height, width = (
        min(asked, max(1, scale.side // stride) * stride) for asked, stride in zip(bench.size, strides, strict=True)
    )
    small = replace(bench, size=(height, width))
    wide = replace(small, autoencoder=copy.deepcopy(bench.autoencoder).double(), dtype=torch.float64)
    for one in (small, wide) if bench.ways else ():
        for frames in scale.compared:
            if _takes(one.autoencoder, frames):
                results.add(_agreement(one, frames))


def _takes(autoencoder: Any, frames: int) -> bool:
    try:
        check_frames(frames, autoencoder)
    except SettingError:
        return False
    return True


def _agreement(bench: ClipBench, frames: int) -> Row:
    """Against the clip in one call: the largest difference of a latent; of decodes of that call's latents the largest
    difference of a colour, of -1..1, and PSNR."""
    given = torch.float64 if bench.dtype == torch.float64 else torch.float32
    row: Row = {**bench.about, "name": "agreement", "frames": frames, "size": bench.size}
    row["dtype"] = dtype_name(bench.dtype)
    latents: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    for way in ("whole", *bench.ways):
        with _modes(bench, way):
            pieces = clip(frames, bench.size, bench.device, given)
            latents[way] = encode(bench.autoencoder, pieces, way, TILES)
            video = torch.cat(list(decode(bench.autoencoder, latents["whole"], way, TILES)), 2)
        decoded[way] = video[:, :, :frames].double().clamp(-1, 1)
    for way in bench.ways:
        difference = decoded[way] - decoded["whole"]
        row[f"{way}_latents"] = float((latents[way].double() - latents["whole"].double()).abs().max())
        row[f"{way}_pixels"] = float(difference.abs().max())
        row[f"{way}_psnr"] = psnr(float((difference / 2).square().mean()))
    return row
