"""TS-LSTM and Temporal-Inception: two ways to read frame features (Ma et al., Signal Processing: Image Communication
2019, arXiv:1703.10667), and the baselines that they are held against.

Frame features x [B, T, D] in (in the paper T = 25 and D = 4096: a ResNet-101 on colours and one on optical flow, both
frozen), class logits [B, K] out. Clips come in by `frame_by_frame.OnClips`, with any encoders of frames.

TS-LSTM, S segments of n = floor(T / S) frames (the frames after S n are not read):

    v_s = max over the segment's frames of BN_s(x_t)          one BN a segment, with the batch's statistics at each step
    h_1 .. h_S = LSTM(v_1 .. v_S);     logits = W BN(h_S)

Temporal-Inception, on a picture of D rows and T columns with one channel; kernels are one row high, so that all rows
share their weights:

    module: for k in (5, 7): conv 1 x k -> BN -> ReLU -> max pooling along time; both joined, which doubles the channels
    T = 25 -> 12 -> 6 -> 3 -> 1;  1 x 1 convs 16 -> 4 -> 2 -> 1, each with BN and ReLU;  D -> 1024 -> BN -> ReLU -> K

The official code (chihyaoma/Activity-Recognition-with-CNN-and-RNN) starts all of TS-LSTM's parameters uniformly in
+-0.1, BN's scales too, half of which are then negative (`init="uniform_all"`; by default not done here). Its LSTM has
peepholes from cell to gates, which the paper does not speak of, and keeps its state from one test video to the next;
neither is followed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.encoder import Encoder, Features, register_encoder
from sightline.errors import InputError, unknown

PAPER = "ts_lstm"
OBJECT = "TSLSTM"


class FrameReader(Encoder):
    """Base of the encoders of frame features [B, T, D]: pictures' sizes and channels mean nothing to them."""

    inputs = "frame features"

    def __init__(self, *, num_classes: int, feature_dim: int, width: int) -> None:
        super().__init__(image_size=1, in_chans=1, num_classes=num_classes, width=width)
        if feature_dim < 1:
            raise InputError(f"feature_dim must be 1 or more, not {feature_dim}")
        self.feature_dim = feature_dim

    def check(self, pixels: Tensor) -> None:
        super().check(pixels)
        steps, width = pixels.shape[1:]
        name = self.called
        if width != self.feature_dim:
            raise InputError(f"{name} was made for feature_dim={self.feature_dim}, but the features have {width}")
        if self.wrong_steps(steps):
            raise InputError(f"{name} takes {self.wrong_steps(steps)}, not {steps}")
        if self.training and len(pixels) < 2 and any(isinstance(part, nn.BatchNorm1d) for part in self.modules()):
            raise InputError(f"{name} is trained on batches of 2 clips or more, for the statistics of its batch norms")

    def example_shape(self, batch: int = 1) -> tuple[int, ...]:
        return (batch, self.frames or 25, self.feature_dim)

    def wrong_steps(self, steps: int) -> str:
        """What numbers of frames are taken, where this one is not; else nothing."""
        return "" if steps else "at least one frame"


@register_encoder
class TSLSTM(FrameReader):
    """Segments pooled over time, and an LSTM over the segments.

    `tokens` are h_1 .. h_S, grid (S,); `pooled` is h_S. With one segment the order of frames plays no part.

    Args:
        image_size: not used.
        in_chans: not used.
        feature_dim: D.
        segments: S.
        pool: `max` or `mean`.
        hidden: width of the LSTM.
        drop: dropout before the last linear map.
        init: `default`, or `uniform_all`.
    """

    paper: ClassVar[str] = "ts_lstm"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ts_lstm": dict(feature_dim=4096),
        "ts_lstm_nano": dict(feature_dim=64, hidden=64),
    }

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 1,
        in_chans: int = 3,
        num_classes: int = 0,
        feature_dim: int = 4096,
        segments: int = 3,
        pool: str = "max",
        hidden: int = 512,
        drop: float = 0.0,
        init: str = "default",
    ) -> None:
        super().__init__(num_classes=num_classes, feature_dim=feature_dim, width=hidden)
        if segments < 1:
            raise InputError(f"segments must be 1 or more, not {segments}")
        if pool not in ("max", "mean"):
            raise unknown("pool of ts_lstm", pool, ["max", "mean"])
        if init not in ("default", "uniform_all"):
            raise unknown("init of ts_lstm", init, ["default", "uniform_all"])
        self.segments, self.pool = segments, pool
        self.norms = nn.ModuleList(nn.BatchNorm1d(feature_dim) for _ in range(segments))
        self.lstm = nn.LSTM(feature_dim, hidden, batch_first=True)
        self.norm = nn.BatchNorm1d(hidden)
        self.dropout = nn.Dropout(drop)
        self.head = nn.Linear(hidden, num_classes) if num_classes else nn.Identity()
        if init == "uniform_all":
            for weight in self.parameters():
                nn.init.uniform_(weight, -0.1, 0.1)

    def wrong_steps(self, steps: int) -> str:
        return "" if steps >= self.segments else f"{self.segments} frames or more, one for each segment"

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        length = pixels.shape[1] // self.segments
        pooled = []
        for norm, segment in zip(self.norms, pixels.split(length, dim=1), strict=False):
            frames = torch.stack([norm(frame) for frame in segment.unbind(1)], dim=1)
            pooled.append(frames.amax(dim=1) if self.pool == "max" else frames.mean(dim=1))
        vectors = torch.stack(pooled, dim=1)
        h, _ = self.lstm(vectors)
        return Features(h, (self.segments,), h[:, -1], (), (vectors, h) if hidden_states else ())

    def classify(self, features: Features) -> Tensor:
        assert features.pooled is not None
        return self.head(self.dropout(self.norm(features.pooled)))


