"""RITUAL: how the two views are combined, by hand and against two stock models read from scratch for every token."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import families as tiny
import pytest
import torch
from slow_decoder import slow_answer, slow_sum
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from sightline.errors import InputError
from sightline.grounding import ritual
from sightline.grounding.ritual import Ritual
from sightline.methods import attach


@dataclass(frozen=True)
class SameView(Ritual):
    """The other view is the picture itself."""

    def view(self, pictures: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        return list(pictures)


@dataclass(frozen=True)
class Fingerprint(Ritual):
    """Notes a random number that each view was drawn by, with the mean of its first picture's red."""

    drawn: list[tuple[float, float]] = field(default_factory=list, compare=False)

    def view(self, pictures: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        self.drawn.append((float(torch.rand((), generator=generator)), float(pictures[0][0].mean())))
        return list(pictures)


# --- The combination ---


def test_the_defaults() -> None:
    expected = {"seed": 0, "alpha": 3.0, "beta": 0.1, "normalise": False, "transform": "random"}
    assert dataclasses.asdict(Ritual()) == expected
    assert Ritual.paper == "ritual"


def test_four_tokens_by_hand() -> None:
    # Probabilities .6 .3 .07 .03, plausible from .06: the last token is out, whatever the other view says of it.
    logits = torch.tensor([[0.6, 0.3, 0.07, 0.03]]).log()
    view = torch.tensor([[0.0, 1.0, -2.0, 50.0]])
    one, two, three = math.log(0.6), math.log(0.3) + 3, math.log(0.07) - 6
    assert Ritual().combine(logits, logits, [view])[0].tolist() == pytest.approx([one, two, three, -math.inf])
    normal = Ritual(normalise=True).combine(logits, logits, [view])[0].tolist()
    assert normal == pytest.approx([one / 4, two / 4, three / 4, -math.inf])
    # alpha weighs the view; beta 0 lets everything through, beta 1 only the likeliest.
    everything = Ritual(alpha=0.5, beta=0.0).combine(logits, logits, [view])[0].tolist()
    assert everything == pytest.approx([one, math.log(0.3) + 0.5, math.log(0.07) - 1, math.log(0.03) + 25])
    assert Ritual(beta=1.0).combine(logits, logits, [view])[0].tolist() == pytest.approx([one, *[-math.inf] * 3])


@pytest.mark.parametrize("normalise", [True, False])
def test_the_combination_of_random_logits(normalise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for alpha, beta in ((3.0, 0.1), (1.0, 0.01), (7.5, 0.5)):
        logits, view = torch.randn(2, 6, 40, generator=generator) * 3
        combined = Ritual(alpha=alpha, beta=beta, normalise=normalise).combine(logits, logits, [view])
        for row in range(6):
            expected = slow_sum(logits[row].tolist(), view[row].tolist(), alpha, beta, normalise)
            torch.testing.assert_close(combined[row], torch.tensor(expected))
        assert torch.isinf(combined).any()


@torch.no_grad()
def test_with_the_same_view_the_distribution_is_that_of_the_plausible_tokens() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    stock = model(**batch).logits[:, -1].softmax(dim=-1)
    plausible = stock >= 0.1 * stock.amax(dim=-1, keepdim=True)
    restricted = stock * plausible / (stock * plausible).sum(dim=-1, keepdim=True)
    assert (plausible.sum(dim=-1) < stock.shape[-1]).all()
    with attach(model, SameView(normalise=True)):
        torch.testing.assert_close(model(**batch).logits[:, -1].softmax(dim=-1), restricted, atol=1e-6, rtol=1e-4)
    # Without it, the sum is plain sampling at a temperature of 1 / (1 + alpha).
    sharper = restricted**4 / (restricted**4).sum(dim=-1, keepdim=True)
    with attach(model, SameView()):
        torch.testing.assert_close(model(**batch).logits[:, -1].softmax(dim=-1), sharper, atol=1e-6, rtol=1e-3)


@torch.no_grad()
def test_without_weight_it_is_the_stock_model() -> None:
    assert Ritual(alpha=0.0).is_identity
    assert Ritual().identity().is_identity
    assert not Ritual(beta=0.0).is_identity
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    stock = model(**batch).logits
    with attach(model, Ritual(alpha=0.0)):
        assert torch.equal(model(**batch).logits, stock)


# --- Two branches in one forward ---


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "gemma3"])
@pytest.mark.parametrize(("transform", "axis"), [("horizontal_flip", -1), ("vertical_flip", -2)])
def test_an_answer_is_that_of_two_models_that_read_everything_anew(family: str, transform: str, axis: int) -> None:
    """A flip of the picture is the same flip of its normalised pixels, tile by tile."""
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model, images_per_row=[1, 2, 1])
    method = Ritual(alpha=1.5, beta=0.05, transform=transform)
    expected, scores = slow_answer(
        model, batch, batch["pixel_values"].flip(axis), partial(slow_sum, alpha=method.alpha, beta=method.beta), 4
    )
    with attach(model, method):
        output = model.generate(
            **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert output.sequences[:, -4:].tolist() == expected.tolist()
    torch.testing.assert_close(torch.stack(output.logits), torch.tensor(scores), atol=2e-4, rtol=0)
    stock = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, -4:]
    assert stock.tolist() != expected.tolist()


