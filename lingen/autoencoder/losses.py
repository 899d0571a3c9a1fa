"""The losses of an autoencoder as pure functions: reconstruction, the latents' distribution, the adversarial terms. The
terms are those of Movie Gen's TAE (arXiv 2410.13720, section 3.1.1). Each is a mean, never a sum, so that a weight
means the same at every size of clip; an image is t = 1."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def l1(a: Float[Tensor, "b *any"], b: Float[Tensor, "b *any"]) -> Float[Tensor, "b"]:
    """Mean absolute difference of each sample."""
    return (a - b).abs().flatten(1).mean(1)


def psnr(a: Float[Tensor, "b *any"], b: Float[Tensor, "b *any"]) -> Float[Tensor, "b"]:
    """Peak signal-to-noise ratio of each sample in dB, for pixels in -1..1 (so the peak is 2): 10 log10(4 / MSE). What
    lies outside is clamped, as it is when a clip is written. The mean square is over all frames; at most 100 dB."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=4e-10))


def kl_divergence(mean: Float[Tensor, "b *any"], logvar: Float[Tensor, "b *any"]) -> Float[Tensor, "b"]:
    """KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1 - log s^2) / 2 of each sample (VAE, arXiv 1312.6114, appendix B). A
    mean over all numbers of the latents, where LDM's code has sums over latents and pixels: its weight of 1e-6 becomes
    1e-6 times (numbers of the latents) / (numbers of the clip) here."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)


def outlier_penalty(latents: Float[Tensor, "b c t h w"], radius: float) -> Float[Tensor, "b"]:
    """Mean over positions of max(||X_ij - mean(X)|| - r ||std(X)||, 0) (Movie Gen, section 3.1.1, "outlier penalty"). X
    are the latents of one frame, mean and std are over its positions (std of all of them, not an estimate), norms over
    channels; averaged over frames. It keeps the encoder from storing a frame's contents in a few bright spots.
    ||std(X)|| is the root of the mean squared distance, written so because its gradient is finite at 0 too."""
    centred = (latents - latents.mean((-2, -1), keepdim=True)).movedim(1, 2).flatten(3)  # [b t c n]
    distance = torch.linalg.vector_norm(centred, dim=2)
    spread = torch.linalg.vector_norm(centred, dim=(2, 3)) / math.sqrt(centred.shape[3])
    return F.relu(distance - radius * spread[..., None]).flatten(1).mean(1)


def discriminator_loss(real: Float[Tensor, "*any"], fake: Float[Tensor, "*other"]) -> Float[Tensor, ""]:
    """(E max(0, 1 - D(x)) + E max(0, 1 + D(x'))) / 2, hinge loss (Geometric GAN, arXiv 1705.02894), halved as VQGAN."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Float[Tensor, "*any"]) -> Float[Tensor, ""]:
    """-E D(x'), the other side of the hinge loss."""
    return -fake.mean()


def adaptive_weight(
    reconstruction: Float[Tensor, "*any"], adversarial: Float[Tensor, "*any"], largest: float
) -> Float[Tensor, ""]:
    """lambda = ||grad_L[L_rec]|| / (||grad_L[L_GAN]|| + 1e-6) at most `largest` (VQGAN, arXiv 2012.09841, eq. 7).

    Args:
        reconstruction: gradient of the terms that compare clips, at the weight of the decoder's last layer.
        adversarial: that of `generator_loss`."""
    ratio = torch.linalg.vector_norm(reconstruction) / (torch.linalg.vector_norm(adversarial) + 1e-6)
    return ratio.clamp(max=largest).detach()
