"""Text encoders that transformers reads from a local folder: the T5 family, decoders such as Llama, the BERT family."""

from pathlib import Path
from typing import Annotated, Any

import torch

from lingen.recipe.bounds import IDENTITY, AtLeast
from lingen.recipe.passed_on import passes_on
from lingen.recipe.signature import checked
from lingen.text import local
from lingen.text.transformers_reader import TransformersReader, check_model, load, load_tokenizer
from lingen.weights import Lacking

T5_FAMILY = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3")
BERTS = ("bert", "distilbert", "electra", "deberta-v2", "modernbert", "roberta", "xlm-roberta", "camembert", "mpnet")
COUNTS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Families whose first position is one past the padding's id."""


@checked
@passes_on(local.LocalEncoder, max_tokens=512)
class _T5Family(local.LocalEncoder):
    """The encoder's half of any T5: `config.json` tells which, and whether the tokenizer is ByT5's, without files."""

    def inspect(self, path: Path) -> None:
        config = check_model(path, T5_FAMILY, tokenizer=False)
        if not _reads_bytes(config):
            check_model(path, T5_FAMILY)
        local.check_text_weights(config.get("d_model", 512), self.dim, None, self.max_tokens, special=1)

    def open(self, path: Path, dtype: torch.dtype, device: torch.device) -> TransformersReader:
        import transformers

        config = check_model(path, T5_FAMILY, tokenizer=False)
        tokenizer = transformers.ByT5Tokenizer() if _reads_bytes(config) else load_tokenizer(path)
        network = load(getattr(transformers, T5_FAMILY[config["model_type"]]), path, dtype, device)
        return TransformersReader(network, tokenizer)


class T5(_T5Family):
    """The encoder of a T5, mT5 or UMT5 (arXiv 1910.10683, 2304.09151)."""

    name, public, home = "t5", "google/t5-v1_1-xxl", "weights/t5-v1_1-xxl"


class UL2(_T5Family):
    """UL2's encoder (arXiv 2205.05131), which carries the meaning of the prompt."""

    name, public, home = "ul2", "google/ul2", "weights/ul2"


@checked
@passes_on(local.LocalEncoder, dim=1472)
class ByT5(_T5Family):
    """ByT5-small's encoder (arXiv 2105.13626): bytes, for text in the picture. Movie Gen gives it only quoted words."""

    name, public, home, unit = "byt5", "google/byt5-small", "weights/byt5-small", "bytes"

    def __init__(
        self, *, flat: dict[str, Any],
        max_tokens: Annotated[int, AtLeast(1), IDENTITY, "bytes read; the rest is cut, with a warning (ours)"] = 256,
    ):  # fmt: skip
        super().__init__(max_tokens=max_tokens, **flat)

    def inspect(self, path: Path) -> None:
        if not _reads_bytes(check_model(path, T5_FAMILY, tokenizer=False)):
            raise Lacking("its config.json is of a T5 that reads word pieces, not bytes", elsewhere=True)
        super().inspect(path)


@checked
@passes_on(local.LocalEncoder)
class Llama(local.LocalEncoder):
    """A decoder's hidden states: Llama (arXiv 2407.21783), Mistral, Qwen, Gemma, Phi; base and chat models alike.

    The text is read as it is, without a chat's template. The start of the sequence is read but gives no token."""

    name, public, home = "llama", "meta-llama/Llama-3.1-8B-Instruct", "weights/llama-3.1-8b"

    def __init__(
        self, *, flat: dict[str, Any],
        layer: Annotated[int, IDENTITY, "whose states are read: -1 the last, after the norm; 0 the embeddings"] = -1,
    ):  # fmt: skip
        super().__init__(**flat)
        self.layer = layer

    def inspect(self, path: Path) -> None:
        config = check_model(path, DECODERS)
        _check_fits(config, self, special=0)  # not every decoder has a start token: its tokenizer tells
        depth = config.get("num_hidden_layers", self.layer)
        if not -depth - 1 <= self.layer <= depth:
            raise Lacking(f"it has {depth} layers, so layer={self.layer} is none", f"set layer to at most {depth}")

    def open(self, path: Path, dtype: torch.dtype, device: torch.device) -> TransformersReader:
        from transformers import AutoModel

        tokenizer = load_tokenizer(path)
        network = load(AutoModel, path, dtype, device)
        return TransformersReader(network, tokenizer, layer=self.layer, skip=tokenizer.bos_token_id)


@checked
@passes_on(local.LocalEncoder, dim=384)
class BERT(local.LocalEncoder):
    """Any encoder of the BERT family, sentence-transformers' folders included: one token for each word piece."""

    name, public, home = "bert", "sentence-transformers/all-MiniLM-L6-v2", "weights/minilm"

    def inspect(self, path: Path) -> None:
        _check_fits(check_model(path, BERTS), self, special=2)

    def open(self, path: Path, dtype: torch.dtype, device: torch.device) -> TransformersReader:
        from transformers import AutoModel

        return TransformersReader(load(AutoModel, path, dtype, device), load_tokenizer(path))


def _reads_bytes(config: dict[str, Any]) -> bool:
    return config.get("tokenizer_class") == "ByT5Tokenizer" or config.get("vocab_size") == 384


def _check_fits(config: dict[str, Any], encoder: local.LocalEncoder, special: int) -> None:
    longest = config.get("max_position_embeddings")
    if longest is not None and config["model_type"] in COUNTS_FROM_PADDING:
        longest -= config.get("pad_token_id", 1) + 1
    width = config.get("hidden_size", config.get("dim", encoder.dim))
    local.check_text_weights(width, encoder.dim, longest, encoder.max_tokens, special)
