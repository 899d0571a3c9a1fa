"""Five CPU steps of three shrunken recipes, and what became of every trained tensor: a refactor changes no bit of it.

python -m tests.tools.five_steps write     # renew five_steps.json, in a commit that says why the numbers changed
python -m tests.tools.five_steps check
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_suffix(".json")
COMMON = (
    "sample.prompts=[]", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.logger=false",
    "data.workers=0", "data.synthetic={name: shapes, clips: 6, images: 6, held_out: 2}", "train.log_every=1",
)  # fmt: skip
RUNS: dict[str, tuple[str, ...]] = {
    "quickstart_cpu": (
        "model.dim=32", "model.depth=4", "text.0.dim=16", "data.batch={image: 2, video: 2}", "score.clips=0",
        "stages.images.train.steps=5", "stages.videos.train.steps=5", "stages.videos.data.mix.video=1",
        "train.optimizer=adamw", "train.lr=2e-3",  # Muon makes more of the last bits than other machines agree on
    ),
    "footage_64": (
        "model.dim=32", "model.depth=4", "text.0.dim=16", "data.shards.video=null", "data.batch.video=1",
        "stages.short.train.steps=5", "stages.long.train.steps=5",
    ),
    "tae_8x8x8": (
        "autoencoder.width=8", "data.shards={image: null, video: null}", "data.validation={image: null, video: null}",
        "reconstruction.features=none", "data.batch={image: 2, video: 1}", "data.mix={image: 1, video: 1}",
        "data.frames=9", "data.size=[32, 32]", "reconstruction.discriminator_width=8",
        "reconstruction.discriminator_layers=2", "train.warmup=1",
        "stages.short.train.steps=5", "stages.detail.train.steps=5", "stages.detail.data.size=[48, 48]",
        "stages.detail.data.batch={image: 2, video: 1}", "stages.detail.reconstruction.adversarial_start=1",
    ),
}  # fmt: skip
"""Recipe -> its overrides. Every part takes part: both kinds of batch, all scan orders and shifts, the critic."""


def environment() -> dict[str, str]:
    """What may change the last bit of a number; libraries choose their kernels by the processor's model, too."""
    import torch

    cpu = Path("/proc/cpuinfo")
    about = dict(re.findall(r"(?m)^(cpu family|model|stepping)\s*: (.*)$", cpu.read_text() if cpu.is_file() else ""))
    return {
        "processor": " ".join(f"{name} {number}" for name, number in about.items()),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


Described = dict[str, list[Any]]
"""Name of a tensor -> the first 12 digits of the SHA-256 of its bytes, and its Euclidean norm."""


def tensors_of(path: Path) -> Described:
    """Every trained tensor of a weights file, and those of the averaged copy as one."""
    import torch
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        names = sorted(file.keys())
        averaged = [file.get_tensor(name).double().flatten() for name in names if name.startswith("averaged.")]
        raw = {name.removeprefix("raw."): file.get_tensor(name) for name in names if name.startswith("raw.")}
    return {name: described(tensor) for name, tensor in (raw | {"averaged": torch.cat(averaged)}).items()}


def described(tensor: Any) -> list[Any]:
    data = tensor.contiguous().view(-1).numpy().tobytes()
    return [hashlib.sha256(data).hexdigest()[:12], float(f"{float(tensor.double().norm()):.7g}")]


def trained(name: str, folder: Path) -> Described:
    """``stage.tensor`` -> hash and norm, after the steps of a recipe."""
    from lingen.run import fit

    fit(name, (*COMMON, *RUNS[name]), run=folder)
    return run_tensors(folder)


def run_tensors(folder: Path) -> Described:
    """``stage.tensor`` of every finished stage of a run folder."""
    found: Described = {}
    for file in sorted(folder.glob("stages/*/weights.safetensors")):
        found |= {f"{file.parent.name}.{tensor}": value for tensor, value in tensors_of(file).items()}
    return found


def differences(found: Described, kept: Described, *, bits: bool, limit: float = 1e-4) -> list[str]:
    """A line for each tensor that is missing, new or another: by its bits, or by its norm to `limit` (relative)."""
    lines = [f"{name}: {'missing' if name in kept else 'new'}" for name in sorted(found.keys() ^ kept.keys())]
    for name in sorted(found.keys() & kept.keys()):
        (mark, norm), (kept_mark, kept_norm) = found[name], kept[name]
        if bits and mark != kept_mark:
            lines.append(f"{name}: other bits (norm {norm}, was {kept_norm})")
        elif not bits and abs(norm - kept_norm) > limit * max(abs(kept_norm), 1e-6):
            lines.append(f"{name}: norm {norm}, was {kept_norm}")
    return lines


def as_text(record: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each tensor, so that a change shows as lines of a diff."""
    parts = (
        f"{json.dumps(part)}: {{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items()) + "\n}"
        for part, rows in record.items()
    )
    return "{" + ",\n".join(parts) + "}\n"


def main(what: str) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LINGEN_CACHE"] = str(Path(folder) / "cache")
        found = {name: trained(name, Path(folder) / name) for name in RUNS}
    if what == "write":
        old_run = json.loads(RECORD.read_text())["old_run"]  # made once, by the commit that made the folder
        RECORD.write_text(as_text({"environment": environment(), **found, "old_run": old_run}))
        return 0
    kept = json.loads(RECORD.read_text())
    bits = kept["environment"] == environment()
    lines = [f"{name}: {line}" for name in RUNS for line in differences(found[name], kept[name], bits=bits)]
    print(*lines, f"{len(lines)} differences, {'bit for bit' if bits else 'by norms'}", sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
