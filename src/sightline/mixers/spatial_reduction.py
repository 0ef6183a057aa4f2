"""Spatial-reduction attention (PVT, Wang et al., ICCV 2021, arXiv:2102.12122): what HiLo is compared with.

In and out: tokens [B, H W, D] on a grid H x W. Every token attends to R x R times fewer keys and values, made by a
convolution of kernel and stride R:

    z = LN(conv_RxR(x)),   q = W_q x,   [k, v] = W_kv z,   out = W_proj softmax(q k^T / sqrt(d)) v

R = 1 is ordinary attention, without convolution and norm. PVT's code leaves the last rows and columns of a grid that is
no multiple of R out of the keys; here it is filled up with zeros, at the bottom and on the right, so that none is lost.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sightline.errors import InputError
from sightline.mixers.mixer import Mixer
from sightline.mixers.window_attention import check_grid, window_count


class SpatialReductionAttention(Mixer):
    """Multi-head self-attention whose keys and values are a smaller map.

    Args:
        width: D.
        num_heads: heads; they divide the width.
        reduction: R; PVT has 8, 4, 2 and 1 in its four stages.
        qkv_bias: whether queries, keys and values have biases.
    """

    def __init__(self, width: int, num_heads: int, *, reduction: int = 2, qkv_bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise InputError(f"the width {width} cannot be shared by {num_heads} heads of equal width")
        if reduction < 1:
            raise InputError(f"reduction must be 1 or more tokens a side, not {reduction}")
        self.num_heads, self.reduction = num_heads, reduction
        self.query = nn.Linear(width, width, bias=qkv_bias)
        self.key_value = nn.Linear(width, 2 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.reduce = nn.Conv2d(width, width, kernel_size=reduction, stride=reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(width) if reduction > 1 else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        check_grid(x, grid)
        query = self.query(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        fewer = x
        if self.reduce is not None:
            rows, columns = window_count(grid, self.reduction)
            below, beside = rows * self.reduction - grid[0], columns * self.reduction - grid[1]
            fewer = self.reduce(F.pad(x.mT.unflatten(2, grid), (0, beside, 0, below))).flatten(2).mT
        key, value = self.key_value(self.norm(fewer)).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...]) -> int:
        rows, columns = window_count(grid, self.reduction)
        return 2 * x.numel() * rows * columns
