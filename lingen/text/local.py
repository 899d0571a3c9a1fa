"""Frozen text encoders with weights in a local folder: loaded when first needed, with a cache of texts, released."""

import abc
import gc
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lingen.data.cache import Cache
from lingen.frozen import Missing, check_ready
from lingen.recipe.bounds import CONTENT, FREE, IDENTITY, AtLeast
from lingen.recipe.errors import RecipeError
from lingen.text import Cut
from lingen.text.instruction import quoted
from lingen.weights import DTYPES, Lacking

PathSetting = Annotated[str | None, IDENTITY, CONTENT, "the local folder that holds it; nothing is ever downloaded"]
Dim = Annotated[int, AtLeast(1), IDENTITY, "width of a token, as the weights have it"]
MaxTokens = Annotated[int, AtLeast(1), IDENTITY, "tokens that are read; the rest is cut, with a warning (ours)"]
Precision = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    IDENTITY,
    "of the network; auto: bf16 on a GPU, fp32 elsewhere (a large T5 overflows fp16)",
]
Read = Annotated[Literal["prompt", "quoted"], IDENTITY, "the prompt, or only what it quotes, to be seen as writing"]
Device = Annotated[Literal["auto", "cpu", "cuda"], FREE, "where it runs; auto: where the denoiser is"]
BatchSetting = Annotated[int, AtLeast(1), FREE, "texts run at once; with 1, a text has the same bits in any company"]

FILES_END = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
REMEMBERED = 256 * 2**20
"""Bytes of an encoder's cache of tokens (ours): some 300 prompts of UL2, thousands of a small encoder."""


@runtime_checkable
class TextReader(Protocol):
    """A network in memory with its tokenizer; no nn.Module, so that it is never part of what is trained and saved."""

    width: int
    special: int
    """Number of special ids that the tokenizer adds to every text."""

    def rows(self, texts: list[str], cut: Cut) -> list[list[int]]:
        """ids of each text, cut; none where nothing but special tokens is left."""
        ...

    def read(self, rows: list[list[int]]) -> list[Float[Tensor, "_n w"]]:
        """Tokens of each row, padding taken out."""
        ...


