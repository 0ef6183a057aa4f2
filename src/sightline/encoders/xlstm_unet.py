"""xLSTM-UNet (Chen et al., "xLSTM-UNet can be an Effective 2D & 3D Medical Image Segmentation Backbone with Vision-LSTM
(ViL) better than its Mamba Counterpart", arXiv:2407.01530): a residual U-Net in nnU-Net's form whose deep maps pass
through Vision-LSTM blocks.

In go pictures [B, C, H, W] or volumes [B, C, D, H, W], out come logits [B, classes, ...] at several scales. A stage is

    R(x) = LeakyReLU(IN(conv(LeakyReLU(IN(conv(x))))) + shortcut(x))          IN: instance norm; the first conv strides

after a stem of the same blocks at full resolution. Maps are flattened to tokens for a ViL block,

    Bot:    after the last stage only
    Enc 2D: after every second stage, the last of them the last; a plain block after stage 1
    Enc 3D: after the stages from the fourth on; plain blocks before

always read from the first token to the last. Where a map of Enc has no more positions than channels, its channels are
the tokens, which fixes the size of the input. The decoder enlarges by nearest neighbours, narrows with a 1 x 1
convolution, joins the map of the encoder and applies R. As in the official code the 2-D decoder joins nothing at full
resolution, the finer half of its stages and the deeper half of the encoder's have one block each, and a ViL block whose
width 4 does not divide has 2 heads. The official wrapper has a further LayerNorm that it does not use; it is left out.

The plain U-Net (`vil=False`) is the same without ViL blocks. Dice, cross entropy and sliding windows are MONAI's.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.encoder import Encoder, Features, Inputs, register_encoder
from sightline.encoders.layers import to_map, to_tokens
from sightline.encoders.vil import ViLBlock
from sightline.errors import InputError, unknown
from sightline.mixers.mlstm import full_precision

Steps = Sequence[int | Sequence[int]]

_CONV: Mapping[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM: Mapping[int, Callable[..., nn.Module]] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class ResidualBlock(nn.Module):
    """R of the module's docstring; without a convolution in the shortcut where neither width nor size changes."""

    def __init__(
        self, dims: int, wide_in: int, wide_out: int, kernel: int, stride: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        conv, norm = _CONV[dims], _NORM[dims]
        step = tuple(stride or [1] * dims)
        self.conv1 = conv(wide_in, wide_out, kernel, stride=step, padding=kernel // 2)
        self.norm1 = norm(wide_out, affine=True)
        self.conv2 = conv(wide_out, wide_out, kernel, padding=kernel // 2)
        self.norm2 = norm(wide_out, affine=True)
        self.conv3 = None if stride is None else conv(wide_in, wide_out, 1, stride=step)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        y = self.norm2(self.conv2(y))
        return F.leaky_relu(y + (x if self.conv3 is None else self.conv3(x)), 0.01)


def _blocks(dims: int, wide_in: int, wide_out: int, kernel: int, stride: Sequence[int], count: int) -> nn.Sequential:
    """One block with a convolution in its shortcut and `count` - 1 without."""
    rest = (ResidualBlock(dims, wide_out, wide_out, kernel) for _ in range(count - 1))
    return nn.Sequential(ResidualBlock(dims, wide_in, wide_out, kernel, stride), *rest)


class ViLOnMap(nn.Module):
    """A ViL block over a map, in full precision.

    Args:
        width: channels of a token: those of the map, or its positions where `channel_tokens`.
        channel_tokens: take channels for tokens.
    """

    def __init__(self, width: int, *, channel_tokens: bool = False) -> None:
        super().__init__()
        self.channel_tokens = channel_tokens
        self.vil = ViLBlock(width, num_heads=2 if width % 4 else 4)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[2:])
        with full_precision(x):
            x = x.to(self.vil.norm.weight.dtype)
            if self.channel_tokens:
                return self.vil(x.flatten(2)).unflatten(2, grid)
            return to_map(self.vil(to_tokens(x)), grid)


class _Down(nn.Module):
    """Stem, stages, and what follows each stage."""

    def __init__(self, stem: nn.Module, stages: list[nn.Module], between: list[nn.Module]) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.xlstm_layers = nn.ModuleList(between)

    def forward(self, x: Tensor) -> list[Tensor]:
        """What leaves the stem and each stage."""
        maps = [self.stem(x)]
        for stage, layer in zip(self.stages, self.xlstm_layers, strict=True):
            maps.append(layer(stage(maps[-1])))
        return maps


class _Enlarge(nn.Module):
    """Nearest neighbours, then a 1 x 1 convolution."""

    def __init__(self, dims: int, wide_in: int, wide_out: int, factor: Sequence[int]) -> None:
        super().__init__()
        self.factor = [float(step) for step in factor]
        self.conv = _CONV[dims](wide_in, wide_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=self.factor, mode="nearest"))


class _Up(nn.Module):
    """The decoder, from the deepest map upwards; `joins` says where the encoder's map of that size comes in."""

    def __init__(
        self, upsample_layers: list[nn.Module], stages: list[nn.Module], heads: list[nn.Module], joins: list[bool]
    ) -> None:
        super().__init__()
        self.joins = joins
        self.upsample_layers = nn.ModuleList(upsample_layers)
        self.stages = nn.ModuleList(stages)
        self.seg_layers = nn.ModuleList(heads)

    def forward(self, skips: list[Tensor]) -> tuple[Tensor, ...]:
        """The decoder's maps, finest first."""
        x, maps = skips[-1], []
        for enlarge, stage, join, skip in zip(
            self.upsample_layers, self.stages, self.joins, reversed(skips[:-1]), strict=True
        ):
            x = enlarge(x)
            x = stage(torch.cat([x, skip], dim=1) if join else x)
            maps.append(x)
        return tuple(reversed(maps))


_PLANS: Mapping[str, Mapping[str, Any]] = {
    "2d": dict(image_size=320, widths=(32, 64, 128, 256, 512, 512, 512), strides=(1, 2, 2, 2, 2, 2, 2)),
    "3d": dict(
        slices=48,
        image_size=(160, 224),
        widths=(32, 64, 128, 256, 320, 320),
        strides=(1, (1, 2, 2), 2, 2, 2, (1, 2, 2)),
    ),
    "2d_nano": dict(image_size=32, widths=(8, 16, 32, 48), strides=(1, 2, 2, 2)),
    "3d_nano": dict(slices=16, image_size=32, widths=(8, 16, 24, 32), strides=(1, 2, 2, 2)),
}


def _configs(dims: int) -> dict[str, dict[str, Any]]:
    plans = {name: plan for name, plan in _PLANS.items() if name.startswith(str(dims))}
    made: dict[str, dict[str, Any]] = {}
    for name, plan in plans.items():
        made[f"xlstm_unet_bot_{name}"] = dict(plan, variant="bot")
        made[f"xlstm_unet_enc_{name}"] = dict(plan, variant="enc")
        made[f"unet_{name}"] = dict(plan, variant="bot", vil=False)
    return made


@register_encoder
class XLSTMUNet(Encoder):
    """xLSTM-UNet for pictures. `Features.tokens` are the deepest map's, `Features.maps` those of the decoder.

    The published names follow nnU-Net's rules for the widths; stages and strides of a data set come from its plan, and
    those given here fit the size that they are given with.

    Args:
        num_classes: classes of the segmentation with the background, 0 for no segmentation heads.
        widths: channels of each stage, min(32 * 2^s, 512) in nnU-Net's plans, 320 in three dimensions.
        strides: of each stage, a number or one for each axis; the first is 1.
        kernel_size: of all convolutions, odd.
        blocks: residual blocks of a stage in the finer half of the encoder and the deeper half of the decoder; the
            other stages have one.
        variant: "bot" or "enc".
        vil: False leaves the ViL blocks out, for a plain residual U-Net.
        deep_supervision: whether `segment` gives logits at every scale, or at the finest only.
        slices: for volumes, D of those that it is made for.
    """

    paper = "xlstm_unet"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = _configs(2)
    inputs: ClassVar[Inputs] = "pictures"
    dims: ClassVar[int] = 2
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        (r"(.+)\.vil\.layer\.(?:mlstm_cell\.|conv1d\.)?(.+)", r"\1.vil.layer.\2"),
        (r"(.+)\.conv([12])\.conv\.(.+)", r"\1.conv\2.\3"),
        (r"(.+)\.conv([12])\.norm\.(.+)", r"\1.norm\2.\3"),
    )

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 320,
        in_chans: int = 3,
        num_classes: int = 0,
        widths: Sequence[int] = (32, 64, 128, 256, 512, 512, 512),
        strides: Steps = (1, 2, 2, 2, 2, 2, 2),
        kernel_size: int = 3,
        blocks: int = 2,
        variant: Literal["bot", "enc"] = "bot",
        vil: bool = True,
        deep_supervision: bool = True,
        slices: int | None = None,
    ) -> None:
        super().__init__(
            image_size=image_size, in_chans=in_chans, num_classes=num_classes, width=widths[-1] if widths else 0
        )
        steps = [[step] * self.dims if isinstance(step, int) else list(step) for step in strides]
        self._check_plan(widths, steps, kernel_size, blocks, variant)
        self.deep_supervision = deep_supervision
        if (slices is None) is (self.dims == 3) or (slices is not None and slices < 1):
            raise InputError(f"slices must be 1 or more for volumes, and None for pictures, not {slices}")
        self.sizes = self.image_size if slices is None else (slices, *self.image_size)
        """The sides that it is made for."""
        self.fixed = False
        """Whether there are layers whose tokens are channels, which take one size only."""
        self.steps = tuple(math.prod(axis) for axis in zip(*steps, strict=True))
        """By how much the deepest map is smaller, for each axis."""
        self._check_sides(self.sizes)
        stages, dims, kernel = len(widths), self.dims, kernel_size
        above = -(-stages // 2)

        size, down, between = list(self.sizes), list[nn.Module](), list[nn.Module]()
        for stage, (width, step) in enumerate(zip(widths, steps, strict=True)):
            size = [side // stride for side, stride in zip(size, step, strict=True)]
            wide_in = widths[max(0, stage - 1)]
            down.append(_blocks(dims, wide_in, width, kernel, step, blocks if stage < above else 1))
            kind = self._after_stage(stage, stages) if variant == "enc" else "nothing"
            if kind == "vil" and vil:
                positions = math.prod(size)
                channel_tokens = positions <= width
                self.fixed |= channel_tokens
                between.append(ViLOnMap(positions if channel_tokens else width, channel_tokens=channel_tokens))
            elif kind == "conv":
                between.append(ResidualBlock(dims, width, width, kernel))
            else:
                between.append(nn.Identity())
        ones = [1] * dims
        self.encoder = _Down(_blocks(dims, in_chans, widths[0], kernel, ones, blocks), down, between)
        self.xlstm = ViLOnMap(widths[-1]) if vil and variant == "bot" else nn.Identity()

        up, enlarge, heads, joins = list[nn.Module](), list[nn.Module](), list[nn.Module](), list[bool]()
        for level in range(stages - 1):
            below, here = widths[stages - 1 - level], widths[stages - 2 - level]
            joins.append(dims == 3 or level < stages - 2)
            count = blocks if level < math.ceil(stages / 2) else 1
            enlarge.append(_Enlarge(dims, below, here, steps[stages - 1 - level]))
            up.append(_blocks(dims, here * (1 + joins[-1]), here, kernel, ones, count))
            if num_classes:
                heads.append(_CONV[dims](here, num_classes, 1))
        self.decoder = _Up(enlarge, up, heads, joins)
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(part.weight, a=0.01)
                assert part.bias is not None
                nn.init.zeros_(part.bias)

    def _check_plan(
        self, widths: Sequence[int], steps: list[list[int]], kernel: int, blocks: int, variant: str
    ) -> None:
        if variant not in ("bot", "enc"):
            raise unknown("variant", variant, ("bot", "enc"))
        least = 2 if variant == "bot" else self.dims + 1
        if len(widths) < least or len(steps) != len(widths) or any(len(step) != self.dims for step in steps):
            raise InputError(
                f"widths and strides must be of the same {least} or more stages, and strides numbers or {self.dims} "
                f"numbers each, not {len(widths)} and {len(steps)} with {steps}"
            )
        if min(widths) < 1 or any(min(step) < 1 for step in steps) or max(steps[0]) > 1:
            raise InputError(
                f"widths and strides must be 1 or more and the first stride 1, not {list(widths)} and {steps}"
            )
        if kernel < 1 or kernel % 2 == 0 or blocks < 1:
            raise InputError(f"kernel_size must be odd and blocks 1 or more, not {kernel} and {blocks}")

    def _after_stage(self, stage: int, stages: int) -> Literal["vil", "conv", "nothing"]:
        """What follows a stage of Enc."""
        if self.dims == 3:
            return "conv" if stage < 3 else "vil"
        if stage > 1 and stage % 2 != stages % 2:
            return "vil"
        return "conv" if stage == 1 else "nothing"

    @property
    def stride(self) -> int:
        return self.steps[-1]

    def check(self, pixels: Tensor) -> None:
        super().check(pixels)
        self._check_sides(tuple(pixels.shape[2:]))

    def check_size(self, height: int, width: int) -> None:
        """As of every encoder. Layers whose tokens are channels, in most shapes of Enc, allow one size only."""
        self._check_sides((*self.sizes[:-2], height, width))

    def _check_sides(self, sides: tuple[int, ...]) -> None:
        """Raises `InputError` for sides (rows, columns), or (slices, rows, columns), that it cannot take."""
        name, given = self.called, " x ".join(map(str, sides))
        if self.fixed and sides != self.sizes:
            raise InputError(
                f"{name} has layers whose tokens are channels, so that it takes one size only, "
                f"{' x '.join(map(str, self.sizes))} and not {given}; create it for that size"
            )
        if any(side % step for side, step in zip(sides, self.steps, strict=True)):
            raise InputError(
                f"{name} takes sides that are multiples of {' x '.join(map(str, self.steps))}, not {given}"
            )
        if math.prod(sides) <= math.prod(self.steps):
            raise InputError(f"{name} needs two or more positions in its deepest map, which {given} does not leave")

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        skips, maps = self._maps(pixels)
        tokens = to_tokens(skips[-1])
        states = tuple(map(to_tokens, skips)) if hidden_states else ()
        return Features(tokens, tuple(skips[-1].shape[2:]), tokens.mean(1), maps, states)

    def _maps(self, pixels: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """What leaves the stem and each stage, and the decoder's maps, finest first."""
        skips = self.encoder(pixels)
        skips[-1] = self.xlstm(skips[-1])
        return skips, self.decoder(skips[1:])

    def classify(self, features: Features) -> Tensor:
        raise InputError(f"{self.called} segments and has no logits for the whole; see segment")

    def segment(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, num_classes, ...] for every pixel, finest first; one entry without deep supervision.

        Raises:
            InputError: without heads (num_classes = 0), and as `forward`.
        """
        if not self.decoder.seg_layers:
            raise InputError(f"{self.called} has no segmentation heads; create it with num_classes")
        self.check(pixels)
        maps = self._maps(pixels)[1]
        heads = list(reversed(self.decoder.seg_layers))
        used = len(heads) if self.deep_supervision else 1
        return tuple(head(values) for head, values in zip(heads[:used], maps[:used], strict=True))

    def training_loss(self, pixels: Tensor, targets: Tensor, step: int, steps: int) -> Tensor:
        return segmentation_loss(self.segment(pixels), targets)

    def adapt_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves out what the official modules hold twice, the wrapper's norm without use, and heads we do not have."""
        idle = r"decoder\.encoder\..+|.+\.all_modules\..+|(?:xlstm|encoder\.xlstm_layers\.\d+)\.norm\..+"
        if self.num_classes == 0:
            idle += r"|decoder\.seg_layers\..+"
        return {key: value for key, value in state.items() if not re.fullmatch(idle, key)}


@register_encoder
class XLSTMUNet3d(XLSTMUNet):
    """xLSTM-UNet for volumes [B, C, D, H, W]; its arguments are those of `XLSTMUNet`."""

    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = _configs(3)
    inputs: ClassVar[Inputs] = "volumes"
    dims: ClassVar[int] = 3

    def example_shape(self, batch: int = 1) -> tuple[int, ...]:
        return (batch, self.in_chans, *self.sizes)


def segmentation_loss(logits: Tensor | Sequence[Tensor], target: Tensor, *, batch_dice: bool | None = None) -> Tensor:
    """Soft Dice of the classes but the background plus cross entropy, over all scales.

    The finest scale weighs 1, the next 1/2, and so on; the coarsest of several weighs nothing, and the weights are
    divided by their sum. Targets of coarser scales are taken at the nearest positions. nnU-Net's Dice is -Dice where
    this is 1 - Dice, which differs by a constant.

    Args:
        logits: [B, classes, ...], or several, finest first, as `XLSTMUNet.segment` gives them.
        target: whole numbers [B, ...] or [B, 1, ...] of the finest scale, 0 the background.
        batch_dice: one Dice for the whole batch instead of one a sample; None for nnU-Net's choice, the first for
            pictures and the second for volumes.

    Raises:
        InputError: one class, a target of another size or with labels that are no class; MONAI is not installed.
    """
    scales = [logits] if isinstance(logits, Tensor) else list(logits)
    classes, sides = scales[0].shape[1], scales[0].shape[2:]
    if classes < 2:
        raise InputError(f"segmentation takes the background and one class or more, not {classes} in all")
    target = target.unsqueeze(1) if target.ndim == scales[0].ndim - 1 else target
    if target.shape != (len(scales[0]), 1, *sides):
        raise InputError(
            f"the target must be {[len(scales[0]), *sides]}, as the finest logits, not {list(target.shape)}"
        )
    if not target.is_meta and not bool(((target >= 0) & (target < classes)).all()):
        raise InputError(f"the target must hold classes from 0 to {classes - 1}, not {target.min()} to {target.max()}")
    loss = _monai("monai.losses").DiceCELoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
        batch=scales[0].ndim == 4 if batch_dice is None else batch_dice,
    )
    summed = scales[0].new_zeros(())
    used = scales[:-1] or scales
    for level, values in enumerate(used):
        near = F.interpolate(target.float(), size=values.shape[2:], mode="nearest-exact")
        summed = summed + 0.5**level * loss(values, near)
    return summed / sum(0.5**level for level in range(len(used)))


@torch.no_grad()
def sliding_window_segment(
    model: XLSTMUNet, pixels: Tensor, roi_size: int | Sequence[int], *, overlap: float = 0.5
) -> Tensor:
    """Logits [B, classes, ...] of pictures or volumes of any size, from windows that overlap, weighted by a Gaussian.

    Args:
        model: gives the logits of a window.
        pixels: as for the model, of any size; smaller ones than a window are padded with zeros.
        roi_size: sides of the window, a size that the model takes.
        overlap: share of a window's side that the next one covers too.

    Raises:
        InputError: a window that the model does not take; MONAI is not installed.
    """
    window = (roi_size,) * model.dims if isinstance(roi_size, int) else tuple(roi_size)
    if len(window) != model.dims or not 0 <= overlap < 1:
        raise InputError(
            f"roi_size must be a side or {model.dims} sides and overlap from 0 to below 1, not {roi_size} and {overlap}"
        )
    return _monai("monai.inferers").sliding_window_inference(
        pixels, window, 1, lambda part: model.segment(part)[0], overlap=overlap, mode="gaussian"
    )


def _monai(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError("segmentation needs MONAI; install it with pip install 'sightline[medical]'") from error
