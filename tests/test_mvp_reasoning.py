"""MVP, against examples worked by hand: a scripted model whose distributions are written down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from specimens import model_of
from tiny_processor import TinyProcessor, picture
from torch import Tensor

from sightline.errors import InputError
from sightline.methods import describe, parse_methods
from sightline.models.answering import Reply
from sightline.models.conversation import Request, Response, Talk, ask, converse
from sightline.reasoning.mvp_reasoning import MvpReasoning, vote

PICTURE = Image.new("RGB", (4, 4))
WORDS = ["</s>", " yes", " No", " There", " is", ",", " Ye", "s", " not", " a", " dog", "?"]
END, YES, NO, THERE, IS, COMMA, YE, S, NOT, A, DOG, ODD = range(len(WORDS))


class Words:
    """A tokenizer of a few words, and their processor."""

    all_special_ids = (END,)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return "".join(WORDS[token] for token in tokens if token != END)


class Settings:
    """A model's config and generation config, as far as they are looked at."""

    eos_token_id = END


class Model:
    config = generation_config = Settings()


TALK = Talk(Model(), Words())


def logits(probabilities: Mapping[int, float]) -> Tensor:
    """Logits [V] of these probabilities; what is left is spread over the other words."""
    rest = (1 - sum(probabilities.values())) / (len(WORDS) - len(probabilities))
    shares = [probabilities.get(token, rest) for token in range(len(WORDS))]
    return torch.tensor(shares).clamp(min=1e-30).log()


def response(tokens: Sequence[int], *steps: Mapping[int, float]) -> Response:
    text = TALK.decode(tokens)
    stacked = torch.stack([logits(step) for step in steps]) if steps else None
    return Response(text.strip(), tuple(tokens), False, stacked, Reply(text.strip(), len(tokens)))


FIRST = {YES: 0.5, THERE: 0.3, NO: 0.1, IS: 0.0005}
SURE, UNSURE = {NO: 0.9, YES: 0.05}, {YES: 0.4, NO: 0.35}
NOTHING = {A: 0.8}


def run(method: MvpReasoning, *rounds: Sequence[Response], question: str = "Is there a Dog?") -> tuple[Any, list[Any]]:
    """What the steps return when they are given these responses, and all that they asked."""
    steps = method.steps(PICTURE, question, 9, TALK)
    asked = [list(next(steps))]
    for responses in rounds:
        assert len(responses) == len(asked[-1])
        try:
            asked.append(list(steps.send(responses)))
        except StopIteration as end:
            return end.value, asked
    raise AssertionError("it did not end")


def test_one_view_worked_by_hand() -> None:
    """yes: 0.5 at once. "There is no": 0.3 x (0.9 - 0.05) = 0.255. No: 0.1 at once. So yes with 0.5 / 0.855."""
    method = MvpReasoning(views=("regular",), weights=(2.0,), temper_certainty=False)
    path = response([THERE, IS, NO], FIRST, NOTHING, SURE)
    answer, asked = run(method, [response([A, DOG])], [response([YES], FIRST)], [path])
    assert answer == "Yes"
    assert [len(one) for one in asked] == [1, 1, 1]
    assert asked[0][0] == Request(PICTURE, method.regular, 512, temperature=0.7, top_p=0.95, seed=336)
    prompt = "Here is the caption of the image:\na dog\nQuestion: is there a dog?"
    assert asked[1][0] == Request(PICTURE, prompt, 1, wants_logits=True)
    assert asked[2][0] == Request(PICTURE, prompt, 51, temperature=0.7, seed=336, begin=(THERE,), wants_logits=True)
    assert method.certainty(path, TALK) == ("no", pytest.approx(0.85))


