"""DHVT: a ViT that learns from small data sets (Lu et al., NeurIPS 2022, arXiv:2210.05958).

In: pictures [B, C, H, W], H and W multiples of the patch size p. Out: tokens [B, N, D] at stride p, pooled by [cls].

SOPE, instead of patches cut out: log2(p) convolutions 3x3 / 2, each with BN, of ..., D / 2, D channels, and GELU
between them, between two affine maps of the channels; they overlap, and their zero padding tells positions.

    x := x + drop_path(HI-MHSA(LN x));   x := x + drop_path(DAFF(LN x))                      of [cls; patches]

HI-MHSA, attention with head tokens, for h heads of width d:

    m_i = mean over all tokens of head i's channels,  i = 1..h                              [h, d]
    t_i = GELU(LN_d(W m_i, as h slices of width d)) + P_i                                   [h, D]
    attention over [cls; patches; t_1 .. t_h];  cls := cls + mean_i t_i, then the t_i are dropped

DAFF, a feed-forward block of convolutions, gated for [cls]:

    u = GELU(BN(W_1 z)),  u := u + GELU(BN(depthwise 3x3 u)),  out = BN(W_3 u)              on the map z of patches
    cls := cls * (W_e GELU(W_c mean(out)))                                                   no sigmoid

No position table. Switched off one by one, `patch_embedding = "patches"` (with a table), `feed_forward = "mlp"` and
`head_tokens = False` leave a ViT. The official code (ArieSeirack/DHVT) takes square pictures of three channels only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sightline.encoders.encoder import Encoder, Features, register_encoder
from sightline.encoders.layers import (
    Mlp,
    PatchEmbed,
    init_weights,
    rates,
    resized_positions,
    to_map,
    to_tokens,
)
from sightline.encoders.vit import Block
from sightline.errors import InputError, unknown
from sightline.mixers.attention import Attention


class Affine(nn.Module):
    """A factor and an offset for each channel of a map."""

    def __init__(self, chans: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, chans, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, chans, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha + self.beta


class OverlappingPatchEmbed(nn.Module):
    """SOPE: patches by a row of convolutions that overlap, [B, C, H, W] -> [B, N, D]."""

    def __init__(self, patch_size: int, in_chans: int, width: int) -> None:
        super().__init__()
        steps = patch_size.bit_length() - 1
        if patch_size < 2 or patch_size != 1 << steps or width % (1 << (steps - 1)):
            raise InputError(
                f"overlapping patches need a patch_size of 2, 4, 8, ... and a width that its half divides, not "
                f"{patch_size} and {width}"
            )
        self.before, self.after = Affine(in_chans), Affine(width)
        parts: list[nn.Module] = []
        for step in reversed(range(steps)):
            conv = nn.Conv2d(in_chans, width >> step, kernel_size=3, stride=2, padding=1, bias=False)
            parts += [nn.Sequential(conv, nn.BatchNorm2d(width >> step)), nn.GELU()]
            in_chans = width >> step
        # As in the official code, a single convolution is followed by GELU, the last of several is not.
        self.proj = nn.Sequential(*parts if steps == 1 else parts[:-1])

    def forward(self, pixels: Tensor) -> Tensor:
        return to_tokens(self.after(self.proj(self.before(pixels))))


class HeadTokenAttention(Attention):
    """HI-MHSA: attention over [cls; patches] and one more token made of each head's channels."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        self.token_proj = nn.Linear(width // num_heads, width)
        self.token_norm = nn.LayerNorm(width // num_heads)
        self.token_positions = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, num_heads, width), std=0.02))
        self.act = nn.GELU()

    def head_tokens(self, x: Tensor) -> Tensor:
        """[B, 1 + N, D] -> [B, heads, D]."""
        means = x.mean(dim=1).unflatten(-1, (self.num_heads, -1))
        slices = self.token_norm(self.token_proj(means).unflatten(-1, (self.num_heads, -1)))
        return self.act(slices).flatten(2) + self.token_positions

    def forward(self, x: Tensor, grid: tuple[int, ...] = ()) -> Tensor:
        length = x.shape[1]
        mixed = super().forward(torch.cat([x, self.head_tokens(x)], dim=1), grid)
        cls = mixed[:, :1] + mixed[:, length:].mean(dim=1, keepdim=True)
        return torch.cat([cls, mixed[:, 1:length]], dim=1)

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...] = ()) -> int:
        return 2 * len(x) * (x.shape[1] + self.num_heads) ** 2 * x.shape[-1]


