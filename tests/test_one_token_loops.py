"""The compiled loops of one-token steps: against the tensor forms of the methods, and taken where they may be."""

from __future__ import annotations

import math
from typing import Any

import families as tiny
import pytest
import torch
from specimens import generate
from torch import Tensor
from torch.nn import functional as F

import sightline as sl
from sightline import machine_code
from sightline.grounding import attention_steering, one_token_loops, vista
from sightline.grounding.one_token_loops import loops
from sightline.grounding.pai import PAI
from sightline.grounding.vista import Vista
from sightline.machine_code import in_loops
from sightline.methods import Method

STEERING = [PAI(gamma=1.0), PAI(alpha=2.0, gamma=1.0, layers=(1,)), Vista(gamma=0.0), Vista(gamma=0.0, scale="raw")]


def boosted(query: Tensor, key: Tensor, value: Tensor, factors: Tensor, scaling: float) -> Tensor:
    """The loop, on query [H, d], key and value [G, k, d] and factors [k]; gives [H, d]."""
    one_row = (query[None, :, None], key[None], value[None], factors[None, None, None])
    assert in_loops(*one_row)
    return one_token_loops.boosted(*one_row, scaling)[0, 0]


@pytest.mark.parametrize(("heads", "groups", "keys", "width"), [(4, 4, 145, 48), (6, 2, 7, 5), (3, 1, 1, 1)])
def test_boosted_attention_is_that_of_the_formula(heads: int, groups: int, keys: int, width: int) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(heads, width), torch.randn(groups, keys, width), torch.randn(groups, keys, width)
    factors, scaling = torch.rand(keys) * 2, width**-0.5
    output = boosted(query, key, value, factors, scaling)
    for head in range(heads):
        of_head = (x[head // (heads // groups)].double() for x in (key, value))
        keys_of, values_of = of_head
        z = keys_of @ query[head].double() * scaling
        expected = (z + factors * z.abs()).softmax(0) @ values_of
        torch.testing.assert_close(output[head].double(), expected, rtol=1e-5, atol=1e-6)


def test_large_logits_stay_finite() -> None:
    query, key = torch.full((1, 2), 1e4), torch.tensor([[[1e4, 1e4], [-1e4, -1e4], [1e4, 1e4 - 1e3]]])
    value = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    assert boosted(query, key, value, torch.zeros(3), 1.0).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("scale", ["unit", "raw"])
@pytest.mark.parametrize("strength", [0.17, 0.5, 3.0])
def test_a_tilted_vector_is_that_of_the_tensor_form(scale: Any, strength: float) -> None:
    torch.manual_seed(1)
    method = Vista(strength=strength, gamma=0.0, scale=scale)
    for _ in range(5):
        m, v = torch.randn(1, 1, 40) * 7, F.normalize(torch.randn(1, 1, 40), dim=-1)
        assert in_loops(m)
        both = method.steer(m.expand(2, -1, -1), v.expand(2, -1, -1))  # two rows take the tensor form
        torch.testing.assert_close(method.steer(m, v), both[:1], rtol=1e-5, atol=1e-5)


def test_a_vector_without_a_direction_and_one_of_zeros_stay_as_they_are() -> None:
    m, zero = torch.randn(1, 1, 16), torch.zeros(1, 1, 16)
    method = Vista(gamma=0.0)
    torch.testing.assert_close(method.steer(m, zero), m)
    assert torch.equal(method.steer(zero, F.normalize(m, dim=-1)), zero)


def test_a_gradient_goes_through_the_tensor_form() -> None:
    m = torch.randn(1, 1, 8, requires_grad=True)
    assert not in_loops(m)
    Vista(gamma=0.0).steer(m, F.normalize(torch.randn(1, 1, 8), dim=-1)).sum().backward()
    assert m.grad is not None
    with torch.no_grad():
        assert in_loops(m)


@pytest.mark.parametrize("method", STEERING)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_an_answer_is_the_same_with_and_without_them(
    method: Method, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.tiny_model(family, seed=3)
    batch = tiny.single(family, model, 0)
    steps, calls = 6, []

    def counted() -> one_token_loops.Loops:
        calls.append(1)
        return loops()

    def answer(takes: bool) -> tuple[Tensor, Tensor]:
        monkeypatch.setattr(one_token_loops, "loops", counted)
        for module in (attention_steering, vista):
            monkeypatch.setattr(module, "in_loops", in_loops if takes else lambda *tensors: False)
        with sl.attach(model, method):
            out = generate(model, batch, steps)
        return out.sequences, torch.stack(out.logits)

    tokens, logits = answer(takes=False)
    assert not calls
    with_loops = answer(takes=True)
    layers = len(model.model.language_model.layers)
    steered = len(method.layers or ()) or layers if isinstance(method, PAI) else layers
    assert len(calls) == steered * (steps - 1)
    assert torch.equal(with_loops[0], tokens)
    torch.testing.assert_close(with_loops[1], logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_they_are_not_for() -> None:
    x = torch.randn(1, 1, 4)
    assert in_loops(x)
    assert not in_loops(x.double())
    assert not in_loops(x.bfloat16())
    assert not in_loops(x.to("meta"))
    assert not in_loops(x, x.double())
    assert not in_loops(torch.randn(1, 1, 8)[..., ::2])
    assert math.isclose(float(Vista(gamma=0.0).steer(x.bfloat16(), x).norm() / x.norm()), 1, rel_tol=0.02)


def test_without_numba_the_tensor_form_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "has_numba", lambda: False)
    assert not in_loops(torch.randn(1, 1, 4))
