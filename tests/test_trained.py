"""What only weights that know something can show, by those that come with lingen: 8 bits are for wider models."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import lingen
from lingen.data.theatre import caption_of, storyboard
from lingen.sampling.clips import ClipSize, as_sampled, clip_size, encode_prompts, sample_latents, takes_of
from lingen.sampling.precision import lower
from lingen.training.modules import TextToVideo
from lingen.training.weights import load_denoiser

CAPTION, OTHER = "a ship moves left by the sea at dusk", "a ship moves left by the sea at night"


@pytest.fixture(scope="module")
def trained() -> TextToVideo:
    return load_denoiser("theatre_128").eval()


def second(module: TextToVideo) -> ClipSize:
    return clip_size(module, 1.0)


def latents(module: TextToVideo, caption: str, **settings: object) -> Tensor:
    """Of a second of the caption: [1 c t h w]."""
    clip, how = second(module), replace(module.recipe.sample, guidance=1.0, **settings)
    with as_sampled(module):
        (text,) = encode_prompts(module, [caption], clip)
        return sample_latents(module, takes_of([caption]), text, clip, how)


def velocity(module: TextToVideo, clip: Tensor, time: float, caption: str) -> Tensor:
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    (text,) = encode_prompts(module, [caption], second(module))
    with torch.no_grad(), as_sampled(module):
        return module.model(time * clip + (1 - time) * noise, torch.tensor([time]), tuple(text.text)).float()


def test_sixteen_bits_move_as_thirty_two(trained: TextToVideo):
    low = load_denoiser("theatre_128").eval()
    lower(low.model, "bf16-true")
    clip = latents(trained, CAPTION)
    for time in (0.01, 0.1, 0.5):
        one, other = (velocity(module, clip, time, CAPTION).flatten() for module in (trained, low))
        assert torch.cosine_similarity(one, other, dim=0) > 0.999, time


def test_a_solver_of_second_order_is_nearer_to_the_solution_at_equal_steps(trained: TextToVideo):
    solution = latents(trained, CAPTION, solver="ab2", steps=60)
    errors = {
        solver: float((latents(trained, CAPTION, solver=solver, steps=20) - solution).norm() / solution.norm())
        for solver in ("euler", "ab2")
    }
    assert errors["ab2"] < 0.85 * errors["euler"] < 0.85 * 0.5, errors


def test_its_own_caption_tells_the_clip_better_than_another(trained: TextToVideo):
    board = storyboard("tune", 0, 0, 4.0)
    clip = latents(trained, CAPTION)
    for time in (0.01, 0.03):
        noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
        seen = time * clip + (1 - time) * noise
        own, other, strange = (
            float((seen + (1 - time) * velocity(trained, clip, time, words) - clip).square().mean())
            for words in (CAPTION, OTHER, caption_of(board))
        )
        assert own < 0.8 * min(other, strange), (time, own, other, strange)


def test_more_parts_than_latent_frames_are_told(caplog: pytest.LogCaptureFixture):
    story = "a dog jumps, then a cat leaves, then a rocket takes off"
    lingen.sample_demo(story, seconds=0.5, steps=1)
    assert "3 parts, and the clip 2 latent frames" in caplog.text
    caplog.clear()
    lingen.sample_demo(story, seconds=2, steps=1)
    assert not caplog.text


def test_a_clip_longer_than_four_seconds_keeps_its_scene():
    clip = lingen.sample_demo("a rocket takes off in space at night", seconds=6, steps=4)
    assert clip.shape == (72, 128, 128, 3)
    brightness = clip.reshape(6, 12, -1).mean((1, 2))
    assert brightness.max() < 80 and np.ptp(brightness) < 15, brightness
