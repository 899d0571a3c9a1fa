"""``lingen bench tae``: encoding and decoding clips of any length, and how far the results of an autoencoder's ways
(see `lingen.autoencoder.ways`) are apart."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lingen.autoencoder import Autoencoder
from lingen.autoencoder.ways import PIECE_FRAMES, WAYS, Tiles, decode, encode, tiles_of, ways_of
from lingen.frozen import check_ready, missing_of
from lingen.media import as_frames
from lingen.metrics.reconstruction import mse_to_psnr
from lingen.recipe.errors import RecipeError, SettingError
from lingen.recipe.registry import AUTOENCODERS
from lingen.recipe.sizes import check_frames

from .build import draw_weights
from .place import Place, dtype_name
from .results import GIB, Fields, Results, Say
from .timing import costs, free, held

WARM_UP = 64
"""Frames that go through unmeasured first, at most: pieces from the start, the middle and the end of a clip."""


class Scale(NamedTuple):
    """The defaults of what is measured."""

    frames: tuple[int, ...]
    size: tuple[int, int]
    compared: tuple[int, ...]
    """Lengths at which the ways are compared."""
    side: int
    """Largest height and width in pixels of the frames that are compared."""


FULL = Scale((272, 1088), (512, 512), (1, 2, 7, 33, 100), 128)
QUICK = Scale((16, 64), (64, 64), (1, 2, 7, 33), 64)
"""The defaults on a CPU."""


@dataclass(frozen=True)
class ClipBench:
    """An autoencoder where it is measured."""

    autoencoder: Autoencoder
    component: dict[str, Any]
    """Its name and settings in a recipe."""
    weights: str
    """``own`` or ``random``"""
    size: tuple[int, int]
    place: Place
    """Products in bfloat16 are by autocast, as where clips are sampled."""

    @property
    def settings(self) -> dict[str, Any]:
        """The component as a result file names it: not where its weights lie."""
        return {key: value for key, value in self.component.items() if key != "path"}

    @property
    def tiles(self) -> Tiles | None:
        """Tiles of half a frame's height and width, where those are 4 latents or more; else frames are not cut."""
        _, down, across = self.autoencoder.strides
        half = self.size[0] // 2 // down * down, self.size[1] // 2 // across * across
        return tiles_of(half, self.autoencoder.strides) if min(half) >= 4 * math.lcm(down, across) else None

    def row(self, name: str, frames: int) -> Fields:
        """Begins a row."""
        about = {"name": name, "autoencoder": self.component["name"], "weights": self.weights}
        return about | {"frames": frames, "size": self.size, "dtype": dtype_name(self.place.dtype)}


def prepared(
    component: dict[str, Any],
    place: Place,
    say: Say,
    frames: Sequence[int] = (),
    size: tuple[int, int] | None = None,
    ways: Sequence[str] = (),
) -> tuple[ClipBench, list[int], list[str]]:
    """The autoencoder, the lengths, shortest first, and the ways to go, in the order of `WAYS`; all that it has where
    none is asked for. RecipeError for settings, sizes, lengths and ways that the autoencoder does not take."""
    scale = FULL if place.cuda else QUICK
    autoencoder, weights = _built(component, place.device, say)
    bench = ClipBench(autoencoder, component, weights, size or scale.size, place)
    lengths = sorted(set(frames or scale.frames))
    return bench, lengths, _ways(bench, ways, lengths)


def bench_autoencoder(bench: ClipBench, lengths: Sequence[int], ways: Sequence[str], results: Results) -> None:
    """A row for each way and length, and one for each length at which the ways are compared."""
    streamed = [way for way in ways if way != "whole"]
    for way in streamed:
        _clips(bench, way, lengths, results)
    _compare(bench, streamed, results)
    if "whole" in ways:  # last: it may take all the memory, and more
        _clips(bench, "whole", lengths, results)


def _built(component: dict[str, Any], device: torch.device, say: Say) -> tuple[Autoencoder, str]:
    """The autoencoder on its device, and which weights it has: random ones where its own are missing. RecipeError where
    these are missing and it has no layers without them."""
    torch.manual_seed(0)
    with device:
        autoencoder: Any = AUTOENCODERS.build(component)
    autoencoder.to(device).eval().requires_grad_(False)
    missing = missing_of([autoencoder])
    if not missing:
        return autoencoder, "own"
    if not any(True for _ in autoencoder.parameters()):
        check_ready([autoencoder])
    draw_weights(autoencoder)
    # An autoencoder into which weights were loaded reads none.
    autoencoder.load_state_dict(autoencoder.state_dict())
    say(f"Random weights, which change nothing about speed and memory; missing: {missing[0].name}: {missing[0].cure}")
    return autoencoder, "random"


def _ways(bench: ClipBench, asked: Sequence[str], lengths: Sequence[int]) -> list[str]:
    autoencoder, name, (height, width) = bench.autoencoder, bench.component["name"], bench.size
    _, down, across = autoencoder.strides
    if height % down or width % across:
        raise RecipeError(
            f"--size {height}x{width}: height and width of what '{name}' takes must be multiples of {down} and "
            f"{across}."
        )
    able = ways_of(autoencoder)
    wrong = [way for way in asked if way not in able]
    if wrong:
        raise RecipeError(f"The autoencoder '{name}' cannot go the way '{wrong[0]}'; it has {', '.join(able)}.")
    ways = [way for way in able if way in (asked or WAYS)]
    for frames in lengths:
        check_frames(frames, autoencoder)
    return ways


