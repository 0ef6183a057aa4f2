"""ViTamin: sizes, the whole network by the official names of its weights and against timm's, CLIP checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from sightline.encoders.encoder import count_macs, count_parameters, create_encoder
from sightline.encoders.layers import resized_positions
from sightline.encoders.vitamin import GeGLU, ViTamin
from sightline.errors import InputError

SIZES: list[tuple[str, int, int, float, float]] = [
    ("vitamin_small", 224, 384, 22.03, 5.5),
    ("vitamin_base", 224, 512, 87.53, 21.8),
    ("vitamin_large", 224, 768, 333.3, 72.6),
    ("vitamin_large", 384, 768, 333.7, 213.4),
    ("vitamin_large2", 224, 1024, 333.6, 72.6),
    ("vitamin_xlarge", 256, 1152, 436.1, 125.3),
    ("vitamin_xlarge", 384, 1152, 436.1, 281.9),
]


@pytest.mark.parametrize(("name", "image_size", "embed_dim", "millions", "giga"), SIZES)
def test_the_published_sizes(name: str, image_size: int, embed_dim: int, millions: float, giga: float) -> None:
    with torch.device("meta"):
        encoder = create_encoder(name, image_size=image_size, embed_dim=embed_dim)
    assert isinstance(encoder, ViTamin)
    assert count_parameters(encoder) == pytest.approx(millions * 1e6, rel=5e-4)
    assert encoder(torch.empty(1, 3, image_size, image_size, device="meta")).pooled.shape == (1, embed_dim)
    # The published counts leave the products of queries and keys, and of weights and values, out.
    tokens, blocks = (image_size // 16) ** 2, len(encoder.blocks)
    products = 2 * tokens**2 * encoder.width * blocks
    assert count_macs(name, image_size=image_size) - products == pytest.approx(giga * 1e9, rel=0.01)


SMALL: dict[str, Any] = dict(widths=(6, 8, 16), stem_width=6, depths=(1, 2, 2), num_heads=2, image_size=48)


def official_state(embed_dim: int | None = None, positions: bool = True) -> dict[str, Tensor]:
    """Random weights under the names and in the shapes of timm's network; with a projection those of a CLIP pair."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, *inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, *inputs), (outputs,)

    backbone = "patch_embed.backbone"
    linear(f"{backbone}.stem.conv1", 6, 3, 3, 3)
    linear(f"{backbone}.stem.norm1", 6)
    linear(f"{backbone}.stem.conv2", 6, 6, 3, 3)
    for stage, chans in enumerate(([6, 6], [6, 8, 8])):
        for index in range(len(chans) - 1):
            block, before, after = f"{backbone}.stages.{stage}.{index}", chans[index], chans[index + 1]
            if before != after:
                linear(f"{block}.shortcut.expand", after, before, 1, 1)
            linear(f"{block}.pre_norm", before)
            linear(f"{block}.conv1_1x1", 4 * after, before, 1, 1)
            linear(f"{block}.conv2_kxk", 4 * after, 1, 3, 3)
            linear(f"{block}.conv3_1x1", after, 4 * after, 1, 1)
    linear(f"{backbone}.pool.proj", 16, 8, 3, 3)
    linear(f"{backbone}.pool.norm", 8)
    if positions:
        shapes["pos_embed"] = (1, 9, 16)
    for index in range(2):
        block = f"blocks.{index}"
        linear(f"{block}.norm1", 16)
        linear(f"{block}.attn.qkv", 48, 16)
        linear(f"{block}.attn.proj", 16, 16)
        linear(f"{block}.norm2", 16)
        linear(f"{block}.mlp.norm", 16)
        linear(f"{block}.mlp.w0", 32, 16)
        linear(f"{block}.mlp.w1", 32, 16)
        linear(f"{block}.mlp.w2", 16, 32)
    linear("fc_norm", 16)
    generator = torch.Generator().manual_seed(0)
    if embed_dim is None:
        linear("head", 10, 16)
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if embed_dim is not None:
        state = {f"visual.trunk.{name}": value for name, value in state.items()}
        state["visual.head.proj.weight"] = torch.randn(embed_dim, 16, generator=generator)
        state["text.token_embedding.weight"] = torch.zeros(5, 4)
        state["logit_scale"] = torch.tensor(4.6)
    return state


