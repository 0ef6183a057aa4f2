"""The kind of method that pushes the decoder's hidden states in a direction found for each prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sightline.methods import Method
from sightline.models.stock_reading import layer_outputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sightline.models.boundary import Boundary
    from sightline.models.call import Call


ROUNDING = 1e-5
"""Two readings that differ by a smaller share of their length are the same."""


@dataclass(frozen=True)
class HiddenSteering(Method):
    """Steers a part of every decoder layer; the paper's file writes `direction` and `steer`.

    The directions come from one extra reading of the prompt by the unchanged model, with the picture and without. Only
    the main rows are steered, not those of another method's branch.
    """

    needs_picture: ClassVar[bool] = True

    @abstractmethod
    def direction(self, full: Tensor, text: Tensor) -> Tensor:
        """The direction of every layer, [B, layers, D], from the layers' outputs at the prompt's last position with the
        picture (`full`) and without it (`text`), both [B, layers, D]."""

    @abstractmethod
    def steer(self, hidden: Tensor, direction: Tensor) -> Tensor:
        """Hidden states [B, T, D] of one layer, steered in the directions [B, 1, D]."""

    def steers_prompt(self) -> bool:
        """Whether the prompt's own positions are steered too, or only those that are generated."""
        return True

    def steered_module(self, boundary: Boundary, layer: int) -> nn.Module:
        """The module whose output is steered: the layer's feed-forward part."""
        return boundary.anatomy.mlp(boundary.anatomy.layers[layer])

    def install(self, boundary: Boundary) -> None:
        for layer in range(len(boundary.anatomy.layers)):
            boundary.after(self.steered_module(boundary, layer), self._push(layer))

    def before_prompt(self, call: Call) -> None:
        if self not in call.memory:
            full, text = (outputs.float() for outputs in layer_outputs(call))
            # Where the picture is not seen (by a prompt that has none, or by VoCo's text in the first layer) both
            # readings are the same but for rounding, which must not become a direction.
            alike = (full - text).norm(dim=-1) <= ROUNDING * full.norm(dim=-1)
            if call.bare is not None:
                alike = alike | call.bare[:, None]
            direction = self.direction(full, text).masked_fill(alike[..., None], 0.0)
            call.memory[self] = direction[:, :, None].unbind(dim=1)

    def _push(self, layer: int) -> Callable[[Call, Tensor], Tensor | None]:
        def push(call: Call, hidden: Tensor) -> Tensor | None:
            direction = call.memory[self][layer]
            if not call.reading_prompt and len(hidden) == call.rows:
                return self.steer(hidden, direction)
            first = 0
            if call.reading_prompt and not self.steers_prompt():
                # Without a cache what was generated is read again together with the prompt.
                first = hidden.shape[1] - (call.input_ids.shape[1] - call.prompt_length)
            if first == hidden.shape[1]:
                return None
            changed = hidden.clone()
            changed[: call.rows, first:] = self.steer(hidden[: call.rows, first:], direction)
            return changed

        return push
