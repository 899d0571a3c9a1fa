"""Emoji theatre: its components, its judges, and the score of a model.

The judges (`tests.yardsticks.theatre_judge`) are trained on clips of the split ``tune`` alone, checked on real clips of
all three, and then judge what a model makes of captions of ``report``. Every score appends a line to a file of uses, so
that nobody reports the best of many.

    python -m tests.yardsticks.theatre components --sprites data/theatre/sprites.webp --out pca_theatre.safetensors
    python -m tests.yardsticks.theatre train --sprites data/theatre/sprites.webp --out judge.safetensors
    python -m tests.yardsticks.theatre check --sprites data/theatre/sprites.webp --judge judge.safetensors
    python -m tests.yardsticks.theatre finer --weights denoiser.safetensors --out start.safetensors
    python -m tests.yardsticks.theatre times --weights denoiser.safetensors --out times.json
    python -m tests.yardsticks.theatre sample --weights FOLDER --out clips.npz
    python -m tests.yardsticks.theatre score --judge judge.safetensors --clips clips.npz --out docs/results/theatre.json
"""

import argparse
import itertools
import json
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from lingen.autoencoder.pca import PCA
from lingen.data.acting import DrawnIndex, load_sprites, perform
from lingen.data.fingerprint import hash_weights
from lingen.data.theatre import Split, Storyboard, Theatre, caption_of, storyboard
from lingen.media import as_floats, contact_sheet, encode_animation
from lingen.metrics.shapes import diversity_of, wilson
from lingen.provenance import git_commit, versions
from lingen.recipe import load_stages, to_yaml
from lingen.sampling.clips import (
    as_sampled,
    clip_size,
    decoded,
    encode_prompts,
    sample_latents,
    settings_with,
    takes_of,
)
from lingen.training.denoiser import LinGenModule
from lingen.training.weights import load_denoiser, save_weights
from lingen.weights import write_tensors
from tests.yardsticks.results import head
from tests.yardsticks.theatre_judge import (
    HEADS,
    LENGTHS,
    SIDE,
    check,
    drawn,
    load_judge,
    targets_of,
    train,
    verdicts,
    windows_of,
)
from tests.yardsticks.times import joined


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


def finer(args: argparse.Namespace) -> None:
    """Weights of an earlier model as a start for the recipe's. Where its tokens hold two latent frames each: what goes
    in is the sum, what comes out the mean of the two, and each position in time becomes two. Where it knows no parts of
    captions: how far a part has come starts at having no effect."""
    coarse = load_denoiser(args.weights)
    recipe = load_stages("theatre_128")[1]
    fine = LinGenModule(recipe)
    own = fine.model.state_dict()
    torch.manual_seed(0)
    for name, value in coarse.model.state_dict().items():
        if coarse.recipe.model.patch[0] == 1:
            pass
        elif name == "patchify.weight":  # the numbers of a patch: channel first, then time
            value = value[:, 0::2] + value[:, 1::2]
        elif name.startswith("unpatchify"):
            value = (value[0::2] + value[1::2]) / 2
        elif name == "positions.t":
            value = value.repeat_interleave(2, 0)[: len(own[name])] + 0.1 * torch.randn_like(own[name])
        own[name] = value
    fine.model.load_state_dict(own)
    fine.text.load_state_dict(coarse.text.state_dict())
    save_weights(Path(args.out), fine, to_yaml(recipe), 0)
    print(args.out)


@torch.no_grad()
def times(args: argparse.Namespace) -> None:
    """How surely noise at a time still tells two clips of one caption apart (nats between them, the median), and the
    error of the clean clip that weights see in it: over clips of ``tune``."""
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
    about = head({}, program="python -m tests.yardsticks.theatre") | {"hash": hash_weights(_file_of(args.weights))}
    Path(args.out).write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


def _file_of(weights: str) -> Path:
    """The file itself, so that its hash is the same however it was named."""
    return Path(weights) / "denoiser.safetensors" if Path(weights).is_dir() else Path(weights)


