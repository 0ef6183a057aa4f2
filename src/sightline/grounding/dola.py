"""DoLa: the last layer against the early one that differs from it most (Chuang et al., ICLR 2024, arXiv:2309.03883).

A peer: not one of the surveyed vision papers but a widely used text method, here as a yardstick for them. It looks at
no picture; still, the rows of a batch that have none are answered by the stock model, as with every method here.

In: next-token logits l [V] of the model, the hidden states h_j [D] at the last position (h_0 the embeddings, h_j the
output of layer j, counted from 1), a set J of candidate ("premature") layers. Out: logits [V].

    q_j = softmax(head(h_j)),   q_N = softmax(l),   j* = argmax over J of JSD(q_N, q_j),   anew for each row and token
    l'  = log q_N - strength * log q_j*   where q_N >= relative_top * max q_N,   -inf elsewhere

The paper has strength = 1. Other methods' logits take the place of l in l', but never in q_N.

As in the paper, in the official code (voidism/DoLa, its `modeling_llama.py`) and in the `dola_layers` that transformers
once had, the head reads h_j without the final norm; `lens_norm=True` puts it in between, which makes q_j sharper. Those
two codes choose j* by KL(M || q_N) + KL(M || q_j), M the mean of both distributions, instead of the paper's
JSD = (KL(q_N || M) + KL(q_j || M)) / 2: `divergence="reverse"`. They choose one layer for a whole batch, here each row
has its own, so that an answer does not depend on the batch it is in. Scores of multiple choices, where the official
code writes -1000 in place of -inf and takes one more softmax, are not part of this.

Candidates, as transformers had them for a decoder of N layers: `low` is 0, 2, 4, ... below N/2, `high` is N/2, N/2 + 2,
... below N; of more than 40 layers the first or the last 20. Where the embeddings are also the head, layer 0 would only
echo the token just read, and `low` starts at 2 (at N - 1 if N is smaller than 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor

from sightline.errors import InputError, unknown
from sightline.grounding.contrastive_decoding import implausible
from sightline.methods import Method, in_range, register

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy
    from sightline.models.boundary import Boundary
    from sightline.models.call import Call


@register
@dataclass(frozen=True)
class Dola(Method):
    """Takes off the log-probabilities of the early layer whose vote differs most from the last one's.

    Args:
        strength: weight of the early layer, in [0, 10]; 1 is the paper's, 0 the stock model (without the restriction to
            plausible tokens too).
        bucket: candidates from the `low` or the `high` half of the decoder. The official runs have `high` for short
            answers, `low` for reasoning and long ones.
        layers: these candidates in place of the bucket, from 0 (the embeddings) to one less than there are layers. A
            single one is the paper's DoLa-static.
        relative_top: share of the likeliest token's probability that a token needs, in [0, 1]; 0 lets all through.
        divergence: `js`, as the paper writes it, or `reverse`, as the codes compute it.
        lens_norm: apply the final norm to the early layers before the head.
    """

    paper: ClassVar[str] = "dola"
    changes: ClassVar[frozenset[str]] = frozenset({"how late layers vote on the next token"})
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("strength", (0.1, 0.25, 0.5, 0.75, 1.0, 1.5))

    strength: float = 1.0
    bucket: Literal["low", "high"] = "high"
    layers: tuple[int, ...] | None = None
    relative_top: float = 0.1
    divergence: Literal["js", "reverse"] = "js"
    lens_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "strength", 0, 10)
        in_range(self, "relative_top", 0, 1)
        for name, allowed in (("bucket", ("low", "high")), ("divergence", ("js", "reverse"))):
            if getattr(self, name) not in allowed:
                raise unknown(f"{name} of dola", str(getattr(self, name)), allowed)
        if self.layers is None:
            return
        numbers = isinstance(self.layers, tuple) and all(type(layer) is int and layer >= 0 for layer in self.layers)
        if not numbers or not self.layers or len(set(self.layers)) < len(self.layers):
            raise InputError(
                "layers of dola must be None or a tuple of different whole numbers from 0 (the embeddings), such as "
                f"(0, 2, 4), not {self.layers!r}"
            )

    @property
    def is_identity(self) -> bool:
        return self.strength == 0

    def identity(self) -> Self:
        return replace(self, strength=0.0)

    def candidates(self, depth: int, *, tied: bool = False) -> list[int]:
        """The candidate layers in a decoder of `depth` layers, `tied`: whose head is the embeddings' matrix."""
        if self.layers is not None:
            return sorted(self.layers)
        half = depth // 2 if depth <= 40 else 20
        if self.bucket == "high":
            return list(range(depth - half if depth > 40 else half, depth, 2))
        start = min(2, depth - 1) if tied else 0
        return list(range(start, half, 2)) or [start]

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        depth = len(anatomy.layers)
        if self.layers is not None and max(self.layers) >= depth:
            raise InputError(
                f"layers of dola must lie in [0, {depth - 1}] for a decoder of {depth} layers, not {max(self.layers)}"
            )

    def install(self, boundary: Boundary) -> None:
        anatomy = boundary.anatomy
        tied = getattr(anatomy.head, "weight", None) is anatomy.model.get_input_embeddings().weight
        for layer in self.candidates(len(anatomy.layers), tied=tied):
            if layer == 0:
                boundary.before(anatomy.layers[0], self._read(0))
            else:
                boundary.after(anatomy.layers[layer - 1], self._read(layer))

    def _read(self, layer: int) -> Callable[[Call, Tensor], None]:
        def read(call: Call, hidden: Tensor) -> None:
            call.memory.setdefault((self, "early layers"), {})[layer] = hidden[: call.rows, -1]

        return read

    def logits(self, call: Call, logits: Tensor) -> Tensor:
        anatomy, own = call.boundary.anatomy, call.own_logits
        assert own is not None
        early = torch.stack(list(call.memory[self, "early layers"].values()))  # [candidates, B, D]
        if self.lens_norm:
            early = anatomy.final_norm(early)
        return self.contrast(logits, own, anatomy.head_logits(early))

    def contrast(self, logits: Tensor, own: Tensor, early: Tensor) -> Tensor:
        """The new next-token logits.

        Args:
            logits: [B, V], as the methods before this one have left them.
            own: [B, V], the model's own.
            early: [candidates, B, V]
        """
        wide = own.float()
        total = wide.logsumexp(dim=-1, keepdim=True)
        early = early.float().log_softmax(dim=-1)
        best = self.distances(wide - total, early).argmax(dim=0)  # [B]
        chosen = early[best, torch.arange(len(best), device=best.device)]
        changed = torch.add(logits.float() - total, chosen, alpha=-self.strength)
        return changed.masked_fill(implausible(own, self.relative_top), -math.inf)

    def distances(self, mature: Tensor, early: Tensor) -> Tensor:
        """How far each candidate's distribution is from the last layer's. Log-probabilities [B, V] and [candidates, B,
        V] -> [candidates, B]."""
        middle = torch.logaddexp(mature, early) - math.log(2)
        if self.divergence == "reverse":
            return (middle.exp() * (middle - (mature + early) / 2)).sum(dim=-1)
        own, other = (x.exp() * (x - middle) for x in (mature, early))
        return (own + other).sum(dim=-1) / 2
