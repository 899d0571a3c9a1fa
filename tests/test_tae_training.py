"""Training an autoencoder: one backward pass for both players of the game, at images and clips, always the same."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import lightning
import pytest
import torch

from lingen.autoencoder import losses
from lingen.data.batch import Batch
from lingen.plan.trial import parts_of_autoencoder
from lingen.recipe.errors import RecipeError, SettingError
from lingen.recipe.sections import Recipe, ReconstructionConfig, TrainConfig
from lingen.training.autoencoder import AutoencoderModule

TINY = {"name": "tae", "strides": (4, 4, 4), "channels": 4, "width": 8, "multipliers": (1, 1, 2), "blocks": 1}


class Gradients(torch.nn.Module):
    """A perceptual distance without weights: squared difference of neighbouring pixels' differences."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.diff(dim=-1) - b.diff(dim=-1)).square().flatten(1).mean(1)


def recipe(train: dict[str, Any] | None = None, **reconstruction: Any) -> Recipe:
    settings: dict[str, Any] = {
        "features": {"name": f"{__name__}:Gradients"}, "perceptual_frames": 2, "discriminator_width": 4,
        "discriminator_layers": 2, "discriminator_start": 2, "adversarial_start": 4,
    }  # fmt: skip
    return Recipe(
        trains="autoencoder",
        autoencoder=TINY,
        train=TrainConfig(**{"lr": 3e-3, "steps": 30, "ema": 0.9, **(train or {})}),
        reconstruction=ReconstructionConfig(**{**settings, **reconstruction}),
    )


def module(**settings: Any) -> AutoencoderModule:
    torch.manual_seed(0)
    return AutoencoderModule(recipe(**settings))


def batch(step: int = 0, frames: int = 9, samples: int = 2) -> Batch:
    """Coloured waves that wander; each sample its own."""
    t, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (frames, 16, 16)), indexing="ij")
    waves = [torch.stack([torch.sin(0.5 * x + 0.3 * y * c + 0.4 * t + n) for c in (0, 1, 2)]) for n in range(samples)]
    clips = ((torch.stack(waves) + 1) * 127.5).to(torch.uint8)
    kind = "video" if frames > 1 else "image"
    keys = [f"shard:{n}" for n in range(samples)]
    slots = torch.arange(samples) + samples * step
    return Batch(
        kind=kind, step=step, clips=clips, captions=[""] * samples, fps=8.0, keys=keys, sources=[""] * samples,
        slots=slots, drops=[], retries=[], text={},
    )  # fmt: skip


def gradients(module: AutoencoderModule) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in module.named_parameters()}


def train(module: AutoencoderModule, steps: int, frames: tuple[int, ...] = (9,)) -> list[dict[str, float]]:
    """Steps as the trainer does them; the row of each."""
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rows = []
    for step in range(steps):
        module.training_step(batch(step, frames[step % len(frames)]), step).backward()
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        rows.append(module.meter.flush())
    return rows


# a step


@pytest.mark.parametrize("frames", [1, 9])
@pytest.mark.parametrize("step", [0, 2, 4])
def test_every_term_is_finite_and_logged_by_kind(frames: int, step: int):
    tae, kind = module(), "image" if frames == 1 else "video"
    loss = tae.training_step(batch(step, frames), 0)
    row = tae.meter.flush()
    names = {"l1", "perceptual", "kl", "outlier"}
    names |= {"discriminator"} if step >= 2 else set()
    names |= {"adversarial", "adaptive_weight"} if step >= 4 else set()
    logged = {name.split("/")[1] for name in row if name.startswith("loss/")} - {kind}
    assert logged == names and all(math.isfinite(value) for value in row.values())
    assert all(row[f"loss/{name}/{kind}"] == row[f"loss/{name}"] for name in names)
    assert row["tokens"] == 2 * math.ceil(frames / 4) * 4 * 4
    settings = tae.settings
    weights = {name: getattr(settings, name) for name in ("l1", "perceptual", "kl", "outlier")}
    total = sum(weight * row[f"loss/{name}"] for name, weight in weights.items())
    total += settings.adversarial * row.get("loss/adaptive_weight", 0) * row.get("loss/adversarial", 0)
    assert row["loss"] == pytest.approx(total, rel=1e-5)
    assert loss.item() == pytest.approx(total + row.get("loss/discriminator", 0), rel=1e-5)


