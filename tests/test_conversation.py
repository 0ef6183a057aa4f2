"""Conversations: requests in batches, sampling by a row's own noise, strategies that go forward together, budgets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import pytest
import torch
from families import VOCABULARY
from specimens import EveryOther, Nothing, generate, model_of
from tiny_processor import TinyProcessor, picture
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import sightline as sl
from sightline.errors import InputError
from sightline.methods import Method, methods, parse_methods
from sightline.models import answering, conversation
from sightline.models.answering import Budget, prepare, reply
from sightline.models.conversation import (
    Request,
    Response,
    Steps,
    Strategy,
    Talk,
    _noisy,
    answer,
    ask,
    converse,
    strategy_of,
)

if TYPE_CHECKING:
    from PIL import Image

FAMILIES = ("llava", "qwen2_vl", "paligemma")
on_families = pytest.mark.parametrize("family", FAMILIES)
STRATEGIES = tuple(name for name, kind in methods().items() if not kind.attaches)
QUESTIONS = ("t5 t9 t11", "t40", "t7 t8 t30 t31 t32", "t61 t62")
ITEMS = [(picture(10 * place), question) for place, question in enumerate(QUESTIONS)]
NEW = 5


@functools.cache
def pair(family: str) -> tuple[Any, TinyProcessor]:
    model = model_of(family)
    return model, TinyProcessor(family, model)


@dataclass(frozen=True)
class AskTwice(Strategy):
    """Asks a question `first` times over, by sampling; then asks again with all that was said."""

    paper: ClassVar[str] = "ask_twice"
    first: int = 2

    @property
    def is_identity(self) -> bool:
        return self.first == 0

    def identity(self) -> Self:
        return type(self)(first=0)

    def steps(self, picture: Image.Image | None, question: str, max_new_tokens: int, talk: Talk) -> Steps:
        asked = [Request(picture, question, 3, temperature=1.5, seed=seed) for seed in range(self.first)]
        said = yield asked
        told = " ".join(response.text for response in said)
        (last,) = yield [Request(picture, f"{told} {question}", max_new_tokens)]
        return last


@dataclass(frozen=True)
class Scripted(AskTwice):
    """Another strategy, which answers with a text of its own."""

    paper: ClassVar[str] = "scripted"

    def steps(self, picture: Image.Image | None, question: str, max_new_tokens: int, talk: Talk) -> Steps:
        yield []
        yield [Request(picture, question, 2)] * self.first
        return " t5 t6 t7 "


# --- Requests ---


def some_requests() -> list[Request]:
    plain = [Request(shown, question, NEW) for shown, question in ITEMS]
    return [
        *plain[:2],
        Request(picture(3), "t50 t51", NEW, temperature=0.8, seed=4, wants_logits=True),
        Request(picture(3), "t50 t51", NEW, temperature=0.8, seed=5),
        Request(picture(9), "t20 t21 t22", NEW, temperature=1.3, top_p=0.7, top_k=9, seed=1),
        Request(picture(9), "t20", NEW, begin=(33, 44), wants_logits=True),
        Request(None, "t12 t13", NEW, wants_logits=True),
        Request(None, "t12 t13 t14", NEW, temperature=1.0, seed=2),
        Request(picture(4), "t15", 2),
        Request(picture(4), "t15 t16", NEW, methods=(EveryOther(),)),
        Request(picture(4), "t15 t16", NEW, rescore=lambda logits: -logits),
    ]


@on_families
def test_a_batch_is_answered_as_its_requests_one_by_one(family: str) -> None:
    model, processor = pair(family)
    requests = some_requests()
    together = ask(model, processor, requests)
    for batch_size in (1, 3):
        apart = ask(model, processor, requests, batch_size=batch_size)
        assert [one.tokens for one in apart] == [one.tokens for one in together]
    for request, one in zip(requests, together, strict=True):
        (alone,) = ask(model, processor, [request])
        assert (alone.tokens, alone.text) == (one.tokens, one.text)
        assert len(one.tokens) == request.max_new_tokens
        assert one.cut_off
        assert (one.logits is not None) == request.wants_logits
        if alone.logits is not None and one.logits is not None:
            assert alone.logits.dtype == torch.float32
            assert alone.logits.shape == (NEW, VOCABULARY)
            torch.testing.assert_close(alone.logits, one.logits, atol=1e-4, rtol=1e-4)
    assert together[2].tokens != together[3].tokens, "another seed, another draw"
    assert together[10].tokens != ask(model, processor, [Request(picture(4), "t15 t16", NEW)])[0].tokens


@on_families
def test_what_a_request_gives_is_what_plain_generate_gives(family: str) -> None:
    """Greedy tokens and their logits; what stands after forced tokens, against a forward over them; the methods."""
    model, processor = pair(family)
    inputs = prepare(model, processor, [picture(9)], ["t20"])
    length = inputs["input_ids"].shape[1]
    plain, forced = ask(
        model,
        processor,
        [Request(picture(9), "t20", NEW, begin=begin, wants_logits=True) for begin in ((), (33, 44))],
    )
    out = generate(model, inputs, NEW)
    assert plain.tokens == tuple(out.sequences[0, length:].tolist())
    assert plain.logits is not None
    torch.testing.assert_close(plain.logits, torch.cat(out.logits), atol=1e-4, rtol=1e-4)

    assert forced.tokens[:2] == (33, 44)
    assert forced.logits is not None
    torch.testing.assert_close(forced.logits[0], plain.logits[0], atol=1e-4, rtol=1e-4)
    longer = dict(inputs)
    for name, fill in (("input_ids", None), ("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name in inputs:
            more = torch.tensor([forced.tokens[:4]]) if fill is None else torch.full((1, 4), fill)
            longer[name] = torch.cat([inputs[name], more], dim=1)
    if family != "paligemma":  # which would read the answer as a part of the prompt, that all of the prompt sees
        with torch.no_grad():
            wanted = model(**longer).logits[0, length - 1 :]
        torch.testing.assert_close(forced.logits, wanted, atol=1e-4, rtol=1e-4)

    (fewer,) = ask(model, processor, [Request(picture(9), "t20", NEW)], [EveryOther()])
    with sl.attach(model, EveryOther()):
        assert fewer.tokens == tuple(generate(model, inputs, NEW).sequences[0, length:].tolist())


def test_logits_end_with_the_step_that_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair("llava")
    request = Request(picture(9), "t20", NEW, wants_logits=True)
    other = Request(picture(1), "t20 t21", NEW, wants_logits=True)
    whole, longer = ask(model, processor, [request, other])
    end = next(token for place, token in enumerate(whole.tokens) if place == 2)
    assert end not in (*whole.tokens[:2], *longer.tokens)
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    short, same = ask(model, processor, [request, other])
    assert short.tokens == whole.tokens[:2]
    assert (short.cut_off, short.reply.stopped) == (False, "end")
    assert short.logits is not None
    assert whole.logits is not None
    assert len(short.logits) == 3
    torch.testing.assert_close(short.logits, whole.logits[:3])
    assert (same.tokens, same.cut_off) == (longer.tokens, True)
    (forced,) = ask(model, processor, [Request(picture(9), "t20", NEW, begin=(5, end))])
    assert (forced.tokens, forced.cut_off) == ((5,), False)


def test_logits_are_those_before_rescoring_and_after_what_the_checkpoint_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair("llava")
    last = torch.arange(VOCABULARY, dtype=torch.float32)
    seen: list[Tensor] = []

    def rescore(logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return last

    request = Request(picture(9), "t20", 3, begin=(30,), wants_logits=True, rescore=rescore)
    (rescored,) = ask(model, processor, [request])
    assert rescored.tokens == (30, VOCABULARY - 1, VOCABULARY - 1)
    assert rescored.logits is not None
    torch.testing.assert_close(rescored.logits[1:], torch.stack(seen))
    monkeypatch.setattr(model.generation_config, "suppress_tokens", [6])
    (suppressed,) = ask(model, processor, [Request(picture(9), "t20", 3, wants_logits=True)])
    assert suppressed.logits is not None
    assert torch.isneginf(suppressed.logits[:, 6]).all()


def test_a_draw_falls_on_each_token_with_its_probability() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.8])
    request = Request(None, "?", 1, temperature=0.7, top_k=4, top_p=0.9)
    wanted = TemperatureLogitsWarper(0.7)(torch.zeros(1, 1), logits[None])
    wanted = TopPLogitsWarper(0.9)(torch.zeros(1, 1), TopKLogitsWarper(4)(torch.zeros(1, 1), wanted))
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([_noisy(logits, request, generator).argmax() for _ in range(6000)])
    shares = draws.bincount(minlength=5) / 6000
    probabilities = wanted[0].softmax(dim=0)
    assert (probabilities > 0).sum() == 3
    assert ((shares > 0) == (probabilities > 0)).all()
    assert (shares - probabilities).abs().max() < 4 * (0.25 / 6000) ** 0.5


def test_top_p_keeps_at_least_the_likeliest_token() -> None:
    request = Request(None, "?", 1, temperature=1.0, top_p=1e-6)
    noisy = _noisy(torch.tensor([0.0, 3.0, 1.0]), request, torch.Generator().manual_seed(1))
    assert torch.isfinite(noisy).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens of a request must be 1 or more, not 0"),
        ({"begin": (5, 6, 7), "max_new_tokens": 2}, "must be 3, the number of forced tokens or more"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, r"top_p of a request must lie in \(0, 1\]"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_requests_that_make_no_sense(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Request(**({"picture": None, "text": "?", "max_new_tokens": 4} | change))


# --- Strategies ---


def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the size of each batch that the model gets."""
    sizes: list[int] = []
    real = conversation._put

    def put(model: Any, processor: Any, requests: Any, *rest: Any) -> Any:
        sizes.append(len(requests))
        return real(model, processor, requests, *rest)

    monkeypatch.setattr(conversation, "_put", put)
    return sizes


