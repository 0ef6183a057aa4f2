"""VDGD: the re-scoring by hand and against slow loops, and whole answers against a stock model read anew each token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.errors import InputError
from sightline.grounding.vdgd import (
    DESCRIBE,
    REDUCTIONS,
    Rescoring,
    Vdgd,
    candidates,
    description_scores,
    keep_place,
)
from sightline.methods import attach, describe, parse_methods
from sightline.models.answering import Reply, end_tokens, prepare
from sightline.models.conversation import Request, Response, Talk, converse
from sightline.models.loading import load
from sightline.picturebook.draw import draw
from sightline.picturebook.scene import sample_scene

SHORT = "Describe the picture in one sentence."


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


# --- The scores of a description ---


def slow_divergence(logits: Tensor, token: int, reduction: str, scale: float = 1.0) -> float:
    """KL(onehot || p_j) in full, zero times log zero being zero, for every step; then reduced."""
    divergences = []
    for step in logits.tolist():
        total = sum(math.exp(x) for x in step)
        divergence = 0.0
        for other, x in enumerate(step):
            share = 1.0 if other == token else 0.0
            if share > 0:
                divergence += share * (math.log(share) - math.log(math.exp(x) / total))
        divergences.append(divergence * scale)
    return {"min": min(divergences), "avg": sum(divergences) / len(divergences), "sum": sum(divergences)}[reduction]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_vector_equals_the_explicit_loop(reduction: str) -> None:
    logits = random_logits(5, 11)
    scores = description_scores(logits, reduction)
    assert scores.tolist() == pytest.approx([-slow_divergence(logits, w, reduction) for w in range(11)], rel=1e-5)
    torch.testing.assert_close(scores, description_scores(logits + torch.arange(5.0)[:, None], reduction))


def test_two_steps_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.125, 0.125, 0.25, 0.5]]).log()
    two = math.log(2)
    assert description_scores(logits, "min").tolist() == pytest.approx([-two, -2 * two, -2 * two, -two])
    assert description_scores(logits, "avg").tolist() == pytest.approx([-2 * two, -2.5 * two, -2.5 * two, -2 * two])
    assert description_scores(logits, "sum").tolist() == pytest.approx([-4 * two, -5 * two, -5 * two, -4 * two])


def test_a_token_that_was_ruled_out_has_a_finite_score() -> None:
    logits = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
    assert description_scores(logits, "min")[1] == pytest.approx(-math.log(2))
    assert description_scores(logits, "avg")[1] == pytest.approx(-1e30)


# --- The candidates ---


def slow_nucleus(logits: Tensor, top_p: float, temperature: float) -> set[int]:
    """Take the likeliest until they hold top_p."""
    p = (logits / temperature).softmax(dim=0).tolist()
    chosen: set[int] = set()
    held = 0.0
    for token in sorted(range(len(p)), key=lambda token: -p[token]):
        if chosen and held >= top_p:
            break
        chosen.add(token)
        held += p[token]
    return chosen


def slow_knee(logits: Tensor) -> set[int]:
    p = logits.softmax(dim=0).tolist()
    order = sorted(range(len(p)), key=lambda token: -p[token])
    gaps = [p[order[k]] - p[order[k + 1]] for k in range(len(p) - 1)]
    return set(order[: gaps.index(max(gaps)) + 1])


def slow_alpha(logits: Tensor, alpha: float) -> set[int]:
    p = logits.softmax(dim=0).tolist()
    return {token for token, share in enumerate(p) if share >= alpha * max(p)}


def chosen(logits: Tensor, **options: Any) -> set[int]:
    return set(candidates(logits, Vdgd(**options)).nonzero()[:, 0].tolist())


def test_candidates_equal_the_slow_rules() -> None:
    sizes = set()
    for seed in range(60):
        logits = random_logits(13, seed=seed) / 2
        for top_p, temperature in ((0.5, 0.5), (0.9, 1.0), (0.3, 2.0), (0.0, 1.0)):
            own = chosen(logits, top_p=top_p, temperature=temperature)
            assert own == slow_nucleus(logits, top_p, temperature)
            sizes.add(len(own))
        assert chosen(logits, candidates="knee") == slow_knee(logits)
        assert chosen(logits, candidates="alpha", alpha=0.2) == slow_alpha(logits, 0.2)
    assert len(sizes) > 4


def test_candidates_by_hand() -> None:
    logits = torch.tensor([0.1, 0.4, 0.36, 0.14]).log()
    assert chosen(logits, top_p=0.5, temperature=1.0) == {1, 2}
    assert chosen(logits, top_p=0.3, temperature=1.0) == {1}
    # At temperature 0.5 probabilities are squared: .16 .1296 .0196 .01 of .3192, so that the first holds half.
    assert chosen(logits) == {1}
    assert chosen(logits, candidates="knee") == {1, 2}
    assert chosen(logits, candidates="alpha", alpha=0.3) == {1, 2, 3}
    assert chosen(logits, top_p=0.0) == {1}
    assert chosen(logits, top_p=1.0) == chosen(logits, candidates="alpha", alpha=0.0) == {0, 1, 2, 3}


@pytest.mark.parametrize("rule", ["nucleus", "knee", "alpha"])
def test_what_an_earlier_method_ruled_out_is_no_candidate(rule: str) -> None:
    logits = torch.tensor([1.0, -math.inf, 0.9, -math.inf])
    assert chosen(logits, candidates=rule, top_p=1.0, alpha=0.0) == {0, 2}


# --- The new logits ---


def rescored(logits: Tensor, description: Tensor, ends: Sequence[int] = (), **options: Any) -> Tensor:
    method = Vdgd(**options)
    return Rescoring(method, description_scores(description, method.reduction), ends)(logits)


def test_among_the_plausible_the_described_token_is_preferred() -> None:
    # The model leans to token 0 by a little; the description found token 1, which is plausible, and 3, which is not.
    logits = torch.tensor([0.46, 0.44, 0.08, 0.02]).log()
    description = torch.tensor([[0.1, 0.6, 0.1, 0.2], [0.1, 0.05, 0.05, 0.8]]).log()
    new = rescored(logits, description, top_p=0.9)
    assert new.tolist() == pytest.approx([math.log(0.1), math.log(0.6), -math.inf, -math.inf])
    assert int(new.argmax()) == 1 != int(logits.argmax())
    # Where the description saw the other one, it stays with the model: a hallucinated description is copied too.
    assert int(rescored(logits, torch.tensor([[0.7, 0.1, 0.1, 0.1]]).log(), top_p=0.9).argmax()) == 0


def test_a_sure_step_is_left_alone() -> None:
    logits = torch.tensor([0.9, 0.05, 0.05]).log()
    new = rescored(logits, torch.tensor([[0.01, 0.98, 0.01]]).log())
    assert new.softmax(dim=0).tolist() == [1, 0, 0]


def test_with_all_tokens_and_one_step_the_distribution_is_that_of_the_description() -> None:
    description = random_logits(1, 9)
    new = rescored(random_logits(9, seed=1), description, top_p=1.0)
    torch.testing.assert_close(new.softmax(dim=0), description[0].softmax(dim=0))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_official_scale_makes_it_nearly_uniform(reduction: str) -> None:
    size = 32_000
    logits, description = random_logits(size), random_logits(3, size, seed=1)
    new = rescored(logits, description, reduction=reduction, official_scale=True)
    plausible = candidates(logits, Vdgd())
    assert 1 < int(plausible.sum()) < size
    shares = new.softmax(dim=0)
    torch.testing.assert_close(
        shares[plausible], torch.full_like(shares[plausible], 1 / int(plausible.sum())), rtol=2e-3, atol=0
    )
    token = int(plausible.nonzero()[0])
    one_hot = F.one_hot(torch.tensor(token), size).float()
    divergences = [
        F.kl_div(step, one_hot, reduction="sum") / size for step in description.log_softmax(dim=-1)
    ]  # what batchmean does to a vector
    total = float(sum(divergences))
    reduced = {"min": float(min(divergences)), "avg": total / 3, "sum": total}[reduction]
    assert float(new[token]) == pytest.approx(-reduced, rel=1e-4)


def test_a_step_whose_candidates_were_all_ruled_out_has_a_distribution() -> None:
    description = torch.tensor([[-math.inf, -math.inf, 0.0]])
    new = rescored(torch.tensor([1.0, 1.0, -9.0]), description, top_p=0.9)
    assert new.softmax(dim=0).tolist() == pytest.approx([0.5, 0.5, 0])


def test_a_protected_end_token_keeps_its_place() -> None:
    """Token 0 ends. Its place among the candidates by the model's logits is its place by the new ones."""
    for seed in range(40):
        logits, description = random_logits(8, seed=seed) / 3, random_logits(3, 8, seed=100 + seed)
        options: dict[str, Any] = dict(top_p=0.95, temperature=1.0, reduction="avg")
        plausible = candidates(logits, Vdgd(**options))
        free, kept = (
            rescored(logits, description, **options),
            rescored(logits, description, [0], protect_eos=True, **options),
        )
        torch.testing.assert_close(kept[1:], free[1:])
        if plausible[0]:
            assert int((kept[1:] > kept[0]).sum()) == int((logits[1:][plausible[1:]] > logits[0]).sum())
        else:
            assert kept[0] == -math.inf
    assert rescored(torch.zeros(3), torch.zeros(1, 3), [0], top_p=1.0).tolist() == pytest.approx([-math.log(3)] * 3)


