"""The judges of the emoji theatre: who does what, where and in which light, in one event of a clip.

Two small networks: one sees an event whole and names action, way, scene and light; the other sees its frames one by
one, moved and scaled at random while it learns, and names the actor. So nobody is named by what they do: of pairs that
are held out, a judge that sees both at once goes by the action (docs/theatre.md). They are trained on clips of the
split ``tune`` alone, and checked on real clips of all three, whole and degraded.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lingen.data.acting import load_sprites, perform
from lingen.data.theatre import ACTIONS, ACTORS, LIGHTS, SCENES, Event, Split, storyboard

FRAMES, SIDE = 16, 64
"""What the judge sees of an event."""
WAYS = ("", "left", "right")
HEADS: dict[str, list[str]] = {
    "who": list(ACTORS), "action": ACTIONS, "way": list(WAYS), "scene": SCENES, "light": LIGHTS,
}  # fmt: skip
LENGTHS = ((4.0, 12.0), (16.0, 5.0), (60.0, 3.0))
"""Seconds of the clips that judges learn from, and frames a second that are drawn of them."""
FEW = 2.0
"""Frames a second of four seconds where only actors are learned: more clips in the time, and fewer frames of each."""


class EventJudge(nn.Module):
    """Logits of each head for events [b 3 t h w] in -1..1."""

    def __init__(self, width: int = 32):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 8 * width]
        strides = ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(one, other, 3, stride, 1), nn.GroupNorm(8, other), nn.SiLU(),
                nn.Conv3d(other, other, 3, 1, 1, groups=8), nn.GroupNorm(8, other), nn.SiLU(),
            )
            for one, other, stride in zip(widths, widths[1:], strides, strict=False)
        )  # fmt: skip
        # Where something is at which moment tells the action: the last grid is read as it is, not averaged.
        self.flat = nn.Linear(8 * width * (FRAMES // 4) * (SIDE // 16) ** 2, 512)
        self.heads = nn.ModuleDict({name: nn.Linear(512, len(HEADS[name])) for name in list(HEADS)[1:]})
        faces: list[nn.Module] = []
        for one, other in zip(widths, widths[1:], strict=False):
            for before, stride in ((one, 2), (other, 1)):
                faces += [nn.Conv2d(before, other, 3, stride, 1), nn.GroupNorm(8, other), nn.SiLU()]
        self.faces = nn.Sequential(*faces)
        self.who = nn.Linear(8 * width, len(ACTORS))

    def forward(self, events: Float[Tensor, "b 3 t h w"]) -> dict[str, Float[Tensor, "b n"]]:
        found = self.events(events)
        return {"who": self.actors(events.transpose(1, 2), found["way"].argmax(1))} | found

    def events(self, events: Float[Tensor, "b 3 t h w"]) -> dict[str, Float[Tensor, "b n"]]:
        """Logits of all but the actor."""
        for layer in self.layers:
            events = layer(events)
        hidden = F.silu(self.flat(events.flatten(1)))
        return {name: head(hidden) for name, head in self.heads.items()}

    def actors(self, frames: Float[Tensor, "b k 3 h w"], way: Int[Tensor, "b"]) -> Float[Tensor, "b n"]:
        """Logits of the actor, the mean over frames in any order. Events that go right are mirrored, so that of two
        the one who follows is always on the right."""
        seen = torch.where((way == WAYS.index("right"))[:, None, None, None, None], frames.flip(-1), frames)
        features = self.faces(seen.flatten(0, 1)).mean((-2, -1))
        return self.who(features).unflatten(0, frames.shape[:2]).mean(1)


def moved(frames: Float[Tensor, "b k 3 h w"]) -> Tensor:
    """Each frame for itself moved by up to 0.3 of its side and scaled by 0.7 to 1.4, at random."""
    many, there = frames.flatten(0, 1), frames.device
    scale = torch.exp(torch.empty(len(many), 1, 1, device=there).uniform_(np.log(0.7), np.log(1.4)))
    shift = torch.empty(len(many), 2, 1, device=there).uniform_(-0.6, 0.6)
    grid = F.affine_grid(torch.cat([torch.eye(2, device=there) * scale, shift], 2), list(many.shape), False)
    return F.grid_sample(many, grid, padding_mode="border", align_corners=False).unflatten(0, frames.shape[:2])


def windows_of(clip: UInt8[np.ndarray, "t h w 3"], count: int) -> UInt8[Tensor, "n 3 t h w"]:
    """The events of a clip, `FRAMES` evenly spaced frames of each, in small."""
    edges = np.linspace(0, len(clip), count + 1)
    places = [np.linspace(a, b - 1, FRAMES).round().astype(int) for a, b in zip(edges, edges[1:], strict=False)]
    frames = torch.from_numpy(clip[np.stack(places)]).permute(0, 1, 4, 2, 3).flatten(0, 1).float()
    small = F.interpolate(frames, (SIDE, SIDE), mode="area").round().byte()
    return small.unflatten(0, (count, FRAMES)).transpose(1, 2).contiguous()


def targets_of(events: tuple[Event, ...]) -> Int[Tensor, "n k"]:
    """The number of the right label of each head, for each event."""
    return torch.tensor([[labels.index(getattr(one, name)) for name, labels in HEADS.items()] for one in events])


def drawn(split: Split, number: int, sprites: str, length: tuple[float, float], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Events of a clip, uint8 [n 3 t h w], and the labels [n k] of what they show; `length`: its seconds and frames a
    second."""
    seconds, fps = length
    board = storyboard(split, seed, number, seconds)
    rng = np.random.default_rng([1, number])
    clip = perform(board, round(seconds * fps), fps, (2 * SIDE, 2 * SIDE), load_sprites(sprites), rng)
    return windows_of(clip, len(board.events)), targets_of(board.events)


