"""B-VLLM: the question selects frames, and what is said of each (2024, arXiv:2412.09919).

In: T frames of the tower's patches F [T, n, C] and the question. Out: k * q' <= `selected` * `queries` tokens of width
D, whatever T. A Q-Former (InstructBLIP's) has learned queries, which attend to themselves and to the question's tokens,
and in every second layer to what is seen.

    c = the tower's [CLS] vectors                     [T, C]: one a frame; else the means of F over patches
    U = Linear(QFormer_t(K queries, question; c))     [K, C], K = `selected`
    S = softmax((U c^T / sqrt(C) + noise) / tau)      [K, T], `noise` Gumbel's or none
    G = S LayerNorm(F)                                [K, n, C]: frames as they are selected
    rows i whose largest (cos(S_i, S_j) + 1) / 2 over j < i is above `merge_threshold` are merged into row j; k are left
    Z = QFormer_s(`queries` queries, question; G_row) [k, queries, width]
    q' = min(`queries`, max(1, floor(b / k * `queries`))), b = n // `queries`: Z merged down to so many, by
         bipartite matching
    tokens = Linear(Linear(Z))                        [k, q', D], flattened

c holds no time: the frames are a set, and the tokens stand in the order of the queries, or, with `order="time"`, in
that of the frame that each row selects most.

In the official code (zhuqiangLu/B-VLLM) rows are merged in one pass: with 2 merged into 1 and 1 into 0, row 2 is lost
(`chain="drop"`). Here a row goes to where the chain ends (`chain="root"`). There the Gumbel noise is on at inference
too, so that two answers to one question differ; here it is on in training (`noise="training"`). There the question is
read by BERT's tokenizer and embeddings; here by the decoder's. There short clips are padded with black frames, which
can be selected; here they are not padded.

Most of c is the same in all frames of a film, and falls out of the softmax; what is left is small, so that a selection
that has not learned is flat, and its rows are one mean frame. `centred`, not the paper's, shows it c - mean of c over T
at the size of c: its rows differ from the start.

The paper's Q-Formers begin with InstructBLIP's weights, which had learned from BLIP-2's, and those to see pictures
without a text. What begins with no weights takes the same way: trained first with `qformer_text_input=False`, where a
picture's questions share a row, and then, from those weights, with the question.

The selection is computed in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.errors import InputError, unknown
from sightline.methods import in_range, register
from sightline.models.anatomy import TowerReading
from sightline.reduction.frame_reducer import FrameReducer, Frames, centred
from sightline.reduction.merging import bipartite_soft_matching

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy

FrameVector = Literal["cls", "mean"]
Chain = Literal["root", "drop"]
Noise = Literal["training", "always", "never"]
Order = Literal["query", "time"]

LONGEST_QUESTION = 256
"""Tokens of the question that are read: the last ones."""
CLS_VECTOR = "cls_vector"


class ClsVector(TowerReading):
    """The [CLS] token's hidden state [pictures, C] as a layer of the tower is given it."""

    def row(self, hidden_states: Tensor, visible: Tensor | None = None) -> Tensor:
        return hidden_states[:, 0]


def cls_vector(anatomy: Anatomy) -> ClsVector | None:
    """The reading of [CLS] after the layer whose output the connector reads; None where the tower has no [CLS], or no
    layer comes after that one."""
    layer, attentions = anatomy.connected_layer, anatomy.tower_attentions
    if layer is None or anatomy.leading_tokens == 0 or layer + 1 >= len(attentions):
        return None
    following = attentions[layer + 1]
    return ClsVector(next(one for one in anatomy.vision_tower.modules() if following in one.children()))


