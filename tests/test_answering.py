"""Prompts for every kind of processor, and how replies are read."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint
from torch import Tensor

from sightline.errors import InputError
from sightline.models.answering import prepare, prompt, seen, yes_margins
from sightline.models.loading import load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "pico"))


def test_prompts_of_models_with_and_without_a_template(checkpoint: str) -> None:
    _, processor = load(checkpoint)
    assert prompt(processor, "Is it red?") == "USER: <image>\nIs it red? ASSISTANT:"
    processor.chat_template = None
    assert prompt(processor, "Is it red?") == "<image>Is it red?"
    for empty in ("", " \n"):
        with pytest.raises(InputError, match="question is empty"):
            prompt(processor, empty)


def test_a_template_that_writes_the_start_token_gets_no_second_one(checkpoint: str) -> None:
    model, processor = load(checkpoint)
    asked: dict[str, Any] = {}

    def spy(**kwargs: Any) -> dict[str, Tensor]:
        asked.update(kwargs)
        ids = torch.zeros(1, 1, dtype=torch.long)
        return {"input_ids": ids, "labels": ids, "pixel_values": torch.zeros(1, dtype=torch.float64)}

    class Spy:
        tokenizer = processor.tokenizer
        chat_template = "there is one"
        start = ""

        def apply_chat_template(self, messages: Any, add_generation_prompt: bool) -> str:
            return self.start + "question"

        __call__ = staticmethod(spy)

    picture = Image.new("RGB", (8, 8))
    inputs = prepare(model, Spy(), [picture], ["?"])
    assert "add_special_tokens" not in asked
    assert {name: value.dtype for name, value in inputs.items()} == {
        "input_ids": torch.long,
        "pixel_values": model.dtype,
    }
    Spy.start = processor.tokenizer.bos_token
    prepare(model, Spy(), [picture], ["?"])
    assert asked["add_special_tokens"] is False


class Words:
    """A tokenizer that knows some whole words, and letters."""

    known: ClassVar[dict[str, list[int]]] = {
        "yes": [10, 11],
        "Yes": [12],
        " yes": [13],
        " Yes": [14, 15],
        "no": [16],
        "No": [17, 18],
        " no": [19],
        " No": [14, 18],
    }

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": self.known[text]}


def test_yes_margin_takes_the_likeliest_whole_word() -> None:
    logits = torch.full((3, 20), -5.0)
    logits[0, 12], logits[0, 13], logits[0, 16], logits[0, 10] = 1.0, 2.5, 0.5, 9.0
    logits[1, 19] = -math.inf
    logits[1, 16] = -math.inf
    logits[2, [12, 13, 16, 19]] = -math.inf
    assert yes_margins(logits, Words()) == [2.0, 100.0, None]


def test_yes_margin_without_whole_words_takes_first_tokens_unless_shared() -> None:
    class Letters(Words):
        known: ClassVar[dict[str, list[int]]] = {word: [ord(word[0]), 1] for word in Words.known}

    logits = torch.zeros(1, 128)
    logits[0, ord("y")], logits[0, ord("N")], logits[0, ord(" ")] = 3.0, 1.0, 50.0
    assert yes_margins(logits, Letters()) == [2.0]

    class Shared(Words):
        known: ClassVar[dict[str, list[int]]] = {word: [3, 1] for word in Words.known}

    assert yes_margins(logits, Shared()) == [None]


def test_what_a_model_sees_of_a_picture() -> None:
    class Images:
        do_center_crop = True
        size: ClassVar[dict[str, int]] = {"shortest_edge": 336}
        crop_size: ClassVar[dict[str, int]] = {"height": 336, "width": 336}

    class Processor:
        image_processor = Images()

    assert seen(Processor(), Image.new("RGB", (672, 336))) == (0.25, 0.0, 0.75, 1.0)
    assert seen(Processor(), Image.new("RGB", (300, 400))) == pytest.approx((0.0, 0.125, 1.0, 0.875))
    Images.do_center_crop = False
    assert seen(Processor(), Image.new("RGB", (672, 336))) == (0.0, 0.0, 1.0, 1.0)