def test_three_views_worked_by_hand() -> None:
    """In the first view no wins by 0.6 to 0.2, in the other two yes by 0.35 to 0.3 and 0.6 to 0.1, the weights turn it.

    Bottom-up 0.4 x (no 0.6, yes 0.2); top-down 0.4 x (no 0.3, yes 0.35); regular 0.2 x (no 0.1, yes 0.6): no 0.38,
    yes 0.34. With equal weights: no 1.0, yes 1.15.
    """
    views = [{NO: 0.6, YES: 0.2}, {NO: 0.3, YES: 0.35}, {NO: 0.1, YES: 0.6}]
    captions = [response([A])] * 3
    firsts = [response([YES], view) for view in views]
    for weights, wanted in (((0.4, 0.4, 0.2), "No"), ((1.0, 1.0, 1.0), "Yes"), ((40.0, 40.0, 20.0), "No")):
        answer, asked = run(MvpReasoning(k=2, weights=weights), captions, firsts, [])
        assert answer == wanted
        assert [request.text for request in asked[0]] == [
            MvpReasoning().bottom_up,
            MvpReasoning().top_down,
            MvpReasoning().regular,
        ]
        assert [request.seed for request in asked[0]] == [336, 337, 338]


def test_unsure_paths_weigh_less() -> None:
    """A path to no of probability 0.5 at 0.05 certainty, 0.025, loses to a yes of 0.06; at 0.85 certainty it wins."""
    first = {THERE: 0.5, YES: 0.06}
    method = MvpReasoning(k=2, views=("regular",), weights=(1.0,), temper_certainty=False)
    for certain, wanted in (({NO: 0.4, YES: 0.35}, "Yes"), (SURE, "No")):
        path = response([THERE, NO, COMMA], first, certain, NOTHING)
        assert run(method, [response([A])], [response([A], first)], [path])[0] == wanted


def test_certainties_are_those_of_the_tempered_distribution_unless_told_otherwise() -> None:
    path = response([THERE, YES], FIRST, UNSURE)
    plain = MvpReasoning(temper_certainty=False).certainty(path, TALK)
    assert plain == ("yes", pytest.approx(0.05))
    rest = 0.25 / (len(WORDS) - 2)
    powers = [0.4**2, 0.35**2, *[rest**2] * (len(WORDS) - 2)]
    sharp = MvpReasoning(path_temperature=0.5).certainty(path, TALK)
    assert sharp == ("yes", pytest.approx((powers[0] - powers[1]) / sum(powers)))
    assert MvpReasoning(path_temperature=0).certainty(path, TALK) == plain


def test_where_a_class_word_is_found() -> None:
    method = MvpReasoning(temper_certainty=False)
    step = [{A: 0.3 + place / 10, DOG: 0.1} for place in range(6)]  # certainties 0.2, 0.3, 0.4, ...

    def certainty(*tokens: int) -> Any:
        return method.certainty(response(tokens, *step[: len(tokens)]), TALK)

    assert certainty(THERE, IS, NO, COMMA, YES) == ("no", pytest.approx(0.4)), "the first one, without punctuation"
    assert certainty(THERE, COMMA, YE, S) == ("yes", pytest.approx(0.4)), "where a word in two pieces begins"
    assert certainty(YE, S, NO) == ("yes", pytest.approx(0.3)), "the first token was forced, the second chosen"
    assert certainty(YES, NO) == ("no", pytest.approx(0.3)), "what was forced alone says nothing"
    assert certainty(THERE, IS, NOT, A, DOG) is None
    assert certainty(THERE, YES, S) is None, "yess"


def test_single_letters_keep_their_case() -> None:
    method = MvpReasoning(classes=("A", "B"), temper_certainty=False)
    assert method.certainty(response([THERE, IS, A, DOG], *[NOTHING] * 4), TALK) is None
    assert MvpReasoning(classes=("a", "b")).certainty(response([THERE, A], NOTHING, NOTHING), TALK) is not None
    assert method.decide({"B": 0.7, "A": 0.3}) == "B"


def test_rare_first_tokens_and_special_ones_begin_no_path() -> None:
    first = {END: 0.6, THERE: 0.2, IS: 0.1, DOG: 0.0009}
    rest = (1 - 0.9009) / (len(WORDS) - 4)
    method = MvpReasoning(k=12, theta=0.001, views=("regular",), weights=(1.0,))
    asked = run(
        method,
        [response([A])],
        [response([END], first)],
        [response([begin, YES], first, SURE) for begin in (THERE, IS, ODD, A, COMMA, YE, S, NOT)],
    )[1]
    assert rest > 0.001
    begun = [request.begin[0] for request in asked[2]]
    assert begun[:2] == [THERE, IS]
    assert sorted(begun) == [THERE, IS, COMMA, YE, S, NOT, A, ODD], "neither the end, nor dog, nor the class words"
    assert len({request.seed for request in asked[2]}) == len(begun)


