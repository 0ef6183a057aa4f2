"""Retention against its definition, one head and token at a time; its decays; streaming."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sightline.errors import InputError
from sightline.mixers import retention
from sightline.mixers.linear_attention import linear_attention
from sightline.mixers.retention import Retention, vision_decays

WIDTH, HEADS, LENGTH = 12, 3, 23


def mixer(**options: Any) -> Retention:
    torch.manual_seed(0)
    return Retention(WIDTH, HEADS, **options).double()


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def slow(ours: Retention, x: Tensor, decays: tuple[float, ...]) -> Tensor:
    """The equations of the module, a head and token at a time."""
    wide = WIDTH // HEADS
    projected = x @ ours.qkv.weight.T + ours.qkv.bias
    query, key, value = projected.split(WIDTH, dim=-1)
    outs = torch.zeros_like(x)
    for b in range(len(x)):
        for head, gamma in enumerate(decays):
            part = slice(head * wide, (head + 1) * wide)
            state = torch.zeros(wide, wide, dtype=torch.float64)
            for t in range(x.shape[1]):
                state = gamma * state + torch.outer(key[b, t, part], value[b, t, part])
                outs[b, t, part] = query[b, t, part] @ state / math.sqrt(wide)
    return outs @ ours.proj.weight.T + ours.proj.bias


@torch.no_grad()
@pytest.mark.parametrize("decays", [(0.9, 0.5, 0.999), (1.0, 1e-6, 0.3)])
@pytest.mark.parametrize(
    "options",
    [dict(mode="parallel"), dict(mode="recurrent"), *(dict(chunk=chunk) for chunk in (None, 1, 4, 7, 23, 64))],
)
def test_every_form_is_the_definition(decays: tuple[float, ...], options: dict[str, Any]) -> None:
    ours = mixer(decays=decays, **options)
    torch.testing.assert_close(ours(tokens()), slow(ours, tokens(), decays), rtol=1e-10, atol=1e-10)


def test_decays_are_those_of_the_authors() -> None:
    assert vision_decays(4) == pytest.approx((0.96875, 0.98760, 0.99508, 0.998047), abs=1e-5)
    assert vision_decays(1) == (1 - 1 / 32,)
    spaced = 1 - torch.exp(torch.linspace(math.log(1 / 32), math.log(1 / 512), 12, dtype=torch.float64))
    assert vision_decays(12) == pytest.approx(spaced.tolist(), abs=1e-14)
    assert mixer().decays == vision_decays(HEADS)


@torch.no_grad()
def test_half_precision_does_not_round_the_decays(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def noted(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        given.append(log_decay)
        return linear_attention(query, key, value, log_decay, **rest)

    monkeypatch.setattr(retention, "linear_attention", noted)
    half = mixer().bfloat16()(tokens().bfloat16())
    assert half.dtype == torch.bfloat16
    assert given[0].dtype == torch.float32
    torch.testing.assert_close(given[0].exp(), torch.tensor(vision_decays(HEADS)), rtol=0, atol=1e-7)
    torch.testing.assert_close(half.double(), mixer()(tokens()), rtol=0, atol=0.06)


@torch.no_grad()
def test_one_token_at_a_time_is_the_whole_pass() -> None:
    ours = mixer()
    state = ours.init_state(2)
    steps = []
    for x in tokens().unbind(1):
        out, state = ours.step(x, state)
        steps.append(out)
    assert state.shape == (2, HEADS, WIDTH // HEADS, WIDTH // HEADS)
    torch.testing.assert_close(torch.stack(steps, dim=1), ours(tokens()), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_later_tokens_change_nothing() -> None:
    ours, x = mixer(chunk=4), tokens()
    before = ours(x)
    x[:, 13] += 1
    after = ours(x)
    assert torch.equal(before[:, :13], after[:, :13])
    assert bool((before[:, 13:] != after[:, 13:]).any(-1).all())


def test_gradients_of_the_forms_agree() -> None:
    found = []
    for options in (dict(mode="recurrent"), dict(mode="parallel"), dict(chunk=5)):
        ours = mixer(**options)
        ours(tokens()).sin().sum().backward()
        found.append([parameter.grad for parameter in ours.parameters()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


def test_multiply_adds_are_linear_in_the_tokens() -> None:
    assert mixer().mixing_macs(tokens()) == 2 * 3 * LENGTH * HEADS * 4 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(width=10, num_heads=3), "the width 10 cannot be shared by 3 heads of equal width"),
        (dict(num_heads=0), "cannot be shared by 0 heads"),
        (dict(decays=(0.9, 0.9)), "decays must be 3 numbers above 0 and at most 1, one a head"),
        (dict(decays=(0.9, 0.9, 1.1)), "decays must be 3 numbers above 0 and at most 1"),
        (dict(decays=(0.9, 0.9, 0.0)), "decays must be 3 numbers above 0 and at most 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Retention(**dict(width=12, num_heads=3) | options)