def test_the_place_by_hand() -> None:
    scores = torch.tensor([-9.0, -1.0, -2.0, -4.0])
    everything = torch.ones(4, dtype=torch.bool)

    def placed(*logits: float) -> float:
        return float(keep_place(scores, torch.tensor(logits), everything, [0])[0])

    two = math.log(2)
    assert placed(4, 3, 2, 1) == pytest.approx(-1 + two)
    assert placed(2.5, 3, 2, 1) == pytest.approx(-1.5)
    assert placed(1.5, 3, 2, 1) == pytest.approx(-3)
    assert placed(0, 3, 2, 1) == pytest.approx(-4 - two)
    alone = torch.tensor([True, False, False, False])
    assert keep_place(scores, torch.zeros(4), alone, [0]).tolist() == scores.tolist()


# --- The conversation ---


def response(text: str, logits: Tensor | None = None) -> Response:
    return Response(text, (), False, logits, Reply(text, 0, None))


class Ends:
    """As much of a model as `end_tokens` asks for."""

    class generation_config:  # noqa: N801
        eos_token_id = 2


TALK = Talk(Ends(), None)


def test_the_two_requests() -> None:
    picture, logits = draw(sample_scene("test", 0)), random_logits(3, 7)
    method = Vdgd(seed=5, description_tokens=20, protect_eos=True)
    steps = method.steps(picture, "What is {description}?", 9, TALK)
    (first,) = next(steps)
    asked = DESCRIBE.replace("{question}", "What is {description}?")
    assert first == Request(picture, asked, 20, wants_logits=True)
    assert "described as: What is {description}?.\n" in asked
    (second,) = steps.send([response("a {question}", logits)])
    assert second.text == "The input image is described as follows: a {question} What is {description}?"
    assert (second.picture, second.max_new_tokens, second.temperature, second.seed) == (picture, 9, 1.0, 5)
    assert not second.wants_logits
    assert second.rescore is not None
    expected = Rescoring(method, description_scores(logits, "min"), (2,))
    torch.testing.assert_close(second.rescore(logits[0]), expected(logits[0]))
    final = response("red")
    with pytest.raises(StopIteration) as end:
        steps.send([final])
    assert end.value.value is final


