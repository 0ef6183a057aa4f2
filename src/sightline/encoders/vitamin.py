"""ViTamin: a CLIP tower of two convolutional stages and one long transformer stage (Chen et al., CVPR 2024,
arXiv:2404.02132).

In: pictures [B, C, H, W], H and W multiples of 16. Out: tokens [B, N, D] at stride 16, the maps of the three stages at
strides 4, 8 and 16, and the pooled feature: of width D, or that of CLIP's common space where `embed_dim` is given.

    stem       x = conv 3x3 (GELU(LN(conv 3x3 / 2 (x))))
    stages 1, 2:  blocks  x := shortcut(x) + W_2 GELU(depthwise 3x3 (GELU(W_1 LN(x))))       the first of each / 2
    bridge     x = conv 3x3 / 2 (LN(x)), then + positions
    stage 3:   blocks  h := h + attention(LN h);   h := h + W_c (GELU(W_a v) * W_b v),  v = LN'(LN h)
    pooled = LN(mean over tokens), then W_e without bias

LN of maps is over channels. A stride-2 shortcut is a 3x3 average (padding not counted), then a 1x1 convolution where
the channels change. W_1 makes four times the block's output channels; the gated feed-forward block is 2 D wide inside,
and norms its input a second time, as published. Of the five sizes only XL has no position table. There is no norm of
the tokens after the last block, and no class token. The official code is Beckschen/ViTamin, and the same in timm, whose
key names are read too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sightline.encoders.encoder import Encoder, Features, register_encoder
from sightline.encoders.layers import (
    LayerNorm2d,
    init_weights,
    rates,
    resized_positions,
    to_map,
    to_tokens,
    with_positions,
)
from sightline.encoders.vit import Block
from sightline.errors import InputError
from sightline.mixers.attention import Attention

EPS = 1e-6
_TRUNK = r"(?:(?:visual\.)?trunk\.)?"
_CONV_BLOCK = _TRUNK + r"patch_embed\.backbone\.stages\.(\d+)\.(\d+)\."


class Stem(nn.Module):
    """Two 3x3 convolutions, the first of stride 2, with norm and GELU between them."""

    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, kernel_size=3, stride=2, padding=1)
        self.norm = LayerNorm2d(width, eps=EPS)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.act(self.norm(self.conv1(x))))


class MBConvLN(nn.Module):
    """An inverted bottleneck whose only norm is a LayerNorm at its start."""

    def __init__(self, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * out_chans
        self.norm = LayerNorm2d(in_chans, eps=EPS)
        self.widen = nn.Conv2d(in_chans, hidden, kernel_size=1)
        self.depthwise = nn.Conv2d(hidden, hidden, kernel_size=3, stride=stride, padding=1, groups=hidden)
        self.narrow = nn.Conv2d(hidden, out_chans, kernel_size=1)
        self.act = nn.GELU()
        half = nn.AvgPool2d(kernel_size=3, stride=2, padding=1, count_include_pad=False)
        self.shortcut_pool = half if stride == 2 else nn.Identity()
        self.shortcut = nn.Identity() if in_chans == out_chans else nn.Conv2d(in_chans, out_chans, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act(self.depthwise(self.act(self.widen(self.norm(x)))))
        return self.narrow(inner) + self.shortcut(self.shortcut_pool(x))


class GeGLU(nn.Module):
    """GELU of one linear map times another, with a norm before them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.gate = nn.Linear(width, hidden)
        self.value = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.out(self.act(self.gate(x)) * self.value(x))


def _size(widths: tuple[int, int, int], depth: int, num_heads: int) -> dict[str, Any]:
    return dict(image_size=224, widths=widths, stem_width=widths[0], depths=(2, 4, depth), num_heads=num_heads)


