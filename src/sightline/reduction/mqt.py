"""MQT: a Matryoshka Query Transformer in the place of the connector (Hu et al., NeurIPS 2024, arXiv:2405.19315).

In: what the connector reads of each picture, X [n, C] on a grid of n = rows * columns patches. Out: the first m of M
ordered visual tokens, [m, D] for a decoder of width D; any m from 1 to M with the same weights. They take the first m
places that the picture's own tokens had.

    P      fixed 2-D sine and cosine table of a sqrt(M) x sqrt(M) raster, [M, width]: columns fill the first half of the
           channels, rows the second; each half is [sin(pos * w), cos(pos * w)], w_i = 10000 ** (-i / (width / 4))
    P_img  P resized to the picture's grid (bicubic), [n, width]
    q      LN(Q[:m] + P[:m]), with M learned latent queries Q
    k      LN(P_img)                              key_mode "position"
           LN(LN(X) + P_img)                      key_mode "content+position"
    v      LN(X)
    out    MultiHeadAttention(q, k, v) W          W [width, D], drawn from N(0, 1) / sqrt(D); no residual, no bias

Queries do not see each other, so that the m tokens are exactly the first m of the M. Their order comes from training
alone: each step of the second stage trains the first m, m drawn from 2, 4, ..., M (official code; odd m work as well,
but are never trained). A resampler trained with all M only cannot be cut: that is the control.

Official code (gordonhu608/MQT-LLaVA, `multimodal_projector/builder.py`). The paper writes of attention to the picture's
features; the released code has keys of position alone, so that its attention is the same for every picture and the
whole is linear in LN(X). Its weights need that; new ones are better made with keys that show the picture (see `MQT`).
It differs in this: where `width` is not that of the tower, a linear map without bias leads there (there the widths
agree), and the table is not rounded to half precision.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from math import isqrt
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.errors import InputError, unknown
from sightline.methods import in_range, register
from sightline.reduction.trained_reducer import TOWER, TrainedReducer, connector_input, first_places

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy, TowerReading
    from sightline.models.call import Call, Encoded, Reduced

KEY_MODES = ("position", "content+position")
MAX_TOKENS = 256
"""M in the paper."""


def position_table(rows: int, columns: int, width: int) -> Tensor:
    """The fixed table of a raster, float32 [rows * columns, width]; `width` is divisible by four."""
    rates = 10_000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def waves(places: Tensor) -> Tensor:
        angles = places.double()[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([waves(column.flatten()), waves(row.flatten())], dim=1).float()


class Resampler(nn.Module):
    """M ordered queries that read a picture's patches once.

    Args:
        channels: C, the width of the patches.
        width: of queries, keys and values; divisible by four and by `num_heads`.
        out_width: D, the width of the decoder.
        max_tokens: M, a square number.
        num_heads: attention heads.
        key_mode: what a key tells: the patch's place, or what is there too.
    """

    def __init__(
        self, channels: int, width: int, out_width: int, max_tokens: int, num_heads: int, key_mode: str = "position"
    ) -> None:
        super().__init__()
        self.key_mode, self.side = key_mode, isqrt(max_tokens)
        self.query = nn.Parameter(torch.empty(max_tokens, width))
        self.widen = nn.Identity() if channels == width else nn.Linear(channels, width, bias=False)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.projection = nn.Parameter(torch.randn(width, out_width) * out_width**-0.5)
        self.positions: Tensor
        self.register_buffer("positions", position_table(self.side, self.side, width), persistent=False)
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.trunc_normal_(self.attention.out_proj.weight, std=0.02)

    def forward(self, patches: Tensor, tokens: int, grid: tuple[int, int]) -> Tensor:
        """[pictures, rows * columns, C] -> [pictures, tokens, D]."""
        outputs: Tensor = self.attention(*self._parts(patches, tokens, grid), need_weights=False)[0]
        return outputs @ self.projection

    def weights(self, patches: Tensor, tokens: int, grid: tuple[int, int]) -> Tensor:
        """What each of the tokens pays to each patch, [pictures, heads, tokens, rows * columns]."""
        weights: Tensor = self.attention(*self._parts(patches, tokens, grid), average_attn_weights=False)[1]
        return weights

    def _parts(self, patches: Tensor, tokens: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        raster = self.positions.T.unflatten(1, (self.side, self.side))[None]
        places = F.interpolate(raster, size=grid, mode="bicubic", align_corners=False)[0].flatten(1).T
        value = self.ln_v(self.widen(patches))
        key = self.ln_k(places.expand_as(value) if self.key_mode == "position" else value + places)
        query = self.ln_q(self.query[:tokens] + self.positions[:tokens])
        return query.expand(len(value), -1, -1), key, value


@register
@dataclass(frozen=True)
class MQT(TrainedReducer):
    """Puts the first `tokens` of `max_tokens` learned queries' outputs in the place of a picture's visual tokens.

    Args:
        tokens: m, in [0, max_tokens]; 0 leaves the model's own connector on. The paper reports 2 to 256.
        max_tokens: M, a square number, at most the visual tokens of a picture. None: the paper's 256, or the largest
            square below, where a picture has fewer.
        num_heads: attention heads; 16 in the paper.
        width: of queries, keys and values, a multiple of four and of `num_heads`; 0 takes the tower's own, as in the
            paper, where it is 1024.
        key_mode: `position` is the released code, for its weights; `content+position` is what the paper writes, and the
            default for weights that are trained here: in a small trial (the colour and the place of one patch among
            64) it learned both in a few hundred steps, while keys of position alone learned part of the colour in more
            than twice as many.
        nested: train each step with a random m; false trains all M at every step, as in the paper's first stage.
    """

    paper: ClassVar[str] = "mqt"
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("tokens", (1, 2, 4, 8, 16, 36, 64))
    changes: ClassVar[frozenset[str]] = frozenset({"which visual tokens reach the decoder"})
    structure: ClassVar[tuple[str, ...]] = ("max_tokens", "num_heads", "width", "key_mode")

    tokens: int = 16
    max_tokens: int | None = None
    num_heads: int = 16
    width: int = 0
    key_mode: Literal["position", "content+position"] = "content+position"
    nested: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens is not None:
            in_range(self, "max_tokens", 4, 16_384, whole=True)
        in_range(self, "tokens", 0, self.max_tokens or MAX_TOKENS, whole=True)
        in_range(self, "num_heads", 1, 1024, whole=True)
        in_range(self, "width", 0, 65_536, whole=True)
        if self.max_tokens is not None and isqrt(self.max_tokens) ** 2 != self.max_tokens:
            raise InputError(f"max_tokens of mqt must be a square number (64, 144, 256, ...), not {self.max_tokens!r}")
        if self.key_mode not in KEY_MODES:
            raise unknown("key_mode of mqt", str(self.key_mode), KEY_MODES)

    @property
    def is_identity(self) -> bool:
        return self.tokens == 0

    def identity(self) -> Self:
        return replace(self, tokens=0)

    def settled(self, anatomy: Anatomy) -> Self:
        if self.max_tokens is not None:
            return self
        rows, columns = anatomy.picture_grid
        return replace(self, max_tokens=isqrt(min(rows * columns, MAX_TOKENS)) ** 2)

    def per_step(self, rng: random.Random) -> Self:
        assert self.max_tokens is not None
        return replace(self, tokens=rng.randrange(2, self.max_tokens + 1, 2) if self.nested else self.max_tokens)

    def check(self, anatomy: Anatomy) -> None:
        connector_input(self.paper, anatomy)
        width = self.width or anatomy.connector_width
        if width % 4 or width % self.num_heads:
            raise InputError(
                f"width of mqt must be a multiple of four and of num_heads ({self.num_heads}), and {width} is not"
            )
        rows, columns = anatomy.picture_grid
        if self.max_tokens is not None and self.max_tokens > rows * columns:
            raise InputError(
                f"max_tokens of mqt must be at most the visual tokens of a picture, here {rows * columns}, not "
                f"{self.max_tokens}"
            )
        super().check(anatomy)

    def readings(self, anatomy: Anatomy) -> dict[str, TowerReading]:
        return {TOWER: connector_input(self.paper, anatomy)}

    def build(self, anatomy: Anatomy) -> Resampler:
        channels, out_width = anatomy.connector_width, int(anatomy.text_config.hidden_size)
        assert self.max_tokens is not None
        return Resampler(channels, self.width or channels, out_width, self.max_tokens, self.num_heads, self.key_mode)

    def reduced(self, call: Call, encoded: Encoded) -> Reduced:
        anatomy = call.boundary.anatomy
        module = self.module(anatomy)
        features: Tensor = module(encoded.readings[TOWER].float(), self.tokens, anatomy.picture_grid)
        return first_places(features, encoded)
