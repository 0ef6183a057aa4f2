"""Rows that enter the language model: dropping columns of a prompt and stacking views of it, as tensor arithmetic.

Shapes: B rows of the batch, R rows after stacking, S prompt length, T length after dropping, q new tokens, kv keys, D
width, A axes of multi-axis positions. Masks come in the forms that the families use: None, 2-D [B, S], 4-D
[B or 1, 1, q, kv] (bool or additive), or a dict of 4-D ones by layer type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

AttentionMask = Any
FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers in a dict of masks."""


@dataclass(frozen=True)
class View:
    """A prompt as embeddings, with one particular set of pictures in it (or with the pictures hidden)."""

    embeds: Tensor
    """[B, S, D]"""
    positions: Tensor
    """[B, S] or [A, B, S]"""
    visual: Tensor
    """bool [B, S]"""
    real: Tensor
    """bool [B, S]: columns that are no padding and not hidden."""
    deepstack: tuple[Tensor, ...] = ()
    """For each of the first decoder layers, extra features [visual tokens, D] in row-major order of `visual`."""
    columns: Tensor | None = None
    """int [B, S], if it is kept: which of the caller's columns each one was; -1: none of them."""

    def with_features(self, features: Tensor, deepstack: Sequence[Tensor]) -> View:
        """The same prompt with other image features [visual tokens, D] in it."""
        embeds = self.embeds.clone()
        embeds[self.visual] = features.to(embeds.dtype)
        return replace(self, embeds=embeds, deepstack=tuple(deepstack))

    def keeping(self, keep: Tensor, *, compact: bool, length: int = 0) -> tuple[View, Tensor]:
        """Drops the visual tokens where `keep` (bool [visual tokens]) is False, and padding where it can.

        The rows stay a rectangle of at least `length` columns: those that keep fewer are padded on the left. Positions
        of what stays are left as they are, or, if `compact`, close up (multi-axis positions never do: they are places
        in the picture).

        Returns:
            The shorter view, and the columns [B, T] of the old one that the new one's come from.
        """
        stays = self.real & self.visual.masked_scatter(self.visual, keep).logical_or(~self.visual)
        longest = max(length, int(stays.sum(dim=1).max()))
        # Stable: what stays keeps its order and ends up on the right; what goes fills the left where a row is shorter.
        columns = stays.int().argsort(dim=1, stable=True)[:, -longest:]
        real = stays.gather(1, columns)
        positions = self.positions.gather(-1, columns.expand(*self.positions.shape[:-1], -1))
        if compact and self.positions.ndim == 2:
            dropped = (self.real & ~stays).long().cumsum(dim=1).gather(1, columns)
            positions = (positions - dropped).clamp(min=0)
        embeds = self.embeds.gather(1, columns[..., None].expand(-1, -1, self.embeds.shape[-1]))
        return (
            View(
                embeds=embeds,
                positions=positions,
                visual=self.visual.gather(1, columns) & real,
                real=real,
                deepstack=tuple(layer[keep] for layer in self.deepstack),
                columns=None if self.columns is None else self.columns.gather(1, columns),
            ),
            columns,
        )

    def showing(self, visible: Tensor, *, keep_positions: bool) -> View:
        """Only the visual tokens where `visible` (bool [visual tokens]) is True; the others are hidden from everything,
        which equals deleting them. Positions of what follows close up unless kept."""
        shown = self.visual.clone()
        shown[self.visual] = visible
        real = self.real & (shown | ~self.visual)
        positions = self.positions
        if not keep_positions:
            limits = torch.finfo if positions.is_floating_point() else torch.iinfo
            nowhere = limits(positions.dtype).max
            first = positions.masked_fill(~self.real, nowhere).amin(dim=-1, keepdim=True)
            positions = first + (real.long().cumsum(dim=1) - 1).clamp(min=0)
        deepstack = tuple(layer[visible] for layer in self.deepstack) if bool(visible.any()) else ()
        return replace(self, positions=positions, visual=shown, real=real, deepstack=deepstack)

    def without_picture(self, *, keep_positions: bool) -> View:
        """All visual tokens hidden."""
        none = torch.zeros(int(self.visual.sum()), dtype=torch.bool, device=self.visual.device)
        return self.showing(none, keep_positions=keep_positions)


