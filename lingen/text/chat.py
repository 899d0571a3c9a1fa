"""A chat model of transformers in a local folder: whether it is complete, and what it answers."""

from pathlib import Path
from typing import Any

import torch

from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import RewriteConfig
from lingen.text.folder import Lacking, check_model, read_json

NO_CHAT = "it has no chat template: it goes on with a text, but follows no instruction"
FIXED: dict[str, Any] = {"date_string": "26 Jul 2024", "enable_thinking": False}
"""Given to chat templates, of which some write today's date (the same prompt would give another text tomorrow; this is
the default of Llama-3.1's) or have the model think aloud. Others ignore them."""

Talk = list[dict[str, str]]
"""Messages in order, each with `role` and `content`."""


class Chat:
    """A model and its tokenizer, loaded. RecipeError where the folder holds no chat model."""

    def __init__(self, how: RewriteConfig, device: torch.device, dtype: torch.dtype):
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging

        logging.set_verbosity_error()  # its progress bars and hints would mix with ours
        logging.disable_progress_bar()
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
