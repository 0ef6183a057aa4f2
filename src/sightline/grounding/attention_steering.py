"""The kind of method that changes the outputs of attention heads in the decoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sightline.errors import InputError
from sightline.methods import Method
from sightline.models.call import Stream

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy
    from sightline.models.boundary import Boundary
    from sightline.models.call import Call


@dataclass(frozen=True)
class AttentionSteering(Method):
    """Multiplies each head's output, before the output projection, by a factor chosen while the prompt is read; the
    paper's file writes `layers_of` and `head_factors`.

    The prompt is read twice in one forward, with the picture and without it, layer by layer: what a head gives in both
    is what its factor is chosen by, and both are scaled before the layer goes on. From then on the factors are fixed
    for the row, and a step costs one multiplication.
    """

    changes: ClassVar[frozenset[str]] = frozenset({"the attention heads' outputs"})

    @abstractmethod
    def layers_of(self, depth: int) -> Sequence[int]:
        """The layers that are steered, of a decoder of `depth` layers (0-based)."""

    @abstractmethod
    def head_factors(self, full: Tensor, text: Tensor) -> Tensor:
        """Factors for one layer.

        Args:
            full: head outputs at the prompt's last position, [B, heads, head_dim].
            text: the same without the picture.

        Returns:
            [B, heads].
        """

    def stream(self) -> Stream:
        """The rows without a picture."""
        return Stream(self, without_picture=True, transient=True)

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        depth = len(anatomy.layers)
        for layer in self.layers_of(depth):
            if not 0 <= layer < depth:
                raise InputError(
                    f"{self.paper} is asked to steer layer {layer}, but the decoder has layers 0 to {depth - 1}"
                )

    def install(self, boundary: Boundary) -> None:
        for index in self.layers_of(len(boundary.anatomy.layers)):
            projection = boundary.anatomy.attention_heads_input(boundary.anatomy.layers[index])
            boundary.before(projection, self._scale(index, boundary.anatomy.num_heads))

    def streams(self, call: Call) -> Sequence[Stream]:
        return () if self in call.memory else (self.stream(),)

    def _scale(self, layer: int, num_heads: int) -> Callable[[Call, Tensor], Tensor]:
        def scale(call: Call, x: Tensor) -> Tensor:
            factors: dict[int, Tensor] = call.memory.setdefault(self, {})
            if layer not in factors:
                factors[layer] = self._factors(call, x[:, -1].unflatten(-1, (num_heads, -1))).to(x.dtype)
            if len(x) == call.rows:
                return x * factors[layer]
            scaled = x.clone()
            scaled[: call.rows] *= factors[layer]
            rows = call.stream_rows(self)
            if rows is not None:
                scaled[rows] *= factors[layer]
            return scaled

        return scale

    def _factors(self, call: Call, heads: Tensor) -> Tensor:
        """[B, 1, heads * head_dim], from the outputs [R, heads, head_dim] at the prompt's last position."""
        rows = call.stream_rows(self)
        assert rows is not None
        factors = self.head_factors(heads[: call.rows], heads[rows])
        # Without a picture both outputs are the same but for rounding, which must not choose heads.
        if call.bare is not None:
            factors = factors.masked_fill(call.bare[:, None], 1.0)
        return factors.repeat_interleave(heads.shape[-1], dim=-1)[:, None]


def last_layers(depth: int, share: float) -> range:
    """The last `share` of `depth` layers, at least one."""
    return range(depth - max(1, round(share * depth)), depth)


def median(values: Tensor) -> Tensor:
    """The lower median over the last dimension, kept as a dimension of size one."""
    return torch.median(values, dim=-1, keepdim=True).values
