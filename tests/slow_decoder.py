"""A Llama decoder written out token by token and head by head, for one row without padding, and without a cache.

`SlowDecoder` is the reference of the tests of methods that act inside the decoder: it calls none of the model's
modules, and only reads their weights. `slow_answer` is that of methods that combine the logits of two views.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SlowDecoder:
    """The decoder of a tiny Llava, layer by layer. Hidden states are [T, D] of one row."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.text = model.config.text_config
        self.layers = model.model.language_model.layers
        self.depth = len(self.layers)

    def prompt(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The embeddings of a prompt of one row with its picture, [S, D], and bool [S]: which of them are visual."""
        ids = batch["input_ids"][0]
        visual = ids == self.model.config.image_token_id
        embeds = self.embed(ids.tolist())
        if visual.any():
            encoded = self.model.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
            embeds[visual] = torch.cat(list(encoded))
        return embeds, visual

    def embed(self, ids: list[int]) -> Tensor:
        return self.model.get_input_embeddings().weight[ids].clone()

    def norm(self, weight: Tensor, x: Tensor) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + self.text.rms_norm_eps).sqrt() * weight

    def rotated(self, x: Tensor, positions: list[int]) -> Tensor:
        """Rotary positions: coordinates i and i + d/2 are a complex number, turned by position / theta^(2 i / d)."""
        half = x.shape[1] // 2
        theta = self.text.rope_parameters["rope_theta"]
        angles = torch.tensor([[p * theta ** (-2 * i / x.shape[1]) for i in range(half)] for p in positions])
        turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=1)

    def heads(self, layer: int, x: Tensor, positions: list[int] | None = None) -> Tensor:
        """What each head gives before the output projection: [T, heads, head_dim]."""
        positions = list(range(len(x))) if positions is None else positions
        attention = self.layers[layer].self_attn
        heads, groups, width = self.text.num_attention_heads, self.text.num_key_value_heads, attention.head_dim
        x = self.norm(self.layers[layer].input_layernorm.weight, x)
        outputs = torch.zeros(len(x), heads, width)
        for head in range(heads):
            group = head // (heads // groups)
            rows, shared = slice(head * width, (head + 1) * width), slice(group * width, (group + 1) * width)
            query = self.rotated(x @ attention.q_proj.weight[rows].T, positions)
            key = self.rotated(x @ attention.k_proj.weight[shared].T, positions)
            value = x @ attention.v_proj.weight[shared].T
            for now in range(len(x)):
                weights = torch.softmax(key[: now + 1] @ query[now] / math.sqrt(width), dim=0)
                outputs[now, head] = weights @ value[: now + 1]
        return outputs

    def after_attention(self, layer: int, x: Tensor, heads: Tensor) -> Tensor:
        """The residual stream [T, D] once the heads have been projected and added."""
        return x + heads.flatten(1) @ self.layers[layer].self_attn.o_proj.weight.T

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """What the feed-forward part adds, [T, D]."""
        part = self.layers[layer].mlp
        x = self.norm(self.layers[layer].post_attention_layernorm.weight, x)
        gate = x @ part.gate_proj.weight.T
        return (gate * torch.sigmoid(gate) * (x @ part.up_proj.weight.T)) @ part.down_proj.weight.T

    def logits(self, x: Tensor) -> Tensor:
        """Last layer's output at one position [D] -> logits [V]."""
        return self.norm(self.model.model.language_model.norm.weight, x) @ self.model.lm_head.weight.T

    def bare_logits(self, x: Tensor) -> Tensor:
        """The head alone, without the final norm."""
        return x @ self.model.lm_head.weight.T


def slow_sum(own: list[float], branch: list[float], alpha: float, beta: float, normalise: bool = False) -> list[float]:
    """One row of own + alpha branch; what is plausible is told by probabilities."""
    summed = [(x + alpha * y) / (1 + alpha if normalise else 1) for x, y in zip(own, branch, strict=True)]
    return [x if plausible else -math.inf for x, plausible in zip(summed, _plausible(own, beta), strict=True)]


def slow_contrast(own: list[float], branch: list[float], alpha: float, beta: float) -> list[float]:
    """One row of (1 + alpha) own - alpha branch, the same."""
    contrast = [(1 + alpha) * x - alpha * y for x, y in zip(own, branch, strict=True)]
    return [x if plausible else -math.inf for x, plausible in zip(contrast, _plausible(own, beta), strict=True)]


def _plausible(own: list[float], beta: float) -> list[bool]:
    total = sum(math.exp(x) for x in own)
    probabilities = [math.exp(x) / total for x in own]
    return [p >= beta * max(probabilities) for p in probabilities]


Combine = Callable[[list[float], list[float]], list[float]]


def slow_answer(
    model: Any, batch: dict[str, Any], other: Tensor, combine: Combine, tokens: int
) -> tuple[Tensor, list[list[list[float]]]]:
    """Greedy decoding from two views of a prompt, the second with the pixels `other`: the stock model reads both anew
    for every token, and `combine` makes one row's logits of the two. With each step's logits."""
    mask = batch["attention_mask"]
    ids, steps = batch["input_ids"], []
    for _ in range(tokens):
        new = torch.ones_like(ids[:, mask.shape[1] :])
        seen = {**batch, "input_ids": ids, "attention_mask": torch.cat([mask, new], dim=1)}
        own = model(**seen, use_cache=False).logits[:, -1].tolist()
        branch = model(**{**seen, "pixel_values": other}, use_cache=False).logits[:, -1].tolist()
        steps.append([combine(one, two) for one, two in zip(own, branch, strict=True)])
        best = [[max(range(len(row)), key=row.__getitem__)] for row in steps[-1]]
        ids = torch.cat([ids, torch.tensor(best)], dim=1)
    return ids[:, mask.shape[1] :], steps
