"""HiLo attention (Pan, Cai and Zhuang, NeurIPS 2022, arXiv:2205.13213): some heads look inside small windows for detail
(Hi-Fi), the others at the windows' averages for the layout (Lo-Fi).

In and out: tokens [B, H W, D] on a grid H x W. Of the heads, each of width d, int(alpha heads) are Lo-Fi ones, together
D_lo wide, and the rest Hi-Fi ones, together D_hi wide; windows have s x s tokens.

    Hi-Fi   [q, k, v] = W_hi x,               y_hi = W_ho softmax(q k^T / sqrt(d)) v    within each window
    Lo-Fi   q = W_q x,  [k, v] = W_kv mean(x over each window),
                                              y_lo = W_lo softmax(q k^T / sqrt(d)) v    over all windows
    out = [y_hi, y_lo]

There is no projection of both halves together. s = 1 makes all heads Lo-Fi ones, and that is ordinary attention.
The official code (ziplab/LITv2) takes grids that are multiples of s, and for detection fills others up with zeros that
count as tokens; here what is filled up is neither attended to nor averaged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.errors import InputError
from sightline.mixers.mixer import Mixer
from sightline.mixers.window_attention import as_map, attend_in_windows, check_grid, window_count


class HiLo(Mixer):
    """Attention in windows by some heads, and to the windows' averages by the others.

    Args:
        width: D.
        num_heads: heads; they divide the width.
        alpha: share of the heads that are Lo-Fi ones, from 0 to 1, rounded down to a whole number of heads.
        window_size: s, tokens a side of a window.
        qkv_bias: whether queries, keys and values have biases.
    """

    def __init__(
        self, width: int, num_heads: int, *, alpha: float = 0.9, window_size: int = 2, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise InputError(f"the width {width} cannot be shared by {num_heads} heads of equal width")
        if not 0 <= alpha <= 1:
            raise InputError(f"alpha must be from 0 to 1, not {alpha}")
        if window_size < 1:
            raise InputError(f"window_size must be 1 or more tokens a side, not {window_size}")
        self.window_size = window_size
        self.low_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.high_heads = num_heads - self.low_heads
        self.low_width = self.low_heads * (width // num_heads)
        self.high_width = width - self.low_width
        if self.high_heads:
            self.high_qkv = nn.Linear(width, 3 * self.high_width, bias=qkv_bias)
            self.high_proj = nn.Linear(self.high_width, self.high_width)
        if self.low_heads:
            self.low_query = nn.Linear(width, self.low_width, bias=qkv_bias)
            self.low_key_value = nn.Linear(width, 2 * self.low_width, bias=qkv_bias)
            self.low_proj = nn.Linear(self.low_width, self.low_width)

    def high(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The Hi-Fi half [B, H W, D_hi]."""
        return self.high_proj(attend_in_windows(self.high_qkv(x), grid, self.window_size, self.high_heads))

    def low(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The Lo-Fi half [B, H W, D_lo]."""
        query = self.low_query(x).unflatten(-1, (self.low_heads, -1)).transpose(1, 2)
        averages = x
        if self.window_size > 1:
            # A window that the grid's end cuts is averaged over the tokens that it has.
            pooled = F.avg_pool2d(as_map(x, grid), self.window_size, ceil_mode=True)
            averages = pooled.flatten(2).mT
        key, value = self.low_key_value(averages).unflatten(-1, (2, self.low_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.low_proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        check_grid(x, grid)
        if not self.low_heads:
            return self.high(x, grid)
        if not self.high_heads:
            return self.low(x, grid)
        return torch.cat([self.high(x, grid), self.low(x, grid)], dim=-1)

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...]) -> int:
        rows, columns = window_count(grid, self.window_size)
        in_windows = rows * columns * self.window_size**4 * self.high_width
        to_averages = x.shape[1] * rows * columns * self.low_width
        return 2 * len(x) * (in_windows + to_averages)
