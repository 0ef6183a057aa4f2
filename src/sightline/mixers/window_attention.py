"""Attention inside windows that do not overlap (Swin, Liu et al., ICCV 2021, arXiv:2103.14030), without its relative
position bias and its shifts: what HiLo is compared with.

In and out: tokens [B, H W, D] on a grid H x W. With [q, k, v] = W_qkv x, in every window of w x w tokens and every head

    y = softmax(q k^T / sqrt(d)) v,    out = W_proj y

A grid that is no multiple of w is filled up at the bottom and on the right; no token attends to what was filled in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.errors import InputError
from sightline.mixers.attention import Attention


def window_count(grid: tuple[int, ...], window_size: int) -> tuple[int, int]:
    """Rows and columns of windows that cover a grid, the last ones filled up where it is no multiple."""
    return -(-grid[0] // window_size), -(-grid[1] // window_size)


def check_grid(x: Tensor, grid: tuple[int, ...]) -> None:
    """Raises `InputError` unless the tokens are those of a grid of rows and columns and nothing else."""
    if len(grid) != 2 or x.shape[1] != grid[0] * grid[1]:
        raise InputError(
            f"the tokens have to be those of a grid (rows, columns) without extra ones, not {x.shape[1]} on {grid}"
        )


def as_map(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[B, H W, D] -> [B, D, H, W] without copying: channels last, and taken as such by kernels at batch 1 too."""
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


def attend_in_windows(qkv: Tensor, grid: tuple[int, ...], window_size: int, num_heads: int) -> Tensor:
    """Softmax attention inside windows.

    Args:
        qkv: [B, H W, 3 heads d]: queries, keys and values of all heads, of tokens in raster order.
        grid: (H, W).
        window_size: w; a w x w window is filled up with tokens that nothing attends to, where the grid ends in it.
        num_heads: heads.

    Returns:
        [B, H W, heads d].
    """
    (rows, columns), w = window_count(grid, window_size), window_size
    below, beside = rows * w - grid[0], columns * w - grid[1]
    batch, mask = len(qkv), None
    qkv = qkv.unflatten(1, grid)
    if below or beside:
        qkv = F.pad(qkv, (0, 0, 0, beside, 0, below))
        real = F.pad(torch.ones(grid, dtype=torch.bool, device=qkv.device), (0, beside, 0, below))
        mask = real.view(rows, w, columns, w).transpose(1, 2).reshape(-1, 1, 1, w * w).repeat(batch, 1, 1, 1)
    qkv = qkv.view(batch, rows, w, columns, w, 3, num_heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
    query, key, value = qkv.reshape(3, batch * rows * columns, num_heads, w * w, -1).unbind(0)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    mixed = mixed.view(batch, rows, columns, num_heads, w, w, -1).permute(0, 1, 4, 2, 5, 3, 6)
    mixed = mixed.reshape(batch, rows * w, columns * w, -1)
    return mixed[:, : grid[0], : grid[1]].flatten(1, 2)


class WindowAttention(Attention):
    """Multi-head self-attention of each w x w window of tokens.

    Args:
        width: D.
        num_heads: heads; they divide the width.
        window_size: w, tokens a side of a window.
        qkv_bias: whether queries, keys and values have biases.
    """

    def __init__(self, width: int, num_heads: int, *, window_size: int = 7, qkv_bias: bool = True) -> None:
        super().__init__(width, num_heads, qkv_bias=qkv_bias)
        if window_size < 1:
            raise InputError(f"window_size must be 1 or more tokens a side, not {window_size}")
        self.window_size = window_size

    def forward(self, x: Tensor, grid: tuple[int, ...] = ()) -> Tensor:
        check_grid(x, grid)
        return self.proj(attend_in_windows(self.qkv(x), grid, self.window_size, self.num_heads))

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...] = ()) -> int:
        rows, columns = window_count(grid, self.window_size)
        return 2 * len(x) * rows * columns * self.window_size**4 * x.shape[-1]
