"""DHVT: sizes, its three parts on their own, the whole network by the official names of its weights, its switches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.dhvt import DAFF, DHVT, HeadTokenAttention, OverlappingPatchEmbed
from sightline.encoders.encoder import MacCounter, count_macs, count_parameters, create_encoder
from sightline.errors import InputError
from sightline.mixers.attention import Attention


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [
        ("dhvt_tiny_cifar_patch4", 100, 6.01),
        ("dhvt_small_cifar_patch4", 100, 23.4),
        ("dhvt_tiny_cifar_patch2", 100, 5.85),
        ("dhvt_small_cifar_patch2", 100, 22.8),
        ("dhvt_tiny", 1000, 6.27),
        ("dhvt_small", 1000, 24.0),
    ],
)
def test_the_published_sizes(name: str, classes: int, millions: float) -> None:
    with torch.device("meta"):
        encoder = create_encoder(name, num_classes=classes)
    assert count_parameters(encoder) == pytest.approx(millions * 1e6, rel=0.005)


def test_the_multiply_adds_are_those_of_its_formula() -> None:
    patches, width, heads, layers = 64, 192, 4, 12
    length = patches + 1 + heads
    attention = length * 4 * width**2 + 2 * length**2 * width + heads * width**2 // heads
    feed = patches * (8 * width**2 + 9 * 4 * width) + width**2 // 2
    patching = 9 * (16 * 16 * 3 * 96 + 8 * 8 * 96 * 192)
    assert count_macs("dhvt_tiny_cifar_patch4") == layers * (attention + feed) + patching + 1000 * width
    assert 50_000 <= count_parameters(create_encoder("dhvt_nano")) <= 300_000


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.double().state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.3 * noise)
    return module.eval()


def random_tokens(batch: int, length: int, width: int) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@torch.no_grad()
def test_head_tokens_one_by_one() -> None:
    mixer, x = seeded(HeadTokenAttention(12, 3)), random_tokens(2, 7, 12)
    assert isinstance(mixer, HeadTokenAttention)
    made = mixer.head_tokens(x)
    assert made.shape == (2, 3, 12)
    for head in range(3):
        mean = x[:, :, 4 * head : 4 * head + 4].mean(dim=1)  # of [cls] and patches alike
        wide = mean @ mixer.token_proj.weight.T + mixer.token_proj.bias
        slices = [mixer.token_norm(wide[:, 4 * part : 4 * part + 4]) for part in range(3)]
        expected = F.gelu(torch.cat(slices, dim=-1)) + mixer.token_positions[0, head]
        torch.testing.assert_close(made[:, head], expected, rtol=0, atol=1e-12)
    # Attention over all ten tokens, by a plain layer with the same weights; the last three are averaged into [cls].
    plain = Attention(12, 3).double()
    plain.load_state_dict({name: value for name, value in mixer.state_dict().items() if "token" not in name})
    everything = plain(torch.cat([x, made], dim=1))
    expected = everything[:, :7].clone()
    expected[:, 0] += everything[:, 7:].mean(dim=1)
    torch.testing.assert_close(mixer(x, (2, 3)), expected, rtol=0, atol=1e-12)
    with MacCounter(mixer) as counter:
        mixer(x, (2, 3))
    assert counter.macs == 2 * (10 * 4 * 12**2 + 2 * 10**2 * 12 + 3 * 4 * 12)


@torch.no_grad()
def test_the_feed_forward_block_and_its_gate() -> None:
    block, x = seeded(DAFF(8, 32)), random_tokens(2, 7, 8)
    assert isinstance(block, DAFF)
    out = block(x, (2, 3))
    patches = x[:, 1:].mT.unflatten(2, (2, 3))
    inner = F.gelu(block.norm1(block.widen(patches)))
    inner = inner + F.gelu(block.norm2(block.depthwise(inner)))
    mapped = block.norm3(block.narrow(inner))
    torch.testing.assert_close(out[:, 1:], mapped.flatten(2).mT, rtol=0, atol=1e-12)
    gate = block.excite(F.gelu(block.compress(mapped.mean(dim=(2, 3)))))
    torch.testing.assert_close(out[:, 0], x[:, 0] * gate, rtol=0, atol=1e-12)
    # [cls] is no part of the map.
    other = x.clone()
    other[:, 0] *= -2
    changed = block(other, (2, 3))
    assert torch.equal(changed[:, 1:], out[:, 1:])
    torch.testing.assert_close(changed[:, 0], -2 * out[:, 0])


@pytest.mark.parametrize(("patch_size", "chans"), [(2, [24]), (4, [12, 24]), (8, [6, 12, 24]), (16, [3, 6, 12, 24])])
@torch.no_grad()
def test_overlapping_patches(patch_size: int, chans: list[int]) -> None:
    embed = seeded(OverlappingPatchEmbed(patch_size, 2, 24))
    pixels = torch.randn(1, 2, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    convs = [part for part in embed.modules() if isinstance(part, nn.Conv2d)]
    norms = [part for part in embed.modules() if isinstance(part, nn.BatchNorm2d)]
    assert [conv.out_channels for conv in convs] == chans
    x = pixels * embed.before.alpha + embed.before.beta
    for step, (conv, norm) in enumerate(zip(convs, norms, strict=True)):
        x = norm(F.conv2d(x, conv.weight, stride=2, padding=1))
        if step < len(convs) - 1 or patch_size == 2:
            x = F.gelu(x)
    x = x * embed.after.alpha + embed.after.beta
    torch.testing.assert_close(embed(pixels), x.flatten(2).mT, rtol=0, atol=1e-12)
    assert embed(pixels).shape == (1, 32 * 48 // patch_size**2, 24)


WIDTH, HEADS, DEPTH = 24, 3, 2


def official_state(patch_size: int) -> dict[str, Tensor]:
    """Random weights under the names and in the shapes of the official code."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, WIDTH)}

    def linear(name: str, outputs: int, *inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, *inputs), (outputs,)

    def batch_norm(name: str, width: int) -> None:
        linear(name, width)
        shapes[f"{name}.running_mean"] = shapes[f"{name}.running_var"] = (width,)

    for name, chans in (("pre_affine", 3), ("post_affine", WIDTH)):
        shapes[f"patch_embed.{name}.alpha"] = shapes[f"patch_embed.{name}.beta"] = (1, chans, 1, 1)
    chans = {2: [3, WIDTH], 4: [3, WIDTH // 2, WIDTH]}[patch_size]
    for step in range(len(chans) - 1):  # between them stand activations, which are counted
        shapes[f"patch_embed.proj.{2 * step}.0.weight"] = (chans[step + 1], chans[step], 3, 3)
        batch_norm(f"patch_embed.proj.{2 * step}.1", chans[step + 1])
    for index in range(DEPTH):
        block = f"blocks.{index}"
        linear(f"{block}.norm1", WIDTH)
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        linear(f"{block}.attn.ht_proj", WIDTH, WIDTH // HEADS)
        linear(f"{block}.attn.ht_norm", WIDTH // HEADS)
        shapes[f"{block}.attn.pos_embed"] = (1, HEADS, WIDTH)
        linear(f"{block}.norm2", WIDTH)
        linear(f"{block}.mlp.conv1", 4 * WIDTH, WIDTH, 1, 1)
        linear(f"{block}.mlp.conv2", 4 * WIDTH, 1, 3, 3)
        linear(f"{block}.mlp.conv3", WIDTH, 4 * WIDTH, 1, 1)
        for number, width in ((1, 4 * WIDTH), (2, 4 * WIDTH), (3, WIDTH)):
            batch_norm(f"{block}.mlp.bn{number}", width)
        linear(f"{block}.mlp.compress", WIDTH // 4, WIDTH)
        linear(f"{block}.mlp.excitation", WIDTH, WIDTH // 4)
    linear("norm", WIDTH)
    linear("head", 10, WIDTH)
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value.abs() + 0.5 if name.endswith("running_var") else value for name, value in state.items()}


def official_logits(state: dict[str, Tensor], pixels: Tensor, patch_size: int) -> Tensor:
    """The network by the official names, all attention written out."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def batch_norm(x: Tensor, name: str) -> Tensor:
        moments = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, *moments, state[f"{name}.weight"], state[f"{name}.bias"])

    def affine(x: Tensor, name: str) -> Tensor:
        return x * state[f"patch_embed.{name}.alpha"] + state[f"patch_embed.{name}.beta"]

    x = affine(pixels, "pre_affine")
    for step in ("0",) if patch_size == 2 else ("0", "2"):
        x = F.conv2d(x, state[f"patch_embed.proj.{step}.0.weight"], stride=2, padding=1)
        x = batch_norm(x, f"patch_embed.proj.{step}.1")
        if step == "0":
            x = F.gelu(x)
    x = affine(x, "post_affine")
    grid = x.shape[2:]
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], dim=1)
    slice_width, length = WIDTH // HEADS, x.shape[1]
    for index in range(DEPTH):
        block = f"blocks.{index}"
        y = norm(x, f"{block}.norm1")
        means = y.unflatten(-1, (HEADS, slice_width)).mean(dim=1)
        made = linear(means, f"{block}.attn.ht_proj").unflatten(-1, (HEADS, slice_width))
        made = F.gelu(norm(made, f"{block}.attn.ht_norm", eps=1e-5)).flatten(2) + state[f"{block}.attn.pos_embed"]
        joined = linear(torch.cat([y, made], dim=1), f"{block}.attn.qkv")
        query, key, value = joined.unflatten(-1, (3, HEADS, slice_width)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / math.sqrt(slice_width)).softmax(dim=-1)
        mixed = linear((weights @ value).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        cls = mixed[:, :1] + mixed[:, length:].mean(dim=1, keepdim=True)
        x = x + torch.cat([cls, mixed[:, 1:length]], dim=1)

        y = norm(x, f"{block}.norm2")
        name = f"{block}.mlp"
        z = y[:, 1:].mT.unflatten(2, grid)
        z = F.conv2d(z, state[f"{name}.conv1.weight"], state[f"{name}.conv1.bias"])
        z = F.gelu(batch_norm(z, f"{name}.bn1"))
        near = F.conv2d(z, state[f"{name}.conv2.weight"], state[f"{name}.conv2.bias"], padding=1, groups=z.shape[1])
        z = z + F.gelu(batch_norm(near, f"{name}.bn2"))
        z = batch_norm(F.conv2d(z, state[f"{name}.conv3.weight"], state[f"{name}.conv3.bias"]), f"{name}.bn3")
        gate = linear(F.gelu(linear(z.mean(dim=(2, 3)), f"{name}.compress")), f"{name}.excitation")
        x = x + torch.cat([y[:, :1] * gate[:, None], z.flatten(2).mT], dim=1)
    return linear(norm(x, "norm")[:, 0], "head")


@pytest.mark.parametrize("patch_size", [2, 4])
@torch.no_grad()
def test_an_official_checkpoint_gives_what_the_official_network_gives(patch_size: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(width=WIDTH, depth=DEPTH, num_heads=HEADS, patch_size=patch_size, image_size=16)
    encoder = DHVT(num_classes=10, **settings).eval()
    state = official_state(patch_size)
    path = tmp_path / "dhvt.safetensors"
    save_file(state, path)
    encoder.load_official(path)
    pixels = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = official_logits({name: value.double() for name, value in state.items()}, pixels, patch_size)
    torch.testing.assert_close(encoder.double().logits(pixels), expected, rtol=0, atol=1e-10)

    state["blocks.0.attn.odd"] = state.pop("blocks.1.mlp.conv2.weight")
    save_file(state, path)
    with pytest.raises(InputError, match=r"missing: blocks\.1\.mlp\.depthwise\.weight; not expected: blocks\.0\.attn"):
        encoder.load_official(path)


@torch.no_grad()
def test_without_a_table_a_shifted_picture_gives_shifted_tokens() -> None:
    torch.manual_seed(0)
    encoder = create_encoder("dhvt_nano", depth=1, head_tokens=False).eval()
    picture = torch.zeros(1, 3, 64, 64)
    picture[:, :, 24:32, 24:36] = torch.randn(1, 3, 8, 12)
    before = encoder(picture).maps[0]
    after = encoder(picture.roll((4, 8), dims=(2, 3))).maps[0].roll((-1, -2), dims=(2, 3))
    # Borders see zero padding; everywhere the attention reads what the borders are.
    torch.testing.assert_close(after[..., 3:12, 3:12], before[..., 3:12, 3:12], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_switches_lead_from_a_vit_to_dhvt() -> None:
    steps: list[dict[str, Any]] = [
        dict(patch_embedding="patches", feed_forward="mlp", head_tokens=False),
        dict(feed_forward="mlp", head_tokens=False),
        dict(head_tokens=False),
        {},
    ]
    vit = create_encoder("vit_nano", num_classes=10).eval()
    bare = create_encoder("dhvt_nano", num_classes=10, **steps[0]).eval()
    bare.load_state_dict(vit.state_dict())
    pixels = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bare.logits(pixels), vit.logits(pixels), rtol=0, atol=1e-5)
    counts = []
    for changed in steps:
        encoder = create_encoder("dhvt_nano", num_classes=10, **changed).eval()
        assert encoder(pixels).grid == (12, 8)
        counts.append(count_parameters(encoder))
    assert len(set(counts)) == 4
    assert create_encoder("dhvt_nano", feed_forward="mlp").eval()(pixels).tokens.isfinite().all()


@torch.no_grad()
def test_other_sizes() -> None:
    features = create_encoder("dhvt_nano").eval()(torch.randn(1, 3, 32, 48), hidden_states=True)
    assert (features.grid, features.tokens.shape) == ((8, 12), (1, 96, 64))
    assert [state.shape for state in features.hidden_states] == [(1, 96, 64)] * 5
    with torch.device("meta"):
        for size, grid in ((384, (24, 24)), ((224, 160), (14, 10))):
            encoder = create_encoder("dhvt_tiny", image_size=size, depth=1)
            assert encoder.eval()(torch.empty(1, 3, *encoder.image_size)).grid == grid


def test_what_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"patch_size of 2, 4, 8, \.\.\. and a width that its half divides, not 6 and 64"
    ):
        create_encoder("dhvt_nano", patch_size=6, image_size=48)
    with pytest.raises(InputError, match="not 8 and 66"):
        create_encoder("dhvt_nano", patch_size=8, width=66)
    with pytest.raises(InputError, match="unknown patch_embedding 'patch'"):
        create_encoder("dhvt_nano", patch_embedding="patch")
    with pytest.raises(InputError, match="unknown feed_forward 'conv'"):
        create_encoder("dhvt_nano", feed_forward="conv")
    with pytest.raises(InputError, match="4"):
        create_encoder("dhvt_nano")(torch.zeros(1, 3, 30, 32))