@on_families
def test_items_go_forward_together_and_are_answered_as_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair(family)
    sizes = batches(monkeypatch)
    together = converse(AskTwice(), model, processor, ITEMS, NEW)
    assert sizes == [8, 4]
    assert [(one.calls, one.generated, one.n_tokens) for one in together] == [(3, 3 + 3 + NEW, NEW)] * 4
    for (shown, question), one in zip(ITEMS, together, strict=True):
        assert AskTwice().answer(model, processor, shown, question, NEW) == one
        said = ask(model, processor, [Request(shown, question, 3, temperature=1.5, seed=seed) for seed in (0, 1)])
        asked = f"{said[0].text} {said[1].text} {question}"
        assert one.tokens == ask(model, processor, [Request(shown, asked, NEW)])[0].tokens


def test_equal_requests_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair("llava")
    sizes = batches(monkeypatch)
    items = [ITEMS[0], ITEMS[1], (picture(0), QUESTIONS[0]), (picture(1), QUESTIONS[0])]
    replies = converse(AskTwice(), model, processor, items, NEW)
    assert sizes == [6, 3]
    assert replies[0] == replies[2]
    assert replies[0].tokens != replies[3].tokens


def test_a_text_of_its_own_can_be_the_answer() -> None:
    model, processor = pair("llava")
    made = Scripted(first=3).answer(model, processor, *ITEMS[0], NEW)
    assert (made.text, made.tokens, made.n_tokens) == ("t5 t6 t7", (5, 6, 7), 3)
    assert (made.calls, made.generated, made.stopped, made.yes_logit_margin) == (3, 6, "end", None)


