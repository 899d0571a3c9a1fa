"""The targets, what stock parts reach, and whether stored results reach the targets: ``lingen bench show``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from lingen.recipe.sections import KINDS

from .paper import FORWARDS, TOKENS_17S, TOKENS_68S
from .place import FP8
from .results import Fields
from .tables import Files, as_text, ratio, row_of

FRAMES_17S, FRAMES_68S = 272, 1088
"""Frames of clips of 17 and 68 seconds, at 16 a second."""


@dataclass(frozen=True)
class Target:
    """A target: `reach` is the largest value that passes, the smallest where `more` is better; None: only `stretch`."""

    name: str
    unit: str
    find: Callable[[Fields], float | None]
    reach: float | None
    stretch: float | None = None
    paper: float | None = None
    stock: float | None = None
    more: bool = False

    def passes(self, value: float, bar: float) -> bool:
        return value >= bar if self.more else value <= bar

    def verdict(self, value: float | None) -> str:
        """``reached``, ``reached, stretch too``, ``missed by 12%`` or ``not measured``."""
        bar, word = (self.stretch, "stretch ") if self.reach is None else (self.reach, "")
        if value is None or bar is None:
            return "not measured"
        if not self.passes(value, bar):
            return f"{word}missed by {abs(value / bar - 1):.1%}"
        both = self.reach is not None and self.stretch is not None and self.passes(value, self.stretch)
        return f"{word}reached{', stretch too' if both else ''}"


def lingen_forward(result: Fields, tokens: int, dtype: str = "bfloat16") -> Fields:
    """The row of LinGen's full depth at batch 1 with lingen's kernels."""
    return row_of(result, name="forward", mixer="mate", kernel="auto", tokens=tokens, dtype=dtype, batch=1)


# How a target finds its value in one result file, which is of one run; None where it is not there.


def _seconds(result: Fields, tokens: int, dtype: str = "bfloat16") -> float | None:
    """Seconds of 100 forwards of LinGen's full depth."""
    ms = lingen_forward(result, tokens, dtype).get("ms")
    return None if ms is None else ms * FORWARDS / 1e3


def _over_dit(result: Fields, kernel: str) -> float | None:
    """Latency of the DiT twin over LinGen's in bfloat16 at 68 s."""
    twin = row_of(result, name="forward", mixer="attention", tokens=TOKENS_68S, kernel=kernel)
    return ratio(twin.get("ms"), lingen_forward(result, TOKENS_68S).get("ms"))


def _peak(result: Fields) -> float | None:
    return lingen_forward(result, TOKENS_68S).get("gib")


def _over_stock(result: Fields, name: str, tokens: int, field: str) -> float | None:
    """Stock's time over ours of a part without its projections."""
    stock, ours = (row_of(result, name=name, tokens=tokens, kernel=kernel) for kernel in ("stock", "auto"))
    return ratio(stock.get(field), ours.get(field))


def _review_share(result: Fields) -> float | None:
    """What the review tokens add to a forward, in per cent of it; both forwards of the same rounds."""
    row = row_of(result, name="variant", variant="without review tokens", tokens=TOKENS_17S)
    return 100 * (1 - row["ms"] / row["default_ms"]) if row else None


def _growth(result: Fields, cost: str) -> float | None:
    """Exponent of mate's cost over tokens, where it was measured on the long clips."""
    tokens = [row.get("tokens", 0) for row in result.get("rows", [])]
    fit = result.get("fits", {}).get("mate", {}).get(cost)
    return fit["exponent"] if fit and max(tokens) >= 2 * TOKENS_68S else None


def _longer_clip(result: Fields, half: str) -> float | None:
    """Memory above the weights that a clip of 68 s takes over that of one of 17 s, both of 512x512."""
    rows = (row_of(result, name="clip", way="exact", frames=n, size=[512, 512]) for n in (FRAMES_68S, FRAMES_17S))
    return ratio(*(row.get(f"{half}_gib") for row in rows))


def _number(result: Fields, field: str, times: float = 1.0, **of: Any) -> float | None:
    """A number of the last row with these fields."""
    row = row_of(result, **of)
    return times * row[field] if field in row else None


def _loop_share(result: Fields, **of: Any) -> float | None:
    """What loader, callbacks and Lightning take of a step whose parts are timed, in per cent of it."""
    parts = row_of(result, **of).get("parts", {})
    own = sum(parts.get(part, 0) for part in ("data", "callbacks", "loop"))
    return 100 * own / sum(parts.values()) if parts else None


MA, TESA = "MA-branch without projections", "TESA without projections, shifted"
CUDNN, FLASH2 = "cudnn, compiled", "flash-attention-2, eager"
"""The kernels of the DiT twins that LinGen is compared with."""

