"""ToMe: merge similar tokens inside the vision tower (Bolya et al., ICLR 2023, arXiv:2210.09461).

A yardstick for the papers of the list. In: what the tower's layers give, [pictures, patches, C]. Out: one visual token
for each cluster of patches, at the place of the first of them. In each layer up to the one that the connector reads

    x = x + attention(norm(x)) with log(size) added to the logits of each key
    r pairs of tokens with the most similar keys (cosine of their mean over the heads, `merging.py`) become one each,
        the mean of both weighted by size, how many patches a token stands for; [CLS] is left as it is
    x = x + mlp(norm(x)) on the tokens that are left

r follows from `keep`: the tokens to merge away are spread evenly over the layers (for LLaVA-1.5, 23 layers and
`keep` = 0.25: 18 or 19 a layer). A layer merges half of its tokens at most, so that few layers may leave more.

How it is done without touching the layer's code: a pre-hook on the second norm hands it the merged tokens, so that the
MLP runs on these; the layer's own sum, which would add them to the unmerged ones, gets a filler from a hook on the MLP,
and a hook on the layer gives the right sum instead. The layers thus do the work of a merged tower, and nothing of it is
left after detaching. After the connected layer each patch has its cluster's value again, so that the connector, the
packing of tiles and what else reads the tower get the shapes that they know; what other methods read off the tower is
of the patches too, which share the attention that their token gets. At the boundary of the decoder the first token of
each cluster stays. For connectors that map patch by patch this equals merging before the connector.

The official code (facebookresearch/ToMe, `tome/patch/timm.py`) merges in every layer of a classifier; the number of
tokens that are left is the same. Tokens of a tiled image that are no patch of one cluster alone (newlines, and rasters
that were shrunk while packing) stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sightline.errors import InputError
from sightline.methods import register
from sightline.reduction.merging import Matching, bipartite_soft_matching
from sightline.reduction.token_reducer import ImageTokens, TokenReducer

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy
    from sightline.models.boundary import Boundary

CLUSTERS = "clusters"
PARTS = ("layer_norm1", "self_attn", "layer_norm2", "mlp")


@register
@dataclass(frozen=True)
class ToMe(TokenReducer):
    """Merges similar patches inside the vision tower, some in each layer; a visual token is left of each cluster.

    Args:
        keep: share of a picture's patches that is left, in (0, 1].
        positions: as in `TokenReducer`.
    """

    paper: ClassVar[str] = "tome"
    own_readings: ClassVar[tuple[str, ...]] = (CLUSTERS,)

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        layers = anatomy.tower_layers[: (-1 if anatomy.connected_layer is None else anatomy.connected_layer) + 1]
        of_parts = all(hasattr(layer, part) for layer in layers for part in PARTS)
        if not layers or not of_parts or not anatomy.patches_are_tokens:
            raise InputError(
                "tome merges patches in the layers of a CLIP or SigLIP tower each of whose patches is a visual token "
                f"of its own, which {anatomy.family} with this tower does not have; it works on llava, llava_next, "
                "llava_onevision and paligemma"
            )
        if isinstance(getattr(anatomy.config, "vision_feature_layer", -1), (list, tuple)):
            raise InputError("tome gives the connector the output of one tower layer; vision_feature_layer has several")
        attention: Any = anatomy.tower_attentions[0]
        implementation = attention.config._attn_implementation
        if implementation not in ("eager", "sdpa"):
            raise InputError(
                f"tome adds to the logits of the vision tower's attention, which {implementation} does not allow: load "
                "the model with attn_implementation='sdpa'"
            )

    def install(self, boundary: Boundary) -> None:
        anatomy = boundary.anatomy
        assert anatomy.connected_layer is not None
        layers = list(anatomy.tower_layers[: anatomy.connected_layer + 1])
        merging = TowerMerging(len(layers), anatomy.leading_tokens, self)
        for index, layer in enumerate(layers):
            attention = layer.get_submodule("self_attn")
            merging.watch(boundary, index, layer, attention)
        boundary.as_stock = merging.unmerged

    def reduce(self, image: ImageTokens) -> tuple[Tensor, Tensor | None]:
        number, square = image.readings[CLUSTERS].unbind(dim=-1)
        pure = (number > 0) & (square == number**2)
        order = torch.arange(len(number), device=number.device)
        own = torch.where(pure, number, -1.0 - order)  # what is no patch of one cluster stands for itself
        _, cluster = own.unique(return_inverse=True)
        first = torch.full_like(order, len(order)).scatter_reduce(0, cluster, order, "amin")
        return first[cluster] == order, None


class TowerMerging:
    """The hooks on the layers of one tower, and the tokens of the pictures that run through it.

    Args:
        layers: how many layers merge.
        leading: tokens before the patches: [CLS], or none.
        method: says how many patches are left.
    """

    def __init__(self, layers: int, leading: int, method: ToMe) -> None:
        self.layers, self.leading, self.method = layers, leading, method
        self.clusters: Matching | None = None  # from the stock tower's tokens to those that are left; None: all are
        self.size: Tensor | None = None  # [pictures, tokens]: how many of the stock tower's each stands for
        self.keys: Tensor | None = None
        self.tokens: Tensor | None = None
        self.forward: Tensor | None = None

    def watch(self, boundary: Boundary, index: int, layer: nn.Module, attention: Any) -> None:
        """Puts the hooks on one layer."""

        def weigh_keys(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                self.clusters = self.size = None  # whatever a pass that failed has left
            if self.size is None:
                return None
            return args, {**kwargs, "attention_mask": self.size.log()[:, None, None].to(hidden.dtype)}

        def note_keys(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            self.keys = output.detach().unflatten(-1, (int(attention.num_heads), -1)).float().mean(dim=-2)

        def merge(module: nn.Module, args: tuple[Tensor, ...], kwargs: Any) -> Any:
            self.merge(args[0], index)
            return (self.tokens, *args[1:]), kwargs

        def note_forward(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            self.forward = output
            return output[:, :1]  # the layer adds it to all tokens, merged or not; `add` has the right sum

        def add(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
            assert self.tokens is not None
            assert self.forward is not None
            merged = self.tokens + self.forward
            self.tokens = self.forward = self.keys = None
            return merged if index < self.layers - 1 else self.end(boundary, merged)

        boundary.hook(attention, weigh_keys, before=True)
        boundary.hook(attention.k_proj, note_keys)
        boundary.hook(layer.get_submodule("layer_norm2"), merge, before=True)
        boundary.hook(layer.get_submodule("mlp"), note_forward)
        boundary.hook(layer, add, prepend=True)  # before the hooks by which transformers collects hidden states

    def merge(self, tokens: Tensor, index: int) -> None:
        """Merges the tokens between attention and MLP of a layer."""
        pictures, now = tokens.shape[:2]
        if self.clusters is None:
            self.clusters = Matching(torch.arange(now, device=tokens.device).repeat(pictures, 1), now)
        given = self.clusters.where.shape[1] - self.leading
        away = (given - self.method.budget(given)) * (index + 1) // self.layers
        assert self.keys is not None
        wanted = now - self.leading - (given - away)
        step = bipartite_soft_matching(self.keys, wanted, protect_first=self.leading > 0)
        size = torch.ones(pictures, now, device=tokens.device) if self.size is None else self.size
        self.tokens = step.merge(tokens, size)
        self.size, self.clusters = step.total(size), self.clusters.followed_by(step)

    def end(self, boundary: Boundary, tokens: Tensor) -> Tensor:
        """After the connected layer: every patch gets its cluster's value; the clusters are noted.

        A cluster's number is noted with its square: where a mean of patches is packed into one token, the mean of the
        squares is the square of the mean only if all of them are of one cluster.
        """
        assert self.clusters is not None
        where = self.clusters.where[:, self.leading :].double() + 1
        number = where + self.clusters.left * torch.arange(len(where), device=where.device)[:, None]
        boundary.add_reading(CLUSTERS, torch.stack([number, number**2], dim=-1))
        whole = self.clusters.unmerge(tokens)
        self.clusters = self.size = None
        return whole

    def unmerged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a part of the tower with all patches there, each with its token's value."""
        if self.clusters is None:
            return args, kwargs
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] != self.clusters.left:
            return args, kwargs
        whole = self.clusters.unmerge(hidden)
        return ((whole, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": whole})
