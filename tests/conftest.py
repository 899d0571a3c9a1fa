"""Shapes are types, checked while testing: jaxtyping and beartype watch the rooms where tensors flow."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests of the command line read its plain lines.
os.environ.setdefault("COLUMNS", "200")

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    # Before triton is imported: without a GPU the kernels run in Triton's interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)
KERNELS = [
    f"lingen.kernels.{file.stem}"
    for file in (Path(__file__).parents[1] / "lingen" / "kernels").glob("*.py")
    # What Triton compiles cannot be wrapped by a type checker.
    if not file.stem.endswith("_triton") and file.stem != "__init__"
]
install_import_hook(["lingen.blocks", "lingen.flow", "lingen.model", *KERNELS], "beartype.beartype")


def _products_of_bfloat16() -> None:
    """Triton's interpreter keeps bfloat16 as integers and multiplies those: its products are given their values."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    dot, multiply = InterpreterBuilder.create_dot, InterpreterBuilder.create_fmul

    def value(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(x):
        bits = np.ascontiguousarray(x.data).view(np.uint32)
        return TensorHandle(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16), tl.bfloat16)

    def create_dot(self, a, b, *rest):
        return dot(self, value(a), value(b), *rest)

    def create_fmul(self, a, b):
        product = multiply(self, value(a), value(b))
        return rounded(product) if a.dtype.scalar == tl.bfloat16 else product

    InterpreterBuilder.create_dot, InterpreterBuilder.create_fmul = create_dot, create_fmul


if find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
    _products_of_bfloat16()


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run: a limit is kept or not, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """New memory holds NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels are tested: CUDA, or the CPU through Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two video shards and one of images: drawn shapes as real H.264 and PNG."""
    from lingen.data.shards import write_shards
    from lingen.data.synthetic import captions, draw
    from lingen.media import encode_mp4, encode_png

    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for kind in ("video", "image"):
        samples = []
        for number, caption in enumerate(captions("train", kind)[:16]):
            clip = draw(caption, (16, 16), 6 if kind == "video" else 1, rng)
            media = {"mp4": encode_mp4(clip, 8, exact=True)} if kind == "video" else {"png": encode_png(clip[0])}
            samples.append({"__key__": f"{number:04d}", **media, "json": {"caption": caption}})
        write_shards(samples, f"{folder}/{kind}-%05d.tar", per_shard=8 if kind == "video" else 16)
    return folder


@pytest.fixture(scope="session")
def broken_shard(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> str:
    """A glob of shards of which one sample is no video and another has no caption."""
    from lingen.data.shards import read_shard, write_shards

    folder = tmp_path_factory.mktemp("broken")
    whole = read_shard(tiny_shards / "video-00000.tar")
    samples = [{**sample, "__key__": f"good{number}"} for number, sample in zip(range(6), whole, strict=False)]
    samples[2] = {"__key__": "broken", "mp4": b"not a video", "json": samples[2]["json"]}
    samples[4] = {"__key__": "silent", "mp4": samples[4]["mp4"], "json": b"{}"}
    write_shards(samples, f"{folder}/video-%05d.tar")
    return f"{folder}/video-*.tar"


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_shards: Path) -> Path:
    """Two stages that train in a second."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(folder=tiny_shards))
    return path
