"""ViR: sizes, the class token at the end, the order of reading, equal forms, and the authors' key names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from sightline.encoders.encoder import count_macs, count_parameters, create_encoder
from sightline.encoders.vir import ViR
from sightline.errors import InputError
from sightline.mixers.retention import Retention


def small(size: int | tuple[int, int] = (8, 12), **options: Any) -> ViR:
    """Two blocks on a grid of 2 x 3 patches, with weights large enough for every part to matter."""
    torch.manual_seed(0)
    made = create_encoder("vir_nano", image_size=size, width=12, num_heads=3, depth=2, **options).double().eval()
    assert isinstance(made, ViR)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    return made


def pictures(height: int = 8, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vir_small_patch16", 22.06),
        ("vir_base_patch16", 86.59),
        ("vir_large_patch16", 304.4),
        ("vir_large_patch14", 304.3),
    ],
)
def test_parameters_are_as_published(name: str, millions: float) -> None:
    with torch.device("meta"):
        assert count_parameters(create_encoder(name, num_classes=1000)) == pytest.approx(millions * 1e6, rel=0.0005)


def test_multiply_adds_are_a_vits_with_the_scan_for_the_scores() -> None:
    attention = 12 * 2 * 197**2 * 384
    scan = 12 * 3 * 197 * 6 * 64 * 64
    assert count_macs("vir_small_patch16") == count_macs("vit_small") - attention + scan


@torch.no_grad()
@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_it_is_the_equations_written_out(layer_scale: float | None) -> None:
    ours, pixels = small(layer_scale=layer_scale), pictures()
    x = F.conv2d(pixels, ours.patch_embed.proj.weight, ours.patch_embed.proj.bias, stride=4).flatten(2).mT
    assert ours.cls_token is not None
    x = torch.cat([x + ours.pos_embed, ours.cls_token.expand(2, -1, -1)], dim=1)
    states = [x]
    for block in ours.blocks:
        normed = F.layer_norm(x, (12,), block.norm1.weight, block.norm1.bias, 1e-6)
        x = x + block.attn(normed) * (1 if layer_scale is None else block.ls1.gamma)
        normed = F.layer_norm(x, (12,), block.norm2.weight, block.norm2.bias, 1e-6)
        fed = F.gelu(normed @ block.mlp.fc1.weight.T + block.mlp.fc1.bias) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
        x = x + fed * (1 if layer_scale is None else block.ls2.gamma)
        states.append(x)
    x = F.layer_norm(x, (12,), ours.norm.weight, ours.norm.bias, 1e-6)
    features = ours(pixels, hidden_states=True)
    torch.testing.assert_close(features.tokens, x[:, :6])
    torch.testing.assert_close(features.pooled, x[:, 6])
    torch.testing.assert_close(list(features.hidden_states), [state[:, :6] for state in states])
    torch.testing.assert_close(features.maps[0], x[:, :6].mT.reshape(2, 12, 2, 3))


@torch.no_grad()
def test_the_forms_are_one_function() -> None:
    pixels = pictures(28, 20)
    whole = small((28, 20))(pixels)
    for options in (dict(mode="recurrent"), dict(mode="parallel"), dict(chunk=8), dict(chunk=1)):
        other = small((28, 20), **options)(pixels)
        torch.testing.assert_close(other.tokens, whole.tokens, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(other.pooled, whole.pooled, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_token_by_token_with_a_state_of_constant_size() -> None:
    ours, pixels = small(), pictures()
    x, _ = ours.embed(pixels)
    mixers = [block.attn for block in ours.blocks]
    states = [mixer.init_state(2) for mixer in mixers if isinstance(mixer, Retention)]
    last = torch.empty(0)
    for token in x.unbind(1):
        for index, block in enumerate(ours.blocks):
            mixed, states[index] = mixers[index].step(block.norm1(token), states[index])
            token = token + mixed
            token = token + block.feed(token)
        last = ours.norm(token)
    torch.testing.assert_close(last, ours(pixels).pooled, rtol=1e-10, atol=1e-10)


def seen(ours: ViR, pixels: Tensor, output: Tensor) -> list[bool]:
    """Which patches, in raster order, a sum of outputs depends on."""
    (gradient,) = torch.autograd.grad(output.sum(), pixels, retain_graph=True)
    return [bool(patch.any()) for row in gradient[0].split(4, dim=1) for patch in row.split(4, dim=2)]


def test_a_token_sees_earlier_patches_and_the_class_token_all() -> None:
    ours, pixels = small(), pictures().requires_grad_()
    features = ours(pixels)
    assert features.pooled is not None
    for index in range(6):
        assert seen(ours, pixels, features.tokens[0, index].square()) == [patch <= index for patch in range(6)]
    assert seen(ours, pixels, features.pooled[0].square()) == [True] * 6
    assert ours.cls_token is not None
    assert torch.autograd.grad(features.tokens.square().sum(), ours.cls_token, allow_unused=True)[0].abs().sum() == 0


def test_read_twice_every_token_sees_all() -> None:
    ours, pixels = small(bidirectional=True), pictures().requires_grad_()
    features = ours(pixels)
    assert features.tokens.shape == (2, 6, 12)
    assert features.pooled is not None
    for index in range(6):
        assert seen(ours, pixels, features.tokens[0, index].square()) == [True] * 6
    assert seen(ours, pixels, features.pooled[0].square()) == [True] * 6


@torch.no_grad()
def test_read_twice_it_is_the_reversed_copy_that_is_given() -> None:
    """With retention switched off, a token is its own patch alone."""
    ours = small(bidirectional=True)
    plain = small()
    for encoder in (ours, plain):
        for block in encoder.blocks:
            block.attn.proj.weight.zero_()
    torch.testing.assert_close(ours(pictures()).tokens, plain(pictures()).tokens)
    torch.testing.assert_close(ours(pictures()).pooled, plain(pictures()).pooled)


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (384, 384), (224, 160)])
def test_other_sizes(size: tuple[int, int]) -> None:
    with torch.device("meta"):
        ours = create_encoder("vir_small_patch16", depth=1)
        features = ours(torch.empty(1, 3, *size))
    assert features.grid == (size[0] // 16, size[1] // 16)
    assert features.tokens.shape == (1, size[0] * size[1] // 256, 384)


def test_a_size_between_patches_is_refused() -> None:
    with pytest.raises(InputError, match="vir_large_patch14 takes pictures whose sides are multiples of 14 pixels"):
        create_encoder("vir_large_patch14", width=16, num_heads=2, depth=1)(torch.zeros(1, 3, 224, 230))
    with pytest.raises(InputError, match="the width 12 cannot be shared by 5 heads"):
        create_encoder("vir_nano", width=12, num_heads=5)
    with pytest.raises(InputError, match="unknown mode of linear attention 'serial'"):
        create_encoder("vir_nano", mode="serial")(torch.zeros(1, 3, 32, 32))


# --- The authors' checkpoints ---


def official(width: int, depth: int, patches: int, classes: int) -> dict[str, Tensor]:
    """A state dict with the names and shapes of models/vir.py, patch 4."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, patches, width),
        "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (classes, width),
        "head.bias": (classes,),
    }
    for index in range(depth):
        linear = {
            "retention.qkv": (3 * width, width),
            "retention.out_proj": (width, width),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }
        for name, shape in linear.items():
            shapes |= {f"blocks.{index}.{name}.weight": shape, f"blocks.{index}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{index}.{name}"] = (width,)
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def empty_one() -> ViR:
    made = create_encoder("vir_nano", image_size=16, width=12, num_heads=3, depth=2, num_classes=5, layer_scale=1e-5)
    assert isinstance(made, ViR)
    return made