@register_encoder
class TemporalInception(FrameReader):
    """Convolutions of two widths along time, alike for every feature.

    `tokens` are the one map that is left [B, 1, D], grid (1,); `pooled` is the hidden layer that the last linear map
    reads.

    Args:
        image_size: not used.
        in_chans: not used.
        feature_dim: D.
        kernels: widths of the branches along time, odd.
        pools: of the modules along time; together they leave one step of the clip.
        hidden: width of the hidden layer.
        drop: dropout after the convolutions, and before the last linear map.
        drop_kind: what the first dropout drops: `map` as in the official code, where there is one channel and so all of
            a clip's map is lost at once, or `element`.
    """

    paper: ClassVar[str] = "ts_lstm"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "temporal_inception": dict(feature_dim=4096),
        "temporal_inception_nano": dict(feature_dim=64, pools=(2, 2, 2, 1), hidden=128, drop_kind="element"),
    }

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 1,
        in_chans: int = 3,
        num_classes: int = 0,
        feature_dim: int = 4096,
        kernels: tuple[int, ...] = (5, 7),
        pools: tuple[int, ...] = (2, 2, 2, 3),
        hidden: int = 1024,
        drop: float = 0.2,
        drop_kind: str = "map",
    ) -> None:
        super().__init__(num_classes=num_classes, feature_dim=feature_dim, width=feature_dim)
        if not kernels or any(kernel % 2 == 0 for kernel in kernels):
            raise InputError(f"the kernels of temporal_inception need odd widths, not {kernels}")
        if drop_kind not in ("map", "element"):
            raise unknown("drop_kind of temporal_inception", drop_kind, ["map", "element"])
        self.pools = pools
        channels = [len(kernels) ** index for index in range(len(pools) + 1)]
        self.stages = nn.ModuleList(
            nn.ModuleList(_convolution(before, before, kernel) for kernel in kernels) for before in channels[:-1]
        )
        widths = (channels[-1], 4, 2, 1)
        self.reduce = nn.Sequential(*[_convolution(before, after, 1) for before, after in pairwise(widths)])
        self.drop_map = nn.Dropout2d(drop) if drop_kind == "map" else nn.Dropout(drop)
        self.hidden = nn.Sequential(nn.Linear(feature_dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.dropout = nn.Dropout(drop)
        self.head = nn.Linear(hidden, num_classes) if num_classes else nn.Identity()

    @property
    def frames(self) -> int:
        """The fewest frames that leave one step; a few more are taken, too, and left out by the last pooling."""
        return math.prod(self.pools)

    def lengths(self, steps: int) -> list[int]:
        """Steps before the first module and after each."""
        found = [steps]
        for pool in self.pools:
            found.append(found[-1] // pool)
        return found

    def wrong_steps(self, steps: int) -> str:
        fewest = self.frames
        return "" if self.lengths(steps)[-1] == 1 else f"{fewest} to {2 * fewest - 1} frames"

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        x = pixels.mT[:, None]
        states = [pixels]
        for pool, branches in zip(self.pools, self.stages, strict=True):
            assert isinstance(branches, nn.ModuleList)
            x = torch.cat([F.max_pool2d(branch(x), (1, pool)) for branch in branches], dim=1)
            states.append(x.mean(dim=1).mT)
        tokens = self.drop_map(self.reduce(x))[..., 0]
        pooled = self.hidden(tokens[:, 0])
        return Features(tokens, (1,), pooled, (), tuple(states) if hidden_states else ())

    def classify(self, features: Features) -> Tensor:
        assert features.pooled is not None
        return self.head(self.dropout(features.pooled))


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, (1, kernel), padding=(0, kernel // 2))
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


@register_encoder
class FrameBaseline(FrameReader):
    """Mean or maximum over time and a linear map, or an LSTM over all frames and a linear map of its last output.

    Args:
        image_size: not used.
        in_chans: not used.
        feature_dim: D.
        kind: `mean`, `max` or `lstm`.
        hidden: width of the LSTM.
    """

    paper: ClassVar[str] = "ts_lstm"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"two_stream_{kind}{size}": dict(feature_dim=width, kind=kind, hidden=hidden)
        for kind in ("mean", "max", "lstm")
        for size, width, hidden in (("", 4096, 512), ("_nano", 64, 64))
    }

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 1,
        in_chans: int = 3,
        num_classes: int = 0,
        feature_dim: int = 4096,
        kind: str = "mean",
        hidden: int = 512,
    ) -> None:
        if kind not in ("mean", "max", "lstm"):
            raise unknown("kind of a baseline over frames", kind, ["mean", "max", "lstm"])
        width = hidden if kind == "lstm" else feature_dim
        super().__init__(num_classes=num_classes, feature_dim=feature_dim, width=width)
        self.kind = kind
        self.lstm = nn.LSTM(feature_dim, hidden, batch_first=True) if kind == "lstm" else None
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        tokens = pixels if self.lstm is None else self.lstm(pixels)[0]
        pooled = {"mean": lambda: tokens.mean(dim=1), "max": lambda: tokens.amax(dim=1), "lstm": lambda: tokens[:, -1]}
        states = (pixels, tokens) if hidden_states else ()
        return Features(tokens, (tokens.shape[1],), pooled[self.kind](), (), states)

    def classify(self, features: Features) -> Tensor:
        return self.head(features.pooled)