def test_a_strategy_works_on_top_of_methods_and_text_without_them() -> None:
    model, processor = pair("llava")
    below = converse(AskTwice(), model, processor, ITEMS, NEW, [EveryOther()])
    with sl.attach(model, EveryOther()):
        outside = converse(AskTwice(), model, processor, ITEMS, NEW)
    plain = converse(AskTwice(), model, processor, ITEMS, NEW)
    assert [one.tokens for one in below] == [one.tokens for one in outside] != [one.tokens for one in plain]
    vista = parse_methods("vista")
    with pytest.raises(InputError, match="no prompt of this batch has one"), sl.attach(model, *vista):
        AskTwice().answer(model, processor, None, "t5", NEW)
    assert AskTwice().answer(model, processor, None, "t5", NEW, vista) == AskTwice().answer(
        model, processor, None, "t5", NEW
    )


def test_one_answer_whatever_is_chosen() -> None:
    model, processor = pair("llava")
    shown, question = ITEMS[2]
    plain = answer(model, processor, shown, question, max_new_tokens=NEW)
    assert plain == reply(model, processor, prepare(model, processor, [shown], [question]), NEW)[0]
    both = answer(model, processor, shown, question, [EveryOther(), AskTwice()], NEW)
    assert both == AskTwice().answer(model, processor, shown, question, NEW, [EveryOther()])
    assert both == answer(model, processor, shown, question, [AskTwice(), EveryOther()], NEW)
    blind = answer(model, processor, None, question, max_new_tokens=NEW)
    assert blind.tokens != plain.tokens
    assert blind == answer(model, processor, None, question, [AskTwice(), *parse_methods("vista")], NEW)


