"""What a local folder of a published model holds, told from names, JSON and headers: no weights are read."""

import json
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json")
WEIGHTS_NAMES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""Names of weights files, in the order in which transformers looks for them."""
FILES_END = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
TORCH = (b"PK", b"\x80")
"""How a file that torch.save wrote begins: a ZIP, whose end tells of the rest, or long ago a bare pickle, of which
nothing is told."""


class Lacking(ValueError):
    """Raised where a folder is not what an encoder needs.

    Args:
        what: the fault as half a sentence, which the message completes.
        cure: what helps; None: the right files.
        elsewhere: the right files belong in another folder, since this one holds something else."""

    def __init__(self, what: str, cure: str | None = None, *, elsewhere: bool = False):
        super().__init__(what)
        self.cure, self.elsewhere = cure, elsewhere


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping. Lacking where there is none."""
    if not path.is_file():
        raise Lacking(f"it holds no {path.name}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Lacking(f"its {path.name} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise Lacking(f"its {path.name} is no mapping")
    return found


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
    for file in weight_files(path):
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


def weight_files(path: Path) -> list[Path]:
    """The one file of weights, or all that the index names. Lacking where there is neither."""
    first = next((path / name for name in WEIGHTS_NAMES if (path / name).is_file()), None)
    if first is None:
        raise Lacking(f"it holds no weights ({', '.join(WEIGHTS_NAMES)})")
    if first.suffix != ".json":
        return [first]
    return [path / name for name in sorted(set(read_json(first).get("weight_map", {}).values()))]


def check_file(file: Path) -> None:
    """Lacking where a weights file is missing or incomplete."""
    if not file.is_file():
        raise Lacking(f"its {file.name} is missing")
    with file.open("rb") as opened:
        start = opened.read(8)
    if start == b"version ":
        raise Lacking(f"its {file.name} is Git LFS's note of a file, not the file", "fetch it with `git lfs pull`")
    if file.suffix == ".safetensors":
        try:
            safe_open(str(file), "np")  # reads the header, and holds the file's size to it
        except SafetensorError as error:
            raise Lacking(f"its {file.name} is cut off or no safetensors file") from error
    elif not start.startswith(TORCH):
        raise Lacking(f"its {file.name} holds no weights: neither safetensors nor what torch.save writes")
    elif start.startswith(b"PK") and not zipfile.is_zipfile(file):
        raise Lacking(f"its {file.name} is cut off or damaged")
