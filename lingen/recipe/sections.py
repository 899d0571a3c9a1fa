"""The sections of a recipe, each declared once, here; the loader checks, fills and documents them from these fields.

Bounds and marks (`lingen.recipe.bounds`) stand beside the types. Those of a section hold for all that is in it; a mark
inside goes before the section's.

Plain dataclasses: neither torch nor omegaconf is imported. Every number that the paper does not give is ours."""

from dataclasses import field
from typing import Annotated, Any, Literal

from lingen.recipe.bounds import CONTENT, COURSE, FREE, IDENTITY, Above, AtLeast, Between, Finite
from lingen.recipe.errors import SettingError
from lingen.recipe.signature import section
from lingen.recipe.subjects import SUBJECTS, Subject

SHARE = Between(0, 1)

Component = dict[str, Any]
"""A registered part and its settings: ``{"name": "mate", "window": [8, 4, 4]}``. In a recipe, a bare word is short for
``{name: word}``."""

Triple = tuple[int, int, int]
"""One number each for t, h and w."""
KINDS = ("image", "video")
"""Of samples."""

DERIVED = {"derived": True}
"""Marks a field that the loader works out from the neighbours; a recipe cannot set it."""


def _named(name: str) -> Any:
    """The default of a component."""
    return field(default_factory=lambda: {"name": name})


@section
class LinGenConfig:
    """The denoiser (paper, Figure 2)."""

    dim: Annotated[int, AtLeast(1), "width of a token"] = 384
    depth: Annotated[int, AtLeast(1), "number of blocks"] = 12
    mixer: Annotated[Component | list[Component], "token mixer of a block; a list is cycled over the layers"] = _named(
        "mate"
    )
    num_heads: Annotated[int | None, AtLeast(1), "of the cross-attention; null: 128 wide, less if dim is small"] = None
    ffn_dim: Annotated[int | None, AtLeast(1), "hidden width of the SwiGLU; null: 2.7 dim, as a multiple of 64"] = None
    patch: Annotated[tuple[int, int, int], AtLeast(1), "latents per token in t, h, w"] = (1, 2, 2)
    predict: Annotated[Literal["velocity", "clip"], "output of the last layer; the model returns velocity"] = "velocity"
    gate_init: Annotated[float, "start of gates and cross-attention's output: 0 in large recipes, 1 in tiny ones"] = 0.0
    position_std: Annotated[float, Above(0), "standard deviation of the sin-cos start of the positional tables"] = 0.5
    pool_text: Annotated[bool, "add the mean text token to the timestep's (not LinGen: for tiny models)"] = False
    checkpointing: Annotated[
        bool | float,
        Above(0),
        FREE,
        "recompute blocks in the backward pass instead of keeping their activations: all, none, or as little, cheap "
        "parts first, as it takes for the activations to fit into this many GiB per rank",
    ] = False

    channels: int = field(default=16, metadata=DERIVED)
    """Latent channels, from the autoencoder."""
    text_dims: tuple[int, ...] = field(default=(), metadata=DERIVED)
    """Width of each text encoder's tokens."""
    text_parts: bool = field(default=False, metadata=DERIVED)
    """Whether one of them tells the parts of a text."""
    max_grid: Annotated[tuple[int, int, int], AtLeast(1), "rows of the positional tables (t, h, w)"] = (1, 16, 16)
    """At least any stage's grid: the loader works it out; a filled recipe of one stage carries it."""


@section
class Shards:
    """WebDataset tar files of each kind, or the manifest of a set of them: a path, an https:// or s3:// address, a
    glob, a brace pattern, or a list of them."""

    image: Annotated[str | list[str] | None, "shards of jpg/png/webp + json or txt, or of encoded images"] = None
    video: Annotated[str | list[str] | None, "shards of mp4/webm/webp + json or txt, or of encoded clips"] = None


@section
class PerKind:
    """A whole number for each kind of batch."""

    image: int = 1
    video: int = 1


