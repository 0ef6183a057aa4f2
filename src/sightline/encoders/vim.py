"""Vim: Vision Mamba, bidirectional selective scans in place of attention (Zhu et al., ICML 2024, arXiv:2401.09417).

In: pictures [B, C, H, W]. Out: tokens [B, N, D] of the patches and the class token's feature [B, D].

    x_0 = [patches 1..N/2; class; the others] + positions
    x  := x + mixer(RMSNorm(x))          for each block; no MLP.  The mixer: `mixers/bidirectional_mamba.py`
    tokens = RMSNorm(x)

The class token stands in the middle, at floor(N / 2), where both directions reach it after half of the picture. The
sum x is kept in float32 at least. In the official code (hustvl/Vim) each layer adds the branch before it instead of its
own; this is the same sum, and its drop-path rates are those of here. Its checkpoints for longer sequences cut patches
of 16 pixels every 8. It resizes position tables as if the class token came first; here it is taken out of the middle
and put back into the new one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from sightline.encoders.encoder import Encoder, Features, register_encoder
from sightline.encoders.layers import DropPath, rates, resized_positions, to_map
from sightline.errors import InputError, unknown
from sightline.mixers.bidirectional_mamba import BidirectionalMamba, Mamba, MambaState
from sightline.mixers.mixer import Mixer

ClassPlace = Literal["middle", "head"]

SIZES: Mapping[str, Mapping[str, Any]] = {
    "nano": dict(embed_dim=64, depth=4, patch_size=4, image_size=32),
    "tiny": dict(embed_dim=192, depth=24, patch_size=16, image_size=224),
    "small": dict(embed_dim=384, depth=24, patch_size=16, image_size=224),
    "base": dict(embed_dim=768, depth=24, patch_size=16, image_size=224),
}


class VimBlock(nn.Module):
    """x + mixer(norm(x)), the sum in the precision of x."""

    def __init__(self, width: int, mixer: Mixer, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)

    def normed(self, x: Tensor) -> Tensor:
        """The input of the mixer."""
        return self.norm(x.to(self.norm.weight.dtype))

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return x + self.drop_path(self.mixer(self.normed(x), grid))


class Patches(nn.Module):
    """Patches of p x p pixels, one each `step` pixels: [B, C, H, W] -> [B, N, D], row after row."""

    def __init__(self, patch_size: int, step: int, in_chans: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, patch_size, stride=step)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).mT


@register_encoder
class Vim(Encoder):
    """Vision Mamba.

    Args:
        embed_dim: D.
        depth: blocks.
        patch_size: pixels a side of a patch.
        patch_stride: pixels from a patch to the next, `patch_size` if None.
        d_state: N, numbers of state a channel.
        expand: channels of the scans over D.
        drop_path: rate of the last block; those before rise to it linearly.
        class_token: where it stands: in the `middle` as published, or at the `head`.
        directions: 2 as published; 1 for the forward scan alone, which can also be fed token by token (`step`).
        symmetric_init: see `BidirectionalMamba`.
    """

    paper: ClassVar[str] = "vim"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **{f"vim_{size}": values for size, values in SIZES.items()},
        **{f"vim_{size}_stride8": {**SIZES[size], "patch_stride": 8} for size in ("tiny", "small")},
    }
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        (r"layers\.(\d+)\.mixer\.(conv1d|x_proj|dt_proj)_b\.(weight|bias)", r"blocks.\1.mixer.back.\2.\3"),
        (r"layers\.(\d+)\.mixer\.(conv1d|x_proj|dt_proj)\.(weight|bias)", r"blocks.\1.mixer.ahead.\2.\3"),
        (r"layers\.(\d+)\.mixer\.A_b_log", r"blocks.\1.mixer.back.A_log"),
        (r"layers\.(\d+)\.mixer\.D_b", r"blocks.\1.mixer.back.D"),
        (r"layers\.(\d+)\.mixer\.(A_log|D)", r"blocks.\1.mixer.ahead.\2"),
        (r"layers\.(\d+)\.(.+)", r"blocks.\1.\2"),
        (r"norm_f\.weight", "norm.weight"),
    )

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        embed_dim: int = 192,
        depth: int = 24,
        patch_size: int = 16,
        patch_stride: int | None = None,
        d_state: int = 16,
        expand: int = 2,
        drop_path: float = 0.0,
        class_token: ClassPlace = "middle",
        directions: int = 2,
        symmetric_init: bool = False,
    ) -> None:
        super().__init__(image_size=image_size, in_chans=in_chans, num_classes=num_classes, width=embed_dim)
        if directions not in (1, 2):
            raise InputError(f"directions of {self.paper} must be 1 or 2, not {directions}")
        if class_token not in get_args(ClassPlace):
            raise unknown(f"class_token of {self.paper}", class_token, get_args(ClassPlace))
        if depth < 1:
            raise InputError(f"depth of {self.paper} must be 1 or more, not {depth}")
        self.patch_size = patch_size
        self.patch_stride = patch_size if patch_stride is None else patch_stride
        if not 1 <= self.patch_stride <= patch_size:
            raise InputError(f"patch_stride of {self.paper} must be from 1 to {patch_size}, not {patch_stride}")
        self.depth, self.d_state, self.expand = depth, d_state, expand
        self.directions, self.symmetric_init = directions, symmetric_init
        self.class_token = class_token
        self.check_size(*self.image_size)
        self.grid = self.grid_of(*self.image_size)
        self.patch_embed = Patches(patch_size, self.patch_stride, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid) + 1, embed_dim))
        self.blocks = nn.ModuleList(self.block(index, rate) for index, rate in enumerate(rates(drop_path, depth)))
        self.norm = nn.RMSNorm(embed_dim, eps=1e-5)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._start()

    def _start(self) -> None:
        """Random weights, where they are not those of torch's own layers and of the mixers."""
        fan = self.in_chans * self.patch_size**2
        # A normal cut at two deviations has a deviation of 0.8796 of what it was: LeCun's 1 / fan is meant after it.
        deviation = fan**-0.5 / 0.87962566
        nn.init.trunc_normal_(self.patch_embed.proj.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            for block in self.blocks:
                block.get_parameter("mixer.out_proj.weight").div_(math.sqrt(len(self.blocks)))

    def block(self, index: int, drop_path: float) -> VimBlock:
        """Block number `index` (0-based)."""
        return VimBlock(self.width, self.mixer(), drop_path)

    def mixer(self) -> Mixer:
        """The mixer of a block."""
        if self.directions == 1:
            return Mamba(self.width, d_state=self.d_state, expand=self.expand)
        return BidirectionalMamba(
            self.width, d_state=self.d_state, expand=self.expand, symmetric_init=self.symmetric_init
        )

    @property
    def stride(self) -> int:
        return self.patch_stride

    def check_size(self, height: int, width: int) -> None:
        super().check_size(height, width)
        if min(height, width) < self.patch_size:
            raise InputError(
                f"{self.called} takes pictures of {self.patch_size} pixels a side at least, not {height} x {width}"
            )

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (height - self.patch_size) // self.patch_stride + 1, (width - self.patch_size) // self.patch_stride + 1

    def class_index(self, patches: int) -> int:
        """Where the class token stands among so many patches."""
        return patches // 2 if self.class_token == "middle" else 0

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table of a grid, [1, N + 1, D]."""
        if grid == self.grid:
            return self.pos_embed
        return resized_around_class(self.pos_embed, self.grid, grid, self.class_index)

    def embed(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int], int]:
        """The tokens that enter the first block, the grid of the patches, and where the class token stands."""
        grid = self.grid_of(*pixels.shape[-2:])
        patches = self.patch_embed(pixels)
        middle = self.class_index(patches.shape[1])
        x = torch.cat([patches[:, :middle], self.cls_token.expand(len(patches), -1, -1), patches[:, middle:]], dim=1)
        x = x + self.positions(grid)
        return x.to(torch.promote_types(x.dtype, torch.float32)), grid, middle

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        x, grid, middle = self.embed(pixels)
        states = [without(x, middle)] if hidden_states else []
        for block in self.blocks:
            x = block(x, grid)
            if hidden_states:
                states.append(without(x, middle))
        return self.finish(x, grid, middle, states)

    def finish(self, x: Tensor, grid: tuple[int, int], middle: int, states: list[Tensor]) -> Features:
        """The features of what the last block gave, all tokens in their places."""
        x = self.norm(x.to(self.norm.weight.dtype))
        tokens = without(x, middle)
        return Features(tokens, grid, x[:, middle], (to_map(tokens, grid),), tuple(states))

    def classify(self, features: Features) -> Tensor:
        return self.head(features.pooled)

    def init_state(self, batch: int) -> list[MambaState]:
        """The state of every block before the first token; for `step`."""
        return [mixer.init_state(batch) for _, mixer in self._streaming()]

    def step(self, x: Tensor, state: list[MambaState]) -> tuple[Tensor, list[MambaState]]:
        """One token [B, D] of those that enter the first block -> its feature after the final norm, and the states."""
        states = []
        for (block, mixer), before in zip(self._streaming(), state, strict=True):
            mixed, after = mixer.step(block.normed(x), before)
            x = x + mixed
            states.append(after)
        return self.norm(x.to(self.norm.weight.dtype)), states

    def _streaming(self) -> list[tuple[VimBlock, Mamba]]:
        if self.directions == 2:
            raise InputError(f"{self.called} reads tokens in both directions; to stream, set directions=1")
        return [(block, block.mixer) for block in self.blocks]  # type: ignore[misc]

    def adapt_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        table = state.get("pos_embed")
        if table is None or table.ndim != 3 or table.shape == self.pos_embed.shape:
            return state
        side = math.isqrt(table.shape[1] - 1)
        if side**2 != table.shape[1] - 1:  # not of a square picture: its grid cannot be known
            return state
        return {**state, "pos_embed": resized_around_class(table, (side, side), self.grid, self.class_index)}


def without(x: Tensor, index: int) -> Tensor:
    """Tokens [B, L, D] but one."""
    return torch.cat([x[:, :index], x[:, index + 1 :]], dim=1)


def resized_around_class(table: Tensor, old: tuple[int, int], new: tuple[int, int], index_of: Any) -> Tensor:
    """A position table for another grid; `index_of(patches)` says where the class token's entry stands."""
    was, becomes = index_of(math.prod(old)), index_of(math.prod(new))
    patches = resized_positions(without(table, was), old, new)
    return torch.cat([patches[:, :becomes], table[:, was : was + 1], patches[:, becomes:]], dim=1)