def official_forward(state: dict[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and the pooled feature by the official names, all attention written out."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], stride, padding=weight.shape[-1] // 2, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def norm_of_map(x: Tensor, name: str) -> Tensor:
        return norm(x.permute(0, 2, 3, 1), name).permute(0, 3, 1, 2)

    backbone = "patch_embed.backbone"
    x = conv(pixels, f"{backbone}.stem.conv1", stride=2)
    x = conv(F.gelu(norm_of_map(x, f"{backbone}.stem.norm1")), f"{backbone}.stem.conv2")
    for stage, depth in enumerate((1, 2)):
        for index in range(depth):
            block, stride = f"{backbone}.stages.{stage}.{index}", 1 if index else 2
            y = F.gelu(conv(norm_of_map(x, f"{block}.pre_norm"), f"{block}.conv1_1x1"))
            y = F.gelu(conv(y, f"{block}.conv2_kxk", stride, groups=y.shape[1]))
            if stride == 2:  # the mean of what lies in the picture
                ones = F.avg_pool2d(torch.ones_like(x), 3, 2, 1)
                x = F.avg_pool2d(x, 3, 2, 1) / ones
            if f"{block}.shortcut.expand.weight" in state:
                x = conv(x, f"{block}.shortcut.expand")
            x = x + conv(y, f"{block}.conv3_1x1")
    x = conv(norm_of_map(x, f"{backbone}.pool.norm"), f"{backbone}.pool.proj", stride=2)
    grid, x = (x.shape[2], x.shape[3]), x.flatten(2).mT
    if "pos_embed" in state:
        x = x + resized_positions(state["pos_embed"], (3, 3), grid)
    for index in range(2):
        block = f"blocks.{index}"
        joined = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        query, key, value = joined.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / math.sqrt(8)).softmax(dim=-1)
        x = x + linear((weights @ value).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        y = norm(norm(x, f"{block}.norm2"), f"{block}.mlp.norm")
        gated = F.gelu(linear(y, f"{block}.mlp.w0")) * linear(y, f"{block}.mlp.w1")
        x = x + linear(gated, f"{block}.mlp.w2")
    return x, norm(x.mean(dim=1), "fc_norm")


@pytest.mark.parametrize("positions", [True, False])
@torch.no_grad()
def test_an_official_checkpoint_gives_what_the_official_network_gives(positions: bool, tmp_path: Path) -> None:
    encoder = ViTamin(num_classes=10, positions=positions, **SMALL).eval()
    state = official_state(positions=positions)
    path = tmp_path / "vitamin.safetensors"
    save_file(state, path)
    encoder.load_official(path)
    pixels = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    double = {name: value.double() for name, value in state.items()}
    tokens, pooled = official_forward(double, pixels)
    features = encoder.double()(pixels)
    # The resizing of the table is done in single precision.
    atol = 1e-6 if positions else 1e-10
    torch.testing.assert_close(features.tokens, tokens, rtol=0, atol=atol)
    torch.testing.assert_close(features.pooled, pooled, rtol=0, atol=atol)
    expected = F.linear(pooled, double["head.weight"], double["head.bias"])
    torch.testing.assert_close(encoder.logits(pixels), expected, rtol=0, atol=10 * atol)

    state["blocks.0.mlp.w3.weight"] = state.pop("blocks.1.mlp.w1.weight")
    save_file(state, path)
    with pytest.raises(InputError, match=r"missing: blocks\.1\.mlp\.value\.weight; not expected: blocks\.0\.mlp\.w3"):
        encoder.load_official(path)


@torch.no_grad()
def test_the_tower_of_a_clip_pair_at_another_size(tmp_path: Path) -> None:
    state = official_state(embed_dim=5)
    path = tmp_path / "clip.safetensors"
    save_file(state, path)
    encoder = ViTamin(embed_dim=5, **SMALL | dict(image_size=(64, 32))).eval()
    encoder.load_official(path)
    trunk = {name.removeprefix("visual.trunk."): value for name, value in state.items()}
    pixels = torch.randn(1, 3, 64, 32, generator=torch.Generator().manual_seed(3))
    tokens, pooled = official_forward(trunk, pixels)
    features = encoder(pixels)
    torch.testing.assert_close(features.tokens, tokens, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.pooled, pooled @ state["visual.head.proj.weight"].T, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_it_is_the_network_of_timm() -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vitamin_small_224", num_classes=10, depth=2).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    ours = create_encoder("vitamin_small", num_classes=10, depths=(2, 4, 2)).eval()
    ours.load_state_dict({ours.our_key(name): value for name, value in theirs.state_dict().items()})
    pixels = torch.randn(1, 3, 224, 224, generator=generator)
    torch.testing.assert_close(ours(pixels).tokens, theirs.forward_features(pixels), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.logits(pixels), theirs(pixels), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_gated_block_with_an_open_gate_is_two_linear_maps() -> None:
    block, x = GeGLU(6, 10), torch.randn(2, 3, 6)
    block.gate.weight.zero_()
    block.gate.bias.fill_(100.0)  # GELU(100) = 100
    expected = block.out(100 * block.value(F.layer_norm(x, (6,))))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_pyramid_and_other_sizes() -> None:
    encoder = create_encoder("vitamin_nano", embed_dim=7).eval()
    features = encoder(torch.randn(2, 3, 48, 80), hidden_states=True)
    assert features.grid == (3, 5)
    assert [list(level.shape) for level in features.maps] == [[2, 16, 12, 20], [2, 24, 6, 10], [2, 48, 3, 5]]
    assert [state.shape for state in features.hidden_states] == [(2, 15, 48)] * 4
    assert features.pooled is not None
    assert features.pooled.shape == (2, 7)
    assert 50_000 <= count_parameters(encoder) <= 300_000
    assert create_encoder("vitamin_nano", embed_dim=7, num_classes=3).logits(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="widths and depths must have three entries, not 2 and 3"):
        create_encoder("vitamin_nano", widths=(8, 16))
    with pytest.raises(InputError, match="16"):
        create_encoder("vitamin_nano")(torch.zeros(1, 3, 40, 32))
