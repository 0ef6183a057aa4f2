"""SimVLG: merge similar visual tokens a little at a time (Jian et al., arXiv:2310.03291; ACL 2024 as EVLGen).

The paper replaces BLIP-2's two stages of pretraining by one, in which a small BERT encoder, the TomeFormer, merges the
r most similar pairs of tokens in each of its layers. `SimVLG` is what can be had of that without training: the same
matching and the same plain means, on the output of a stock model's connector.

In: the connector's output of one image, [n, D]. Out: K = keep * n tokens, each the mean of what was merged into it, at
the place of the first of them. In step l = 1, 2, ...

    n_l = n_{l-1} - min(r, n_{l-1} // 2),     r = ceil((n - K) / layers),     until K are left

pairs are found by bipartite soft matching (`merging.py`). BERT's key vectors, which the paper matches by, do not exist
here: tokens are compared by the cosine of the features themselves. The many newline tokens of tiled images are all
alike, and so are among the first to merge. What Qwen3-VL adds in its first decoder layers stays that of the place.

`TomeFormer` and `TemporalMerging` are the paper's own modules, for training such models (yiren-jian/EVLGen,
`modeling_bert.py`, `eva_vit_g.py`). The means are plain, not weighted by how many patches a token holds, and attention
does not know of these numbers, unlike in ToMe. Like the official encoder, TomeFormer takes no padded sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sightline.methods import in_range, register
from sightline.reduction.merging import Matching, bipartite_soft_matching
from sightline.reduction.token_reducer import ImageTokens, TokenReducer


@register
@dataclass(frozen=True)
class SimVLG(TokenReducer):
    """Merges the most similar visual tokens, some in each of several steps.

    Args:
        keep: share of each image's visual tokens that is left, in (0, 1]; at least one token. The paper's encoder
            leaves 29 of 257: 0.11.
        positions: as in `TokenReducer`.
        layers: in how many steps they are merged, 1 or more; more where half of the tokens a step are too few. The
            paper's encoder has 12 layers.
    """

    paper: ClassVar[str] = "simvlg"

    layers: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "layers", 1, 1000, whole=True)

    def reduce(self, image: ImageTokens) -> tuple[Tensor, Tensor | None]:
        tokens = image.features[None].float()
        n = tokens.shape[1]
        budget = self.budget(n)
        r = math.ceil((n - budget) / self.layers)
        where = Matching(torch.arange(n, device=tokens.device)[None], n)
        while where.left > budget:
            step = bipartite_soft_matching(tokens, min(r, where.left - budget))
            tokens, where = step.merge(tokens), where.followed_by(step)
        first, order = by_first_place(where)
        keep = torch.zeros(n, dtype=torch.bool, device=tokens.device).index_fill(0, first[order], True)
        return keep, tokens[0, order].to(image.features.dtype)


def by_first_place(matching: Matching) -> tuple[Tensor, Tensor]:
    """Of the tokens that are left of one row: int [n - r], the first place among the n that each holds, and the order
    of the tokens by it."""
    where = matching.where[0]
    places = torch.arange(len(where), device=where.device)
    first = torch.full_like(places[: matching.left], len(where)).scatter_reduce(0, where, places, "amin")
    return first, first.argsort()


class TomeLayer(nn.Module):
    """A layer of BERT (norms after the sums) that merges tokens between attention and feed-forward.

    Args:
        width: of the tokens.
        heads: of the attention.
        r: how many tokens to merge away; the first one is left as it is.
        mlp: width of the feed-forward part.
        dropout: in both parts.
    """

    def __init__(self, width: int, heads: int, r: int, mlp: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.r = heads, r
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attention_output, self.attention_norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
        self.intermediate, self.output = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.output_norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, n, width] -> [B, n - min(r, (n - 1) // 2), width]."""
        query, key, value = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        dropout = self.dropout.p if self.training else 0.0
        heads = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        attended = self.attention_output(heads.transpose(1, 2).flatten(2))
        tokens = self.attention_norm(tokens + self.dropout(attended))
        if self.r > 0:
            tokens = bipartite_soft_matching(key.mean(dim=1), self.r, protect_first=True).merge(tokens)
        forward = self.output(functional.gelu(self.intermediate(tokens)))
        merged: Tensor = self.output_norm(tokens + self.dropout(forward))
        return merged


class TomeFormer(nn.Module):
    """The paper's connector: the tower's tokens, [CLS] first, to the embeddings of a prefix for the language model.

    Args:
        tower_width: width of the tower's tokens.
        language_width: width of the language model.
        tokens: how many tokens of the tower there are at most.
        width: of the encoder, as `heads`, `layers` and `mlp` that of BERT base.
        r: how many tokens each layer merges away; 0 is a plain encoder.
        dropout: as in BERT.
    """

    def __init__(
        self,
        tower_width: int,
        language_width: int,
        *,
        tokens: int = 257,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        mlp: int = 3072,
        r: int = 19,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.tower_norm = nn.LayerNorm(tower_width)
        self.widen = nn.Linear(tower_width, width)
        self.positions = nn.Parameter(torch.zeros(tokens, width))
        self.token_type = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.token_type, std=0.02)
        self.norm, self.dropout = nn.LayerNorm(width, eps=1e-12), nn.Dropout(dropout)
        self.layers = nn.ModuleList(TomeLayer(width, heads, r, mlp, dropout) for _ in range(layers))
        self.narrow = nn.Linear(width, language_width)

    def forward(self, seen: Tensor) -> Tensor:
        """[B, n, tower_width] -> [B, n_L, language_width], where n_l = n_{l-1} - min(r, (n_{l-1} - 1) // 2)."""
        tokens = self.widen(self.tower_norm(seen)) + self.positions[: seen.shape[1]] + self.token_type
        tokens = self.dropout(self.norm(tokens))
        for layer in self.layers:
            tokens = layer(tokens)
        prefix: Tensor = self.narrow(tokens)
        return prefix


class TemporalMerging(nn.Module):
    """The paper's attention over the frames of a film at one place, put between attention and feed-forward of each
    block of a frozen tower; the frames are averaged after the tower. It begins as the identity.

        out = x + a * softmax(q k^T / sqrt(hidden)) x,    a = 0 at first

    q and k are of width `hidden`, cut into heads but scaled by the full width, as in the official code; the values are
    the input itself, cut into as many. Of one frame it gives (1 + a) x.

    Args:
        width: of the tower's tokens.
        hidden: of queries and keys.
        heads: must divide both.
    """

    def __init__(self, width: int, hidden: int = 256, heads: int = 8) -> None:
        super().__init__()
        self.heads, self.scale = heads, hidden**-0.5
        self.query, self.key = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.a = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor, frames: int) -> Tensor:
        """[films * frames, n, width], the frames of a film one after the other -> the same shape."""
        films = tokens.unflatten(0, (-1, frames)).transpose(1, 2)  # [films, n, frames, width]
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for part in (self.query(films), self.key(films), films)
        )
        weights = (query @ key.transpose(-1, -2) * self.scale).softmax(dim=-1)
        mixed = (weights @ value).transpose(-2, -3).flatten(-2)
        return tokens + self.a * mixed.transpose(1, 2).flatten(0, 1)
