"""STORM: a Mamba layer over all frames, so that frames may be pooled or dropped (2025, arXiv:2503.04130).

In: T frames of the tower's patches X [T, n, C]. Out: K = ceil(ceil(T / k) / every) * ceil(h / s) * ceil(w / s) tokens
of width D, frame after frame, raster order inside; h x w is the grid of a frame's tokens.

    X' = X as one sequence [T n, C], frame after frame
    X' := X' + Mamba(LayerNorm(X'))            `layers` times, in both directions
    Y = connector(X')                          the model's own, frame by frame
    Y := mean over each k = `temporal_pool` frames, and over each s x s tokens, s = `spatial_pool`
    Y := every `sample_every`-th frame

Each token has then read the whole clip, so what is pooled or dropped has left its trace in what stays. The pooling is
trained with; the sampling is meant for a model trained without it. Where k or s leave a remainder, the last mean is
over the remainder.

The paper's code has not been published. Its mixer scans in both directions; here it is that of Vision Mamba
(`mixers/bidirectional_mamba.py`: projections shared, each direction with its own convolution and scan, half their sum),
both directions started with long memories. Its output projection starts at zero, so that an untrained projector is the
plain connector, and what is pooled the plain model's tokens. With `forward_only` a frame reads those before it alone,
and clips can be read as they come (`TemporalProjector.step`).

Clips of as many frames are scanned side by side, others each by itself: no padding enters the scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.errors import InputError
from sightline.methods import in_range, register
from sightline.mixers.bidirectional_mamba import BidirectionalMamba, Mamba, MambaState
from sightline.reduction.frame_reducer import FrameReducer, Frames

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy


class ProjectorLayer(nn.Module):
    """x + mixer(norm(x)); at the start the mixer gives zero."""

    def __init__(self, width: int, *, forward_only: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mixer: Mamba | BidirectionalMamba = (
            Mamba(width) if forward_only else BidirectionalMamba(width, symmetric_init=True)
        )
        nn.init.zeros_(self.mixer.out_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class TemporalProjector(nn.Module):
    """The stacked layers.

    Args:
        width: C.
        layers: how many.
        forward_only: scan from the first frame to the last alone.
    """

    def __init__(self, width: int, layers: int, *, forward_only: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ProjectorLayer(width, forward_only=forward_only) for _ in range(layers))

    def forward(self, frames: Tensor) -> Tensor:
        """[..., T, n, C] -> [..., T, n, C], each token having read its clip."""
        *_, length, patches, width = frames.shape
        x = frames.reshape(-1, length * patches, width)
        for layer in self.layers:
            x = layer(x)
        return x.view_as(frames)

    def init_state(self) -> list[MambaState]:
        """The state of every layer before the first frame; for `step`."""
        return [self._streaming(layer).init_state(1) for layer in self.layers]

    def step(self, frame: Tensor, state: list[MambaState]) -> tuple[Tensor, list[MambaState]]:
        """One frame [n, C] and the state before it -> what `forward` gives for it, and the state after it."""
        after = []
        for layer, now in zip(self.layers, state, strict=True):
            mixer = self._streaming(layer)
            tokens = []
            for token in frame[:, None]:
                mixed, now = mixer.step(layer.get_submodule("norm")(token), now)
                tokens.append(token + mixed)
            frame = torch.cat(tokens)
            after.append(now)
        return frame, after

    @staticmethod
    def _streaming(layer: nn.Module) -> Mamba:
        mixer = layer.get_submodule("mixer")
        if not isinstance(mixer, Mamba):
            raise InputError("this projector of storm reads frames in both directions; to stream, set forward_only")
        return mixer


@register
@dataclass(frozen=True)
class Storm(FrameReducer):
    """Mixes all frames of a clip by a selective scan, and lets fewer of their tokens into the decoder.

    Args:
        layers: Mamba layers before the connector, 0 or more; 0 leaves them out: pooling or sampling alone. The paper
            does not say how many; 2 is a choice of ours.
        temporal_pool: k, frames that become one: the paper's 4.
        spatial_pool: s, tokens a side that become one; the paper's 2, in place of `temporal_pool`.
        sample_every: of the frames that are left every so many-th stays, the first one first; the paper's 2, together
            with pooling.
        forward_only: scan from the first frame to the last alone, which can be streamed.
    """

    paper: ClassVar[str] = "storm"
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("temporal_pool", (1, 2, 4, 8))
    structure: ClassVar[tuple[str, ...]] = ("layers", "forward_only")

    layers: int = 2
    temporal_pool: int = 4
    spatial_pool: int = 1
    sample_every: int = 1
    forward_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "layers", 0, 64, whole=True)
        for name in ("temporal_pool", "spatial_pool", "sample_every"):
            in_range(self, name, 1, 4096, whole=True)

    @property
    def is_identity(self) -> bool:
        return self.layers == 0 and self.temporal_pool == self.spatial_pool == self.sample_every == 1

    def identity(self) -> Self:
        return replace(self, layers=0, temporal_pool=1, spatial_pool=1, sample_every=1)

    @property
    def needs_weights(self) -> bool:
        return self.layers > 0

    def build(self, anatomy: Anatomy) -> nn.Module:
        return TemporalProjector(anatomy.connector_width, self.layers, forward_only=self.forward_only)

    def tokens(self, frames: Frames) -> Tensor:
        return self.of_clips([frames])[0]

    def of_clips(self, clips: Sequence[Frames]) -> list[Tensor]:
        features = [frames.features for frames in clips]
        if self.layers:
            projector = self.module(clips[0].anatomy)
            alike: dict[torch.Size, list[int]] = {}
            for number, frames in enumerate(clips):
                alike.setdefault(frames.tower.shape, []).append(number)
            for numbers in alike.values():
                mixed = projector(torch.stack([clips[number].tower.float() for number in numbers]))
                for number, own in zip(numbers, mixed, strict=True):
                    features[number] = clips[number].connected(own)
        return [self._fewer(own, frames.grid) for own, frames in zip(features, clips, strict=True)]

    def _fewer(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """[T, n, D] -> [K, D]"""
        if self.spatial_pool > 1:
            features = pooled_over_space(features, grid, self.spatial_pool)
        features = pooled_over_time(features, self.temporal_pool)
        return features[:: self.sample_every].flatten(0, 1)


def pooled_over_time(frames: Tensor, every: int) -> Tensor:
    """[T, m, D] -> [ceil(T / every), m, D]: means of so many frames, the last one of the remainder."""
    if every == 1:
        return frames
    return torch.stack([part.float().mean(0) for part in frames.split(every)]).to(frames.dtype)


def pooled_over_space(frames: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """[T, h w, D] -> [T, ceil(h / side) ceil(w / side), D]: means of squares, at the lower and right edges of what is
    left of them."""
    maps = frames.float().mT.unflatten(2, grid)
    maps = F.avg_pool2d(maps, side, ceil_mode=True)
    return maps.flatten(2).mT.to(frames.dtype)
