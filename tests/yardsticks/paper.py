"""What the paper reports of its models."""

from dataclasses import dataclass

FORWARDS = 100
"""Forwards of a clip: 50 steps, each with and without the text."""

TOKENS_17S, TOKENS_68S = 34_816, 139_264
"""Tokens of 512x512 for 17 and 68 seconds."""

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