@pytest.mark.parametrize("step", [0, 4])
def test_the_gradient_is_that_of_the_plain_sum_of_all_terms(step: int):
    """Written straight down, every term on the graph: each gradient by name."""
    tae, one = module(perceptual_frames=0), batch(step)
    tae.training_step(one, 0).backward()
    ours, row = copy.deepcopy(gradients(tae)), tae.meter.flush()
    tae.zero_grad(set_to_none=True)

    from lingen import flow

    s, clips = tae.settings, one.clips.float() / 127.5 - 1
    mean, logvar = tae.autoencoder.posterior(clips)
    noise = flow.sample_draws(mean.shape[1:], one.slots, (0, "main"), flow.Times(tae.recipe.time, 1)).noise
    latents = mean + torch.exp(logvar / 2) * noise
    video = tae.autoencoder.reconstruct(latents)[:, :, :9]
    flat, whole = video.movedim(2, 1).flatten(0, 1), clips.movedim(2, 1).flatten(0, 1)
    compared = s.l1 * (video - clips).abs().mean() + s.perceptual * tae.perceptual(flat, whole).mean()
    total = compared + s.kl * losses.kl_divergence(mean, logvar).mean()
    total = total + s.outlier * losses.outlier_penalty(latents, s.outlier_radius).mean()
    if step:
        for p in tae.discriminator.parameters():
            p.requires_grad_(False)
        fooled = -tae.discriminator(video).mean()
        last = tae.autoencoder.last_layer
        norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (compared, fooled)]
        weight = norms[0] / (norms[1] + 1e-6)
        assert row["loss/adaptive_weight"] == pytest.approx(weight.item(), rel=1e-4)
        (total + s.adversarial * weight.detach() * fooled).backward()
        for p in tae.discriminator.parameters():
            p.requires_grad_(True)
        scores = tae.discriminator(clips), tae.discriminator(video.detach())
        losses.discriminator_loss(*scores).backward()
    else:
        total.backward()
    expected = {n: torch.zeros_like(ours[n]) if theirs is None else theirs for n, theirs in gradients(tae).items()}
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


def test_the_discriminator_gets_nothing_from_the_autoencoders_term():
    tae, video = module(), torch.randn(2, 3, 9, 16, 16, requires_grad=True)
    tae.fool(video).backward()
    assert video.grad.any()
    for name, gradient in gradients(tae).items():
        assert gradient is None, name


def test_the_autoencoder_gets_nothing_from_the_discriminators_term():
    tae, clips = module(), batch().clips.float() / 127.5 - 1
    video = tae.reconstruct(tae.posterior(clips)[0], 9)
    tae.criticise(video, clips, 2, {}).backward()
    for name, gradient in gradients(tae).items():
        assert (gradient is not None) == name.startswith("discriminator."), name
    assert all(tae.get_parameter(f"discriminator.{part}.weight").grad.any() for part in ("first", "middle", "last"))


def test_the_game_raises_what_the_discriminator_says():
    """Against a discriminator that stands still, its scores of reconstructions rise."""
    tae = module(l1=1e-3, perceptual=0.0, adaptive_max=0.0, discriminator_start=0, adversarial_start=0)
    torch.manual_seed(3)
    frozen = copy.deepcopy(tae.discriminator)
    tae.criticise = lambda *rest: None
    rows = train(tae, 20)
    assert rows[-1]["loss/adversarial"] < rows[0]["loss/adversarial"] - 0.05
    for name, p in frozen.named_parameters():
        assert torch.equal(p, dict(tae.discriminator.named_parameters())[name]), name


def test_before_its_start_the_discriminator_stays_as_it_is():
    tae = module(train={"weight_decay": 0.5})
    before = copy.deepcopy(tae.discriminator.state_dict())
    train(tae, 2)
    assert all(torch.equal(before[name], value) for name, value in tae.discriminator.state_dict().items())
    assert all(p.grad is None for p in tae.discriminator.parameters())
    train(tae, 3)
    assert not any(torch.equal(before[f"{part}.weight"], value) for part, value in
                   (("first", tae.discriminator.first.weight), ("last", tae.discriminator.last.weight)))  # fmt: skip


