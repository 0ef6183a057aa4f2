"""ViG and ViG-H: sizes, the mixer and the blocks against slow ones, directions, and the official key names."""

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
from sightline.encoders.vig import LocalGatedLinearAttention, ViG, ViGH, feed_forward
from sightline.errors import InputError

WIDTH, HEADS, GRID = 16, 2, (3, 5)
KEYS, VALUES = 4, 8


def stirred(module: Any, seed: int = 0) -> Any:
    """With weights large enough for every part to matter, in float64."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
    return module


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- Sizes ---


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vig_tiny", 5.83),
        ("vig_small", 22.6),
        ("vig_base", 89.0),
        ("vig_h_tiny", 28.6),
        ("vig_h_small", 50.1),
        ("vig_h_base", 88.9),
    ],
)
def test_parameters_are_as_published(name: str, millions: float) -> None:
    with torch.device("meta"):
        assert count_parameters(create_encoder(name, num_classes=1000)) == pytest.approx(millions * 1e6, rel=0.002)


def test_multiply_adds_are_those_of_the_layers_and_two_scans() -> None:
    c, m, n, heads = 192, 512, 196, 3
    linear = c * 2 * c + c * 16 + 16 * c + c * c + c * c + 3 * c * m
    scans = 2 * 3 * heads * 32 * 64
    stem = 28**2 * 81 * 3 * 96 + n * 9 * 96 * 192
    assert count_macs("vig_tiny") == 12 * n * (linear + scans + 9 * c) + stem + c * 1000


def test_multiply_adds_grow_with_the_pixels_and_not_with_their_square() -> None:
    small, large = (count_macs("vig_tiny", image_size=size) for size in (224, 1024))
    assert large / small == pytest.approx((1024 / 224) ** 2, rel=0.01)
    assert count_macs("vit_tiny", image_size=1024) / large > 3.9


@pytest.mark.parametrize(("width", "hidden"), [(192, 512), (384, 1024), (768, 2048)])
def test_feed_forward_widths(width: int, hidden: int) -> None:
    with torch.device("meta"):
        assert feed_forward(width, 256).out.in_features == hidden
        assert feed_forward(96, 32).out.in_features == 256


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (384, 384), (224, 160)])
def test_other_sizes(size: tuple[int, int]) -> None:
    with torch.device("meta"):
        plain = create_encoder("vig_tiny", depth=1)(torch.empty(1, 3, *size))
        staged = create_encoder("vig_h_tiny", depths=(1, 1, 1, 1))(torch.empty(1, 3, *size))
    rows, columns = size[0] // 16, size[1] // 16
    assert (plain.grid, plain.tokens.shape) == ((rows, columns), (1, rows * columns, 192))
    assert staged.grid == (size[0] // 32, size[1] // 32)
    assert [tuple(one.shape[1:]) for one in staged.maps] == [
        (96 * 2**stage, size[0] // 4 // 2**stage, size[1] // 4 // 2**stage) for stage in range(4)
    ]


# --- The mixer ---


def slow_mixer(ours: LocalGatedLinearAttention, x: Tensor, conv_act: bool, out_act: bool) -> Tensor:
    """The equations of the module: pixel by pixel, head by head, token by token."""
    rows, columns = GRID
    batch, count = len(x), rows * columns
    local = torch.zeros_like(x)
    for row in range(rows):
        for column in range(columns):
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    if 0 <= row + down < rows and 0 <= column + right < columns:
                        neighbour = (row + down) * columns + column + right
                        weight = ours.in_proj.weight[:, 0, down + 1, right + 1]
                        local[:, row * columns + column] += weight * x[:, neighbour]
    if conv_act:
        local = local * torch.sigmoid(local)
    key_width = HEADS * KEYS
    query, key, value = (local @ ours.qkv_proj.weight.T).split([key_width, key_width, WIDTH], dim=-1)
    low, high = ours.gk_proj
    gates = torch.sigmoid(local @ low.weight.T @ high.weight.T + high.bias) ** (1 / 16)
    chosen = torch.sigmoid(local @ ours.g_proj.weight.T + ours.g_proj.bias)
    mixed = torch.zeros_like(x)
    for b in range(batch):
        for h in range(HEADS):
            keys, values = slice(h * KEYS, (h + 1) * KEYS), slice(h * VALUES, (h + 1) * VALUES)
            read = torch.zeros(count, VALUES, dtype=torch.float64)
            for direction, order in enumerate((range(count), reversed(range(count)))):
                state = torch.zeros(KEYS, VALUES, dtype=torch.float64)
                for t in order:
                    state = gates[b, t, direction * key_width :][keys, None] * state
                    state = state + torch.outer(key[b, t, keys], value[b, t, values])
                    read[t] += query[b, t, keys] @ state / math.sqrt(KEYS) / 2
            far = read / (read.square().mean(-1, keepdim=True) + 1e-6).sqrt() * ours.g_norm.weight
            near = local[b, :, values]
            near = near / (near.square().mean(-1, keepdim=True) + 1e-6).sqrt() * ours.l_norm.weight
            mixed[b, :, values] = chosen[b, :, values] * far + (1 - chosen[b, :, values]) * near
    if out_act:
        mixed = mixed * torch.sigmoid(mixed)
    return mixed @ ours.o_proj.weight.T


@torch.no_grad()
@pytest.mark.parametrize(("conv_act", "out_act"), [(False, False), (True, True), (True, False)])
def test_the_mixer_is_its_equations(conv_act: bool, out_act: bool) -> None:
    ours = stirred(LocalGatedLinearAttention(WIDTH, HEADS, conv_act=conv_act, out_act=out_act))
    x = draw(2, 15, WIDTH)
    expected = slow_mixer(ours, x, conv_act, out_act)
    torch.testing.assert_close(ours(x, GRID), expected, rtol=1e-10, atol=1e-10)
    for mode, chunk in (("recurrent", None), ("parallel", None), ("chunked", 4)):
        ours.mode, ours.chunk = mode, chunk
        torch.testing.assert_close(ours(x, GRID), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_with_equal_gates_and_an_even_convolution_it_commutes_with_half_a_turn() -> None:
    ours, x = stirred(LocalGatedLinearAttention(WIDTH, HEADS)), draw(2, 15, WIDTH)
    ours.in_proj.weight.copy_((ours.in_proj.weight + ours.in_proj.weight.flip(2, 3)) / 2)
    assert not torch.allclose(ours(x.flip(1), GRID).flip(1), ours(x, GRID))
    half = HEADS * KEYS
    ours.gk_proj[1].weight[half:] = ours.gk_proj[1].weight[:half]
    ours.gk_proj[1].bias[half:] = ours.gk_proj[1].bias[:half]
    torch.testing.assert_close(ours(x.flip(1), GRID).flip(1), ours(x, GRID))


def test_it_reads_later_tokens_and_has_no_step() -> None:
    ours = LocalGatedLinearAttention(WIDTH, HEADS)
    with pytest.raises(InputError, match="has no step"):
        ours.step(torch.zeros(1, WIDTH), ours.init_state(1))


# --- The encoders ---


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def stem(ours: Any, pixels: Tensor, stride: int, act: Any) -> Tensor:
    x = F.conv2d(pixels, ours.conv1.weight, ours.conv1.bias, stride=stride, padding=1)
    x = act(F.layer_norm(x.movedim(1, -1), x.shape[1:2], ours.norm1.weight, ours.norm1.bias)).movedim(-1, 1)
    x = F.conv2d(x, ours.conv2.weight, ours.conv2.bias, stride=2, padding=1)
    return F.layer_norm(x.flatten(2).mT, x.shape[1:2], ours.norm2.weight, ours.norm2.bias)


def fed(mlp: Any, x: Tensor) -> Tensor:
    gate, value = (x @ mlp.gate.weight.T).chunk(2, dim=-1)
    return (F.silu(gate) * value) @ mlp.out.weight.T


@torch.no_grad()
def test_plain_vig_is_its_equations() -> None:
    ours = stirred(create_encoder("vig_nano", image_size=(12, 20), width=16, depth=2, num_classes=3))
    pixels = draw(2, 3, 12, 20)
    x = stem(ours.patch_embed, pixels, 2, F.silu) + ours.pos_embed
    states = [x]
    for block in ours.blocks:
        x = x + block.attn(rms(x, block.norm1.weight), (3, 5))
        x = x + fed(block.mlp, rms(x, block.norm2.weight))
        states.append(x)
    x = rms(x, ours.norm.weight)
    features = ours(pixels, hidden_states=True)
    torch.testing.assert_close(features.tokens, x)
    torch.testing.assert_close(list(features.hidden_states), states)
    torch.testing.assert_close(features.maps[0], x.mT.reshape(2, 16, 3, 5))
    torch.testing.assert_close(ours.logits(pixels), x.mean(1) @ ours.head.weight.T + ours.head.bias)


@torch.no_grad()
def test_vig_h_is_its_equations() -> None:
    ours = stirred(create_encoder("vig_h_nano", image_size=(16, 24), width=8, depths=(1, 2), num_classes=3))
    pixels = draw(2, 3, 16, 24)
    assert isinstance(ours, ViGH)

    def blocks(stage: int, x: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        states = []
        for block in ours.stages[stage].children():
            width = (x.shape[-1],)
            x = x + block.attn(F.layer_norm(x, width, block.norm1.weight, block.norm1.bias), grid)
            x = x + fed(block.mlp, F.layer_norm(x, width, block.norm2.weight, block.norm2.bias))
            states.append(x)
        return states

    x = stem(ours.patch_embed, pixels, 2, F.gelu)
    first = blocks(0, x, (4, 6))
    down = ours.downsamples[0]
    smaller = F.conv2d(first[-1].mT.reshape(2, 8, 4, 6), down.conv.weight, down.conv.bias, stride=2, padding=1)
    second = blocks(1, F.layer_norm(smaller.flatten(2).mT, (16,), down.norm.weight, down.norm.bias), (2, 3))
    tokens = F.layer_norm(second[-1], (16,), ours.norm.weight, ours.norm.bias)
    features = ours(pixels, hidden_states=True)
    assert features.grid == (2, 3)
    torch.testing.assert_close(features.tokens, tokens)
    torch.testing.assert_close(list(features.hidden_states), [x, *first, *second])
    torch.testing.assert_close(features.maps[0], first[-1].mT.reshape(2, 8, 4, 6))
    torch.testing.assert_close(features.maps[1], tokens.mT.reshape(2, 16, 2, 3))
    torch.testing.assert_close(ours.logits(pixels), tokens.mean(1) @ ours.head.weight.T + ours.head.bias)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vig_nano", dict(patch_size=7, image_size=28), "patch_size of ViG must be an even number from 4, not 7"),
        ("vig_nano", dict(image_size=30), "multiples of 4 pixels, not 30 x 30; the nearest size is 32 x 32"),
        ("vig_nano", dict(num_heads=5), "keys of width 32 and values of width 64 cannot be shared by 5 heads"),
        (
            "vig_h_nano",
            dict(depths=(1, 0)),
            r"depths of ViG-H must be the blocks of each stage, 1 or more, not \(1, 0\)",
        ),
        ("vig_h_tiny", dict(image_size=240), "multiples of 32 pixels, not 240 x 240; the nearest size is 256 x 256"),
    ],
)
def test_what_cannot_be_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_encoder(name, **options)


# --- Official checkpoints ---


def official_mixer(width: int, heads: int, prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.in_proj.0.weight": (width, 1, 3, 3),
        f"{prefix}.qkv_proj.weight": (2 * width, width),
        f"{prefix}.gk_proj.0.weight": (16, width),
        f"{prefix}.gk_proj.1.weight": (width, 16),
        f"{prefix}.gk_proj.1.bias": (width,),
        f"{prefix}.o_proj.weight": (width, width),
        f"{prefix}.g_norm.weight": (width // heads,),
        f"{prefix}.l_norm.weight": (width // heads,),
        f"{prefix}.g_proj.weight": (width, width),
        f"{prefix}.g_proj.bias": (width,),
    }


def both(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def official_vig(patches: int = 16) -> dict[str, Tensor]:
    """Names and shapes of models/vig.py with width 16, 2 heads, 2 blocks, patch 4 and 3 classes."""
    shapes = {"pos_embed": (1, patches, 16), "norm.weight": (16,)} | both("head", (3, 16))
    shapes |= both("patch_embed.proj.0", (8, 3, 3, 3)) | both("patch_embed.proj.1", (8,))
    shapes |= both("patch_embed.proj.3", (16, 8, 3, 3)) | both("patch_embed.proj.4", (16,))
    for index in range(2):
        shapes |= official_mixer(16, 2, f"blocks.{index}.attn")
        shapes |= {
            f"blocks.{index}.attn_norm.weight": (16,),
            f"blocks.{index}.mlp_norm.weight": (16,),
            f"blocks.{index}.mlp.gate_proj.weight": (2 * 64, 16),
            f"blocks.{index}.mlp.down_proj.weight": (16, 64),
        }
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def official_vig_h() -> dict[str, Tensor]:
    """Names and shapes of models/vig_h.py with widths 8 and 16, 1 and 2 heads, 1 and 2 blocks, and 3 classes."""
    shapes = both("patch_embed.0", (4, 3, 3, 3)) | both("patch_embed.2", (4,))
    shapes |= both("patch_embed.5", (8, 4, 3, 3)) | both("patch_embed.7", (8,))
    shapes |= both("layers.0.downsample.1", (16, 8, 3, 3)) | both("layers.0.downsample.3", (16,))
    shapes |= both("classifier.norm", (16,)) | both("classifier.head", (3, 16))
    for stage, block, width, hidden in ((0, 0, 8, 32), (1, 0, 16, 64), (1, 1, 16, 64)):
        prefix = f"layers.{stage}.blocks.{block}"
        shapes |= official_mixer(width, stage + 1, f"{prefix}.op")
        shapes |= both(f"{prefix}.norm", (width,)) | both(f"{prefix}.norm2", (width,))
        shapes |= {f"{prefix}.mlp.fc1.weight": (2 * hidden, width), f"{prefix}.mlp.fc2.weight": (width, hidden)}
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def plain() -> ViG:
    made = create_encoder("vig_nano", image_size=16, width=16, depth=2, num_classes=3)
    assert isinstance(made, ViG)
    return made


NAMES = {
    "plain": {
        "patch_embed.proj.0": "patch_embed.conv1",
        "patch_embed.proj.1": "patch_embed.norm1",
        "patch_embed.proj.3": "patch_embed.conv2",
        "patch_embed.proj.4": "patch_embed.norm2",
        ".attn_norm": ".norm1",
        ".mlp_norm": ".norm2",
        "in_proj.0": "in_proj",
        "gate_proj": "gate",
        "down_proj": "out",
    },
    "staged": {
        "patch_embed.0": "patch_embed.conv1",
        "patch_embed.2": "patch_embed.norm1",
        "patch_embed.5": "patch_embed.conv2",
        "patch_embed.7": "patch_embed.norm2",
        "layers.0.downsample.1": "downsamples.0.conv",
        "layers.0.downsample.3": "downsamples.0.norm",
        "layers.": "stages.",
        ".blocks.": ".",
        ".op.": ".attn.",
        ".0.norm.": ".0.norm1.",
        ".1.norm.": ".1.norm1.",
        "downsamples.0.norm1": "downsamples.0.norm",
        "in_proj.0": "in_proj",
        "fc1": "gate",
        "fc2": "out",
        "classifier.": "",
    },
}


@pytest.mark.parametrize("kind", ["plain", "staged"])
def test_official_weights_load(kind: str, tmp_path: Path) -> None:
    state = official_vig() if kind == "plain" else official_vig_h()
    save_file(state, tmp_path / "vig.safetensors")
    staged = dict(image_size=16, width=8, depths=(1, 2), num_classes=3)
    ours = plain() if kind == "plain" else create_encoder("vig_h_nano", **staged)
    ours.load_official(tmp_path / "vig.safetensors")
    own = ours.state_dict()
    assert len(own) == len(state)
    for name, value in state.items():
        for theirs, renamed in NAMES[kind].items():
            name = name.replace(theirs, renamed)
        assert torch.equal(own[name], value), name


def test_positions_of_another_grid_are_resized(tmp_path: Path) -> None:
    state = official_vig(patches=9)
    state["pos_embed"][:] = 0.5
    save_file(state, tmp_path / "vig.safetensors")
    ours = plain()
    ours.load_official(tmp_path / "vig.safetensors")
    torch.testing.assert_close(ours.pos_embed, torch.full((1, 16, 16), 0.5))


def test_every_key_that_does_not_fit_is_named(tmp_path: Path) -> None:
    state = official_vig()
    del state["norm.weight"], state["blocks.1.attn.l_norm.weight"]
    state["cls_token"] = torch.zeros(1, 1, 16)
    save_file(state, tmp_path / "vig.safetensors")
    with pytest.raises(InputError) as caught:
        plain().load_official(tmp_path / "vig.safetensors")
    for part in ("norm.weight", "blocks.1.attn.l_norm.weight", "not expected: cls_token"):
        assert part in str(caught.value)
