"""Detaching gives the stock model back exactly, in whatever order and however the context ends."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import families as tiny
import pytest
import torch
from families import FAMILIES
from specimens import (
    NAMES,
    WORKING,
    EveryOther,
    Mirror,
    Nothing,
    anatomy_of,
    composing,
    forward_logits,
    generate,
    logits,
    model_of,
    specimen,
    tokens,
    traces,
)
from torch import Tensor, nn

import sightline as sl
from sightline.errors import InputError
from sightline.models.boundary import Boundary

works = pytest.mark.parametrize(("name", "family"), WORKING)


def answers(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(5)
    return [
        torch.stack(generate(model, batch, new=2).logits),
        generate(model, batch, new=2, do_sample=True, temperature=2.0).sequences,
        model(**batch).logits.detach(),
    ]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


@works
def test_after_the_context_nothing_is_left(name: str, family: str) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    stock = answers(model, batch)
    before = traces(model)
    with sl.attach(model, specimen(name)):
        assert traces(model) != before
        assert not equal(answers(model, batch), stock)
        tokens(model, batch, num_beams=2)
    assert traces(model) == before
    assert equal(answers(model, batch), stock)


class TroubleError(RuntimeError):
    """What the tests make go wrong."""


def failing_at(layer: nn.Module, call: int) -> Callable[[], None]:
    """Makes a decoder layer fail the `call`-th time (from 0) it is run; the result takes this away again."""
    runs = iter(range(1000))

    def fail(module: nn.Module, args: Any) -> None:
        if next(runs) == call:
            raise TroubleError

    return layer.register_forward_pre_hook(fail).remove


@works
def test_an_exception_inside_the_context_leaves_nothing(name: str, family: str) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model)
    stock = answers(model, batch)
    before = traces(model)

    def inside() -> None:
        with sl.attach(model, specimen(name)):
            tokens(model, batch)
            raise TroubleError

    with pytest.raises(TroubleError):
        inside()
    assert traces(model) == before
    assert equal(answers(model, batch), stock)


@works
@pytest.mark.parametrize("call", [0, 3], ids=["reading the prompt", "a later token"])
def test_an_exception_in_the_middle_of_a_forward(name: str, family: str, call: int) -> None:
    """The context stays usable, and then ends as any other."""
    model = model_of(family)
    batch = tiny.inputs(family, model)
    stock = answers(model, batch)
    before = traces(model)
    with sl.attach(model, specimen(name)):
        want = answers(model, batch)
        take_away = failing_at(anatomy_of(family).layers[-1], call)
        with pytest.raises(TroubleError):
            generate(model, batch, new=5)
        take_away()
        assert equal(answers(model, batch), want)
        generate(model, tiny.inputs(family, model, images_per_row=[2, 0, 1]))
        take_away = failing_at(anatomy_of(family).layers[-1], call)
        with pytest.raises(TroubleError):
            generate(model, batch, new=5)
        take_away()
    assert traces(model) == before
    assert equal(answers(model, batch), stock)


def test_an_exception_while_pictures_are_encoded() -> None:
    model = model_of("llava")
    batch = tiny.inputs("llava", model)
    before = traces(model)
    with sl.attach(model, specimen("fastervlm"), specimen("ritual")):
        want = answers(model, batch)
        take_away = failing_at(anatomy_of("llava").vision_tower, 1)  # the branch's pictures
        with pytest.raises(TroubleError):
            generate(model, batch)
        take_away()
        assert equal(answers(model, batch), want)
    assert traces(model) == before


# --- Nested ---


@pytest.mark.parametrize("family", FAMILIES)
def test_nested_contexts_are_both_at_once(family: str) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    stock = answers(model, batch)
    before = traces(model)
    with sl.attach(model, EveryOther()):
        outer = answers(model, batch)
    with sl.attach(model, EveryOther(), specimen("ritual"), specimen("vista")):
        both = answers(model, batch)
    assert not equal(outer, both)
    with sl.attach(model, EveryOther()):
        assert equal(answers(model, batch), outer)
        with sl.attach(model, specimen("ritual")), sl.attach(model, specimen("vista")):
            assert equal(answers(model, batch), both)
        assert equal(answers(model, batch), outer)
        with sl.attach(model):
            assert equal(answers(model, batch), outer)
    assert traces(model) == before
    assert equal(answers(model, batch), stock)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_detaching_in_any_order(family: str) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model)
    stock, before = answers(model, batch), traces(model)

    def with_methods(*methods: Any) -> list[Tensor]:
        with sl.attach(model, *methods):
            return answers(model, batch)

    first, second, third = EveryOther(), specimen("vhr"), specimen("ritual")
    want = with_methods(second, third), with_methods(second)
    attachments = [sl.attach(model, method) for method in (first, second, third)]
    attachments[0].detach()
    assert equal(answers(model, batch), want[0])
    attachments[2].detach()
    assert equal(answers(model, batch), want[1])
    attachments[0].detach()  # a second time
    assert equal(answers(model, batch), want[1])
    attachments[1].detach()
    assert traces(model) == before
    assert equal(answers(model, batch), stock)


def test_the_order_of_methods_is_the_order_in_which_they_were_given() -> None:
    model = model_of("llava")
    batch = tiny.inputs("llava", model)
    with sl.attach(model, specimen("ritual")), sl.attach(model, specimen("vista")):
        nested = answers(model, batch)
    with sl.attach(model, specimen("ritual"), specimen("vista")):
        assert equal(answers(model, batch), nested)
    with sl.attach(model, specimen("vista"), specimen("ritual")):
        assert not equal(answers(model, batch), nested)


def test_a_context_that_cannot_begin_leaves_the_one_around_it_as_it_was() -> None:
    model = model_of("llava")
    batch = tiny.inputs("llava", model)
    before = traces(model)
    with sl.attach(model, specimen("fastervlm"), specimen("vista")) as outer:
        want = answers(model, batch)
        inside = traces(model)
        for method, reason in ((specimen("vista"), "given twice"), (EveryOther(), "do not compose")):
            with pytest.raises(InputError, match=reason):
                sl.attach(model, method)
            assert equal(answers(model, batch), want)
        assert traces(model) == inside
        assert outer.kept is not None
    assert traces(model) == before


@dataclass(frozen=True)
class Unfit(Nothing):
    """Fails while it puts its hooks on."""

    paper: ClassVar[str] = "unfit"

    def install(self, boundary: Boundary) -> None:
        boundary.before(boundary.anatomy.layers[0], lambda call, hidden: hidden * 0)
        raise TroubleError


@pytest.mark.parametrize("around", [(), ("vista",)], ids=["alone", "inside another"])
def test_a_method_that_fails_while_it_is_put_on_is_taken_off(around: tuple[str, ...]) -> None:
    model = model_of("llava")
    batch = tiny.inputs("llava", model)
    before = traces(model)
    with sl.attach(model, *map(specimen, around)):
        want = answers(model, batch)
        with pytest.raises(TroubleError):
            sl.attach(model, specimen("ritual"), Unfit())
        assert equal(answers(model, batch), want)
    assert traces(model) == before


@pytest.mark.parametrize("name", NAMES)
def test_two_models_do_not_know_of_each_other(name: str) -> None:
    model, other = model_of("llava"), tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    stock = answers(model, batch)
    with sl.attach(other, specimen(name)):
        assert equal(answers(model, batch), stock)
        with sl.attach(model, specimen(name)):
            assert equal(answers(model, batch), answers(other, batch))
    assert equal(answers(other, batch), stock)


# --- What an attachment tells ---


def test_an_attachment_tells_of_the_last_prompt_also_after_it_has_ended() -> None:
    model = model_of("llava")
    batch = tiny.inputs("llava", model, images_per_row=[2, 0, 1])
    with sl.attach(model, EveryOther()) as outer:
        assert outer.kept is None
        assert outer.visual_tokens == []
        with sl.attach(model, specimen("vista")) as inner:
            tokens(model, batch)
            assert inner.visual_tokens == outer.visual_tokens == [16, 0, 8]
        assert outer.visual_tokens == [16, 0, 8]
        assert inner.visual_tokens_given == [32, 0, 16]
        tokens(model, tiny.single("llava", model, 0))
        assert outer.visual_tokens == [8]
        assert inner.visual_tokens == [16, 0, 8]
    assert outer.visual_tokens_given == [16]
    with sl.attach(model, specimen("vista")) as every:
        tokens(model, batch)
    assert every.kept is None
    assert every.visual_tokens == every.visual_tokens_given == [32, 0, 16]


@pytest.mark.parametrize("methods", [(EveryOther(),), (Mirror(),), (specimen("vhr"), Mirror())], ids=str)
def test_a_cache_is_freed_when_the_caller_lets_it_go(methods: Any) -> None:
    model = model_of("llava")
    batch = tiny.inputs("llava", model)
    with sl.attach(model, *methods):
        out = generate(model, batch)
        cache = weakref.ref(out.past_key_values)
        gc.collect()
        gc.disable()
        try:
            del out
            assert cache() is None  # without the garbage collector's help
        finally:
            gc.enable()


def test_the_decoder_may_be_called_by_itself_inside_the_context() -> None:
    model, anatomy = model_of("llava"), anatomy_of("llava")
    batch = tiny.inputs("llava", model)
    embeds = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = anatomy.language_model(inputs_embeds=embeds).last_hidden_state
        with sl.attach(model, *composing(NAMES)):
            want = logits(generate(model, batch))
            assert torch.equal(anatomy.language_model(inputs_embeds=embeds).last_hidden_state, stock)
            forward_logits(model, batch)
            assert torch.equal(anatomy.language_model(inputs_embeds=embeds).last_hidden_state, stock)
            assert torch.equal(logits(generate(model, batch)), want)
