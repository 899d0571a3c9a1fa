"""Long prompts out of the user's short ones, by a local chat model (paper: a Llama-3.1 does it before the encoders)."""

import gc
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lingen.data.batch import Progress, no_progress
from lingen.frozen import Missing, check_ready
from lingen.recipe.sections import RewriteConfig
from lingen.text.chat import Chat, Talk, inspect
from lingen.text.folder import Lacking, names_file
from lingen.text.instruction import clean, fault_of, question

PUBLIC = "meta-llama/Llama-3.1-8B-Instruct"
HOME = "weights/llama-3.1-8b-instruct"


class Rewritten(NamedTuple):
    """The result for a prompt."""

    prompt: str
    text: str | None
    """The long prompt; None where no usable one was written."""
    fault: str | None = None
    """A sentence for why there is no usable long prompt."""


class Rewriter:
    """A chat model that writes long prompts. Nothing is read before the first prompt.

    At temperature 0 a prompt always gives the same text, except for rounding: in bfloat16 the other prompts of a batch
    can change a word.

    Args:
        how: the section `rewrite` of a recipe.
        device: where it runs; in bfloat16 on CUDA, else in float32.
    """

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
            elsewhere = self.path is None or lacking.elsewhere or names_file(self.path)
            get = f"download {PUBLIC} with `hf download {PUBLIC} --local-dir {HOME if elsewhere else self.path}`"
            cure = lacking.cure or get + (f" and set rewrite.path={HOME}" if elsewhere else "")
            return [Missing(self.name, self.path or "-", f"{lacking}; {cure}")]
        return []

    def rewrite(self, prompts: Sequence[str], progress: Progress = no_progress) -> list[Rewritten]:
        """Rewrites prompts; one result for each, in order. An answer that cannot be used (empty, too long, without the
        words that the prompt has in quotation marks) is sent back once; where the second is no better, the prompt has a
        `fault`. An empty prompt stays as it is. RecipeError where there is no such model, or it is no chat model.

        Args:
            progress: called with the prompts done and all of them.
        """
        check_ready([self])
        done = {prompt: Rewritten(prompt, prompt) for prompt in prompts if not prompt.strip()}
        new, total = [prompt for prompt in dict.fromkeys(prompts) if prompt not in done], len({*prompts})
        size = 1 if self.how.temperature else self.how.batch
        for start in range(0, len(new), size):
            progress(len(done), total)
            done |= {one.prompt: one for one in self._write(new[start : start + size])}
        progress(total, total)
        return [done[prompt] for prompt in prompts]

    def release(self) -> None:
        """Frees the model's memory; the next new prompt loads it again."""
        self._chat = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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
