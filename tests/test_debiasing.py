"""VDD and post-hoc debias: the formulas by hand, and every content-free prompt read by the stock model from scratch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import families as tiny
import pytest
import torch
from families import IMAGE
from specimens import EveryOther, row_counts
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import sightline as sl
from sightline.errors import InputError
from sightline.grounding.debiasing import PRIORS, Debiasing, project_onto_simplex, spellings
from sightline.grounding.vcd import Vcd
from sightline.methods import attach, describe, parse_methods

YES, NO, UNK = 20, 21, 3
TINY_EPS = 1e-12
posthoc = functools.partial(Debiasing, mode="posthoc", label_tokens=(YES, NO))


def processor_of(vocabulary: dict[str, int], unk: str | None = "<unk>") -> Any:
    """What `attach` takes for a processor, with a tokenizer of whole words."""
    backend = Tokenizer(WordLevel({"<unk>": UNK, **vocabulary}, unk_token="<unk>"))
    return SimpleNamespace(
        image_processor=None, tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unk)
    )


PROCESSOR = processor_of({})


def slow_sampling(own: list[float], priors: list[list[float]], alpha: float, beta: float) -> list[float]:
    """One row: plausible is told by probabilities, the prior is the mean of the logits."""
    total = sum(math.exp(x) for x in own)
    best = max(math.exp(x) / total for x in own)
    free = [sum(values) / len(values) for values in zip(*priors, strict=True)]
    return [
        (1 + alpha) * x - alpha * y if math.exp(x) / total >= beta * best else -math.inf
        for x, y in zip(own, free, strict=True)
    ]


def slow_posthoc(
    own: list[float], priors: list[list[float]], tokens: Sequence[Sequence[int]], alpha: float = 1.0, eps: float = 1e-4
) -> list[float]:
    """The probabilities of one row over the whole vocabulary after the diagonal calibration."""

    def softmax(logits: list[float]) -> list[float]:
        total = sum(math.exp(x) for x in logits)
        return [math.exp(x) / total for x in logits]

    def of_labels(probabilities: list[float]) -> list[float]:
        return [sum(probabilities[index] for index in ids) for ids in tokens]

    probabilities = softmax(own)
    if max(range(len(own)), key=own.__getitem__) not in {index for ids in tokens for index in ids}:
        return probabilities
    classes = of_labels(probabilities)
    free = [sum(values) for values in zip(*(of_labels(softmax(prior)) for prior in priors), strict=True)]
    free = [value / sum(free) + eps for value in free]
    scores = [p / c**alpha for p, c in zip(classes, free, strict=True)]
    wanted = [sum(classes) * score / sum(scores) for score in scores]
    for label, ids in enumerate(tokens):
        for index in ids:
            probabilities[index] *= wanted[label] / classes[label]
    return probabilities


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def log_odds(logits: Tensor) -> Tensor:
    return logits[:, YES] - logits[:, NO]


@contextmanager
def biased(model: Any, bias: Tensor) -> Iterator[None]:
    """A constant added to the logits, whatever the model has read."""
    handle = model.get_output_embeddings().register_forward_hook(lambda module, args, output: output + bias)
    try:
        yield
    finally:
        handle.remove()


def closed(yes: float = 0.0) -> Tensor:
    """A bias that makes every question one of yes and no, and adds `yes` to the one."""
    bias = torch.zeros(tiny.VOCABULARY)
    bias[YES], bias[NO] = 30 + yes, 30
    return bias


def test_the_defaults() -> None:
    assert dataclasses.asdict(Debiasing()) == {
        "mode": "sampling",
        "alpha": 1.0,
        "beta": 0.1,
        "priors": ("none",),
        "calibration": "diagonal",
        "labels": ("yes", "no"),
        "label_tokens": None,
        "eps": 1e-4,
        "seed": 0,
    }
    text = "debiasing:mode=posthoc,priors=none;noise,label_tokens=5;7"
    assert parse_methods(text) == (Debiasing(mode="posthoc", priors=("none", "noise"), label_tokens=(5, 7)),)
    assert describe(parse_methods(text)) == text
    assert parse_methods("debiasing:priors=none") == (Debiasing(),)


# --- Sampling ---


def test_four_tokens_by_hand() -> None:
    # Probabilities .6 .3 .07 .03, plausible from .06.
    own = torch.tensor([[0.6, 0.3, 0.07, 0.03]]).log()
    priors = [torch.tensor([[0.0, 1.0, -2.0, 50.0]]), torch.tensor([[1.0, 1.0, -4.0, 0.0]])]
    expected = [2 * math.log(0.6) - 0.5, 2 * math.log(0.3) - 1, 2 * math.log(0.07) + 3, -math.inf]
    assert Debiasing().combine(own, own, priors)[0].tolist() == pytest.approx(expected)
    assert Debiasing().combine(own + 7, own, priors)[0].tolist() == pytest.approx([x + 7 for x in expected])


def test_random_logits() -> None:
    own, *priors = random_logits(4, 6, 40)
    for alpha, beta in ((1.0, 0.2), (0.5, 0.01)):
        combined = Debiasing(alpha=alpha, beta=beta).combine(own, own, priors)
        for row in range(6):
            expected = slow_sampling(own[row].tolist(), [prior[row].tolist() for prior in priors], alpha, beta)
            torch.testing.assert_close(combined[row], torch.tensor(expected))


def test_a_prior_that_says_nothing_sharpens_the_plausible_tokens() -> None:
    own = random_logits(3, 40)
    combined = Debiasing(alpha=1.5).combine(own, own, [torch.full_like(own, 0.7)]).softmax(dim=-1)
    plausible = own.softmax(-1) >= 0.1 * own.softmax(-1).amax(-1, keepdim=True)
    expected = own.softmax(dim=-1) ** 2.5 * plausible
    torch.testing.assert_close(combined, expected / expected.sum(dim=-1, keepdim=True))


# --- Post-hoc: what it computes ---


def test_yes_and_no_by_hand() -> None:
    """p = (.45 + .15, .2) / .8 = (.75, .25), p_cf = (.72, .08) / .8 = (.9, .1): q = (.75 / .9, .25 / .1) ~ (1, 3)."""
    own = torch.tensor([[0.45, 0.15, 0.2, 0.2]]).log()
    prior = torch.tensor([[0.02, 0.7, 0.08, 0.2]]).log()
    tokens = [(0, 1), (2,)]
    new = (own + posthoc(eps=TINY_EPS).label_shift(own, [prior], tokens)).exp()
    # The labels keep their .8 together, and the spellings of yes their ratio of 3.
    torch.testing.assert_close(new, torch.tensor([[0.15, 0.05, 0.6, 0.2]]))
    # Identity: p - p_cf = (-.15, .15), and the nearest distribution has the same difference: (.35, .65).
    new = (own + posthoc(calibration="identity").label_shift(own, [prior], tokens)).exp()
    torch.testing.assert_close(new, torch.tensor([[0.8 * 0.35 * 0.75, 0.8 * 0.35 * 0.25, 0.8 * 0.65, 0.2]]))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_random_logits_and_three_labels_with_spellings(alpha: float) -> None:
    tokens = [(3, 4), (7,), (1, 8, 9)]
    own, *priors = random_logits(3, 40, 12)
    method = posthoc(alpha=alpha)
    shift = method.label_shift(own, priors, tokens)
    begins = 0
    for row in range(40):
        slow = slow_posthoc(own[row].tolist(), [prior[row].tolist() for prior in priors], tokens, alpha)
        torch.testing.assert_close((own + shift)[row].softmax(dim=-1), torch.tensor(slow))
        begins += bool(shift[row].any())
    assert 10 < begins < 30  # where the likeliest token is no label, nothing happens
    others = [index for index in range(12) if index not in {3, 4, 7, 1, 8, 9}]
    assert not shift[:, others].any()


def test_a_picture_that_says_nothing_gives_uniform_answers() -> None:
    """p = p_cf -> uniform, whatever the prior: the regularity that the paper is after."""
    own = random_logits(20, 12)
    own[:, 3] += 8
    labels = own[:, [3, 7, 1]].log_softmax(dim=-1)
    new = (own + posthoc(eps=TINY_EPS).label_shift(own, [own], [(3,), (7,), (1,)]))[:, [3, 7, 1]]
    torch.testing.assert_close(new.softmax(dim=-1), torch.full((20, 3), 1 / 3))
    torch.testing.assert_close(
        posthoc(calibration="identity").calibrate(labels, labels).exp(), torch.full((20, 3), 1 / 3)
    )


@pytest.mark.parametrize("calibration", ["diagonal", "identity"])
def test_a_uniform_prior_changes_no_answer(calibration: Any) -> None:
    log_p = random_logits(50, 5).log_softmax(dim=-1)
    log_q = posthoc(calibration=calibration).calibrate(log_p, torch.full((50, 5), -math.log(5)))
    torch.testing.assert_close(log_q.exp(), log_p.exp())


def test_with_two_labels_it_moves_the_threshold_of_the_log_odds() -> None:
    log_p, log_prior = random_logits(2, 50, 2).log_softmax(dim=-1)
    prior = log_prior.exp() + 1e-4
    moved = posthoc().calibrate(log_p, log_prior)
    expected = log_p[:, 0] - log_p[:, 1] - (prior[:, 0] / prior[:, 1]).log()
    torch.testing.assert_close(moved[:, 0] - moved[:, 1], expected)
    # Both forms choose alike (here no p lies within eps of p_cf): the first label where p > p_cf.
    subtracted = posthoc(calibration="identity").calibrate(log_p, log_prior)
    assert (log_p.exp() - log_prior.exp()).abs().min() > 1e-3
    assert torch.equal(moved.argmax(dim=-1), subtracted.argmax(dim=-1))
    assert torch.equal(moved.argmax(dim=-1) == 0, log_p[:, 0] > log_prior[:, 0])


def test_with_three_labels_the_two_forms_can_differ() -> None:
    log_p = torch.tensor([[0.60, 0.35, 0.05]]).log()
    log_prior = torch.tensor([[0.40, 0.59, 0.01]]).log()
    assert int(posthoc().calibrate(log_p, log_prior).argmax()) == 2  # the ratios are 1.5, .6 and 5
    assert (
        int(posthoc(calibration="identity").calibrate(log_p, log_prior).argmax()) == 0
    )  # the differences .2, -.24, .04


def test_the_identity_form_gives_the_nearest_distribution() -> None:
    """Against a search over which labels are left with something: the projection is one of these."""
    for values in random_logits(30, 4, seed=3).tolist():
        candidates = []
        for size in range(1, 5):
            for support in itertools.combinations(range(4), size):
                taken = (sum(values[i] for i in support) - 1) / size
                point = [values[i] - taken if i in support else 0.0 for i in range(4)]
                if min(point) >= 0:
                    candidates.append((sum((x - y) ** 2 for x, y in zip(point, values, strict=True)), point))
        torch.testing.assert_close(project_onto_simplex(torch.tensor(values)), torch.tensor(min(candidates)[1]))
    p = random_logits(10, 5).softmax(dim=-1)
    torch.testing.assert_close(project_onto_simplex(p), p)


def test_on_the_log_odds_sampling_and_posthoc_differ_by_the_log_odds_of_the_model() -> None:
    """2 lo - lo_cf and lo - lo_cf: post-hoc is not VDD, unless that is rescaled."""
    own, prior = random_logits(2, 20, 30)
    own[:, YES] = own.amax(dim=-1) + 0.5
    lo, free = log_odds(own), log_odds(prior)
    torch.testing.assert_close(log_odds(Debiasing(beta=0.0).combine(own, own, [prior])), 2 * lo - free)
    shifted = own + posthoc(eps=TINY_EPS).label_shift(own, [prior], [(YES,), (NO,)])
    torch.testing.assert_close(log_odds(shifted), lo - free)


@pytest.mark.parametrize("calibration", ["diagonal", "identity"])
def test_a_small_alpha_changes_little_and_zero_nothing(calibration: Any) -> None:
    log_p, log_prior = random_logits(2, 20, 3).log_softmax(dim=-1)
    for alpha in (1e-3, 1e-4):
        moved = posthoc(alpha=alpha, calibration=calibration).calibrate(log_p, log_prior).exp()
        assert 0 < (moved - log_p.exp()).abs().max() < 3 * alpha
    assert Debiasing(alpha=0.0).is_identity
    assert posthoc().identity().is_identity
    assert not Debiasing(beta=0.0).is_identity


# --- The content-free prompts, each read by the stock model ---


def with_ids(
    model: Any, family: str, row: int, images: Any, change: Callable[[list[int], list[int]], list[int]]
) -> Tensor:
    """Next-token logits of the stock model for a row's prompt without pictures, with its ids changed."""
    one = tiny.rows_of(family, model, images_per_row=images)[row]
    ids = torch.tensor([change(one.ids, one.lengths)])
    return model(input_ids=ids).logits[0, -1]


