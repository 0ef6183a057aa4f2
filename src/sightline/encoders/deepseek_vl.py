"""DeepSeek-VL's hybrid encoder: a SAM tower sees the picture large, a SigLIP tower sees it small, and each gives half
of every token.

Lu et al., "DeepSeek-VL: Towards Real-World Vision-Language Understanding", arXiv:2403.05525; official code
deepseek-ai/DeepSeek-VL (`sam.py`, `siglip_vit.py`, `clip_encoder.py`). In: pictures [B, 3, H, W] in [0, 1], which each
tower normalises for itself. Out: tokens [B, 576, 2048] = [high | low] on a grid of 24 x 24, whatever H and W.

    high   SAM-B's ViTDet: 12 blocks with window attention, global in blocks 2, 5, 8, 11, decomposed relative positions
           g(y) = two 3 x 3 convolutions of stride 2 (bilinear to 96 x 96 (neck(y)))
           high = g(y_last) + alpha g'(y_2)      the released skip from the first global block, with a neck of its own
    low    SigLIP-L / 16 of the picture resized to 384 x 384 with antialiasing
    attention of a tile or the whole map: softmax(q k / sqrt(d) + q Rh[i_q - i_k] + q Rw[j_q - j_k]) v

The released pictures are padded to 1024 x 1024; any other size with sides that patches divide goes through SAM as it
is, with its tables resized, and a picture that is not square is seen stretched by both towers alike. The connector that
follows in the paper is not part of the encoder. Left out of the official modules are those that are never read:
SigLIP's attention pooling (12.6 M parameters) and the two layer norms after the towers.

The hidden states are those of the high branch, then those of the low branch.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.encoder import Encoder, Features, check_multiple, register_encoder
from sightline.encoders.layers import LayerNorm2d, PatchEmbed, init_weights, resized_positions, to_map, to_tokens
from sightline.encoders.vit import Block, VisionTransformer
from sightline.errors import InputError
from sightline.mixers.mixer import Mixer

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class DecomposedAttention(Mixer):
    """Softmax attention with learned relative positions along rows and columns, over the map or in windows of it.

    Maps that windows do not divide are padded with zeros at the bottom and right, which are attended to as well.

    Args:
        width: D.
        num_heads: heads; they divide the width.
        grid: the grid whose positions the tables hold; they are resized to others.
        window: side of a window, 0 for the whole map.
    """

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int], window: int = 0) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise InputError(f"the width {width} cannot be shared by {num_heads} heads of equal width")
        self.num_heads, self.window = num_heads, window
        rows, columns = (window, window) if window else grid
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * rows - 1, width // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * columns - 1, width // num_heads))

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        rows, columns = grid
        x = x.unflatten(1, (rows, columns))
        if not self.window:
            return self.attend(x).flatten(1, 2)
        side = self.window
        padded = F.pad(x, (0, 0, 0, -columns % side, 0, -rows % side))
        tiles = padded.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
        mixed = self.attend(tiles.flatten(0, 2)).unflatten(0, tiles.shape[:3])
        return mixed.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :rows, :columns].flatten(1, 2)

    def attend(self, x: Tensor) -> Tensor:
        """Attention over whole maps [B, H, W, D]."""
        rows, columns = x.shape[1:3]
        heads = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        at = query.unflatten(2, (rows, columns))
        by_row = torch.einsum("bnhwc,hkc->bnhwk", at, relative_table(self.rel_pos_h, rows))
        by_column = torch.einsum("bnhwc,wkc->bnhwk", at, relative_table(self.rel_pos_w, columns))
        bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(4).flatten(2, 3)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(mixed.transpose(1, 2).flatten(2)).unflatten(1, (rows, columns))

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...]) -> int:
        rows, columns = grid
        tiles = 1
        if self.window:
            tiles = math.ceil(rows / self.window) * math.ceil(columns / self.window)
            rows = columns = self.window
        length = rows * columns
        return len(x) * tiles * length * (2 * length + rows + columns) * x.shape[-1]


def relative_table(table: Tensor, side: int) -> Tensor:
    """[side, side, d]: the entry for each position of a query (first) and of a key, of a table [2 n - 1, d]."""
    steps = torch.arange(side, device=table.device)
    return resized_relative(table, side)[steps[:, None] - steps[None] + side - 1]


def resized_relative(table: Tensor, side: int) -> Tensor:
    """A table of relative positions for another side, linearly interpolated."""
    if len(table) == 2 * side - 1:
        return table
    return _at_least_single(F.interpolate, table.mT[None], size=2 * side - 1, mode="linear")[0].mT


def _at_least_single(resize: Any, values: Tensor, **how: Any) -> Tensor:
    work = values if values.dtype == torch.float64 else values.float()
    return resize(work, **how).to(values.dtype)


class SamTower(nn.Module):
    """The high branch: pixels -> maps [B, C, out, out], C the last of `downsamples`.

    Args:
        grid: patches along the sides of the picture that tables are made for.
        out: side of the map that it gives.
        hd: whether the skip from the first global block exists.
        in_chans, width, depth, num_heads, patch_size, window_size, global_layers, neck_width, downsamples: see
            `DeepSeekHybrid`.
    """

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        out: int,
        hd: bool,
        in_chans: int,
        width: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        window_size: int,
        global_layers: Sequence[int],
        neck_width: int,
        downsamples: tuple[int, int],
    ) -> None:
        super().__init__()
        self.grid, self.out, self.patch_size = grid, out, patch_size
        self.first_global = min(global_layers, default=-1)
        self.patch_embed = PatchEmbed(patch_size, in_chans, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(grid), width))
        self.blocks = nn.ModuleList(
            Block(width, DecomposedAttention(width, num_heads, grid, 0 if index in global_layers else window_size))
            for index in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(width, neck_width, 1, bias=False),
            LayerNorm2d(neck_width, eps=1e-6),
            nn.Conv2d(neck_width, neck_width, 3, padding=1, bias=False),
            LayerNorm2d(neck_width, eps=1e-6),
        )
        sizes = (neck_width, *downsamples)
        self.downsamples = nn.Sequential(
            *(nn.Conv2d(sizes[step], sizes[step + 1], 3, stride=2, padding=1, bias=False) for step in range(2))
        )
        init_weights(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.neck_hd = copy.deepcopy(self.neck) if hd else None
        self.hd_alpha_downsamples = nn.Parameter(torch.zeros(1)) if hd else None

    def forward(self, pixels: Tensor, states: list[Tensor] | None) -> Tensor:
        """`states` collects the tokens that enter the first block and those that leave each."""
        grid = (pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size)
        x = self.patch_embed(pixels) + resized_positions(self.pos_embed, self.grid, grid)
        early = x
        if states is not None:
            states.append(x)
        for index, block in enumerate(self.blocks):
            x = block(x, grid)
            if index == self.first_global:
                early = x
            if states is not None:
                states.append(x)
        high = self.reduced(self.neck(to_map(x, grid)))
        if self.neck_hd is None or self.hd_alpha_downsamples is None:
            return high
        return high + self.reduced(self.neck_hd(to_map(early, grid))) * self.hd_alpha_downsamples

    def reduced(self, features: Tensor) -> Tensor:
        """A neck's map brought to the side `out`."""
        size = (4 * self.out, 4 * self.out)
        return self.downsamples(
            _at_least_single(F.interpolate, features, size=size, mode="bilinear", align_corners=False)
        )


