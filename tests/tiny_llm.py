"""A language model of a few thousand random weights with a tokenizer of bytes, as a Hugging Face folder.

Random weights say what an engine guarantees whatever the model: an answer that is valid by decoding is valid here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<image>"]
WORDS = ["sym", "metric", "asym", "red", "brown", "black", " the", " lesion", '{"', '": ', '", "', '"]', " is", " be"]


def make_tokenizer(more: Sequence[str] = ()) -> Any:
    """Byte-level BPE: all bytes, a few merged words, chat marks and `more` special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        symbols = list(word.replace(" ", "Ġ"))
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols[:2] = [symbols[0] + symbols[1]]
            vocabulary.setdefault(symbols[0], len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges))))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=[*SPECIAL, *more])
    fast.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"})
    fast.chat_template = CHAT
    return fast


def write_tiny_llm(folder: Path, heads: int = 4, kv_heads: int = 2, **more: Any) -> Path:
    """The model's folder: Llama, float32, seeded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=heads, num_key_value_heads=kv_heads, initializer_range=0.35,
        bos_token_id=None, eos_token_id=end, pad_token_id=end, tie_word_embeddings=True, **{**SHAPE, **more},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tiny_vlm(folder: Path) -> Path:
    """An image-text-to-text model (Llava: CLIP and Llama) with its processor."""
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    torch.manual_seed(12)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=32, initializer_range=0.3,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, initializer_range=0.35,
        bos_token_id=None, eos_token_id=end, pad_token_id=end, **SHAPE,
    )  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, vision_feature_select_strategy="default",
        vision_feature_layer=-1, image_seq_length=16, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "projector" in name:
                weight.normal_(0, 0.5)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_tiny_tiling_vlm(folder: Path) -> Path:
    """An image-text-to-text model that cuts large images into tiles (Idefics3, as SmolVLM is): images of unequal size
    have unequally many tokens."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessor, Idefics3Processor
    from transformers.utils import logging

    logging.disable_progress_bar()
    tiles = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    tokenizer = make_tokenizer(["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    torch.manual_seed(13)
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8, "initializer_range": 0.3,
    }  # fmt: skip
    text = {
        "model_type": "llama", "vocab_size": len(tokenizer), "num_attention_heads": 4, "num_key_value_heads": 2,
        "initializer_range": 0.35, "bos_token_id": None, "eos_token_id": end, "pad_token_id": end, **SHAPE,
    }  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = Idefics3Config(vision_config=vision, text_config=text, image_token_id=image, scale_factor=2)
    model = Idefics3ForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "connector" in name:
                weight.normal_(0, 0.5)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    model.save_pretrained(folder)
    images = Idefics3ImageProcessor(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT).save_pretrained(folder)
    return folder