def map_mask(mask: AttentionMask, change: Callable[[Tensor | None], Tensor | None]) -> AttentionMask:
    """Applies `change` to a mask, or to each of a dict of masks."""
    if isinstance(mask, dict):
        return {kind: change(one) for kind, one in mask.items()}
    return change(mask)


def gather_mask(mask: AttentionMask, columns: Tensor, real: Tensor, window: int | None = None) -> AttentionMask:
    """The mask of a prompt of which only `columns` [B, T] are left, of which `real` [B, T] are no padding.

    A 2-D mask, or none, becomes the 2-D mask `real`: with None, positions that have gaps would be taken for several
    prompts in one row. Layers that slide see so many columns (`window`) of those that are left, as they do of the cache
    later on.
    """
    if not isinstance(mask, dict) and (mask is None or mask.ndim == 2):
        return real.long()
    left = map_mask(mask, lambda one: None if one is None else hide_keys(gather_square(one, columns), ~real))
    if not isinstance(left, dict) or window is None:
        return left
    whole, sliding = left.get(FULL), left.get(SLIDING)
    if whole is not None and sliding is not None:
        places = torch.arange(columns.shape[1], device=columns.device)
        back = places[:, None] - places
        left[SLIDING] = _either(sliding, _closed(whole, (back < 0) | (back >= window)))
    return left


def _closed(mask: Tensor, hidden: Tensor) -> Tensor:
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def _either(one: Tensor, other: Tensor) -> Tensor:
    """What one of two masks shows."""
    return one | other if one.dtype == torch.bool else torch.maximum(one, other)


def gather_square(mask: Tensor, columns: Tensor) -> Tensor:
    """What the queries `columns` [B, T] of a 4-D mask may see of the keys `columns`, [B, 1, T, T]."""
    rows, length = columns.shape
    mask = mask.expand(rows, -1, -1, -1)
    mask = mask.gather(2, columns[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return mask.gather(3, columns[:, None, None, :].expand(-1, mask.shape[1], length, -1))


def hide_keys(mask: Tensor, hidden: Tensor) -> Tensor:
    """A 4-D mask in which no query sees the keys where `hidden` [R, kv] is True, but for itself: a query that saw
    nothing at all would give NaN, and what hidden queries give is never read."""
    closed = hidden[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    queries, keys = mask.shape[-2:]
    itself = torch.arange(keys, device=mask.device) == torch.arange(keys - queries, keys, device=mask.device)[:, None]
    return _closed(mask, closed & ~itself)


def causal(rows: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """The plain causal mask, bool [rows, 1, queries, keys]."""
    square = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return square.expand(rows, 1, -1, -1)


def stack_masks(mask: AttentionMask, real: Sequence[Tensor], queries: int) -> AttentionMask:
    """The mask of the main rows, repeated under them for each further view.

    Args:
        mask: the mask of the main rows in any form.
        real: for the main rows and each view, bool [B, kv]: the keys that may be seen.
        queries: how many new tokens each row has.
    """
    rows, keys = real[0].shape
    if not isinstance(mask, dict) and (mask is None or mask.ndim == 2):
        if mask is None and all(bool(one.all()) for one in real):
            return None
        return torch.cat([one.long() for one in real])
    all_real = torch.cat(list(real))

    def stacked(one: Tensor | None) -> Tensor | None:
        if one is None:
            if bool(all_real.all()):
                return None
            one = causal(rows, queries, keys, all_real.device)
        one = one.expand(rows, -1, -1, -1).repeat(len(real), 1, 1, 1)
        # Sliding layers may hold fewer keys than the prompt has: the last ones.
        return hide_keys(one, ~all_real[:, -one.shape[-1] :])

    return map_mask(mask, stacked)


def stack_views(views: Sequence[View]) -> dict[str, Any]:
    """Embeddings, positions and visual places of all views, one under the other, as a language model takes them."""
    stacked: dict[str, Any] = {
        "inputs_embeds": torch.cat([view.embeds for view in views]),
        "position_ids": torch.cat([view.positions for view in views], dim=-2),
    }
    layers = len(views[0].deepstack)
    if layers:
        stacked["visual_pos_masks"] = torch.cat([view.visual for view in views])
        with_pictures = [view.deepstack for view in views if view.deepstack]
        stacked["deepstack_visual_embeds"] = [
            torch.cat([one[layer] for one in with_pictures]) for layer in range(layers)
        ]
    return stacked
