"""The small parts that encoders share: patches, position tables, feed-forward blocks, norms over channels, drop path.

Shapes: B pictures, N tokens, D width, H x W a map or grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PatchEmbed(nn.Module):
    """Patches of p x p pixels, each through one linear map: [B, C, H, W] -> [B, (H/p)(W/p), D], row after row."""

    def __init__(self, patch_size: int, in_chans: int, width: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, width, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, pixels: Tensor) -> Tensor:
        # Side by side in memory, or every sum of a residual stream would keep the map's order, and every norm copy it.
        return self.proj(pixels).flatten(2).mT.contiguous()


class Mlp(nn.Module):
    """Two linear maps with an activation between, token by token."""

    def __init__(self, width: int, hidden: int, act: Callable[[], nn.Module] = nn.GELU, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SwiGLU(nn.Module):
    """SiLU of one half times the other, W2 (SiLU(a) b) with [a, b] = W1 x, without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class DropPath(nn.Module):
    """Leaves a whole residual branch out for a sample, with probability `rate`, while training (stochastic depth)."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        keep = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class LayerScale(nn.Module):
    """Multiplies each channel of a residual branch by a number that is learned and starts small."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, C, H, W], position by position."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def rates(rate: float, depth: int) -> list[float]:
    """Drop-path rates of `depth` blocks, rising linearly from 0 to `rate`."""
    return [rate * index / max(1, depth - 1) for index in range(depth)]


def to_map(tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[B, N, D] -> [B, D, *grid]."""
    return tokens.mT.unflatten(2, grid)


def to_tokens(values: Tensor) -> Tensor:
    """[B, D, *grid] -> [B, N, D]."""
    return values.flatten(2).mT


def resized_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], *, extra: int = 0) -> Tensor:
    """A position table for another grid, by bicubic interpolation with antialiasing.

    Args:
        table: [1, extra + rows * columns, D]; the first `extra` entries (a class token's) stay as they are.
        old: the grid of the table.
        new: the wanted grid.
        extra: entries before those of the patches.
    """
    if old == new:
        return table
    first, patches = table[:, :extra], table[:, extra:]
    image = patches.mT.unflatten(2, old).float()
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([first, image.flatten(2).mT.to(table.dtype)], dim=1)


def with_positions(state: dict[str, Tensor], key: str, grid: tuple[int, int], *, extra: int) -> dict[str, Tensor]:
    """A state dict whose position table fits `grid`.

    Args:
        state: of an official checkpoint, whose grid is a square.
        key: of the table [1, extra + rows * columns, D] in it.
        grid: the wanted (rows, columns).
        extra: entries before those of the patches.

    Returns:
        The state dict with the table resized; as it was where there is no such table, or none of a square grid.
    """
    table = state.get(key)
    if table is None or table.ndim != 3:
        return state
    side = math.isqrt(max(0, table.shape[1] - extra))
    if side * side + extra != table.shape[1] or side == 0:
        return state
    return state | {key: resized_positions(table, (side, side), grid, extra=extra)}


def init_weights(module: nn.Module) -> None:
    """The usual start of vision transformers: linear maps from a normal of deviation 0.02 cut at two, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            nn.init.ones_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
