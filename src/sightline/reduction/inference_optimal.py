"""QueCC: few visual tokens made for the question, in the place of the connector (Li et al., arXiv:2411.03312).

The paper's law says that at fixed compute the largest decoder with very few visual tokens reasons best; QueCC is its
connector for so few. In: what the connector reads of each picture, X [n, C] on a grid of n = rows * columns patches;
the outputs X_m [n, C_m] of several layers of the vision tower, side by side; and t [D], the decoder's last hidden state
at the last token of the question alone, without the picture. Out: (rows / s) * (columns / s) tokens [D], in raster
order, at the first places that the picture's own tokens had.

    x    = X + LN(Linear(t))                                     the same for all patches
    q    = depthwise convolution of MLP_q(x), kernel = stride = s        one query a window of s x s patches
    k, v = MLP_k(X_m), MLP_v(X_m)                                C_m -> C
    out  = MultiHeadAttention(q, k and v of the query's own window)      no residual, no positions
    token = Linear(GELU(Linear(out)))                            C -> D -> D
    MLP  = Linear, GELU, Linear, LN (eps 1e-6)

A patch changes the token of its own window and no other; at s = 1 a window is one patch, and its token is the
projection of W_o W_v v whatever the question. Nothing of it can be kept for another question.

Official code (locuslab/llava-token-compression, `multimodal_projector/quecc.py`, `llava_arch.py`). It differs in this:

- The question is all text after the last picture of the prompt (all of it in a prompt that ends in a picture), behind
  the beginning-of-text token if the prompt has one. Officially it ends before the word "ASSISTANT"; a prompt's tokens
  do not show where its template goes on, so that what the template puts behind the question is read here as well.
- Widths follow the model (there 4096 stands for both D and C_m), and the four layers are shares of the tower's depth,
  those of the paper's tower. Where the tower's layers are not known, X_m is X.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sightline.errors import InputError
from sightline.methods import in_range, register
from sightline.models.anatomy import TowerReading
from sightline.models.stock_reading import read_alone
from sightline.reduction.trained_reducer import TOWER, TrainedReducer, connector_input, first_places

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy
    from sightline.models.call import Call, Encoded, Reduced


class QuestionConnector(nn.Module):
    """Query-conditioned convolution and cross-attention within windows.

    Args:
        channels: C, the width of the patches X, a multiple of `num_heads`.
        multi_channels: C_m, the width of X_m.
        out_width: D, the width of the decoder.
        stride: s, the side of a window in patches.
        num_heads: attention heads.
    """

    def __init__(self, channels: int, multi_channels: int, out_width: int, stride: int, num_heads: int = 8) -> None:
        super().__init__()
        self.stride = stride
        self.text = nn.Sequential(nn.Linear(out_width, channels), nn.LayerNorm(channels, eps=1e-6))
        self.to_query = _mlp(channels, channels)
        self.to_key = _mlp(multi_channels, channels)
        self.to_value = _mlp(multi_channels, channels)
        self.downsample = nn.Conv2d(channels, channels, stride, stride, groups=channels)
        self.attention = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        self.projector = nn.Sequential(nn.Linear(channels, out_width), nn.GELU(), nn.Linear(out_width, out_width))

    def forward(self, patches: Tensor, multi: Tensor, text: Tensor, grid: tuple[int, int]) -> Tensor:
        """[pictures, rows * columns, C], [pictures, rows * columns, C_m], [pictures, D] -> [pictures, windows, D]."""
        tokens: Tensor = self.projector(self.compressed(patches, multi, text, grid))
        return tokens

    def compressed(self, patches: Tensor, multi: Tensor, text: Tensor, grid: tuple[int, int]) -> Tensor:
        """The windows before they are brought to the decoder's width, [pictures, windows, C]."""
        query = self.to_query(patches + self.text(text)[:, None])
        query = self.downsample(query.mT.unflatten(2, grid)).flatten(2).mT
        pictures, windows, channels = query.shape
        key = self._windows(self.to_key(multi), grid)
        value = self._windows(self.to_value(multi), grid)
        output: Tensor = self.attention(query.reshape(-1, 1, channels), key, value, need_weights=False)[0]
        return output.view(pictures, windows, channels)

    def _windows(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """[pictures, rows * columns, C] -> [pictures * windows, s * s, C], windows in raster order."""
        side = self.stride
        blocks = patches.unflatten(1, (grid[0] // side, side, grid[1] // side, side))
        return blocks.transpose(2, 3).reshape(-1, side * side, patches.shape[-1])


def _mlp(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width_in, width_out),
        nn.GELU(),
        nn.Linear(width_out, width_out),
        nn.LayerNorm(width_out, eps=1e-6),
    )


class TowerLayerInput(TowerReading):
    """What a layer of the vision tower is given: the output of the one before it, [pictures, patches, width]."""

    def row(self, hidden_states: Tensor, visible: Tensor | None = None) -> Tensor:
        return hidden_states[:, self.leading :]


@register
@dataclass(frozen=True)
class QueCC(TrainedReducer):
    """Puts few tokens that were made for the question in the place of a picture's visual tokens (QueCC).

    Args:
        stride: s, the side in patches of the windows that become a token each: 4, 6, 8, 12 and 24 in the paper, for 36,
            16, 9, 4 and 1 token of 24 x 24 patches. It divides both sides of the tower's grid; None: 4, or the largest
            below that does. 0 leaves the model's own connector on.
        num_heads: attention heads; they divide the tower's width. 8 in the paper.
        multi_layers: X_m, the layers of the tower whose outputs the keys and values are made of, as shares of its depth
            in (0, 1); the paper's are layers 12, 16, 22 and 23 of 24. Shares of one layer are that layer once.
    """

    paper: ClassVar[str] = "inference_optimal"
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("stride", (1, 2, 5, 10))
    changes: ClassVar[frozenset[str]] = frozenset({"which visual tokens reach the decoder"})
    structure: ClassVar[tuple[str, ...]] = ("stride", "num_heads", "multi_layers")

    stride: int | None = None
    num_heads: int = 8
    multi_layers: tuple[float, ...] = (0.5, 0.667, 0.917, 0.958)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride is not None:
            in_range(self, "stride", 0, 1024, whole=True)
        in_range(self, "num_heads", 1, 1024, whole=True)
        shares = self.multi_layers
        if not (isinstance(shares, tuple) and shares and all(isinstance(one, float) and 0 < one < 1 for one in shares)):
            raise InputError(
                f"multi_layers of inference_optimal must be shares of the tower's depth between 0 and 1, not {shares!r}"
            )

    @property
    def one_question(self) -> bool:
        return True

    @property
    def is_identity(self) -> bool:
        return self.stride == 0

    def identity(self) -> Self:
        return replace(self, stride=0)

    def settled(self, anatomy: Anatomy) -> Self:
        if self.stride is not None:
            return self
        rows, columns = anatomy.picture_grid
        return replace(self, stride=max(side for side in (1, 2, 3, 4) if rows % side == columns % side == 0))

    def check(self, anatomy: Anatomy) -> None:
        connector_input(self.paper, anatomy)
        rows, columns = anatomy.picture_grid
        if self.stride and (rows % self.stride or columns % self.stride):
            allowed = [str(side) for side in range(1, rows + 1) if rows % side == columns % side == 0]
            raise InputError(
                f"stride of inference_optimal must divide the {rows} x {columns} visual tokens of a picture: "
                f"{', '.join(allowed)}, not {self.stride}"
            )
        if anatomy.connector_width % self.num_heads:
            raise InputError(
                f"num_heads of inference_optimal must divide the width of the tower, {anatomy.connector_width}, and "
                f"{self.num_heads} does not"
            )
        super().check(anatomy)

    def readings(self, anatomy: Anatomy) -> dict[str, TowerReading]:
        layers = anatomy.tower_layers
        return {TOWER: connector_input(self.paper, anatomy)} | {
            _name(layer): TowerLayerInput(layers[layer], leading=anatomy.leading_tokens)
            for layer in self._layers(anatomy)
        }

    def build(self, anatomy: Anatomy) -> QuestionConnector:
        channels, layers = anatomy.connector_width, len(self._layers(anatomy))
        multi = layers * int(anatomy.vision_config.hidden_size) if layers else channels
        assert self.stride is not None
        return QuestionConnector(channels, multi, int(anatomy.text_config.hidden_size), self.stride, self.num_heads)

    def reduced(self, call: Call, encoded: Encoded) -> Reduced:
        anatomy = call.boundary.anatomy
        patches = encoded.readings[TOWER].float()
        layers = [encoded.readings[_name(layer)].float() for layer in self._layers(anatomy)]
        multi = torch.cat(layers, dim=-1) if layers else patches
        module, text = self.module(anatomy), self._questions(call)
        features: Tensor = module(patches, multi, text, anatomy.picture_grid)
        return first_places(features, encoded)

    def _layers(self, anatomy: Anatomy) -> Sequence[int]:
        """Layers of the tower whose inputs are X_m: input l is the output of layer l - 1."""
        depth = len(anatomy.tower_layers)
        return sorted({min(round(share * depth), depth - 1) for share in self.multi_layers}) if depth else ()

    def _questions(self, call: Call) -> Tensor:
        """t of each picture, [pictures, D]; read once a prompt."""
        key: Any = (self.paper, "questions")
        if key not in call.memory:
            with_pictures = {row: images for row, images in enumerate(call.images) if images}
            texts = [self._question(call, row * call.beams) for row in with_pictures]
            hidden = read_alone(call.boundary, texts).float()
            counts = torch.tensor([len(images) for images in with_pictures.values()], device=hidden.device)
            call.memory[key] = hidden.repeat_interleave(counts, dim=0)
        found: Tensor = call.memory[key]
        return found

    def _question(self, call: Call, row: int) -> Tensor:
        """The embeddings of a row's question, [L, D]."""
        assert call.prompt is not None
        text, ids = call.question(row), call.prompt_ids(row)
        anatomy = call.boundary.anatomy
        if not len(text):
            raise InputError("inference_optimal makes a picture's tokens for a question, and a prompt has no text")
        whole = len(text) == int((~anatomy.visual_positions(ids)).sum())
        if whole or int(ids[0]) != anatomy.text_config.bos_token_id:
            return text
        first = 0 if call.host_mask is None else int(call.host_mask[row].long().argmax())
        return torch.cat([call.prompt[0].embeds[row, first : first + 1], text])


def _name(layer: int) -> str:
    return f"tower layer {layer}"