class Lessons(Dataset[tuple[Tensor, Tensor]]):
    """Clips of the split ``tune``, of all lengths; or `few` frames of four seconds."""

    def __init__(self, sprites: str, count: int, few: bool):
        self.sprites, self.count, self.few = sprites, count, few

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        length = (LENGTHS[0][0], FEW) if self.few else LENGTHS[(0, 0, 1, 0, 0, 2)[number % 6]]
        return drawn("tune", number, self.sprites, length)


def degraded(events: Float[Tensor, "b 3 t h w"], how: str, generator: torch.Generator | None = None) -> Tensor:
    """Events in -1..1, damaged as a small model's clips are: ``blur``, ``noise``, ``dim``, ``coarse``, or ``none``."""
    if how == "blur":
        return F.avg_pool3d(events, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    if how == "noise":
        return events + 0.15 * torch.randn(events.shape, generator=generator).to(events)
    if how == "dim":
        return 0.8 * events - 0.1
    if how == "coarse":
        small = F.interpolate(events, scale_factor=(1, 0.5, 0.5), mode="area")
        return F.interpolate(small, events.shape[2:], mode="trilinear")
    return events


DAMAGES = ("none", "blur", "noise", "dim", "coarse")


def train(args: argparse.Namespace) -> None:
    """Trains for `args.minutes`; a batch is the events of some 48 clips, each batch damaged in another way. With
    `args.start`, a trained judge, only who names actors goes on learning."""
    torch.manual_seed(0)
    judge = (load_judge(args.start, args.device) if args.start else EventJudge().to(args.device)).train()
    learned = [*judge.faces.parameters(), *judge.who.parameters()] if args.start else list(judge.parameters())
    optimizer = torch.optim.AdamW(learned, 1e-3, weight_decay=0.05)
    loader = DataLoader(
        Lessons(args.sprites, 10**7, few=bool(args.start)), batch_size=48, num_workers=args.workers,
        collate_fn=_side_by_side, multiprocessing_context="fork" if args.workers else None,
    )  # fmt: skip
    ways, begun = list(HEADS).index("way"), time.monotonic()
    for step, (events, targets) in enumerate(loader):
        share = (time.monotonic() - begun) / (60 * args.minutes)
        if share >= 1:
            break
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, step / 50) * (1 - share)
        pixels = degraded(events.to(args.device).float() / 127.5 - 1, DAMAGES[step % len(DAMAGES)])
        targets = targets.to(args.device)
        for seen in _frames_of(bool(args.start)):
            found = {"who": judge.actors(moved(pixels[:, :, seen].transpose(1, 2)), targets[:, ways])}
            found |= {} if args.start else judge.events(pixels)
            loss = sum(F.cross_entropy(found[name], targets[:, list(HEADS).index(name)]) for name in found)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
        if step % 100 == 0:
            right = (found["who"].argmax(1) == targets[:, 0]).float().mean()
            print(f"step {step}: loss {loss.item():.3f}, who right {right:.0%}, {share:.0%} of the time", flush=True)
    save_file({name: value.cpu().half() for name, value in judge.state_dict().items()}, args.out)
    print(args.out)


def _frames_of(few: bool) -> tuple[Tensor, ...]:
    """The frames of an event that actors are named by, in each of a batch's steps: where few were drawn, four; else all
    in two halves, for drawing takes longer than learning."""
    if few:
        return (torch.arange(0, FRAMES, 4) + torch.randint(4, ()),)
    return torch.randperm(FRAMES).split(FRAMES // 2)


def _side_by_side(clips: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    events, targets = zip(*clips, strict=True)
    return torch.cat(events), torch.cat(targets)


def load_judge(path: str, device: str = "cpu") -> EventJudge:
    """A trained judge."""
    judge = EventJudge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.to(device).eval()


@torch.no_grad()
def verdicts(judge: EventJudge, events: UInt8[Tensor, "n 3 t h w"], how: str = "none") -> Int[Tensor, "n k"]:
    """The number of the label that each head gives each event."""
    device = next(judge.parameters()).device
    found = judge(degraded(events.to(device).float() / 127.5 - 1, how))
    return torch.stack([found[name].argmax(1) for name in HEADS], 1).cpu()


def check(args: argparse.Namespace) -> None:
    """How often the judge is right on real clips that it never saw, whole and damaged; the bar is 97%."""
    judge, result = load_judge(args.judge, args.device), {}
    for split, first in (("train", 0), ("tune", 5 * 10**7), ("report", 0)):
        for how in DAMAGES:
            right = []
            for number in range(first, first + args.clips):
                events, targets = drawn(split, number, args.sprites, LENGTHS[0])
                right.append(verdicts(judge, events, how) == targets)
            shares = torch.cat(right).float().mean(0)
            result[f"{split}, {how}"] = {name: round(float(one), 4) for name, one in zip(HEADS, shares, strict=True)}
            print(f"{split}, {how}: {result[f'{split}, {how}']}", flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