def test_the_authors_weights_load(tmp_path: Path) -> None:
    state = official(12, 2, 16, 5)
    save_file(state, tmp_path / "vir.safetensors")
    ours = empty_one()
    ours.load_official(tmp_path / "vir.safetensors")
    own = ours.state_dict()
    assert len(own) == len(state)
    for name, value in state.items():
        renamed = name.replace("retention.qkv", "attn.qkv").replace("retention.out_proj", "attn.proj")
        assert torch.equal(own[renamed], value), name


def test_positions_of_another_grid_are_resized(tmp_path: Path) -> None:
    state = official(12, 2, 9, 5)
    state["pos_embed"][:] = 0.5
    save_file(state, tmp_path / "vir.safetensors")
    ours = empty_one()
    ours.load_official(tmp_path / "vir.safetensors")
    torch.testing.assert_close(ours.pos_embed, torch.full((1, 16, 12), 0.5))


def test_every_key_that_does_not_fit_is_named(tmp_path: Path) -> None:
    state = official(12, 2, 16, 5)
    del state["blocks.0.norm1.bias"], state["blocks.1.retention.qkv.weight"]
    state["blocks.0.retention.gate.weight"] = torch.zeros(1)
    state["head.bias"] = torch.zeros(6)
    save_file(state, tmp_path / "vir.safetensors")
    with pytest.raises(InputError) as caught:
        empty_one().load_official(tmp_path / "vir.safetensors")
    for part in (
        "missing: blocks.0.norm1.bias, blocks.1.attn.qkv.weight",
        "not expected: blocks.0.retention.gate.weight",
        r"head.bias is [6] and should be [5]",
    ):
        assert part in str(caught.value)