@register_encoder
class ViTamin(Encoder):
    """Two stages of convolutions, then transformer blocks.

    `Features.hidden_states` are the tokens of the third stage.

    Args:
        widths: channels of the three stages, the last of them D.
        stem_width: channels of the stem.
        depths: blocks of the three stages.
        num_heads: heads in the third stage.
        mlp_ratio: hidden width of its gated feed-forward blocks over D.
        positions: whether its tokens get a table of positions.
        embed_dim: width of CLIP's common space, into which the pooled feature is projected; None for no projection.
            The published pairs have 384 (S), 512 (B), 768 (L), 1024 (L2) and 1152 (XL).
        drop_path: rate of the last block; those of the third stage rise to it linearly, the others have none.
    """

    paper = "vitamin"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "vitamin_small": _size((64, 128, 384), 14, 6),
        "vitamin_base": _size((128, 256, 768), 14, 12),
        "vitamin_large": _size((160, 320, 1024), 31, 16),
        "vitamin_large2": _size((160, 320, 1024), 31, 16),
        "vitamin_xlarge": _size((192, 384, 1152), 32, 16) | dict(image_size=256, positions=False),
        "vitamin_nano": _size((16, 24, 48), 3, 3) | dict(image_size=32, depths=(1, 1, 3)),
    }
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        (rf"{_TRUNK}patch_embed\.backbone\.stem\.norm1\.(.*)", r"stem.norm.\1"),
        (rf"{_TRUNK}patch_embed\.backbone\.stem\.(.*)", r"stem.\1"),
        (rf"{_CONV_BLOCK}shortcut\.expand\.(.*)", r"stages.\1.\2.shortcut.\3"),
        (rf"{_CONV_BLOCK}pre_norm\.(.*)", r"stages.\1.\2.norm.\3"),
        (rf"{_CONV_BLOCK}conv1_1x1\.(.*)", r"stages.\1.\2.widen.\3"),
        (rf"{_CONV_BLOCK}conv2_kxk\.(.*)", r"stages.\1.\2.depthwise.\3"),
        (rf"{_CONV_BLOCK}conv3_1x1\.(.*)", r"stages.\1.\2.narrow.\3"),
        (rf"{_TRUNK}patch_embed\.backbone\.pool\.norm\.(.*)", r"bridge_norm.\1"),
        (rf"{_TRUNK}patch_embed\.backbone\.pool\.proj\.(.*)", r"bridge.\1"),
        (rf"{_TRUNK}blocks\.(\d+)\.mlp\.w0\.(.*)", r"blocks.\1.mlp.gate.\2"),
        (rf"{_TRUNK}blocks\.(\d+)\.mlp\.w1\.(.*)", r"blocks.\1.mlp.value.\2"),
        (rf"{_TRUNK}blocks\.(\d+)\.mlp\.w2\.(.*)", r"blocks.\1.mlp.out.\2"),
        (rf"{_TRUNK}(blocks\..*)", r"\1"),
        (rf"{_TRUNK}(pos_embed)", r"\1"),
        (rf"{_TRUNK}fc_norm\.(.*)", r"norm.\1"),
        (r"(?:visual\.)?head\.proj\.(.*)", r"proj.\1"),
    )

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        widths: Sequence[int] = (64, 128, 384),
        stem_width: int = 64,
        depths: Sequence[int] = (2, 4, 14),
        num_heads: int = 6,
        mlp_ratio: float = 2.0,
        positions: bool = True,
        embed_dim: int | None = None,
        drop_path: float = 0.0,
    ) -> None:
        if len(widths) != 3 or len(depths) != 3:
            raise InputError(f"widths and depths must have three entries, not {len(widths)} and {len(depths)}")
        super().__init__(image_size=image_size, in_chans=in_chans, num_classes=num_classes, width=widths[2])
        self.check_size(*self.image_size)
        self.grid = (self.image_size[0] // self.stride, self.image_size[1] // self.stride)
        self.stem = Stem(in_chans, stem_width)
        self.stages = nn.ModuleList()
        for before, width, depth in zip((stem_width, widths[0]), widths, depths, strict=False):
            chans = [before] + [width] * depth
            self.stages.append(nn.Sequential(*(MBConvLN(chans[i], width, stride=1 if i else 2) for i in range(depth))))
        self.bridge_norm = LayerNorm2d(widths[1], eps=EPS)
        self.bridge = nn.Conv2d(widths[1], self.width, kernel_size=3, stride=2, padding=1)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], self.width)) if positions else None
        self.blocks = nn.ModuleList(
            Block(
                self.width,
                Attention(self.width, num_heads),
                mlp=GeGLU(self.width, int(self.width * mlp_ratio)),
                drop_path=rate,
                eps=EPS,
            )
            for rate in rates(drop_path, depths[2])
        )
        self.norm = nn.LayerNorm(self.width, eps=EPS)
        self.proj = nn.Linear(self.width, embed_dim, bias=False) if embed_dim else nn.Identity()
        self.head = nn.Linear(embed_dim or self.width, num_classes) if num_classes else nn.Identity()
        init_weights(self)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                fan_out = math.prod(part.kernel_size) * part.out_channels // part.groups
                nn.init.normal_(part.weight, std=math.sqrt(2 / fan_out))
                part.bias = nn.Parameter(torch.zeros(part.out_channels))
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @property
    def stride(self) -> int:
        return 16

    def adapt_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if any(key.startswith("visual.") for key in state):  # a CLIP pair: leave its text tower out
            state = {key: value for key, value in state.items() if key.startswith("visual.")}
        for key in [key for key in state if key.endswith("pos_embed")] if self.pos_embed is not None else []:
            state = with_positions(state, key, self.grid, extra=0)
        return state

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        x, maps = self.stem(pixels), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        x = self.bridge(self.bridge_norm(x))
        grid = (x.shape[-2], x.shape[-1])
        x = to_tokens(x)
        if self.pos_embed is not None:
            x = x + resized_positions(self.pos_embed, self.grid, grid)
        states = [x]
        for block in self.blocks:
            x = block(x, grid)
            states.append(x)
        pooled = self.proj(self.norm(x.mean(dim=1)))
        return Features(x, grid, pooled, (*maps, to_map(x, grid)), tuple(states) if hidden_states else ())

    def classify(self, features: Features) -> Tensor:
        return self.head(features.pooled)
