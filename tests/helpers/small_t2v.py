"""recipes/t2v_68s.yaml as it is shipped (strategy, precision, recomputation, six stages, real encoder classes), at
sizes that a laptop trains: tiny weights on disk and encoded shards."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import torch

from lingen.cli import main
from lingen.data.shards import write_shards
from lingen.data.synthetic import captions, draw_clip
from lingen.files import write_text
from lingen.media import encode_mp4, encode_picture
from lingen.recipe import load_recipe, to_yaml
from lingen.recipe.registry import AUTOENCODERS
from lingen.weights import write_tensors
from tests.helpers import encoders

STEPS = 3
"""Of each stage."""
CLIPS, IMAGES, QUALITY = 16, 12, 6
PARTS = """
extends: t2v_68s
autoencoder: {name: tae, path: weights/tae.safetensors, width: 8}
text:
  - {name: ul2, path: weights/ul2, dim: 16}
  - {name: byt5, path: weights/byt5-small, read: quoted, dim: 16}
  - {name: metaclip, path: weights/metaclip-h14, dim: 16}
"""
"""What `write_small_t2v` makes weights of."""
SMALL = """
model: {dim: 32, depth: 3, ffn_dim: 64, mixer: {state_dim: 8, head_dim: 8}}
data:
  shards: {image: "shards/image-*.tar", video: "shards/video-*.tar"}
  size: [32, 32]
  batch: {image: 2, video: 1}
  workers: 1
train: {checkpoint_every: 1, sample_every: 0, validate_every: 0}
sample: {steps: 2, prompts: [a red circle moves right]}
trainer: {accelerator: cpu, devices: 1, num_nodes: 2}
stages:
  t2i_256:     {data: {size: [16, 16], batch: {image: 2}}, train: {steps: STEPS, warmup: 1}}
  t2v_256_17s: {data: {frames: 8, size: [16, 16], batch: {image: 2, video: 2}}, train: {steps: STEPS, warmup: 1}}
  t2v_512_17s: {data: {frames: 8}, train: {steps: STEPS, warmup: 1}}
  t2v_512_34s: {data: {frames: 16}, train: {steps: STEPS, warmup: 1}}
  t2v_512_68s: {data: {frames: 32}, train: {steps: STEPS, warmup: 1}}
  quality:     {data: {frames: 32}, train: {steps: STEPS, warmup: 1}}
""".replace("STEPS", str(STEPS))


def write_small_t2v(folder: Path, recipe: str = SMALL, frames: int = 32, side: int = 32) -> Path:
    """Makes the recipe `small.yaml` in a folder, with ``weights/`` and encoded ``shards/`` beside it, which it names
    relative to the folder.

    Args:
        recipe: its text, but for `PARTS`.
        frames, side: of the drawn clips.
    """
    weights = folder / "weights"
    encoders.t5(weights / "ul2")
    encoders.byt5(weights / "byt5-small")
    encoders.clip(weights / "metaclip-h14")
    write_text(folder / "small.yaml", PARTS + recipe)
    _write_autoencoder(folder)
    with contextlib.chdir(folder):
        image = _write_raw("image", IMAGES, 1, side)
        video, quality = (
            _write_raw(name, count, frames, side) for name, count in (("video", CLIPS), ("quality", QUALITY))
        )
        _encode(
            "shards", f"data.shards={{image: {image}, video: {video}}}", f"stages.quality.data.shards.video={video}"
        )
        _encode("shards/quality", f"data.shards.video={quality}", "--stage", "quality")
    return folder / "small.yaml"


def _write_autoencoder(folder: Path) -> None:
    """`weights/tae.safetensors`: random numbers, in the form of a finished run's file."""
    recipe = load_recipe(folder / "small.yaml", stage="t2i_256")
    component = {**recipe.autoencoder, "path": None}
    torch.manual_seed(0)
    tensors = AUTOENCODERS.build(component).state_dict()
    metadata = {"format": "lingen", "recipe": to_yaml(recipe), "stage": "main", "step": "1"}
    named = {f"averaged.autoencoder.{name}": value for name, value in tensors.items()}
    write_tensors(folder / "weights" / "tae.safetensors", named, metadata)


def _write_raw(name: str, count: int, frames: int, side: int) -> str:
    """Shards of drawn clips, or of pictures, which have one frame; their pattern."""
    rng, samples = np.random.default_rng(0), []
    for number, caption in enumerate((captions("train", "video") * count)[:count]):
        clip = draw_clip(caption, (side, side), frames, rng)
        media = {"png": encode_picture(clip[0])} if frames == 1 else {"mp4": encode_mp4(clip, 16, exact=True)}
        samples.append({"__key__": f"{number:04d}", **media, "json": {"caption": caption}})
    write_shards(samples, f"raw/{name}-%05d.tar")
    return f"raw/{name}-*.tar"


def _encode(out: str, *words: str) -> None:
    code = main(["encode", "--recipe", "small.yaml", "--out", out, "data.workers=0", *words])
    assert code == 0, f"nothing was encoded to {out}"
