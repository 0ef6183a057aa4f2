"""Gated linear attention against its definition, one head and token at a time, in one direction and in both."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.errors import InputError
from sightline.mixers.gated_linear_attention import GatedLinearAttention

WIDTH, HEADS, LENGTH = 16, 2, 21
KEYS, VALUES = 4, 8


def mixer(**options: Any) -> GatedLinearAttention:
    torch.manual_seed(0)
    ours = GatedLinearAttention(WIDTH, HEADS, **options).double()
    with torch.no_grad():  # larger than at the start, so that gates and norms matter
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) / 2)
    return ours


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def slow_scan(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, order: range) -> Tensor:
    """One head of one sequence: [L, dk], [L, dk], [L, dv] and gate logits [L, dk], read in an order."""
    state = torch.zeros(KEYS, VALUES, dtype=torch.float64)
    out = torch.zeros_like(value)
    for t in order:
        kept = torch.sigmoid(gate[t]) ** (1 / 16)
        state = kept[:, None] * state + torch.outer(key[t], value[t])
        out[t] = query[t] @ state / math.sqrt(KEYS)
    return out


def slow(ours: GatedLinearAttention, x: Tensor) -> Tensor:
    key_width, value_width = HEADS * KEYS, HEADS * VALUES
    query, key, value = (x @ ours.qkv_proj.weight.T).split([key_width, key_width, value_width], dim=-1)
    low, high = ours.gk_proj
    gates = ((x @ low.weight.T) @ high.weight.T + high.bias).split(key_width, dim=-1)
    heads = torch.zeros(*x.shape[:2], value_width, dtype=torch.float64)
    orders = [range(x.shape[1]), range(x.shape[1] - 1, -1, -1)]
    for b in range(len(x)):
        for h in range(HEADS):
            keys, values = slice(h * KEYS, (h + 1) * KEYS), slice(h * VALUES, (h + 1) * VALUES)
            scans = [
                slow_scan(query[b][:, keys], key[b][:, keys], value[b][:, values], gate[b][:, keys], order)
                for gate, order in zip(gates, orders, strict=False)
            ]
            read = sum(scans) / len(scans)
            scale = ((read**2).mean(dim=-1, keepdim=True) + 1e-6) ** -0.5
            heads[b, :, values] = read * scale * ours.g_norm.weight
    return (F.silu(x @ ours.g_proj.weight.T + ours.g_proj.bias) * heads) @ ours.o_proj.weight.T


@torch.no_grad()
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    "options",
    [dict(mode="parallel"), dict(mode="recurrent"), *(dict(chunk=chunk) for chunk in (None, 1, 4, 21, 64))],
)
def test_every_form_is_the_definition(bidirectional: bool, options: dict[str, Any]) -> None:
    ours = mixer(bidirectional=bidirectional, **options)
    torch.testing.assert_close(ours(tokens()), slow(ours, tokens()), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_one_token_at_a_time_is_the_whole_pass() -> None:
    ours = mixer()
    state = ours.init_state(2)
    assert state.shape == (2, HEADS, KEYS, VALUES)
    steps = []
    for x in tokens().unbind(1):
        out, state = ours.step(x, state)
        steps.append(out)
    torch.testing.assert_close(torch.stack(steps, dim=1), ours(tokens()), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_with_equal_gates_both_directions_commute_with_reversal() -> None:
    ours, x = mixer(bidirectional=True), tokens()
    assert not torch.allclose(ours(x.flip(1)).flip(1), ours(x))
    half = HEADS * KEYS
    ours.gk_proj[1].weight[half:] = ours.gk_proj[1].weight[:half]
    ours.gk_proj[1].bias[half:] = ours.gk_proj[1].bias[:half]
    torch.testing.assert_close(ours(x.flip(1)).flip(1), ours(x))


@torch.no_grad()
def test_gates_that_keep_everything_make_it_blind_to_order() -> None:
    """The sum of both scans is then q_t (sum of all k v^T + k_t v_t^T)."""
    ours, x = mixer(bidirectional=True), tokens()
    ours.gk_proj[1].weight.zero_()
    ours.gk_proj[1].bias.fill_(1e6)
    read, _ = ours.scan(x)
    query, key, value = (
        part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for part in ours.qkv_proj(x).split([HEADS * KEYS, HEADS * KEYS, HEADS * VALUES], dim=-1)
    )
    everything = query @ (key.mT @ value) + (query * key).sum(-1, keepdim=True) * value
    torch.testing.assert_close(read.transpose(1, 2), everything / math.sqrt(KEYS) / 2)
    shuffled = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ours(x[:, shuffled]), ours(x)[:, shuffled])


@torch.no_grad()
def test_in_one_direction_later_tokens_change_nothing_in_both_they_do() -> None:
    for bidirectional in (False, True):
        ours, x = mixer(bidirectional=bidirectional), tokens()
        before = ours(x)
        x[:, 13] += 1
        after = ours(x)
        assert torch.equal(before[:, :13], after[:, :13]) is not bidirectional


def test_gradients_of_the_forms_agree_and_reach_every_weight() -> None:
    found = []
    for options in (dict(mode="recurrent"), dict(mode="parallel"), dict(chunk=5)):
        ours = mixer(bidirectional=True, **options)
        ours(tokens()).sin().sum().backward()
        found.append([parameter.grad for parameter in ours.parameters()])
    assert all(grad is not None and bool(grad.any()) for grad in found[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


def test_weights_start_small_and_uniform() -> None:
    torch.manual_seed(0)
    ours = GatedLinearAttention(64, 2)
    bound = 2**-2.5 * math.sqrt(6 / (64 + 128))
    assert 0.9 * bound < float(ours.qkv_proj.weight.detach().abs().max()) <= bound


@torch.no_grad()
def test_half_precision_runs() -> None:
    x = tokens(90)
    torch.manual_seed(0)
    ours = GatedLinearAttention(WIDTH, HEADS).double()
    exact = ours(x)
    half = ours.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert float((half - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_multiply_adds_are_those_of_the_scans() -> None:
    assert mixer().mixing_macs(tokens()) == 2 * 3 * LENGTH * HEADS * KEYS * VALUES
    assert mixer(bidirectional=True).mixing_macs(tokens()) == 2 * 2 * 3 * LENGTH * HEADS * KEYS * VALUES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=3), "keys of width 8 and values of width 16 cannot be shared by 3 heads of equal width"),
        (dict(expand_k=0.1, num_heads=2), "keys of width 1 and values of width 16 cannot be shared by 2 heads"),
        (dict(gate_logit_normalizer=0.0), "gate_logit_normalizer must be above 0 and gate_low_rank_dim 1 or more"),
        (dict(gate_low_rank_dim=0), "gate_low_rank_dim 1 or more, not 16.0 and 0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GatedLinearAttention(**dict(width=WIDTH, num_heads=2) | options)


def test_both_directions_have_no_step() -> None:
    ours = mixer(bidirectional=True)
    with pytest.raises(InputError, match="reads later tokens and has no step"):
        ours.step(tokens()[:, 0], ours.init_state(2))
