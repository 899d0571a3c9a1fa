"""MetaCLIP's text tower, and that of any other CLIP that open_clip or transformers knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn

from lingen.recipe.bounds import CONTENT, IDENTITY, AtLeast
from lingen.recipe.errors import did_you_mean
from lingen.recipe.passed_on import passes_on
from lingen.recipe.signature import checked
from lingen.text import Cut, padded
from lingen.text.local import LocalEncoder, check_text_weights
from lingen.text.transformers_reader import check_model, load
from lingen.weights import Lacking, check_file, read_json, weight_files

CONFIG = "open_clip_config.json"
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
TOWER = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")
NO_VISION = {"image_size": 32, "patch_size": 32, "width": 64, "layers": 1}
"""open_clip builds two towers; this configuration makes the image tower tiny, and it stays on the meta device."""
OTHER_TOWERS = ("hf_model_name", "hf_tokenizer_name", "no_causal_mask", "embed_cls", "tokenizer_mode")
"""Settings of text towers that are not CLIP's own: they read padding, or need a tokenizer from elsewhere."""

Forward = Callable[[Int[Tensor, "b n"]], tuple[Float[Tensor, "b n w"], Float[Tensor, "b p"]]]


@checked
@passes_on(LocalEncoder, dim=1024)
class MetaCLIP(LocalEncoder):
    """MetaCLIP-H14's text tower (arXiv 2309.16671), token by token, which carries how the clip looks.

    Takes a folder of open_clip (with open_clip_config.json), one of transformers (a CLIP's config.json), or a file of
    weights whose architecture open_clip knows by name. The published H14 is 1024 wide, bigG14 is 1280 wide."""

    name, public, home = "metaclip", "timm/vit_huge_patch14_clip_224.metaclip_2pt5b", "weights/metaclip-h14"

    def __init__(
        self,
        *,
        path: Annotated[
            str | None, IDENTITY, CONTENT, "local folder, or file of weights; nothing is downloaded"
        ] = None,
        architecture: Annotated[str, IDENTITY, "open_clip's name for it, where path is a file"] = "ViT-H-14-quickgelu",
        pooled: Annotated[bool, IDENTITY, "one token more: the embedding of the whole text"] = False,
        max_tokens: Annotated[int, AtLeast(1), IDENTITY, "tokens that are read; the rest is cut, with a warning"] = 77,
        flat: dict[str, Any],
    ):
        super().__init__(path=path, max_tokens=max_tokens, **flat)
        self.architecture, self.pooled = architecture, pooled

    def inspect(self, path: Path) -> None:
        if path.is_dir() and not (path / CONFIG).is_file() and (path / "config.json").is_file():
            config = check_model(path, ["clip", "clip_text_model"], tokenizer=False)
            text = config.get("text_config", config)
            width, longest = text.get("hidden_size", 512), text.get("max_position_embeddings", 77)
            projection = config.get("projection_dim", 512)
        else:
            check_file(_weights(path))
            config = self._open_clip_config(path)
            width, longest = config["text_cfg"].get("width", 512), config["text_cfg"].get("context_length", 77)
            projection = config["embed_dim"]
        check_text_weights(width, self.dim, longest, self.max_tokens, ClipReader.special)
        if self.pooled and projection != width:
            told = f"its pooled embedding is {projection} wide, its tokens {width}, so they make no sequence"
            raise Lacking(told, "set pooled=false in this text encoder")

    def open(self, path: Path, dtype: torch.dtype, device: torch.device) -> ClipReader:
        if path.is_dir() and not (path / CONFIG).is_file():
            return _open_transformers(path, dtype, device, self.pooled)
        config = self._open_clip_config(path)
        tower = _tower(config, _weights(path), dtype).to(device).eval().requires_grad_(False)
        text = config["text_cfg"]
        sizes = text.get("width", 512), text.get("context_length", 77)
        tower.output_tokens = True

        def forward(ids: Tensor) -> tuple[Tensor, Tensor]:
            whole, tokens = tower(ids)
            return tokens, whole

        return ClipReader(forward, *sizes, device, self.pooled, text.get("tokenizer_kwargs") or {})

    def _open_clip_config(self, path: Path) -> dict[str, Any]:
        """`embed_dim`, `text_cfg` and more; Lacking where the text tower is none that is read here."""
        if path.is_dir():
            config = read_json(path / CONFIG).get("model_cfg") or {}
        else:
            import open_clip

            if self.architecture not in open_clip.list_models():
                close = did_you_mean(self.architecture, open_clip.list_models())
                cure = "set architecture in this text encoder"
                raise Lacking(f"open_clip knows no {self.architecture}.{close}", cure)
            config = open_clip.get_model_config(self.architecture)
        text = config.get("text_cfg")
        if not isinstance(text, dict) or "embed_dim" not in config:
            raise Lacking(f"its {CONFIG} describes no CLIP", elsewhere=True)
        other = [setting for setting in OTHER_TOWERS if text.get(setting)]
        if other:
            raise Lacking(f"its text tower has {other[0]}={text[other[0]]}, so it is not CLIP's own", elsewhere=True)
        return config


