"""Recurrent encoders of pictures: the networks of A Critical Review of Recurrent Neural Networks for Sequence Learning
(Lipton, Berkowitz and Elkan 2015, arXiv:1506.00019) where a vision transformer has attention.

In: pictures [B, C, H, W], sides multiples of the patch. Out: tokens [B, N, D], one a patch, and their mean.

    x_0 = patches + positions
    x  := x + mixer(LN(x));   x := x + MLP(LN(x))            for each block
    tokens = LN(x)

The mixer runs recurrent layers over the patches along one or several orders (`PatchRNN`), or along every row and then
every column (`ReNet`); positions are added before the patches are re-ordered. The review is of sequences and names no
encoder of pictures, so sizes are those of ViT. There is no class token: a layer that reads from left to right would
see nothing from the first place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sightline.encoders.encoder import register_encoder
from sightline.encoders.vit import Block, VisionTransformer
from sightline.errors import unknown
from sightline.mixers.mixer import Mixer
from sightline.mixers.recurrent import PatchRNN, ReNet

MIXERS = ("patches", "rows_and_columns")
_NANO: Mapping[str, Any] = dict(image_size=32, patch_size=4, width=64, depth=4)
_TINY: Mapping[str, Any] = dict(image_size=224, patch_size=16, width=192, depth=12)
_BOTH_WAYS = ("raster", "raster_reversed")
_FOUR_WAYS = ("raster", "column", "raster_reversed", "column_reversed")


@register_encoder
class RecurrentVisionEncoder(VisionTransformer):
    """A vision transformer whose attention is a recurrent network.

    Args:
        width: D.
        depth: blocks.
        patch_size: pixels a side of a patch.
        mixer: `patches` (one long sequence) or `rows_and_columns`.
        cell: one of `sightline.mixers.recurrent.CELLS`; `elman`, `lstm` or `gru` for rows and columns.
        orders: orders of `patches`, each with a layer of its own.
        forget_bias: start of the forget gates' biases. The sequences have 64 tokens and more, over which an LSTM that
            starts with 1 passes no gradient.
        mlp_ratio: hidden width of the MLP over D.
        drop_path: rate of the last block; those before rise to it linearly.
        layer_scale: start of LayerScale, None for none.
    """

    paper: ClassVar[str] = "recurrent_review"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "patch_rnn_nano": dict(_NANO, cell="elman"),
        "patch_gru_nano": dict(_NANO, cell="gru"),
        "patch_lstm_nano": dict(_NANO),
        "patch_blstm_nano": dict(_NANO, orders=_BOTH_WAYS),
        "patch_lstm_four_nano": dict(_NANO, orders=_FOUR_WAYS),
        "renet_nano": dict(_NANO, mixer="rows_and_columns"),
        "patch_lstm_tiny": dict(_TINY),
        "patch_blstm_tiny": dict(_TINY, orders=_BOTH_WAYS),
        "renet_tiny": dict(_TINY, mixer="rows_and_columns"),
    }

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        width: int = 192,
        depth: int = 12,
        patch_size: int = 16,
        mixer: str = "patches",
        cell: str = "lstm",
        orders: Sequence[str] = ("raster",),
        forget_bias: float = 3.0,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        if mixer not in MIXERS:
            raise unknown("mixer of a recurrent encoder", mixer, MIXERS)
        self._mixer = (mixer, cell, tuple(orders), forget_bias)
        super().__init__(
            image_size=image_size,
            in_chans=in_chans,
            num_classes=num_classes,
            width=width,
            depth=depth,
            num_heads=1,
            patch_size=patch_size,
            mlp_ratio=mlp_ratio,
            class_token=False,
            drop_path=drop_path,
            layer_scale=layer_scale,
        )

    def block(self, index: int, drop_path: float) -> Block:
        kind, cell, orders, forget_bias = self._mixer
        mixer: Mixer
        if kind == "patches":
            mixer = PatchRNN(self.width, cell=cell, orders=orders, forget_bias=forget_bias)
        else:
            mixer = ReNet(self.width, cell=cell, forget_bias=forget_bias)
        return Block(self.width, mixer, mlp_ratio=self.mlp_ratio, drop_path=drop_path, layer_scale=self.layer_scale)
