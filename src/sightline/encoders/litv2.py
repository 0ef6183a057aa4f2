"""LITv2: a pyramid whose third stage attends by HiLo (Pan, Cai and Zhuang, NeurIPS 2022, arXiv:2205.13213).

In: pictures [B, C, H, W], H and W multiples of 32. Out: tokens [B, (H/32)(W/32), 8 D] and the maps of four stages at
strides 4, 8, 16 and 32, of D, 2D, 4D and 8D channels.

    x = LN(conv 4x4 / 4)
    stages 1, 2:  x := x + MLP(LN(x))
    stages 3, 4:  x := x + HiLo(LN(x));  x := x + MLP(LN(x))        windows of 2 x 2 in stage 3; plain attention in 4
    MLP(x) = W_2 GELU(depthwise conv 3x3 (W_1 x))                   the depthwise step tells positions, no table does
    between stages:  x := GELU(BN(deformable conv 2x2 / 2))         of twice as many channels
    pooled = mean over tokens of LN(x)

The deformable convolution reads each of its four points where another 2x2 convolution, zero at the start, moves it: it
begins as an ordinary one, and `deformable = False` keeps it one. The official code (ziplab/LITv2) takes square pictures
only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.encoder import Encoder, Features, features_of_stages, register_encoder
from sightline.encoders.layers import DropPath, PatchEmbed, init_weights, rates, to_map, to_tokens
from sightline.errors import InputError
from sightline.mixers.hilo import HiLo
from sightline.mixers.mixer import Mixer


class ConvMlp(nn.Module):
    """A feed-forward block with a depthwise 3x3 convolution before its activation."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)
        nn.init.normal_(self.depthwise.weight, std=math.sqrt(2 / 9))
        self.depthwise.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return self.fc2(self.act(to_tokens(self.depthwise(to_map(self.fc1(x), grid)))))


