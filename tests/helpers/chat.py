"""Tiny chat models of a real class: a Llama with a tokenizer of words, with random weights or taught a few answers."""

from __future__ import annotations

from pathlib import Path

import torch

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]


def tokenizer_of(texts: list[str], template: str | None = TEMPLATE):
    """Every word between blanks is a token, punctuation and quotation marks included."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(word for text in texts for word in text.split())
    ids = {word: number for number, word in enumerate(["<unk>", *SPECIAL, *words])}
    plain = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", eos_token="<|end|>", additional_special_tokens=SPECIAL[1:]
    )
    tokenizer.chat_template = template
    return tokenizer


def llama(words: int, room: int = 1024):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=room, bos_token_id=None, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def save(path: Path, model, tokenizer) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def untaught(path: Path, template: str | None = TEMPLATE, room: int = 1024) -> Path:
    """Random weights: it babbles."""
    tokenizer = tokenizer_of(["a red ball rolls over green grass"], template)
    return save(path, llama(len(tokenizer), room), tokenizer)


def taught(path: Path, lessons: list[tuple[list[dict[str, str]], str]], steps: int = 120) -> Path:
    """Trained until it answers each conversation with its text and an end."""
    texts = [message["content"] for talk, answer in lessons for message in [*talk, {"content": answer}]]
    tokenizer = tokenizer_of(texts)
    model = llama(len(tokenizer))
    rows = []
    for talk, answer in lessons:
        asked = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
        heard = tokenizer(asked)["input_ids"]
        said = tokenizer(f"{answer} <|end|>")["input_ids"]
        rows.append((torch.tensor([heard + said]), torch.tensor([[-100] * len(heard) + said])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in rows) / len(rows)
        if loss < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05, f"the tiny model has not learned its answers: {loss}"
    return save(path, model.eval(), tokenizer)
