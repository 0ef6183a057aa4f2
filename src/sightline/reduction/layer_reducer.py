"""The kind of method that lets fewer visual tokens through some of the decoder's layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sightline.methods import Method
from sightline.models.narrowing import Chosen, LayerInput, check_narrowing, narrow

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy
    from sightline.models.boundary import Boundary
    from sightline.models.call import Call


@dataclass(frozen=True)
class LayerReducer(Method):
    """From a layer on, or in single layers, only chosen visual tokens are processed; positions stay as they are, and
    the caches of these layers hold what they have read.

    The paper's file writes `layers` and `choose`. See `sightline.models.narrowing` for the two forms. Methods that work
    on attention logits, of which some layers have fewer, do not compose with this kind.
    """

    changes: ClassVar[frozenset[str]] = frozenset({"which visual tokens decoder layers read", "the attention logits"})
    bypasses: ClassVar[bool] = False
    """Whether what a layer does not read goes on past it; else it is gone for good."""
    watches: ClassVar[bool] = False
    """Whether `choose` needs the attention that the prompt's last token pays in the layer before."""

    @abstractmethod
    def layers(self, depth: int) -> Sequence[int]:
        """At which of the decoder's `depth` layers it chooses, counted from 0, ascending; 0 itself is never one."""

    @abstractmethod
    def choose(self, call: Call, here: LayerInput) -> Chosen:
        """Which columns a layer reads; asked once a prompt and layer."""

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        check_narrowing(self.paper, anatomy, self.layers(len(anatomy.layers)), bypass=self.bypasses)

    def install(self, boundary: Boundary) -> None:
        layers = self.layers(len(boundary.anatomy.layers))
        narrow(boundary, layers, self.choose, bypass=self.bypasses, watch=self.watches)
