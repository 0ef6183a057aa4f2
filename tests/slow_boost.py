"""Boosted attention written out in loops, in the place of the modelling file's own: what the boosting methods are
tested against. A stock Llava in eager mode runs with it; no part of the library is involved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import families as tiny
import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama


@dataclass
class SlowBoost:
    """What to do in the next forward."""

    factors: Tensor
    """f of each column of the prompt, [rows, columns]"""
    layers: Sequence[int]
    queries: int = 0
    """How many of the last queries are boosted."""
    weigh: Callable[[Tensor], Tensor] | None = None
    """From the attention to the picture of each head [heads] to what f is multiplied by in it [heads]."""
    visual: Tensor | None = None
    """bool [rows, columns], for `weigh`."""
    heads: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """What `weigh` has given, by layer and row."""

    def attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        rows, heads, length, width = query.shape
        keys, layer = key.shape[2], module.layer_idx
        output, weights = torch.zeros(rows, length, heads, width), torch.zeros(rows, heads, length, keys)
        assert attention_mask is not None or length == 1
        columns = self.factors.shape[1]
        for row in range(rows):
            logits = torch.zeros(heads, length, keys)
            for head in range(heads):
                for place in range(length):
                    for_key = key[row, head // module.num_key_value_groups]
                    logits[head, place] = for_key @ query[row, head, place] * scaling
                    if attention_mask is not None:
                        logits[head, place] += attention_mask[row, 0, place]
            if self.weigh is not None and self.visual is not None and (layer, row) not in self.heads:
                at_prompts_end = columns - 1 - (keys - length)
                attention = logits[:, at_prompts_end].softmax(dim=-1)
                self.heads[layer, row] = self.weigh(attention[:, :columns][:, self.visual[row]].sum(dim=1))
            for head in range(heads):
                for place in range(length):
                    z = logits[head, place].clone()
                    if layer in self.layers and place >= length - self.queries:
                        for column in range(columns):
                            f = float(self.factors[row, column])
                            if self.weigh is not None:
                                f *= float(self.heads[layer, row][head])
                            if f:
                                z[column] += f * abs(float(z[column]))
                    weights[row, head, place] = z.softmax(dim=-1)
                    output[row, place, head] = (
                        weights[row, head, place] @ value[row, head // module.num_key_value_groups]
                    )
        return output, weights


@contextmanager
def slowly(model: Any, boost: SlowBoost) -> Iterator[None]:
    """The decoder's attention is that of `boost` inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "eager_attention_forward", boost.attention)
        model.set_attn_implementation("eager")
        try:
            yield
        finally:
            model.set_attn_implementation("sdpa")


def slow_answer(
    model: Any,
    batch: dict[str, Any],
    boost: SlowBoost,
    gamma: float,
    steps: int,
    *,
    boost_prompt: bool,
    use_cache: bool,
) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy decoding of a boosted model, guided away from a second, unboosted reading of the prompts without their
    pictures; the tokens, and the log-probabilities [rows, vocabulary] of each step (not normalised where guided)."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    text = without_picture(ids, mask)
    silent = SlowBoost(boost.factors, ())
    cache, chosen, steps_taken = None, [], []
    for step in range(steps):
        with slowly(model, boost):
            if use_cache and step:
                boost.queries = 1
                out = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache)
            else:
                boost.queries = step + int(boost_prompt)
                out = model(**{**batch, "input_ids": ids, "attention_mask": mask}, use_cache=use_cache)
            cache = out.past_key_values
        logits = out.logits[:, -1].log_softmax(dim=-1)
        if gamma != 1:
            with slowly(model, silent):
                unguided = torch.cat([silent_step(model, one) for one in text])
            plausible = logits >= torch.tensor(0.1).log() + logits.amax(dim=-1, keepdim=True)
            logits = (gamma * logits + (1 - gamma) * unguided).masked_fill(~plausible, -torch.inf)
        steps_taken.append(logits)
        best = logits.argmax(dim=-1)
        chosen.append(best)
        ids = torch.cat([ids, best[:, None]], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        text = [torch.cat([one, best[row : row + 1]]) for row, one in enumerate(text)]
    return torch.stack(chosen, dim=1).tolist(), steps_taken


def without_picture(ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Each prompt's tokens, without padding and without visual tokens."""
    return [one[seen.bool() & (one != tiny.IMAGE)] for one, seen in zip(ids, mask, strict=True)]


def silent_step(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities [1, vocabulary] of what follows."""
    return model(input_ids=ids[None], use_cache=False).logits[:, -1].log_softmax(dim=-1)