def test_wordings_of_its_own_and_greedy_decoding() -> None:
    picture = draw(sample_scene("test", 0))
    steps = Vdgd(describe=SHORT, prefix="{question} ({description})", sample=False).steps(picture, "Q?", 9, TALK)
    assert next(steps)[0].text == SHORT
    (second,) = steps.send([response("D.", random_logits(1, 7))])
    assert (second.text, second.temperature) == ("Q? (D.)", 0.0)


@pytest.mark.parametrize("without_picture", [True, False])
def test_without_picture_or_description_the_model_is_asked_once(without_picture: bool) -> None:
    picture = None if without_picture else draw(sample_scene("test", 0))
    method = Vdgd() if without_picture else Vdgd().identity()
    steps = method.steps(picture, "Q?", 9, TALK)
    assert next(steps) == [Request(picture, "Q?", 9)]
    final = response("red")
    with pytest.raises(StopIteration) as end:
        steps.send([final])
    assert end.value.value is final


def test_defaults_and_identity() -> None:
    method = Vdgd()
    values = dataclasses.asdict(method)
    assert [values[name] for name in ("top_p", "temperature", "alpha", "candidates")] == [0.5, 0.5, 0.1, "nucleus"]
    assert (method.reduction, method.description_tokens, method.sample) == ("min", 1024, True)
    assert not method.official_scale
    assert not method.protect_eos
    assert not method.is_identity
    assert method.identity().is_identity
    short = f"vdgd:describe={SHORT},reduction=avg"
    assert parse_methods(short) == (Vdgd(reduction="avg", describe=SHORT),)
    assert parse_methods(describe(parse_methods(short))) == parse_methods(short)


# --- Whole answers of the built-in model ---


@pytest.fixture(scope="module")
def built_in() -> tuple[Any, Any]:
    return load("picturebook-nano")


