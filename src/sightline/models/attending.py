"""The attention of decoder layers, computed in another way while methods are attached.

`transformers` looks the attention function up by the name in the config. `AttentionSwitch` puts a name there that leads
here; a module that `replace_attention` knows is computed by its replacement, every other as before.

Shapes: R rows, H query heads, G key/value heads, q queries, k keys, d head width.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sightline.errors import InputError

Attended = tuple[Tensor, Tensor | None]
"""Head outputs [R, q, H, d], and the weights [R, H, q, k] where the model's own function gives them."""

PREFIX = "sightline_"
_CHANGES: weakref.WeakKeyDictionary[nn.Module, Callable[[Attending], Attended]] = weakref.WeakKeyDictionary()


@dataclass(slots=True)  # made for every layer and token: a frozen one takes three times as long to make
class Attending:
    """One call of a layer's attention: what goes in, and what the model's own function would give."""

    module: Any
    query: Tensor
    """[R, H, q, d], turned to its positions."""
    key: Tensor
    """[R, G, k, d], all that is in the cache."""
    value: Tensor
    """[R, G, k, d]"""
    mask: Tensor | None
    """4-D, bool (True may be seen) or additive; None: causal."""
    scaling: float
    options: dict[str, Any]
    own: Callable[..., Attended]
    shows_weights: bool
    """Whether the model's own function gives its weights too (eager)."""
    before: Callable[[Attending], Attended] | None = None

    def stock(self) -> Attended:
        """As it would be without this change: the model's own, or what another change makes of it."""
        if self.before is not None:
            return self.before(replace(self, before=None))
        return self.own(self.module, self.query, self.key, self.value, self.mask, scaling=self.scaling, **self.options)

    def logits(self, queries: int | None = None) -> Tensor:
        """Attention logits [R, H, q, k] of the last `queries` queries (all by default), masked, in the dtype of the
        queries."""
        return self.masked(self.unmasked(queries))

    def unmasked(self, queries: int | None = None) -> Tensor:
        """`logits` before keys are hidden from queries: what is done to these cannot bring a hidden key back."""
        query = self.query
        if queries is not None and queries < query.shape[2]:
            query = query[:, :, -queries:]
        rows, heads, length, width = query.shape
        groups, keys = self.key.shape[1:3]
        # On three dimensions, as the products of four cost twice as much where they are small, and scaled on the way.
        grouped = query.reshape(rows * groups, heads // groups * length, width)
        key = self.key.reshape(rows * groups, keys, width)
        unused = _nothing(grouped.dtype, grouped.device)
        product = torch.baddbmm(unused, grouped, key.mT, beta=0, alpha=self.scaling)
        logits = product.view(rows, heads, length, keys)
        softcap = self.options.get("softcap")
        return logits if softcap is None else (logits / softcap).tanh() * softcap

    def masked(self, logits: Tensor) -> Tensor:
        """Logits [R, H, n, k] of the last n queries, with the lowest number where a key is hidden."""
        length, keys = logits.shape[2:]
        if self.mask is None and length == 1:
            return logits
        lowest = torch.finfo(logits.dtype).min
        if self.mask is None:
            causal = torch.ones(length, keys, dtype=torch.bool, device=logits.device).tril(keys - length)
            return logits.masked_fill(~causal, lowest)
        mask = self.mask[:, :, -length:, :keys]
        # An additive mask holds the lowest number already, and in float16 a sum with it would leave the range.
        return logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else (logits + mask).clamp_min(lowest)

    def weights(self) -> Tensor:
        """Attention weights, float32 [R, H, q, k]."""
        return self.logits().softmax(dim=-1, dtype=torch.float32)

    def outputs(self, weights: Tensor) -> Tensor:
        """Weights [R, H, q, k] over the values -> head outputs [R, q, H, d]."""
        rows, heads, length, keys = weights.shape
        groups, width = self.value.shape[1], self.value.shape[-1]
        grouped = weights.reshape(rows * groups, heads // groups * length, keys).to(self.value.dtype)
        outputs = torch.bmm(grouped, self.value.reshape(rows * groups, keys, width))
        return outputs.view(rows, heads, length, width).transpose(1, 2)

    def with_last(self, logits: Tensor) -> Attended:
        """As it would be without this change, but with other logits [R, H, n, k] for the last n queries."""
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
        last, length = self.outputs(weights), logits.shape[2]
        if length == self.query.shape[2]:
            return last, weights.to(logits.dtype) if self.shows_weights else None
        output, all_weights = self.stock()
        output = torch.cat([output[:, :-length], last], dim=1)
        if all_weights is not None:
            all_weights = torch.cat([all_weights[:, :, :-length], weights.to(all_weights.dtype)], dim=2)
        return output, all_weights


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a product that adds to something is given when there is nothing to add to."""
    return torch.zeros(1, 1, 1, dtype=dtype, device=device)


class AttentionSwitch:
    """Leads the attention of the modules that share a config through this module, until `back`."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.before = str(config._attn_implementation)
        own = self.before.removeprefix(PREFIX)
        if own not in ("sdpa", "eager"):
            raise InputError(
                f"the attention logits cannot be reached in {own!r}; load the model with attn_implementation='sdpa' or "
                "'eager'"
            )
        self.name = PREFIX + own
        config._attn_implementation = self.name

    def check(self) -> None:
        """Raises InputError when somebody has changed the implementation in the meantime."""
        if self.config._attn_implementation != self.name:
            raise InputError(
                "the attention implementation was changed while methods were attached that work inside it; change it "
                "before attaching"
            )

    def back(self) -> None:
        """As it was, unless somebody has changed it in the meantime."""
        if self.config._attn_implementation == self.name:
            self.config._attn_implementation = self.before


def replace_attention(module: nn.Module, change: Callable[[Attending], Attended]) -> Callable[[], None]:
    """Has the attention of one module computed by `change`, which finds in `stock` what replaced it before; gives back
    the undoing. What was replaced last has to be undone first."""
    before = _CHANGES.get(module)
    _CHANGES[module] = change if before is None else lambda attending: change(replace(attending, before=before))

    def undo() -> None:
        if before is None:
            _CHANGES.pop(module, None)
        else:
            _CHANGES[module] = before

    return undo


def _led(name: str) -> Callable[..., Attended]:
    """The attention function that `AttentionSwitch` puts in the place of `name`."""

    shows_weights = name == "eager"

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Attended:
        # Each modelling file has an eager function of its own.
        own = (
            sys.modules[type(module).__module__].eager_attention_forward
            if name == "eager"
            else ALL_ATTENTION_FUNCTIONS[name]
        )
        change = _CHANGES.get(module)
        if change is None:
            attended: Attended = own(module, query, key, value, attention_mask, **options)
            return attended
        scaling = options.pop("scaling")
        return change(Attending(module, query, key, value, attention_mask, scaling, options, own, shows_weights))

    return attention


for _name in ("sdpa", "eager"):
    AttentionInterface.register(PREFIX + _name, _led(_name))
    AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])