class LocalEncoder(nn.Module, abc.ABC):
    """Base of the frozen encoders. Subclasses pass on its settings (`passes_on`), inspect the folder and open it.

    The constructor reads nothing. The network is built at the first `encode` of a text that is not remembered. It is
    no submodule: it is not in the state dict, and neither `.to()` nor a strategy touches it; with ``device=auto`` it
    follows the module at the next `encode`. An empty text, or with ``read=quoted`` one without quotes, has no tokens.
    """

    trainable = False
    name: str
    """Name in the registry."""
    public: str
    """The published model that fits, and the folder in which recipes expect it."""
    home: str
    unit = "tokens"
    place: Tensor

    def __init__(
        self, *, path: PathSetting = None, dim: Dim = 4096, max_tokens: MaxTokens = 256, precision: Precision = "auto",
        read: Read = "prompt", device: Device = "auto", batch: BatchSetting = 1,
    ):  # fmt: skip
        super().__init__()
        self.path, self.dim, self.max_tokens = path, dim, max_tokens
        self.precision, self.reads, self.device, self.batch = precision, read, device, batch
        self.cut = Cut(self.unit, max_tokens)
        self.register_buffer("place", torch.zeros(1), persistent=False)  # moves with the module, so it knows the device
        self._reader: TextReader | None = None
        self._opened: tuple[torch.device, torch.dtype] | None = None
        self._memory = Cache[tuple[torch.dtype, str], Tensor](REMEMBERED, attrgetter("nbytes"))

    @abc.abstractmethod
    def inspect(self, path: Path) -> None:
        """Lacking where `path` does not hold what the settings need; reads no weights."""

    @abc.abstractmethod
    def open(self, path: Path, dtype: torch.dtype, device: torch.device) -> TextReader:
        """The network of this dtype on this device."""

    def missing(self) -> list[Missing]:
        """What is not on disk, or is not what the settings say, with its cure; empty where all is well."""
        try:
            if self.path is None:
                raise Lacking("the recipe names no path")
            self.inspect(Path(self.path))
        except Lacking as lacking:
            return [Missing(self.name, self.path or "-", f"{lacking}; {lacking.cure or self._cure(lacking.elsewhere)}")]
        return []

    def _cure(self, elsewhere: bool = False) -> str:
        return download_advice(self.public, self.home, self.path, "path={} in this text encoder", elsewhere)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Float[Tensor, "b n w"], Bool[Tensor, "b n"]]:
        """Tokens in float32, zeros where the mask is False, on the module's device; n is at least 1. RecipeError where
        the weights are not there or cannot be used."""
        device, dtype = self._target()
        said = [self._said(text) for text in texts]
        fresh = self._encode([text for text in dict.fromkeys(said) if text], device, dtype)
        rows = [fresh[text] if text else self.place.new_zeros(0, self.dim) for text in said]
        n = max([1, *map(len, rows)])
        tokens = torch.zeros(len(rows), n, self.dim, device=self.place.device)
        mask = torch.zeros(len(rows), n, dtype=torch.bool, device=self.place.device)
        for number, row in enumerate(rows):
            tokens[number, : len(row)], mask[number, : len(row)] = row.to(tokens), True
        return tokens, mask

    def release(self) -> None:
        """Frees the network's memory. The cache of texts stays; the next new text loads the network again."""
        self._reader, opened, self._opened = None, self._opened, None
        gc.collect()
        if opened is not None and opened[0].type == "cuda":
            torch.cuda.empty_cache()

    def _target(self) -> tuple[torch.device, torch.dtype]:
        device = self.place.device if self.device == "auto" else torch.device(self.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RecipeError(f"The text encoder '{self.name}' cannot run on device=cuda here: set device=auto.")
        half = "bfloat16" if device.type == "cuda" else "float32"
        return device, getattr(torch, DTYPES.get(self.precision, half))

    def _said(self, text: str) -> str:
        # Tokenizers refuse what is no Unicode, such as half a surrogate pair.
        text = text.encode("utf-8", "replace").decode("utf-8").strip()
        return quoted(text) if self.reads == "quoted" else text

    def _encode(self, texts: list[str], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """text -> tokens [n w] of the network's dtype"""
        remembered = {text: self._memory.get((dtype, text)) for text in texts}
        found = {text: tokens for text, tokens in remembered.items() if tokens is not None}
        new = [text for text in texts if text not in found]
        if new:
            reader = self._ready(device, dtype)
            rows = dict(zip(new, reader.rows(new, self.cut), strict=True))
            # Under autocast, training would see other tokens than `lingen encode` writes.
            with torch.autocast(device.type, enabled=False):
                new.sort(key=lambda text: len(rows[text]))  # similar lengths together need the least padding
                for first in range(0, len(new), self.batch):
                    some = new[first : first + self.batch]
                    found.update(zip(some, reader.read([rows[text] for text in some]), strict=True))
            for text in new:
                kept = found[text].cpu().clone()
                if not torch.isfinite(kept).all():
                    told = f"gives NaN or infinity in {str(dtype).removeprefix('torch.')}: set precision=fp32."
                    raise RecipeError(f"The text encoder '{self.name}' {told}")
                self._memory.put((dtype, text), kept)
        return found

    def _ready(self, device: torch.device, dtype: torch.dtype) -> TextReader:
        if self._reader is not None and self._opened == (device, dtype):
            return self._reader
        check_ready([self])
        if self._reader is not None:
            self.release()
        path = Path(str(self.path))
        try:
            with torch.random.fork_rng(devices=[]):  # a library may draw weights that the file does not have
                reader = self.open(path, dtype, device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what a damaged file makes a library raise cannot be listed
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise RecipeError(f"The text encoder '{self.name}' cannot read {path}: {said}; {self._cure()}.") from error
        try:
            check_text_weights(reader.width, self.dim, None, self.max_tokens, reader.special)
        except Lacking as lacking:
            raise RecipeError(f"The text encoder '{self.name}' at {path}: {lacking}; {lacking.cure}.") from lacking
        self._reader, self._opened = reader, (device, dtype)
        return reader


def download_advice(public: str, home: str, path: str | None, setting: str, elsewhere: bool = False) -> str:
    """How to get a published model: to `path`, or to `home` where that is no folder, or holds something else."""
    is_file = path is not None and (Path(path).is_file() or Path(path).suffix in FILES_END)
    folder = home if elsewhere or path is None or is_file else path
    also = "" if folder == path else f" and set {setting.format(folder)}"
    return f"download {public} with `hf download {public} --local-dir {folder}`{also}"


def check_text_weights(found: int, dim: int, longest: int | None, max_tokens: int, special: int = 0) -> None:
    """Lacking where the weights have another width (`found`), read at most `longest` tokens, or have `special` ones of
    their own and so no room for a text."""
    if max_tokens <= special:
        told = f"it puts {special} of its own tokens around a text, so max_tokens={max_tokens} has no room for one"
        raise Lacking(told, f"set max_tokens to {special + 1} or more in this text encoder")
    if found != dim:
        raise Lacking(f"its tokens are {found} wide, not dim={dim}", f"set dim={found} in this text encoder")
    if longest is not None and max_tokens > longest:
        told = f"it reads at most {longest} tokens, not max_tokens={max_tokens}"
        raise Lacking(told, f"set max_tokens={longest} in this text encoder")
