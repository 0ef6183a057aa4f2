"""ViR: Vision Retention Networks (Hatamizadeh et al. 2023, arXiv:2310.19731): a ViT whose attention is retention.

In: pictures [B, C, H, W]. Out: `Features` with N = (H / p)(W / p) patch tokens.

    x_0 = [patches + positions; cls]                     (the class token last: a token reads only earlier ones)
    x  := x + s1 * retention(LN(x));   x := x + s2 * MLP(LN(x))                                   for each block
    tokens, cls = LN(x);   logits = W cls

Retention is causal linear attention with one fixed decay a head (`mixers/retention.py`), so that the same weights run
in parallel, in chunks, or token by token with a state of constant size. Widths and depths are those of ViT-S, B and L.

The authors' code (anom63931/ViR) is followed but for this: its parallel form has a softmax after the decay mask, which
lets later tokens in and has no recurrent form; here there is none. With `bidirectional` the patches are followed by the
same in reverse order, as there; the class token comes after both, whereas there the reversed copy reverses it too and
the head reads the first patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sightline.encoders.encoder import Features, register_encoder
from sightline.encoders.layers import resized_positions, to_map, with_positions
from sightline.encoders.vit import Block, VisionTransformer
from sightline.mixers.linear_attention import Mode
from sightline.mixers.retention import Retention


@register_encoder
class ViR(VisionTransformer):
    """A vision transformer with retention and the class token last.

    Args:
        image_size: side of the square input or (height, width).
        in_chans: channels of the input.
        num_classes: classes of the head, 0 for none.
        width: D.
        depth: blocks.
        num_heads: heads of each block, each with a decay of its own.
        patch_size: pixels a side of a patch.
        mlp_ratio: hidden width of the MLP over D.
        bidirectional: read the patches a second time in reverse order; tokens are those of the second reading.
        drop_path: rate of the last block; those before rise to it linearly. The paper trains with 0.2.
        layer_scale: start of LayerScale, None for none.
        mode: form of retention, "chunked", "parallel" or "recurrent"; the result is the same.
        chunk: tokens of a chunk, None for the default of the kernel.
    """

    paper: ClassVar[str] = "vir"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "vir_small_patch16": dict(width=384, depth=12, num_heads=6, patch_size=16, image_size=224),
        "vir_base_patch16": dict(width=768, depth=12, num_heads=12, patch_size=16, image_size=224),
        "vir_large_patch16": dict(width=1024, depth=24, num_heads=16, patch_size=16, image_size=224),
        "vir_large_patch14": dict(width=1024, depth=24, num_heads=16, patch_size=14, image_size=224),
        # Without LayerScale, whose start of 1e-5 is made for long training.
        "vir_nano": dict(width=64, depth=4, num_heads=4, patch_size=4, image_size=32, layer_scale=None),
    }
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        (r"(blocks\.\d+)\.retention\.qkv\.(\w+)", r"\1.attn.qkv.\2"),
        (r"(blocks\.\d+)\.retention\.out_proj\.(\w+)", r"\1.attn.proj.\2"),
    )

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
        bidirectional: bool = False,
        drop_path: float = 0.0,
        layer_scale: float | None = 1e-5,
        mode: Mode = "chunked",
        chunk: int | None = None,
    ) -> None:
        self.mode: Mode = mode
        self.chunk = chunk
        super().__init__(
            image_size=image_size,
            in_chans=in_chans,
            num_classes=num_classes,
            width=width,
            depth=depth,
            num_heads=num_heads,
            patch_size=patch_size,
            mlp_ratio=mlp_ratio,
            class_token=False,
            drop_path=drop_path,
            layer_scale=layer_scale,
        )
        self.bidirectional = bidirectional
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.normal_(self.cls_token, std=1e-6)

    def block(self, index: int, drop_path: float) -> nn.Module:
        mixer = Retention(self.width, self.num_heads, mode=self.mode, chunk=self.chunk)
        return Block(self.width, mixer, mlp_ratio=self.mlp_ratio, drop_path=drop_path, layer_scale=self.layer_scale)

    def embed(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        grid = (pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size)
        x = self.patch_embed(pixels) + resized_positions(self.pos_embed, self.grid, grid)
        assert self.cls_token is not None
        readings = [x, x.flip(1)] if self.bidirectional else [x]
        return torch.cat([*readings, self.cls_token.expand(len(x), -1, -1)], dim=1), grid

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        x, grid = self.embed(pixels)
        states = [self._patches(x)] if hidden_states else []
        for block in self.blocks:
            x = block(x, grid)
            if hidden_states:
                states.append(self._patches(x))
        return self.finish(x, grid, states)

    def _patches(self, x: Tensor) -> Tensor:
        """The patches of the last reading, in raster order."""
        return x[:, x.shape[1] // 2 : -1].flip(1) if self.bidirectional else x[:, :-1]

    def finish(self, x: Tensor, grid: tuple[int, int], states: list[Tensor]) -> Features:
        x = self.norm(x)
        tokens = self._patches(x)
        return Features(tokens, grid, x[:, -1], (to_map(tokens, grid),), tuple(states))

    def adapt_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return with_positions(state, "pos_embed", self.grid, extra=0)