def asked(count: int, seconds: float, events: int | None = None) -> list[tuple[int, Storyboard]]:
    """The numbers of the first storyboards to report on, and these; only those of so many events, if that is given."""
    boards = ((number, storyboard("report", 0, number, seconds)) for number in itertools.count())
    fitting = (one for one in boards if events in (None, len(one[1].events)))
    return list(itertools.islice(fitting, count))


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
    """A clip of each, `args.batch` of them at a time."""
    module = load_denoiser(args.weights).to(args.device)
    settings = settings_with(module.recipe.sample, seed=args.seed, steps=args.steps, guidance=args.guidance)
    prompts, clip = [caption_of(board) for board in boards], clip_size(module, args.seconds)
    with as_sampled(module):
        texts = encode_prompts(module, prompts, clip)
        for at in range(0, len(boards), args.batch):
            some = slice(at, at + args.batch)
            for latents in sample_latents(module, takes_of(prompts)[some], joined(texts[some]), clip, settings):
                yield decoded(module, latents, clip, settings)


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


def show_stories(clips: list[np.ndarray], path: Path, boards: list[Storyboard], found: list[Tensor]) -> None:
    """A row for each story: of each event two frames, and under them what it should show, red where the judge sees
    another actor or action."""
    rows = []
    for clip, board, labels in zip(clips, boards, found, strict=False):
        edges, tiles = np.linspace(0, len(clip), len(board.events) + 1), []
        for number, (event, right) in enumerate(zip(board.events, labels == targets_of(board.events), strict=True)):
            frames = [clip[int(edges[number] + share * (edges[number + 1] - edges[number]))] for share in (0.35, 0.65)]
            text = Image.new("RGB", (2 * clip.shape[2], 26), "white")
            what = "\n".join(textwrap.wrap(caption_of(Storyboard((event,), "")), clip.shape[2] // 3))
            ImageDraw.Draw(text).text((2, 1), what, fill="black" if right[:2].all() else "firebrick", spacing=1)
            tiles.append(np.concatenate([np.concatenate(frames, 1), np.asarray(text)], 0))
        rows.append(np.concatenate(tiles, 1))
    widest = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 6), (0, widest - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    Image.fromarray(np.concatenate(rows)).save(path, quality=75, method=6)


def sample(args: argparse.Namespace) -> None:
    """Makes a model's clips of captions to report on, once, and keeps what judges see of them, the first ones whole."""
    boards = [board for _, board in asked(args.prompts, args.seconds, args.events)]
    events, first = [], []
    for number, (board, clip) in enumerate(zip(boards, clips_of_boards(boards, args), strict=True)):
        events.append(windows_of(clip, len(board.events)).numpy())
        first += [clip] if number < args.sheet else []
        print(f"{number + 1}/{len(boards)} {caption_of(board)}", flush=True)
    given = ("seconds", "prompts", "events", "seed", "steps", "guidance")
    about: dict[str, Any] = {name: getattr(args, name) for name in given}
    about |= {"weights": hash_weights(_file_of(args.weights)), "commit": git_commit(), "versions": versions()}
    np.savez_compressed(args.out, events=np.concatenate(events), first=np.stack(first), about=json.dumps(about))


def score(args: argparse.Namespace) -> None:
    """Judges the clips of `sample` and real clips of the same captions, writes both, and notes that the captions were
    used."""
    held = np.load(args.clips)
    about, judge = json.loads(str(held["about"])), load_judge(args.judge, args.device)
    numbers, boards = zip(*asked(about["prompts"], about["seconds"], about.get("events")), strict=True)
    boards, events = list(boards), torch.from_numpy(held["events"])
    found = [verdicts(judge, each) for each in events.split([len(board.events) for board in boards])]
    result = {**about, **summary(boards, found)}
    length = next((one for one in LENGTHS if one[0] == about["seconds"]), (about["seconds"], 12.0))
    real = [drawn("report", number, args.sprites, length, seed=0)[0] for number in numbers]
    result["real clips"] = summary(boards, [verdicts(judge, each) for each in real])["rates"]
    if args.again:
        pairs = zip(held["first"], np.load(args.again)["first"], strict=False)
        result["distance of two seeds"] = diversity_of([list(pair) for pair in pairs])
    out = Path(args.out)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (show if about["seconds"] <= 8 else show_stories)([*held["first"]], out.with_suffix(".webp"), boards, found)
    note = {"when": datetime.now(UTC).isoformat(timespec="seconds"), **about}
    with out.with_name("theatre_uses.jsonl").open("a", encoding="utf-8") as uses:
        uses.write(json.dumps(note | {"all": result["rates"]["all"]["share"]}) + "\n")
    print(json.dumps(result["rates"], indent=1))


def nearest(args: argparse.Namespace) -> None:
    """Beside each whole clip of `sample` the clip to train on that is nearest to it, by the mean absolute difference of
    every fourth frame at 32x32 pixels, as a contact sheet, and what the distances are."""
    held = np.load(args.clips)
    clips, seconds = held["first"][: args.first], json.loads(str(held["about"]))["seconds"]
    frames = torch.from_numpy(clips[:, ::4]).movedim(-1, 2)
    few, many, side = frames.shape[1], clips.shape[1], clips.shape[2]
    small = torch.stack([F.interpolate(as_floats(clip), (32, 32), mode="area") for clip in frames])
    index = DrawnIndex.of(Theatre(sprites=args.sprites), "train")
    best = [(float("inf"), 0)] * len(clips)
    for number in range(args.count):
        other = as_floats(index.draw(number, (few, 32, 32), few / seconds)[0].transpose(0, 1))
        far = (small - other).abs().mean((1, 2, 3, 4))
        best = [min(one, (distance, number)) for one, distance in zip(best, far.tolist(), strict=True)]
    whole = [index.draw(number, (many, side, side), many / seconds) for _, number in best]
    pairs = [
        each
        for clip, (other, _) in zip(clips, whole, strict=True)
        for each in (clip, other.permute(1, 2, 3, 0).numpy())
    ]
    names = [caption_of(board) for _, board in asked(len(clips), seconds)]
    told = [f"{distance:.3f} away: {captions[0]}" for (distance, _), (_, captions) in zip(best, whole, strict=True)]
    contact_sheet(pairs, Path(args.out), [name for pair in zip(names, told, strict=True) for name in pair])
    print(json.dumps(best))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(required=True)
    for job in (components, train, check, finer, times, sample, score, nearest):
        own = jobs.add_parser(job.__name__, help=(job.__doc__ or "").replace("%", "%%"))
        own.set_defaults(job=job)
        own.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        own.add_argument("--out", required=job is not check)
        if job is not sample:
            own.add_argument("--sprites", default="data/theatre/sprites.webp")
        if job in (check, score):
            own.add_argument("--judge", required=True)
        if job is train:
            own.add_argument("--minutes", type=float, default=5.0)
            own.add_argument("--workers", type=int, default=2)
            own.add_argument("--start", help="a trained judge: who names actors learns on, by few frames of more clips")
        elif job is finer:
            own.add_argument("--weights", required=True)
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
            own.add_argument("--clips", required=True, help="what `sample` wrote")
            own.add_argument("--again", help="the same with another --seed: how far clips of one caption are apart")
        elif job is nearest:
            own.add_argument("--clips", required=True, help="what `sample` wrote")
            own.add_argument("--count", type=int, default=40_000, help="clips to train on")
            own.add_argument("--first", type=int, default=8, help="clips to look at")
        elif job is sample:
            own.add_argument("--weights", required=True, help="as of `lingen demo --checkpoint`")
            own.add_argument("--prompts", type=int, default=300)
            own.add_argument("--seconds", type=float, default=4.0)
            own.add_argument("--seed", type=int, default=0)
            own.add_argument("--events", type=int, help="only storyboards of so many")
            own.add_argument("--steps", type=int, help="default: as the weights say")
            own.add_argument("--guidance", type=float, help="default: as the weights say")
            own.add_argument("--batch", type=int, default=1, help="clips that are made at a time")
            own.add_argument("--sheet", type=int, default=16, help="clips that are kept whole")
    args = parser.parse_args()
    if args.job is sample and not 1 <= args.sheet <= args.prompts:
        parser.error(f"--sheet is 1 to {args.prompts}, the number of prompts.")
    if args.job is sample and args.batch < 1:
        parser.error(f"--batch is 1 or more, got {args.batch}.")
    if args.job is sample and args.events:
        counts = {len(storyboard("report", 0, number, args.seconds).events) for number in range(200)}
        if args.events not in counts:
            parser.error(f"--events of {args.seconds:g} s are {min(counts)} to {max(counts)}.")
    args.job(args)


if __name__ == "__main__":
    main()