def deleted(ids: list[int], lengths: list[int]) -> list[int]:
    return [token for token in ids if token != IMAGE]


def once(ids: list[int], lengths: list[int]) -> list[int]:
    """One unknown token in the place of each image's first visual token."""
    firsts = set(itertools.accumulate([0, *lengths[:-1]]))
    seen = itertools.count()
    return [UNK if token == IMAGE else token for token in ids if token != IMAGE or next(seen) in firsts]


def filled(ids: list[int], lengths: list[int]) -> list[int]:
    return [UNK if token == IMAGE else token for token in ids]


def check_sampling(family: str, prior: str, expected: Callable[[Any, dict[str, Any], int], Tensor]) -> None:
    """Compares the first logits with those of two stock forwards, one of them in `expected(model, batch, row)`."""
    model = tiny.tiny_model(family)
    images = [2, 1, 3]
    batch = tiny.inputs(family, model, images_per_row=images)
    own = model(**batch).logits[:, -1]
    with attach(model, Debiasing(priors=(prior,), beta=0.0), processor=PROCESSOR):
        got = model(**batch).logits[:, -1]
    for row in range(3):
        torch.testing.assert_close(got[row], 2 * own[row] - expected(model, batch, row), atol=3e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "prior", "change"),
    [
        ("llava", "none", deleted),
        ("qwen3_vl", "none", deleted),
        ("llava", "unk", once),
        ("llava_next", "unk", once),
        ("idefics3", "unk", once),
        ("qwen3_vl", "unk", once),
        ("gemma3", "unk", once),
        ("llava", "unk_full", filled),
        ("internvl", "unk_full", filled),
    ],
)
def test_priors_of_words_are_prompts_of_words(family: str, prior: str, change: Any) -> None:
    def expected(model: Any, batch: dict[str, Any], row: int) -> Tensor:
        return with_ids(model, family, row, [2, 1, 3], change)

    check_sampling(family, prior, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "internvl"])
