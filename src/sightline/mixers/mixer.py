"""What a token mixer is: the part of a block that lets tokens read each other.

Every mixer maps tokens [B, L, D] on a grid to tokens [B, L, D]. One that is *causal* along the sequence can also be fed
one token at a time: `step` with the state that `init_state` starts gives what the whole pass gives at that position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Mixer(nn.Module, ABC):
    """Base of all token mixers."""

    @abstractmethod
    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Mixes tokens.

        Args:
            x: [B, L, D], row after row of the grid.
            grid: (rows, columns), or more axes; L is their product, or more where extra tokens ride along.

        Returns:
            [B, L, D].
        """

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...]) -> int:
        """Multiply-adds of a forward beside those of its linear layers and convolutions, for the whole batch.

        A mixer that is never counted need not say.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say its multiply-adds")


class CausalMixer(Mixer):
    """A mixer in which a token reads only itself and earlier ones, so that it can stream."""

    @abstractmethod
    def init_state(self, batch: int) -> Any:
        """The state before the first token."""

    @abstractmethod
    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token [B, D] and the state before it -> its output [B, D] and the state after it."""
