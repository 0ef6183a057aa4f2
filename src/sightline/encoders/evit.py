"""EViT: patches that the class token does not look at become one token (Liang et al., ICLR 2022, arXiv:2202.07800).

In: pictures [B, C, H, W]. Out: class feature [B, D] and the tokens that are left [B, n, D]. A ViT without new
parameters; in some blocks, between attention and MLP, with A_ij the softmax weights of the attention, N tokens beside
the class token and the keep rate k:

    a_i   = mean over heads of A[cls, i]
    kept  = the ceil(k N) tokens of largest a_i
    fused = sum over the others of a_i x_i                 (weights as they are, not divided by their sum)
    x    := [cls; kept; fused]

The fused token is an ordinary one from then on: it attends, counts in the next N, and may be fused again. With k = 1
every block is the ViT's. Only the row of A that is read is computed beside the fused attention kernel.

Official code: youweiliang/evit, `evit.py` and `helpers.py`. Kept tokens are put back in the order of the picture here,
where the official code leaves them in the order of their weights; later layers read no positions, so nothing but
rounding changes. The official keep rate for training is one number for all blocks that reorganise, as `keep` can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sightline.encoders.encoder import Features, register_encoder
from sightline.encoders.layers import to_map, with_positions
from sightline.encoders.vit import SIZES, Block, VisionTransformer
from sightline.errors import InputError
from sightline.mixers.attention import Attention

FUSED = -1
"""Marks a fused token among the numbers of kept patches."""


@dataclass
class KeptFeatures(Features):
    """Features of a picture whose patches are not all there any more.

    Where patches were left out, `grid` is (1, n), `tokens` holds the patches that are left in raster order, then the
    fused tokens that are left, oldest first, and the one map is these tokens in one line.
    """

    kept: Tensor | None = None
    """[B, n]: number (row after row) of the patch that each token was, `FUSED` for a fused token."""


class ReorganisingBlock(Block):
    """A block of a ViT that can leave tokens out between its attention and its MLP."""

    fuse: bool = True
    """Whether what is left out becomes one token."""

    def forward(self, x: Tensor, grid: tuple[int, ...], kept: Tensor | None = None, count: int = 0) -> Any:
        """x [B, 1 + N, D] -> x of the plain block; or, where the numbers `kept` [B, N] of the patches are given, x and
        the numbers of the class token, the `count` tokens that stay, in the order that they had, and the fused one."""
        if kept is None:
            return super().forward(x, grid)
        assert isinstance(self.attn, Attention)
        mixed, row = self.attn.with_cls_row(self.norm1(x))
        x = x + self.drop_path(self.ls1(mixed))
        weights = row.mean(dim=1)[:, 1:]
        stay = weights.topk(count, dim=1).indices.sort(dim=1).values
        patches, kept = x[:, 1:], kept.gather(1, stay)
        parts = [x[:, :1], patches.gather(1, stay[..., None].expand(-1, -1, x.shape[-1]))]
        if self.fuse:
            # One product over all tokens, those that stay weighing nothing: cheaper than to gather the others.
            parts.append(weights.scatter(1, stay, 0.0)[:, None] @ patches)
            kept = torch.cat([kept, kept.new_full((len(kept), 1), FUSED)], dim=1)
        x = torch.cat(parts, dim=1)
        return x + self.feed(x), kept

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...], kept: Tensor | None = None, count: int = 0) -> int:
        """Where tokens are left out the attention is not called as a module: its products, the row and the fused sum.
        In the plain block the attention counts itself."""
        if kept is None:
            return 0
        batch, length, width = x.shape
        return batch * width * (2 * length * length + length + (length - 1 if self.fuse else 0))


@register_encoder
class EViT(VisionTransformer):
    """A ViT (DeiT) that keeps the patches its class token attends to, and fuses the others.

    Args:
        width: D.
        depth: blocks.
        num_heads: heads of each block.
        patch_size: pixels a side of a patch.
        mlp_ratio: hidden width of the MLP over D.
        drop_path: rate of the last block; those before rise to it linearly.
        layer_scale: start of LayerScale, None for none.
        keep: share of the tokens that stay at each location, in (0, 1]; one number, or one a location. The attribute
            `keep` can be set at any time (see `keep_rate`).
        locations: the blocks that reorganise, from 0.
        fuse: whether the tokens that are left out become one.
    """

    paper: ClassVar[str] = "evit"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "evit_small": dict(SIZES["small"], keep=0.7, locations=(3, 6, 9)),
        "evit_base": dict(SIZES["base"], keep=0.7, locations=(3, 6, 9)),
        "evit_nano": dict(SIZES["nano"], keep=0.7, locations=(1, 2, 3)),
    }
    official_keys: ClassVar[Sequence[tuple[str, str]]] = ((r"(.+)", r"\1"),)

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        keep: float | Sequence[float] = 0.7,
        locations: Sequence[int] = (3, 6, 9),
        fuse: bool = True,
    ) -> None:
        self.locations = tuple(locations)
        if any(not 0 <= place < depth for place in self.locations) or len(set(self.locations)) != len(self.locations):
            raise InputError(f"locations must be different blocks from 0 to {depth - 1}, not {list(locations)}")
        self.fuse = fuse
        super().__init__(
            image_size=image_size,
            in_chans=in_chans,
            num_classes=num_classes,
            width=width,
            depth=depth,
            num_heads=num_heads,
            patch_size=patch_size,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
            layer_scale=layer_scale,
        )
        self.keep = keep

    @property
    def keep(self) -> tuple[float, ...]:
        """The keep rate of each location."""
        return self._keep

    @keep.setter
    def keep(self, value: float | Sequence[float]) -> None:
        rates = tuple(value) if isinstance(value, Sequence) else (value,) * len(self.locations)
        if len(rates) != len(self.locations) or any(not 0 < rate <= 1 for rate in rates):
            raise InputError(
                f"keep must be a rate above 0 and at most 1, or one for each of the {len(self.locations)} locations, "
                f"not {value}"
            )
        self._keep = rates

    def block(self, index: int, drop_path: float) -> nn.Module:
        if index not in self.locations:
            return super().block(index, drop_path)
        block = ReorganisingBlock(
            self.width,
            Attention(self.width, self.num_heads),
            mlp_ratio=self.mlp_ratio,
            drop_path=drop_path,
            layer_scale=self.layer_scale,
        )
        block.fuse = self.fuse
        return block

    def token_counts(self, patches: int) -> tuple[int, ...]:
        """Tokens beside the class token after each location, for so many patches."""
        counts = []
        for _, rate in sorted(zip(self.locations, self.keep, strict=True)):
            stay = math.ceil(rate * patches)
            if stay < patches:
                patches = stay + int(self.fuse)
            counts.append(patches)
        return tuple(counts)

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        x, grid = self.embed(pixels)
        rates = dict(zip(self.locations, self.keep, strict=True))
        kept = torch.arange(grid[0] * grid[1], device=x.device).expand(len(x), -1)
        all_there = True
        states = [x[:, 1:]] if hidden_states else []
        for index, block in enumerate(self.blocks):
            tokens = x.shape[1] - 1
            count = math.ceil(rates.get(index, 1.0) * tokens)
            if count < tokens:
                x, kept = block(x, grid, kept, count)
                all_there = False
            else:
                x = block(x, grid)
            if hidden_states:
                states.append(x[:, 1:])
        x = self.norm(x)
        left = grid if all_there else (1, kept.shape[1])
        return KeptFeatures(x[:, 1:], left, x[:, 0], (to_map(x[:, 1:], left),), tuple(states), kept)

    def adapt_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return with_positions(state, "pos_embed", self.grid, extra=1)


def keep_rate(step: int, *, keep: float, start: int, length: int) -> float:
    """The keep rate of a training step, falling from 1 to `keep` along half a cosine.

    Set `EViT.keep` to it before each step. The paper, from scratch: start after 10 of 300 epochs, over 100 epochs.

    Args:
        step: from 0.
        keep: the rate at the end.
        start: the first step at which it falls.
        length: over how many steps.

    Raises:
        InputError: a rate outside (0, 1], or a length below 1.
    """
    if not 0 < keep <= 1 or length < 1:
        raise InputError(f"keep must be above 0 and at most 1 and length 1 or more, not {keep} and {length}")
    share = min(max((step - start) / length, 0.0), 1.0)
    return keep + (1 - keep) * (1 + math.cos(math.pi * share)) / 2
