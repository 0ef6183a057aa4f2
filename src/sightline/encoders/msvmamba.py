"""MSVMamba: Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model (Shi et al., NeurIPS 2024,
arXiv:2405.14174), and VMamba (Liu et al., NeurIPS 2024, arXiv:2401.10166), which it is built on.

In: pictures [B, C, H, W], sides multiples of 4. Out: tokens [B, N, D] on a grid of ceil(H / 32) x ceil(W / 32), one map
a stage at 1/4, 1/8, 1/16 and 1/32 of the sides.

    stem -> stage 1 -> halve -> stage 2 -> halve -> stage 3 -> halve -> stage 4 -> LN -> mean -> linear
    x := x + scan(LN(x));  x := x + feed(LN(x))           for each block

`scan` is SS2D or MS2D (`sightline.mixers.cross_scan`). `feed` is an MLP (VMamba), nothing (the first VMamba), or
MSVMamba's ConvFFN, out(GELU(t + conv3x3(t))) with t = in(x). The models of MSVMamba's NeurIPS branch normalise what
the ConvFFN gives, x := x + LN(feed(x)), as its official code does and its paper does not say.

The official repositories are YuHengsss/MSVMamba (branch master for the arXiv models, v2 for those of NeurIPS) and
MzeroMiko/VMamba. Their checkpoints of the same names fit; master keeps the parameters of the low-resolution routes
first, v2 those of the full one, which loading puts right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.encoder import Encoder, Features, as_pair, check_multiple, register_encoder
from sightline.encoders.layers import DropPath, Mlp, init_weights, rates, to_map, to_tokens
from sightline.errors import InputError, unknown
from sightline.mixers.cross_scan import MS2D, SS2D
from sightline.mixers.mixer import Mixer
from sightline.mixers.scan_orders import CROSS_ROUTES

SCANS, STEMS, FEEDS, HALVINGS = ("cross", "multi_scale"), ("patch", "conv"), ("conv", "mlp", "none"), ("merge", "conv")


class PatchStem(nn.Module):
    """One convolution of patches, and a norm: [B, C, H, W] -> tokens and their grid."""

    def __init__(self, in_chans: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, patch_size, stride=patch_size)
        self.norm1 = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        values = self.conv1(pixels)
        return self.norm1(to_tokens(values)), (values.shape[2], values.shape[3])


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions of stride 2, each with a norm: [B, C, H, W] -> tokens and their grid at a quarter."""

    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width // 2, 3, stride=2, padding=1)
        self.norm1 = nn.LayerNorm(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width, 3, stride=2, padding=1)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        values = self.conv1(pixels)
        values = F.gelu(self.norm1(values.movedim(1, -1))).movedim(-1, 1)
        values = self.conv2(values)
        return self.norm2(to_tokens(values)), (values.shape[2], values.shape[3])


class PatchMerge(nn.Module):
    """Four neighbours become one token: concatenated, normed, mapped to twice the width; odd sides padded with 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        high, wide = grid
        values = F.pad(x.unflatten(1, grid), (0, 0, 0, wide % 2, 0, high % 2))
        pairs = values.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        # The upper left of the four first, then the one below it, then the right ones.
        merged = pairs.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(merged.flatten(1, 2))), (merged.shape[1], merged.shape[2])


class ConvHalving(nn.Module):
    """A 3 x 3 convolution of stride 2 to twice the width, and a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        values = self.conv(to_map(x, grid))
        return self.norm(to_tokens(values)), (values.shape[2], values.shape[3])