def test_paths_without_an_answer_are_left_out_or_count_as_yes() -> None:
    first = {THERE: 0.5, NO: 0.3}
    rounds = [response([A])], [response([A], first)], [response([THERE, IS, A], *[NOTHING] * 3)]
    settings: dict[str, Any] = {"k": 2, "views": ("regular",), "weights": (1.0,)}
    assert run(MvpReasoning(**settings), *rounds)[0] == "No"
    assert run(MvpReasoning(**settings, undecided_is_yes=True), *rounds)[0] == "Yes"


def test_without_any_answer_the_model_is_asked_plainly() -> None:
    first = {THERE: 0.9}
    plain = response([A, DOG])
    method = MvpReasoning(k=1, views=("regular",), weights=(1.0,))
    answer, asked = run(
        method, [response([A])], [response([A], first)], [response([THERE, A], first, NOTHING)], [plain]
    )
    assert answer is plain
    assert asked[3] == [Request(PICTURE, "Is there a Dog?", 9)]


def test_of_equal_classes_the_last_one_is_the_answer() -> None:
    assert MvpReasoning().decide({"yes": 0.5, "no": 0.5}) == "No"
    assert MvpReasoning().decide({"yes": 0.51, "no": 0.49}) == "Yes"


def test_votes_sum_to_one() -> None:
    assert vote(["a", "b", "a"], [1, 3, 1]) == {"b": 0.6, "a": 0.4}
    weights = torch.rand(40, generator=torch.Generator().manual_seed(1)).tolist()
    assert math.fsum(vote(["x", "y", "z", "y"] * 10, weights).values()) == pytest.approx(1)
    for answers, wrong in (([], []), (["a"], [1, 2]), (["a"], [-1]), (["a", "b"], [0, 0])):
        with pytest.raises(InputError, match="a vote needs answers"):
            vote(answers, wrong)


def test_prompts_take_what_is_in_braces_as_it_is() -> None:
    method = MvpReasoning(
        k=2, views=("regular",), weights=(1.0,), lower_case=False, answer_prompt="{question} | {caption}"
    )
    caption = response([A])
    odd = Response("a {question} {0}", caption.tokens, False, None, caption.reply)
    asked = run(method, [odd], [response([YES], {YES: 0.9, NO: 0.05, IS: 0.0})], [], question="Which {caption}?")[1]
    assert asked[1][0].text == "Which {caption}? | a {question} {0}"


# --- With a model ---


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_paths_and_certainties_of_a_real_model(family: str) -> None:
    """The answer, from requests that are made here one by one, and sums in a loop."""
    model = model_of(family)
    processor = TinyProcessor(family, model)
    shown, question = picture(7), "t9 t10"
    views = ("top_down", "regular")
    weights = (0.7, 0.3)
    method = MvpReasoning(
        k=3, theta=0.0, views=views, weights=weights, caption_tokens=4, path_tokens=4, classes=tuple(
            f"t{token}" for token in range(3, 80) if token % 2
        ), top_down="t50 t51", regular="t52", lower_case=False, answer_prompt="{caption} {question}",
    )  # fmt: skip
    totals: dict[str, float] = {}
    begun = 0
    for place, text in enumerate(("t50 t51", "t52")):
        (caption,) = ask(model, processor, [Request(shown, text, 4, temperature=0.7, top_p=0.95, seed=336 + place)])
        asked = f"{caption.text} {question}"
        (first,) = ask(model, processor, [Request(shown, asked, 1, wants_logits=True)])
        assert first.logits is not None
        shares = first.logits[0].softmax(dim=0)
        text_tokens = [token for token in shares.argsort(descending=True).tolist() if 3 <= token < 80]
        for token in text_tokens[:3]:
            if token % 2:
                totals[f"T{token}"] = totals.get(f"T{token}", 0) + weights[place] * float(shares[token])
                continue
            request = Request(shown, asked, 5, temperature=0.7, seed=336 + begun, begin=(token,), wants_logits=True)
            (path,) = ask(model, processor, [request])
            begun += 1
            odd = [step for step, one in enumerate(path.tokens) if one % 2 and step]
            if odd:
                assert path.logits is not None
                best = (path.logits[odd[0]] / 0.7).softmax(dim=0).sort(descending=True).values
                name = f"T{path.tokens[odd[0]]}"
                totals[name] = totals.get(name, 0) + weights[place] * float(shares[token] * (best[0] - best[1]))
    assert len(totals) > 1
    assert begun
    made = method.answer(model, processor, shown, question, 5)
    assert made.text == max(totals, key=lambda name: totals[name])
    assert made.calls == 2 + 2 + begun
    again = converse(method, model, processor, [(picture(3), "t20"), (shown, question)], 5, batch_size=2)
    assert again[1] == made


