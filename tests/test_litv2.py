"""LITv2: sizes, the deformable merging point by point, the whole network by the official names of its weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.encoder import count_macs, count_parameters, create_encoder
from sightline.encoders.litv2 import DeformableConv, LITv2
from sightline.errors import InputError

SMALL: dict[str, Any] = dict(width=12, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 4), alpha=0.6)
WINDOWS = (0, 0, 2, 1)


@pytest.mark.parametrize(
    ("name", "millions", "macs"),
    [("litv2_small", 28, 3.7e9), ("litv2_medium", 49, 7.5e9), ("litv2_base", 87, 13.2e9)],
)
def test_the_published_sizes(name: str, millions: int, macs: float) -> None:
    with torch.device("meta"):
        encoder = create_encoder(name, num_classes=1000)
    assert round(count_parameters(encoder) / 1e6) == millions
    assert count_macs(name) == pytest.approx(macs, rel=0.01)


def test_the_heads_of_the_published_sizes() -> None:
    with torch.device("meta"):
        small, base = create_encoder("litv2_small"), create_encoder("litv2_base")
    split = [(block.attn.low_heads, block.attn.high_heads) for block in small.stages[2]]
    assert split == [(10, 2)] * 6
    assert [(block.attn.low_heads, block.attn.high_heads) for block in base.stages[2]] == [(14, 2)] * 18
    assert all(block.attn is None for stage in small.stages[:2] for block in stage)
    assert all(block.attn.high_heads == 0 and block.attn.window_size == 1 for block in small.stages[3])
    assert 50_000 <= count_parameters(create_encoder("litv2_nano")) <= 300_000


def official_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names and in the shapes of the official code."""
    generator = torch.Generator().manual_seed(seed)
    widths = [12, 24, 48, 96]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, *inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, *inputs), (outputs,)

    linear("patch_embed.proj", 12, 3, 4, 4)
    linear("patch_embed.norm", 12)
    for stage, depth in enumerate(SMALL["depths"]):
        width, heads = widths[stage], SMALL["num_heads"][stage]
        for index in range(depth):
            block = f"layers.{stage}.blocks.{index}"
            linear(f"{block}.norm2", width)
            linear(f"{block}.mlp.fc1", 4 * width, width)
            linear(f"{block}.mlp.dwconv.dwconv", 4 * width, 1, 3, 3)
            linear(f"{block}.mlp.fc2", width, 4 * width)
            if WINDOWS[stage]:
                low = width if WINDOWS[stage] == 1 else int(heads * SMALL["alpha"]) * width // heads
                linear(f"{block}.norm1", width)
                linear(f"{block}.attn.l_q", low, width)
                linear(f"{block}.attn.l_kv", 2 * low, width)
                linear(f"{block}.attn.l_proj", low, low)
                if low < width:
                    linear(f"{block}.attn.h_qkv", 3 * (width - low), width)
                    linear(f"{block}.attn.h_proj", width - low, width - low)
        if stage < 3:
            merge = f"layers.{stage}.downsample"
            linear(f"{merge}.dconv", 2 * width, width, 2, 2)
            linear(f"{merge}.dconv.conv_offset", 8, width, 2, 2)
            linear(f"{merge}.norm_layer", 2 * width)
            shapes[f"{merge}.norm_layer.running_mean"] = shapes[f"{merge}.norm_layer.running_var"] = (2 * width,)
    linear("norm", 96)
    linear("head", 10, 96)
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in state:
        if name.endswith("running_var") or ("norm" in name and name.endswith("weight")):
            state[name] = state[name].abs() + 0.7
    return state