@section
class Remote:
    """How shards at https:// and s3:// are read."""

    timeout: Annotated[float, Above(0), "seconds without a byte until a read counts as failed"] = 30.0
    attempts: Annotated[int, AtLeast(1), "reads of a sample until it is unreadable, each after a longer wait"] = 5
    cache_gb: Annotated[float, AtLeast(0), "disk space on each machine for what was read, GB; 0: nothing is kept"] = 0.0


@section
class DataConfig:
    """What a batch is made of and in which order."""

    shards: Annotated[Shards, IDENTITY, "training shards"] = Shards()
    validation: Annotated[Shards, FREE, "held-out shards"] = Shards()
    synthetic: Annotated[Component | None, IDENTITY, "clips drawn on first use, where no shards are named"] = None
    mix: Annotated[PerKind, AtLeast(0), COURSE, "of each kind in one round, as `mix_by` counts: e.g. one image for "
                   "every 100 videos (paper)"] = PerKind(image=1, video=100)  # fmt: skip
    mix_by: Annotated[Literal["steps", "samples"], COURSE, "what `mix` counts: optimiser steps; or samples of `frames` "
                      "and `size`: a kind with the larger `batch` has its steps the rarer"] = "steps"  # fmt: skip
    batch: Annotated[PerKind, AtLeast(1), COURSE, "samples per rank in one batch of each kind; in a batch of another "
                     "of `sizes` and `lengths`, as many as come to the same number of tokens"] = PerKind()  # fmt: skip
    frames: Annotated[int, AtLeast(1), IDENTITY, "frames of a video clip"] = 16
    lengths: Annotated[
        list[int], AtLeast(1), IDENTITY, "further numbers of frames: a video takes the largest that it fills"
    ] = field(default_factory=list)
    size: Annotated[tuple[int, int], AtLeast(1), IDENTITY, "height and width in pixels"] = (256, 256)
    sizes: Annotated[
        list[tuple[int, int]], AtLeast(1), IDENTITY, "more heights and widths: a sample takes the nearest ratio"
    ] = field(default_factory=list)
    fps: Annotated[float, Above(0), IDENTITY, "frames per second of a clip, after resampling"] = 16.0
    fps_prefix: Annotated[bool, IDENTITY, "put the frame rate before a caption, as Movie Gen ('FPS-16. ...')"] = True
    max_dropped: Annotated[
        float, SHARE, FREE, "share of broken samples that ends the run, after 100; 0: the first, 1: none"
    ] = 0.05
    block: Annotated[
        int,
        AtLeast(1),
        IDENTITY,
        "neighbours of a shard that stay together in an epoch, for disks slow to seek; 1: none",
    ] = 1
    remote: Annotated[Remote, FREE] = Remote()
    workers: Annotated[int, AtLeast(0), FREE, "processes that decode, per rank; 0: decode in the training process"] = 2
    cache_mb: Annotated[int, AtLeast(0), FREE, "decoded clips that each decoding process may keep in memory, MiB"] = 0


@section
class TimeConfig:
    """How training times are drawn (Movie Gen, section 3.1.2); time 0 = noise, 1 = data."""

    distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: Annotated[float, "of the normal under the sigmoid"] = 0.0
    std: Annotated[float, Above(0), "of the normal under the sigmoid"] = 1.0
    shift: Annotated[
        float | Literal["auto"],
        Above(0),
        "moves training times towards noise, and uniform sampling times with them; auto: by the number of tokens, "
        "from 3 for 256 to 5 for 139,264",
    ] = "auto"


@section
class PowerAverage:
    """Averaged weights that remember the same share of a stage at each of its steps (EDM2, arXiv 2312.02696, 3.1)."""

    width: Annotated[
        float, Between(0.001, 0.28), "standard deviation of the averaged ages, as a share of the stage so far"
    ]