def test_at_one_path_and_one_view_the_class_word_is_the_plain_answer() -> None:
    model = model_of("llava")
    processor = TinyProcessor("llava", model)
    method = MvpReasoning(
        k=1, views=("regular",), weights=(1.0,), caption_tokens=1, lower_case=False, regular="t5",
        answer_prompt="{caption}{question}", path_temperature=0, classes=tuple(f"t{token}" for token in range(3, 80)),
    )  # fmt: skip
    compared = 0
    for seed in range(6):
        (caption,) = ask(model, processor, [Request(picture(seed), "t5", 1, temperature=0.7, top_p=0.95, seed=336)])
        question = " t30 t31"
        (plain,) = ask(model, processor, [Request(picture(seed), caption.text + question, 1)])
        made = method.answer(model, processor, picture(seed), question, 1)
        if plain.text:  # else the likeliest token is a special one
            assert made.text.lower() == plain.text
            assert made.calls == 2
            compared += 1
    assert compared > 1


def test_without_a_picture_or_a_view_the_model_is_asked_plainly() -> None:
    steps = MvpReasoning().steps(None, "Why?", 7, TALK)
    assert next(steps) == [Request(None, "Why?", 7)]
    neutral = MvpReasoning(k=5).identity()
    assert neutral.is_identity
    assert next(neutral.steps(PICTURE, "Why?", 7, TALK)) == [Request(PICTURE, "Why?", 7)]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"k": 0}, r"k of mvp_reasoning must lie in \[1"),
        ({"k": 2.5}, "whole number"),
        ({"theta": 1.5}, "theta"),
        ({"caption_top_p": 0}, r"\(0, 1\]"),
        ({"path_temperature": -1}, "path_temperature"),
        ({"views": ("botom_up",), "weights": (1.0,)}, "did you mean 'bottom_up'"),
        ({"views": ("regular", "regular"), "weights": (1.0, 1.0)}, "must be different"),
        ({"weights": (1.0, 1.0)}, "must be 3 numbers from 0 on"),
        ({"weights": (1.0, -1.0, 1.0)}, "must be 3 numbers from 0 on"),
        ({"weights": (0.0, 0.0, 0.0)}, "not all 0"),
        ({"classes": ("yes",)}, "two or more different words"),
        ({"classes": ("yes", "Yes")}, "two or more different words"),
        ({"classes": ("yes", "not at all")}, "two or more different words"),
        ({"answer_prompt": "{question}"}, "must hold {caption}"),
        ({"top_down": " "}, "top_down of mvp_reasoning is empty"),
    ],
)
def test_bad_settings(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        MvpReasoning(**wrong)


def test_the_short_form() -> None:
    spec = "mvp_reasoning:k=5,views=regular;top_down,weights=0.5;1.5,classes=A;B"
    (method,) = parse_methods(spec)
    assert method == MvpReasoning(k=5, views=("regular", "top_down"), weights=(0.5, 1.5), classes=("A", "B"))
    assert describe([method]) == spec