class Block(nn.Module):
    """x + mixer(LN(x)) where there is a mixer, then x + MLP(LN(x))."""

    def __init__(self, width: int, mixer: Mixer | None, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = None if mixer is None else nn.LayerNorm(width)
        self.attn = mixer
        self.norm2 = nn.LayerNorm(width)
        self.mlp = ConvMlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        if self.norm1 is not None and self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class DeformableConv(nn.Module):
    """A 2x2 convolution of stride 2 that reads its points where a second one, 0 at the start, moves them to."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        plain = nn.Conv2d(in_chans, out_chans, kernel_size=2, stride=2)
        assert plain.bias is not None
        self.weight, self.bias = plain.weight, plain.bias
        self.offset = nn.Conv2d(in_chans, 2 * 2 * 2, kernel_size=2, stride=2)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        moved_down, moved_right = self.offset(x).unflatten(1, (4, 2)).unbind(2)  # of the four points, row after row
        rows, columns = (torch.arange(0, side, 2, dtype=x.dtype, device=x.device) for side in size)
        first, second = rows.new_tensor([0, 0, 1, 1]), rows.new_tensor([0, 1, 0, 1])
        down = moved_down + (first[:, None] + rows).unsqueeze(2)
        right = moved_right + (second[:, None] + columns).unsqueeze(1)
        # Of pixel positions grid_sample wants -1 and 1 for the picture's edges; what lies outside is 0.
        places = torch.stack([(2 * right + 1) / size[1] - 1, (2 * down + 1) / size[0] - 1], dim=-1)
        points = F.grid_sample(x, places.flatten(1, 2), padding_mode="zeros", align_corners=False)
        points = points.unflatten(2, (4, -1)).flatten(3).flatten(1, 2)
        return (self.weight.flatten(1) @ points + self.bias[:, None]).unflatten(2, places.shape[2:4])

    def mixing_macs(self, x: Tensor) -> int:
        """Multiply-adds beside those of the offsets."""
        return x.numel() * len(self.weight)


class Merge(nn.Module):
    """Makes one token of twice the width from 2 x 2 tokens."""

    def __init__(self, width: int, deformable: bool) -> None:
        super().__init__()
        if deformable:
            self.conv: nn.Module = DeformableConv(width, 2 * width)
        else:
            self.conv = nn.Conv2d(width, 2 * width, kernel_size=2, stride=2)
        self.norm = nn.BatchNorm2d(2 * width)
        self.act = nn.GELU()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        merged = self.act(self.norm(self.conv(to_map(x, grid))))
        return to_tokens(merged), (grid[0] // 2, grid[1] // 2)


_OFFICIAL_BLOCK = r"layers\.(\d+)\.blocks\.(\d+)\."


def _size(width: int, depths: tuple[int, ...], heads: tuple[int, ...], drop_path: float) -> dict[str, Any]:
    return dict(image_size=224, width=width, depths=depths, num_heads=heads, drop_path=drop_path)


@register_encoder
class LITv2(Encoder):
    """The pyramid with HiLo in its third stage.

    Args:
        width: D, channels of the first stage; each further one has twice as many.
        depths: blocks of each stage.
        num_heads: heads of each stage (read where it attends).
        attend: whether each stage attends.
        window_sizes: s of HiLo in each stage; 1 is ordinary attention.
        alpha: share of Lo-Fi heads, rounded down to a whole number of heads.
        mlp_ratio: hidden width of the feed-forward blocks over their width.
        patch_size: pixels a side of a first-stage token.
        deformable: move the points of the convolutions between stages.
        drop_path: rate of the last block; those before rise to it linearly.
    """

    paper = "litv2"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "litv2_small": _size(96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2),
        "litv2_medium": _size(96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3),
        "litv2_base": _size(128, (2, 2, 18, 2), (4, 8, 16, 32), 0.5),
        "litv2_nano": _size(12, (1, 1, 2, 1), (2, 3, 4, 6), 0.0)
        | dict(image_size=32, alpha=0.5, patch_size=2, deformable=False),
    }
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        (rf"{_OFFICIAL_BLOCK}attn\.h_(.*)", r"stages.\1.\2.attn.high_\3"),
        (rf"{_OFFICIAL_BLOCK}attn\.l_proj\.(.*)", r"stages.\1.\2.attn.low_proj.\3"),
        (rf"{_OFFICIAL_BLOCK}attn\.l_q\.(.*)", r"stages.\1.\2.attn.low_query.\3"),
        (rf"{_OFFICIAL_BLOCK}attn\.l_kv\.(.*)", r"stages.\1.\2.attn.low_key_value.\3"),
        (rf"{_OFFICIAL_BLOCK}mlp\.dwconv\.dwconv\.(.*)", r"stages.\1.\2.mlp.depthwise.\3"),
        (rf"{_OFFICIAL_BLOCK}(.*)", r"stages.\1.\2.\3"),
        (r"layers\.(\d+)\.downsample\.dconv\.conv_offset\.(.*)", r"merges.\1.conv.offset.\2"),
        (r"layers\.(\d+)\.downsample\.dconv\.(.*)", r"merges.\1.conv.\2"),
        (r"layers\.(\d+)\.downsample\.norm_layer\.(.*)", r"merges.\1.norm.\2"),
        (r"patch_embed\.norm\.(.*)", r"patch_norm.\1"),
    )

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        width: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        attend: Sequence[bool] = (False, False, True, True),
        window_sizes: Sequence[int] = (1, 1, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        patch_size: int = 4,
        deformable: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        stages = len(depths)
        if stages < 1 or not stages == len(num_heads) == len(attend) == len(window_sizes):
            raise InputError(
                "depths, num_heads, attend and window_sizes must have an entry for each stage, not "
                f"{stages}, {len(num_heads)}, {len(attend)} and {len(window_sizes)} entries"
            )
        widths = [width << stage for stage in range(stages)]
        super().__init__(image_size=image_size, in_chans=in_chans, num_classes=num_classes, width=widths[-1])
        self.patch_size, self._stride = patch_size, patch_size << (stages - 1)
        self.check_size(*self.image_size)
        self.patch_embed = PatchEmbed(patch_size, in_chans, width)
        self.patch_norm = nn.LayerNorm(width)
        drops = iter(rates(drop_path, sum(depths)))
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(depths):
            blocks = nn.ModuleList()
            for _ in range(depth):
                mixer = None
                if attend[stage]:
                    mixer = HiLo(widths[stage], num_heads[stage], alpha=alpha, window_size=window_sizes[stage])
                blocks.append(Block(widths[stage], mixer, mlp_ratio, next(drops)))
            self.stages.append(blocks)
        self.merges = nn.ModuleList(Merge(before, deformable) for before in widths[:-1])
        self.norm = nn.LayerNorm(self.width)
        self.head = nn.Linear(self.width, num_classes) if num_classes else nn.Identity()
        init_weights(self)

    @property
    def stride(self) -> int:
        return self._stride

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        grid = (pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size)
        x = self.patch_norm(self.patch_embed(pixels))
        return features_of_stages(x, grid, self.stages, self.merges, self.norm, hidden_states)

    def classify(self, features: Features) -> Tensor:
        return self.head(features.pooled)
