"""The models that are measured, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)

from sightline.models.loading import built_in_models, load
from sightline.models.picturebook_vlm import build_model, build_tokenizer

NANO = "picturebook-nano"
IMAGE_TOKEN = 31_999


def nano(device: str) -> tuple[Any, str]:
    """The built-in model and its name; where it isn't there, a random one of its shape."""
    if NANO in built_in_models():
        return load(NANO, device=device)[0], NANO
    texts = ["USER: what is there in the picture? ASSISTANT: a red ball on the sea"]
    model = build_model("nano", build_tokenizer(texts, vocabulary=640))
    return model.to(device).eval(), f"random weights in the shape of {NANO}"


def small_vlm(device: str, dtype: torch.dtype, *, patches_a_side: int) -> tuple[Any, str]:
    """Random weights in the shape of a real small model: the decoder of Qwen2-0.5B (24 layers of width 896) behind a
    small CLIP tower with patches of 14 pixels (27 a side are 378 pixels)."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=2,
            num_attention_heads=6,
            image_size=14 * patches_a_side,
            patch_size=14,
        ),
        text_config=Qwen2Config(
            vocab_size=IMAGE_TOKEN + 1,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=patches_a_side**2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model.to(device, dtype).eval(), f"random weights, decoder in the shape of Qwen2-0.5B, {dtype}".replace(
        "torch.", ""
    )


def prompt(model: Any, *, rows: int, text_tokens: int) -> dict[str, Any]:
    """The same prompt in every row: a picture of noise, and random text after it."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    side = config.vision_config.image_size
    visual = (side // config.vision_config.patch_size) ** 2
    text = torch.randint(5, min(500, config.text_config.vocab_size - 1), (text_tokens,), generator=generator)
    text[text == config.image_token_id] = 5
    ids = torch.cat([torch.full((visual,), config.image_token_id), text]).expand(rows, -1).contiguous()
    pixels = torch.randn(1, 3, side, side, generator=generator).expand(rows, -1, -1, -1).contiguous()
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }
