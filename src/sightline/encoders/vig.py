"""ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention (Liao, Wang et al. 2024,
arXiv:2405.18425), plain and in four stages.

In: pictures [B, C, H, W]. Out: `Features`; no class token, the pooled feature is the mean of the tokens.

    l  = SiLU?(DWConv3x3(x))                             (on the grid; SiLU in ViG-T alone)
    o  = the mean of two gated linear scans of l, one from each end, with q, k, v shared and a gate a direction
         (`mixers/gated_linear_attention.py`)
    g  = sigmoid(W_g l + b_g)
    y  = W_o SiLU?(g * RMSNorm(o) + (1 - g) * RMSNorm(l))     (norms head by head)

    plain ViG:  x := x + y(RMSNorm(x));   x := x + SwiGLU(RMSNorm(x));   tokens = RMSNorm(x)
                positions are added to the tokens of a stem of two convolutions
    ViG-H:      LayerNorm for RMSNorm; stages at 1/4, 1/8, 1/16 and 1/32 of the side, between them a convolution 3x3 of
                stride 2 and LayerNorm; no positions

The official code (hustvl/ViG) is followed. Its evaluation path of plain ViG halves the sum of the two scans twice, its
training path once (the norm that follows hides it); here it is halved once. Positions are resized bicubically as there,
but with antialiasing. Rates of drop path are left to the caller: its configurations train with 0, 0.2 and 0.5 for T, S
and B, and with 0.2, 0.3 and 0.6 for ViG-H.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.encoder import Encoder, Features, check_multiple, features_of_stages, register_encoder
from sightline.encoders.layers import LayerNorm2d, SwiGLU, init_weights, rates, to_map, to_tokens, with_positions
from sightline.encoders.vit import Block, VisionTransformer
from sightline.errors import InputError
from sightline.mixers.gated_linear_attention import GatedLinearAttention

PAPER = "vig"
OBJECT = "ViG"


class LocalGatedLinearAttention(GatedLinearAttention):
    """Gated linear attention in both directions over tokens that a depthwise convolution has mixed with their
    neighbours, and a gate that chooses between what was scanned and what is near.

    Args:
        width: D.
        num_heads: heads.
        conv_act: SiLU after the convolution.
        out_act: SiLU before the output projection.
    """

    def __init__(self, width: int, num_heads: int, *, conv_act: bool = False, out_act: bool = False) -> None:
        super().__init__(width, num_heads, bidirectional=True)
        self.in_proj = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width, bias=False)
        self.l_norm = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.conv_act, self.out_act = conv_act, out_act
        nn.init.xavier_uniform_(self.in_proj.weight, gain=self.GAIN)

    def forward(self, x: Tensor, grid: tuple[int, ...] = ()) -> Tensor:
        local = to_tokens(self.in_proj(to_map(x, grid)))
        if self.conv_act:
            local = F.silu(local)
        return self.merge(self.scan(local)[0], local)

    def merge(self, out: Tensor, x: Tensor) -> Tensor:
        gate = self.g_proj(x).sigmoid()
        near = self.l_norm(x.unflatten(-1, (self.num_heads, -1))).flatten(2)
        mixed = torch.lerp(near, self.g_norm(out).flatten(2), gate)
        return self.o_proj(F.silu(mixed) if self.out_act else mixed)


class Stem(nn.Module):
    """Two convolutions whose windows overlap, of stride p / 2 and 2: [B, C, H, W] -> [B, (H / p)(W / p), D]."""

    def __init__(self, patch_size: int, in_chans: int, width: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        half = patch_size // 2
        self.conv1 = nn.Conv2d(in_chans, width // 2, kernel_size=half + 1, stride=half, padding=1)
        self.norm1 = LayerNorm2d(width // 2)
        self.act = act()
        self.conv2 = nn.Conv2d(width // 2, width, kernel_size=3, stride=2, padding=1)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.norm2(to_tokens(self.conv2(self.act(self.norm1(self.conv1(pixels))))))


def feed_forward(width: int, multiple_of: int) -> SwiGLU:
    """SwiGLU whose hidden width is 8/3 of D, rounded up to a multiple."""
    hidden = int(width * 4 * 2 / 3)
    return SwiGLU(width, multiple_of * -(-hidden // multiple_of))


@register_encoder
class ViG(VisionTransformer):
    """Plain ViG.

    Args:
        image_size: side of the square input or (height, width).
        in_chans: channels of the input.
        num_classes: classes of the head, 0 for none.
        width: C.
        depth: blocks.
        num_heads: heads of each block.
        patch_size: pixels a side of what a token stands for, an even number.
        multiple_of: what the hidden width of the feed-forward blocks is rounded up to.
        conv_act: SiLU after the depthwise convolutions.
        out_act: SiLU before the output projections.
        drop_path: rate of the last block; those before rise to it linearly.
    """

    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "vig_tiny": dict(width=192, num_heads=3, image_size=224, conv_act=True, out_act=True),
        "vig_small": dict(width=384, num_heads=6, image_size=224),
        "vig_base": dict(width=768, num_heads=12, image_size=224),
        "vig_nano": dict(width=64, depth=4, num_heads=2, patch_size=4, image_size=32, multiple_of=32),
    }
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        (r"patch_embed\.proj\.0\.(\w+)", r"patch_embed.conv1.\1"),
        (r"patch_embed\.proj\.1\.(\w+)", r"patch_embed.norm1.\1"),
        (r"patch_embed\.proj\.3\.(\w+)", r"patch_embed.conv2.\1"),
        (r"patch_embed\.proj\.4\.(\w+)", r"patch_embed.norm2.\1"),
        (r"(blocks\.\d+)\.attn_norm\.weight", r"\1.norm1.weight"),
        (r"(blocks\.\d+)\.attn\.in_proj\.0\.weight", r"\1.attn.in_proj.weight"),
        (r"(blocks\.\d+)\.mlp_norm\.weight", r"\1.norm2.weight"),
        (r"(blocks\.\d+)\.mlp\.gate_proj\.weight", r"\1.mlp.gate.weight"),
        (r"(blocks\.\d+)\.mlp\.down_proj\.weight", r"\1.mlp.out.weight"),
    )

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
        multiple_of: int = 256,
        conv_act: bool = False,
        out_act: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        if patch_size < 4 or patch_size % 2:
            raise InputError(f"patch_size of ViG must be an even number from 4, not {patch_size}")
        self.multiple_of, self.conv_act, self.out_act = multiple_of, conv_act, out_act
        super().__init__(
            image_size=image_size,
            in_chans=in_chans,
            num_classes=num_classes,
            width=width,
            depth=depth,
            num_heads=num_heads,
            patch_size=patch_size,
            class_token=False,
            drop_path=drop_path,
        )
        self.register_module("patch_embed", Stem(patch_size, in_chans, width, nn.SiLU))
        self.register_module("norm", nn.RMSNorm(width, eps=1e-6))
        for part in self.modules():
            if isinstance(part, GatedLinearAttention):
                part.reset_parameters()

    def block(self, index: int, drop_path: float) -> nn.Module:
        mixer = LocalGatedLinearAttention(self.width, self.num_heads, conv_act=self.conv_act, out_act=self.out_act)
        block = Block(self.width, mixer, mlp=feed_forward(self.width, self.multiple_of), drop_path=drop_path)
        for norm in ("norm1", "norm2"):
            block.register_module(norm, nn.RMSNorm(self.width, eps=1e-6))
        return block

    def adapt_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return with_positions(state, "pos_embed", self.grid, extra=0)


class Downsample(nn.Module):
    """To half the grid: a convolution 3x3 of stride 2 and LayerNorm, tokens [B, N, C] -> [B, N', C']."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out_width, kernel_size=3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        smaller = self.conv(to_map(x, grid))
        return self.norm(to_tokens(smaller)), (smaller.shape[2], smaller.shape[3])


