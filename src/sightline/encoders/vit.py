"""The plain vision transformer (Dosovitskiy et al., ICLR 2021, arXiv:2010.11929) in DeiT's sizes (Touvron et al., ICML
2021, arXiv:2012.12877): what other encoders build on, and the baseline of their speed.

    x_0 = [cls; patches] + positions
    x  := x + attention(LN(x));   x := x + MLP(LN(x))            for each block
    tokens = LN(x)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sightline.encoders.encoder import Encoder, Features, check_multiple, register_encoder
from sightline.encoders.layers import (
    DropPath,
    LayerScale,
    Mlp,
    PatchEmbed,
    init_weights,
    rates,
    resized_positions,
    to_map,
)
from sightline.mixers.attention import Attention
from sightline.mixers.mixer import Mixer


class Block(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)), each residual branch with drop path and, if asked, LayerScale."""

    def __init__(
        self,
        width: int,
        mixer: Mixer,
        *,
        mlp: nn.Module | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = mixer
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio)) if mlp is None else mlp
        self.drop_path = DropPath(drop_path)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        x = x + self.mix(x, grid)
        return x + self.feed(x)

    def mix(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The first residual branch."""
        return self.drop_path(self.ls1(self.attn(self.norm1(x), grid)))

    def feed(self, x: Tensor) -> Tensor:
        """The second residual branch."""
        return self.drop_path(self.ls2(self.mlp(self.norm2(x))))


SIZES: Mapping[str, Mapping[str, Any]] = {
    "nano": dict(width=64, depth=4, num_heads=4, patch_size=4, image_size=32),
    "tiny": dict(width=192, depth=12, num_heads=3, patch_size=16, image_size=224),
    "small": dict(width=384, depth=12, num_heads=6, patch_size=16, image_size=224),
    "base": dict(width=768, depth=12, num_heads=12, patch_size=16, image_size=224),
}


@register_encoder
class VisionTransformer(Encoder):
    """A ViT with a class token, or with mean pooling where `class_token` is off.

    Other papers' encoders derive from it and replace `block`, or a step of `encode`.

    Args:
        width: D.
        depth: blocks.
        num_heads: heads of each block.
        patch_size: pixels a side of a patch.
        mlp_ratio: hidden width of the MLP over D.
        class_token: put a class token first, and pool by it.
        drop_path: rate of the last block; those before rise to it linearly.
        layer_scale: start of LayerScale, None for none.
    """

    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {f"vit_{size}": values for size, values in SIZES.items()}

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        width: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__(image_size=image_size, in_chans=in_chans, num_classes=num_classes, width=width)
        self.depth, self.num_heads, self.patch_size = depth, num_heads, patch_size
        self.mlp_ratio, self.layer_scale = mlp_ratio, layer_scale
        check_multiple("a ViT with this patch_size", self.image_size, patch_size)
        self.grid = (self.image_size[0] // patch_size, self.image_size[1] // patch_size)
        self.patch_embed = PatchEmbed(patch_size, in_chans, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.extra = int(class_token)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extra + self.grid[0] * self.grid[1], width))
        self.blocks = nn.ModuleList(self.block(index, rate) for index, rate in enumerate(rates(drop_path, depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        init_weights(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def block(self, index: int, drop_path: float) -> nn.Module:
        """Block number `index` (0-based)."""
        mixer = Attention(self.width, self.num_heads)
        return Block(self.width, mixer, mlp_ratio=self.mlp_ratio, drop_path=drop_path, layer_scale=self.layer_scale)

    @property
    def stride(self) -> int:
        return self.patch_size

    def embed(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The tokens that enter the first block, the class token first, and the grid of the patches."""
        grid = (pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size)
        x = self.patch_embed(pixels)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + resized_positions(self.pos_embed, self.grid, grid, extra=self.extra), grid

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        x, grid = self.embed(pixels)
        states = [x[:, self.extra :]] if hidden_states else []
        for block in self.blocks:
            x = block(x, grid)
            if hidden_states:
                states.append(x[:, self.extra :])
        return self.finish(x, grid, states)

    def finish(self, x: Tensor, grid: tuple[int, int], states: list[Tensor]) -> Features:
        """The features of the last block's output."""
        x = self.norm(x)
        tokens = x[:, self.extra :]
        pooled = x[:, 0] if self.extra else tokens.mean(dim=1)
        return Features(tokens, grid, pooled, (to_map(tokens, grid),), tuple(states))

    def classify(self, features: Features) -> Tensor:
        return self.head(features.pooled)
