"""What is measured on one clip alone: motion, flicker, drift, coherence of its frames, and how it follows its text."""

from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from lingen.data.synthetic import parse_caption
from lingen.media import sheet_frames
from lingen.metrics.shapes import judge
from lingen.recipe.errors import RecipeError

DISTANCES = (1, 2, 5, 10, 20, 50)
"""Frames between two whose features are compared."""


def measure_motion(clip: UInt8[np.ndarray, "t h w 3"], fps: float) -> dict[str, float]:
    """By dense optical flow (DIS, Kroeger et al., arXiv 1603.03590) between neighbouring frames. motion: mean length of
    the flow, in heights of the frame a second. flicker: mean absolute difference (grey, 0..1) of a frame and the next
    one moved back along the flow (the warping error of Lai et al., arXiv 1808.00449)."""
    flows, moves, errors = cv2.DISOpticalFlow.create(cv2.DISOpticalFlow_PRESET_MEDIUM), [], []
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip]
    height, width = grey[0].shape
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)
    for one, other in zip(grey, grey[1:], strict=False):
        flow = flows.calc(one, other, np.zeros_like(grid))
        back = cv2.remap(other, grid + flow, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[call-overload]
        moves.append(np.linalg.norm(flow, axis=-1).mean() / height * fps)
        errors.append(np.abs(back.astype(float) - one).mean() / 255)
    return {"motion": float(np.mean(moves)), "flicker": float(np.mean(errors))}


def measure_drift(clip: UInt8[np.ndarray, "t h w 3"], fps: float) -> dict[str, float]:
    """How the last quarter differs from the first, a second between their middles. colour drift: distance of mean
    colours (RGB, 0..1). sharpness drift: log ratio of mean variances of the Laplacian, negative where a clip blurs."""
    part = max(1, len(clip) // 4)
    seconds, ends = max(len(clip) - part, 1) / fps, (clip[:part], clip[-part:])
    first, last = (one.mean((0, 1, 2)) / 255 for one in ends)
    grey = [[cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in one] for one in ends]
    sharp = [np.mean([cv2.Laplacian(frame, cv2.CV_64F).var() for frame in one]) + 1 for one in grey]
    colour = float(np.linalg.norm(last - first)) / seconds
    return {"colour drift": colour, "sharpness drift": float(np.log(sharp[1] / sharp[0])) / seconds}


def measure_coherence(features: Float[Tensor, "t d"], name: str, fps: float) -> dict[str, float]:
    """Mean cosine of features of frames k apart, for each k of `DISTANCES` that the clip has. identity drift: 1 -
    cosine of the mean features of its first and last quarter, a second."""
    unit, part = F.normalize(features.double(), dim=1), max(1, len(features) // 4)
    near = {k: float((unit[:-k] * unit[k:]).sum(1).mean()) for k in DISTANCES if k < len(unit)}
    ends = float(F.cosine_similarity(features[:part].double().mean(0), features[-part:].double().mean(0), 0))
    drift = {f"identity drift, {name}": (1 - ends) * fps / max(len(unit) - part, 1)}
    return {f"coherence@{k}, {name}": value for k, value in near.items()} | drift


def measure_clip(clip: UInt8[np.ndarray, "t h w 3"], fps: float, prompt: str) -> dict[str, float]:
    """All that needs no network: coherence and identity drift are of 16 x 16 pixels. Of one frame, or of frames too
    small for the flow (below 12 pixels), what the prompt asks for alone."""
    found = measure_shapes(clip, prompt)
    if len(clip) > 1 and min(clip.shape[1:3]) >= 12:
        small = np.stack([cv2.resize(frame, (16, 16), interpolation=cv2.INTER_AREA) for frame in clip])
        found |= measure_motion(clip, fps) | measure_drift(clip, fps)
        found |= measure_coherence(torch.from_numpy(small).flatten(1).float() - 128, "pixels", fps)
    return found


def measure_shapes(clip: UInt8[np.ndarray, "t h w 3"], prompt: str) -> dict[str, float]:
    """Whether a clip of the shapes data set shows its prompt (`lingen.metrics.shapes`): 1 or 0 for each attribute and
    all; nothing where the prompt is of other words."""
    try:
        asked = parse_caption(prompt)
    except ValueError:
        return {}
    verdict = judge(clip)
    right = {name: getattr(verdict, name) == getattr(asked, name) for name in ("colour", "shape", "motion")}
    right["motion"] |= asked.motion is None and not verdict.empty
    return {f"text: {name}": float(one) for name, one in {**right, "all": all(right.values())}.items()}


class ClipScore:
    """100 times the cosine of CLIP's features of a text and of frames, at least 0 (Hessel et al., arXiv 2104.08718),
    mean of eight spread over a clip. `path`: a folder of open_clip's (configuration and weights)."""

    def __init__(self, path: str | Path, device: torch.device):
        import open_clip

        if not (Path(path) / "open_clip_config.json").is_file():
            raise RecipeError(f"--clip {path} is no folder with open_clip_config.json and weights of open_clip.")
        self.model, _, self.prepare = open_clip.create_model_and_transforms(f"local-dir:{path}", device=device)
        self.model.eval()
        self.tokens, self.device = open_clip.get_tokenizer(f"local-dir:{path}"), device

    @torch.no_grad()
    def __call__(self, clip: UInt8[np.ndarray, "t h w 3"], prompt: str) -> float:
        chosen = sorted(sheet_frames(len(clip), 8))
        frames = torch.stack([self.prepare(Image.fromarray(clip[number])) for number in chosen])
        images = self.model.encode_image(frames.to(self.device)).float()
        text = self.model.encode_text(self.tokens([prompt]).to(self.device)).float()
        return 100 * max(0.0, float(F.cosine_similarity(images, text).mean()))
