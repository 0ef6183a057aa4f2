"""Bipartite soft matching against one token after the other in plain Python, and what merging has to keep."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sightline.reduction.merging import Matching, bipartite_soft_matching


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_groups(metric: list[list[float]], r: int, *, protect_first: bool) -> list[list[int]]:
    """The tokens that each one that is left is made of, in the order of those that are left."""
    even, odd = list(range(0, len(metric), 2)), list(range(1, len(metric), 2))

    def cosine(one: int, other: int) -> float:
        a, b = metric[one], metric[other]
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    r = min(r, (len(metric) - protect_first) // 2)
    pairs = []
    for token in even[1:] if protect_first else even:
        partner = max(odd, key=lambda other: cosine(token, other))
        pairs.append((cosine(token, partner), token, partner))
    merged = {token: partner for _, token, partner in sorted(pairs, reverse=True)[:r]}
    if not merged:
        return [[token] for token in range(len(metric))]
    alone = [[token] for token in even if token not in merged]
    return alone + [[partner, *(one for one in even if merged.get(one) == partner)] for partner in odd]


def groups(matching: Matching, row: int) -> list[list[int]]:
    where = matching.where[row].tolist()
    return [[token for token, place in enumerate(where) if place == left] for left in range(matching.left)]


@pytest.mark.parametrize("n", [2, 3, 8, 13])
@pytest.mark.parametrize("r", [0, 1, 3, 100])
@pytest.mark.parametrize("protect_first", [False, True])
def test_pairs_and_means_are_those_found_one_by_one(n: int, r: int, protect_first: bool) -> None:
    metric, values, size = rand(3, n, 5), rand(3, n, 2, seed=1), rand(3, n, seed=2).abs() + 0.5
    matching = bipartite_soft_matching(metric, r, protect_first=protect_first)
    assert matching.left == n - min(r, (n - protect_first) // 2)
    for row in range(3):
        expected = slow_groups(metric[row].tolist(), r, protect_first=protect_first)
        assert groups(matching, row) == [sorted(group) for group in expected]
        plain = torch.stack([values[row, group].mean(dim=0) for group in expected])
        torch.testing.assert_close(matching.merge(values)[row], plain)
        weights = [size[row, group, None] for group in expected]
        weighted = [
            (values[row, group] * weight).sum(dim=0) / weight.sum()
            for group, weight in zip(expected, weights, strict=True)
        ]
        torch.testing.assert_close(matching.merge(values, size)[row], torch.stack(weighted))
        for left, group in enumerate(expected):
            assert torch.equal(
                matching.unmerge(matching.merge(values))[row, group],
                matching.merge(values)[row, left].expand(len(group), -1),
            )


def test_an_example_by_hand() -> None:
    """Tokens 0 2 4 look for their likes among 1 3: 2 is 3's twin, 0 a little like 1, and 4 like nothing."""
    metric = torch.tensor([[[1.0, 0.0], [1.0, 0.2], [0.0, 5.0], [0.0, 1.0], [-1.0, -1.0]]])
    values = torch.tensor([[[1.0], [2.0], [4.0], [8.0], [16.0]]])
    one = bipartite_soft_matching(metric, 1)
    assert one.merge(values).flatten().tolist() == [1, 16, 2, 6]
    two = bipartite_soft_matching(metric, 2)
    assert two.where.tolist() == [[1, 1, 2, 2, 0]]
    assert two.merge(values).flatten().tolist() == [16, 1.5, 6]
    assert two.merge(values, torch.tensor([[3.0, 1.0, 1.0, 1.0, 1.0]])).flatten().tolist() == [16, 1.25, 6]
    assert two.unmerge(two.merge(values)).flatten().tolist() == [1.5, 1.5, 6, 6, 16]
    assert two.total(values).flatten().tolist() == [16, 3, 12]


def test_several_tokens_may_go_to_one() -> None:
    metric = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0]]])
    values = torch.arange(6.0).reshape(1, 6, 1)
    assert bipartite_soft_matching(metric, 3).merge(values).flatten().tolist() == [(0 + 1 + 2 + 4) / 4, 3, 5]


def test_a_protected_first_token_is_alone_and_first_even_if_it_is_a_twin() -> None:
    metric = rand(1, 8, 4).repeat_interleave(2, dim=1)  # 0 and 1 are twins
    matching = bipartite_soft_matching(metric, 7, protect_first=True)
    assert groups(matching, 0)[0] == [0]
    assert groups(matching, 0)[1:] == [[1], *[[2 * pair, 2 * pair + 1] for pair in range(1, 8)]]
    assert groups(bipartite_soft_matching(metric, 8), 0) == [[2 * pair, 2 * pair + 1] for pair in range(8)]


def test_merging_nothing_leaves_values_bit_for_bit_in_their_order() -> None:
    values = rand(2, 7, 3)
    matching = bipartite_soft_matching(values, 0)
    assert torch.equal(matching.merge(values), values)
    assert torch.equal(matching.merge(values, values[..., 0]), values)
    assert bipartite_soft_matching(values[:, :1], 5).left == 1


def test_two_matchings_in_one() -> None:
    values, size = rand(2, 11, 3), torch.ones(2, 11, dtype=torch.float64)
    first = bipartite_soft_matching(values, 4)
    merged, sizes = first.merge(values, size), first.total(size)
    second = bipartite_soft_matching(merged, 3)
    both = first.followed_by(second)
    assert both.left == 4
    torch.testing.assert_close(second.merge(merged, sizes), both.merge(values))  # weighting by size, all count alike
    assert both.total(size).sum(dim=1).tolist() == [11, 11]
    assert torch.equal(both.unmerge(both.merge(values)), first.unmerge(second.unmerge(both.merge(values))))


def test_gradients_flow_through_the_means_and_not_through_the_choice() -> None:
    values = rand(1, 6, 3).requires_grad_()
    matching = bipartite_soft_matching(values, 2)
    assert not matching.where.requires_grad
    matching.merge(values).sum().backward()
    assert values.grad is not None
    expected = 1 / matching.unmerge(matching.total(torch.ones(1, 6)[..., None]))
    torch.testing.assert_close(values.grad, expected.double().expand(-1, -1, 3))


def test_rows_are_matched_on_their_own() -> None:
    metric = rand(3, 9, 4)
    together = bipartite_soft_matching(metric, 3)
    for row in range(3):
        assert torch.equal(bipartite_soft_matching(metric[row : row + 1], 3).where, together.where[row : row + 1])