@pytest.mark.parametrize(("prior", "value"), [("zero", 0.0), ("one", 1.0)])
def test_priors_of_one_value_are_pictures_of_that_pixel(family: str, prior: str, value: float) -> None:
    def expected(model: Any, batch: dict[str, Any], row: int) -> Tensor:
        flat = {**batch, "pixel_values": torch.full_like(batch["pixel_values"], value)}
        return model(**flat).logits[row, -1]

    check_sampling(family, prior, expected)


@torch.no_grad()
def test_the_mean_feature_takes_every_visual_tokens_place() -> None:
    def expected(model: Any, batch: dict[str, Any], row: int) -> Tensor:
        images = model.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds[batch["input_ids"] == IMAGE] = torch.cat([image.mean(dim=0).expand_as(image) for image in images])
        return model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits[row, -1]

    check_sampling("llava", "mean_feature", expected)


@torch.no_grad()
def test_the_mean_feature_is_that_of_every_image_in_the_later_layers_too() -> None:
    """Averaging what is the same everywhere changes nothing: for a picture of one colour there is no contrast."""
    model = tiny.tiny_model("qwen3_vl")
    model.model.visual.pos_embed.weight.zero_()
    batch = tiny.single("qwen3_vl", model, 0)
    batch["pixel_values"] = torch.zeros_like(batch["pixel_values"])
    own = model(**batch).logits[:, -1]
    with attach(model, Debiasing(priors=("mean_feature",), beta=0.0)):
        torch.testing.assert_close(model(**batch).logits[:, -1], own, atol=3e-4, rtol=0)
    batch["pixel_values"][:8] = 1.0
    own = model(**batch).logits[:, -1]
    with attach(model, Debiasing(priors=("mean_feature",), beta=0.0)):
        assert (model(**batch).logits[:, -1] - own).abs().max() > 1e-2


