"""FastViTHD: convolutions at high resolution, attention only on maps of stride 32 and 64.

Vasu et al., "FastVLM: Efficient Vision Encoding for Vision Language Models", CVPR 2025, arXiv:2412.13303; official code
apple/ml-fastvlm (`mobileclip/mci.py`). In: pictures [B, 3, H, W] in [0, 1], not normalised further. Out: tokens
[B, HW / 64^2, 3072], so 256 of a picture of 1024 x 1024.

    x = stem(pixels)                                stride 4
    stages 1-3   RepMixer blocks                    x := x + g (M(x) - S(x));        x := x + g' F(x)
    stages 4-5   x := x + DW7(x), attention blocks  x := x + g MHSA(LN(x));          x := x + g' F(x)
    between      7 x 7 and 3 x 3 of stride 2, summed, GELU; 1 x 1, GELU
    tokens = GELU(SE(M(x)))                         3 x 3 by channel, twice the width
    F = 1x1 . GELU . 1x1 . BN . DW7

M is a MobileOne block: a k x k and a 1 x 1 convolution, each with its own batch norm, and a batch norm of the input
itself where shapes allow, summed; S is the last of the three alone. In eval mode all of it is linear, and `fuse` writes
each such sum as one convolution, exactly. The released code only builds the fused form; train in the branch form.

Where the official code differs: its fused form leaves the batch norm of F as it is; here it is fused too, and official
weights are so converted when they are loaded. Sides that are no multiple of the stride are taken as there: each
convolution of stride 2 rounds up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.encoder import Encoder, Features, register_encoder
from sightline.encoders.layers import DropPath, LayerNorm2d, rates, to_map, to_tokens
from sightline.errors import InputError
from sightline.mixers.attention import Attention

HEAD_WIDTH = 32


class ConvNorm(nn.Module):
    """A convolution without bias, padded to keep the size, and its batch norm."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class SqueezeExcite(nn.Module):
    """Each channel times a number in (0, 1) that two linear maps make from the means of all channels."""

    def __init__(self, width: int, ratio: float = 1 / 16) -> None:
        super().__init__()
        inner = max(1, int(width * ratio))
        self.reduce = nn.Conv2d(width, inner, 1)
        self.expand = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(means))))


class RepConv(nn.Module):
    """A sum of convolutions with batch norms, and of a batch norm of the input, that can become one convolution.

    Args:
        before: channels of the input.
        after: channels of the output.
        kernels: side of each branch's kernel, the largest first.
        side: side of the fused kernel, where there are no kernels.
        stride: of all branches.
        groups: of all branches.
        skip: add a batch norm of the input; None for wherever the shape stays.
        squeeze: multiply the sum by squeeze and excite.
        act: end with GELU.
    """

    def __init__(
        self,
        before: int,
        after: int,
        kernels: Sequence[int],
        *,
        side: int | None = None,
        stride: int = 1,
        groups: int = 1,
        skip: bool | None = None,
        squeeze: bool = False,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.side = side or kernels[0]
        self.before, self.after, self.stride, self.groups = before, after, stride, groups
        self.branches = nn.ModuleList(ConvNorm(before, after, kernel, stride, groups) for kernel in kernels)
        keeps = before == after and stride == 1
        self.skip = nn.BatchNorm2d(before) if (keeps if skip is None else skip) else None
        self.fused: nn.Conv2d | None = None
        self.se = SqueezeExcite(after) if squeeze else nn.Identity()
        self.act = nn.GELU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is not None:
            return self.act(self.se(self.fused(x)))
        parts = [branch(x) for branch in self.branches]
        if self.skip is not None:
            parts.append(self.skip(x))
        return self.act(self.se(sum(parts[1:], start=parts[0])))

    def kernel_and_bias(self) -> tuple[Tensor, Tensor]:
        """The one convolution that all branches are in eval mode."""
        weights, biases = [], []
        for branch in self.branches:
            assert isinstance(branch, ConvNorm)
            weight, bias = fused_norm(branch.conv.weight, branch.bn)
            weights.append(F.pad(weight, [(self.side - weight.shape[-1]) // 2] * 4))
            biases.append(bias)
        if self.skip is not None:
            weight, bias = fused_norm(delta_kernel(self.before, self.groups, self.side, self.skip.weight), self.skip)
            weights.append(weight)
            biases.append(bias)
        return torch.stack(weights).sum(dim=0), torch.stack(biases).sum(dim=0)

    def fuse(self) -> None:
        """Replaces the branches by one convolution."""
        if self.fused is None:
            self.fused = one_convolution(*self.kernel_and_bias(), self.stride, self.groups)
            self.branches, self.skip = nn.ModuleList(), None


class RepMixer(nn.Module):
    """x + g (M(x) - S(x)): one depthwise convolution when it is fused."""

    def __init__(self, width: int, layer_scale: float) -> None:
        super().__init__()
        self.norm = RepConv(width, width, (), side=3, groups=width, act=False)
        self.mixer = RepConv(width, width, (3, 1), groups=width, act=False)
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), layer_scale))
        self.fused: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is not None:
            return self.fused(x)
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))

    def fuse(self) -> None:
        """Replaces all by one convolution."""
        if self.fused is None:
            weight, bias = self.mixer.kernel_and_bias()
            minus, minus_bias = self.norm.kernel_and_bias()
            width = len(self.layer_scale)
            weight = delta_kernel(width, width, 3, weight) + self.layer_scale[..., None] * (weight - minus)
            self.fused = one_convolution(weight, self.layer_scale.flatten() * (bias - minus_bias), 1, width)
            del self.norm, self.mixer, self.layer_scale


