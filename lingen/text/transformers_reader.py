"""Networks of the transformers library, read from a local folder, of which names, JSON and headers tell what it is."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lingen.text import Cut, padded
from lingen.weights import Lacking, check_file, read_json, weight_files

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json")
WEIGHTS_NAMES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""Names of weights files, in the order in which transformers looks for them."""


class TransformersReader:
    """A network that gives hidden states, and its tokenizer.

    Args:
        network: of transformers; in evaluation, on its device.
        tokenizer: of transformers.
        layer: whose states are read: -1 the last, after the final norm; 0 the embeddings.
        skip: an id that is read but gives no token where it comes first. A causal network's start sees nothing but
            itself, so it is the same for every text."""

    def __init__(self, network: Any, tokenizer: Any, *, layer: int = -1, skip: int | None = None):
        self.network, self.tokenizer = network, tokenizer
        self.width = int(network.config.hidden_size)
        self.layer, self.skip = layer, skip
        self.special = len(tokenizer("")["input_ids"])
        self._empty = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}

    def rows(self, texts: list[str], cut: Cut) -> list[list[int]]:
        """ids of each text, special ones included; none where nothing else is left."""
        rows = self.tokenizer(texts, verbose=False)["input_ids"]
        cut(rows)
        # The tokenizer cuts, too: it keeps the special token at the end.
        long = [number for number, row in enumerate(rows) if len(row) > cut.limit]
        for number in long:
            rows[number] = self.tokenizer(texts[number], truncation=True, max_length=cut.limit)["input_ids"]
        return [[] if self._empty.issuperset(row) else row for row in rows]

    def read(self, rows: list[list[int]]) -> list[Float[Tensor, "_n w"]]:
        """Hidden states of each row."""
        ids, mask = padded(rows, self.network.device)
        last = self.layer == -1
        output = self.network(input_ids=ids, attention_mask=mask.long(), output_hidden_states=not last)
        hidden = output.last_hidden_state if last else output.hidden_states[self.layer]
        starts = [int(bool(row) and row[0] == self.skip) for row in rows]
        return [hidden[number, start : len(row)] for number, (start, row) in enumerate(zip(starts, rows, strict=True))]


def check_model(path: Path, families: Collection[str] | None, *, tokenizer: bool = True) -> dict[str, Any]:
    """The config.json of a folder as `save_pretrained` writes it. Lacking where the folder, one of its files, a part of
    its weights, or the right kind of model is not there.

    Args:
        families: `model_type`s that will do; None: any.
        tokenizer: its files must be there, too."""
    if not path.is_dir():
        raise Lacking("it is a file, not a folder" if path.is_file() else "there is no such folder")
    config = read_json(path / "config.json")
    if families is not None and config.get("model_type") not in families:
        told = f"its config.json says model_type={config.get('model_type')}, wanted is {' or '.join(families)}"
        raise Lacking(told, elsewhere=True)
    for file in weight_files(path, WEIGHTS_NAMES):
        check_file(file)
    if tokenizer and not any((path / name).is_file() for name in TOKENIZERS):
        raise Lacking(f"it holds no tokenizer ({', '.join(TOKENIZERS[:3])}, ...)")
    return config


def load(kind: Any, path: Path, dtype: torch.dtype, device: torch.device, config: Any = None) -> Any:
    """The network that `kind` (a class of transformers) makes of a folder. ValueError where weights are missing in it.
    Only the tensors that the network has are read, each into its final dtype: of an encoder-decoder, half the file.
    `config`: of transformers; None: as the folder has it."""
    with quiet():
        network, told = kind.from_pretrained(
            path, config=config, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    # BERT's pooler is not read; many checkpoints do not have it.
    missing = sorted(name for name in told["missing_keys"] if "pooler." not in name)
    if missing:
        raise ValueError(f"its weights have no {missing[0]} ({len(missing)} tensors are missing)")
    network.config.use_cache = False
    return network.to(device).eval().requires_grad_(False)


def load_tokenizer(path: Path) -> Any:
    """The folder's tokenizer. A bare spiece.model, as google/ul2 has it, is T5's."""
    from transformers import AutoTokenizer, T5Tokenizer

    bare = (path / "spiece.model").is_file() and not (path / "tokenizer.json").is_file()
    with quiet():
        tokenizer = (T5Tokenizer if bare else AutoTokenizer).from_pretrained(path, local_files_only=True)
    tokenizer.truncation_side = "right"
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block, transformers prints no progress bars and hints among lingen's own lines."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