def test_strategies_are_not_attached_and_there_is_at_most_one() -> None:
    model, processor = pair("llava")
    with pytest.raises(InputError, match="ask_twice asks the model several times, so it cannot be attached"):
        sl.attach(model, AskTwice())
    for wrong in ((AskTwice(), Scripted()), (Scripted(), EveryOther(), AskTwice())):
        with pytest.raises(InputError, match="do not compose: both change the course of the conversation"):
            strategy_of(wrong)
    with pytest.raises(InputError, match="do not compose"):
        converse(AskTwice(), model, processor, ITEMS, NEW, [Scripted()])
    other = Nothing()
    assert strategy_of([other]) == (None, (other,))
    assert strategy_of([other, AskTwice(), EveryOther()]) == (AskTwice(), (other, EveryOther()))


# --- The strategies of the catalogue ---

SMALL: dict[str, dict[str, Any]] = {
    "mvp_reasoning": {"caption_tokens": 4, "path_tokens": 3, "classes": ("t5", "t6", "t7", "t8"), "k": 4},
    "vdgd": {"description_tokens": 4},
}


def of_catalogue(name: str) -> Strategy:
    made: Method = methods()[name](**SMALL.get(name, {}))
    assert isinstance(made, Strategy)
    return made


def test_the_catalogue_has_strategies() -> None:
    assert "mvp_reasoning" in STRATEGIES
    assert parse_methods("vista+mvp_reasoning:k=2")[1] == methods()["mvp_reasoning"](k=2)


@on_families
@pytest.mark.parametrize("name", STRATEGIES)
def test_at_its_identity_setting_a_strategy_is_the_stock_model(name: str, family: str) -> None:
    model, processor = pair(family)
    neutral = of_catalogue(name).identity()
    assert neutral.is_identity
    assert not of_catalogue(name).is_identity
    inputs = prepare(model, processor, *map(list, zip(*ITEMS, strict=True)))
    stock = generate(model, inputs, NEW).sequences[:, inputs["input_ids"].shape[1] :].tolist()
    replies = converse(neutral, model, processor, ITEMS, NEW)
    assert [list(one.tokens) for one in replies] == stock
    assert [one.calls for one in replies] == [1] * 4


