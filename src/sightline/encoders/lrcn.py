"""LRCN: a CNN for each frame and an LSTM over them (Donahue et al., CVPR 2015 and TPAMI 2017, arXiv:1411.4389).

Clips [B, T, C, H, W] -> class logits [B, K]; or a picture's feature [B, F] -> words (`lrcn_captions.py`). Both use the
same cell, with a flag delta_t that is 0 at the first step of a sequence and 1 elsewhere, so that several sequences can
share a row:

    [i, f, o, g] = W_x x_t + b + W_h (delta_t h_(t-1)) + W_s static
    c_t = sigmoid(f) (delta_t c_(t-1)) + sigmoid(i) tanh(g);     h_t = sigmoid(o) tanh(c_t)

Activities: h_t -> dropout -> linear at every step; the loss is the mean of the steps' cross entropies, the prediction
the mean of their softmaxes (`classify` gives its logarithm, whose softmax it is). Captions: the words and the picture
go to one LSTM (`one_layer`), to the lower of two (`unfactored`), or the words to the lower and the picture to the upper
(`factored`, the paper's best). The picture is the cell's static input. Videos are described by the same decoder, with
the vector of a video's detections (in the paper: probabilities from a CRF) in the place of the picture's feature.

The CNN is that of the official code (lisa-caffe-public), with its grouped convolutions and Caffe's rounding of pooled
sizes. `load_official` takes its blobs under the names "<layer>.<number of the blob>", for frames in BGR from 0 to 255
less their means. That code crops a clip at random only when it is mirrored, and does not negate the mirrored flow when
it classifies; both are slips and not followed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.encoder import Encoder, Features, register_encoder
from sightline.encoders.frame_by_frame import FrameFeatures
from sightline.encoders.layers import to_tokens
from sightline.errors import InputError

PAPER = "lrcn"
OBJECT = "LRCN"
LSTMState = tuple[Tensor, Tensor]
"""h and c, each [B, H]."""


class FlaggedLSTM(nn.Module):
    """The cell over a row of steps: [B, T, D] -> [B, T, H].

    Args:
        inputs: D.
        hidden: H.
        static: width of the input that is the same at all steps, None for none.
        spread: weights start uniform in +-spread, biases at 0.
    """

    def __init__(self, inputs: int, hidden: int, *, static: int | None = None, spread: float = 0.01) -> None:
        super().__init__()
        self.hidden = hidden
        self.input = nn.Linear(inputs, 4 * hidden)
        self.recurrent = nn.Linear(hidden, 4 * hidden, bias=False)
        self.static = None if static is None else nn.Linear(static, 4 * hidden, bias=False)
        for weight in self.parameters():
            nn.init.uniform_(weight, -spread, spread)
        nn.init.zeros_(self.input.bias)

    def forward(
        self, x: Tensor, flags: Tensor | None = None, static: Tensor | None = None, state: LSTMState | None = None
    ) -> tuple[Tensor, LSTMState]:
        """Runs the row.

        Args:
            x: [B, T, D].
            flags: [B, T], 0 where a sequence begins and 1 elsewhere; None for a row of one sequence.
            static: [B, S], if the cell was made for it.
            state: that before the first step, None for zero.

        Returns:
            h [B, T, H] and the state after the last step.
        """
        driven = self.input(x)
        if self.static is not None:
            driven = driven + self.static(static)[:, None]
        zeros = driven.new_zeros(len(x), self.hidden)
        h, c = (zeros, zeros) if state is None else state
        outputs = []
        for step in range(x.shape[1]):
            if flags is not None:
                going_on = flags[:, step, None].to(h.dtype)
                h, c = h * going_on, c * going_on
            gates = driven[:, step] + self.recurrent(h)
            take, keep, give = gates[:, : 3 * self.hidden].sigmoid().chunk(3, dim=1)
            c = keep * c + take * gates[:, 3 * self.hidden :].tanh()
            h = give * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, dim=1), (h, c)


@register_encoder
class FrameCNN(Encoder):
    """The paper's CNN, between CaffeNet and the one of Zeiler and Fergus, up to fc6.

    `pooled` is fc6 [B, 4096] after ReLU, with dropout in training; `tokens` are the last map. fc6 fixes the size: only
    pictures that give a last map of the same size are taken. The head is the single-frame baseline's, fc7 and fc8.

    Args:
        channels: of the five convolutions.
        fc: width of fc6 and fc7.
        drop: share that is dropped after either.
    """

    paper: ClassVar[str] = "lrcn"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {"caffenet_hybrid": dict(image_size=227)}

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 227,
        in_chans: int = 3,
        num_classes: int = 0,
        channels: tuple[int, int, int, int, int] = (96, 384, 512, 512, 384),
        fc: int = 4096,
        drop: float = 0.9,
    ) -> None:
        super().__init__(image_size=image_size, in_chans=in_chans, num_classes=num_classes, width=channels[-1])
        self.conv1 = nn.Conv2d(in_chans, channels[0], 7, stride=2)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 5, stride=2, groups=2)
        self.conv3 = nn.Conv2d(channels[1], channels[2], 3, padding=1)
        self.conv4 = nn.Conv2d(channels[2], channels[3], 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(channels[3], channels[4], 3, padding=1, groups=2)
        self.grid = self._grid(*self.image_size)
        if min(self.grid) < 1:
            made = " x ".join(map(str, self.image_size))
            raise InputError(f"caffenet_hybrid takes pictures from 65 x 65 pixels, not {made}")
        self.fc6 = nn.Linear(channels[-1] * self.grid[0] * self.grid[1], fc)
        self.dropout = nn.Dropout(drop)
        self.fc7 = nn.Linear(fc, fc) if num_classes else nn.Identity()
        self.fc8 = nn.Linear(fc, num_classes) if num_classes else nn.Identity()
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.normal_(part.weight, std=0.01)
                if part.bias is not None:
                    nn.init.constant_(part.bias, 0.1)

    def check_size(self, height: int, width: int) -> None:
        if self._grid(height, width) != self.grid:
            made = " x ".join(map(str, self.image_size))
            raise InputError(f"{self.name or 'caffenet_hybrid'} was made for {made} pixels, not {height} x {width}")

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        fine = F.local_response_norm(_pool(F.relu(self.conv1(pixels))), 5, alpha=1e-4, beta=0.75)
        middle = F.local_response_norm(_pool(F.relu(self.conv2(fine))), 5, alpha=1e-4, beta=0.75)
        last = _pool(F.relu(self.conv5(F.relu(self.conv4(F.relu(self.conv3(middle)))))))
        tokens = to_tokens(last)
        pooled = self.dropout(F.relu(self.fc6(last.flatten(1))))
        states = (to_tokens(fine), to_tokens(middle), tokens) if hidden_states else ()
        return Features(tokens, self.grid, pooled, (fine, middle, last), states)

    def classify(self, features: Features) -> Tensor:
        return self.fc8(self.dropout(F.relu(self.fc7(features.pooled))))

    @staticmethod
    def _grid(height: int, width: int) -> tuple[int, int]:
        def side(pixels: int) -> int:
            for kernel in (7, 3, 5, 3, 3):
                # Convolutions round the number of steps of two down, Caffe's pooling rounds it up.
                span = pixels - kernel
                if span < 0:
                    return 0
                pixels = (span + (kernel == 3)) // 2 + 1
            return pixels

        return side(height), side(width)


def _pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, ceil_mode=True)


@register_encoder
class LRCN(Encoder):
    """Activities in clips: an encoder of frames, an LSTM over its pooled features, a linear map at every step.

    `tokens` are the outputs h_t, grid (T,); `pooled` is their mean.

    Args:
        frame_encoder: any encoder of pictures by name.
        frame_settings: its other arguments.
        hidden: H.
        drop: dropout of h_t before the linear map.
    """

    paper: ClassVar[str] = "lrcn"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "lrcn_activity": dict(image_size=227),
        "lrcn_nano": dict(image_size=32, frame_encoder="vit_nano", frame_settings=dict(depth=2), hidden=64),
    }
    inputs = "clips"
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        (r"(conv\d|fc6)\.0", r"frame_features.encoder.\1.weight"),
        (r"(conv\d|fc6)\.1", r"frame_features.encoder.\1.bias"),
        (r"lstm1\.0", "lstm.input.weight"),
        (r"lstm1\.1", "lstm.input.bias"),
        (r"lstm1\.2", "lstm.recurrent.weight"),
        (r"fc8-final\.0", "head.weight"),
        (r"fc8-final\.1", "head.bias"),
    )

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 227,
        in_chans: int = 3,
        num_classes: int = 0,
        frame_encoder: str = "caffenet_hybrid",
        frame_settings: Mapping[str, Any] | None = None,
        hidden: int = 256,
        drop: float = 0.5,
    ) -> None:
        super().__init__(image_size=image_size, in_chans=in_chans, num_classes=num_classes, width=hidden)
        self.frame_features = FrameFeatures(
            frame_encoder, image_size=image_size, in_chans=in_chans, settings=frame_settings
        )
        self.lstm = FlaggedLSTM(self.frame_features.width, hidden)
        self.dropout = nn.Dropout(drop)
        self.head = nn.Linear(hidden, num_classes) if num_classes else nn.Identity()
        for weight in self.head.parameters():
            nn.init.normal_(weight, std=0.01 if weight.ndim == 2 else 0.0)

    @property
    def stride(self) -> int:
        return self.frame_features.encoder.stride

    def check_size(self, height: int, width: int) -> None:
        self.frame_features.encoder.check_size(height, width)

    def check(self, pixels: Tensor) -> None:
        super().check(pixels)
        if pixels.shape[1] == 0:
            raise InputError(f"{self.called} takes clips of one frame or more, not of none")

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        return self._read(pixels, hidden_states, None)

    def _read(self, pixels: Tensor, hidden_states: bool, flags: Tensor | None) -> Features:
        frames = self.frame_features(pixels)
        h, _ = self.lstm(frames, flags)
        return Features(h, (h.shape[1],), h.mean(dim=1), (), (frames, h) if hidden_states else ())

    def classify(self, features: Features) -> Tensor:
        """The logarithm of the mean over steps of the softmax, [B, K]."""
        steps = self.head(self.dropout(features.tokens))
        return steps.log_softmax(dim=-1).logsumexp(dim=1) - torch.tensor(float(steps.shape[1])).log().to(steps)

    def step_logits(self, pixels: Tensor, flags: Tensor | None = None) -> Tensor:
        """The logits of every step [B, T, K]; `flags` [B, T] are 0 where another clip begins within a row."""
        self.check(pixels)
        if self.num_classes == 0:
            raise InputError(f"{self.called} has no head; create it with num_classes")
        if flags is not None and flags.shape != pixels.shape[:2]:
            raise InputError(f"flags must be one a frame, {list(pixels.shape[:2])}, not {list(flags.shape)}")
        return self.head(self.dropout(self._read(pixels, False, flags).tokens))

    def training_loss(self, pixels: Tensor, targets: Tensor, step: int, steps: int) -> Tensor:
        return self.loss(pixels, targets)

    def loss(self, pixels: Tensor, labels: Tensor, flags: Tensor | None = None) -> Tensor:
        """The mean cross entropy of all steps.

        Args:
            pixels: [B, T, C, H, W].
            labels: a class for each clip [B], or for each frame [B, T], where -1 is not counted.
            flags: see `step_logits`.
        """
        logits = self.step_logits(pixels, flags)
        each = labels[:, None].expand(logits.shape[:2]) if labels.ndim == 1 else labels
        return F.cross_entropy(logits.flatten(0, 1), each.flatten(), ignore_index=-1)


def flow_picture(flow: Tensor) -> Tensor:
    """Optical flow (u, v) in pixels [..., 2, H, W] as the picture of the flow stream [..., 3, H, W].

    The channels u, v and magnitude, times 16 plus 128, held to 0..255, less the mean of 128.
    """
    channels = torch.cat([flow, flow.norm(dim=-3, keepdim=True)], dim=-3)
    return (16 * channels + 128).clamp(0, 255) - 128


def mirrored_flow(flow: Tensor) -> Tensor:
    """Optical flow (u, v) [..., 2, H, W] of the mirrored video: places and the sign of u change."""
    return flow.flip(-1) * torch.tensor([-1.0, 1.0]).to(flow)[:, None, None]


def late_fusion(rgb: Tensor, flow: Tensor, weight: float = 1 / 3) -> Tensor:
    """Class probabilities of both streams from their logits [B, K]: weight on colours, the rest on flow."""
    return weight * rgb.softmax(dim=-1) + (1 - weight) * flow.softmax(dim=-1)