class DAFF(nn.Module):
    """The feed-forward block: convolutions for the patches, and a gate made of their mean for [cls]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.widen, self.norm1 = nn.Conv2d(width, hidden, kernel_size=1), nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.narrow, self.norm3 = nn.Conv2d(hidden, width, kernel_size=1), nn.BatchNorm2d(width)
        self.compress, self.excite = nn.Linear(width, width // 4), nn.Linear(width // 4, width)
        self.act = nn.GELU()

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        cls, patches = x[:, :1], to_map(x[:, 1:], grid)
        inner = self.act(self.norm1(self.widen(patches)))
        inner = inner + self.act(self.norm2(self.depthwise(inner)))
        out = self.norm3(self.narrow(inner))
        gate = self.excite(self.act(self.compress(out.mean(dim=(2, 3)))))
        return torch.cat([cls * gate.unsqueeze(1), to_tokens(out)], dim=1)


class GridBlock(Block):
    """A block whose feed-forward part is told the grid."""

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        x = x + self.mix(x, grid)
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


def _size(width: int, num_heads: int, patch_size: int, image_size: int) -> dict[str, Any]:
    return dict(width=width, num_heads=num_heads, patch_size=patch_size, image_size=image_size, drop_path=0.1)


@register_encoder
class DHVT(Encoder):
    """The ViT with overlapping patches, convolutions in its feed-forward blocks and head tokens.

    Args:
        width: D.
        depth: blocks.
        num_heads: heads of each block, and head tokens.
        patch_size: p, pixels a side of a token; a power of two.
        mlp_ratio: hidden width of the feed-forward blocks over D.
        patch_embedding: `overlapping` (SOPE), or `patches` cut out, with a table of positions.
        feed_forward: `daff`, or a plain `mlp`.
        head_tokens: whether attention has head tokens (HI-MHSA).
        drop_path: rate of the last block; those before rise to it linearly.
    """

    paper = "dhvt"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dhvt_tiny_cifar_patch4": _size(192, 4, 4, 32),
        "dhvt_small_cifar_patch4": _size(384, 8, 4, 32),
        "dhvt_tiny_cifar_patch2": _size(192, 4, 2, 32),
        "dhvt_small_cifar_patch2": _size(384, 8, 2, 32),
        "dhvt_tiny": _size(192, 3, 16, 224),
        "dhvt_small": _size(384, 6, 16, 224),
        "dhvt_nano": _size(64, 4, 4, 32) | dict(depth=4, drop_path=0.0),
    }
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        (r"patch_embed\.pre_affine\.(.*)", r"patch_embed.before.\1"),
        (r"patch_embed\.post_affine\.(.*)", r"patch_embed.after.\1"),
        (r"blocks\.(\d+)\.attn\.ht_proj\.(.*)", r"blocks.\1.attn.token_proj.\2"),
        (r"blocks\.(\d+)\.attn\.ht_norm\.(.*)", r"blocks.\1.attn.token_norm.\2"),
        (r"blocks\.(\d+)\.attn\.pos_embed", r"blocks.\1.attn.token_positions"),
        (r"blocks\.(\d+)\.mlp\.conv1\.(.*)", r"blocks.\1.mlp.widen.\2"),
        (r"blocks\.(\d+)\.mlp\.conv2\.(.*)", r"blocks.\1.mlp.depthwise.\2"),
        (r"blocks\.(\d+)\.mlp\.conv3\.(.*)", r"blocks.\1.mlp.narrow.\2"),
        (r"blocks\.(\d+)\.mlp\.bn(\d)\.(.*)", r"blocks.\1.mlp.norm\2.\3"),
        (r"blocks\.(\d+)\.mlp\.excitation\.(.*)", r"blocks.\1.mlp.excite.\2"),
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
        mlp_ratio: float = 4.0,
        patch_embedding: Literal["overlapping", "patches"] = "overlapping",
        feed_forward: Literal["daff", "mlp"] = "daff",
        head_tokens: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(image_size=image_size, in_chans=in_chans, num_classes=num_classes, width=width)
        if patch_embedding not in ("overlapping", "patches"):
            raise unknown("patch_embedding", patch_embedding, ("overlapping", "patches"))
        if feed_forward not in ("daff", "mlp"):
            raise unknown("feed_forward", feed_forward, ("daff", "mlp"))
        self.patch_size = patch_size
        self.check_size(*self.image_size)
        self.grid = (self.image_size[0] // patch_size, self.image_size[1] // patch_size)
        overlapping, hidden = patch_embedding == "overlapping", int(width * mlp_ratio)
        self.patch_embed = (OverlappingPatchEmbed if overlapping else PatchEmbed)(patch_size, in_chans, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = None if overlapping else nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], width))
        self.blocks = nn.ModuleList()
        for rate in rates(drop_path, depth):
            mixer = (HeadTokenAttention if head_tokens else Attention)(width, num_heads)
            if feed_forward == "daff":
                self.blocks.append(GridBlock(width, mixer, mlp=DAFF(width, hidden), drop_path=rate))
            else:
                self.blocks.append(Block(width, mixer, mlp=Mlp(width, hidden), drop_path=rate))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        init_weights(self)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @property
    def stride(self) -> int:
        return self.patch_size

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        grid = (pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size)
        x = self.patch_embed(pixels)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + resized_positions(self.pos_embed, self.grid, grid, extra=1)
        states = [x[:, 1:]]
        for block in self.blocks:
            x = block(x, grid)
            states.append(x[:, 1:])
        x = self.norm(x)
        tokens = x[:, 1:]
        return Features(tokens, grid, x[:, 0], (to_map(tokens, grid),), tuple(states) if hidden_states else ())

    def classify(self, features: Features) -> Tensor:
        return self.head(features.pooled)
