"""Decoder layers that read some of the prompt's columns only.

A pre-hook on a layer gathers the rows of the hidden states that it is to read, and with them positions and mask; the
layer's cache then holds those columns alone. Two forms:

- *for good*: from a layer on, the columns are gone (each later layer reads what is left, or narrows further);
- *bypass*: one layer works on its chosen columns, and its output is scattered back among the others, which pass it by.

The first layer always reads everything: caches say by its length how far a prompt has been read. Columns are those of
the prompt as the decoder reads it; rows keep different sets and stay a rectangle, padded on the left.

Shapes: R rows of all streams, B of the main one, T columns of the prompt, K of a layer, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sightline.errors import InputError
from sightline.models.rows import causal, gather_square, hide_keys

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy
    from sightline.models.boundary import Boundary
    from sightline.models.call import Call


@dataclass(frozen=True)
class Columns:
    """The columns of the prompt that a layer reads."""

    index: Tensor
    """int [R, K], ascending where `real`."""
    real: Tensor
    """bool [R, K]; the others, on the left, only fill the rectangle."""
    visual: Tensor
    """bool [R, K]"""
    padded: bool
    """Whether any is not `real`."""

    def narrowed(self, stays: Tensor) -> tuple[Columns, Tensor]:
        """Those where `stays` (bool [R, K]) is True, and their places [R, K'] among the present ones."""
        stays = stays & self.real
        counts: list[int] = stays.sum(dim=1).tolist()
        longest = max(counts)
        places = stays.int().argsort(dim=1, stable=True)[:, stays.shape[1] - longest :]
        real = stays.gather(1, places)
        visual = self.visual.gather(1, places) & real
        return Columns(self.index.gather(1, places), real, visual, min(counts) < longest), places


@dataclass(frozen=True)
class LayerInput:
    """What goes into a layer that is about to be narrowed."""

    layer: int
    hidden: Tensor
    """[R, K, D]"""
    columns: Columns
    attention: Tensor | None
    """float32 [R, K]: what the layer before gave for the prompt's last token, its heads' mean; None: not watched."""


@dataclass(frozen=True)
class Chosen:
    """A choice at one layer."""

    stays: Tensor
    """bool [R, K]; only what it says of visual columns counts, all others stay."""
    gate: Tensor | None = None
    """[R, K]: in a bypass, the factor of what the layer adds to a visual column; None: 1."""


Choose = Callable[["Call", LayerInput], Chosen]


def check_narrowing(name: str, anatomy: Anatomy, layers: Sequence[int], *, bypass: bool = False) -> None:
    """Raises `InputError` where decoder layers cannot read fewer columns."""
    if slides(anatomy):
        raise InputError(
            f"{name} cannot run on {anatomy.family}: the windows of its sliding layers count what is in the cache, and "
            "would reach further back"
        )
    depth = len(anatomy.layers)
    # Where layers are bypassed, what is added behind them finds all columns in their places again.
    deep = 0 if bypass else len(getattr(anatomy.vision_config, "deepstack_visual_indexes", None) or ())
    for layer in layers:
        if not 1 <= layer < depth:
            raise InputError(f"{name} must act at a layer from 1 to {depth - 1}, not {layer}: layer 0 reads everything")
        if layer < deep:
            raise InputError(
                f"{name} must act at a layer from {deep} on in {anatomy.family}, not {layer}: the ones before add "
                "features to visual tokens"
            )


def slides(anatomy: Anatomy) -> bool:
    """Whether any decoder layer sees the last columns only."""
    config = anatomy.text_config
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # Mistral: all layers, where a window is given
        return getattr(config, "sliding_window", None) is not None
    return any("sliding" in str(kind) for kind in kinds)


def narrow(
    boundary: Boundary, layers: Sequence[int], choose: Choose, *, bypass: bool = False, watch: bool = False
) -> None:
    """Lets `choose` say which visual columns layers read; for `Method.install`.

    Args:
        boundary: the model's.
        layers: where it is asked, ascending, each 1 or more.
        choose: gives a `Chosen` for a `LayerInput`; asked once a prompt and layer.
        bypass: each of these layers alone is narrowed, and what it passed by goes on; else all that follow are, too.
        watch: whether the attention of the layer before each is to be seen.
    """
    narrowing = _Narrowing(boundary, choose, tuple(layers), bypass)
    modules = boundary.anatomy.layers
    for layer in layers if bypass else range(layers[0], len(modules)):
        boundary.hook(modules[layer], narrowing.before(layer), before=True)
        if bypass:
            boundary.hook(modules[layer], narrowing.after)
    if watch:
        for layer in layers:
            boundary.attend(modules[layer - 1], narrowing.watch)


class _Narrowing:
    """What one method does to the layers of one model."""

    def __init__(self, boundary: Boundary, choose: Choose, layers: tuple[int, ...], bypass: bool) -> None:
        self.boundary, self.choose, self.layers, self.bypass = boundary, choose, layers, bypass
        self.attention: Tensor | None = None
        self.shared: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.passing: tuple[Tensor, Tensor, Columns, Tensor | None] | None = None

    # --- The prompt ---

    def before(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call, self.passing = self.boundary.acting, None  # a forward that broke off may have left something
            if call is None:
                return None
            if not call.reading_prompt:
                return args, self._later(call, layer, kwargs)
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            hidden, changed = self._read(call, layer, hidden, kwargs)
            return ((hidden, *args[1:]), changed) if args else ((), {**changed, "hidden_states": hidden})

        return hook

    def _read(self, call: Call, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        columns = self._columns(call, layer, hidden)
        if layer in self.layers:
            stays, gate = self._chosen(call, layer, hidden, columns)
            left, places = columns.narrowed(stays)
            gathered = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
            if self.bypass:
                self.passing = (hidden, places, left, None if gate is None else gate.gather(1, places))
            hidden, columns = gathered, left
        call.memory[self, layer] = columns
        if call.layer_tokens is None:
            assert call.rows_real is not None
            call.layer_tokens = [call.rows_real.shape[1]] * len(self.boundary.anatomy.layers)
        call.layer_tokens[layer] = columns.index.shape[1]
        # Layers that read the same columns are given the same positions and masks: gathered once for all of them.
        source = (columns, *(kwargs.get(name) for name in _GATHERED))
        if self.shared is None or any(old is not new for old, new in zip(self.shared[0], source, strict=True)):
            self.shared = source, self._gathered(call, columns, kwargs)
        changed = {**kwargs, **self.shared[1]}
        if layer == (self.layers[-1] if self.bypass else len(self.boundary.anatomy.layers) - 1):  # the last with a hook
            self.shared = None
        return hidden, changed

    def _columns(self, call: Call, layer: int, hidden: Tensor) -> Columns:
        """What the layer would read if it were not narrowed itself."""
        if not self.bypass and layer > self.layers[0]:
            before: Columns = call.memory[self, layer - 1]
            return before
        assert call.rows_real is not None
        rows, length = call.rows_real.shape
        index = torch.arange(length, device=hidden.device).expand(rows, -1)
        return Columns(index, call.rows_real, torch.cat(call.shown), call.rows_padded)

    def _chosen(self, call: Call, layer: int, hidden: Tensor, columns: Columns) -> tuple[Tensor, Tensor | None]:
        """As `Chosen`; what was chosen for a prompt stays chosen when it is read again, without a cache."""
        known = call.memory.get((self, layer, "chosen"))
        if known is None or len(known.stays) != len(hidden):
            attention, self.attention = self.attention, None
            known = self.choose(call, LayerInput(layer, hidden, columns, attention))
            call.memory[self, layer, "chosen"] = known
        more = hidden.shape[1] - known.stays.shape[1]
        stays = nn.functional.pad(known.stays, (0, more), value=True) | ~columns.visual
        return stays, None if known.gate is None else nn.functional.pad(known.gate, (0, more))

    def _gathered(self, call: Call, columns: Columns, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Positions and mask of the columns."""
        changed: dict[str, Any] = {}
        index = columns.index
        if kwargs.get("position_ids") is not None:
            positions: Tensor = kwargs["position_ids"]
            changed["position_ids"] = _along(positions[..., None], index)[..., 0]
        if kwargs.get("position_embeddings") is not None:
            changed["position_embeddings"] = tuple(_along(one, index) for one in kwargs["position_embeddings"])
        mask: Tensor | None = kwargs.get("attention_mask")
        if mask is None and not columns.padded:
            return changed
        assert call.rows_real is not None
        rows, length = call.rows_real.shape
        mask = causal(rows, length, length, index.device) if mask is None else mask
        changed["attention_mask"] = hide_keys(gather_square(mask, index), ~columns.real)
        return changed

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """What a bypassed layer gave, among the columns that passed it by."""
        passing, self.passing = self.passing, None
        if passing is None:
            return None
        hidden, places, columns, gate = passing
        wide = places[..., None].expand(-1, -1, hidden.shape[-1])
        came = hidden.gather(1, wide)
        if gate is not None:
            scaled = came + gate[..., None].to(output.dtype) * (output - came)
            output = torch.where(columns.visual[..., None], scaled, output)
        return hidden.scatter(1, wide, torch.where(columns.real[..., None], output, came))

    def watch(self, call: Call, attending: Any) -> Any:
        """Notes the attention of the prompt's last token."""
        if call.reading_prompt:
            last = attending.logits(call.new_queries)[:, :, 0]
            self.attention = last.softmax(dim=-1, dtype=torch.float32).mean(dim=1)
        return attending.stock()

    # --- What follows the prompt ---

    def _later(self, call: Call, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The mask of later tokens, cut to the columns that the layer has in its cache."""
        columns: Columns = call.memory[self, layer]
        rows = sum(len(real) for real in call.real)
        index, real = columns.index[:rows], columns.real[:rows]
        mask: Tensor | None = kwargs.get("attention_mask")
        length = call.real[0].shape[1]
        if mask is None:
            if not columns.padded:
                return kwargs
            hidden: Tensor = kwargs["position_embeddings"][0]
            queries = hidden.shape[-2]
            keys = call.seen - call.dropped + queries
            mask = causal(rows, queries, keys, index.device)
        since = torch.arange(length, mask.shape[-1], device=index.device).expand(rows, -1)
        taken = torch.cat([index, since], dim=1)
        mask = mask.expand(rows, -1, -1, -1)
        mask = mask.gather(3, taken[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
        hidden_keys = torch.cat([~real, torch.zeros_like(since, dtype=torch.bool)], dim=1)
        return {**kwargs, "attention_mask": hide_keys(mask, hidden_keys)}


_GATHERED = ("position_ids", "position_embeddings", "attention_mask")
"""What of a layer's arguments goes by columns."""


def _along(values: Tensor, index: Tensor) -> Tensor:
    """[..., R or 1, T, d] at the columns [R, K] -> [..., R, K, d]."""
    rows, length = index.shape
    values = values.expand(*values.shape[:-3], rows, -1, -1)
    return values.gather(-2, index[..., None].expand(*values.shape[:-3], rows, length, values.shape[-1]))
