"""Captions for footage that has none, by a local image- or video-text model: `lingen data caption`."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lingen.data import manifest
from lingen.data.batch import Progress, no_progress
from lingen.data.captions import captions_of, json_of
from lingen.data.decode import decode_sample
from lingen.data.fingerprint import hash_settings, hash_weights
from lingen.data.manifest import About, Row
from lingen.data.order import digest
from lingen.data.shards import read_sample
from lingen.prepare.journal import JournalEntry, Note, Part, SetFolder, ShardStream, name_for
from lingen.prepare.report import Report, close_set
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import KINDS
from lingen.text.transformers_reader import quiet

SIDE = 448
"""Height of the frames that a model is shown, in pixels; it scales them to what it was trained on (ours)."""
TOP_P = 0.9
"""Captions after the first are sampled from the likeliest words that make up this share (Holtzman et al., 2020)."""


class Captioning(NamedTuple):
    """How to caption."""

    model: Path
    """A folder that `save_pretrained` wrote, with the processor beside the model."""
    prompt: str = ""
    """The instruction for a model that follows instructions; unused by one that only describes pictures."""
    captions: int = 1
    """Captions of each sample: the first is the likeliest, others are sampled."""
    frames: int = 8
    """Frames of a clip that the model sees, spread over its length."""
    max_tokens: int = 120
    replace: bool = False
    """Whether samples that have captions are captioned again."""
    device: str = "cpu"
    part: Part = Part()
    shard_mb: int = 1000

    @property
    def name(self) -> str:
        return self.model.resolve().name

    @property
    def settings(self) -> dict[str, Any]:
        """The settings on which the captions depend."""
        given = {name: getattr(self, name) for name in ("prompt", "captions", "frames", "max_tokens", "replace")}
        return {"model": self.name, "weights": hash_weights(self.model), **given}


class Captioner:
    """A model and its processor; RecipeError where the folder holds none. It is shown a video where it takes one, else
    the frames as pictures, else, where it takes no instructions either, the frame in the middle."""

    @quiet()
    def __init__(self, how: Captioning):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if not how.model.is_dir():
            raise RecipeError(f"--model {how.model} is no folder; name one that holds a model and its processor.")
        try:
            self.processor = AutoProcessor.from_pretrained(how.model, local_files_only=True)
            model: Any = AutoModelForImageTextToText.from_pretrained(how.model, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            said = str(error).strip().splitlines()[0]
            raise RecipeError(f"--model {how.model} holds no image-text model with its processor: {said}") from error
        self.how = how
        self.model = model.to(how.device).eval()

    @quiet()
    @torch.no_grad()
    def describe(self, frames: np.ndarray, seed: int) -> list[str]:
        """Captions of frames, uint8 [t h w 3], each once; those after the first by `seed`. ValueError where the model
        says nothing."""
        inputs = self._inputs(frames)
        plain = {"max_new_tokens": self.how.max_tokens, "do_sample": False, "num_beams": 1}
        said = [*self._say(inputs, plain)]
        if self.how.captions > 1:
            with torch.random.fork_rng(devices=[self.how.device] if self.how.device.startswith("cuda") else []):
                torch.manual_seed(seed)
                drawn = {"do_sample": True, "top_p": TOP_P, "num_return_sequences": self.how.captions - 1}
                said += self._say(inputs, plain | drawn)
        captions = list(dict.fromkeys(text for text in said if text))
        if not captions:
            raise ValueError("no caption: the model said nothing")
        return captions

    def _say(self, inputs: dict[str, Tensor], options: dict[str, Any]) -> list[str]:
        said = self.model.generate(**inputs, **options)
        asked = inputs.get("input_ids")
        if asked is not None and said.shape[1] >= asked.shape[1] and (said[:, : asked.shape[1]] == asked).all():
            said = said[:, asked.shape[1] :]  # the output begins with the prompt
        return [" ".join(text.split()) for text in self.processor.batch_decode(said, skip_special_tokens=True)]

    def _inputs(self, frames: np.ndarray) -> dict[str, Tensor]:
        processor, pictures = self.processor, [Image.fromarray(frame) for frame in frames]
        if getattr(processor, "chat_template", None):
            as_video = len(frames) > 1 and getattr(processor, "video_processor", None) is not None
            images = [{"type": "image", "image": picture} for picture in pictures]
            shown = [{"type": "video", "video": frames}] if as_video else images
            message = {"role": "user", "content": [*shown, {"type": "text", "text": self.how.prompt or "Describe."}]}
            inputs = processor.apply_chat_template(
                [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        else:
            text = {"text": self.how.prompt} if self.how.prompt else {}
            inputs = processor(images=pictures[len(pictures) // 2], return_tensors="pt", **text)
        return {name: value.to(self.how.device) for name, value in inputs.items()}


def caption(folder: Path, out: Path, how: Captioning, progress: Progress = no_progress) -> Report:
    """Copies a set of shards with captions for what has none; writes the manifest once all parts are done. The folder
    holds shards with a manifest, as `lingen data pack --keep-uncaptioned` writes them; RecipeError where it has none,
    and as `Captioner` and `SetFolder`. The same call again goes on where a killed one was."""
    path = folder / manifest.NAME
    settings = {**manifest.about(path).settings, "captioner": how.settings}
    own = SetFolder(out, how.part, settings)
    with own.locked():
        captioner = Captioner(how)
        rows_of = {kind: [row for row in manifest.rows(path) if row.kind == kind] for kind in KINDS}
        work = {kind: rows[how.part.slice_of(len(rows))] for kind, rows in rows_of.items()}
        total, done = sum(map(len, work.values())), 0
        for kind, rows in work.items():
            stream = ShardStream(own, kind, how.shard_mb * 1_000_000)
            names: set[str] = set()
            for row in rows:
                name = name_for(row.key, f"{row.shard} {row.offset}", names)
                if not stream.has(name, row.hash):
                    _caption_one(folder, row, name, captioner, stream)
                done += 1
                progress(done, total)
            stream.commit()
        complete = own.finish()
    return close_set(own, About(hash_settings(settings), settings), complete)


def _caption_one(folder: Path, row: Row, name: str, captioner: Captioner, stream: ShardStream) -> None:
    try:
        with (folder / row.shard).open("rb") as file:
            members = read_sample(file, row.offset, row.length, row.key)
        captions = captions_of(members) if row.captions and not captioner.how.replace else []
        if not captions:
            captions = captioner.describe(_frames(members, row, captioner.how.frames), digest("caption", name))
            about = json_of(members)
            about.pop("caption", None)
            about |= {"captions": captions, "captioner": captioner.how.name}
            members["json"] = json.dumps(about, ensure_ascii=False, sort_keys=True).encode()
    except (OSError, ValueError) as error:
        stream.note([Note(name, str(error)), Note(name, mark=row.hash)])
        return
    stream.note([Note(name, mark=row.hash)])
    told = row._replace(key=name, captions=len(captions), caption_length=len(captions[0]))
    stream.write({"__key__": name, **members}, JournalEntry(told, (), name, row.hash))


def _frames(members: dict[str, bytes], row: Row, count: int) -> np.ndarray:
    """uint8 [t h w 3]: frames spread over the clip."""
    height = min(SIDE, row.height or SIDE)
    size = (height, max(1, round(height * row.width / row.height)) if row.height else height)
    total = row.frames if row.kind == "video" else 1
    shown = min(count, total)
    fps = (row.fps or 1.0) * shown / max(1, total)  # frames over the whole length
    clip = decode_sample(members, row.kind, frames=shown, size=size, fps=fps, start=0.0)
    return clip.pixels.permute(1, 2, 3, 0).numpy()
