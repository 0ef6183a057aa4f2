"""Contrastive methods together: they share branches, and their order does not matter."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import ClassVar, Self

import families as tiny
import pytest
import torch
from specimens import row_counts
from test_debiasing import biased, closed, posthoc
from torch import Tensor

import sightline as sl
from sightline.grounding.contrastive_decoding import ContrastiveDecoding
from sightline.grounding.debiasing import Debiasing
from sightline.grounding.vcd import Vcd
from sightline.grounding.vhr import VHR
from sightline.methods import Method, attach
from sightline.models.call import NO_PICTURE, Call, Stream


@dataclasses.dataclass(frozen=True)
class Prior(ContrastiveDecoding):
    """Adds the logits of the branch without a picture."""

    paper: ClassVar[str] = "prior"

    def identity(self) -> Self:
        return self

    def branches(self, call: Call) -> Sequence[Stream]:
        return (NO_PICTURE,)

    def combine(self, logits: Tensor, own: Tensor, branches: Sequence[Tensor]) -> Tensor:
        return logits + branches[0]


@torch.no_grad()
def test_the_branch_without_a_picture_is_shared() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    for methods, expected in (
        ((Debiasing(),), [6, 6]),
        ((Debiasing(), Prior()), [6, 6]),
        ((Debiasing(priors=("none", "zero")), Prior()), [9, 9]),
        ((Debiasing(), Vcd()), [9, 9]),
        ((posthoc(), Prior()), [6, 6]),
        ((Prior(), VHR(), posthoc()), [9, 6]),
    ):
        with attach(model, *methods), row_counts(model) as counts:
            model.generate(**batch, max_new_tokens=2, do_sample=False)
        assert counts == expected


@torch.no_grad()
def test_a_branch_that_one_method_needs_for_longer_goes_on() -> None:
    """`Prior` reads at every step the branch that the post-hoc step wants at the first, in whatever order they come."""
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)

    def answer(*methods: Method) -> Tensor:
        with attach(model, *methods):
            out = model.generate(
                **batch, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        return torch.stack(out.logits)

    alone = answer(Prior())  # the likeliest first tokens are no labels
    for order in itertools.permutations([Prior(), posthoc(priors=("zero", "none")), Vcd(alpha=1e-9, beta=0.0)]):
        torch.testing.assert_close(answer(*order), alone, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("method", [Debiasing(), posthoc(), posthoc(calibration="identity", alpha=0.3)])
def test_contrastive_methods_commute(method: Debiasing) -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    with biased(model, closed()):
        stock = model(**batch).logits[:, -1]
        for other in (Vcd(), sl.Ritual(), Prior()):
            both = []
            for order in ((method, other), (other, method)):
                with attach(model, *order):
                    both.append(model(**batch).logits[:, -1].clamp(min=-999))
            torch.testing.assert_close(both[0], both[1], atol=2e-4, rtol=0)
            assert (both[0] - stock).abs().max() > 1e-2