class RepPosition(nn.Module):
    """x + DW7(x): tells positions apart, by way of the padding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pe = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.fused: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe(x) if self.fused is None else self.fused(x)

    def fuse(self) -> None:
        """Adds the skip to the kernel."""
        if self.fused is None:
            width, weight = self.pe.out_channels, self.pe.weight
            assert self.pe.bias is not None
            self.fused = one_convolution(delta_kernel(width, width, 7, weight) + weight, self.pe.bias, 1, width)
            del self.pe


class ConvFfn(nn.Module):
    """A depthwise 7 x 7 convolution with batch norm, then two 1 x 1 convolutions with GELU between."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.conv = RepConv(width, width, (7,), groups=width, skip=False, act=False)
        self.fc1 = nn.Conv2d(width, int(width * ratio), 1)
        self.fc2 = nn.Conv2d(int(width * ratio), width, 1)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


class RepMixerBlock(nn.Module):
    """RepMixer, then x + g F(x)."""

    def __init__(self, width: int, mlp_ratio: float, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.token_mixer = RepMixer(width, layer_scale)
        self.convffn = ConvFfn(width, mlp_ratio)
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.drop_path(self.layer_scale * self.convffn(x))


class AttentionBlock(nn.Module):
    """x + g attention(LN(x)), then x + g F(x), on maps; heads are 32 wide."""

    def __init__(self, width: int, mlp_ratio: float, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.norm = LayerNorm2d(width)
        self.token_mixer = Attention(width, width // HEAD_WIDTH, qkv_bias=False)
        self.convffn = ConvFfn(width, mlp_ratio)
        self.layer_scale_1 = nn.Parameter(torch.full((width, 1, 1), layer_scale))
        self.layer_scale_2 = nn.Parameter(torch.full((width, 1, 1), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[2:])
        mixed = to_map(self.token_mixer(to_tokens(self.norm(x)), grid), grid)
        x = x + self.drop_path(self.layer_scale_1 * mixed)
        return x + self.drop_path(self.layer_scale_2 * self.convffn(x))


class Down(nn.Module):
    """Half the resolution: the large kernel with its small twin, then 1 x 1."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        large = RepConv(before, after, (7, 3), stride=2, groups=before, skip=False)
        self.proj = nn.Sequential(large, RepConv(after, after, (1,)))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def fused_norm(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a convolution without bias followed by a batch norm in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return weight * gain[:, None, None, None], norm.bias - norm.running_mean * gain


def delta_kernel(width: int, groups: int, side: int, like: Tensor) -> Tensor:
    """The kernel of the convolution that changes nothing."""
    kernel = like.new_zeros(width, width // groups, side, side)
    channels = torch.arange(width, device=like.device)
    kernel[channels, channels % (width // groups), side // 2, side // 2] = 1
    return kernel


def one_convolution(weight: Tensor, bias: Tensor, stride: int, groups: int) -> nn.Conv2d:
    """A convolution with the given weights, padded to keep the size."""
    after, per_group, side, _ = weight.shape
    options = dict(stride=stride, padding=side // 2, groups=groups, device=weight.device, dtype=weight.dtype)
    made = nn.utils.skip_init(nn.Conv2d, per_group * groups, after, side, **options)
    made.weight, made.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return made


@register_encoder
class FastViTHD(Encoder):
    """The encoder of FastVLM, in the branch form that trains or fused.

    Args:
        widths: channels of each stage.
        depths: blocks of each stage.
        attention_stages: how many of the last stages mix by attention; their widths are multiples of 32.
        mlp_ratio: inner width of F over that of the stage.
        layer_scale: start of g.
        drop_path: rate of the last block; those before rise to it linearly.
        clip_dim: width of the CLIP embedding that `Features.pooled` then is, 0 for the mean token (published: 768).
        fused: build the form that `fuse` gives, which official checkpoints have.
    """

    paper: ClassVar[str] = "fastvlm"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fastvithd": dict(widths=(96, 192, 384, 768, 1536), depths=(2, 12, 24, 4, 2), image_size=1024),
        "fastvithd_nano": dict(widths=(16, 32, 64), depths=(1, 2, 2), attention_stages=1, image_size=32),
    }
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        (r"(.*convffn)\.conv\.(conv|bn)\.(.*)", r"\1.conv.branches.0.\2.\3"),
        (r"(.*)\.(?:reparam_conv|lkb_reparam)\.(.*)", r"\1.fused.\2"),
        (r"(.*)\.(?:rbr_conv\.0|lkb_origin)\.(.*)", r"\1.branches.0.\2"),
        (r"(.*)\.(?:rbr_scale|small_conv)\.(.*)", r"\1.branches.1.\2"),
        (r"(.*)\.rbr_skip\.(.*)", r"\1.skip.\2"),
        (r"head\.proj", "clip_proj"),
    )

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 1024,
        in_chans: int = 3,
        num_classes: int = 0,
        widths: Sequence[int] = (96, 192, 384, 768, 1536),
        depths: Sequence[int] = (2, 12, 24, 4, 2),
        attention_stages: int = 2,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
        drop_path: float = 0.0,
        clip_dim: int = 0,
        fused: bool = False,
    ) -> None:
        super().__init__(image_size=image_size, in_chans=in_chans, num_classes=num_classes, width=2 * widths[-1])
        stages = len(widths)
        if len(depths) != stages or not 0 <= attention_stages <= stages:
            raise InputError(
                f"FastViTHD takes as many depths as widths and at most that many attention_stages, not {len(depths)} "
                f"depths, {stages} widths and attention_stages={attention_stages}"
            )
        if any(width % HEAD_WIDTH for width in widths[stages - attention_stages :]):
            raise InputError(
                f"the widths of FastViTHD's attention stages must be multiples of {HEAD_WIDTH}, not "
                f"{tuple(widths[stages - attention_stages :])}"
            )
        self.stages = stages
        first = widths[0]
        self.patch_embed = nn.Sequential(
            RepConv(in_chans, first, (3,), stride=2),
            RepConv(first, first, (3,), stride=2, groups=first),
            RepConv(first, first, (1,)),
        )
        self.network = nn.ModuleList()
        rate = iter(rates(drop_path, sum(depths)))
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            attends = stage >= stages - attention_stages
            if stage:
                self.network.append(Down(widths[stage - 1], width))
            if attends:
                self.network.append(RepPosition(width))
            block = AttentionBlock if attends else RepMixerBlock
            self.network.append(nn.ModuleList(block(width, mlp_ratio, layer_scale, next(rate)) for _ in range(depth)))
        last = widths[-1]
        self.conv_exp = RepConv(last, self.width, (3, 1), groups=last, skip=False, squeeze=True)
        self.clip_proj = nn.Parameter(torch.randn(self.width, clip_dim) * self.width**-0.5) if clip_dim else None
        self.head = nn.Linear(clip_dim or self.width, num_classes) if num_classes else nn.Identity()
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        if fused:
            self.fuse()

    @property
    def stride(self) -> int:
        return 2 ** (self.stages + 1)

    def check_size(self, height: int, width: int) -> None:
        """Any size will do: sides are divided by the stride and rounded up."""
        if min(height, width) < 1:
            raise InputError(f"{self.called} takes pictures of one pixel or more, not {height} x {width}")

    @property
    def is_fused(self) -> bool:
        """Whether the branches have become one convolution each."""
        stem = self.patch_embed[0]
        assert isinstance(stem, RepConv)
        return stem.fused is not None

    def fuse(self) -> Self:
        """Writes every sum of branches as one convolution; the output in eval mode stays the same.

        It cannot be undone, and what depends on the batch while training (the batch norms) is gone.
        """
        for part in list(self.modules()):
            if isinstance(part, RepConv | RepMixer | RepPosition):
                part.fuse()
        if hasattr(self, "settings"):
            self.settings = {**self.settings, "fused": True}
        return self

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        x = self.patch_embed(pixels)
        states, maps = [to_tokens(x)] if hidden_states else [], []
        for part in self.network:
            if isinstance(part, nn.ModuleList):
                for block in part:
                    x = block(x)
                    if hidden_states:
                        states.append(to_tokens(x))
                maps.append(x)
            else:
                x = part(x)
        maps[-1] = x = self.conv_exp(x)
        pooled = x.mean(dim=(2, 3))
        if self.clip_proj is not None:
            pooled = pooled @ self.clip_proj
        return Features(to_tokens(x), (x.shape[2], x.shape[3]), pooled, tuple(maps), tuple(states))

    def classify(self, features: Features) -> Tensor:
        return self.head(features.pooled)

    def adapt_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The vision tower of a whole model, without a CLIP head that is not wanted, in this encoder's form."""
        tower = r".*vision_tower\.(?:model\.)?(.*)"
        inside = {match[1]: value for key, value in state.items() if (match := re.fullmatch(tower, key))}
        state = inside or dict(state)
        is_fused = any(".reparam_conv." in key for key in state)
        if is_fused != self.is_fused and any(".token_mixer." in key for key in state):
            form, option = ("fused", "True") if is_fused else ("branch", "False")
            raise InputError(
                f"the checkpoint holds the {form} form of FastViTHD; create the encoder with fused={option}"
            )
        if self.clip_proj is None:
            state.pop("head.proj", None)
        if self.is_fused:
            for key in [key for key in state if key.endswith(".convffn.conv.conv.weight")]:
                _fuse_norm_of_state(state, key.removesuffix(".conv.weight"))
        return state


def _fuse_norm_of_state(state: dict[str, Tensor], at: str) -> None:
    """Replaces a convolution and its batch norm in an official state dict by the fused convolution."""
    names = ("weight", "bias", "running_mean", "running_var")
    if any(f"{at}.bn.{name}" not in state for name in names):
        return
    norm = nn.BatchNorm2d(len(state[f"{at}.bn.weight"]), dtype=state[f"{at}.bn.weight"].dtype)
    norm.load_state_dict({name: state.pop(f"{at}.bn.{name}") for name in names}, strict=False)
    state.pop(f"{at}.bn.num_batches_tracked", None)
    weight, bias = fused_norm(state.pop(f"{at}.conv.weight"), norm)
    state[f"{at}.reparam_conv.weight"], state[f"{at}.reparam_conv.bias"] = weight.detach(), bias.detach()
