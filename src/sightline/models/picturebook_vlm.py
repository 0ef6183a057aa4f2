"""The built-in vision-language model: a stock Llava of a few million parameters and its processor, built from nothing.

Everything here is a class of `transformers` with a small configuration: a CLIP vision tower with [CLS], a two-layer MLP
projector, a Llama decoder, a byte-level BPE tokenizer learnt from the world's own texts, and LLaVA-1.5's prompt format.
A checkpoint saved from it loads in plain `transformers`. The trained weights that ship with the package come from the
recipe `sightline.training.nano`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from sightline.errors import unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PICTURE_SIZE = 80
PATCH_SIZE = 8
PROMPT_WITH_PICTURE = "USER: <image>\n{question} ASSISTANT:"
# Several pictures stand side by side, as the frames of films do in training: with a line break behind each, these would
# outnumber what a method leaves of a long film.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'].upper() + ': ' }}
{%- if message['content'] is string -%}
{{ message['content'] + ' ' }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}
{{ '<image>' + ('\\n' if loop.last else '') }}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{ part['text'] + (' ' if message['role'] == 'user' else '</s>') }}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""


@dataclass(frozen=True)
class Shape:
    """Widths and depths of the vision tower and the decoder."""

    vision_width: int
    vision_layers: int
    vision_heads: int
    width: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int


SHAPES: dict[str, Shape] = {
    "nano": Shape(128, 5, 4, 192, 5, 6, 384, 640),
    "pico": Shape(64, 3, 4, 96, 4, 6, 184, 512),
}
"""`nano` is what ships; `pico` trains in minutes, for claims that need models of several seeds."""


def build_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of `vocabulary` entries, learnt from `texts`: any text can be encoded and comes back
    whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Every prompt starts with <s>, as in training; chat templates need not say so.
    start = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=start)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """The stock Llava processor: any picture is resized to 80 x 80 pixels, 10 x 10 patches, 100 visual tokens."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": PICTURE_SIZE, "width": PICTURE_SIZE},
            do_center_crop=False,
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(size: str, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> LlavaForConditionalGeneration:
    """A Llava of one of the `SHAPES` with random weights.

    Raises:
        InputError: for an unknown size.
    """
    if size not in SHAPES:
        raise unknown("size", size, SHAPES)
    shape = SHAPES[size]
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=PICTURE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.vocab["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(PICTURE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        _initialise(model, shape)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=96,
        do_sample=False,
    )
    return model


def _initialise(model: LlavaForConditionalGeneration, shape: Shape) -> None:
    """Weights of the decoder and the projector for a width of 100 to 200: the usual deviation of 0.02 is meant for ten
    times that, and leaves attention flat for thousands of steps.

    Queries and keys start equal (as in mimetic initialisation, Trockman and Kolter 2023, arXiv:2305.09828), so that
    from the first step a token attends to tokens that resemble it: a question's word to the patches that show it."""
    for name, parameter in model.named_parameters():
        if "vision_tower" in name or parameter.ndim < 2:
            continue
        deviation = 0.85 * shape.width**-0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            deviation *= (2 * shape.layers) ** -0.5  # the residual stream adds up two of these a layer
        if "embed_tokens" in name:
            deviation = 0.1
        torch.nn.init.normal_(parameter, std=deviation)
    for layer in model.model.language_model.layers:
        with torch.no_grad():
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
