"""Softmax attention by `scaled_dot_product_attention`: the baseline of every speed claim, and the mixer of the ViTs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.errors import InputError
from sightline.mixers.mixer import Mixer


class Attention(Mixer):
    """Multi-head self-attention over all tokens.

    Args:
        width: D.
        num_heads: heads; they divide the width.
        qkv_bias: whether queries, keys and values have biases.
        proj_bias: whether the output projection has one.
        drop: dropout of the attention weights while training.
    """

    def __init__(
        self, width: int, num_heads: int, *, qkv_bias: bool = True, proj_bias: bool = True, drop: float = 0.0
    ) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise InputError(f"the width {width} cannot be shared by {num_heads} heads of equal width")
        self.num_heads, self.drop = num_heads, drop
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width, bias=proj_bias)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, L, D / heads] of tokens [B, L, D]."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def forward(self, x: Tensor, grid: tuple[int, ...] = ()) -> Tensor:
        drop = self.drop if self.training else 0.0
        mixed = F.scaled_dot_product_attention(*self.heads(x), dropout_p=drop)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def with_cls_row(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The forward, and what the first token pays to every token: weights [B, heads, L].

        The row is computed on its own, so that the rest stays with the fused kernel.
        """
        query, key, value = self.heads(x)
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=self.drop if self.training else 0.0)
        scale = query.shape[-1] ** -0.5
        row = torch.softmax((query[:, :, :1] * scale) @ key.mT, dim=-1)[:, :, 0]
        return self.proj(mixed.transpose(1, 2).flatten(2)), row

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...] = ()) -> int:
        batch, length, width = x.shape
        return 2 * batch * length * length * width
