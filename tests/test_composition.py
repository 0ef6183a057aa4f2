"""Methods one after the other: when the order of two of them matters, and when it does not."""

from __future__ import annotations

from itertools import combinations

import families as tiny
import pytest
import torch
from specimens import model_of, specimen
from torch import Tensor

import sightline as sl
from sightline.grounding.contrastive_decoding import ContrastiveDecoding
from sightline.methods import Method, methods

CONTRASTS = tuple(name for name, kind in methods().items() if issubclass(kind, ContrastiveDecoding))
COMPOSING = [both for both in combinations(CONTRASTS, 2) if not specimen(both[0]).claims() & specimen(both[1]).claims()]


def next_logits(*chosen: Method) -> Tensor:
    """Next-token logits [B, vocabulary] of the tiny LLaVA with these methods on it, in this order."""
    model = model_of("llava")
    batch = tiny.inputs("llava", model)
    with sl.attach(model, *chosen), torch.no_grad():
        logits: Tensor = model(**batch).logits[:, -1]
    return logits


def test_mixing_late_layers_in_before_or_after_a_contrast_is_not_the_same() -> None:
    """Vista's votes of late layers replace the share gamma of whatever the logits are when their turn comes."""
    gamma, alpha = 0.4, 2.0
    vista, ritual = sl.Vista(gamma=gamma), sl.Ritual(alpha=alpha, beta=0.0)
    before, after = next_logits(vista, ritual), next_logits(ritual, vista)
    # First vista: (1 - gamma) l + gamma late + alpha b; first ritual: (1 - gamma) (l + alpha b) + gamma late.
    plain = sl.Vista(gamma=0.0)
    branch = next_logits(plain, sl.Ritual(alpha=1.0, beta=0.0)) - next_logits(plain)
    torch.testing.assert_close(before - after, gamma * alpha * branch, atol=1e-4, rtol=0)
    assert (before - after).abs().max() > 0.1


@pytest.mark.parametrize(("first", "second"), COMPOSING)
def test_contrasts_give_the_same_in_either_order(first: str, second: str) -> None:
    """Each adds what it takes from the model's own logits, and rules out what those make implausible."""
    one, other = specimen(first), specimen(second)
    forth, back = next_logits(one, other), next_logits(other, one)
    assert torch.equal(forth.isneginf(), back.isneginf())
    finite = ~forth.isneginf()
    torch.testing.assert_close(forth[finite], back[finite], atol=1e-4, rtol=1e-4)
    alone = next_logits(one)
    assert not torch.allclose(alone.clamp(min=-99), forth.clamp(min=-99))