@torch.no_grad()
def test_the_noise_is_that_of_visual_contrastive_decoding_at_the_last_step() -> None:
    model = tiny.tiny_model("llava_next")
    batch = tiny.inputs("llava_next", model, images_per_row=[1, 2, 0])
    answers = []
    for method in (Debiasing(priors=("noise",), seed=4), Vcd(noise_step=999, seed=4), Vcd(noise_step=999, seed=5)):
        with attach(model, method):
            answers.append(model(**batch).logits[:, -1].clamp(min=-99))
    torch.testing.assert_close(answers[0], answers[1])
    assert (answers[0] - answers[2]).abs().max() > 1e-2


@torch.no_grad()
def test_several_priors_are_averaged() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    own = model(**batch).logits[:, -1]

    def contrast(*priors: str) -> Tensor:
        with attach(model, Debiasing(priors=priors, beta=0.0), processor=PROCESSOR):
            return own - (model(**batch).logits[:, -1] - own)

    mean = torch.stack([contrast(prior) for prior in PRIORS]).mean(dim=0)
    torch.testing.assert_close(contrast(*PRIORS), mean, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl", "paligemma"])
def test_every_prior_in_every_way_of_generating(prior: str, family: str) -> None:
    model = tiny.tiny_model(family)
    images = [2, 0, 1]
    batch = tiny.inputs(family, model, images_per_row=images)
    options: dict[str, Any] = dict(max_new_tokens=3, do_sample=False)
    for others in ([], [EveryOther()]):
        with attach(model, *others, Debiasing(priors=(prior,)), processor=PROCESSOR):
            together = model.generate(**batch, **options)
            assert torch.equal(model.generate(**batch, **options, use_cache=False), together)
            beams = model.generate(**batch, **options, num_beams=2)
            assert torch.equal(model.generate(**batch, **options, num_beams=2, use_cache=False), beams)
            for row in (0, 2):
                alone = model.generate(**tiny.single(family, model, row, images_per_row=images), **options)
                assert torch.equal(alone[0, -3:], together[row, -3:])


@torch.no_grad()
def test_the_unknown_token_stands_where_something_is_left_of_the_image() -> None:
    """`EveryOther` drops the first visual token of each image; the one that it leaves first makes room."""
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, images_per_row=[2, 1, 3])
    with attach(model, EveryOther()):
        own = model(**batch).logits[:, -1]
    with attach(model, EveryOther(), Debiasing(priors=("unk",), beta=0.0), processor=PROCESSOR):
        got = model(**batch).logits[:, -1]
    for row in range(3):
        expected = 2 * own[row] - with_ids(model, "llava", row, [2, 1, 3], once)
        torch.testing.assert_close(got[row], expected, atol=3e-4, rtol=0)


