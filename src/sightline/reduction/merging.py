"""Bipartite soft matching: which tokens are alike enough to become one, and merging them (ToMe, Bolya et al. 2022).

Of n tokens those at even places are the set A, those at odd places the set B. Each of A is matched with the one of B
that is most similar to it (cosine of a metric, in which they are told apart); the r best of these pairs are merged into
their token of B, all tokens that share one together. n - r tokens are left: the other tokens of A first, in their
order, then all of B, in theirs. So the next matching divides them differently.

The official code (facebookresearch/ToMe, `merge.py`) leaves the rest of A in the order of their similarity where no
[CLS] token is protected, and in their own order where one is; here it is always their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Matching:
    """Which of n tokens become one of the n - r that are left."""

    where: Tensor
    """int [batch, n]: for each token, the place of the one that it is now part of."""
    left: int
    """n - r."""

    def total(self, values: Tensor) -> Tensor:
        """[batch, n, ...] -> [batch, n - r, ...]: sums over the tokens that become one."""
        where = self.where.reshape(*self.where.shape, *[1] * (values.ndim - 2)).expand_as(values)
        empty = values.new_zeros(len(values), self.left, *values.shape[2:])
        return empty.scatter_add(1, where, values)

    def merge(self, values: Tensor, size: Tensor | None = None) -> Tensor:
        """[batch, n, ...] -> [batch, n - r, ...]: means over the tokens that become one.

        Args:
            values: of the tokens.
            size: [batch, n]: how many tokens each of them is made of, its weight in the mean; None: a plain mean.
        """
        if self.left == values.shape[1]:
            return self.total(values)
        weight = torch.ones_like(self.where, dtype=values.dtype) if size is None else size.to(values.dtype)
        total = self.total(weight).reshape(len(values), self.left, *[1] * (values.ndim - 2))
        weight = weight.reshape(*weight.shape, *[1] * (values.ndim - 2))
        return self.total(values * weight) / total

    def unmerge(self, merged: Tensor) -> Tensor:
        """[batch, n - r, ...] -> [batch, n, ...]: to each token the value of the one that it is part of."""
        where = self.where.reshape(*self.where.shape, *[1] * (merged.ndim - 2))
        return merged.gather(1, where.expand(-1, -1, *merged.shape[2:]))

    def followed_by(self, other: Matching) -> Matching:
        """This matching and then another, of the tokens that it left, in one."""
        return Matching(other.where.gather(1, self.where), other.left)


@torch.no_grad()
def bipartite_soft_matching(metric: Tensor, r: int, *, protect_first: bool = False) -> Matching:
    """Matches the r most similar pairs of tokens, one from each half. No gradient flows through the choice.

    Args:
        metric: what tokens are compared by, [batch, n, d].
        r: how many tokens to merge away; at most as many as there are in the set A, without the protected one.
        protect_first: leave the first token ([CLS]) as it is and in its place.
    """
    batch, n = metric.shape[:2]
    r = max(0, min(r, (n - int(protect_first)) // 2))
    where = torch.arange(n, device=metric.device).repeat(batch, 1)
    if r == 0:
        return Matching(where, n)
    unit = functional.normalize(metric.float(), dim=-1)
    scores = unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)
    if protect_first:
        scores[:, 0] = -torch.inf
    best, partner = scores.max(dim=-1)
    merged = best.argsort(dim=-1, descending=True, stable=True)[:, :r]
    stays = torch.ones_like(best, dtype=torch.bool).scatter(1, merged, value=False)
    stay = best.shape[1] - r  # B comes after them
    where[:, 0::2] = torch.where(stays, stays.long().cumsum(dim=1) - 1, stay + partner)
    where[:, 1::2] = stay + torch.arange(n // 2, device=metric.device)
    return Matching(where, n - r)
