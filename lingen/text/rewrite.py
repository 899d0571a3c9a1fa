"""Long prompts out of short ones, by a local chat model of transformers (paper: a Llama-3.1, before the encoders)."""

import gc
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lingen.data.batch import Progress, no_progress
from lingen.data.fingerprint import hash_settings, hash_weights
from lingen.files import cache_folder, write_json
from lingen.frozen import Missing, check_ready
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import RewriteConfig
from lingen.text.instruction import INSTRUCTION_VERSION, clean, fault_of, question
from lingen.text.local import download_advice
from lingen.text.transformers_reader import check_model, quiet
from lingen.weights import Lacking, read_json

log = logging.getLogger("lingen")

PUBLIC = "meta-llama/Llama-3.1-8B-Instruct"
HOME = "weights/llama-3.1-8b-instruct"
NO_CHAT = "it has no chat template: it goes on with a text, but follows no instruction"
FIXED: dict[str, Any] = {"date_string": "26 Jul 2024", "enable_thinking": False}
"""Given to chat templates, of which some write today's date (the same prompt would give another text tomorrow; this is
the default of Llama-3.1's) or have the model think aloud. Others ignore them."""

Talk = list[dict[str, str]]
"""Messages in order, each with `role` and `content`."""


class Rewritten(NamedTuple):
    """The result for a prompt."""

    prompt: str
    text: str | None
    """The long prompt; None where no usable one was written."""
    fault: str | None = None
    """A sentence for why there is no usable long prompt."""
    cached: bool = False
    """Whether it comes from the cache."""


class Rewriter:
    """A chat model that writes long prompts. Nothing is read before the first prompt that is not in the cache.

    At temperature 0 a prompt always gives the same text, except for rounding: in bfloat16 the other prompts of a batch
    can change a word. What was written once is kept on disk, under the instruction's version, the weights, the settings
    and the prompt.

    Args:
        how: the section `rewrite` of a recipe.
        device: where it runs; in bfloat16 on CUDA, else in float32."""

    def __init__(self, how: RewriteConfig, device: str | torch.device = "cpu"):
        self.how = how
        self.name, self.path = how.name, how.path
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self._chat: Chat | None = None

    def missing(self) -> list[Missing]:
        """What is not on disk, or is no chat model, with its cure; empty where all is well."""
        try:
            if self.path is None:
                raise Lacking("no path is named")
            inspect(Path(self.path))
        except Lacking as lacking:
            cure = lacking.cure or download_advice(PUBLIC, HOME, self.path, "rewrite.path={}", lacking.elsewhere)
            return [Missing(self.name, self.path or "-", f"{lacking}; {cure}")]
        return []

    def rewrite(self, prompts: Sequence[str], progress: Progress = no_progress) -> list[Rewritten]:
        """Rewrites prompts; one result for each, in order. An answer that cannot be used (empty, too long, without the
        words that the prompt has in quotation marks) is sent back once; where the second is no better, the prompt has a
        `fault`. An empty prompt stays as it is. RecipeError where there is no such model, or it is no chat model.

        Args:
            progress: called with the prompts done and all of them."""
        check_ready([self])
        settings, named = self.settings, [one for one in dict.fromkeys(prompts) if one.strip()]
        folder = cache_folder() / "rewritten" / hash_settings(settings)
        files = {one: folder / f"{hashlib.sha256(one.encode()).hexdigest()[:32]}.json" for one in named}
        known = {one: _kept(files[one], one) for one in named}
        done = {prompt: Rewritten(prompt, text, cached=True) for prompt, text in known.items() if text is not None}
        done |= {prompt: Rewritten(prompt, prompt) for prompt in prompts if not prompt.strip()}
        total = len({*prompts})
        new = [prompt for prompt in known if prompt not in done]
        size = 1 if self.how.temperature else self.how.batch
        for start in range(0, len(new), size):
            progress(len(done), total)
            for one in self._write(new[start : start + size]):
                done[one.prompt] = one
                if one.text is not None:
                    about = {"prompt": one.prompt, "rewritten": one.text, "settings": settings}
                    try:
                        write_json(files[one.prompt], about)
                    except OSError as error:
                        log.warning("A rewritten prompt cannot be kept for the next time: %s", error)
        progress(total, total)
        return [done[prompt] for prompt in prompts]

    def release(self) -> None:
        """Frees the model's memory; the next new prompt loads it again."""
        self._chat = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def settings(self) -> dict[str, Any]:
        """Everything besides the prompt on which a text depends. Reads pieces of the weights."""
        drawn = {"temperature": self.how.temperature, "seed": self.how.seed} if self.how.temperature else {}
        return {
            "made_by": "lingen prompts rewrite", "instruction": INSTRUCTION_VERSION,
            "weights": hash_weights(Path(str(self.path))), "precision": str(self.dtype).removeprefix("torch."),
            "max_tokens": self.how.max_tokens, **drawn,
        }  # fmt: skip

    def _write(self, prompts: list[str]) -> Iterator[Rewritten]:
        if self._chat is None:
            self._chat = Chat(self.how, self.device, self.dtype)
        seed = int.from_bytes(hashlib.sha256(repr((self.how.seed, prompts)).encode()).digest()[:7], "big")
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            first = self._judged(prompts, [_ask(prompt) for prompt in prompts])
            again = [number for number, one in enumerate(first) if one.fault]
            talks = [_ask(prompts[number]) + _send_back(first[number]) for number in again]
            second = self._judged([prompts[number] for number in again], talks) if again else []
        better = dict(zip(again, second, strict=True))
        for number, one in enumerate(first):
            one = better.get(number, one)
            yield Rewritten(one.prompt, None if one.fault else one.text, one.fault)

    def _judged(self, prompts: list[str], talks: list[Talk]) -> list[Rewritten]:
        """The cleaned answers with their faults."""
        assert self._chat is not None
        texts = [(clean(text), ended) for text, ended in self._chat.answers(talks)]
        return [
            Rewritten(prompt, text, fault_of(prompt, text, ended, self.how.max_tokens))
            for prompt, (text, ended) in zip(prompts, texts, strict=True)
        ]


