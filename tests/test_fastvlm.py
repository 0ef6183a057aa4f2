"""FastViTHD: its branches against one convolution, the whole against its equations written out, sizes and names."""

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
from sightline.encoders.fastvlm import AttentionBlock, FastViTHD, RepConv, RepMixerBlock
from sightline.errors import InputError

SMALL: dict[str, Any] = dict(widths=(8, 16, 32, 64), depths=(1, 2, 1, 2), attention_stages=2, layer_scale=0.5)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def used(module: nn.Module, seed: int = 0) -> Any:
    """The module in float64 and eval mode, its parameters and batch norms as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    module.double().eval()
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            with torch.no_grad():
                part.weight.normal_(0, (part.weight[0].numel()) ** -0.5, generator=generator)
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
            with torch.no_grad():
                part.weight.uniform_(-1, 1, generator=generator)
                part.bias.normal_(generator=generator)
    return module


def small(**options: Any) -> Any:
    return used(create_encoder("fastvithd_nano", **{**SMALL, **options}))


# --- Branches and their sum ---


@pytest.mark.parametrize(
    ("before", "after", "kernels", "options"),
    [
        (3, 8, (3,), dict(stride=2)),
        (8, 8, (3,), dict(stride=2, groups=8)),
        (8, 8, (1,), {}),
        (8, 8, (3, 1), dict(groups=4)),
        (8, 16, (3, 1), dict(groups=8, squeeze=True)),
        (8, 24, (7, 3), dict(stride=2, groups=8, skip=False)),
        (6, 6, (), dict(side=3, groups=6, act=False)),
    ],
)
@torch.no_grad()
def test_a_sum_of_branches_is_one_convolution(before: int, after: int, kernels: Any, options: dict[str, Any]) -> None:
    made = used(RepConv(before, after, kernels, **options))
    # A skip is there exactly where the shape stays.
    assert (made.skip is not None) == (before == after and options.get("stride", 1) == 1)
    x = numbers(2, before, 9, 6)
    expected = made(x)
    branches = sum(branch.bn(branch.conv(x)) for branch in made.branches) if len(kernels) else 0
    if made.skip is not None:
        branches = branches + made.skip(x)
    torch.testing.assert_close(made.act(made.se(branches)), expected, atol=1e-12, rtol=1e-12)
    made.fuse()
    assert not list(made.branches)
    assert made.skip is None
    torch.testing.assert_close(made(x), expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_rep_mixer_by_hand() -> None:
    block = used(RepMixerBlock(6, 4.0, 0.25, 0.0))
    mixer = block.token_mixer
    x = numbers(1, 6, 5, 7)

    def norm(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
        gain = bn.weight / (bn.running_var + 1e-5).sqrt()
        return (x - bn.running_mean[:, None, None]) * gain[:, None, None] + bn.bias[:, None, None]

    large, point = mixer.mixer.branches
    m = norm(large.bn, F.conv2d(x, large.conv.weight, padding=1, groups=6))
    m = m + norm(point.bn, x * point.conv.weight[:, 0]) + norm(mixer.mixer.skip, x)
    expected = x + 0.25 * (m - norm(mixer.norm.skip, x))
    torch.testing.assert_close(mixer(x), expected, atol=1e-12, rtol=1e-12)
    mixer.fuse()
    torch.testing.assert_close(mixer(x), expected, atol=1e-10, rtol=1e-10)
    assert [name for name, _ in mixer.named_parameters()] == ["fused.weight", "fused.bias"]


def test_the_branch_form_equals_the_fused_form() -> None:
    encoder = small(clip_dim=6, num_classes=5)
    pixels = [numbers(2, 3, 64, 64), numbers(1, 3, 45, 70, seed=1)]
    before = [encoder(each.requires_grad_(), hidden_states=True) for each in pixels]
    gradients = [
        torch.autograd.grad(features.tokens.square().sum(), each)[0]
        for each, features in zip(pixels, before, strict=True)
    ]
    logits = encoder.logits(pixels[0])
    assert not encoder.is_fused
    assert encoder.fuse() is encoder
    assert encoder.is_fused
    for each, expected, gradient in zip(pixels, before, gradients, strict=True):
        features = encoder(each, hidden_states=True)
        assert features.grid == expected.grid
        for ours, theirs in zip(
            (features.tokens, features.pooled, *features.maps, *features.hidden_states),
            (expected.tokens, expected.pooled, *expected.maps, *expected.hidden_states),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
        (ours,) = torch.autograd.grad(features.tokens.square().sum(), each)
        torch.testing.assert_close(ours, gradient, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(encoder.logits(pixels[0]), logits, atol=1e-10, rtol=1e-10)
    # No batch norm is left, a second time changes nothing, and it can be made again from its settings.
    assert not [part for part in encoder.modules() if isinstance(part, nn.BatchNorm2d)]
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.fuse()
    again = create_encoder(encoder.name, **encoder.settings).double()
    again.load_state_dict(state)
    assert again.is_fused
    torch.testing.assert_close(again.eval()(pixels[1]).tokens, before[1].tokens, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_training_reads_the_batch_and_the_fused_form_does_not() -> None:
    encoder = small()
    pixels = numbers(4, 3, 64, 64)
    encoder.train()
    assert not torch.allclose(encoder(pixels).tokens[:2], encoder(pixels[:2]).tokens)
    encoder.fuse()
    torch.testing.assert_close(encoder(pixels).tokens[:2], encoder(pixels[:2]).tokens)


# --- The whole, written out ---


def written_out(state: dict[str, Tensor], pixels: Tensor, stages: list[tuple[str, int]]) -> Tensor:
    """The fused encoder's map from its weights; `stages`: kind and blocks of each."""

    def conv(x: Tensor, key: str, stride: int = 1) -> Tensor:
        weight = state[f"{key}.weight"]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, state[f"{key}.bias"], stride, weight.shape[-1] // 2, groups=groups)

    def ffn(x: Tensor, key: str) -> Tensor:
        return conv(F.gelu(conv(conv(x, f"{key}.conv.fused"), f"{key}.fc1")), f"{key}.fc2")

    def attention(x: Tensor, key: str) -> Tensor:
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
        x = (x - mean) / (variance + 1e-5).sqrt()
        x = x * state[f"{key}.norm.weight"][:, None, None] + state[f"{key}.norm.bias"][:, None, None]
        _, channels, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        query, key_, value = (tokens @ state[f"{key}.token_mixer.qkv.weight"].T).chunk(3, dim=-1)
        out = []
        for head in range(channels // 32):
            part = slice(32 * head, 32 * head + 32)
            weights = torch.softmax(query[..., part] @ key_[..., part].transpose(1, 2) / math.sqrt(32), dim=-1)
            out.append(weights @ value[..., part])
        mixed = torch.cat(out, -1) @ state[f"{key}.token_mixer.proj.weight"].T + state[f"{key}.token_mixer.proj.bias"]
        return mixed.transpose(1, 2).unflatten(2, (height, width))

    x = pixels
    for step, stride in enumerate((2, 2, 1)):
        x = F.gelu(conv(x, f"patch_embed.{step}.fused", stride))
    place = 0
    for stage, (kind, blocks) in enumerate(stages):
        if stage:
            x = F.gelu(conv(x, f"network.{place}.proj.0.fused", 2))
            x = F.gelu(conv(x, f"network.{place}.proj.1.fused"))
            place += 1
        if kind == "attention":
            x = conv(x, f"network.{place}.fused")
            place += 1
        for block in range(blocks):
            key = f"network.{place}.{block}"
            if kind == "attention":
                x = x + state[f"{key}.layer_scale_1"] * attention(x, key)
                x = x + state[f"{key}.layer_scale_2"] * ffn(x, f"{key}.convffn")
            else:
                x = conv(x, f"{key}.token_mixer.fused")
                x = x + state[f"{key}.layer_scale"] * ffn(x, f"{key}.convffn")
        place += 1
    x = conv(x, "conv_exp.fused")
    squeezed = conv(F.relu(conv(x.mean((2, 3), keepdim=True), "conv_exp.se.reduce")), "conv_exp.se.expand")
    return F.gelu(x * torch.sigmoid(squeezed))


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (50, 71)])
def test_the_equations(size: tuple[int, int]) -> None:
    encoder = small(clip_dim=6)
    pixels = numbers(2, 3, *size)
    features = encoder(pixels)
    encoder.fuse()
    stages = [("repmixer", 1), ("repmixer", 2), ("attention", 1), ("attention", 2)]
    expected = written_out(encoder.state_dict(), pixels, stages)
    assert features.grid == (-(-size[0] // 32), -(-size[1] // 32)) == tuple(expected.shape[2:])
    torch.testing.assert_close(features.tokens, expected.flatten(2).transpose(1, 2), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(features.maps[-1], expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(features.pooled, expected.mean((2, 3)) @ encoder.clip_proj, atol=1e-9, rtol=1e-9)
    assert [part.shape[1] for part in features.maps] == [8, 16, 32, 128]


@torch.no_grad()
def test_without_layer_scale_a_block_changes_nothing() -> None:
    x = numbers(1, 32, 5, 4)
    for block in (RepMixerBlock(32, 4.0, 0.0, 0.0), AttentionBlock(32, 4.0, 0.0, 0.0)):
        assert torch.equal(used(block)(x), x)
    assert not torch.equal(used(AttentionBlock(32, 4.0, 1e-5, 0.0))(x), x)
    assert create_encoder("fastvithd_nano").network[0][0].layer_scale.unique().item() == pytest.approx(1e-5)


# --- Counts and sizes ---


def test_the_parameters_of_the_published_encoder() -> None:
    with torch.device("meta"):
        encoder = create_encoder("fastvithd", fused=True, clip_dim=768)
    assert isinstance(encoder, FastViTHD)
    assert count_parameters(encoder) == pytest.approx(125.07e6, rel=5e-3)
    assert encoder.clip_proj is not None
    assert encoder.clip_proj.numel() == 3072 * 768
    assert count_parameters(encoder) - encoder.clip_proj.numel() == pytest.approx(122.71e6, rel=5e-3)
    assert count_parameters(encoder.network) == pytest.approx(121.49e6, rel=5e-3)
    assert count_parameters(encoder.conv_exp) == pytest.approx(1.21e6, rel=5e-3)
    assert count_parameters(encoder.patch_embed) == pytest.approx(0.013e6, rel=0.05)
    assert 50_000 < count_parameters(create_encoder("fastvithd_nano")) < 300_000


def test_tokens_follow_the_resolution() -> None:
    with torch.device("meta"):
        encoder = create_encoder("fastvithd").eval()
    assert encoder.stride == 64
    for side, tokens in ((256, 16), (512, 64), (768, 144), (1024, 256), (1536, 576)):
        with torch.no_grad():
            assert encoder(torch.empty(1, 3, side, side, device="meta")).tokens.shape == (1, tokens, 3072)
    with torch.no_grad():
        features = encoder(torch.empty(1, 3, 224, 384, device="meta"))
    assert features.grid == (4, 6)
    assert [tuple(part.shape[2:]) for part in features.maps] == [(56, 96), (28, 48), (14, 24), (7, 12), (4, 6)]


def test_the_work_grows_with_the_picture_and_little_with_its_square() -> None:
    small, large = (count_macs("fastvithd", image_size=side) for side in (512, 1024))
    assert 4 < large / small < 4.1


# --- Official checkpoints ---


def official(fused: bool, clip_dim: int) -> dict[str, Tensor]:
    """A state dict of the official code's names and shapes for `SMALL`."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(key: str, after: int, per_group: int, kernel: int, bias: bool = True) -> None:
        shapes[f"{key}.weight"] = (after, per_group, kernel, kernel)
        if bias:
            shapes[f"{key}.bias"] = (after,)

    def norm(key: str, width: int) -> None:
        shapes.update({f"{key}.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{key}.num_batches_tracked"] = ()

    def conv_norm(key: str, after: int, per_group: int, kernel: int) -> None:
        conv(f"{key}.conv", after, per_group, kernel, bias=False)
        norm(f"{key}.bn", after)

    def mobile_one(
        key: str, before: int, after: int, kernel: int, groups: int, stride: int = 1, scale: bool = True
    ) -> None:
        if fused:
            return conv(f"{key}.reparam_conv", after, before // groups, kernel)
        conv_norm(f"{key}.rbr_conv.0", after, before // groups, kernel)
        if scale and kernel > 1:
            conv_norm(f"{key}.rbr_scale", after, before // groups, 1)
        if before == after and stride == 1:
            norm(f"{key}.rbr_skip", before)

    def ffn(key: str, width: int) -> None:
        conv_norm(f"{key}.conv", width, 1, 7)
        conv(f"{key}.fc1", 4 * width, width, 1)
        conv(f"{key}.fc2", width, 4 * width, 1)

    mobile_one("patch_embed.0", 3, 8, 3, 1, stride=2, scale=False)
    mobile_one("patch_embed.1", 8, 8, 3, 8, stride=2, scale=False)
    mobile_one("patch_embed.2", 8, 8, 1, 1)
    place = 0
    for stage, (width, depth) in enumerate(zip(SMALL["widths"], SMALL["depths"], strict=True)):
        if stage:
            at = f"network.{place}.proj"
            if fused:
                conv(f"{at}.0.lkb_reparam", width, 1, 7)
            else:
                conv_norm(f"{at}.0.lkb_origin", width, 1, 7)
                conv_norm(f"{at}.0.small_conv", width, 1, 3)
            mobile_one(f"{at}.1", width, width, 1, 1)
            place += 1
        if stage >= 2:
            conv(f"network.{place}.{'reparam_conv' if fused else 'pe'}", width, 1, 7)
            place += 1
        for block in range(depth):
            at = f"network.{place}.{block}"
            ffn(f"{at}.convffn", width)
            if stage >= 2:
                shapes |= {f"{at}.norm.weight": (width,), f"{at}.norm.bias": (width,)}
                shapes |= {f"{at}.token_mixer.qkv.weight": (3 * width, width)}
                shapes |= {f"{at}.token_mixer.proj.weight": (width, width), f"{at}.token_mixer.proj.bias": (width,)}
                shapes |= {f"{at}.layer_scale_{which}": (width, 1, 1) for which in (1, 2)}
                continue
            shapes[f"{at}.layer_scale"] = (width, 1, 1)
            if fused:
                conv(f"{at}.token_mixer.reparam_conv", width, 1, 3)
            else:
                norm(f"{at}.token_mixer.norm.rbr_skip", width)
                mobile_one(f"{at}.token_mixer.mixer", width, width, 3, width)
                shapes[f"{at}.token_mixer.layer_scale"] = (width, 1, 1)
        place += 1
    mobile_one("conv_exp", 64, 128, 3, 64)
    conv("conv_exp.se.reduce", 8, 128, 1)
    conv("conv_exp.se.expand", 128, 8, 1)
    shapes["head.proj"] = (128, clip_dim)
    generator = torch.Generator().manual_seed(2)
    state = {}
    for key, shape in shapes.items():
        state[key] = torch.randn(shape, generator=generator) * 0.3
        if key.endswith("running_var"):
            state[key] = state[key].abs() + 0.5
        elif key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(3)
    return state


@pytest.mark.parametrize("fused", [True, False])
def test_official_checkpoints(fused: bool, tmp_path: Path) -> None:
    given = official(fused, clip_dim=6)
    tower = {f"model.vision_tower.vision_tower.model.{key}": value for key, value in given.items()}
    save_file({**tower, "model.embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "whole.safetensors")
    save_file(given, tmp_path / "tower.safetensors")
    encoder, plain = (create_encoder("fastvithd_nano", **SMALL, fused=fused, clip_dim=dim).eval() for dim in (6, 0))
    encoder.load_official(tmp_path / "whole.safetensors")
    plain.load_official(tmp_path / "tower.safetensors")
    assert isinstance(encoder, FastViTHD)
    assert torch.equal(encoder.clip_proj, given["head.proj"])
    weight = "reparam_conv.weight" if fused else "rbr_conv.0.conv.weight"
    first = encoder.patch_embed[0].fused if fused else encoder.patch_embed[0].branches[0].conv
    assert torch.equal(first.weight, given[f"patch_embed.0.{weight}"])
    # What the batch norm of a feed-forward block does, fused or not.
    x = torch.rand(1, 8, 6, 5, generator=torch.Generator().manual_seed(3))
    at = "network.0.0.convffn.conv"
    convolved = F.conv2d(x, given[f"{at}.conv.weight"], padding=3, groups=8)
    statistics = given[f"{at}.bn.running_mean"], given[f"{at}.bn.running_var"]
    expected = F.batch_norm(convolved, *statistics, given[f"{at}.bn.weight"], given[f"{at}.bn.bias"])
    torch.testing.assert_close(encoder.network[0][0].convffn.conv(x), expected)
    pixels = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(4))
    assert torch.equal(encoder(pixels).tokens, plain(pixels).tokens)
    assert encoder(pixels).tokens.isfinite().all()

    del given["conv_exp.se.reduce.bias"]
    given["network.0.7.fc1.weight"] = torch.zeros(1)
    save_file(given, tmp_path / "broken.safetensors")
    with pytest.raises(
        InputError, match=r"missing: conv_exp\.se\.reduce\.bias; not expected: network\.0\.7\.fc1\.weight$"
    ):
        encoder.load_official(tmp_path / "broken.safetensors")
    other = create_encoder("fastvithd_nano", **SMALL, fused=not fused)
    form = f"the {'fused' if fused else 'branch'} form of FastViTHD; create the encoder with fused={fused}"
    with pytest.raises(InputError, match=form):
        other.load_official(tmp_path / "tower.safetensors")


# --- Errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depths=(1, 2)), "as many depths as widths .*not 2 depths, 3 widths and attention_stages=1"),
        (dict(attention_stages=4), "at most that many attention_stages, .*attention_stages=4"),
        (dict(widths=(8, 16, 40)), r"attention stages must be multiples of 32, not \(40,\)"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_encoder("fastvithd_nano", **options)


def test_an_empty_picture_is_refused() -> None:
    with pytest.raises(InputError, match="fastvithd_nano takes pictures of one pixel or more, not 0 x 8"):
        create_encoder("fastvithd_nano")(torch.zeros(1, 3, 0, 8))