@section
class TrainConfig:
    """One stage's optimisation."""

    steps: Annotated[int, AtLeast(1), COURSE, "optimiser steps of the stage"] = 1000
    optimizer: Annotated[Component, IDENTITY, "moves the weights; `lr`, `betas` and `weight_decay` are its, too"] = (
        _named("adamw")
    )
    loss: Annotated[Component, IDENTITY, "of the denoiser's velocity, for each sample"] = _named("mse")
    lr: Annotated[float, AtLeast(0), COURSE, "peak learning rate"] = 1e-4
    warmup: Annotated[int, AtLeast(0), COURSE, "steps of linear warm-up"] = 0
    decay: Annotated[Component, COURSE, "of the learning rate, after the warm-up"] = _named("constant")
    weight_decay: Annotated[float, AtLeast(0), COURSE, "on weight matrices only"] = 0.1
    betas: Annotated[tuple[float, float], SHARE, COURSE, "of AdamW's moments"] = (0.9, 0.999)
    clip_grad: Annotated[float, Above(0), COURSE, "largest global gradient norm"] = 1.0
    accumulate: Annotated[int, AtLeast(1), COURSE, "batches (of one kind) per optimiser step"] = 1
    ema: Annotated[
        float | PowerAverage,
        SHARE,
        COURSE,
        "averaged weights, begun anew in each stage: a decay, min(ema, (1 + n) / (10 + n)) at update n, or "
        "{width: 0.05}, which fits a stage of any length",
    ] = 0.9999
    text_drop: Annotated[float, SHARE, COURSE, "share of samples whose text is left out, for guidance"] = 0.1
    keep_optimizer: Annotated[bool, IDENTITY, "carry what the optimiser keeps over from the stage before"] = False
    max_nonfinite: Annotated[int, AtLeast(1), FREE, "non-finite or skipped steps in a row before the run stops"] = 3
    on_spike: Annotated[
        Literal["keep", "skip", "rollback"],
        FREE,
        "a loss or gradient norm far above those of steps like it is said, and then the step is taken; thrown away; or "
        "training goes on from the last checkpoint of `checkpoint_every`, past all samples since (docs/health.md)",
    ] = "keep"
    log_every: Annotated[int, AtLeast(1), FREE, "steps between lines of metrics.csv"] = 10
    checkpoint_every: Annotated[int, AtLeast(1), FREE, "steps between checkpoints for resuming"] = 500
    keep_checkpoints: Annotated[int, AtLeast(1), FREE, "the newest checkpoints of a stage that stay"] = 2
    keep_every: Annotated[int | None, AtLeast(1), FREE, "steps between checkpoints kept for good; null: none"] = None
    validate_every: Annotated[int, AtLeast(0), FREE, "steps between validation losses; 0: only at the stage's end"] = 0
    validation_samples: Annotated[int, AtLeast(1), FREE, "held-out samples in a validation loss"] = 32
    sample_every: Annotated[int, AtLeast(0), FREE, "steps between clips of sample.prompts; 0: at the stage's end"] = 0
    evaluate_every: Annotated[int, AtLeast(0), FREE, "steps between measures of held-out captions' clips; 0: none"] = 0
    compile: Annotated[
        Literal["auto", "off", "graph"],
        FREE,
        "whether steps are CUDA graphs, with the same weights: auto, where it works",
    ] = "auto"
    watchdog: Annotated[int, AtLeast(0), FREE, "seconds without a sign of any rank that end a hung run; 0: off"] = 600


