"""Clips through encoders of pictures: each frame on its own, and what reads the frames' features afterwards.

Shapes: B clips, T frames, F the width of an encoder's pooled feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sightline.encoders.encoder import Encoder, Features, create_encoder
from sightline.errors import InputError


class FrameFeatures(nn.Module):
    """Pooled features of each frame by any encoder of pictures: [B, T, C, H, W] -> [B, T, F].

    Args:
        name: of the encoder; one without a pooled feature gives the mean of its tokens.
        image_size: side or (height, width) of the frames, None for the encoder's own.
        in_chans: channels of a frame.
        settings: other arguments of the encoder.
        frozen: keep its weights and its statistics as they are, without gradients.
    """

    def __init__(
        self,
        name: str,
        *,
        image_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        settings: Mapping[str, Any] | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()

        def make() -> Encoder:
            return create_encoder(name, image_size=image_size, in_chans=in_chans, **(settings or {}))

        self.encoder, self.frozen = make(), frozen
        if self.encoder.inputs != "pictures":
            raise InputError(f"frames are read by encoders of pictures, and {name} takes {self.encoder.inputs}")
        if frozen:
            self.encoder.requires_grad_(False).eval()
        with torch.device("meta"), torch.no_grad():
            twin = make().eval()
            self.width: int = _pooled(twin(torch.empty(1, in_chans, *twin.image_size))).shape[-1]

    def train(self, mode: bool = True) -> FrameFeatures:
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, clips: Tensor) -> Tensor:
        if clips.ndim != 5:
            raise InputError(f"clips are [B, T, C, H, W], not a tensor of shape {list(clips.shape)}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return _pooled(self.encoder(clips.flatten(0, 1))).unflatten(0, clips.shape[:2])


class OnClips(nn.Module):
    """An encoder of frame features, fed by encoders of frames.

    Args:
        streams: one for each kind of frame, such as colours and optical flow; their features are joined in this order.
        aggregator: an encoder of frame features whose width is the sum of theirs.
    """

    def __init__(self, streams: Sequence[FrameFeatures], aggregator: Encoder) -> None:
        super().__init__()
        if aggregator.inputs != "frame features":
            raise InputError(f"an aggregator takes frame features, and {aggregator.name} takes {aggregator.inputs}")
        self.streams, self.aggregator = nn.ModuleList(streams), aggregator

    def frame_features(self, *clips: Tensor) -> Tensor:
        """[B, T, D] of one clip for each stream, all of the same frames.

        Raises:
            InputError: another number of clips than of streams.
        """
        if len(clips) != len(self.streams):
            raise InputError(f"{len(self.streams)} stream(s) take as many clips, not {len(clips)}")
        return torch.cat([stream(clip) for stream, clip in zip(self.streams, clips, strict=True)], dim=-1)

    def forward(self, *clips: Tensor) -> Features:
        return self.aggregator(self.frame_features(*clips))

    def logits(self, *clips: Tensor) -> Tensor:
        """Class logits [B, num_classes]."""
        return self.aggregator.logits(self.frame_features(*clips))


def _pooled(features: Features) -> Tensor:
    return features.tokens.mean(dim=1) if features.pooled is None else features.pooled
