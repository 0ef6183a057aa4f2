"""RED-VILLM: means over time and over space make a picture model read video (2024, arXiv:2404.11865).

In: T frames of the tower's patches X [T, n, C]. Out: n + T tokens of width D.

    S = mean over the T frames of X   [n, C]         S' = f_img(S)     spatial tokens
    P = mean over the n patches of X  [T, C]         P' = f_tmp(P)     temporal tokens, in the order of the frames
    tokens = S', P'

f_img is the model's own connector. f_tmp has its form and starts with its weights: the method's only new parameters.
The means are taken in float32. The paper's code has not been published; which part comes first is a setting
(`order`), because Video-ChatGPT, whose two means these are, puts the temporal part first.

Most of P is the same in all frames, what stands still and what all pictures have in common; what comes and goes is a
tenth of it on the built-in model, too little for a decoder to learn from. S' has what is common, and so P may be given
without it (`centred`, not the paper's):

    P' = f_tmp((P - mean of P over T) * rms(P) / rms(P - mean of P over T))

A single frame is a picture: S' is what the model makes of it, and its T = 1 temporal token, for which the prompt has no
place, is left out unless it is asked for alone. The connector has to be one that maps each patch by itself (an MLP, as
in Llava): the tokens of P are no grid.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from sightline.errors import unknown
from sightline.methods import in_range, register
from sightline.reduction.frame_reducer import FrameReducer, Frames, centred

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy

Parts = Literal["both", "spatial", "temporal"]
Order = Literal["spatial first", "temporal first"]


@register
@dataclass(frozen=True)
class RedVillm(FrameReducer):
    """Reads a clip as its mean frame and one token a frame.

    Args:
        most_frames: T, at most; of more frames so many are taken, the middle ones of equal stretches. The paper has
            100. 0 leaves the method off.
        parts: which tokens the decoder gets: `both`, or the `spatial` or the `temporal` ones alone.
        order: `spatial first` or `temporal first`.
        shared: the model's connector also for the temporal part, as in Video-ChatGPT; nothing is trained then.
        centred: give f_tmp what of P differs between the frames, enlarged to P's size.
    """

    paper: ClassVar[str] = "red_villm"
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("most_frames", (4, 8, 16, 32, 64))
    structure: ClassVar[tuple[str, ...]] = ("centred",)

    most_frames: int = 100
    parts: Parts = "both"
    order: Order = "spatial first"
    shared: bool = False
    centred: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "most_frames", 0, 100_000, whole=True)
        for name, kind in (("parts", Parts), ("order", Order)):
            if getattr(self, name) not in get_args(kind):
                raise unknown(f"{name} of {self.paper}", getattr(self, name), get_args(kind))

    @property
    def is_identity(self) -> bool:
        return self.most_frames == 0

    def identity(self) -> Self:
        return replace(self, most_frames=0)

    @property
    def needs_weights(self) -> bool:
        return self.parts != "spatial" and not self.shared

    def build(self, anatomy: Anatomy) -> nn.Module:
        assert anatomy.connector is not None
        f_tmp = copy.deepcopy(anatomy.connector).float().requires_grad_(True)
        for module in f_tmp.modules():  # whoever watches the model's connector does not watch this one
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        return f_tmp

    def tokens(self, frames: Frames) -> Tensor:
        chosen = evenly(len(frames), self.most_frames)
        tower = frames.tower[chosen]
        spatial, temporal = time_mean(tower)[None], space_mean(tower)
        parts = []
        if self.parts != "temporal":
            parts.append(frames.connected(spatial)[0])
        if self.parts == "temporal" or (self.parts == "both" and len(frames) > 1):
            f_tmp = frames.connected if self.shared else self.module(frames.anatomy)
            if self.centred:
                temporal = centred(temporal)
            parts.append(f_tmp(temporal[None])[0].to(frames.features.dtype))
        return torch.cat(parts[::-1] if self.order == "temporal first" else parts)


def time_mean(frames: Tensor) -> Tensor:
    """[T, n, C] -> [n, C], float32."""
    return frames.float().mean(0)


def space_mean(frames: Tensor) -> Tensor:
    """[T, n, C] -> [T, C], float32."""
    return frames.float().mean(1)


def evenly(length: int, most: int) -> list[int]:
    """At most so many places of a sequence: all, or the middle ones of equal stretches."""
    if length <= most:
        return list(range(length))
    return [int((place + 0.5) * length / most) for place in range(most)]
