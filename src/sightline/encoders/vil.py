"""Vision-LSTM, ViL (Alkin, Beck, Pöppel, Hochreiter, Brandstetter, arXiv:2406.04303): a row of mLSTM layers that read
the patches in turn from the top left and from the bottom right.

    x_0 = patches + positions
    x  := x + layer(LN(x))        every second layer reads the tokens backwards, its convolution too

Pictures [B, C, H, W] in, tokens [B, N, D] out. There is no class token: the pooled feature comes of the first and last
token, which are the ends of the two directions: their mean [B, D] in the first version, both [B, 2D] in the second.

The first version (`vil_*`) has 24 layers with causal convolutions over 4 tokens and no biases, the second (`vil2_*`) 12
pairs of layers with 3 x 3 convolutions on the grid and biases. The first one's published checkpoints have a norm after
the layers and another after pooling, and so has this class; the second has one norm before pooling. The official code
drops all branches at the same rate (`drop_path_decay` is off), and resizes positions without antialiasing; here they
are resized as in all encoders.

It is the backbone that xLSTM-UNet takes its block from, see `xlstm_unet`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sightline.encoders.encoder import Encoder, Features, check_multiple, register_encoder
from sightline.encoders.layers import DropPath, PatchEmbed, resized_positions, to_map
from sightline.errors import InputError
from sightline.mixers.mlstm import MLSTM, OffsetNorm


class ViLBlock(nn.Module):
    """x + layer(norm(x)), with drop path on the branch.

    Args:
        width: D.
        reverse: read from the last token to the first.
        drop_path: rate of leaving the branch out.
        version: 1 for causal convolutions and no biases, 2 for convolutions on the grid and biases.
        num_heads: heads of the mLSTM, and channels of a block of its projections.
    """

    def __init__(
        self, width: int, *, reverse: bool = False, drop_path: float = 0.0, version: int = 1, num_heads: int = 4
    ) -> None:
        super().__init__()
        second = version == 2
        self.norm = OffsetNorm(width, bias=second)
        self.layer = MLSTM(
            width,
            num_heads=num_heads,
            block_size=num_heads,
            conv="grid" if second else "causal",
            bias=second,
            norm_bias=second,
            reverse=reverse,
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, ...] = ()) -> Tensor:
        if not self.training:
            return self.layer.residual(x, self.norm, grid)
        return x + self.drop_path(self.layer(self.norm(x), grid))


class ViLPair(nn.Module):
    """A block in each direction, which the second version counts as one."""

    def __init__(self, width: int, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.rowwise_from_top_left = ViLBlock(width, drop_path=drop_path, version=2)
        self.rowwise_from_bot_right = ViLBlock(width, drop_path=drop_path, version=2, reverse=True)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return self.rowwise_from_bot_right(self.rowwise_from_top_left(x, grid), grid)


_WIDTHS = {"tiny": 192, "small": 384, "base": 768}


@register_encoder
class ViL(Encoder):
    """Vision-LSTM.

    Args:
        width: D, a multiple of 4.
        depth: blocks of the first version, pairs of blocks of the second.
        patch_size: pixels a side of a patch.
        drop_path: rate of every block.
        version: 1 or 2.
    """

    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "vil_nano": dict(width=48, depth=4, patch_size=4, image_size=32),
        "vil2_nano": dict(width=48, depth=2, patch_size=4, image_size=32, version=2),
        **{f"vil_{size}": dict(width=width, depth=24) for size, width in _WIDTHS.items()},
        **{f"vil2_{size}": dict(width=width, depth=12, version=2) for size, width in _WIDTHS.items()},
    }
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        (r"(?:xlstm\.)?pos_embed\.embed", "pos_embed"),
        (r"(?:xlstm\.)?patch_embed\.(.+)", r"patch_embed.\1"),
        (r"(?:xlstm\.)?post_blocks_norm\.(.+)", r"legacy_norm.\1"),
        (r"head\.0\.(.+)", r"norm.\1"),
        (r"head\.1\.(.+)", r"head.\1"),
        (r"(?:xlstm\.)?blocks\.(\d+)\.(?:xlstm_)?norm\.(.+)", r"blocks.\1.norm.\2"),
        (r"(?:xlstm\.)?blocks\.(\d+)\.(?:layer|xlstm)\.(?:mlstm_cell\.|conv1d\.)?(.+)", r"blocks.\1.layer.\2"),
        (
            r"blocks\.(\d+)\.(rowwise_from_(?:top_left|bot_right))\.layer\.(?:mlstm_cell\.)?(.+)",
            r"blocks.\1.\2.layer.\3",
        ),
    )
    """The keys of the official code, and those of the first version's published files, which are older."""

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        width: int = 192,
        depth: int = 24,
        patch_size: int = 16,
        drop_path: float = 0.0,
        version: Literal[1, 2] = 1,
    ) -> None:
        super().__init__(image_size=image_size, in_chans=in_chans, num_classes=num_classes, width=width)
        if version not in (1, 2):
            raise InputError(f"version must be 1 or 2, not {version}")
        if width % 4:
            raise InputError(f"the width of ViL must be a multiple of its 4 heads, not {width}")
        self.patch_size, self.version = patch_size, version
        check_multiple("a ViL with this patch_size", self.image_size, patch_size)
        self.grid = (self.image_size[0] // patch_size, self.image_size[1] // patch_size)
        self.patch_embed = PatchEmbed(patch_size, in_chans, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], width))
        if version == 1:
            self.blocks = nn.ModuleList(
                ViLBlock(width, reverse=index % 2 == 1, drop_path=drop_path) for index in range(depth)
            )
            self.legacy_norm: nn.Module = OffsetNorm(width)
            self.norm: nn.Module = nn.LayerNorm(width, eps=1e-6)
        else:
            self.blocks = nn.ModuleList(ViLPair(width, drop_path=drop_path) for _ in range(depth))
            self.legacy_norm = nn.Identity()
            self.norm = OffsetNorm(width, bias=True, eps=1e-6)
        self.head = nn.Linear(width * version, num_classes) if num_classes else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=2e-5)
            nn.init.zeros_(self.head.bias)

    @property
    def stride(self) -> int:
        return self.patch_size

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        grid = (pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size)
        x = self.patch_embed(pixels) + resized_positions(self.pos_embed, self.grid, grid)
        states = [x] if hidden_states else []
        for block in self.blocks:
            x = block(x, grid)
            if hidden_states:
                states.append(x)
        x = self.legacy_norm(x)
        tokens = self.norm(x)
        if self.version == 1:
            pooled = self.norm((x[:, 0] + x[:, -1]) / 2)
        else:
            pooled = torch.cat([tokens[:, 0], tokens[:, -1]], dim=-1)
        return Features(tokens, grid, pooled, (to_map(tokens, grid),), tuple(states))

    def classify(self, features: Features) -> Tensor:
        return self.head(features.pooled)

    def adapt_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The position table [1, rows, columns, D] as tokens of our grid."""
        adapted = {}
        for key, value in state.items():
            if key.endswith("pos_embed.embed") and value.ndim == 4:
                value = resized_positions(value.flatten(1, 2), (value.shape[1], value.shape[2]), self.grid)
            adapted[key] = value
        return adapted
