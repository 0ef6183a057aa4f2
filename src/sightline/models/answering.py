"""From pictures and questions to a model's inputs, and from what it generates to answers: the same for every family.

A question shows one picture, several in their order (the frames of a clip), or none. Prompts come from the processor's
own chat template, so that a model is asked in the form in which it was trained. Answers are greedy, and nothing else is
set: what a checkpoint says about its own generation (a repetition penalty, say) stays. Every answer is guarded by a
limit on tokens and, if wanted, on time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from sightline.errors import InputError
from sightline.models.call import check_room

if TYPE_CHECKING:
    from PIL.Image import Image

FARTHEST = 100.0
"""Margins are clipped to this; a token that a method has ruled out has a logit of minus infinity."""

Stopped = Literal["end", "tokens", "seconds"]

Shown: TypeAlias = "Image | Sequence[Image]"
"""What a question shows: a picture, or several in their order."""

clock = time.monotonic


@dataclass(frozen=True)
class Budget:
    """What one answer may use; whatever is reached first ends it.

    Attributes:
        tokens: the most tokens, over all calls of the answer; None: no limit besides the length that was asked for.
        seconds: the longest time of generating, over all calls of the answer; None: no limit. It is looked at after
            each token, so that the first token comes however long the prompt takes to read.
    """

    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        tokens, seconds = self.tokens, self.seconds
        if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
            raise InputError(f"tokens of a budget must be a whole number from 1 on, or None, not {tokens!r}")
        is_number = isinstance(seconds, Real) and not isinstance(seconds, bool)
        if seconds is not None and not (is_number and 0 < seconds < math.inf):
            raise InputError(f"seconds of a budget must be a number above 0, or None, not {seconds!r}")


UNLIMITED = Budget()


@dataclass(frozen=True)
class Reply:
    """What a model answered to one prompt.

    Attributes:
        text: the answer without special tokens, white space around it removed.
        n_tokens: how many tokens the answer has, the end token not counted.
        yes_logit_margin: at the first token of the answer, the logit of "yes" minus that of "no" (the higher of their
            spellings that are one token), after all methods; None where it was not asked for or has no sense.
        stopped: what ended it: the end token, a limit on tokens, or one on time.
        tokens: the answer's tokens, the end token left out.
        calls: how many times the model was asked on the way to this answer.
        generated: how many tokens were generated in all these calls, end tokens not counted.
    """

    text: str
    n_tokens: int
    yes_logit_margin: float | None = None
    stopped: Stopped = "end"
    tokens: tuple[int, ...] = ()
    calls: int = 1
    generated: int = 0

    @property
    def cut_off(self) -> bool:
        """Whether the answer was stopped by a limit and not by the end token."""
        return self.stopped != "end"


def cut_off_mark(answer: Reply, budget: Budget = UNLIMITED) -> str:
    """What a person is shown after an answer that was cut off, such as " [cut off: 64 tokens]"; else nothing."""
    if answer.stopped == "seconds":
        return f" [cut off: {budget.seconds:g} s]"
    return f" [cut off: {answer.n_tokens} tokens]" if answer.stopped == "tokens" else ""


def pictures_of(shown: Shown | None) -> list[Image]:
    """The pictures that a question shows, in their order.

    Raises:
        InputError: for an empty list of them.
    """
    if shown is None:
        return []
    if not isinstance(shown, Sequence):
        return [shown]
    if not shown:
        raise InputError("there is no picture in the list of pictures; give None to ask without one")
    return list(shown)


def prompt(processor: Any, question: str, *, pictures: int = 1) -> str:
    """The text of a prompt that shows so many pictures and asks a question.

    Raises:
        InputError: if the question is empty.
    """
    if not question.strip():
        raise InputError("the question is empty: ask something about the picture")
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    # Base models such as PaliGemma have no chat template: the pictures, then the bare question. Their processor adds
    # the start token and the newline that ends a prompt, but takes no prompt without a picture.
    if pictures:
        return f"{getattr(processor, 'image_token', '<image>') * pictures}{question}"
    return f"{_start_token(processor)}{question}\n"


def prepare(model: Any, processor: Any, pictures: Sequence[Shown | None], questions: Sequence[str]) -> dict[str, Any]:
    """The inputs of a batch, padded on the left, on the model's device and with pixels of the model's dtype.

    Args:
        model: the model.
        processor: its processor.
        pictures: for each question one picture, RGB, or several, or None: the question is asked without a picture.
        questions: the questions.

    Returns:
        What the processor gives: input_ids [B, S], attention_mask [B, S], pixel_values and what else the family needs;
        no pixel_values where no row has a picture.

    Raises:
        InputError: for an empty question, or one so long that beside it nothing visual fits.
    """
    shown = [pictures_of(own) for own in pictures]
    prompts = [prompt(processor, question, pictures=len(own)) for own, question in zip(shown, questions, strict=True)]
    seeing = [row for row, own in enumerate(shown) if own]
    blind = [row for row, own in enumerate(shown) if not own]
    parts = []
    if seeing:
        images = [shown[row] for row in seeing]
        parts.append(_encoded(processor, processor, [prompts[row] for row in seeing], images=images))
    if blind:
        names = getattr(processor, "model_input_names", ())
        types = {"return_token_type_ids": True} if "token_type_ids" in names else {}
        parts.append(_encoded(processor, _tokenizer(processor), [prompts[row] for row in blind], **types))
    inputs = parts[0] if len(parts) == 1 else _merged(_tokenizer(processor), parts, (seeing, blind))
    ids = inputs["input_ids"]
    check_room(model.config, ids == getattr(model.config, "image_token_id", -1), inputs.get("attention_mask"))
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def reply(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    *,
    margin: bool = False,
    budget: Budget | Sequence[Budget] = UNLIMITED,
    choosing: LogitsProcessor | None = None,
) -> list[Reply]:
    """Greedy answers to a batch of inputs, with whatever methods are attached to the model.

    Args:
        model: the model.
        processor: its processor.
        inputs: what `prepare` gives, B rows.
        max_new_tokens: the longest answer.
        margin: whether to look at the first token's logits of yes and no.
        budget: what else ends an answer, for all rows or for each.
        choosing: what turns the next-token logits, after everything else, into scores whose largest is taken.

    Returns:
        B replies.
    """
    rows, length = inputs["input_ids"].shape
    budgets = [budget] * rows if isinstance(budget, Budget) else list(budget)
    most = max(max_new_tokens if one.tokens is None else min(one.tokens, max_new_tokens) for one in budgets)
    guard = _Guard(length, budgets)
    limited = any(one != UNLIMITED for one in budgets)
    first = _First()
    output = model.generate(
        **inputs,
        max_new_tokens=most,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([first] * margin + [choosing] * (choosing is not None)),
        stopping_criteria=StoppingCriteriaList([guard] * limited),
    )
    new_BT = output.sequences[:, length:].tolist()
    margins: list[float | None] = [None] * rows
    if margin:
        assert first.logits is not None
        margins = yes_margins(first.logits, _tokenizer(processor))
    ends = end_tokens(model)
    return [
        _reply(processor, tokens[: guard.stopped_at[row]], ends, guard.why[row], margins[row])
        for row, tokens in enumerate(new_BT)
    ]


class _Guard(StoppingCriteria):
    """Ends each row at its own budget, and notes where and why."""

    def __init__(self, prompt_length: int, budgets: Sequence[Budget]) -> None:
        self.prompt_length = prompt_length
        self.start = clock()
        self.tokens = [math.inf if one.tokens is None else one.tokens for one in budgets]
        self.seconds = [math.inf if one.seconds is None else one.seconds for one in budgets]
        self.stopped_at: list[int | None] = [None] * len(budgets)
        self.why: list[Stopped] = ["tokens"] * len(budgets)  # the limit of the whole batch, unless noted otherwise

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        new = input_ids.shape[1] - self.prompt_length
        taken = clock() - self.start
        for row, stopped_at in enumerate(self.stopped_at):
            if stopped_at is None and (new >= self.tokens[row] or taken >= self.seconds[row]):
                self.stopped_at[row] = new
                self.why[row] = "tokens" if new >= self.tokens[row] else "seconds"
        return torch.tensor([at is not None for at in self.stopped_at], device=input_ids.device)


class _First(LogitsProcessor):
    """Notes the logits of the first step."""

    logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.logits is None:
            self.logits = scores.clone()
        return scores


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


def _reply(processor: Any, tokens: list[int], ends: frozenset[int], limit: Stopped, margin: float | None) -> Reply:
    stop = next((place for place, token in enumerate(tokens) if token in ends), None)
    own = tokens if stop is None else tokens[:stop]
    text = processor.decode(own, skip_special_tokens=True).strip()
    return Reply(text, len(own), margin, limit if stop is None else "end", tuple(own), generated=len(own))


def _tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def _start_token(processor: Any) -> str:
    return getattr(_tokenizer(processor), "bos_token", None) or ""


def _encoded(processor: Any, encode: Any, prompts: list[str], **more: Any) -> dict[str, Tensor]:
    start = _start_token(processor)
    # A template that writes the start token itself must not get a second one.
    starts_itself = bool(start) and all(text.startswith(start) for text in prompts)
    options = {"add_special_tokens": False} if starts_itself else {}
    inputs = encode(text=prompts, padding=True, return_tensors="pt", **more, **options)
    # PaliGemma's processor makes labels for training.
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != "labels"}


def _merged(tokenizer: Any, parts: Sequence[dict[str, Tensor]], rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """One batch of the rows with pictures (the first part) and those without, in their order. What a picture brings
    with it is in the order of the pictures, whatever rows are between them."""
    longest = max(part["input_ids"].shape[1] for part in parts)
    pad = tokenizer.pad_token_id
    merged = dict(parts[0])
    shape = parts[0]["input_ids"].shape
    for name in [name for name, v in parts[0].items() if v.shape == shape and not v.is_floating_point()]:
        whole = torch.full((sum(len(own) for own in rows), longest), (pad or 0) if name == "input_ids" else 0)
        for part, own in zip(parts, rows, strict=True):
            if name in part:
                whole[list(own), longest - part[name].shape[1] :] = part[name]
        merged[name] = whole
    return merged