def deformed(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A deformable 2x2 convolution of stride 2, point by point: what is read outside of the map is 0."""
    batch, chans, height, width = x.shape
    out = bias.view(1, -1, 1, 1).repeat(batch, 1, height // 2, width // 2)
    for image in range(batch):
        for row in range(height // 2):
            for column in range(width // 2):
                for point in range(4):
                    down = 2 * row + point // 2 + float(offset[image, 2 * point, row, column])
                    right = 2 * column + point % 2 + float(offset[image, 2 * point + 1, row, column])
                    value = x.new_zeros(chans)
                    for r in (math.floor(down), math.floor(down) + 1):
                        for c in (math.floor(right), math.floor(right) + 1):
                            if 0 <= r < height and 0 <= c < width:
                                value = value + x[image, :, r, c] * (1 - abs(down - r)) * (1 - abs(right - c))
                    out[image, :, row, column] += weight[:, :, point // 2, point % 2] @ value
    return out


def official_forward(state: dict[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and logits by the official names; square pictures, all attention written out."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def split(x: Tensor, width: int) -> Tensor:
        return x.unflatten(-1, (-1, width)).transpose(-3, -2)

    def attend(query: Tensor, key: Tensor, value: Tensor, width: int) -> Tensor:
        scores = split(query, width) @ split(key, width).mT / math.sqrt(width)
        return (scores.softmax(dim=-1) @ split(value, width)).transpose(-3, -2).flatten(-2)

    def hilo(x: Tensor, name: str, window: int, width: int) -> Tensor:
        batch, side = len(x), math.isqrt(x.shape[1])
        cells = x.view(batch, side // window, window, side // window, window, -1).transpose(2, 3)
        query = linear(x, f"{name}.l_q")
        key, value = linear(cells.mean(dim=(3, 4)).flatten(1, 2), f"{name}.l_kv").chunk(2, dim=-1)
        low = linear(attend(query, key, value, width), f"{name}.l_proj")
        if f"{name}.h_qkv.weight" not in state:
            return low
        inside = attend(*linear(cells.flatten(3, 4), f"{name}.h_qkv").chunk(3, dim=-1), width)
        high = inside.unflatten(3, (window, window)).transpose(2, 3).reshape(batch, side * side, -1)
        return torch.cat([linear(high, f"{name}.h_proj"), low], dim=-1)

    x = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    side, x = x.shape[-1], norm(x.flatten(2).mT, "patch_embed.norm")
    for stage, depth in enumerate(SMALL["depths"]):
        for index in range(depth):
            block = f"layers.{stage}.blocks.{index}"
            if WINDOWS[stage]:
                width = x.shape[-1] // SMALL["num_heads"][stage]
                x = x + hilo(norm(x, f"{block}.norm1"), f"{block}.attn", WINDOWS[stage], width)
            inner = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
            name = f"{block}.mlp.dwconv.dwconv"
            inner = inner.mT.unflatten(2, (side, side))
            inner = F.conv2d(inner, state[f"{name}.weight"], state[f"{name}.bias"], padding=1, groups=inner.shape[1])
            x = x + linear(F.gelu(inner).flatten(2).mT, f"{block}.mlp.fc2")
        if stage < 3:
            name = f"layers.{stage}.downsample"
            before = x.mT.unflatten(2, (side, side))
            offset = F.conv2d(
                before, state[f"{name}.dconv.conv_offset.weight"], state[f"{name}.dconv.conv_offset.bias"], stride=2
            )
            merged = deformed(before, offset, state[f"{name}.dconv.weight"], state[f"{name}.dconv.bias"])
            moments = state[f"{name}.norm_layer.running_mean"], state[f"{name}.norm_layer.running_var"]
            merged = F.batch_norm(
                merged, *moments, state[f"{name}.norm_layer.weight"], state[f"{name}.norm_layer.bias"]
            )
            side, x = side // 2, F.gelu(merged).flatten(2).mT
    tokens = norm(x, "norm")
    return tokens, linear(tokens.mean(dim=1), "head")


@torch.no_grad()
def test_an_official_checkpoint_gives_what_the_official_network_gives(tmp_path: Path) -> None:
    encoder = LITv2(image_size=64, num_classes=10, **SMALL).eval()
    state = official_state()
    path = tmp_path / "litv2.safetensors"
    save_file(state, path)
    encoder.load_official(path)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens, logits = official_forward({name: value.double() for name, value in state.items()}, pixels)
    encoder.double()
    features = encoder(pixels)
    assert (features.grid, features.tokens.shape) == ((2, 2), (1, 4, 96))
    torch.testing.assert_close(features.tokens, tokens, rtol=0, atol=1e-10)
    torch.testing.assert_close(encoder.logits(pixels), logits, rtol=0, atol=1e-10)
    single = encoder.float()(pixels.float()).tokens
    torch.testing.assert_close(single, tokens.float(), rtol=1e-3, atol=1e-3)


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    encoder = LITv2(image_size=64, num_classes=10, **SMALL)
    state = official_state()
    state["layers.2.blocks.0.attn.odd"] = state.pop("layers.2.blocks.1.attn.l_q.weight")
    state["head.bias"] = torch.zeros(11)
    path = tmp_path / "other.safetensors"
    save_file(state, path)
    with pytest.raises(InputError) as refused:
        encoder.load_official(path)
    for part in ("missing: stages.2.1.attn.low_query.weight", "stages.2.0.attn.odd", "head.bias is [11]"):
        assert part in str(refused.value)


@torch.no_grad()
def test_the_deformable_convolution_point_by_point() -> None:
    torch.manual_seed(0)
    conv, x = DeformableConv(3, 5).double(), torch.randn(2, 3, 6, 4, dtype=torch.float64)
    plain = F.conv2d(x, conv.weight, conv.bias, stride=2)
    torch.testing.assert_close(conv(x), plain, rtol=0, atol=1e-12)  # as it starts
    conv.offset.bias[1] = 1.0  # the first point of the four reads one column further on the right
    point = conv.weight[:, :, 0, 0]
    moved = torch.einsum("oc,bchw->bohw", point, F.pad(x, (0, 1))[:, :, ::2, 1::2][..., :2] - x[:, :, ::2, ::2])
    torch.testing.assert_close(conv(x), plain + moved, rtol=0, atol=1e-12)
    nn.init.normal_(conv.offset.weight)  # far outside, too
    offset = conv.offset(x)
    assert offset.abs().max() > 4
    torch.testing.assert_close(conv(x), deformed(x, offset, conv.weight, conv.bias), rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_deformable_convolution_is_that_of_torchvision() -> None:
    ops = pytest.importorskip("torchvision.ops")
    torch.manual_seed(0)
    conv, x = DeformableConv(8, 6), torch.randn(2, 8, 14, 10)
    nn.init.normal_(conv.offset.weight)
    expected = ops.deform_conv2d(x, conv.offset(x), conv.weight, conv.bias, stride=2)
    torch.testing.assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_deformable_convolution() -> None:
    torch.manual_seed(0)
    conv = DeformableConv(2, 3).double()
    nn.init.normal_(conv.offset.weight, std=0.1)
    nn.init.normal_(conv.offset.bias, std=0.3)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(conv, (x,))
    conv(x).square().sum().backward()
    assert conv.offset.weight.grad is not None
    assert conv.offset.weight.grad.abs().min() > 0


@torch.no_grad()
def test_it_starts_as_with_ordinary_merging() -> None:
    torch.manual_seed(0)
    plain = create_encoder("litv2_nano").eval()
    moving = create_encoder("litv2_nano", deformable=True).eval()
    state = plain.state_dict()
    offsets = {name: torch.zeros_like(value) for name, value in moving.state_dict().items() if "offset" in name}
    moving.load_state_dict(state | offsets)
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(moving(pixels).tokens, plain(pixels).tokens, rtol=0, atol=1e-4)
    assert count_macs("litv2_nano", deformable=True) - count_macs("litv2_nano") == sum(
        8 * 4 * width * (side // 2) ** 2 for width, side in ((12, 16), (24, 8), (48, 4))
    )


@torch.no_grad()
def test_other_sizes_and_the_pyramid() -> None:
    encoder = create_encoder("litv2_nano").eval()
    features = encoder(torch.randn(2, 3, 48, 80), hidden_states=True)
    # The third stage's grid of 6 x 10 is no multiple of a window of 4, and is filled up.
    assert features.grid == (3, 5)
    assert [list(level.shape) for level in features.maps] == [
        [2, 12, 24, 40],
        [2, 24, 12, 20],
        [2, 48, 6, 10],
        [2, 96, 3, 5],
    ]
    assert [state.shape[1] for state in features.hidden_states] == [960, 960, 240, 60, 60, 15]
    assert features.pooled is not None
    torch.testing.assert_close(features.pooled, features.tokens.mean(dim=1))
    wide = create_encoder("litv2_nano", window_sizes=(1, 1, 4, 1))
    assert wide.eval()(torch.randn(1, 3, 48, 80)).grid == (3, 5)
    with torch.device("meta"):
        published = create_encoder("litv2_small").eval()
        assert published(torch.empty(1, 3, 384, 224)).grid == (12, 7)


def test_what_is_refused() -> None:
    encoder = create_encoder("litv2_nano")
    with pytest.raises(InputError, match="16"):
        encoder(torch.zeros(1, 3, 40, 32))
    with pytest.raises(InputError, match="an entry for each stage, not 3, 4, 4 and 4 entries"):
        create_encoder("litv2_nano", depths=(1, 1, 1))
    with pytest.raises(InputError, match="alpha must be from 0 to 1"):
        create_encoder("litv2_nano", alpha=2.0)
