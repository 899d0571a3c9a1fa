"""Judges of the emoji theatre and the score of a model: who does what, where, in which light and order.

One small network looks at one event at a time; its heads name actor, action, way, scene and light. It is trained on
clips of the split ``tune`` alone, checked on degraded clips of the other ones, and then judges what a model makes of
captions of ``report``. Every score appends a line to a file of uses, so that nobody reports the best of many.

    python -m tests.yardsticks.theatre components --sprites data/theatre/sprites.webp --out pca_theatre.safetensors
    python -m tests.yardsticks.theatre train --sprites data/theatre/sprites.webp --out judge.safetensors
    python -m tests.yardsticks.theatre check --sprites data/theatre/sprites.webp --judge judge.safetensors
    python -m tests.yardsticks.theatre times --weights denoiser.safetensors --out times.json
    python -m tests.yardsticks.theatre score --judge judge.safetensors --weights FOLDER --out docs/results/theatre.json
"""

import argparse
import json
import textwrap
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lingen.autoencoder.pca import PCA
from lingen.data.acting import load_sprites, perform
from lingen.data.fingerprint import hash_weights
from lingen.data.theatre import ACTIONS, ACTORS, LIGHTS, SCENES, Event, Split, Storyboard, caption_of, storyboard
from lingen.media import as_floats, encode_animation
from lingen.metrics.shapes import diversity_of, wilson
from lingen.provenance import git_commit, versions
from lingen.weights import write_tensors
from tests.yardsticks.results import head

FRAMES, SIDE = 16, 64
"""What the judge sees of an event."""
WAYS = ("", "left", "right")
HEADS: dict[str, list[str]] = {
    "who": list(ACTORS), "action": ACTIONS, "way": list(WAYS), "scene": SCENES, "light": LIGHTS,
}  # fmt: skip
LENGTHS = ((4.0, 12.0), (16.0, 5.0), (60.0, 3.0))
"""Seconds of the clips that judges learn from, and frames a second that are drawn of them."""


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
        self.heads = nn.ModuleDict({name: nn.Linear(512, len(labels)) for name, labels in HEADS.items()})

    def forward(self, events: Float[Tensor, "b 3 t h w"]) -> dict[str, Float[Tensor, "b n"]]:
        for layer in self.layers:
            events = layer(events)
        hidden = F.silu(self.flat(events.flatten(1)))
        return {name: head(hidden) for name, head in self.heads.items()}


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