@on_families
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_answers_a_batch_as_its_items_one_by_one(name: str, family: str) -> None:
    model, processor = pair(family)
    strategy = of_catalogue(name)
    items = [*ITEMS, (None, "t9 t10")]
    for item, one in zip(items, converse(strategy, model, processor, items, NEW, batch_size=3), strict=True):
        assert strategy.answer(model, processor, *item, NEW) == one


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_runs_on_top_of_a_method(name: str) -> None:
    model, processor = pair("llava")
    strategy = of_catalogue(name)
    (one,) = converse(strategy, model, processor, ITEMS[:1], NEW, parse_methods("vista"))
    with sl.attach(model, *parse_methods("vista")):
        assert strategy.answer(model, processor, *ITEMS[0], NEW) == one


# --- Budgets ---


class Clock:
    """Tells a later time each time it is looked at."""

    def __init__(self, tick: float) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def test_the_calls_of_an_answer_share_its_tokens() -> None:
    model, processor = pair("llava")

    def spent(tokens: int) -> Any:
        return converse(AskTwice(), model, processor, ITEMS, NEW, budget=Budget(tokens=tokens))

    free = converse(AskTwice(), model, processor, ITEMS, NEW)
    for tokens, told in (
        (11, (3, 11, NEW, "tokens")),  # all that is needed: 3 + 3, and then 5 of its own limit
        (8, (3, 8, 2, "tokens")),  # two are left for the answer
        (6, (2, 6, 0, "tokens")),  # none is left
        (5, (2, 4, 0, "tokens")),  # two for each of the first requests, which cuts them off
        (1, (0, 0, 0, "tokens")),  # less than one for each
    ):
        for one, whole in zip(spent(tokens), free, strict=True):
            assert (one.calls, one.generated, one.n_tokens, one.stopped) == told
            assert one.cut_off
            assert one.tokens == whole.tokens[: one.n_tokens]
            assert (one.text == "") == (one.n_tokens == 0)


def test_an_answer_of_its_own_that_was_reached_in_spite_of_a_cut_says_so() -> None:
    model, processor = pair("llava")
    made = Scripted().answer(model, processor, *ITEMS[0], NEW, budget=Budget(tokens=2))
    assert (made.text, made.stopped, made.generated) == ("t5 t6 t7", "tokens", 2)


def test_the_calls_of_an_answer_share_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair("llava")

    def spent(seconds: float | None) -> Any:
        # A batch looks at the clock once before it, when its guard starts, after each step, and at its end.
        monkeypatch.setattr(answering, "clock", Clock(1.0))
        return converse(AskTwice(), model, processor, ITEMS, NEW, budget=Budget(seconds=seconds))

    for seconds, told in (
        (None, (3, 11, NEW, "tokens")),
        (2.0, (2, 4, 0, "seconds")),  # the second token of the first batch takes the last of it
        (4.5, (2, 6, 0, "seconds")),  # the first batch, 3 tokens, ends at 5
        (7.5, (3, 9, 3, "seconds")),  # 2.5 are left: the third token
        (30.0, (3, 11, NEW, "tokens")),
    ):
        assert {(one.calls, one.generated, one.n_tokens, one.stopped) for one in spent(seconds)} == {told}


def test_a_margin_is_that_of_the_last_response() -> None:
    model, processor = pair("llava")
    tokenizer: Callable[..., Any] = processor.tokenizer
    (one,) = converse(AskTwice(first=0), model, processor, ITEMS[:1], NEW, margin=True)
    (response,) = ask(model, processor, [Request(*ITEMS[0], NEW, wants_logits=True)])
    assert isinstance(response, Response)
    assert response.logits is not None
    best = {
        word: max(response.logits[0, tokenizer(form, add_special_tokens=False)["input_ids"][0]] for form in forms)
        for word, forms in (("yes", ("yes", "Yes")), ("no", ("no", "No")))
    }
    assert one.yes_logit_margin == pytest.approx(float(best["yes"] - best["no"]), abs=1e-4)