def _clips(bench: ClipBench, way: str, lengths: Sequence[int], results: Results) -> None:
    """A warm-up, then a row for each length until one does not fit."""
    results.say(f"{way}: a warm-up")
    # One frame more where the first latent frame holds one.
    _measured(bench, way, min(lengths[0], WARM_UP + getattr(bench.autoencoder, "first_frame_alone", False)))
    for frames in lengths:
        row = results.add(bench.row("clip", frames) | {"way": way} | _measured(bench, way, frames))
        free(bench.place.device)
        if "ms" not in row:
            return


def _measured(bench: ClipBench, way: str, frames: int) -> Fields:
    """Fields of a row: milliseconds of encoding and decoding, the seconds and the GiB above the weights of each, the
    latents' size; without `ms`, and with a note, where the GPU has not enough memory. Encoding begins with a clip that
    is made on the device and ends with its latents on the CPU; decoding begins there and ends with frames in 8 bits on
    the CPU."""
    kept: dict[str, Tensor] = {}
    device = bench.place.device

    def encoding() -> None:
        kept["latents"] = encode(bench.autoencoder, clip(frames, bench.size, device), way, bench.tiles).cpu()

    def decoding() -> None:
        left = frames
        for piece in decode(bench.autoencoder, kept["latents"].to(device), way, bench.tiles):
            left -= len(as_frames(piece[:, :, :left])) if left else 0
        if left:
            raise ValueError(f"{left} of {frames} frames are missing from what the autoencoder decoded.")

    row: Fields = {}
    for half, work in (("encode", encoding), ("decode", decoding)):
        before = held(device)
        with _modes(bench, way):
            cost = costs({half: work}, bench.place, cold=[half]).get(half)
        if cost is None:
            return row | {"note": "out of memory"}
        row |= {f"{half}_s": cost.ms / 1e3, f"{half}_gib": cost.fields(below=before)["gib"]}
        row["gib"] = cost.gib if cost.gib is None else max(cost.gib, row.get("gib", 0.0))
    row["ms"] = 1e3 * (row["encode_s"] + row["decode_s"])
    row |= {"frames_per_second": 1e3 * frames / row["ms"], "latents": [*kept["latents"].shape[1:]]}
    return row | {
        "weights_gib": sum(one.nbytes for one in cast(nn.Module, bench.autoencoder).state_dict().values()) / GIB
    }


@contextmanager
def _modes(bench: ClipBench, way: str) -> Iterator[None]:
    """Autocast in bfloat16. Gradients are off except for `whole`: without gradients, TAE streams. The
    weights are frozen, so that nothing is kept for a backward pass."""
    lower = bench.place.dtype == torch.bfloat16
    with torch.set_grad_enabled(way == "whole"):
        with torch.autocast(bench.place.device.type, torch.bfloat16, enabled=lower):
            yield


def clip(
    frames: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32
) -> Iterator[Float[Tensor, "1 3 _t h w"]]:
    """Moving waves in -1..1, different for each colour, in pieces of `PIECE_FRAMES`; each frame depends on its number
    alone and is made when it is needed."""
    y, x = (torch.arange(side, device=device, dtype=dtype) for side in size)
    colour = torch.arange(3, device=device, dtype=dtype).view(3, 1, 1, 1)
    for start in range(0, frames, PIECE_FRAMES):
        t = torch.arange(start, min(start + PIECE_FRAMES, frames), device=device, dtype=dtype).view(-1, 1, 1)
        across, down = 0.07 * x + (0.2 + 0.1 * colour) * t, 0.05 * y[:, None] - 0.13 * t + colour
        yield (across.sin() * down.cos())[None]


def _compare(bench: ClipBench, ways: Sequence[str], results: Results) -> None:
    """Compares the ways in the run's precision and in float64, in which exact ways differ by rounding alone."""
    scale = FULL if bench.place.cuda else QUICK
    strides = bench.autoencoder.strides[1:]
    height, width = (
        min(asked, max(1, scale.side // stride) * stride) for asked, stride in zip(bench.size, strides, strict=True)
    )
    small = replace(bench, size=(height, width))
    exact: Any = cast(nn.Module, copy.deepcopy(bench.autoencoder)).double()
    wide = replace(small, autoencoder=exact, place=bench.place._replace(dtype=torch.float64))
    for one in (small, wide) if ways else ():
        for frames in scale.compared:
            with suppress(SettingError):  # of a length that it does not take
                check_frames(frames, one.autoencoder)
                results.add(_agreement(one, ways, frames))


def _agreement(bench: ClipBench, ways: Sequence[str], frames: int) -> Fields:
    """Against the clip in one call: the largest difference of a latent; of decodes of that call's latents the largest
    difference of a colour, of -1..1, and PSNR."""
    given = torch.float64 if bench.place.dtype == torch.float64 else torch.float32
    latents: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    for way in ("whole", *ways):
        with _modes(bench, way):
            pieces = clip(frames, bench.size, bench.place.device, given)
            latents[way] = encode(bench.autoencoder, pieces, way, bench.tiles)
            video = torch.cat(list(decode(bench.autoencoder, latents["whole"], way, bench.tiles)), 2)
        decoded[way] = video[:, :, :frames].double().clamp(-1, 1)
    row = bench.row("agreement", frames)
    for way in ways:
        difference = decoded[way] - decoded["whole"]
        row[f"{way}_latents"] = float((latents[way].double() - latents["whole"].double()).abs().max())
        row[f"{way}_pixels"] = float(difference.abs().max())
        row[f"{way}_psnr"] = mse_to_psnr(float((difference / 2).square().mean()))
    return row