class BothViewsAnew(LogitsProcessor):  # type: ignore[no-untyped-call]
    """Replaces the scores of every beam by those of both views, each read anew by the stock model."""

    def __init__(self, model: Any, pixels: Tensor, other: Tensor, method: Ritual) -> None:
        self.model, self.pixels, self.other, self.method = model, pixels, other, method

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        beams = len(input_ids) // len(self.pixels)
        mask = (input_ids != tiny.PAD).long()
        logits, view = (
            self.model(input_ids=input_ids, attention_mask=mask, pixel_values=pixels, use_cache=False).logits[:, -1]
            for pixels in (self.pixels.repeat_interleave(beams, 0), self.other.repeat_interleave(beams, 0))
        )
        both = zip(logits.tolist(), view.tolist(), strict=True)
        combined = [slow_sum(one, two, self.method.alpha, self.method.beta) for one, two in both]
        return torch.tensor(combined).log_softmax(dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_are_those_of_two_models_that_read_everything_anew(use_cache: bool) -> None:
    model = tiny.tiny_model("llava", seed=2)
    batch = tiny.inputs("llava", model)
    pixels = batch["pixel_values"]
    method = Ritual(alpha=1.0, beta=0.01, transform="horizontal_flip")
    options = dict(max_new_tokens=5, num_beams=3, do_sample=False, num_return_sequences=2)
    processor = BothViewsAnew(model, pixels, pixels.flip(-1), method)
    expected = model.generate(**batch, **options, logits_processor=LogitsProcessorList([processor]))
    with attach(model, method):
        assert model.generate(**batch, **options, use_cache=use_cache).tolist() == expected.tolist()
        assert model.generate(**batch, **options | dict(num_beams=2)).tolist() != expected.tolist()


# --- Which view is drawn ---


def drawn(model: Any, batch: dict[str, Any], seed: int = 0) -> list[float]:
    method = Fingerprint(seed=seed)
    with attach(model, method), torch.no_grad():
        model.generate(**batch, max_new_tokens=2, do_sample=False)
    return [number for number, _ in method.drawn]


def test_a_view_depends_on_seed_prompt_and_picture_alone() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    numbers = drawn(model, batch)
    assert len(set(numbers)) == 3
    torch.manual_seed(123)
    assert drawn(model, batch) == numbers  # not on torch's global generator
    order = [2, 0, 1]
    assert drawn(model, {name: value[order] for name, value in batch.items()}) == [numbers[row] for row in order]
    for row in range(3):  # nor on the batch, nor on padding
        assert drawn(model, tiny.single("llava", model, row)) == [numbers[row]]
    before = torch.get_rng_state()
    with attach(model, Ritual()), torch.no_grad():
        model(**batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert not set(drawn(model, batch, seed=1)) & set(numbers)
    brighter = {**batch, "pixel_values": batch["pixel_values"] + 0.1}
    assert not set(drawn(model, brighter)) & set(numbers)


def test_two_questions_on_one_picture_may_see_different_views() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, questions=[[5, 6], [5, 7], [5, 6]])
    batch["pixel_values"][:] = batch["pixel_values"][0].clone()
    batch["input_ids"][:, :-2] = batch["input_ids"][0, :-2].clone()
    first, second, third = drawn(model, batch)
    assert first == third
    assert first != second


def test_all_pictures_of_a_prompt_are_transformed_alike() -> None:
    pictures = [torch.rand(3, size, size, generator=torch.Generator().manual_seed(size)) for size in (8, 9)]
    views = Ritual(transform="horizontal_flip").view(pictures, torch.Generator())
    assert all(torch.equal(view, picture.flip(-1)) for view, picture in zip(views, pictures, strict=True))
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    for seed in range(20):
        one, two = Ritual().view([picture, picture], torch.Generator().manual_seed(seed))
        assert torch.equal(one, two)


def test_all_six_transformations_are_drawn_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()

    def counted(name: str) -> Callable[[torch.Generator], ritual.Transformation]:
        def draw(generator: torch.Generator) -> ritual.Transformation:
            counts[name] += 1
            return lambda picture: picture

        return draw

    for name in list(ritual.TRANSFORMATIONS):
        monkeypatch.setitem(ritual.TRANSFORMATIONS, name, counted(name))
    for seed in range(1200):
        Ritual().view([torch.zeros(3, 8, 8)], torch.Generator().manual_seed(seed))
    assert len(counts) == 6
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 20.5  # chi-square, five degrees, p = 0.001
    counts.clear()
    for name in ritual.TRANSFORMATIONS:
        Ritual(transform=name).view([torch.zeros(3, 8, 8)], torch.Generator().manual_seed(0))
    assert counts == Counter(ritual.TRANSFORMATIONS.keys())


# --- Errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha=-1.0), r"alpha of ritual must lie in \[0, 100\], not -1.0"),
        (dict(alpha=float("nan")), "alpha of ritual"),
        (dict(beta=1.5), r"beta of ritual must lie in \[0, 1\], not 1.5"),
        (dict(transform="horizontal_flap"), r"unknown transform of ritual .*did you mean 'horizontal_flip'"),
        (dict(seed=-1), "seed of ritual must be a whole number from 0 to 4294967295, not -1"),
        (dict(seed=2**32), "seed of ritual must be a whole number from 0 to 4294967295"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Ritual(**options)


def test_the_largest_seed_works() -> None:
    model = tiny.tiny_model("llava")
    assert drawn(model, tiny.single("llava", model, 0), seed=2**32 - 1) != drawn(model, tiny.single("llava", model, 0))
