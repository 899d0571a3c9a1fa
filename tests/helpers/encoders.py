"""Tiny text encoders of the real classes with random weights, saved as the published ones are."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch

WORDS = "a red blue green ball square circle sign says open moves slowly left right over grass while it rains".split()
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


def t5(path: Path, kind: str = "t5", *, vocabulary: int = 96, tokenizer: bool = True) -> Path:
    """An encoder-decoder, saved whole, with a real SentencePiece model, which is all that google/ul2 has."""
    import transformers

    torch.manual_seed(0)
    name = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}[kind]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    getattr(transformers, f"{name}ForConditionalGeneration")(config).save_pretrained(path)
    if tokenizer:
        (path / "spiece.model").write_bytes(_sentencepiece(vocabulary))
        (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    return path


def byt5(path: Path) -> Path:
    return t5(path, vocabulary=384, tokenizer=False)


def bert(path: Path) -> Path:
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(0)
    path.mkdir(parents=True)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = BertTokenizer(vocab=vocabulary)
    config = BertConfig(**SMALL, vocab_size=len(vocabulary), max_position_embeddings=32)
    BertModel(config, add_pooling_layer=False).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def llama(path: Path, **settings: str) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    ids = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    plain = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    config = LlamaConfig(**SMALL, vocab_size=len(ids), num_key_value_heads=1, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(path)
    # As Llama's own: no padding token, and texts padded on the left where one asks.
    PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **settings
    ).save_pretrained(path)
    return path


def clip(path: Path, *, embed_dim: int = 16, file: str = "open_clip_model.safetensors", custom: bool = False) -> Path:
    """A CLIP of open_clip, saved whole, as `open_clip.push_to_hf_hub` does."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    config = {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    path.mkdir(parents=True)
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    if file.endswith(".safetensors"):
        save_file({name: one.contiguous() for name, one in model.state_dict().items()}, str(path / file))
    else:
        named = {f"module.{name}": one for name, one in model.state_dict().items()}
        torch.save({"epoch": 1, "state_dict": named}, path / file)
    return path


def clip_of_transformers(path: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406, "hidden_act": "quick_gelu"}
    config = CLIPConfig(
        text_config=text, vision_config={**SMALL, "image_size": 32, "patch_size": 16}, projection_dim=16
    )
    CLIPModel(config).save_pretrained(path)
    return path


def _sentencepiece(vocabulary: int) -> bytes:
    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 4), model_writer=file,
        vocab_size=vocabulary, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return file.getvalue()
