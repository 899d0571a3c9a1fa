"""The smallest recipe that trains: drawn shapes as real H.264 and PNG, two stages, a second or two."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

TINY = """
model:
  dim: 16
  depth: 2
  mixer: {{name: mate, state_dim: 4, head_dim: 8, window: [2, 2, 2]}}
  patch: [2, 4, 4]
  gate_init: 1.0
autoencoder: pixels
text: {{name: words, dim: 8, buckets: 64}}
data:
  shards: {{image: "{folder}/image-*.tar", video: "{folder}/video-*.tar"}}
  validation: {{video: "{folder}/video-00001.tar"}}
  mix: {{image: 1, video: 2}}
  batch: {{image: 2, video: 2}}
  frames: 4
  size: [8, 8]
  fps: 8
  workers: 0
time: {{shift: 1.0}}
train: {{lr: 1e-2, ema: 0.9, log_every: 2, validation_samples: 4}}
sample: {{steps: 2, guidance: 2.0, schedule: uniform, prompts: [a red square]}}
trainer: {{accelerator: cpu, devices: 1, logger: false}}
stages:
  images: {{data: {{mix: {{video: 0}}}}, train: {{steps: 2}}}}
  clips: {{train: {{steps: 6}}}}
"""


def write_recipe(path: Path, shards: Path) -> Path:
    """The recipe over a folder that `write_shapes` filled."""
    path.write_text(TINY.format(folder=shards))
    return path


def write_shapes(folder: Path) -> Path:
    """Two video shards and one of images."""
    from lingen.data.shards import write_shards
    from lingen.data.synthetic import captions, draw_clip
    from lingen.media import encode_mp4, encode_picture

    rng = np.random.default_rng(0)
    for kind in ("video", "image"):
        samples = []
        for number, caption in enumerate(captions("train", kind)[:16]):
            clip = draw_clip(caption, (16, 16), 6 if kind == "video" else 1, rng)
            media = {"mp4": encode_mp4(clip, 8, exact=True)} if kind == "video" else {"png": encode_picture(clip[0])}
            samples.append({"__key__": f"{number:04d}", **media, "json": {"caption": caption}})
        write_shards(samples, f"{folder}/{kind}-%05d.tar", per_shard=8 if kind == "video" else 16)
    return folder


def as_theatre(run: Path, folder: Path) -> Path:
    """A file of the run's weights that says they were trained on the emoji theatre."""
    from safetensors.torch import load_file, save_file

    from lingen.weights import find_weights, read_metadata

    weights = find_weights(run)
    about = read_metadata(weights)
    told = re.sub(r"\bsynthetic: null", "synthetic: {name: theatre}", about["recipe"])
    assert told != about["recipe"]
    save_file(load_file(weights), out := folder / "theatre.safetensors", about | {"recipe": told})
    return out


def write_broken_shard(folder: Path, shards: Path) -> str:
    """A glob of shards of which one sample is no video and another has no caption."""
    from lingen.data.shards import read_shard, write_shards

    whole = read_shard(shards / "video-00000.tar")
    samples = [{**sample, "__key__": f"good{number}"} for number, sample in zip(range(6), whole, strict=False)]
    samples[2] = {"__key__": "broken", "mp4": b"not a video", "json": samples[2]["json"]}
    samples[4] = {"__key__": "silent", "mp4": samples[4]["mp4"], "json": b"{}"}
    write_shards(samples, f"{folder}/video-%05d.tar")
    return f"{folder}/video-*.tar"