def _ask(prompt: str) -> Talk:
    return [{"role": "user", "content": question(prompt)}]


def _send_back(answer: Rewritten) -> Talk:
    complaint = f"This cannot be used. {answer.fault} Write the paragraph again."
    return [{"role": "assistant", "content": str(answer.text)}, {"role": "user", "content": complaint}]


def _kept(file: Path, prompt: str) -> str | None:
    """What a prompt was rewritten to before, if that is what the file holds."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held["rewritten"] if held["prompt"] == prompt else None


class Chat:
    """A model and its tokenizer, loaded. RecipeError where the folder holds no chat model."""

    @quiet()
    def __init__(self, how: RewriteConfig, device: torch.device, dtype: torch.dtype):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = Path(str(how.path))
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, padding_side="left")
            if not tokenizer.chat_template:
                raise Lacking(NO_CHAT)
            model: Any = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=dtype)
        except Exception as error:  # what a damaged file makes a library raise cannot be listed
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RecipeError(f"{path} holds no chat model that can be read: {said}.") from error
        ends = model.generation_config.eos_token_id
        self.ends = list({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.how, self.tokenizer, self.model = how, tokenizer, model.to(device).eval()

    @quiet()
    @torch.no_grad()
    def answers(self, talks: list[Talk]) -> list[tuple[str, bool]]:
        """The model's answer to each conversation, and whether it ended before the limit."""
        how = {"tokenize": True, "add_generation_prompt": True, "padding": True, "return_tensors": "pt", **FIXED}
        inputs = self.tokenizer.apply_chat_template(talks, return_dict=True, **how).to(self.model.device)
        asked, room = inputs["input_ids"].shape[1], getattr(self.model.config, "max_position_embeddings", None)
        if room is not None and asked + self.how.max_tokens > room:
            raise RecipeError(
                f"The model in {self.how.path} takes {room} tokens. Instruction and longest prompt have {asked}, the "
                f"answer may have {self.how.max_tokens} (rewrite.max_tokens). Take another model, or less."
            )
        drawn = {"do_sample": True, "temperature": self.how.temperature, "top_p": 1.0, "top_k": 0}
        likeliest = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        said = self.model.generate(
            **inputs, max_new_tokens=self.how.max_tokens, num_beams=1, eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id, **(drawn if self.how.temperature else likeliest),
        )[:, asked:]  # fmt: skip
        ended = torch.isin(said, torch.tensor(self.ends, device=said.device)).any(1).tolist()
        return list(zip(self.tokenizer.batch_decode(said, skip_special_tokens=True), ended, strict=True))


def inspect(path: Path) -> None:
    """Lacking where a folder does not hold a chat model and its tokenizer; reads no weights."""
    check_model(path, None)
    if any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return
    settings = path / "tokenizer_config.json"
    if not (settings.is_file() and read_json(settings).get("chat_template")):
        raise Lacking(NO_CHAT, elsewhere=True)
