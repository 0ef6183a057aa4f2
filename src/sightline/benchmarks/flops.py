"""What reading a prompt costs a decoder, counted and not measured: multiplications and additions, and bytes of cache.

In: the text config, and for each decoder layer how many tokens it reads (n_l) and how many are left in its cache (c_l).
With d the width, d_q and d_kv those of all queries and of all keys (d_kv < d_q where heads share keys), m that of the
gated feed-forward part, L layers:

    prefill     = sum_l 2 [ n_l (2 d d_q + 2 d d_kv + 3 d m) + 2 n_l^2 d_q ]
    cache bytes = sum_l c_l 2 d_kv * bytes a number

Attention is counted whole, as torch's own counter does it, without leaving out the causal half. The embedding, the
output head (which reads one position), norms and activations are not counted. Nor are the vision tower and the
connector: what a method saves or adds there, or takes to choose, is seen in measured times alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sightline.errors import InputError

if TYPE_CHECKING:
    from sightline.models.call import Call


@dataclass(frozen=True)
class DecoderShape:
    """The widths that decide what a decoder costs."""

    layers: int
    width: int
    query_width: int
    key_width: int
    mlp: int

    @staticmethod
    def of(text_config: Any) -> DecoderShape:
        """Of the text config of a model, such as `Anatomy.text_config`."""
        heads = int(text_config.num_attention_heads)
        head = int(getattr(text_config, "head_dim", None) or text_config.hidden_size // heads)
        return DecoderShape(
            int(text_config.num_hidden_layers),
            int(text_config.hidden_size),
            heads * head,
            int(getattr(text_config, "num_key_value_heads", None) or heads) * head,
            int(text_config.intermediate_size),
        )

    def prefill_flops(self, tokens: int | Sequence[int]) -> int:
        """Of one row: `tokens` in every layer, or in each one its own number."""
        a_token = 2 * self.width * (self.query_width + self.key_width) + 3 * self.width * self.mlp
        return sum(2 * (n * a_token + 2 * n**2 * self.query_width) for n in self._each(tokens))

    def cache_bytes(self, tokens: int | Sequence[int], bytes_a_number: int = 2) -> int:
        """Of one row whose layers keep `tokens`; 2 bytes a number are float16 or bfloat16."""
        return sum(2 * c * self.key_width * bytes_a_number for c in self._each(tokens))

    def _each(self, tokens: int | Sequence[int]) -> Sequence[int]:
        if isinstance(tokens, int):
            return [tokens] * self.layers
        if len(tokens) != self.layers:
            raise InputError(f"a decoder of {self.layers} layers needs as many numbers of tokens, not {len(tokens)}")
        return tokens


@dataclass(frozen=True)
class PromptCost:
    """What reading one row's prompt takes, with all rows that methods put beside it.

    Attributes:
        flops: multiplications and additions of the decoder.
        cache_bytes: of what is in its cache afterwards.
        visual_tokens: tokens besides the prompt's text that a layer reads in the main row, the mean over layers.
    """

    flops: int
    cache_bytes: int
    visual_tokens: float


def stock_cost(shape: DecoderShape, tokens: int, visual: int, bytes_a_number: int = 2) -> PromptCost:
    """A prompt of `tokens` tokens, `visual` of them visual, that the model reads as it is."""
    return PromptCost(shape.prefill_flops(tokens), shape.cache_bytes(tokens, bytes_a_number), visual)


def costs_of(call: Call, shape: DecoderShape, bytes_a_number: int = 2) -> list[PromptCost]:
    """What the prompts of a call took, for each of its rows; padding is left out.

    Where layers read some columns only and the rows of the batch keep different numbers of visual tokens, those that
    keep fewer are counted like the one that keeps most.
    """
    read = _read(call, shape.layers)
    cached = _cached(call, shape.layers)
    text = (_real(call) - call.visual.sum(dim=1)).tolist()
    costs = []
    for row in range(call.rows):
        own_read, own_cached = read[row :: call.rows], cached[row :: call.rows]
        costs.append(
            PromptCost(
                sum(shape.prefill_flops(tokens) for tokens in own_read),
                sum(shape.cache_bytes(tokens, bytes_a_number) for tokens in own_cached),
                sum(own_read[0]) / shape.layers - text[row],
            )
        )
    return costs


def _real(call: Call) -> Tensor:
    """int [B]: tokens of the caller's prompts without padding."""
    if call.mask is None:
        return call.visual.new_full((call.rows,), call.prompt_length, dtype=torch.long)
    return call.mask[:, : call.prompt_length].bool().sum(dim=1)


def _read(call: Call, layers: int) -> list[list[int]]:
    """For the main rows and those of every stream, the tokens that each layer read."""
    if call.rows_real is None:
        return [[tokens] * layers for tokens in _real(call).tolist()]
    real = call.rows_real.sum(dim=1).tolist()
    if call.layer_tokens is None:
        return [[tokens] * layers for tokens in real]
    padding = [call.rows_real.shape[1] - tokens for tokens in real]
    return [
        [min(tokens, max(1, columns - empty)) for columns in call.layer_tokens]
        for tokens, empty in zip(real, padding, strict=True)
    ]


def _cached(call: Call, layers: int) -> list[list[int]]:
    """For the main rows and those of lasting streams, the prompt's tokens in each layer's cache."""
    read = _read(call, layers)
    if not call.real:
        return read
    left = [int(tokens) for real in call.real for tokens in real.sum(dim=1)]
    return [[min(tokens, n) for n in own] for own, tokens in zip(read, left, strict=False)]
