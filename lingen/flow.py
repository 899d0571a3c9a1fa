"""Flow matching as pure functions (Movie Gen, arXiv 2410.13720, section 3.1.2): path, times, solvers, guidance.

Time 0 is noise, 1 is data, everywhere."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from lingen.recipe.sections import SampleConfig, TimeConfig

SIGMA_MIN = 1e-5
"""s of the path: what is left of the noise at time 1."""

IMAGE_ANCHOR, VIDEO_ANCHOR = (256, 3.0), (139_264, 5.0)
"""(tokens, shift) between which `shift: auto` interpolates: 256 x 256 pixels, and 68 seconds of 512 x 512 [ours, by the
table in docs/model.md]."""

DRAWING, MANY = 8, 2**20
"""Threads that draw the noise of a batch, a sample each, where it has more numbers than that."""
RARE = 0.01
"""A time is rare in training where its density is below this [ours]; that of uniform times is 1 everywhere."""

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents [b ...], time, a scalar tensor) -> velocity [b ...]"""


def along(time: Float[Tensor, "b *frames"], x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """Times [b] as [b 1 1 1 1], or [b t] as [b 1 t 1 1], to go with latents [b c t h w]."""
    if time.ndim == 1:
        return time.view(-1, *[1] * (x.ndim - 1))
    return time.view(time.shape[0], 1, time.shape[1], *[1] * (x.ndim - 3))


def interpolate(
    noise: Float[Tensor, "b *any"], data: Float[Tensor, "b *any"], time: Float[Tensor, "b *frames"]
) -> Float[Tensor, "b *any"]:
    """X_t = t X_1 + (1 - (1 - s) t) X_0, the optimal-transport path, at times [b] or [b t]."""
    time = along(time, data)
    return time * data + (1 - (1 - SIGMA_MIN) * time) * noise


def target(noise: Float[Tensor, "b *any"], data: Float[Tensor, "b *any"]) -> Float[Tensor, "b *any"]:
    """dX_t / dt = X_1 - (1 - s) X_0, the velocity that is learned."""
    return data - (1 - SIGMA_MIN) * noise


def shift_time(time: Float[Tensor, "*any"], shift: float) -> Float[Tensor, "*any"]:
    """t / (t + shift (1 - t)): a shift above 1 moves times towards noise (SD3, arXiv 2403.03206, eq. 23, where 1 is
    noise). The inverse is `shift_time(time, 1 / shift)`."""
    return time / (time + shift * (1 - time))


@dataclass(frozen=True)
class Times:
    """The times at which a model is trained on samples of so many tokens, and those at which a solver asks it."""

    config: TimeConfig
    tokens: int

    @property
    def shift(self) -> float:
        """Of training times. `auto` is, for samples of so many tokens, of which noise hides the less the more there are
        (SD3), a straight line between two anchors, in the logarithms of both, and never below 1 [ours]."""
        if self.config.shift != "auto":
            return float(self.config.shift)
        (few, low), (many, high) = IMAGE_ANCHOR, VIDEO_ANCHOR
        return max(1.0, low * (high / low) ** (math.log(self.tokens / few) / math.log(many / few)))

    def draw(self, n: int, generator: torch.Generator) -> Float[Tensor, "n"]:
        """n training times: sigmoid of a normal number, or uniform, then shifted; float32, drawn in float64."""
        if self.config.distribution == "uniform":
            time = torch.rand(n, generator=generator, dtype=torch.float64)
        else:
            normal = torch.randn(n, generator=generator, dtype=torch.float64)
            time = torch.sigmoid(self.config.mean + self.config.std * normal)
        return shift_time(time, self.shift).float()

    def density(self, time: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Of training times, at times between 0 and 1; float64."""
        time = time.double().clamp(1e-9, 1 - 1e-9)
        slope = self.shift / (self.shift * time + 1 - time) ** 2  # of the time before the shift
        if self.config.distribution == "uniform":
            return slope
        time, mean, std = shift_time(time, 1 / self.shift), self.config.mean, self.config.std
        normal = (torch.logit(time) - mean) / std
        return slope * torch.exp(-(normal**2) / 2) / (math.sqrt(2 * math.pi) * std * time * (1 - time))

    def schedule(self, how: SampleConfig) -> Float[Tensor, "n"]:
        """The steps + 1 times of a solver from exactly 0 to exactly 1, strictly rising, float32. Uniform ones are
        shifted as training times are; linear-quadratic ones are as published, since they lie close to noise already:
        with the shift too, the last of 50 steps would be 0.22 long at 68 seconds."""
        if how.schedule == "linear_quadratic":
            return linear_quadratic(how.steps, how.emulated_steps).float()
        times = shift_time(torch.arange(how.steps + 1, dtype=torch.float64) / how.steps, self.shift)
        times[-1] = 1.0  # exactly
        return times.float()

    def untrained_share(self, times: Float[Tensor, "n"]) -> float:
        """Share of the steps between these times that start where training times are rare (`RARE`). Every schedule
        starts at 0, which does not count."""
        return float((self.density(times[1:-1]) < RARE).double().sum() / (len(times) - 1))


def linear_quadratic(steps: int, emulated_steps: int) -> Float[Tensor, "n"]:
    """Times of Movie Gen (section 3.4.2), float64: the first L = S // 2 of S steps are those of a solver with N =
    `emulated_steps` steps, the others grow: f(i) = i / N + (1 - S / N) (max(i - L, 0) / (S - L))^2. That is the
    published a i^2 + b i + c with a = (1 - S / N) / (S - L)^2. With N at most S it is uniform."""
    i = torch.arange(steps + 1, dtype=torch.float64)
    linear, slow = steps // 2, max(emulated_steps, steps)
    return i / slow + (1 - steps / slow) * ((i - linear).clamp(min=0) / (steps - linear)) ** 2


class Draws(NamedTuple):
    """The random numbers of some samples, float32 on the CPU."""

    noise: Float[Tensor, "b *any"]
    times: Float[Tensor, "b"]
    uniform: Float[Tensor, "b"]
    """In [0, 1), for the choice whether the text is left out."""


def sample_draws(
    shape: tuple[int, ...], slots: Int[Tensor, "b"], stream: tuple[int, str], training: Times, pinned: bool = False
) -> Draws:
    """The random numbers of training or sampling for each sample: a function of (stream, slot) alone.

    They depend neither on the batch or the rank that a sample is in nor on earlier steps.

    Args:
        shape: of one sample's latents.
        slots: the number of each sample in the stream.
        stream: (seed, what for), e.g. a stage's name.
        training: what the times are drawn from.
        pinned: the noise is drawn into memory that a GPU copies from while the CPU goes on."""
    noise = torch.empty(len(slots), *shape, pin_memory=pinned)

    def draw(slot: int, room: Tensor) -> tuple[Tensor, Tensor]:
        # A CPU generator keeps 32 bits of its seed: among a million samples some hundred pairs share their noise, which
        # is harmless.
        digest = hashlib.blake2b(repr((*stream, slot)).encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        uniform, time = torch.rand(1, generator=generator), training.draw(1, generator)
        torch.randn(shape, generator=generator, out=room)
        return time, uniform

    with ThreadPoolExecutor(DRAWING) as threads:  # which are started when there is something for them
        each = threads.map if noise.numel() > MANY else map
        times, uniform = zip(*each(draw, slots.tolist(), noise), strict=True)
    return Draws(noise, torch.cat(times), torch.cat(uniform))


def clip_noise(shape: tuple[int, ...], seed: int, prompt: str, repetition: int) -> Float[Tensor, "*any"]:
    """The noise that a sampled clip starts from, float32 on the CPU: a function of these arguments alone [ours].

    So a clip starts from the same noise alone, in a list, in a batch, on any rank and for any device.

    Args:
        shape: of the clip's latents.
        prompt: exactly the text that the text encoders read.
        repetition: 0 for the first clip of this prompt, 1 for the second, ..."""
    # JSON in ASCII is the same text in every version of Python, which a string's repr is not.
    digest = hashlib.sha256(json.dumps([seed, prompt, repetition]).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # of which it keeps 32 bits
    return torch.randn(shape, generator=generator)


def solve(
    velocity: Velocity, noise: Float[Tensor, "b *any"], times: Float[Tensor, "n"], solver: str = "euler",
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "b *any"]:  # fmt: skip
    """Integrates dx / dt = velocity(x, t) from noise at times[0] to times[-1], by one of `SOLVERS`. `progress` is
    called with (steps done, steps). Raises ValueError for an unknown solver."""
    if solver not in SOLVERS:
        raise ValueError(f"There is no solver called '{solver}'. Known: {', '.join(SOLVERS)}.")
    x, steps = noise, len(times) - 1
    for done, after in enumerate(SOLVERS[solver](velocity, noise, times), start=1):
        x = after
        if progress is not None:
            progress(done, steps)
    return x


def euler(
    velocity: Velocity, x: Float[Tensor, "b *any"], times: Float[Tensor, "n"]
) -> Iterator[Float[Tensor, "b *any"]]:
    """x after each step of x + h v(x, t): order 1, one evaluation a step."""
    for start, end in pairwise(times):
        x = x + (end - start) * velocity(x, start)
        yield x


def heun(
    velocity: Velocity, x: Float[Tensor, "b *any"], times: Float[Tensor, "n"]
) -> Iterator[Float[Tensor, "b *any"]]:
    """x after each step with the mean of the velocities at its start and at Euler's end: order 2, two evaluations."""
    for start, end in pairwise(times):
        first = velocity(x, start)
        second = velocity(x + (end - start) * first, end)
        x = x + (end - start) * (first + second) / 2
        yield x


def ab2(velocity: Velocity, x: Float[Tensor, "b *any"], times: Float[Tensor, "n"]) -> Iterator[Float[Tensor, "b *any"]]:
    """x after each step of Adams and Bashforth's method of order 2 for steps of any length: by the straight line
    through the velocities at its start and at that of the step before. One evaluation a step; the first is Euler's."""
    slope: Tensor | None = None
    length = times[1] - times[0]
    for start, end in pairwise(times):
        before, slope = slope, velocity(x, start)
        step = end - start
        x = x + step * (slope if before is None else slope + step / (2 * length) * (slope - before))
        length = step
        yield x


SOLVERS: dict[str, Callable[[Velocity, Tensor, Tensor], Iterator[Tensor]]] = {"euler": euler, "heun": heun, "ab2": ab2}
"""Name -> (velocity, noise, times) -> x after each step."""


def guided(
    conditional: Float[Tensor, "b *any"], unconditional: Float[Tensor, "b *any"], weight: float, rescale: float = 0.0
) -> Float[Tensor, "b *any"]:
    """unconditional + weight (conditional - unconditional) (classifier-free guidance, arXiv 2207.12598). `rescale` of
    0..1 mixes in the same velocity with each sample's standard deviation brought back to that of the conditional one
    (arXiv 2305.08891, eq. 15 and 16)."""
    out = unconditional + weight * (conditional - unconditional)
    if rescale == 0:
        return out
    axes = tuple(range(1, out.ndim))
    # The floor is for a model whose output is all zeros, as at its initialisation.
    factor = conditional.std(axes, keepdim=True) / out.std(axes, keepdim=True).clamp(min=1e-12)
    return out * (rescale * factor + 1 - rescale)


MaskedTokens = tuple[Float[Tensor, "_ _ w"], Shaped[Tensor, "_ _"]]


def stack_text(*parts: MaskedTokens) -> MaskedTokens:
    """Batches of one encoder's (tokens [b n w], mask [b n]) as one, the shorter padded with masked tokens: several
    prompts, or the null and the prompted half of guidance, in one evaluation."""
    length = max(tokens.shape[1] for tokens, _ in parts)
    pads = [length - tokens.shape[1] for tokens, _ in parts]
    pad = torch.nn.functional.pad
    tokens = torch.cat([pad(part[0], (0, 0, 0, n)) for part, n in zip(parts, pads, strict=True)])
    return tokens, torch.cat([pad(part[1], (0, n)) for part, n in zip(parts, pads, strict=True)])