@torch.no_grad()
def test_an_answer_is_that_of_two_models_that_read_everything_anew() -> None:
    model = tiny.tiny_model("llava")
    batch, method = tiny.single("llava", model, 0), Debiasing(alpha=1.5, beta=0.05)
    ids, steps = batch["input_ids"], []
    for _ in range(5):
        seen = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        own = model(**seen).logits[0, -1].tolist()
        free = model(input_ids=ids[ids != IMAGE][None]).logits[0, -1].tolist()
        steps.append(slow_sampling(own, [free], 1.5, 0.05))
        ids = torch.cat([ids, torch.tensor([[max(range(len(own)), key=steps[-1].__getitem__)]])], dim=1)
    with attach(model, method):
        output = model.generate(
            **batch, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert torch.equal(output.sequences, ids)
    torch.testing.assert_close(torch.cat(output.logits), torch.tensor(steps), atol=3e-4, rtol=0)


# --- Post-hoc on a model ---


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_posthoc_acts_on_the_first_token_alone_and_costs_rows_there_alone(use_cache: bool) -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    options: dict[str, Any] = dict(
        max_new_tokens=3, do_sample=False, use_cache=use_cache, output_logits=True, return_dict_in_generate=True
    )
    with biased(model, closed(1.0)):
        own = model(**batch).logits[:, -1]
        free = torch.stack([with_ids(model, "llava", row, 1, deleted) for row in range(3)])
        with attach(model, posthoc()), row_counts(model) as counts:
            output = model.generate(**batch, **options)
        assert counts == [6, 3, 3]
        for row in range(3):
            slow = slow_posthoc(own[row].tolist(), [free[row].tolist()], [(YES,), (NO,)])
            torch.testing.assert_close(output.logits[0][row].softmax(-1), torch.tensor(slow), atol=1e-5, rtol=1e-3)
        # From then on it is the stock model, after whatever token came first.
        first = output.sequences[:, : batch["input_ids"].shape[1] + 1]
        seen = {**batch, "input_ids": first, "attention_mask": (first != tiny.PAD).long()}
        torch.testing.assert_close(output.logits[1], model(**seen).logits[:, -1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_posthoc_under_beams_and_with_rows_that_have_no_picture() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, images_per_row=[2, 0, 1])
    with biased(model, closed()):
        stock = model(**batch).logits[:, -1]
        with attach(model, posthoc(priors=("none", "zero"))):
            for options in (dict(num_beams=3), dict(num_beams=3, num_return_sequences=2), {}):
                cached, anew = (
                    model.generate(**batch, **options, max_new_tokens=4, do_sample=False, use_cache=use_cache)
                    for use_cache in (True, False)
                )
                assert torch.equal(cached, anew)
            plain = model(**batch).logits[:, -1]
            for row in (0, 2):
                alone = model(**tiny.single("llava", model, row, images_per_row=[2, 0, 1])).logits[0, -1]
                torch.testing.assert_close(alone, plain[row], atol=1e-4, rtol=0)
    assert torch.equal(plain[1], stock[1])
    assert (plain - stock)[[0, 2]].abs().amax(dim=-1).min() > 1e-2


@torch.no_grad()
def test_an_answer_that_begins_with_no_label_is_the_stock_models() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    stock = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert not {YES, NO} & set(stock[:, batch["input_ids"].shape[1]].tolist())
    logits = model(**batch).logits
    with attach(model, posthoc()):
        assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), stock)
        assert torch.equal(model(**batch).logits, logits)


