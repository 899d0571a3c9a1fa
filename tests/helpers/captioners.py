"""Tiny captioners of real classes with random weights: BLIP, which sees a picture, and Qwen2-VL, which sees a video."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = (
    "a red blue green ball square circle moves left right up down the clip shows describe what happens in this".split()
)
SPECIAL = [f"<|{name}|>" for name in ("end", "start", "vision_start", "vision_end", "image_pad", "video_pad")]
TEMPLATE = (
    "{% for message in messages %}<|start|>{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% else %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>{% endif %}"
)


def blip(path: Path) -> Path:
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    torch.manual_seed(0)
    path.mkdir(parents=True)
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizer(str(path / "vocab.txt"))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 2, "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3}
    text = {**small, **ends, "vocab_size": len(tokenizer), "encoder_hidden_size": 16, "max_position_embeddings": 32}
    vision = {**small, "image_size": 32, "patch_size": 16}
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(
        path
    )
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(path)
    return path


def qwen(path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    torch.manual_seed(0)
    ids = {word: number for number, word in enumerate(["<unk>", *SPECIAL, *WORDS])}
    plain = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token=SPECIAL[0], eos_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:]
    )
    tokenizer.image_token, tokenizer.video_token = SPECIAL[4:]
    pixels = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 4}
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(**pixels), tokenizer, Qwen2VLVideoProcessor(**pixels), chat_template=TEMPLATE
    ).save_pretrained(path)
    text = {
        "vocab_size": len(ids), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1}
    named = dict(zip(("vision_start", "vision_end", "image", "video"), map(ids.get, SPECIAL[2:]), strict=True))
    numbers = {f"{name}_token_id": number for name, number in named.items()}
    Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **numbers)).save_pretrained(
        path
    )
    return path