def drawn(split: Split, number: int, sprites: str, length: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Events of a clip, and what they show."""
    seconds, fps = length
    board = storyboard(split, 1, number, seconds)
    rng = np.random.default_rng([1, number])
    clip = perform(board, round(seconds * fps), fps, (2 * SIDE, 2 * SIDE), load_sprites(sprites), rng)
    return windows_of(clip, len(board.events)), targets_of(board.events)


class Lessons(Dataset[tuple[Tensor, Tensor]]):
    """Clips of the split ``tune``, of all lengths."""

    def __init__(self, sprites: str, count: int):
        self.sprites, self.count = sprites, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return drawn("tune", number, self.sprites, LENGTHS[(0, 0, 1, 0, 0, 2)[number % 6]])


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
    """Trains for `args.minutes`; a batch is the events of some 48 clips, each batch damaged in another way."""
    torch.manual_seed(0)
    judge = EventJudge().to(args.device).train()
    optimizer = torch.optim.AdamW(judge.parameters(), 1e-3, weight_decay=0.05)
    loader = DataLoader(
        Lessons(args.sprites, 10**7), batch_size=48, num_workers=args.workers, collate_fn=_side_by_side,
        multiprocessing_context="fork" if args.workers else None,
    )  # fmt: skip
    begun = time.monotonic()
    for step, (events, targets) in enumerate(loader):
        share = (time.monotonic() - begun) / (60 * args.minutes)
        if share >= 1:
            break
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, step / 50) * (1 - share)
        pixels = degraded(events.to(args.device).float() / 127.5 - 1, DAMAGES[step % len(DAMAGES)])
        found, targets = judge(pixels), targets.to(args.device)
        loss = sum(F.cross_entropy(found[name], targets[:, at]) for at, name in enumerate(HEADS))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            right = (found["who"].argmax(1) == targets[:, 0]).float().mean()
            print(f"step {step}: loss {loss.item():.3f}, who right {right:.0%}, {share:.0%} of the time", flush=True)
    save_file({name: value.cpu().half() for name, value in judge.state_dict().items()}, args.out)
    print(args.out)


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
    for split, first in (("train", 0), ("tune", 5 * 10**7)):
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


def components(args: argparse.Namespace) -> None:
    """Principal components of clips to train on, in bfloat16, and how well they keep clips of ``tune``."""
    sprites = load_sprites(args.sprites)

    def clips(split: Split, count: int) -> Iterator[Tensor]:
        for number in range(count):
            rng = np.random.default_rng([1, number])
            clip = perform(storyboard(split, 1, number, 4.0), 48, 12.0, (2 * SIDE, 2 * SIDE), sprites, rng)
            yield torch.from_numpy(clip).permute(3, 0, 1, 2)[None]

    found = PCA.fit(clips("train", args.clips), (4, 8, 8), args.channels)
    held = {name: value.bfloat16() if value.ndim > 1 else value for name, value in found.state_dict().items()}
    about = {"format": "lingen", "clips": str(args.clips), "split": "train", "commit": git_commit() or "unknown"}
    write_tensors(Path(args.out), {f"averaged.autoencoder.{name}": value for name, value in held.items()}, about)
    stored = PCA(path=args.out, channels=args.channels)
    errors = []
    for clip in clips("tune", 24):
        again = stored.decode(stored.encode(as_floats(clip))).clamp(-1, 1)
        errors.append(10 * np.log10(4 / float((again - as_floats(clip)).square().mean())))
    print(f"{args.out}: {np.mean(errors):.2f} dB on 24 clips of tune")


@torch.no_grad()
def times(args: argparse.Namespace) -> None:
    """How surely noise at a time still tells two clips of one caption apart (nats between them, the median), and the
    error of the clean clip that weights see in it: over clips of ``tune``."""
    from lingen.sampling.clips import clip_size, encode_prompts
    from lingen.training.weights import load_denoiser

    model, sprites = load_denoiser(args.weights), load_sprites(args.sprites)

    def latents(board: Storyboard, *seed: int) -> Tensor:
        clip = perform(board, 48, 12.0, (2 * SIDE, 2 * SIDE), sprites, np.random.default_rng(seed))
        return model.autoencoder.encode(as_floats(torch.from_numpy(clip).permute(3, 0, 1, 2)[None]))

    boards = [storyboard("tune", 0, number, 4.0) for number in range(args.clips)]
    clips = [latents(board, 1, number) for number, board in enumerate(boards)]
    others = [latents(board, 2, number) for number, board in enumerate(boards)]
    apart = torch.stack([(one - other).square().sum() for one, other in zip(clips, others, strict=True)]).median()
    texts = encode_prompts(model, [caption_of(board) for board in boards], clip_size(model))
    rows = []
    for time_ in args.at:
        errors = []
        for number, (clip, text) in enumerate(zip(clips, texts, strict=True)):
            noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(number))
            seen = time_ * clip + (1 - time_) * noise
            velocity = model.model(seen, torch.tensor([time_]), text.text)
            errors.append(float((seen + (1 - time_) * velocity - clip).square().mean()))
        nats = float(apart) * (time_ / (1 - time_)) ** 2 / 2
        rows.append({"time": time_, "nats": nats, "error": float(np.mean(errors))})
        print(rows[-1], flush=True)
    about = head({}, program="python -m tests.yardsticks.theatre") | {"hash": hash_weights(Path(args.weights))}
    Path(args.out).write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


def asked(count: int, seconds: float) -> list[Storyboard]:
    """The first storyboards to report on."""
    return [storyboard("report", 0, number, seconds) for number in range(count)]


def summary(boards: list[Storyboard], found: list[Tensor]) -> dict[str, Any]:
    """Shares of what is right with 95% intervals (of events, of orders of two, of whole clips), and confusions."""
    targets = [targets_of(board.events) for board in boards]
    right = [one == other for one, other in zip(found, targets, strict=True)]
    events = torch.cat(right)
    columns = {name: events[:, at] for at, name in enumerate(HEADS)}
    columns["who and action"] = events[:, :2].all(1)
    clips = {
        "order of two": torch.tensor([bool(one[:, :2].all()) for one in right if len(one) == 2]),
        "all": torch.tensor([bool(one.all()) for one in right]),
    }
    rates = {name: _rate(column) for name, column in (columns | clips).items() if len(column)}
    confusions = {}
    for at, (name, labels) in enumerate(HEADS.items()):
        pairs = zip(torch.cat(targets)[:, at].tolist(), torch.cat(found)[:, at].tolist(), strict=True)
        wrong = [f"{labels[one]} -> {labels[other]}" for one, other in pairs if one != other]
        confusions[name] = dict(sorted({text: wrong.count(text) for text in wrong}.items(), key=lambda x: -x[1])[:20])
    drift = [float(torch.cat([one[at : at + 1, :2].all(1) for one in right if len(one) > at]).float().mean())
             for at in range(max(map(len, right)))]  # fmt: skip
    return {"rates": rates, "right by place in the story": drift, "confusions": confusions}


def _rate(column: Tensor) -> dict[str, float]:
    low, high = wilson(int(column.sum()), len(column))
    return {"share": float(column.float().mean()), "low": low, "high": high, "of": len(column)}


def clips_of_boards(boards: list[Storyboard], args: argparse.Namespace) -> Iterator[np.ndarray]:
    """A clip of each, one model for all of them."""
    from lingen.sampling.clips import generate

    prompts = [caption_of(board) for board in boards]
    yield from generate(args.weights, prompts, seconds=args.seconds, steps=args.steps, seed=args.seed)


def show(clips: list[np.ndarray], path: Path, boards: list[Storyboard], found: list[Tensor], columns: int = 4) -> None:
    """Clips side by side as one animated picture, under each its caption and what the judge took for wrong."""
    side, lines = clips[0].shape[2], 6
    tiles = []
    for clip, board, labels in zip(clips, boards, found, strict=False):
        wrong = (labels != targets_of(board.events)).nonzero().tolist()
        told = ["wrong: " + ", ".join(f"{list(HEADS)[head]} of {event + 1}" for event, head in wrong)] if wrong else []
        text = Image.new("RGB", (side, 12 * lines), "white")
        for at, line in enumerate([*textwrap.wrap(caption_of(board), side // 6), *told][-lines:]):
            ImageDraw.Draw(text).text((2, 12 * at), line, fill="firebrick" if line in told else "black")
        tiles.append(np.concatenate([clip, np.broadcast_to(np.asarray(text), (len(clip), 12 * lines, side, 3))], 1))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[at : at + columns], 2) for at in range(0, len(tiles), columns)]
    path.write_bytes(encode_animation(np.concatenate(rows, 1), "webp", 12.0, quality=60, method=6))


def score(args: argparse.Namespace) -> None:
    """Judges a model on captions to report on, writes the result, and notes that they were used."""
    boards, judge = asked(args.prompts, args.seconds), load_judge(args.judge, args.device)
    found, first = [], []
    for number, (board, clip) in enumerate(zip(boards, clips_of_boards(boards, args), strict=True)):
        found.append(verdicts(judge, windows_of(clip, len(board.events))))
        first += [clip] if number < args.sheet else []
        print(f"{number + 1}/{len(boards)} {caption_of(board)}", flush=True)
    weights = hash_weights(Path(args.weights))
    about = {
        "seconds": args.seconds,
        "prompts": len(boards),
        "seed": args.seed,
        "steps": args.steps,
        "weights": weights,
    }
    result = {**about, **summary(boards, found), "commit": git_commit(), "versions": versions()}
    again = argparse.Namespace(**{**vars(args), "seed": args.seed + 1})
    pairs = zip(first, clips_of_boards(boards[: len(first)], again), strict=True) if args.repeat else ()
    result["distance of two seeds"] = diversity_of([list(pair) for pair in pairs])
    out = Path(args.out)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if first:
        show(first, out.with_suffix(".webp"), boards, found)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    with out.with_name("theatre_uses.jsonl").open("a", encoding="utf-8") as uses:
        uses.write(json.dumps({"when": when, **about, "all": result["rates"]["all"]["share"]}) + "\n")
    print(json.dumps(result["rates"], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(required=True)
    for job in (components, train, check, times, score):
        own = jobs.add_parser(job.__name__, help=job.__doc__)
        own.set_defaults(job=job)
        own.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        own.add_argument("--out", required=job is not check)
        if job is not score:
            own.add_argument("--sprites", default="data/theatre/sprites.webp")
        if job in (check, score):
            own.add_argument("--judge", required=True)
        if job is train:
            own.add_argument("--minutes", type=float, default=5.0)
            own.add_argument("--workers", type=int, default=2)
        elif job is times:
            own.add_argument("--weights", required=True)
            own.add_argument("--clips", type=int, default=12)
            own.add_argument("--at", type=float, nargs="+", default=[0.003, 0.01, 0.03, 0.06, 0.12, 0.25, 0.5])
        elif job is components:
            own.add_argument("--clips", type=int, default=1000)
            own.add_argument("--channels", type=int, default=80)
        elif job is check:
            own.add_argument("--clips", type=int, default=200)
        elif job is score:
            own.add_argument("--weights", required=True, help="as of `lingen demo --checkpoint`")
            own.add_argument("--prompts", type=int, default=300)
            own.add_argument("--seconds", type=float, default=4.0)
            own.add_argument("--seed", type=int, default=0)
            own.add_argument("--steps", type=int)
            own.add_argument("--sheet", type=int, default=24, help="clips on the contact sheet")
            own.add_argument("--repeat", action="store_true", help="those of the sheet with another seed, too")
    args = parser.parse_args()
    args.job(args)


if __name__ == "__main__":
    main()