@torch.no_grad()
def test_a_planted_habit_of_saying_yes_is_taken_out() -> None:
    """A bias towards yes, with the picture or without it, decides every answer of the stock model and none of the
    calibrated one; VDD at alpha = 1 leaves what it was once."""
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, questions=tiny.questions_for(12))
    margins: dict[str, list[Tensor]] = {"stock": [], "posthoc": [], "sampling": []}
    methods = {"stock": [], "posthoc": [posthoc(eps=TINY_EPS)], "sampling": [Debiasing(beta=0.0)]}
    for yes in (0.0, 7.0):
        with biased(model, closed(yes)):
            for name, chosen in methods.items():
                with attach(model, *chosen):
                    margins[name].append(log_odds(model(**batch).logits[:, -1]))
    assert (margins["stock"][1] > 0).all()
    calibrated = margins["posthoc"][0] > 0
    assert calibrated.any()
    assert not calibrated.all()
    torch.testing.assert_close(margins["posthoc"][1], margins["posthoc"][0], atol=1e-3, rtol=0)
    torch.testing.assert_close(margins["sampling"][1], margins["sampling"][0] + 7, atol=1e-3, rtol=0)


# --- Labels and bad input ---


def test_every_token_that_reads_as_a_label_is_a_spelling_of_it() -> None:
    words = {"yes": 20, "Yes": 21, " yes": 22, "YES": 23, "yesterday": 24, "eyes": 25, "no": 30, " No": 31, "not": 32}
    tokenizer = processor_of(words).tokenizer
    assert spellings(tokenizer, ("yes", "no")) == ((20, 21, 22, 23), (30, 31))
    assert spellings(tokenizer, ("NO", "Eyes")) == ((30, 31), (25,))