@section
class SampleConfig:
    """Defaults of sampling, used by validation and by `lingen sample`."""

    steps: Annotated[int, AtLeast(1), "solver steps"] = 50
    guidance: Annotated[float, Finite(), AtLeast(0), "weight of the text against no text; 1: no guidance"] = 7.5
    guidance_interval: Annotated[tuple[float, float], SHARE, "times between which guidance is applied"] = (0.0, 1.0)
    guidance_rescale: Annotated[float, SHARE, "0..1: pull guided velocity back to the spread of the conditional"] = 0.0
    solver: Annotated[Literal["euler", "heun", "ab2"], "order 1; order 2 by two evaluations a step; by one"] = "euler"
    schedule: Annotated[
        Literal["linear_quadratic", "uniform"], "spacing of the sampling times; uniform ones are shifted as in training"
    ] = "linear_quadratic"
    emulated_steps: Annotated[int, AtLeast(1), "N of the linear-quadratic schedule (Movie Gen: 250)"] = 250
    precision: Annotated[
        Literal["auto", "32-true", "bf16-true", "fp8"],
        "of the denoiser's weights and stream; auto: bf16-true on CUDA where the trainer's precision has bf16, else as "
        "they are; fp8: bf16-true with 8-bit products; clips sampled during training take the trainer's",
    ] = "auto"
    guidance_batch: Annotated[
        bool | Literal["auto"],
        "run with and without text as one batch, else in turn in half the memory; auto: up to 16,384 tokens",
    ] = "auto"
    decode: Annotated[
        Literal["auto", "exact", "tiled", "whole"],
        "latents to pixels piece by piece, by the autoencoder's own streams; the same in cross-faded tiles of `tile` "
        "pixels; or in one call; auto: exact where it has streams, else whole",
    ] = "auto"
    tile: Annotated[tuple[int, int] | None, "pixels (h, w) of tiles, where a frame is too large for memory"] = None
    seed: Annotated[int, AtLeast(0)] = 0
    prompts: Annotated[list[str], "sampled during training"] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.tile is not None and self.decode in ("exact", "whole"):
            raise SettingError("tile", f"tile={list(self.tile)} goes with decode=tiled, not with {self.decode}.")


@section
class ReconstructionConfig:
    """What an autoencoder is trained for; a weight of 0 leaves its term out, and what it needs is not built.

    Sources: LDM is Rombach et al., arXiv 2112.10752 (its public code where the paper gives no number); VQGAN is Esser
    et al., arXiv 2012.09841; TAE is Movie Gen, arXiv 2410.13720, section 3.1.1, which gives the terms but, but for the
    outlier penalty, not their weights. Raises SettingError for numbers that do not go together."""

    l1: Annotated[float, AtLeast(0), "weight of the mean absolute error (LDM)"] = 1.0
    perceptual: Annotated[float, AtLeast(0), "weight of the perceptual distance (LDM)"] = 1.0
    features: Annotated[Component, "perceptual distance: vgg16 (`lingen data fetch vgg16`), lpips, none"] = _named(
        "vgg16"
    )
    perceptual_frames: Annotated[
        int, AtLeast(0), "frames of a clip that it sees, drawn anew at each step; 0: all (ours)"
    ] = 8
    kl: Annotated[float, AtLeast(0), "weight of the KL divergence from N(0, 1), mean over the latents (ours)"] = 1e-6
    outlier: Annotated[
        float, AtLeast(0), "weight of the penalty on latents far from others of their frame (TAE: 1e5)"
    ] = 1.0
    outlier_radius: Annotated[float, Above(0), "standard deviations that a latent may be away for nothing (TAE)"] = 3.0
    adversarial: Annotated[float, AtLeast(0), "weight of the discriminator, after the adaptive weight (LDM)"] = 0.5
    adaptive_max: Annotated[float, AtLeast(0), "of the adaptive weight (VQGAN, eq. 7); 0: none, the factor is 1"] = 1e4
    discriminator_start: Annotated[int, AtLeast(0), "step of the stage at which it begins to learn (ours)"] = 1000
    adversarial_start: Annotated[
        int, "step from which it trains the autoencoder; at least discriminator_start (ours)"
    ] = 2000
    discriminator_width: Annotated[int, AtLeast(1), "channels of the discriminator's first layer (VQGAN)"] = 64
    discriminator_layers: Annotated[int, AtLeast(1), "its layers that halve height and width (VQGAN)"] = 3
    discriminator_lr: Annotated[float | None, Above(0), COURSE, "peak learning rate; null: the autoencoder's"] = None

    def __post_init__(self) -> None:
        if self.adversarial > 0 and self.adversarial_start < self.discriminator_start:
            what = f"adversarial_start={self.adversarial_start} comes before discriminator_start"
            why = "the autoencoder would learn from a discriminator that has learned nothing"
            raise SettingError("adversarial_start", f"{what}={self.discriminator_start}: {why}.")
        if self.l1 == 0 and (self.perceptual == 0 or self.features.get("name") == "none"):
            why = "leave nothing that compares a clip with its reconstruction"
            raise SettingError("l1", f"l1=0 and no perceptual distance {why}.")


