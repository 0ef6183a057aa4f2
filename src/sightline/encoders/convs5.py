"""ConvS5: long videos by convolutional state spaces (Smith et al., NeurIPS 2023, arXiv:2310.19694).

Clips [B, T, C, H, W] with values in [-1, 1] in; the next frame of each, [B, T, C, H, W], out of `predict`:

    z_t = encode(frame t)                                   residual blocks and average pooling, H/4 x W/4
    u   := LN(u + head(ConvSSM(u)))                         layers, over all frames at once; see `ConvSSM`
    head(y) = gelu(y + r),  r = conv(gelu(GN(conv(gelu(GN(y))))))
    frame t+1 = tanh(decode(u_t))                           the encoder mirrored, nearest upsampling
    loss = w |e|^2 + (1 - w) |e|,  e the error, summed over columns and channels and averaged over the rest

The loss's partial sum makes learning rates depend on the picture's width, as in the official code (NVlabs/ConvSSM). Of
that code this is the variant without a VQ-GAN, in float; its constant "no action" channel is the bias of the 1 x 1
convolution here. It counts its GELU by tanh and its norms with eps 1e-6, and so does this. With `core="conv_lstm"`
each layer is LN(u + ConvLSTM(u)), the baseline of that code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.encoder import Encoder, Features, check_multiple, register_encoder
from sightline.encoders.layers import LayerNorm2d
from sightline.errors import InputError, unknown
from sightline.mixers.conv_lstm import ConvLSTM
from sightline.mixers.convolutional_state import ConvSSM, he_normal
from sightline.mixers.linear_recurrence import Mode

gelu = partial(F.gelu, approximate="tanh")
CORES = ("convs5", "conv_lstm")


def group_norm(channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """A group norm with at most `num_groups` groups; fewer where they do not divide the channels."""
    return nn.GroupNorm(math.gcd(num_groups, channels), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """skip(x) + 0.1 conv(elu(GN(conv(elu(GN(x)))))), the skip a 1 x 1 convolution where the channels change."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm1, self.norm2 = group_norm(inputs), group_norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv1(F.elu(self.norm1(x)))
        return self.skip(x) + 0.1 * self.conv2(F.elu(self.norm2(branch)))


class Head(nn.Module):
    """What follows a ConvSSM within its layer, and the only non-linear part of it."""

    def __init__(self, width: int, kernel_size: int, num_groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(width, num_groups), group_norm(width, num_groups)
        self.conv1 = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2)
        self.conv2 = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2)

    def forward(self, y: Tensor) -> Tensor:
        return gelu(y + self.conv2(gelu(self.norm2(self.conv1(gelu(self.norm1(y)))))))