class QFormerLayer(nn.Module):
    """A layer of BERT over queries and text together, in which the queries, if it `looks`, attend to what is seen; each
    of the two has feed-forward weights of its own. Norms come after the sums."""

    def __init__(self, width: int, heads: int, seen_width: int, *, looks: bool) -> None:
        super().__init__()
        self.together = nn.MultiheadAttention(width, heads, batch_first=True)
        self.together_norm = nn.LayerNorm(width)
        self.look: nn.MultiheadAttention | None = None
        if looks:
            self.look = nn.MultiheadAttention(width, heads, kdim=seen_width, vdim=seen_width, batch_first=True)
            self.look_norm = nn.LayerNorm(width)
        self.forward_queries, self.forward_text = _feed_forward(width), _feed_forward(width)
        self.queries_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, queries: Tensor, text: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([queries, text], dim=1)
        x = self.together_norm(x + self.together(x, x, x, need_weights=False)[0])
        queries, text = x.split([queries.shape[1], text.shape[1]], dim=1)
        if self.look is not None:
            queries = self.look_norm(queries + self.look(queries, seen, seen, need_weights=False)[0])
        queries = self.queries_norm(queries + self.forward_queries(queries))
        return queries, self.text_norm(text + self.forward_text(text))


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class QFormer(nn.Module):
    """Learned queries that read a question and what is seen.

    Args:
        queries: how many.
        width: of the queries.
        layers: the first one looks, and every second one after it.
        heads: of each attention.
        text_width: D of the question's tokens.
        seen_width: C of what is seen.
    """

    def __init__(self, queries: int, *, width: int, layers: int, heads: int, text_width: int, seen_width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, queries, width) * 0.02)
        self.read = nn.Linear(text_width, width)
        self.queries_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            QFormerLayer(width, heads, seen_width, looks=index % 2 == 0) for index in range(layers)
        )

    def forward(self, question: Tensor, seen: Tensor) -> Tensor:
        """Question [L, D] and B times what is seen [B, n, C] -> [B, queries, width]."""
        text = self.read(question[-LONGEST_QUESTION:])
        text = F.layer_norm(text, text.shape[-1:])  # as large as the places, which would drown words of another size
        text = self.text_norm(text + _places(*text.shape).to(text)).expand(len(seen), -1, -1)
        queries = self.queries_norm(self.queries).expand(len(seen), -1, -1)
        for layer in self.layers:
            queries, text = layer(queries, text, seen)
        return queries