def test_noise_and_frames_follow_from_the_slot():
    """Neither the batch nor its order matters: two samples are one and one."""
    tae = module(adversarial=0.0)
    both = batch()
    alone = [both._replace(clips=both.clips[i : i + 1], slots=both.slots[i : i + 1], keys=["k"]) for i in (0, 1)]
    apart = [tae.training_step(one, 0).item() for one in alone]
    assert tae.training_step(both, 0).item() == pytest.approx(sum(apart) / 2, rel=1e-5)
    moved = tae.training_step(both._replace(slots=both.slots + 7), 0).item()
    assert moved != pytest.approx(sum(apart) / 2, rel=1e-5)


def test_each_part_of_a_clip_gives_a_frame_to_the_perceptual_distance():
    tae, seen = module(perceptual_frames=3), []
    tae.perceptual.forward = lambda a, b: seen.append(a[:, 0, 0, 0].tolist()) or torch.zeros(len(a))
    clip = torch.arange(9.0).view(1, 1, 9, 1, 1).expand(2, 3, 9, 4, 4)
    for uniform in (0.0, 0.4, 0.999999):
        tae.distance(clip, clip, torch.tensor([uniform, 0.5]))
    assert seen == [[0, 3, 6, 1, 4, 7], [1, 4, 7, 1, 4, 7], [2, 5, 8, 1, 4, 7]]


# optimisation


def test_the_loss_falls_and_training_repeats_bit_for_bit():
    rows = train(module(), 40, frames=(9, 9, 9, 1))
    first, last = (sum(row["loss/l1"] for row in part) / len(part) for part in (rows[:4], rows[-4:]))
    assert last < 0.7 * first, (first, last)
    assert train(module(), 10, frames=(9, 9, 9, 1)) == rows[:10]


def test_two_learning_rates_and_no_parameter_twice():
    tae = module(train={"lr": 1e-3, "weight_decay": 0.1}, discriminator_lr=5e-4)
    groups = tae.configure_optimizers()["optimizer"].param_groups
    names = {id(p): name for name, p in tae.named_parameters()}
    listed = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(tae.trained_parameters())
    for group in groups:
        critics = {names[id(p)].startswith("discriminator.") for p in group["params"]}
        assert len(critics) == 1 and group["lr"] == (5e-4 if critics.pop() else 1e-3)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


def test_gradients_of_the_players_are_clipped_apart():
    tae = module(train={"clip_grad": 0.01})
    tae.training_step(batch(4), 0).backward()
    tae.on_before_optimizer_step(tae.configure_optimizers()["optimizer"])
    for critic in (True, False):
        own = [p.grad.norm() for n, p in tae.named_parameters() if n.startswith("discriminator.") == critic]
        assert torch.stack(own).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_a_step_that_is_not_finite_is_thrown_away():
    tae = module()
    optimizer = tae.configure_optimizers()["optimizer"]
    with torch.no_grad():
        tae.autoencoder.last_layer.fill_(math.nan)
    tae.training_step(batch(4), 0).backward()
    tae.on_before_optimizer_step(optimizer)
    assert tae.bad_steps == 1 and all(gradient is None for gradient in gradients(tae).values())
    row = tae.meter.flush()
    assert row["nonfinite_steps"] == 1 and "loss" not in row


@pytest.mark.parametrize("frames", [1, 9])
def test_bfloat16_autocast_is_finite(frames: int):
    tae = module()
    with torch.autocast("cpu", torch.bfloat16):
        loss = tae.training_step(batch(4, frames), 0)
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.float32
    for name, gradient in gradients(tae).items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name
    full = module().training_step(batch(4, frames), 0)
    assert loss.item() == pytest.approx(full.item(), rel=0.05)


