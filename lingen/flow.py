"""Flow matching as pure functions (Movie Gen, arXiv 2410.13720, section 3.1.2): path, times, solvers, guidance.

Time 0 is noise, 1 is data, everywhere.
"""

import hashlib
import json
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lingen.recipe.sections import TimeConfig

SIGMA_MIN = 1e-5
"""s of the path: what is left of the noise at time 1."""

AUTO_SHIFT_TOKENS = 8704
"""Tokens for which `shift: auto` is 1: 17 seconds at 256 x 256 [ours]."""

RARE = 0.01
"""A time is rare in training where its density is below this share of the uniform one [ours]."""

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


def resolve_shift(shift: float | Literal["auto"], tokens: int) -> float:
    """The shift itself; `auto` is sqrt(tokens / 8704), as noise hides less of a clip of more tokens (SD3, eq. 23)."""
    return math.sqrt(tokens / AUTO_SHIFT_TOKENS) if shift == "auto" else float(shift)


def shift_time(time: Float[Tensor, "*any"], shift: float) -> Float[Tensor, "*any"]:
    """t / (t + shift (1 - t)): a shift above 1 moves times towards noise (SD3, arXiv 2403.03206, eq. 23, where 1 is
    noise). The inverse is `shift_time(time, 1 / shift)`."""
    return time / (time + shift * (1 - time))


def sample_times(n: int, config: TimeConfig, shift: float, generator: torch.Generator) -> Float[Tensor, "n"]:
    """n training times: sigmoid of a normal number, or uniform, then shifted; float32, drawn in float64."""
    if config.distribution == "uniform":
        time = torch.rand(n, generator=generator, dtype=torch.float64)
    else:
        normal = torch.randn(n, generator=generator, dtype=torch.float64)
        time = torch.sigmoid(config.mean + config.std * normal)
    return shift_time(time, shift).float()


class Draws(NamedTuple):
    """The random numbers of some samples, float32 on the CPU."""

    noise: Float[Tensor, "b *any"]
    times: Float[Tensor, "b"]
    uniform: Float[Tensor, "b"]
    """In [0, 1), for the choice whether the text is left out."""


