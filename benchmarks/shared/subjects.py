"""The models that are measured, and prompts for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
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


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llava: its CLIP tower (patches of 14 pixels) and its decoder."""

    name: str
    patches_a_side: int
    tower: dict[str, Any]
    tower_layer: int
    decoder: type[LlamaConfig] | type[Qwen2Config]
    sizes: dict[str, Any]
    tied: bool


SHAPES: dict[str, Shape] = {
    "qwen2-0.5b": Shape(
        "decoder in the shape of Qwen2-0.5B behind a small tower",
        27,  # 378 pixels
        {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 6},
        -1,
        Qwen2Config,
        {
            "vocab_size": IMAGE_TOKEN + 1,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
        True,
    ),
    "llava-1.5-7b": Shape(
        "tower and decoder in the shape of LLaVA-1.5-7B",
        24,
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        -2,
        LlamaConfig,
        {
            "vocab_size": 32_064,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
        False,
    ),
}


def small_vlm(
    device: str, dtype: torch.dtype, *, patches_a_side: int | None = None, shape: str = "qwen2-0.5b"
) -> tuple[Any, str]:
    """Random weights, made on the device, in the shape of a real model, by default with as many patches as it has; and
    its name."""
    sizes = SHAPES[shape]
    side = patches_a_side or sizes.patches_a_side
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=14 * side, patch_size=14, **sizes.tower),
        text_config=sizes.decoder(tie_word_embeddings=sizes.tied, **sizes.sizes, **tokens),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=side**2,
        vision_feature_layer=sizes.tower_layer,
        tie_word_embeddings=sizes.tied,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model.to(device).eval(), f"random weights, {sizes.name}, {dtype}".replace("torch.", "")


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