ITEMS = [
    (draw(sample_scene("validation", number)), question)
    for number, question in ((0, "What place is this?"), (3, "What do you see?"), (5, "How many trees are there?"))
]


@torch.no_grad()
def slow_answer(model: Any, processor: Any, picture: Any, question: str, method: Vdgd, tokens: int) -> str:
    """Both calls with the stock model, which reads everything anew for every token; the re-scoring token by token."""

    def next_logits(inputs: dict[str, Any], new: list[int]) -> Tensor:
        ids = torch.cat([inputs["input_ids"], torch.tensor([new], dtype=torch.long)], dim=1)
        seen = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits: Tensor = model(**seen, use_cache=False).logits[0, -1]
        return logits

    ends = end_tokens(model)
    inputs = prepare(model, processor, [picture], [method.describe])
    steps: list[Tensor] = []
    described: list[int] = []
    while len(steps) < method.description_tokens:
        steps.append(next_logits(inputs, described))
        token = int(steps[-1].argmax())
        if token in ends:
            break
        described.append(token)
    text = processor.decode(described, skip_special_tokens=True).strip()
    prefix = method.prefix.replace("{description}", text).replace("{question}", question)
    inputs = prepare(model, processor, [picture], [prefix])
    answer: list[int] = []
    while len(answer) < tokens:
        logits = next_logits(inputs, answer)
        plausible = slow_nucleus(logits, method.top_p, method.temperature)
        token = min(plausible, key=lambda w: slow_divergence(torch.stack(steps), w, method.reduction))
        if token in ends:
            break
        answer.append(token)
    return str(processor.decode(answer, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("reduction", ["min", "avg"])
def test_an_answer_is_that_of_a_stock_model_read_anew(built_in: tuple[Any, Any], reduction: str) -> None:
    method = Vdgd(0.95, 1.5, reduction=reduction, sample=False, describe=SHORT, prefix="{description} {question}")
    expected = [slow_answer(*built_in, *item, method, 6) for item in ITEMS]
    replies = converse(method, *built_in, ITEMS, 6)
    assert [reply.text for reply in replies] == expected
    assert [reply.calls for reply in replies] == [2, 2, 2]
    # The re-scoring did something: with the likeliest token as the only candidate the answers differ.
    plain = converse(dataclasses.replace(method, top_p=0.0), *built_in, ITEMS, 6)
    assert [reply.text for reply in plain] != expected


def test_a_batch_answers_as_one_by_one(built_in: tuple[Any, Any]) -> None:
    method = Vdgd(0.9, 2.0, describe=SHORT, prefix="{description} {question}")
    together = converse(method, *built_in, ITEMS, 6)
    alone = [method.answer(*built_in, *item, max_new_tokens=6) for item in ITEMS]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    seeds = [converse(dataclasses.replace(method, seed=seed), *built_in, ITEMS, 6) for seed in range(1, 4)]
    assert any([r.text for r in other] != [r.text for r in together] for other in seeds)


@torch.no_grad()
def test_its_identity_setting_is_the_plain_greedy_call(built_in: tuple[Any, Any]) -> None:
    model, processor = built_in
    for picture, question in ITEMS:
        inputs = prepare(model, processor, [picture], [question])
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        reply = Vdgd().identity().answer(model, processor, picture, question, max_new_tokens=6)
        assert reply.text == processor.decode(output, skip_special_tokens=True).strip()
        assert reply.calls == 1


# --- Errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(top_p=1.5), r"top_p of vdgd must lie in \[0, 1\], not 1.5"),
        (dict(temperature=0), r"temperature of vdgd must lie in \(0, 100\], not 0"),
        (dict(alpha=-0.1), r"alpha of vdgd must lie in \[0, 1\]"),
        (dict(candidates="nucleos"), "unknown candidates of vdgd .*did you mean 'nucleus'"),
        (dict(reduction="mean"), "unknown reduction of vdgd"),
        (dict(description_tokens=-1), "description_tokens of vdgd must lie in"),
        (dict(description_tokens=1.5), "description_tokens of vdgd must be a whole number"),
        (dict(seed=-1), "seed of vdgd"),
        (dict(describe=" "), "describe of vdgd is empty"),
        (dict(prefix="{question}"), "prefix of vdgd must hold {description}"),
        (dict(prefix="{description}"), "prefix of vdgd must hold {question}"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Vdgd(**options)


def test_it_cannot_be_attached(built_in: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="vdgd asks the model several times"):
        attach(built_in[0], Vdgd())
