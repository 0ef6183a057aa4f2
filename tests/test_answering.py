"""Prompts for every kind of processor, and how replies are read."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from specimens import generate, model_of
from tiny_checkpoint import save_tiny_checkpoint
from tiny_processor import TinyProcessor, picture
from torch import Tensor

from sightline.errors import InputError
from sightline.models import answering
from sightline.models.answering import Budget, Reply, cut_off_mark, prepare, prompt, reply, seen, yes_margins
from sightline.models.loading import load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "pico"))


def test_prompts_of_models_with_and_without_a_template(checkpoint: str) -> None:
    _, processor = load(checkpoint)
    assert prompt(processor, "Is it red?") == "USER: <image>\nIs it red? ASSISTANT:"
    assert prompt(processor, "Is it red?", pictures=0) == "USER: Is it red? ASSISTANT:"
    assert prompt(processor, "Is it red?", pictures=2) == "USER: <image><image>\nIs it red? ASSISTANT:"
    processor.chat_template = None
    assert prompt(processor, "Is it red?") == "<image>Is it red?"
    assert prompt(processor, "Is it red?", pictures=0) == "<s>Is it red?\n"
    assert prompt(processor, "Is it red?", pictures=3) == "<image><image><image>Is it red?"
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


# --- Rows without a picture ---


def test_a_batch_without_pictures_has_no_pixels(checkpoint: str) -> None:
    model, processor = load(checkpoint)
    inputs = prepare(model, processor, [None, None], ["Is it red?", "What colour is it?"])
    assert set(inputs) == {"input_ids", "attention_mask"}
    texts = processor.tokenizer.batch_decode(inputs["input_ids"])
    assert [text.replace("<pad>", "") for text in texts] == [
        "<s>USER: Is it red? ASSISTANT:",
        "<s>USER: What colour is it? ASSISTANT:",
    ]


def test_a_mixed_batch_holds_each_row_as_it_is_alone(checkpoint: str) -> None:
    model, processor = load(checkpoint)
    pictures = [Image.new("RGB", (20, 30), (60 * place, 9, 200)) for place in range(3)]
    shown = [None, pictures[0], None, pictures[1], pictures[2]]
    questions = ["Is it red?", "What is it?", "Is there a dog in this picture, or is there none?", "Is it?", "Why so?"]
    inputs = prepare(model, processor, shown, questions)
    pixels = []
    for row, (one, question) in enumerate(zip(shown, questions, strict=True)):
        alone = prepare(model, processor, [one], [question])
        real = inputs["attention_mask"][row].bool()
        assert inputs["input_ids"][row][real].tolist() == alone["input_ids"][0].tolist()
        assert real.tolist() == sorted(real.tolist()), "padding is on the left"
        pixels += [alone["pixel_values"]] if one is not None else []
    torch.testing.assert_close(inputs["pixel_values"], torch.cat(pixels))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "idefics3", "paligemma"])
def test_a_mixed_batch_is_answered_as_its_rows_one_by_one(family: str) -> None:
    model = model_of(family)
    processor = TinyProcessor(family, model)
    shown = [picture(1), None, picture(2), None]
    questions = ["t5 t6", "t7 t8 t9", "t10", "t11 t12 t13 t14"]
    together = reply(model, processor, prepare(model, processor, shown, questions), 4)
    blind = prepare(model, processor, [None], questions[1:2])
    assert not any("pixel" in name for name in blind)
    for one, question, answer in zip(shown, questions, together, strict=True):
        assert reply(model, processor, prepare(model, processor, [one], [question]), 4) == [answer]


# --- Budgets ---


class Clock:
    """Tells a second more each time it is looked at."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_rows_end_at_their_own_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "clock", Clock())  # one look at the start, and one after each token
    model = model_of("llava")
    processor = TinyProcessor("llava", model)
    questions = ["t5", "t6 t7", "t8", "t9", "t10", "t11"]
    inputs = prepare(model, processor, [picture(place) for place in range(6)], questions)
    stock = generate(model, inputs, 6).sequences[:, inputs["input_ids"].shape[1] :].tolist()
    budgets = [Budget(), Budget(2), Budget(seconds=3), Budget(4, 3.5), Budget(4, 4.5), Budget(9, 100)]
    replies = reply(model, processor, inputs, 6, budget=budgets)
    wanted = [(6, "tokens"), (2, "tokens"), (3, "seconds"), (4, "tokens"), (4, "tokens"), (6, "tokens")]
    assert [(one.n_tokens, one.stopped) for one in replies] == wanted
    assert [list(one.tokens) for one in replies] == [row[:n] for row, (n, _) in zip(stock, wanted, strict=True)]
    assert all(one.cut_off for one in replies)
    for budget in (Budget(3), Budget(seconds=3)):
        assert {one.n_tokens for one in reply(model, processor, inputs, 6, budget=budget)} == {3}


def test_an_answer_that_ends_by_itself_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "clock", Clock())
    model = model_of("llava")
    processor = TinyProcessor("llava", model)
    inputs = prepare(model, processor, [picture(3), picture(4)], ["t20", "t21 t22"])
    first, second = reply(model, processor, inputs, 6)
    end = first.tokens[3]
    assert end not in (*first.tokens[:3], *second.tokens)
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    for budget in (Budget(), Budget(4), Budget(seconds=4), Budget(5, 4)):
        short, other = reply(model, processor, inputs, 6, budget=budget)
        assert (short.tokens, short.stopped, short.cut_off) == (first.tokens[:3], "end", False)
        assert other.tokens == second.tokens[: 6 if budget == Budget() else 5 if budget == Budget(5) else 4]
        assert other.cut_off
    assert reply(model, processor, inputs, 6, budget=Budget(3))[0].stopped == "tokens", "the end did not come yet"


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": 0}, {"tokens": 2.5}, {"tokens": True}, {"seconds": 0}, {"seconds": -1.0}, {"seconds": math.nan}],
)
def test_budgets_that_make_no_sense(wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    with pytest.raises(InputError, match=f"{name} of a budget must be"):
        Budget(**wrong)


def test_the_mark_of_what_was_cut_off() -> None:
    assert cut_off_mark(Reply("a", 1)) == ""
    assert cut_off_mark(Reply("a", 64, stopped="tokens")) == " [cut off: 64 tokens]"
    assert cut_off_mark(Reply("a", 3, stopped="seconds"), Budget(seconds=2.0)) == " [cut off: 2 s]"
    assert cut_off_mark(Reply("a", 3, stopped="seconds"), Budget(seconds=0.25)) == " [cut off: 0.25 s]"
