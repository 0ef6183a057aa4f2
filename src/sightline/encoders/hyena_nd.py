"""Hyena-ViT: a vision transformer whose attention is replaced by Hyena 2-D, in all blocks or in a part of them.

Zimerman and Wolf, "Multi-Dimensional Hyena for Spatial Inductive Bias", AISTATS 2024, arXiv:2309.13600; official code
Itamarzimm/HyenaND (a DeiT). In: pictures [B, C, H, W]. Out: the features of an encoder. The operator, and what happens
on other grids than that of `image_size`, is described in `sightline.mixers.hyena`.

    x := x + hyena or attention(LN(x));   x := x + MLP(LN(x))
    hyena             Hyena everywhere
    hyena_attention   Hyena in the blocks 0 .. depth // 2 (of 12: 7, then 5 of attention)
    attention_hyena   the reverse
    alternating       Hyena in even blocks

The configurations take the settings of the published command: full filters, and the direction `seq`: blocks with an
even number turn the grid by 180 degrees around the convolution, so that depth sees both ways (not where the layout is
`alternating`, whose Hyena blocks are all even).

Where the official code differs: without a class token (its default) it classifies by the top left patch, of which a
filter that looks up and left shows it nothing; here the tokens are averaged. It also divides each convolution by twice
the side of the grid; `released_scale=True` repeats that, and is what its checkpoints need.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from sightline.encoders.encoder import register_encoder
from sightline.encoders.vit import SIZES, Block, VisionTransformer
from sightline.errors import unknown
from sightline.mixers.attention import Attention
from sightline.mixers.hyena import Direction, FilterKind, Hyena, WindowMode

if TYPE_CHECKING:
    from torch import Tensor, nn

Layout = Literal["hyena", "hyena_attention", "attention_hyena", "alternating"]

_COMMAND: Mapping[str, Any] = dict(direction="seq", filter="full")
_NANO: Mapping[str, Any] = {**SIZES["nano"], **_COMMAND, "filter_width": 32}
_NETWORKS = (("implicit_filter", 0), ("Ximplicit_filter", 0), ("Yimplicit_filter", 1))
_WINDOWS = (("modulation", 0), ("Xmodulation", 0), ("Ymodulation", 1))


@register_encoder
class HyenaViT(VisionTransformer):
    """A ViT with mean pooling whose blocks mix by Hyena, by attention, or some by each.

    Args:
        width, depth, num_heads, patch_size, mlp_ratio, drop_path: as of `VisionTransformer`; the published training
            has a drop_path of 0.1.
        layout: which blocks are Hyena: `hyena`, `hyena_attention`, `attention_hyena` or `alternating`.
        order: gates and convolutions of the operator.
        filter: `product`, `full` or `direct`.
        direction: `standard`, `seq`, `4dir`, `4dirp` or `parallel`.
        window: `standard`, `learn`, `symmetric` or `none`.
        filter_width, emb_dim: hidden units and position features of the filters' network.
        sqrt_decay: take the square root of the window's decay.
        released_scale: divide each convolution by twice the side of the grid, as the released code does.
    """

    paper: ClassVar[str] = "hyena_nd"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "hyena_vit_tiny": {**SIZES["tiny"], **_COMMAND, "layout": "hyena"},
        "hyena_vit_hybrid_tiny": {**SIZES["tiny"], **_COMMAND, "layout": "hyena_attention"},
        "hyena_vit_nano": {**_NANO, "layout": "hyena"},
        "hyena_vit_hybrid_nano": {**_NANO, "layout": "hyena_attention"},
    }
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        *(
            (rf"(.*)\.filter_fn\.{name}\.{2 * layer}\.(.*)", rf"\1.filter.networks.{index}.{layer}.\2")
            for name, index in _NETWORKS
            for layer in range(4)
        ),
        (r"(.*)\.filter_fn\.X?implicit_filter\.1\.freq", r"\1.filter.frequency"),
        (r"(.*)\.filter_fn\.modulation\.(X?)deltas", r"\1.filter.windows.0.deltas.0"),
        (r"(.*)\.filter_fn\.modulation\.Ydeltas", r"\1.filter.windows.0.deltas.1"),
        *((rf"(.*)\.filter_fn\.{name}\.deltas", rf"\1.filter.windows.{index}.deltas.0") for name, index in _WINDOWS),
        *((rf"(.*)\.filter_fn\.{name}\.shift", rf"\1.filter.windows.{index}.shift") for name, index in _WINDOWS),
        (r"(.*)\.filter_fn\.pos_emb\.z", r"\1.filter.positions"),
        (r"(.*)\.filter_fn\.bias", r"\1.bias"),
        (r"(.*)\.attn\.filter", r"\1.attn.filter.taps"),
        (r"(.*)\.linear_mix\.(.*)", r"\1.mix.\2"),
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
        drop_path: float = 0.0,
        layout: Layout = "hyena",
        order: int = 2,
        filter: FilterKind = "product",
        direction: Literal["seq"] | Direction = "standard",
        window: WindowMode = "standard",
        filter_width: int = 64,
        emb_dim: int = 3,
        sqrt_decay: bool = False,
        released_scale: bool = False,
    ) -> None:
        if layout not in get_args(Layout):
            raise unknown("layout of a Hyena-ViT", layout, get_args(Layout))
        directions = [name for name in ("seq", *get_args(Direction)) if name != "rotated"]
        if direction not in directions:
            raise unknown("direction of a Hyena-ViT", direction, directions)
        self.depth, self.layout, self.direction, self.window = depth, layout, direction, window
        self.operator = dict(
            order=order,
            filter=filter,
            window=window,
            filter_width=filter_width,
            emb_dim=emb_dim,
            sqrt_decay=sqrt_decay,
            released_scale=released_scale,
        )
        super().__init__(
            image_size=image_size,
            in_chans=in_chans,
            num_classes=num_classes,
            width=width,
            depth=depth,
            num_heads=num_heads,
            patch_size=patch_size,
            mlp_ratio=mlp_ratio,
            class_token=False,
            drop_path=drop_path,
        )

    def is_hyena(self, index: int) -> bool:
        """Whether a block mixes by Hyena."""
        first = index <= self.depth // 2
        by_layout = {"hyena": True, "hyena_attention": first, "attention_hyena": not first}
        return by_layout.get(self.layout, index % 2 == 0)

    def block(self, index: int, drop_path: float) -> nn.Module:
        if not self.is_hyena(index):
            mixer: Attention | Hyena = Attention(self.width, self.num_heads)
        else:
            direction = self.direction
            if direction == "seq":
                direction = "rotated" if index % 2 == 0 else "standard"
            mixer = Hyena(self.width, self.grid, direction=direction, **self.operator)  # type: ignore[arg-type]
        return Block(self.width, mixer, mlp_ratio=self.mlp_ratio, drop_path=drop_path)

    def adapt_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves out buffers, the copies of the shared frequencies and the direct filters that are never read."""
        copies = r".*\.filter_fn\.(pos_emb\.t|([XY]?)implicit_filter\.[35]\.freq|Yimplicit_filter\.1\.freq)"
        fixed = r".*\.filter_fn\.[XY]?modulation\.[XY]?deltas"
        leave = copies if self.window in ("learn", "symmetric") else f"{copies}|{fixed}"
        adapted = {}
        for key, value in state.items():
            if re.fullmatch(leave, key):
                continue
            if re.search(r"\.filter_fn\.(pos_emb|.*freq$|.*deltas$|.*shift$)", key):
                value = value.squeeze(0).squeeze(0) if value.shape[:2] == (1, 1) else value.squeeze(0)
            elif key.endswith(".filter_fn.bias"):
                value = value.unflatten(0, (-1, self.width))
            elif key.endswith(".attn.filter"):
                value = value[:-1].flatten(0, 1)
            elif key.endswith(".attn.bias"):
                value = value[:-1]
            adapted[key] = value
        return adapted