def test_labels_of_the_model_that_ships() -> None:
    model, processor = sl.load("picturebook-nano")
    ids = spellings(processor.tokenizer, ("yes", "no"))
    assert [[processor.tokenizer.decode([index]) for index in label] for label in ids] == [[" yes"], [" no"]]
    with attach(model, Debiasing(mode="posthoc"), processor=processor):
        pass
    with pytest.raises(
        InputError, match="labels of debiasing must be single tokens of the model, which 'elephants' is"
    ):
        attach(model, Debiasing(mode="posthoc", labels=("yes", "elephants")), processor=processor)
    with pytest.raises(InputError, match="give attach the model's processor, or choose other priors"):
        attach(model, Debiasing(priors=("unk",)), processor=processor)


@torch.no_grad()
def test_labels_are_looked_up_in_the_processor() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    answers = []
    with biased(model, closed()):
        for method in (posthoc(), Debiasing(mode="posthoc")):
            with attach(model, method, processor=processor_of({"Yes": YES, " no": NO})):
                answers.append(model(**batch).logits)
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Debiasing(mode="posthoc"), "looks its labels up in the tokenizer: give attach the model's processor, or the"),
        (posthoc(label_tokens=(5, 99)), "label_tokens of debiasing must be ids below 99, not 99"),
        (Debiasing(priors=("none", "unk")), "the priors unk and unk_full of debiasing need a tokenizer"),
        (Debiasing(priors=("unk_full",)), "the priors unk and unk_full of debiasing need a tokenizer"),
    ],
)
def test_what_the_model_lacks_is_said_when_it_is_attached(method: Debiasing, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attach(tiny.tiny_model("llava"), method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha=-1.0), r"alpha of debiasing must lie in \[0, 100\], not -1.0"),
        (dict(beta=1.5), r"beta of debiasing must lie in \[0, 1\], not 1.5"),
        (dict(eps=0.0), r"eps of debiasing must lie in \(0, 1\], not 0.0"),
        (dict(seed=-1), "seed of debiasing must be a whole number from 0 to 4294967295, not -1"),
        (dict(mode="post-hoc"), "unknown mode of debiasing 'post-hoc' .did you mean 'posthoc'"),
        (dict(calibration="diag"), "unknown calibration of debiasing 'diag'"),
        (dict(priors=()), "priors of debiasing must be a tuple of one or more different names"),
        (dict(priors="none"), "priors of debiasing must be a tuple"),
        (dict(priors=("none", "none")), "priors of debiasing must be a tuple of one or more different names"),
        (dict(priors=("nose",)), "unknown prior of debiasing 'nose' .did you mean 'noise'"),
        (dict(labels=("yes",)), "labels of debiasing must be a tuple of two or more different words"),
        (dict(labels=("yes", "YES")), "labels of debiasing must be"),
        (dict(labels=("yes", " ")), "labels of debiasing must be"),
        (dict(labels=("yes", 3)), "labels of debiasing must be"),
        (dict(label_tokens=(3,)), "label_tokens of debiasing must be a tuple of two or more different token ids"),
        (dict(label_tokens=(3, 3)), "label_tokens of debiasing must be"),
        (dict(label_tokens=(3, -1)), "label_tokens of debiasing must be"),
        (dict(label_tokens=("yes", "no")), "label_tokens of debiasing must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Debiasing(**options)
