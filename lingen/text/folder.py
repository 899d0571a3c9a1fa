"""What a local folder of a published model holds, told from names, JSON and headers: no weights are read."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from lingen.weights import Lacking, check_file, read_json, weight_files

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json")
WEIGHTS_NAMES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""Names of weights files, in the order in which transformers looks for them."""
FILES_END = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


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


def download_advice(public: str, home: str, path: str | None, setting: str, elsewhere: bool = False) -> str:
    """How to get a published model: to `path`, or to `home` where that is no folder, or holds something else."""
    is_file = path is not None and (Path(path).is_file() or Path(path).suffix in FILES_END)
    folder = home if elsewhere or path is None or is_file else path
    also = "" if folder == path else f" and set {setting.format(folder)}"
    return f"download {public} with `hf download {public} --local-dir {folder}`{also}"