def _places(length: int, width: int) -> Tensor:
    """Sines and cosines of the places of a question's tokens [L, width]."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


class BalancedSampler(nn.Module):
    """The weights of B-VLLM: both Q-Formers, their heads, and the map into the decoder."""

    def __init__(
        self,
        selected: int,
        queries: int,
        *,
        width: int,
        layers: int,
        heads: int,
        vector_width: int,
        seen_width: int,
        text_width: int,
    ) -> None:
        super().__init__()
        sizes = dict(width=width, layers=layers, heads=heads, text_width=text_width)
        self.temporal = QFormer(selected, seen_width=vector_width, **sizes)
        self.temporal_head = nn.Linear(width, vector_width)
        self.frame_norm = nn.LayerNorm(seen_width)
        self.spatial = QFormer(queries, seen_width=seen_width, **sizes)
        self.spatial_head = nn.Linear(width, seen_width)
        self.projector = nn.Linear(seen_width, text_width)

    def affinity(self, question: Tensor, vectors: Tensor) -> Tensor:
        """U c^T / sqrt(C): what each query thinks of each frame, [K, T] of vectors [T, C]."""
        wanted = self.temporal_head(self.temporal(question, vectors[None])[0])
        return wanted @ vectors.T * vectors.shape[1] ** -0.5


@register
@dataclass(frozen=True)
class BVllm(FrameReducer):
    """Gives the decoder a bounded number of visual tokens of a clip of any length, chosen by the question.

    Args:
        selected: K, frames that are selected: the paper's 16. 0 leaves the method off.
        queries: tokens of each: the paper's 32.
        merge_threshold: similarity of two selections above which they become one, in [0, 1]; 1 merges none. The
            paper's 0.75.
        temperature: tau of the selection: the paper's 0.5.
        noise: Gumbel noise in the selection: in `training` alone, `always` as in the official code, or `never`.
        chain: where a row goes whose target is itself merged: to the `root` of the chain, or half-way, where it is
            lost (`drop`, the official code).
        order: of the selected frames: that of the queries as published, or of `time`.
        width: of the Q-Formers. The paper's are BERT-base: 768, 12 layers and heads; these defaults suit small models.
        layers: of the Q-Formers.
        heads: of the Q-Formers.
        frame_vector: what the selection knows of a frame: the tower's [CLS] vector (`cls`, published; the mean where
            there is none) or the `mean` of its patches.
        qformer_text_input: whether the Q-Formers read the question, as InstructBLIP's do, or see pictures alone, as
            BLIP-2's do.
        centred: show the selection what differs between the frames' vectors, enlarged to their size.
    """

    paper: ClassVar[str] = "b_vllm"
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("queries", (2, 4, 8, 16, 32))
    structure: ClassVar[tuple[str, ...]] = ("selected", "queries", "width", "layers", "heads", "frame_vector")

    selected: int = 16
    queries: int = 32
    merge_threshold: float = 0.75
    temperature: float = 0.5
    noise: Noise = "training"
    chain: Chain = "root"
    order: Order = "query"
    width: int = 256
    layers: int = 2
    heads: int = 4
    frame_vector: FrameVector = "cls"
    qformer_text_input: bool = True
    centred: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "selected", 0, 4096, whole=True)
        for name in ("queries", "width", "layers", "heads"):
            in_range(self, name, 1, 4096, whole=True)
        in_range(self, "merge_threshold", 0, 1)
        in_range(self, "temperature", 0, 100, low_open=True)
        for name, kind in (("noise", Noise), ("chain", Chain), ("order", Order), ("frame_vector", FrameVector)):
            if getattr(self, name) not in get_args(kind):
                raise unknown(f"{name} of {self.paper}", getattr(self, name), get_args(kind))
        if self.width % self.heads:
            raise InputError(f"width of {self.paper} must be a multiple of heads, not {self.width} of {self.heads}")

    @property
    def is_identity(self) -> bool:
        return self.selected == 0

    def identity(self) -> Self:
        return replace(self, selected=0)

    def readings(self, anatomy: Anatomy) -> dict[str, TowerReading]:
        reading = cls_vector(anatomy) if self.frame_vector == "cls" else None
        return super().readings(anatomy) | ({} if reading is None else {CLS_VECTOR: reading})

    @property
    def one_question(self) -> bool:
        return self.qformer_text_input

    def _vector_width(self, anatomy: Anatomy) -> int:
        if CLS_VECTOR in self.readings(anatomy):
            return int(anatomy.vision_config.hidden_size)
        return anatomy.connector_width

    def build(self, anatomy: Anatomy) -> nn.Module:
        return BalancedSampler(
            self.selected,
            self.queries,
            vector_width=self._vector_width(anatomy),
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            seen_width=anatomy.connector_width,
            text_width=int(anatomy.text_config.hidden_size),
        )

    def tokens(self, frames: Frames) -> Tensor:
        module = self.module(frames.anatomy)
        assert isinstance(module, BalancedSampler)
        seen, question = frames.tower.float(), frames.question.float()
        if not self.qformer_text_input:
            question = question[:0]
        vectors = frames.readings[CLS_VECTOR].float() if CLS_VECTOR in frames.readings else seen.mean(1)
        if self.centred:
            vectors = centred(vectors)
        with torch.autocast(seen.device.type, enabled=False):
            affinity = module.affinity(question, vectors)
            noisy = self.noise == "always" or (self.noise == "training" and module.training)
            selection = select(affinity, self.temperature, noisy=noisy)
            rows = torch.einsum("kt,tnc->knc", selection, module.frame_norm(seen))
            rows, kept = merged_rows(rows, selection, self.merge_threshold, self.chain)
        if self.order == "time":
            rows = rows[selection[kept].argmax(1).argsort(stable=True)]
        read = module.spatial(question, rows)
        share = tokens_each(seen.shape[1], len(rows), self.queries)
        if share < self.queries:
            read = merged_down(read, share)
        return module.projector(module.spatial_head(read)).flatten(0, 1)


def select(affinity: Tensor, temperature: float, *, noisy: bool) -> Tensor:
    """S [K, T]: for each query a weight of each frame, summing to 1."""
    if noisy:
        return F.gumbel_softmax(affinity, tau=temperature, dim=-1)
    return (affinity / temperature).softmax(-1)


def merge_targets(selection: Tensor, threshold: float, chain: Chain) -> list[int]:
    """For each row of S [K, T] the row that it is merged into, or itself."""
    units = F.normalize(selection.detach().float(), dim=-1)
    # Rounding must not lift a cosine above 1: a threshold of 1 merges nothing.
    similar = ((units @ units.T).clamp(max=1) + 1) / 2
    best, nearest = similar.tril(-1).max(1)
    targets = [j if value > threshold else i for i, (value, j) in enumerate(zip(best, nearest.tolist(), strict=True))]
    if chain == "root":
        for row, target in enumerate(targets):  # a target comes before its row, so that its own is known
            targets[row] = targets[target]
    return targets


def merged_rows(rows: Tensor, selection: Tensor, threshold: float, chain: Chain) -> tuple[Tensor, list[int]]:
    """Rows [K, n, C] of which near-duplicates have become their mean, [k, n, C], and which of the K are left. With
    `drop` what was merged into a row that is not left is lost."""
    targets = merge_targets(selection, threshold, chain)
    kept = [row for row, target in enumerate(targets) if target == row]
    means = [rows[[row for row, target in enumerate(targets) if target == root]].mean(0) for root in kept]
    return torch.stack(means), kept


def tokens_each(patches: int, rows: int, queries: int) -> int:
    """How many tokens each of so many rows may have: all rows together as many as a frame has patches, about."""
    return min(queries, int(max(1.0, patches // queries / rows * queries)))


def merged_down(tokens: Tensor, target: int) -> Tensor:
    """[k, q, width] -> [k, target, width]: the most alike become their mean, in as many matchings as it takes, each of
    which can halve them. A token that is made of several weighs as much as they."""
    size = tokens.new_ones(tokens.shape[:2])
    while tokens.shape[1] > target:
        matching = bipartite_soft_matching(tokens, tokens.shape[1] - target)
        tokens, size = matching.merge(tokens, size), matching.total(size)
    return tokens