LENGTHS = {"17 s": TOKENS_17S, "68 s": TOKENS_68S}
EMOJI = {"name": "fit", "recipe": "emoji_64", "compile": "graph"}
LARGE = {"name": "gpus", "act": "speed", "gpus": 1, "overrides": []}
"""Fields of rows in training: of a small model whose steps are graphs, and of LinGen-4B on one GPU."""

TARGETS = (
    Target("100 forwards, 17 s", "s", partial(_seconds, tokens=TOKENS_17S), reach=53, paper=102, stock=76),
    Target(
        "100 forwards, 17 s, fp8", "s", partial(_seconds, tokens=TOKENS_17S, dtype=FP8), None, 36, paper=102, stock=76
    ),
    Target("100 forwards, 68 s", "s", partial(_seconds, tokens=TOKENS_68S), reach=215, paper=430, stock=312),
    Target(
        "100 forwards, 68 s, fp8", "s", partial(_seconds, tokens=TOKENS_68S, dtype=FP8), None, 145, paper=430, stock=312
    ),
    Target(
        "DiT / LinGen, 68 s, cuDNN compiled", "x", partial(_over_dit, kernel=CUDNN), 6, 8, paper=11.5, stock=4.3,
        more=True,
    ),
    Target(
        "DiT / LinGen, 68 s, FlashAttention-2 eager", "x", partial(_over_dit, kernel=FLASH2), 10.5, paper=11.5,
        stock=7.5, more=True,
    ),
    Target("peak memory, 68 s", "GiB", _peak, reach=22),
    *(
        Target(
            f"{part}, {length}, {how}", "x stock", partial(_over_stock, name=part, tokens=tokens, field=field), bar,
            more=True,
        )
        for part, how, field, bar in (
            (MA, "forward", "ms", 3.0),
            (MA, "forward and backward", "train_ms", 2.0),
            (TESA, "forward", "ms", 3.0),
        )
        for length, tokens in LENGTHS.items()
    ),
    Target("review tokens, 17 s", "% of a forward", _review_share, reach=1.5, paper=4),
    Target("time of mate ~ tokens^", "", partial(_growth, cost="time"), reach=1.03),
    Target("memory of mate ~ tokens^", "", partial(_growth, cost="memory"), reach=1.03),
    *(
        Target(f"memory to {half} 68 s, exact", "x that of 17 s", partial(_longer_clip, half=half), reach=1.1)
        for half in ("encode", "decode")
    ),
    Target("emoji_64, image step", "ms", partial(_number, field="ms", kind="image", **EMOJI), reach=30),
    Target("emoji_64, video step", "ms", partial(_number, field="ms", kind="video", **EMOJI), reach=42),
    *(
        Target(
            f"emoji_64, {kind} step, GPU busy", "%", partial(_number, field="busy", times=100, kind=kind, **EMOJI), 80,
            more=True,
        )
        for kind in KINDS
    ),
    *(
        Target(f"emoji_64, {kind} step, loop", "% of a timed step", partial(_loop_share, kind=kind, **EMOJI), reach=10)
        for kind in KINDS
    ),
    *(
        Target(
            f"LinGen-4B trains, {length}", "tokens/s",
            partial(_number, field="tokens_per_second", stage=f"t2v_512_{length.replace(' ', '')}", **LARGE), *bars,
            more=True,
        )
        for length, bars in (("17 s", (17_000, 18_000)), ("68 s", (15_000,)))
    ),
    Target(
        "LinGen-4B of half the depth trains, 17 s, nothing recomputed", "% MFU",
        partial(_number, field="mfu", times=100, **LARGE | {"overrides": ["model.depth=14"], "checkpointing": "false"}),
        43, more=True,
    ),
    Target("LinGen-4B trains, 17 s, loop", "% of a timed step", partial(_loop_share, stage="t2v_512_17s", **LARGE), 2),
)  # fmt: skip


def targets(files: Files) -> Iterator[Fields]:
    """Each bar with the paper's, stock's and our number: that of the newest file that has one."""
    for target in TARGETS:
        found = {name: target.find(file) for name, file in files.items()}
        dates = [(files[name].get("date", ""), name) for name, value in found.items() if value is not None]
        file = max(dates)[1] if dates else ""
        ours, sign = found.get(file), ">=" if target.more else "<="
        reach, stretch = (None if bar is None else f"{sign} {as_text(bar)}" for bar in (target.reach, target.stretch))
        yield {
            "what": f"{target.name} ({target.unit})" if target.unit else target.name, "paper": target.paper,
            "stock": target.stock, "reach": reach, "stretch": stretch, "ours": ours, "verdict": target.verdict(ours),
            "file": file,
        }  # fmt: skip
