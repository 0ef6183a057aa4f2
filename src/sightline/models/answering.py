"""From pictures and questions to a model's inputs, and from what it generates to answers: the same for every family.

One picture a question. Prompts come from the processor's own chat template, so that a model is asked in the form in
which it was trained. Answers are greedy, and nothing else is set: what a checkpoint says about its own generation (a
repetition penalty, say) stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sightline.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

FARTHEST = 100.0
"""Margins are clipped to this; a token that a method has ruled out has a logit of minus infinity."""


@dataclass(frozen=True)
class Reply:
    """What a model answered to one prompt.

    Attributes:
        text: the answer without special tokens, white space around it removed.
        n_tokens: how many tokens were generated, the end token not counted.
        cut_off: whether the answer was stopped by the limit on tokens and not by the end token.
        yes_logit_margin: at the first token of the answer, the logit of "yes" minus that of "no" (the higher of their
            spellings that are one token), after all methods; None where it was not asked for or has no sense.
    """

    text: str
    n_tokens: int
    cut_off: bool
    yes_logit_margin: float | None


def prompt(processor: Any, question: str) -> str:
    """The text of a prompt that shows one picture and asks a question.

    Raises:
        InputError: if the question is empty.
    """
    if not question.strip():
        raise InputError("the question is empty: ask something about the picture")
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    # Base models such as PaliGemma have no chat template: the picture, then the bare question.
    return f"{getattr(processor, 'image_token', '<image>')}{question}"


def prepare(model: Any, processor: Any, pictures: Sequence[Image], questions: Sequence[str]) -> dict[str, Any]:
    """The inputs of a batch, padded on the left, on the model's device and with pixels of the model's dtype.

    Args:
        model: the model.
        processor: its processor.
        pictures: one picture for each question, RGB.
        questions: the questions.

    Returns:
        What the processor gives: input_ids [B, S], attention_mask [B, S], pixel_values and what else the family needs.
    """
    prompts = [prompt(processor, question) for question in questions]
    tokenizer = getattr(processor, "tokenizer", processor)
    start = getattr(tokenizer, "bos_token", None) or ""
    # A template that writes the start token itself must not get a second one.
    starts_itself = bool(start) and all(text.startswith(start) for text in prompts)
    options = {"add_special_tokens": False} if starts_itself else {}
    inputs = processor(
        images=[[picture] for picture in pictures], text=prompts, padding=True, return_tensors="pt", **options
    )
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and name != "labels"  # PaliGemma's processor makes labels for training
    }


def reply(
    model: Any, processor: Any, inputs: Mapping[str, Any], max_new_tokens: int, *, margin: bool = False
) -> list[Reply]:
    """Greedy answers to a batch of inputs, with whatever methods are attached to the model.

    Args:
        model: the model.
        processor: its processor.
        inputs: what `prepare` gives, B rows.
        max_new_tokens: the longest answer.
        margin: whether to look at the first token's logits of yes and no.

    Returns:
        B replies.
    """
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        output_scores=margin,
    )
    new_BT = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    margins: list[float | None] = [None] * len(new_BT)
    if margin:
        margins = yes_margins(output.scores[0], getattr(processor, "tokenizer", processor))
    ends = end_tokens(model)
    return [_reply(processor, tokens, ends, m) for tokens, m in zip(new_BT, margins, strict=True)]


def seen(processor: Any, picture: Image) -> tuple[float, float, float, float]:
    """The part of a picture that the model sees, as left, top, right, bottom in [0, 1]: all of it, or the middle where
    the processor resizes the shorter side and cuts off the rest."""
    settings = getattr(processor, "image_processor", None)
    if not getattr(settings, "do_center_crop", False):
        return 0.0, 0.0, 1.0, 1.0
    width, height = picture.size
    shorter = (getattr(settings, "size", None) or {}).get("shortest_edge")
    crop = getattr(settings, "crop_size", None) or {}
    if getattr(settings, "do_resize", True):
        if shorter is None:
            return 0.0, 0.0, 1.0, 1.0
        scale = shorter / min(width, height)
        width, height = round(width * scale), round(height * scale)
    x = max(0.0, (1 - crop.get("width", width) / width) / 2)
    y = max(0.0, (1 - crop.get("height", height) / height) / 2)
    return x, y, 1 - x, 1 - y


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)


def yes_margins(logits_BV: Tensor, tokenizer: Any) -> list[float | None]:
    """For each row of next-token logits, the logit of "yes" minus that of "no", clipped to [-100, 100].

    Of the spellings (case, leading space) those that are one token of the tokenizer count, the likeliest of them; where
    none is one token, the first tokens count, unless yes and no share them. None where neither can be told or both are
    ruled out.
    """
    yes, no = _first_tokens(tokenizer, "yes"), _first_tokens(tokenizer, "no")
    yes, no = yes - no, no - yes
    if not yes or not no:
        return [None] * len(logits_BV)
    differences = logits_BV[:, sorted(yes)].amax(dim=1).float() - logits_BV[:, sorted(no)].amax(dim=1).float()
    return [None if math.isnan(d) else max(-FARTHEST, min(FARTHEST, d)) for d in differences.tolist()]


def _first_tokens(tokenizer: Any, word: str) -> set[int]:
    spellings = [space + form for form in (word, word.capitalize()) for space in ("", " ")]
    encoded = [tokenizer(spelling, add_special_tokens=False)["input_ids"] for spelling in spellings]
    return {ids[0] for ids in encoded if len(ids) == 1} or {ids[0] for ids in encoded if ids}


def _reply(processor: Any, tokens: list[int], ends: frozenset[int], margin: float | None) -> Reply:
    stop = next((place for place, token in enumerate(tokens) if token in ends), None)
    own = tokens if stop is None else tokens[:stop]
    text = processor.decode(own, skip_special_tokens=True).strip()
    return Reply(text, len(own), stop is None, margin)