@section
class RewriteConfig:
    """A local chat model that makes a long prompt of the user's short one (paper: a Llama-3.1; settings ours)."""

    name: Annotated[str, "what messages call it"] = "llama"
    path: Annotated[str | None, "a folder with a chat model of transformers and its tokenizer"] = None
    max_tokens: Annotated[int, AtLeast(1), "of a rewritten prompt; a longer one is an error"] = 256
    temperature: Annotated[float, Finite(), AtLeast(0), "0: the likeliest words; above: drawn from `seed`"] = 0.0
    seed: Annotated[int, "of what is drawn; without effect at temperature 0"] = 0
    batch: Annotated[int, AtLeast(1), "prompts at a time, where nothing is drawn"] = 8


@section
class ScoreConfig:
    """The score at the end of the quickstart: does a sampled clip show the colour, shape and motion of its caption?"""

    clips: Annotated[int, Between(0, 300), "clips to sample and judge at the end, at most 300; 0: none"] = 0
    split: Annotated[Literal["tune", "report"], "held-out captions: to tune settings on, or to report on"] = "report"


@section
class Recipe:
    """A checked recipe with every default filled in. With `stage` set, its overlay is merged and `stages` is empty."""

    name: Annotated[str, FREE, "what the run is called; by default the file's name"] = "recipe"
    stage: Annotated[str | None, IDENTITY, "name of the only stage, where there are no `stages`"] = None
    imports: Annotated[
        list[str],
        FREE,  # which parts a run has is said where they are named
        "modules that register parts of yours (`@lingen.MIXERS.register`), imported before parts are looked up",
    ] = field(default_factory=list)
    seed: Annotated[int, Between(0, 2**32 - 1), IDENTITY] = 0  # what NumPy takes
    init: Annotated[str | None, IDENTITY, CONTENT, "weights (file or run folder) that training starts from"] = None
    trains: Annotated[
        Literal["denoiser", "autoencoder"],
        IDENTITY,
        "what the stages train; for an autoencoder `autoencoder`, `reconstruction`, `data`, `train`, `trainer` count",
    ] = "denoiser"
    model: Annotated[LinGenConfig, IDENTITY] = LinGenConfig()
    autoencoder: Annotated[Component, IDENTITY, "video autoencoder"] = _named("pixels")
    text: Annotated[list[Component], IDENTITY, "text encoders, used side by side"] = field(
        default_factory=lambda: [{"name": "words"}]
    )
    data: DataConfig = DataConfig()
    time: Annotated[TimeConfig, COURSE] = TimeConfig()
    train: TrainConfig = TrainConfig()
    reconstruction: Annotated[ReconstructionConfig, IDENTITY] = field(default_factory=ReconstructionConfig)
    sample: Annotated[SampleConfig, FREE] = SampleConfig()
    rewrite: Annotated[RewriteConfig, FREE] = RewriteConfig()
    score: Annotated[ScoreConfig, FREE] = ScoreConfig()
    trainer: Annotated[dict[str, Any], "of lightning.Trainer; logger, callbacks by name"] = field(default_factory=dict)
    stages: Annotated[dict[str, dict[str, Any]], "in order, laid over the sections above"] = field(default_factory=dict)

    @property
    def subject(self) -> Subject:
        """What the stages train."""
        return SUBJECTS[self.trains]
