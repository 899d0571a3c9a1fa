"""The targets, what the paper and stock parts reach, and whether stored results reach the targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lingen.bench.results import Row

FORWARDS = 100
"""Forwards of a clip: 50 steps, each with and without the text."""

TOKENS_17S, TOKENS_68S = 34_816, 139_264
"""Tokens of 512x512 for 17 and 68 seconds."""

FRAMES_17S, FRAMES_68S = 272, 1088
"""Frames of such clips, at 16 a second."""

PAPER_DIM = 2560
"""Width of the 4B models [ours; the paper gives their parameters only]."""


@dataclass(frozen=True)
class PaperSize:
    """LinGen's paper (arXiv 2412.09856) on one H100, 50 steps: seconds of the whole models, and its ratios."""

    tokens: int
    dit_seconds: float
    lingen_seconds: float
    latency_ratio: float
    flops_ratio: float | None


PAPER_SIZES = {
    "256x256 17 s": PaperSize(8_704, 30, 28, 1.1, 2),
    "512x512 17 s": PaperSize(TOKENS_17S, 209, 102, 2.0, 5),
    "512x512 34 s": PaperSize(69_632, 830, 210, 3.9, 8),
    "512x512 68 s": PaperSize(TOKENS_68S, 4930, 430, 11.5, 15),
    "768x768 17 s": PaperSize(78_336, 830, 231, 3.6, None),
}


@dataclass(frozen=True)
class Variant:
    """A row of the paper's latency table at 512x512, 17 s."""

    name: str
    paper_seconds: float
    overrides: tuple[str, ...] = ()


VARIANTS = (
    Variant("default", 102),
    Variant("without TESA", 94, ("model.mixer.te=null",)),
    Variant("without rotary-major scan", 99, ("model.mixer.scan=thw",)),
    Variant("zig-zag scan", 144, ("model.mixer.scan=zigzag",)),
    Variant("without MA-branch", 65, ("model.mixer.ma=null",)),
    Variant("without review tokens", 98, ("model.mixer.review=null",)),
)


@dataclass(frozen=True)
class Target:
    """A target: `reach` is the largest value that passes, the smallest where `more` is better; None: only `stretch`."""

    name: str
    unit: str
    find: Callable[[Row], float | None]
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


def row_of(result: Row, **fields: Any) -> Row:
    """The last row of a result file with these fields, or an empty one."""
    rows = reversed(result.get("rows", []))
    return next((row for row in rows if all(row.get(key) == value for key, value in fields.items())), {})


def ratio(above: float | None, below: float | None) -> float | None:
    """above / below where both are known."""
    return above / below if above and below else None


def lingen_forward(result: Row, tokens: int, dtype: str = "bfloat16") -> Row:
    """The row of LinGen's full depth at batch 1 with lingen's kernels."""
    return row_of(result, name="forward", mixer="mate", kernel="auto", tokens=tokens, dtype=dtype, batch=1)


# How a target finds its value in one result file, which is of one run; None where it is not there.


def _seconds(result: Row, tokens: int, dtype: str = "bfloat16") -> float | None:
    """Seconds of 100 forwards of LinGen's full depth."""
    ms = lingen_forward(result, tokens, dtype).get("ms")
    return None if ms is None else ms * FORWARDS / 1e3


def _over_dit(result: Row, kernel: str) -> float | None:
    """Latency of the DiT twin over LinGen's in bfloat16 at 68 s."""
    twin = row_of(result, name="forward", mixer="attention", tokens=TOKENS_68S, kernel=kernel)
    return ratio(twin.get("ms"), lingen_forward(result, TOKENS_68S).get("ms"))


def _peak(result: Row) -> float | None:
    return lingen_forward(result, TOKENS_68S).get("gib")


def _over_stock(result: Row, name: str, tokens: int, field: str) -> float | None:
    """Stock's time over ours of a part without its projections."""
    stock, ours = (row_of(result, name=name, tokens=tokens, kernel=kernel) for kernel in ("stock", "auto"))
    return ratio(stock.get(field), ours.get(field))


def _review_share(result: Row) -> float | None:
    """What the review tokens add to a forward, in per cent of it; both forwards of the same rounds."""
    row = row_of(result, name="variant", variant="without review tokens", tokens=TOKENS_17S)
    return 100 * (1 - row["ms"] / row["default_ms"]) if row else None


def _growth(result: Row, cost: str) -> float | None:
    """Exponent of mate's cost over tokens, where it was measured on the long clips."""
    tokens = [row.get("tokens", 0) for row in result.get("rows", [])]
    fit = result.get("fits", {}).get("mate", {}).get(cost)
    return fit["exponent"] if fit and max(tokens) >= 2 * TOKENS_68S else None


def _longer_clip(result: Row, half: str) -> float | None:
    """Memory above the weights that a clip of 68 s takes over that of one of 17 s, both of 512x512."""
    rows = (row_of(result, name="clip", way="exact", frames=n, size=[512, 512]) for n in (FRAMES_68S, FRAMES_17S))
    return ratio(*(row.get(f"{half}_gib") for row in rows))


MA, TESA = "MA-branch without projections", "TESA without projections, shifted"
CUDNN, FLASH2 = "cudnn, compiled", "flash-attention-2, eager"
"""The kernels of the DiT twins that LinGen is compared with."""

FP8 = "float8_e4m3fn"
"""What the dtype of a row is called where the large products are in 8 bits."""

LENGTHS = {"17 s": TOKENS_17S, "68 s": TOKENS_68S}

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
)  # fmt: skip