def test_terms_that_weigh_nothing_are_not_built():
    tae = module(adversarial=0.0, perceptual=0.0, features={"name": "vgg16", "path": "not/there"})
    assert tae.discriminator is None
    rows = train(tae, 2)
    assert rows[0]["loss/perceptual"] == 0 and "loss/discriminator" not in rows[0]


# with a trainer


class Data(lightning.LightningDataModule):
    """Stands for the loaders: endless batches, three clips to one image."""

    def batches(self, start: int = 0) -> Any:
        step = start
        while True:
            yield batch(step, 1 if step % 4 == 3 else 9)
            step += 1

    def train_dataloader(self) -> Any:
        return self.batches()

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader([batch(100), batch(101, 1)], batch_size=None, collate_fn=lambda one: one)


def fit(tae: AutoencoderModule, steps: int) -> lightning.Trainer:
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=steps,
        check_val_every_n_epoch=None, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(tae, datamodule=Data())
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_validates_and_keeps_what_was_trained():
    tae = module()
    values = fit(tae, 6).callback_metrics
    for name in ("loss", "l1", "psnr", "perceptual"):
        assert all(math.isfinite(values[f"validation/{name}{kind}"]) for kind in ("", "/video", "/image"))
    clips, average = batch(100).clips.float() / 127.5 - 1, tae.averaged_weights()
    with average, torch.no_grad():
        video = tae.autoencoder.reconstruct(tae.autoencoder.posterior(clips)[0])[:, :, :9]
    assert values["validation/l1/video"].item() == pytest.approx((video - clips).abs().mean().item(), rel=1e-5)
    assert values["validation/psnr/video"].item() == pytest.approx(losses.psnr(video, clips).mean().item(), rel=1e-5)
    kept = tae.trained_state()
    assert {name.split(".")[0] for name in kept} == {"autoencoder", "discriminator"}
    assert {"autoencoder.mean", "autoencoder.std"} <= set(kept)


@pytest.mark.filterwarnings("ignore")
def test_latents_are_measured_before_saving():
    tae = module()
    fit(tae, 5)
    trained = copy.deepcopy(dict(tae.named_parameters()))
    tae.before_saving(Data())
    assert all(torch.equal(p, trained[name]) for name, p in tae.named_parameters())
    means = []
    with tae.averaged_weights(), torch.no_grad():
        for step in range(5, 5 + 32):
            one = batch(step, 1 if step % 4 == 3 else 9).clips.float() / 127.5 - 1
            means.append(tae.autoencoder.posterior(one)[0].movedim(1, 0).flatten(1))
        every = torch.cat(means, 1)
        torch.testing.assert_close(tae.autoencoder.mean, every.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tae.autoencoder.std, every.std(1, correction=0), rtol=1e-3, atol=1e-6)
        latents = tae.autoencoder.encode(batch(5).clips.float() / 127.5 - 1)
    assert 0.2 < latents.std().item() < 5


def test_measuring_nothing_is_refused():
    with pytest.raises(ValueError, match="There is no batch to measure"):
        module().measure_latents([], 3)


# what it starts from


def test_what_a_stage_reads_is_named_before_it_is_read():
    one = recipe(features={"name": "vgg16", "path": "not/there.safetensors"})
    missing = [each for part in parts_of_autoencoder(one) for each in part.missing()]
    assert [each.path for each in missing] == ["not/there.safetensors"]
    assert (
        parts_of_autoencoder(replace(one, reconstruction=replace(one.reconstruction, perceptual=0.0)))[0].missing()
        == []
    )
    other = replace(recipe(), autoencoder={**TINY, "path": "no/run"})
    assert any(each.path == "no/run" for part in parts_of_autoencoder(other) if hasattr(part, "missing")
               for each in part.missing())  # fmt: skip
    assert len(parts_of_autoencoder(other, begun=True)) == len(parts_of_autoencoder(other)) - 1
    with pytest.raises(RecipeError, match="no/run"):
        AutoencoderModule(other).begin()


def test_an_autoencoder_that_cannot_be_trained_is_refused():
    with pytest.raises(SettingError, match="The autoencoder 'pixels' cannot be trained; take 'tae'"):
        AutoencoderModule(replace(recipe(), autoencoder={"name": "pixels"}))