class ConvFeed(nn.Module):
    """MSVMamba's ConvFFN: a feed-forward whose hidden layer adds its depthwise 3 x 3 convolution to itself."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.linear1(x)
        return self.linear2(F.gelu(x + to_tokens(self.conv(to_map(x, grid)))))


class ScanBlock(nn.Module):
    """A scan and a feed-forward, each a residual branch."""

    def __init__(self, width: int, mixer: Mixer, feed: nn.Module | None, *, drop_path: float, post_norm: bool) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(width), mixer
        self.feed, self.norm2 = feed, None if feed is None else nn.LayerNorm(width)
        self.drop_path, self.post_norm = DropPath(drop_path), post_norm

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x), grid))
        if self.norm2 is None or self.feed is None:
            return x
        fed = x if self.post_norm else self.norm2(x)
        fed = self.feed(fed, grid) if isinstance(self.feed, ConvFeed) else self.feed(fed)
        return x + self.drop_path(self.norm2(fed) if self.post_norm else fed)


class Stage(nn.Module):
    """Blocks at one resolution, and what halves it afterwards."""

    def __init__(self, blocks: Sequence[ScanBlock], downsample: PatchMerge | ConvHalving | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(
        self, x: Tensor, grid: tuple[int, int], states: list[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, tuple[int, int]] | None]:
        """Tokens after the blocks, and those of the next stage with their grid; block outputs go to `states`."""
        for block in self.blocks:
            x = block(x, grid)
            states.append(x)
        return x, None if self.downsample is None else self.downsample(x, grid)


# Inside a block. VMamba's first checkpoints say ln_1 and self_attention where later ones say norm and op.
_BLOCK_KEYS = tuple(
    (r"layers\.(\d+)\.blocks\.(\d+)\." + official, r"stages.\1.blocks.\2." + ours)
    for official, ours in (
        (r"(?:norm|ln_1)\.(.*)", r"norm1.\3"),
        (r"norm2\.(.*)", r"norm2.\3"),
        (r"(?:op|self_attention)\.conv2d\.(.*)", r"mixer.conv.\3"),
        (r"op\.conv2d_b1\.(.*)", r"mixer.conv_low.\3"),
        (r"op\.se\.fc\.0\.(.*)", r"mixer.se.fc1.\3"),
        (r"op\.se\.fc\.2\.(.*)", r"mixer.se.fc2.\3"),
        (r"(?:op|self_attention)\.x_proj_weight", "mixer.ssm.x_proj"),
        (r"(?:op|self_attention)\.dt_projs_weight", "mixer.ssm.dt_proj"),
        (r"(?:op|self_attention)\.dt_projs_bias", "mixer.ssm.dt_bias"),
        (r"(?:op|self_attention)\.A_logs", "mixer.ssm.A_log"),
        (r"(?:op|self_attention)\.Ds", "mixer.ssm.D"),
        (r"(?:op|self_attention)\.(.*)", r"mixer.\3"),
        (r"convFFN\.dwc\.(.*)", r"feed.conv.\3"),
        (r"(?:convFFN|mlp)\.(.*)", r"feed.\3"),
    )
)
_SCAN_KEYS = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")

_ARXIV: Mapping[str, Any] = dict(image_size=224)
_NEURIPS: Mapping[str, Any] = dict(
    image_size=224, stem="conv", halving="conv", feed_ratio=4.0, post_norm=True, gated=False, ssm_ratio=1.0,
    norm_routes=False, upsample="nearest",
)  # fmt: skip
_VMAMBA: Mapping[str, Any] = dict(
    image_size=224, scan="cross", stem="conv", halving="conv", feed="mlp", feed_ratio=4.0, gated=False, conv_bias=False
)


@register_encoder
class VisualStateSpaceModel(Encoder):
    """MSVMamba, and VMamba with `scan="cross"`. The defaults are those of MSVMamba's arXiv models.

    Args:
        width: channels of the first stage; each further one has twice as many.
        depths: blocks of each stage.
        patch_size: pixels a side of a token of the first stage; 4 with `stem="conv"`.
        scan: `multi_scale` (MS2D) or `cross` (SS2D).
        stem: `patch`, or `conv` for two convolutions.
        halving: `merge` four tokens, or `conv`, between stages.
        feed: `conv` (ConvFFN), `mlp` or `none`.
        feed_ratio: its hidden width over that of the stage.
        post_norm: normalise what the feed-forward gives instead of what it takes.
        ssm_ratio: inner width E of the scan over that of the stage.
        d_state: states a channel.
        gated: whether the scan's output is gated by a second half of its input projection.
        conv_bias: whether its convolutions have biases.
        routes: routes of the cross scan; one may come several times.
        full_route, norm_routes, upsample, squeeze_excite, reset_between_routes: of the multi-scale scan, see `MS2D`.
        drop_path: rate of the last block; those before rise to it linearly.
    """

    paper: ClassVar[str] = "msvmamba"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "msvmamba_pico": dict(image_size=32, width=32, depths=(2, 2)),
        "msvmamba_nano": dict(_ARXIV, width=48, depths=(1, 2, 5, 2)),
        "msvmamba_micro": dict(_ARXIV, width=64, depths=(1, 2, 5, 2)),
        "msvmamba_tiny": dict(_ARXIV, width=96, depths=(1, 2, 9, 2)),
        "msvmamba_v2_tiny": dict(_NEURIPS, width=96, depths=(2, 2, 9, 2)),
        "msvmamba_v2_small": dict(_NEURIPS, width=96, depths=(2, 3, 20, 2)),
        "msvmamba_v2_base": dict(_NEURIPS, width=128, depths=(2, 4, 18, 2), gated=True),
        "vmamba_nano": dict(_VMAMBA, image_size=32, width=32, depths=(2, 2), ssm_ratio=1.0),
        "vmamba_tiny_s1l8": dict(_VMAMBA, width=96, depths=(2, 2, 8, 2), ssm_ratio=1.0),
        "vmamba_small_s2l15": dict(_VMAMBA, width=96, depths=(2, 2, 15, 2)),
        "vmamba_base_s2l15": dict(_VMAMBA, width=128, depths=(2, 2, 15, 2)),
        "vmamba_vanilla_tiny": dict(
            image_size=224, width=96, depths=(2, 2, 9, 2), scan="cross", feed="none", d_state=16
        ),
    }
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        (r"patch_embed\.(?:0|proj)\.(.*)", r"stem.conv1.\1"),
        (r"patch_embed\.(?:2|norm)\.(.*)", r"stem.norm1.\1"),
        (r"patch_embed\.5\.(.*)", r"stem.conv2.\1"),
        (r"patch_embed\.7\.(.*)", r"stem.norm2.\1"),
        *_BLOCK_KEYS,
        (r"layers\.(\d+)\.downsample\.1\.(.*)", r"stages.\1.downsample.conv.\2"),
        (r"layers\.(\d+)\.downsample\.3\.(.*)", r"stages.\1.downsample.norm.\2"),
        (r"layers\.(\d+)\.downsample\.(.*)", r"stages.\1.downsample.\2"),
        (r"(?:classifier\.)?(norm|head)\.(.*)", r"\1.\2"),
    )

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        width: int = 96,
        depths: Sequence[int] = (1, 2, 9, 2),
        patch_size: int = 4,
        scan: str = "multi_scale",
        stem: str = "patch",
        halving: str = "merge",
        feed: str = "conv",
        feed_ratio: float = 2.0,
        post_norm: bool = False,
        ssm_ratio: float = 2.0,
        d_state: int = 1,
        gated: bool = True,
        conv_bias: bool = True,
        routes: Sequence[str] = CROSS_ROUTES,
        full_route: str = "raster",
        norm_routes: bool = True,
        upsample: str = "bilinear",
        squeeze_excite: bool = True,
        reset_between_routes: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        for what, value, allowed in (
            ("scan", scan, SCANS),
            ("stem", stem, STEMS),
            ("halving", halving, HALVINGS),
            ("feed", feed, FEEDS),
        ):
            if value not in allowed:
                raise unknown(f"{what} of a visual state space model", value, allowed)
        if not depths or min(depths) < 1:
            raise InputError(f"depths must give one or more blocks for each stage, not {tuple(depths)}")
        if stem == "conv" and (patch_size != 4 or width % 2):
            raise InputError(f'stem="conv" needs patch_size 4 and an even width, not {patch_size} and {width}')
        last = width * 2 ** (len(depths) - 1)
        super().__init__(image_size=image_size, in_chans=in_chans, num_classes=num_classes, width=last)
        self.patch_size, self.depths = patch_size, tuple(depths)
        check_multiple("a visual state space model of this patch_size", as_pair(image_size), patch_size)
        self.scan_sets = 2 if scan == "multi_scale" else len(routes)
        self.low_routes_first = scan == "multi_scale" and norm_routes
        self.stem = ConvStem(in_chans, width) if stem == "conv" else PatchStem(in_chans, width, patch_size)

        def mixer(channels: int) -> Mixer:
            shared = dict(ssm_ratio=ssm_ratio, d_state=d_state, gated=gated, conv_bias=conv_bias)
            if scan == "cross":
                return SS2D(channels, routes=routes, **shared)  # type: ignore[arg-type]
            return MS2D(
                channels,
                full_route=full_route,
                norm_routes=norm_routes,
                upsample=upsample,
                squeeze_excite=squeeze_excite,
                reset_between_routes=reset_between_routes,
                **shared,  # type: ignore[arg-type]
            )

        def feed_forward(channels: int) -> nn.Module | None:
            if feed == "none":
                return None
            kind = ConvFeed if feed == "conv" else Mlp
            return kind(channels, int(channels * feed_ratio))

        drop = iter(rates(drop_path, sum(depths)))
        self.stages = nn.ModuleList()
        for index, depth in enumerate(depths):
            channels = width * 2**index
            blocks = [
                ScanBlock(channels, mixer(channels), feed_forward(channels), drop_path=next(drop), post_norm=post_norm)
                for _ in range(depth)
            ]
            halve = None if index == len(depths) - 1 else (PatchMerge if halving == "merge" else ConvHalving)(channels)
            self.stages.append(Stage(blocks, halve))
        self.norm = nn.LayerNorm(last)
        self.head = nn.Linear(last, num_classes) if num_classes else nn.Identity()
        init_weights(self)

    @property
    def stride(self) -> int:
        return self.patch_size * 2 ** (len(self.depths) - 1)

    def check_size(self, height: int, width: int) -> None:
        # Odd maps are rounded up where they are halved, so that only the stem has to come out even.
        check_multiple(self.called, (height, width), self.patch_size)

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        x, grid = self.stem(pixels)
        states, maps = [x], []
        for stage in self.stages:
            x, halved = stage(x, grid, states if hidden_states else [])
            if halved is not None:
                maps.append(to_map(x, grid))
                x, grid = halved
        x = self.norm(x)
        maps.append(to_map(x, grid))
        return Features(x, grid, x.mean(dim=1), tuple(maps), tuple(states) if hidden_states else ())

    def classify(self, features: Features) -> Tensor:
        return self.head(features.pooled)

    def adapt_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scan parameters get an axis for their sets, full resolution first; 1 x 1 convolutions become linear maps."""
        adapted = {}
        for key, value in state.items():
            name = key.rsplit(".", 1)[-1]
            if name in ("A_logs", "Ds") and value.shape[0] % self.scan_sets == 0:
                value = value.unflatten(0, (self.scan_sets, -1))
            if self.low_routes_first and name in _SCAN_KEYS:
                value = value.flip(0)
            if ".linear" in key and value.shape[2:] == (1, 1):
                value = value.flatten(1)
            adapted[key] = value
        return adapted
