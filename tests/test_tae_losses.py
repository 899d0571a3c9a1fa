"""Losses of an autoencoder against numbers worked out by hand and other formulations; its discriminator."""

from __future__ import annotations

import math

import pytest
import torch

from lingen.autoencoder import losses
from lingen.autoencoder.network import Discriminator


def test_l1_and_psnr_by_hand():
    a, b = torch.zeros(2, 3, 1, 2, 2), torch.zeros(2, 3, 1, 2, 2)
    a[0], b[0, 0] = 0.5, 1.5  # |0.5 - 1.5| in one channel of three, 0.5 in the others; b is clamped to 1
    torch.testing.assert_close(losses.l1(a, b), torch.tensor([2 / 3, 0.0]))
    torch.testing.assert_close(losses.psnr(a, b), torch.tensor([10 * math.log10(4 / 0.25), 100.0]))


def test_kl_is_that_of_torch_distributions():
    mean, logvar = torch.randn(3, 4, 2, 2, 2), torch.randn(3, 4, 2, 2, 2)
    own = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    theirs = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(losses.kl_divergence(mean, logvar), theirs.flatten(1).mean(1))
    assert losses.kl_divergence(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0
    assert losses.kl_divergence(torch.tensor([[2.0]]), torch.tensor([[0.0]])).item() == 2


def test_outlier_penalty_by_hand():
    """One bright spot of 5 x 5 positions in the second of two frames."""
    latents = torch.zeros(1, 1, 2, 5, 5)
    latents[0, 0, 1, 2, 3] = 25.0
    # mean 1; distances 24 and, 24 times, 1; spread sqrt((24^2 + 24) / 25) = sqrt(24)
    expected = max(24 - 3 * math.sqrt(24), 0) / 25 / 2
    torch.testing.assert_close(losses.outlier_penalty(latents, 3.0), torch.tensor([expected]))
    assert losses.outlier_penalty(latents, 5.0).item() == 0  # 24 < 5 sqrt(24): and no position is further away


def test_outlier_penalty_is_movie_gens_formula():
    x = torch.randn(2, 4, 3, 6, 5, dtype=torch.float64)
    x[1, :, 1, 2, 2] *= 30
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for b in range(2):
        for t in range(3):
            frame = x[b, :, t]
            mean, std = frame.mean((1, 2)), frame.std((1, 2), correction=0)
            for i in range(6):
                for j in range(5):
                    expected[b, t] += ((frame[:, i, j] - mean).norm() - 3 * std.norm()).clamp(min=0) / 30
    assert expected[1, 1] > 0
    torch.testing.assert_close(losses.outlier_penalty(x, 3.0), expected.mean(1))


@pytest.mark.parametrize("shape", [(1, 4, 1, 1, 1), (2, 4, 2, 3, 3)])
def test_outlier_penalty_of_equal_latents_has_a_finite_gradient(shape: tuple[int, ...]):
    latents = torch.ones(shape, requires_grad=True)
    losses.outlier_penalty(latents, 3.0).sum().backward()
    assert torch.equal(latents.grad, torch.zeros(shape))


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.5])
    assert losses.discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 3 + 1.5 / 2))
    assert losses.generator_loss(fake).item() == pytest.approx(0.75)


def test_adaptive_weight_is_the_ratio_at_the_last_layer():
    """VQGAN's equation 7 with one weight: L_rec = (3 w)^2, L_GAN = -2 w at w = 1 have gradients 18 and -2."""
    w = torch.ones(1, requires_grad=True)
    (a,), (b,) = torch.autograd.grad((3 * w).square(), w), torch.autograd.grad(-2 * w, w)
    assert losses.adaptive_weight(a, b, 1e4).item() == pytest.approx(9, rel=1e-5)
    assert losses.adaptive_weight(a, b, 5.0).item() == 5
    assert losses.adaptive_weight(a, torch.zeros(1), 1e4).item() == pytest.approx(1e4)


@pytest.mark.parametrize(
    ("clip", "scores"), [((1, 32, 48), (1, 4, 6)), ((9, 32, 48), (3, 4, 6)), ((1, 8, 8), (1, 1, 1))]
)
def test_discriminator_scores_clips_and_images(clip: tuple[int, ...], scores: tuple[int, ...]):
    torch.manual_seed(0)
    net = Discriminator(8, 3)
    result = net(torch.randn(2, 3, *clip))
    assert result.shape == (2, 1, *scores)
    result.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


def test_discriminator_does_not_let_samples_see_each_other():
    torch.manual_seed(0)
    net, clips = Discriminator(8, 2), torch.randn(2, 3, 5, 16, 16)
    torch.testing.assert_close(net(clips)[:1], net(clips[:1]), rtol=0, atol=1e-6)
    other = torch.stack([clips[0], clips[1] * 5])
    torch.testing.assert_close(net(other)[:1], net(clips[:1]), rtol=0, atol=1e-6)


def test_discriminator_sees_54_pixels():
    torch.manual_seed(0)
    clip = torch.randn(1, 3, 1, 96, 96, requires_grad=True)
    Discriminator(4, 3)(clip)[0, 0, 0, 6, 6].backward()
    seen = clip.grad[0].abs().sum((0, 1))
    assert [int((seen.sum(axis) > 0).sum()) for axis in (0, 1)] == [54, 54]


def test_a_stronger_discriminator_tells_clips_apart():
    """It can be trained at all: noise against stripes, in forty steps."""
    torch.manual_seed(0)
    net = Discriminator(8, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    stripes = torch.sin(torch.arange(16.0)).expand(4, 3, 3, 16, 16)
    first = None
    for _ in range(40):
        loss = losses.discriminator_loss(
            net(stripes + 0.3 * torch.randn(4, 3, 3, 16, 16)), net(torch.randn(stripes.shape))
        )
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first > 0.8 and loss.item() < 0.1
