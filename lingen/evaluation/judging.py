"""A clip -> its features and measures. What was measured is kept by the hash of the file and of all that it depends on:
a second start goes on, and real clips are measured once for all models."""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
import torch

from lingen.evaluation.clips import ClipFile, View, show_clip
from lingen.evaluation.features import network_of
from lingen.files import cache_folder, whole_file
from lingen.kernels.choice import best_device
from lingen.media import read_video
from lingen.metrics.measures import ClipScore, measure_coherence, measure_drift, measure_motion, measure_shapes
from lingen.provenance import version_of, versions
from lingen.recipe.errors import RecipeError
from lingen.weights import hash_tensors


@dataclass(frozen=True)
class Judged:
    """Measures of a clip, and of each network a row [d] of features; of one for frames that of the middle frame."""

    values: dict[str, float]
    features: dict[str, np.ndarray]
    codec: str = ""
    sha256: str = ""


class Judge:
    """Measures clips, in words of the command line: `features` for `network_of`, `clip` for `ClipScore`, `device` for
    `best_device`. RecipeError for what is not there."""

    def __init__(self, features: Sequence[str], view: View, clip: str | None = None, device: str | None = None):
        self.view, self.device, self.cache = view, best_device(device), cache_folder() / "evaluation"
        self.networks = {words.partition("=")[0]: network_of(words).to(self.device) for words in features}
        if "i3d" in self.networks and view.frames < 9:
            raise RecipeError(
                f"I3D needs at least 9 frames, got --frames {view.frames}; name others: --features efficientnet."
            )
        self.text = ClipScore(clip, self.device) if clip else None
        used = self.networks | ({"clip": self.text.model} if self.text else {})
        networks = {name: hash_tensors(one.state_dict())[:16] for name, one in used.items()}
        own = {"opencv": cv2.__version__, "numpy": version_of("numpy"), "scipy": version_of("scipy")}
        place = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        how = {"resize": "libswscale, covering", "crop": "centre", "device": place, "versions": versions() | own}
        self.fingerprint: dict[str, Any] = {"networks": networks, **asdict(view), **how}

    def __call__(self, clip: ClipFile) -> Judged:
        """ValueError or OSError for a clip that cannot be read."""
        data = clip.path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        asked = json.dumps([digest, clip.prompt, self.fingerprint], sort_keys=True)
        kept = self.cache / f"{hashlib.sha256(asked.encode()).hexdigest()}.npz"
        # One that cannot be read is not measured yet, or damaged.
        with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(kept, allow_pickle=False) as held:
            about = json.loads(str(held["about"]))
            return Judged(features={name: held[name] for name in self.networks}, sha256=digest, **about)
        pixels, codec = show_clip(data, self.view)
        found = self.measure(pixels, clip.prompt)
        about = {"values": found.values | measure_shapes(read_video(data)[0], clip.prompt), "codec": codec}
        with whole_file(kept, durable=False) as partial, partial.open("wb") as file:
            np.savez(file, allow_pickle=False, about=np.array(json.dumps(about)), **found.features)
        return Judged(features=found.features, sha256=digest, **about)

    @torch.no_grad()
    def measure(self, pixels: np.ndarray, prompt: str = "") -> Judged:
        """Of uint8 [t h w 3] at the view's frame rate."""
        features: dict[str, np.ndarray] = {}
        values = measure_motion(pixels, self.view.fps) | measure_drift(pixels, self.view.fps)
        clip = torch.from_numpy(pixels).permute(3, 0, 1, 2)[None]
        with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):  # as on a CPU, to 1e-3
            for name, network in self.networks.items():
                shown = clip[:, :, : self.view.frames] if network.video else clip[0].transpose(0, 1)[:, :, None]
                rows = torch.cat([network(some.to(self.device)).float().cpu() for some in shown.split(32)])
                features[name] = rows[len(rows) // 2].numpy()
                values |= {} if network.video else measure_coherence(rows, name, self.view.fps)
            if self.text is not None:
                values["text: CLIP score"] = self.text(pixels, prompt)
        return Judged(values, features)
