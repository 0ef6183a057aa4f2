"""A slow, obviously right way of leaving visual tokens out of decoder layers: everything is read, and the keys that are
left out are hidden from every query but their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from families import IMAGE
from torch import Tensor

from sightline.models.anatomy import Anatomy


@contextmanager
def hiding(model: Any, hidden: Mapping[int, Tensor]) -> Iterator[None]:
    """Hides the keys where `hidden[layer]` (bool [B, S]) is True from the queries of that decoder layer.

    Columns behind the S given ones are seen. For forwards without a cache.
    """
    handles = []

    def hook_of(keys: Tensor) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            rows, length = states.shape[:2]
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = torch.ones(length, length, dtype=torch.bool).tril()
            mask = mask.expand(rows, 1, length, length).clone()
            for row in range(rows):
                for key in keys[row].nonzero()[:, 0].tolist():
                    own = mask[row, 0, key, key].clone()
                    mask[row, 0, :, key] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
                    mask[row, 0, key, key] = own
            return args, {**kwargs, "attention_mask": mask}

        return hook

    for layer, keys in hidden.items():
        module = Anatomy.of(model).layers[layer]
        handles.append(module.register_forward_pre_hook(hook_of(keys), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attentions(model: Any, batch: dict[str, Any], hidden: Mapping[int, Tensor] | None = None) -> list[Tensor]:
    """Of every decoder layer the attention weights [B, S, S], mean over heads, of the stock model run eagerly."""
    model.set_attn_implementation("eager")
    try:
        with hiding(model, hidden or {}):
            out = model(**batch, output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation("sdpa")
    return [layer.mean(dim=1) for layer in out.attentions]


@torch.no_grad()
def answer(model: Any, batch: dict[str, Any], hidden: Mapping[int, Tensor], new: int) -> tuple[list[int], Tensor]:
    """Greedy tokens of a row without padding, and their logits [new, vocabulary]; all is read anew for each token."""
    ids, kinds = batch["input_ids"], {name for name in batch if name.endswith("token_type_ids")}
    tokens: list[int] = []
    scores = []
    for _ in range(new):
        longer = torch.cat([ids, torch.tensor([tokens], dtype=ids.dtype)], dim=1)
        step = {**batch, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
        for name in kinds:
            step[name] = torch.nn.functional.pad(batch[name], (0, len(tokens)))
        with hiding(model, hidden):
            scores.append(model(**step, use_cache=False).logits[0, -1])
        tokens.append(int(scores[-1].argmax()))
    return tokens, torch.stack(scores)


def visual(batch: dict[str, Any]) -> Tensor:
    """bool [B, S]"""
    return batch["input_ids"] == IMAGE


def cached(cache: Any) -> list[int]:
    """How many columns each decoder layer has in its cache."""
    return [int(layer.keys.shape[2]) for layer in cache.layers]
