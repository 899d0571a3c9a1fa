"""A data set of encoded pictures, one of which has very large latents."""

from __future__ import annotations

import io
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np

from tests.helpers.tiny import write_recipe

PICTURES = 104
STEPS = 44
"""Of a stage: less than an epoch, with those on the way back."""
AT = 38
"""The step, counted from 1, that takes the poisoned picture."""
SHORT = [
    "data.mix.video=0", "data.validation.video=null", "sample.prompts=[]", "train.log_every=1",
    f"stages.images.train.steps={STEPS}", "train.checkpoint_every=8",
]  # fmt: skip


def write_pictures(folder: Path) -> Path:
    """A recipe whose stage `images` meets the poisoned picture at step `AT`, as the second of its two samples."""
    from lingen.data.datamodule import ClipData
    from lingen.data.shards import write_shards
    from lingen.media import encode_picture
    from lingen.prepare.encode import Encoding, encode_shards
    from lingen.prepare.index import index_folder
    from lingen.recipe import load_stages

    rng = np.random.default_rng(0)
    pictures = [
        {"__key__": f"{n:02d}", "png": encode_picture(rng.integers(0, 255, (8, 8, 3), np.uint8)), "txt": "noise"}
        for n in range(PICTURES)
    ]
    write_shards(pictures, f"{folder}/raw/image-%d.tar")
    index_folder(folder / "raw", 0)
    recipe, to_encode = folder / "spikes.yaml", [*SHORT, f"data.shards={{image: {folder}/raw}}"]
    write_recipe(recipe, folder)
    encode_shards(load_stages(recipe, to_encode)[:1], folder / "encoded", Encoding(precision="float32"))
    recipe.write_text(recipe.read_text().replace(f"{folder}/image-*.tar", f"{folder}/encoded"))
    batch = next(islice(ClipData(load_stages(recipe, SHORT)[0]).batches(), AT - 1, None))
    _poison(folder / "encoded", batch.keys[1].partition(":")[2])
    return recipe


def _poison(folder: Path, key: str) -> None:
    """Makes the latents of a sample 10,000 times as large, in place."""
    for path in folder.glob("*.tar"):
        data = bytearray(path.read_bytes())
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name == f"{key}.latents.npy":
                    place = slice(member.offset_data, member.offset_data + member.size)
                    file = io.BytesIO()
                    np.save(file, np.load(io.BytesIO(data[place])) * np.float32(1e4))
                    data[place] = file.getvalue()
        path.write_bytes(data)