@register_encoder
class DeepSeekHybrid(Encoder):
    """The SAM and SigLIP towers of DeepSeek-VL 7B.

    Args:
        image_size: of the high branch.
        low_size: side of the square picture that the low branch sees.
        patch_size: pixels a side of a patch, in both.
        high_width, high_depth, high_heads: of the high branch's blocks.
        window_size: side of its attention windows, in patches.
        global_layers: its blocks (0-based) whose attention is over the whole map.
        neck_width: channels after its neck.
        downsamples: channels after each of its two convolutions of stride 2.
        low_width, low_depth, low_heads: of the low branch's blocks.
        hd: whether the skip from the first global block exists; it starts at alpha = 0, which is the path without it.
    """

    paper: ClassVar[str] = "deepseek_vl"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "deepseek_vl_hybrid": dict(image_size=1024, low_size=384),
        "deepseek_vl_hybrid_nano": dict(
            image_size=32,
            low_size=16,
            patch_size=4,
            high_width=32,
            high_depth=4,
            high_heads=2,
            window_size=3,
            global_layers=(1, 3),
            neck_width=16,
            downsamples=(32, 48),
            low_width=48,
            low_depth=3,
            low_heads=3,
        ),
    }
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        (r"vision_tower_high\.vision_tower\.(.*)\.lin([12])\.(.*)", r"high.\1.fc\2.\3"),
        (r"vision_tower_high\.vision_tower\.(.*)", r"high.\1"),
        (r"vision_tower_low\.vision_tower\.(.*)", r"low.\1"),
    )

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 1024,
        in_chans: int = 3,
        num_classes: int = 0,
        low_size: int = 384,
        patch_size: int = 16,
        high_width: int = 768,
        high_depth: int = 12,
        high_heads: int = 12,
        window_size: int = 14,
        global_layers: Sequence[int] = (2, 5, 8, 11),
        neck_width: int = 256,
        downsamples: tuple[int, int] = (512, 1024),
        low_width: int = 1024,
        low_depth: int = 24,
        low_heads: int = 16,
        hd: bool = True,
    ) -> None:
        width = downsamples[-1] + low_width
        super().__init__(image_size=image_size, in_chans=in_chans, num_classes=num_classes, width=width)
        check_multiple("DeepSeek-VL's high branch", self.image_size, patch_size)
        check_multiple("DeepSeek-VL's low branch", (low_size, low_size), patch_size)
        if any(not 0 <= layer < high_depth for layer in global_layers) or (hd and not global_layers):
            raise InputError(
                f"global_layers must be numbers of blocks from 0 to {high_depth - 1}, at least one with hd, not "
                f"{tuple(global_layers)}"
            )
        self.low_size, self.patch_size = low_size, patch_size
        self.high = SamTower(
            grid=(self.image_size[0] // patch_size, self.image_size[1] // patch_size),
            out=low_size // patch_size,
            hd=hd,
            in_chans=in_chans,
            width=high_width,
            depth=high_depth,
            num_heads=high_heads,
            patch_size=patch_size,
            window_size=window_size,
            global_layers=global_layers,
            neck_width=neck_width,
            downsamples=downsamples,
        )
        self.low = VisionTransformer(
            image_size=low_size,
            in_chans=in_chans,
            width=low_width,
            depth=low_depth,
            num_heads=low_heads,
            patch_size=patch_size,
            class_token=False,
        )
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        init_weights(self.head)
        for name, values in (
            ("high_mean", CLIP_MEAN),
            ("high_std", CLIP_STD),
            ("low_mean", SIGLIP_MEAN),
            ("low_std", SIGLIP_STD),
        ):
            each = torch.tensor(values if in_chans == 3 else [sum(values) / 3] * in_chans)
            self.register_buffer(name, each[:, None, None], persistent=False)

    @property
    def stride(self) -> int:
        return self.patch_size

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        states: list[Tensor] | None = [] if hidden_states else None
        high = to_tokens(self.high(self._normalised(pixels, "high"), states))
        small = pixels
        if pixels.shape[-2:] != (self.low_size, self.low_size):
            size = (self.low_size, self.low_size)
            how = dict(size=size, mode="bilinear", align_corners=False, antialias=True)
            small = _at_least_single(F.interpolate, pixels, **how)
        low = self.low.encode(self._normalised(small, "low"), hidden_states)
        tokens = torch.cat([high, low.tokens], dim=-1)
        both = (*(states or ()), *low.hidden_states)
        return Features(tokens, low.grid, tokens.mean(dim=1), (to_map(tokens, low.grid),), both)

    def _normalised(self, pixels: Tensor, branch: str) -> Tensor:
        return (pixels - self.get_buffer(f"{branch}_mean")) / self.get_buffer(f"{branch}_std")

    def classify(self, features: Features) -> Tensor:
        return self.head(features.pooled)

    def freeze_as_released(self) -> None:
        """Lets only the necks, the convolutions after them and alpha of the high branch train."""
        for name, parameter in self.high.named_parameters():
            parameter.requires_grad_("neck" in name or "downsamples" in name)

    def adapt_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The two towers of a whole model's state dict, without what is never read, tables resized to this grid."""
        unread = r"(aligner|language_model|high_layer_norm|low_layer_norm)\..*|vision_tower_low\..*\.attn_pool\..*"
        if self.high.neck_hd is None:
            unread += r"|vision_tower_high\..*\.(neck_hd\..*|hd_alpha_downsamples)"
        own = self.state_dict()
        adapted = {}
        for key, value in state.items():
            key = key.removeprefix("vision_model.")
            if re.fullmatch(unread, key):
                continue
            ours = own.get(self.our_key(key))
            if key.endswith("pos_embed") and ours is not None:
                high = key.startswith("vision_tower_high.")
                side = math.isqrt(math.prod(value.shape[:-1]))
                value = value.reshape(1, -1, value.shape[-1])
                if side * side == value.shape[1]:
                    value = resized_positions(value, (side, side), self.high.grid if high else self.low.grid)
            elif re.search(r"\.rel_pos_[hw]$", key) and ours is not None:
                value = resized_relative(value, (len(ours) + 1) // 2)
            adapted[key] = value
        return adapted
