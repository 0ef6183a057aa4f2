"""The linear recurrence: its three forms against one number after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sightline.errors import InputError
from sightline.mixers.linear_recurrence import linear_recurrence

MODES = ("loop", "doubling", "chunked")


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow(a: Tensor, b: Tensor, h0: Tensor | None) -> Tensor:
    a = a.expand_as(b).reshape(len(b), -1)
    flat = b.reshape(len(b), -1)
    before = torch.zeros_like(b[0]) if h0 is None else h0.expand_as(b[0])
    columns = []
    for column, h in enumerate(before.reshape(-1).tolist()):
        states = []
        for factor, value in zip(a[:, column].tolist(), flat[:, column].tolist(), strict=True):
            h = factor * h + value
            states.append(h)
        columns.append(states)
    return torch.tensor(columns, dtype=torch.promote_types(a.dtype, b.dtype)).T.reshape(b.shape)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 17, 50])
def test_every_form_is_the_recurrence(mode: Any, kind: torch.dtype, length: int) -> None:
    b = draw(length, 3, 2, dtype=kind)
    for shape in ((length, 3, 2), (length, 1, 2), (1, 3, 1), (3, 2), (2,), ()):
        a = draw(*shape, dtype=kind, seed=1) * 0.8
        for h0 in (None, draw(3, 2, dtype=kind, seed=2), draw(2, dtype=kind, seed=3)):
            torch.testing.assert_close(linear_recurrence(a, b, h0, mode), slow(a, b, h0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_factors_may_be_complex_where_values_are_real(mode: Any) -> None:
    """h = (i, ...): a quarter turn each step, from 1."""
    turned = linear_recurrence(torch.tensor(1j), torch.zeros(6), torch.tensor(1.0), mode)
    torch.testing.assert_close(turned, torch.tensor([1j, -1, -1j, 1, 1j, -1]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
def test_gradients(mode: Any, kind: torch.dtype) -> None:
    for shape in ((7, 2), (1, 2), (2,)):
        a, b, h0 = draw(*shape, dtype=kind, seed=4), draw(7, 2, dtype=kind), draw(2, dtype=kind, seed=2)
        leaves = [tensor.requires_grad_() for tensor in (a, b, h0)]
        assert torch.autograd.gradcheck(lambda a, b, h0: linear_recurrence(a, b, h0, mode), leaves)


@pytest.mark.parametrize("mode", MODES)
def test_fast_decays_neither_overflow_nor_lose_the_input(mode: Any) -> None:
    a, b = torch.full((1, 3), -16.0).exp(), torch.ones(1000, 3)
    h = linear_recurrence(a, b, None, mode)
    torch.testing.assert_close(h, torch.full((1000, 3), 1 / (1 - torch.tensor(-16.0).exp().item())))
    still = linear_recurrence(torch.zeros(1000, 3), b, None, mode)
    assert torch.equal(still, b)


@pytest.mark.parametrize("mode", MODES)
def test_forms_agree_in_float32(mode: Any) -> None:
    a, b = draw(129, 8, dtype=torch.float32).sigmoid(), draw(129, 8, dtype=torch.float32)
    exact = linear_recurrence(a.double(), b.double())
    torch.testing.assert_close(linear_recurrence(a, b, None, mode).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "h0", "mode", "message"),
    [
        (
            (3,),
            (0, 3),
            None,
            "loop",
            r"b of linear_recurrence must be \[T, ...\] with a step at least, not of .*\[0, 3\]",
        ),
        ((), (), None, "loop", "b of linear_recurrence"),
        ((4,), (5, 3), None, "loop", r"a of linear_recurrence must broadcast to \[5, 3\], and has the shape \[4\]"),
        ((1, 5, 3), (5, 3), None, "loop", r"a of linear_recurrence must broadcast to \[5, 3\]"),
        ((3,), (5, 3), (1, 3), "loop", r"h0 of linear_recurrence must broadcast to \[3\], and has the shape \[1, 3\]"),
        ((3,), (5, 3), None, "lop", r"unknown mode of linear_recurrence 'lop' \(did you mean 'loop'\?\)"),
    ],
)
def test_bad_input_is_named(a: Any, b: Any, h0: Any, mode: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        linear_recurrence(torch.zeros(a), torch.zeros(b), None if h0 is None else torch.zeros(h0), mode)