class RecurrentLayer(nn.Module):
    """LN(u + head(core(u))), over all frames or frame by frame."""

    def __init__(self, width: int, core: ConvSSM | ConvLSTM, head: nn.Module) -> None:
        super().__init__()
        self.core, self.head = core, head
        self.norm = LayerNorm2d(width, eps=1e-6)

    def forward(self, u: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Frames [T, B, U, H, W]; gives as many, and the last state."""
        y, state = self.core(u, state)
        y = self.norm(u.flatten(0, 1) + self.head(y.flatten(0, 1)))
        return y.unflatten(0, u.shape[:2]), state

    def step(self, u: Tensor, state: Any, discrete: Any) -> tuple[Tensor, Any]:
        """One frame [B, U, H, W]."""
        y, state = self.core.step(u, state, discrete)
        return self.norm(u + self.head(y)), state


@register_encoder
class ConvS5(Encoder):
    """A next-frame predictor whose features are the maps that leave the last layer.

    `tokens` are those of all frames, grid (frames, rows, columns); `pooled` is the mean of the last frame's, which
    have seen all frames. The decoder takes part in `predict`, `loss` and `rollout` only.

    Args:
        depths: channels of the frame encoder; each entry after the first halves the size.
        d_model: U, channels of the layers.
        layers: how many.
        ssm_size: state size of each (of a ConvLSTM: the channels of its state, which have to be d_model).
        kernel_size: side of all kernels of the layers.
        num_groups: groups of the layers' group norms.
        core: `convs5` or `conv_lstm`.
        blocks: of the eigenvalues' start, see `ConvSSM`.
        clip_eigs: see `ConvSSM`.
        scan: see `ConvSSM`.
        loss_weight: w.
    """

    paper: ClassVar[str] = "convs5"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "convs5_moving_mnist_300": dict(image_size=64, d_model=256, ssm_size=256),
        "convs5_moving_mnist_600": dict(image_size=64, d_model=128, ssm_size=128),
        "convs5_nano": dict(image_size=32, depths=(16, 16, 32), d_model=32, ssm_size=32, layers=2, num_groups=8),
        "conv_lstm_nano": dict(
            image_size=32, depths=(16, 16, 32), d_model=32, ssm_size=32, layers=2, core="conv_lstm", num_groups=8
        ),
    }
    inputs = "clips"

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 64,
        in_chans: int = 3,
        num_classes: int = 0,
        depths: tuple[int, ...] = (64, 128, 256),
        d_model: int = 256,
        layers: int = 8,
        ssm_size: int = 256,
        kernel_size: int = 3,
        num_groups: int = 32,
        core: str = "convs5",
        blocks: int = 1,
        clip_eigs: bool = True,
        scan: Mode = "loop",
        loss_weight: float = 0.5,
    ) -> None:
        super().__init__(image_size=image_size, in_chans=in_chans, num_classes=num_classes, width=d_model)
        if core not in CORES:
            raise unknown("core of ConvS5", core, CORES)
        if core == "conv_lstm" and ssm_size != d_model:
            raise InputError(f"a ConvLSTM adds its state to its input, so ssm_size must be d_model, not {ssm_size}")
        if not depths or layers < 1 or not 0 <= loss_weight <= 1:
            raise InputError("ConvS5 needs at least one entry of depths, one layer, and a loss_weight from 0 to 1")
        self.pool = 2 ** (len(depths) - 1)
        self.loss_weight = loss_weight
        check_multiple("a ConvS5 of these depths", self.image_size, self.pool)
        shrinking: list[nn.Module] = [nn.Conv2d(in_chans, depths[0], 3, padding=1), ResidualBlock(depths[0], depths[0])]
        for inputs, outputs in pairwise(depths):
            shrinking += [nn.AvgPool2d(2), ResidualBlock(inputs, outputs)]
        self.frame_encoder = nn.Sequential(*shrinking)
        self.project = nn.Conv2d(depths[-1], d_model, 1)

        def layer() -> RecurrentLayer:
            if core == "conv_lstm":
                return RecurrentLayer(d_model, ConvLSTM(d_model, kernel_size=kernel_size), nn.Identity())
            kernels = dict(kernel_in=kernel_size, kernel_out=kernel_size)
            ssm = ConvSSM(d_model, ssm_size, blocks=blocks, clip_eigs=clip_eigs, scan=scan, **kernels)
            return RecurrentLayer(d_model, ssm, Head(d_model, kernel_size, num_groups))

        self.layers = nn.ModuleList(layer() for _ in range(layers))
        growing: list[nn.Module] = [nn.Conv2d(d_model, depths[0], 3, padding=1)]
        inputs = depths[0]
        for outputs in reversed(depths[1:]):
            growing += [ResidualBlock(inputs, outputs), nn.Upsample(scale_factor=2, mode="nearest")]
            inputs = outputs
        growing += [
            ResidualBlock(inputs, depths[0]),
            LayerNorm2d(depths[0], eps=1e-6),
            nn.Conv2d(depths[0], in_chans, 1),
        ]
        self.frame_decoder = nn.Sequential(*growing)
        self.head = nn.Linear(d_model, num_classes) if num_classes else nn.Identity()
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                # The variance of flax's default, 1 / fan_in, is half of He's.
                he_normal(part.weight, 2 * part.weight[0].numel())
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    @property
    def stride(self) -> int:
        return self.pool

    def check(self, pixels: Tensor) -> None:
        super().check(pixels)
        if pixels.shape[1] == 0:
            raise InputError(f"{self.called} takes clips of one frame or more, not of none")

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        maps, _, passed = self._maps(pixels)
        tokens = [_tokens(each) for each in (passed if hidden_states else ())]
        grid = (pixels.shape[1], *maps.shape[-2:])
        return Features(_tokens(maps), grid, maps[-1].mean(dim=(-2, -1)), (), tuple(tokens))

    def classify(self, features: Features) -> Tensor:
        return self.head(features.pooled)

    def predict(self, pixels: Tensor) -> Tensor:
        """For each frame the one that follows it, all by one parallel pass: [B, T, C, H, W] in [-1, 1]."""
        self.check(pixels)
        return self._decode(self._maps(pixels)[0])

    def loss(self, pixels: Tensor) -> Tensor:
        """The mean over a clip [B, T, C, H, W] of at least two frames of the error of each frame but the first.

        Raises:
            InputError: a clip of one frame, and as `forward`.
        """
        self.check(pixels)
        if pixels.shape[1] < 2:
            raise InputError("the loss of a next-frame predictor needs clips of 2 frames or more")
        error = self._decode(self._maps(pixels[:, :-1])[0]) - pixels[:, 1:]
        mixed = self.loss_weight * error.square() + (1 - self.loss_weight) * error.abs()
        return mixed.sum(dim=(-1, -3)).mean()

    def training_loss(self, pixels: Tensor, targets: Tensor, step: int, steps: int) -> Tensor:
        return self.loss(pixels)

    @torch.no_grad()
    def rollout(self, context: Tensor, frames: int) -> Tensor:
        """Continues a clip, each frame from the one before it: [B, T, C, H, W] -> [B, frames, C, H, W].

        The context is read in one parallel pass; each new frame then costs the same, however many there were.

        Raises:
            InputError: fewer than one frame wanted, and as `forward`.
        """
        self.check(context)
        if frames < 1:
            raise InputError(f"a rollout needs frames of 1 or more, not {frames}")
        maps, states, _ = self._maps(context)
        frame = self._decode(maps[-1:])[:, 0]
        made = [frame]
        layers = [layer for layer in self.layers if isinstance(layer, RecurrentLayer)]
        constants = [layer.core.discretise() for layer in layers]
        for _ in range(frames - 1):
            u = self.project(self.frame_encoder(frame))
            for index, layer in enumerate(layers):
                u, states[index] = layer.step(u, states[index], constants[index])
            frame = self.frame_decoder(u).tanh()
            made.append(frame)
        return torch.stack(made, dim=1)

    def _maps(self, pixels: Tensor) -> tuple[Tensor, list[Any], list[Tensor]]:
        """Maps [T, B, U, h, w] that leave the last layer, each layer's last state, and all maps on the way."""
        frames = pixels.transpose(0, 1)
        u = self.project(self.frame_encoder(frames.flatten(0, 1))).unflatten(0, frames.shape[:2])
        passed, states = [u], []
        for layer in self.layers:
            u, state = layer(u, None)
            passed.append(u)
            states.append(state)
        return u, states, passed

    def _decode(self, maps: Tensor) -> Tensor:
        return self.frame_decoder(maps.flatten(0, 1)).unflatten(0, maps.shape[:2]).transpose(0, 1).tanh()


def _tokens(maps: Tensor) -> Tensor:
    """[T, B, U, H, W] -> [B, T H W, U]."""
    return maps.permute(1, 0, 3, 4, 2).flatten(1, 3)