def sample_draws(
    shape: tuple[int, ...], slots: Int[Tensor, "b"], stream: tuple[int, str], config: TimeConfig, shift: float
) -> Draws:
    """The random numbers of training or sampling for each sample: a function of (stream, slot) alone.

    They depend neither on the batch or the rank that a sample is in nor on earlier steps.

    Args:
        shape: of one sample's latents.
        slots: the number of each sample in the stream.
        stream: (seed, what for), e.g. a stage's name.
    """
    noise, times, uniform = [], [], []
    for slot in slots.tolist():
        # A CPU generator keeps 32 bits of its seed: among a million samples some hundred pairs share their noise, which
        # is harmless.
        digest = hashlib.blake2b(repr((*stream, slot)).encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        uniform.append(torch.rand(1, generator=generator))
        times.append(sample_times(1, config, shift, generator))
        noise.append(torch.randn(1, *shape, generator=generator))
    return Draws(torch.cat(noise), torch.cat(times), torch.cat(uniform))


def clip_noise(shape: tuple[int, ...], seed: int, prompt: str, repetition: int) -> Float[Tensor, "*any"]:
    """The noise that a sampled clip starts from, float32 on the CPU: a function of these arguments alone [ours].

    So a clip starts from the same noise alone, in a list, in a batch, on any rank and for any device.

    Args:
        shape: of the clip's latents.
        prompt: exactly the text that the text encoders read.
        repetition: 0 for the first clip of this prompt, 1 for the second, ...
    """
    # JSON in ASCII is the same text in every version of Python, which a string's repr is not.
    digest = hashlib.sha256(json.dumps([seed, prompt, repetition]).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # of which it keeps 32 bits
    return torch.randn(shape, generator=generator)


def schedule(steps: int, kind: str, emulated_steps: int, shift: float) -> Float[Tensor, "n"]:
    """The steps + 1 times of a solver from exactly 0 to exactly 1, strictly rising, float32, shifted as in training.

    linear_quadratic (Movie Gen, section 3.4.2): the first L = S // 2 of S steps are those of a solver with N =
    `emulated_steps` steps, the others grow: f(i) = i / N + (1 - S / N) (max(i - L, 0) / (S - L))^2. That is the
    published a i^2 + b i + c with a = (1 - S / N) / (S - L)^2. With N at most S it is uniform. ValueError for fewer
    than 1 step, or an unknown kind.
    """
    if steps < 1:
        raise ValueError(f"A schedule has at least 1 step, got {steps}.")
    i = torch.arange(steps + 1, dtype=torch.float64)
    if kind == "uniform":
        times = i / steps
    elif kind == "linear_quadratic":
        linear, slow = steps // 2, max(emulated_steps, steps)
        times = i / slow + (1 - steps / slow) * ((i - linear).clamp(min=0) / (steps - linear)) ** 2
    else:
        raise ValueError(f"There is no schedule called '{kind}'. Known: linear_quadratic, uniform.")
    times = shift_time(times, shift)
    times[-1] = 1.0  # exactly
    return times.float()


def untrained_share(times: Float[Tensor, "n"], config: TimeConfig, shift: float) -> float:
    """Share of the sampling steps that start where training times are rare (`RARE`). With logit-normal times, that is
    below 0.02 before the shift: linear-quadratic N = 1000 has 40% of 50 steps there, N = 250 10%. Sampling and training
    are shifted alike, so the shift is undone first."""
    if config.distribution == "uniform":
        return 0.0
    time = shift_time(times[:-1].double(), 1 / shift).clamp(1e-9, 1 - 1e-9)
    normal = (torch.logit(time) - config.mean) / config.std
    density = torch.exp(-(normal**2) / 2) / (math.sqrt(2 * math.pi) * config.std * time * (1 - time))
    return float((density < RARE).double().mean())


def solve(
    velocity: Velocity,
    noise: Float[Tensor, "b *any"],
    times: Float[Tensor, "n"],
    solver: str = "euler",
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "b *any"]:
    """Integrates dx / dt = velocity(x, t) from noise at times[0] to times[-1]. euler has order 1 and one evaluation a
    step, heun order 2 and two. `progress` is called with (steps done, steps). Raises ValueError for an unknown
    solver."""
    if solver not in ("euler", "heun"):
        raise ValueError(f"There is no solver called '{solver}'. Known: euler, heun.")
    x, steps = noise, len(times) - 1
    for i in range(steps):
        x = (euler if solver == "euler" else heun)(velocity, x, times[i], times[i + 1])
        if progress is not None:
            progress(i + 1, steps)
    return x


def euler(
    velocity: Velocity, x: Float[Tensor, "b *any"], start: Float[Tensor, ""], end: Float[Tensor, ""]
) -> Float[Tensor, "b *any"]:
    """One step of x + (end - start) v(x, start)."""
    return x + (end - start) * velocity(x, start)


def heun(
    velocity: Velocity, x: Float[Tensor, "b *any"], start: Float[Tensor, ""], end: Float[Tensor, ""]
) -> Float[Tensor, "b *any"]:
    """One step with the mean of the velocities at its start and where Euler's step ends."""
    first = velocity(x, start)
    second = velocity(x + (end - start) * first, end)
    return x + (end - start) * (first + second) / 2


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


MaskedTokens = tuple[Float[Tensor, "_ _ w"], Bool[Tensor, "_ _"]]


def stack_text(*parts: MaskedTokens) -> MaskedTokens:
    """Batches of one encoder's (tokens [b n w], mask [b n]) as one, the shorter padded with masked tokens: several
    prompts, or the null and the prompted half of guidance, in one evaluation."""
    length = max(tokens.shape[1] for tokens, _ in parts)
    pads = [length - tokens.shape[1] for tokens, _ in parts]
    pad = torch.nn.functional.pad
    tokens = torch.cat([pad(part[0], (0, 0, 0, n)) for part, n in zip(parts, pads, strict=True)])
    return tokens, torch.cat([pad(part[1], (0, n)) for part, n in zip(parts, pads, strict=True)])