@register_encoder
class ViGH(Encoder):
    """ViG in stages (ViG-H).

    Args:
        image_size: side of the square input or (height, width); nothing is made for it.
        in_chans: channels of the input.
        num_classes: classes of the head, 0 for none.
        width: C of the first stage; each stage doubles it.
        depths: blocks of each stage.
        num_heads: heads of the first stage; each stage doubles them.
        drop_path: rate of the last block; those before rise to it linearly.
    """

    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "vig_h_tiny": dict(width=96, depths=(2, 2, 5, 2), num_heads=3, image_size=224),
        "vig_h_small": dict(width=96, depths=(2, 2, 17, 2), num_heads=3, image_size=224),
        "vig_h_base": dict(width=128, depths=(2, 2, 17, 2), num_heads=4, image_size=224),
        "vig_h_nano": dict(width=24, depths=(1, 1, 1), num_heads=1, image_size=32),
    }
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        (r"patch_embed\.0\.(\w+)", r"patch_embed.conv1.\1"),
        (r"patch_embed\.2\.(\w+)", r"patch_embed.norm1.\1"),
        (r"patch_embed\.5\.(\w+)", r"patch_embed.conv2.\1"),
        (r"patch_embed\.7\.(\w+)", r"patch_embed.norm2.\1"),
        (r"layers\.(\d+)\.downsample\.1\.(\w+)", r"downsamples.\1.conv.\2"),
        (r"layers\.(\d+)\.downsample\.3\.(\w+)", r"downsamples.\1.norm.\2"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.norm\.(\w+)", r"stages.\1.\2.norm1.\3"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.op\.in_proj\.0\.weight", r"stages.\1.\2.attn.in_proj.weight"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.op\.(.+)", r"stages.\1.\2.attn.\3"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\.weight", r"stages.\1.\2.mlp.gate.weight"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc2\.weight", r"stages.\1.\2.mlp.out.weight"),
        (r"layers\.(\d+)\.blocks\.(\d+)\.norm2\.(\w+)", r"stages.\1.\2.norm2.\3"),
        (r"classifier\.(norm|head)\.(\w+)", r"\1.\2"),
    )

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        width: int = 96,
        depths: Sequence[int] = (2, 2, 5, 2),
        num_heads: int = 3,
        drop_path: float = 0.0,
    ) -> None:
        if not depths or any(depth < 1 for depth in depths):
            raise InputError(f"depths of ViG-H must be the blocks of each stage, 1 or more, not {tuple(depths)}")
        widths = [width * 2**index for index in range(len(depths))]
        super().__init__(image_size=image_size, in_chans=in_chans, num_classes=num_classes, width=widths[-1])
        self.depths = tuple(depths)
        check_multiple("ViG-H of this many stages", self.image_size, self.stride)
        self.patch_embed = Stem(4, in_chans, width, nn.GELU)
        shares = iter(rates(drop_path, sum(depths)))
        self.stages = nn.ModuleList(
            nn.ModuleList(self._block(wide, num_heads * 2**index, next(shares)) for _ in range(depth))
            for index, (wide, depth) in enumerate(zip(widths, depths, strict=True))
        )
        self.downsamples = nn.ModuleList(Downsample(wide, 2 * wide) for wide in widths[:-1])
        self.norm = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()
        init_weights(self)

    @staticmethod
    def _block(width: int, num_heads: int, drop_path: float) -> Block:
        mixer = LocalGatedLinearAttention(width, num_heads)
        return Block(width, mixer, mlp=feed_forward(width, 32), drop_path=drop_path, eps=1e-5)

    @property
    def stride(self) -> int:
        return 4 * 2 ** (len(self.depths) - 1)

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        x = self.patch_embed(pixels)
        grid = (pixels.shape[-2] // 4, pixels.shape[-1] // 4)
        return features_of_stages(x, grid, self.stages, self.downsamples, self.norm, hidden_states)

    def classify(self, features: Features) -> Tensor:
        return self.head(features.pooled)