class ClipReader:
    """A causal text tower with CLIP's byte-pair tokenizer, which comes with open_clip.

    Args:
        forward: ids -> tokens and the pooled embedding.
        width: of a token.
        longest: ids of a text.
        device: where the tower is.
        pooled: give the pooled embedding as one more token.
        spelling: settings of open_clip's tokenizer."""

    special = 2  # a start and an end

    def __init__(
        self, forward: Forward, width: int, longest: int, device: torch.device, pooled: bool, spelling: dict[str, Any]
    ):
        from open_clip.tokenizer import SimpleTokenizer

        self.forward, self.width, self.longest, self.device, self.pooled = forward, width, longest, device, pooled
        self.tokenizer = SimpleTokenizer(context_length=longest, **spelling)

    def rows(self, texts: list[str], cut: Cut) -> list[list[int]]:
        """ids of each text between a start and an end; none where there are no others."""
        plain = [self.tokenizer.encode(text) for text in texts]
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        rows = cut([[start, *row, end] if row else [] for row in plain])
        # The pooled embedding is computed at the end token, which sees the whole text: it becomes the last token.
        return [[*row[:-1], end] if row else [] for row in rows]

    def read(self, rows: list[list[int]]) -> list[Float[Tensor, "_n w"]]:
        """Tokens of each row. The mask is causal, so what comes behind the end changes nothing before it."""
        ids, _ = padded(rows, self.device)
        ids = nn.functional.pad(ids, (0, self.longest - ids.shape[1]))
        tokens, whole = self.forward(ids)
        found = [tokens[number, : len(row)] for number, row in enumerate(rows)]
        if not self.pooled:
            return found
        return [torch.cat([one, whole[number : number + 1]]) if len(one) else one for number, one in enumerate(found)]


def _open_transformers(path: Path, dtype: torch.dtype, device: torch.device, pooled: bool) -> ClipReader:
    from transformers import AutoConfig, CLIPTextModelWithProjection

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if hasattr(config, "text_config"):
        config.text_config.projection_dim = config.projection_dim  # only the whole config has it
        config = config.text_config
    network = load(CLIPTextModelWithProjection, path, dtype, device, config)

    def forward(ids: Tensor) -> tuple[Tensor, Tensor]:
        output = network(input_ids=ids)
        return output.last_hidden_state, output.text_embeds

    return ClipReader(forward, config.hidden_size, config.max_position_embeddings, device, pooled, {})


def _weights(path: Path) -> Path:
    """The file of weights at `path`, or in the folder there."""
    if not path.exists():
        raise Lacking("there is no such folder or file")
    return path if path.is_file() else weight_files(path, FILES)[0]


def _tower(config: dict[str, Any], file: Path, dtype: torch.dtype) -> Any:
    """The text tower alone: the image tower's weights are not read."""
    import open_clip

    known = {key: value for key, value in config.items() if key in ("embed_dim", "text_cfg", "quick_gelu")}
    with torch.device("meta"):
        tower: Any = open_clip.CustomTextCLIP(**known, vision_cfg=NO_VISION).text
    weights = {name: tensor.to(dtype) for name, tensor in _text_tensors(file)}
    tower.load_state_dict(weights, assign=True)
    tower.attn_mask = tower.build_causal_mask().to(dtype)  # no weight, so it is still on meta
    return tower


def _text_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names, as the tower has them, and tensors. A pickle is read with `weights_only`."""
    if file.suffix == ".safetensors":
        with safe_open(str(file), "pt") as opened:
            names = {_name(name): name for name in opened.keys()}  # noqa: SIM118
            yield from ((name, opened.get_tensor(stored)) for name, stored in names.items() if name)
    else:
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        stored = stored.get("state_dict", stored)
        yield from ((name, tensor) for key, tensor in stored.items() if (name := _name(key)))


def _name(stored: str) -> str | None:
    """``module.text.ln_final.bias`` -> ``ln_final.bias``; None for what the text tower does not have."""
    name = stored.removeprefix("module.").removeprefix("text.")
    return name if name.startswith(TOWER) else None
