"""Frozen ViViT: the factorised encoder against written-out steps, what is trained, starts, cache, official files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sightline.encoders.encoder import MacCounter, count_parameters
from sightline.encoders.frozen_vivit import FeatureCache, FrozenViViT
from sightline.encoders.layers import resized_positions
from sightline.encoders.vit import VisionTransformer
from sightline.errors import InputError

ADAPTERS = ("none", "bottleneck", "linear", "tokens")
SMALL = dict(image_size=8, width=8, num_heads=2, patch_size=4)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vivit(seed: int = 0, *, head: bool = True, **options: Any) -> FrozenViViT:
    torch.manual_seed(seed)
    settings = SMALL | dict(depth=3, tubelet=2, num_frames=8, temporal_depth=2, num_classes=3)
    model = FrozenViViT(**settings | options)
    if head:  # zero at the start
        torch.nn.init.normal_(model.head.weight)
    return model.eval()


def picture_vit(seed: int = 9, **options: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(**SMALL | dict(depth=3) | options).eval()
    model.name = "vit"
    return model


# --- The factorised encoder ---


@pytest.mark.parametrize(
    ("name", "classes", "millions", "giga"),
    [
        ("vivit_fe_base", 400, 115.1, 284.4),  # ViViT paper, table of model variants
        ("vivit_fe_large", 174, None, None),
    ],
)
def test_published_sizes(name: str, classes: int, millions: float | None, giga: float | None) -> None:
    options: dict[str, Any] = dict(FrozenViViT.configs[name])
    with torch.device("meta"):
        model = FrozenViViT(**options, num_classes=classes).eval()
    with MacCounter(model) as counter, torch.no_grad():
        logits = model.logits(torch.empty(1, 32, 3, 224, 224, device="meta"))
    assert logits.shape == (1, classes)
    width, depth = options["width"], options["depth"]
    block = 12 * width**2 + 13 * width
    tokens = 2 * 3 * 256 * width + width + width + 197 * width + 2 * width
    temporal = 4 * block + width + 17 * width + 2 * width
    assert count_parameters(model) == tokens + depth * block + temporal + (width + 1) * classes
    if millions and giga:
        assert count_parameters(model) / 1e6 == pytest.approx(millions, rel=0.005)
        assert counter.macs / 1e9 == pytest.approx(giga, rel=0.03)


def test_the_encoder_is_its_steps() -> None:
    model = vivit().double()
    clip = randn(2, 6, 3, 8, 12).double()
    kernel = model.spatial.patch_embed.proj.weight.unflatten(1, (2, 3)).transpose(1, 2)  # [D, C, t, p, p]
    bias = model.spatial.patch_embed.proj.bias
    tubelets = torch.nn.functional.conv3d(clip.transpose(1, 2), kernel, bias, stride=(2, 4, 4))
    frames = []
    for j in range(3):
        tokens = tubelets[:, :, j].flatten(2).transpose(1, 2)
        x = torch.cat([model.spatial.cls_token.expand(2, -1, -1), tokens], dim=1)
        x = x + resized_positions(model.spatial.pos_embed, (2, 2), (2, 3), extra=1)
        for block in model.spatial.blocks:
            x = block(x, (2, 3))
        frames.append(model.spatial.norm(x)[:, 0])
    features = model(clip, hidden_states=True)
    torch.testing.assert_close(model.frame_features(clip), torch.stack(frames, dim=1), atol=1e-10, rtol=0)
    g = torch.cat([model.cls_token.expand(2, -1, -1), torch.stack(frames, dim=1)], dim=1)
    g = g + resized_positions(model.pos_embed, (4, 1), (3, 1), extra=1)
    for block in model.blocks:
        g = block(g, (3,))
    g = model.norm(g)
    torch.testing.assert_close(features.tokens, g[:, 1:], atol=1e-10, rtol=0)
    torch.testing.assert_close(model.logits(clip), g[:, 0] @ model.head.weight.T, atol=1e-10, rtol=0)
    assert (features.grid, len(features.hidden_states)) == ((3,), 3)


def test_one_time_without_temporal_layers_is_the_vit() -> None:
    model = vivit(tubelet=1, num_frames=1, temporal_depth=0)
    clip = randn(2, 1, 3, 8, 8)
    torch.testing.assert_close(model(clip).pooled, model.spatial(clip[:, 0]).pooled)
    longer = randn(2, 3, 3, 8, 8)
    mean = torch.stack([model.spatial(longer[:, t]).pooled for t in range(3)]).mean(dim=0)
    torch.testing.assert_close(model(longer).pooled, mean)


def test_order_is_read_by_the_positions_alone() -> None:
    model = vivit(tubelet=1)
    clip = randn(1, 8, 3, 8, 8)
    assert (model.logits(clip) - model.logits(clip.flip(1))).abs().max() > 1e-4
    with torch.no_grad():
        model.pos_embed.zero_()
    torch.testing.assert_close(model.logits(clip), model.logits(clip.flip(1)), atol=1e-5, rtol=1e-5)


def test_the_head_starts_at_zero() -> None:
    model = vivit(head=False)
    assert not model.logits(randn(1, 8, 3, 8, 8)).any()
    assert not model.head.weight.any()


# --- Frozen ---


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_training_moves_all_but_the_spatial_part(adapter: str) -> None:
    model = vivit(adapter=adapter).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 0.01)
    clips, labels = randn(4, 8, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    for _ in range(3):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model.logits(clips), labels).backward()
        optimiser.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) is key.startswith("spatial."), key
    assert not model.frame_features(clips).requires_grad


def test_frozen_means_eval_mode_too() -> None:
    model = vivit()
    model.spatial.blocks[2].drop_path.rate = 0.9
    model.train()
    clip = randn(1, 8, 3, 8, 8)
    assert torch.equal(model.frame_features(clip), model.frame_features(clip))
    model.freeze(False)
    assert all(weight.requires_grad for weight in model.parameters())
    assert model.spatial.training
    assert not torch.equal(model.frame_features(clip), model.frame_features(clip))
    model.logits(clip).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    model.freeze()
    assert not model.spatial.training
    assert model.training


@pytest.mark.parametrize("adapter", ADAPTERS[1:])
def test_adapters_start_as_the_plain_model(adapter: str) -> None:
    plain, adapted = vivit(), vivit(adapter=adapter)
    missing = adapted.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all(key.startswith("adapter.") for key in missing)
    clip = randn(2, 8, 3, 8, 8)
    torch.testing.assert_close(adapted.logits(clip), plain.logits(clip), atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        for weight in adapted.adapter.parameters():
            weight.add_(0.1 * randn(*weight.shape, seed=4))
    assert (adapted.logits(clip) - plain.logits(clip)).abs().max() > 1e-4


def test_adapters_are_their_equations() -> None:
    f = randn(2, 3, 8)
    bottleneck = vivit(adapter="bottleneck").adapter
    assert bottleneck.down.out_features == 2
    torch.nn.init.normal_(bottleneck.up.weight)
    centred = f - f.mean(dim=-1, keepdim=True)
    normal = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    hidden = normal @ bottleneck.down.weight.T
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(bottleneck(f), f + hidden @ bottleneck.up.weight.T)
    reader = vivit(adapter="tokens").adapter
    torch.nn.init.normal_(reader.proj.weight)
    tokens = randn(2, 3, 5, 8)
    key, value = reader.kv(reader.norm(tokens)).chunk(2, dim=-1)
    read = torch.empty(2, 3, 8)
    for head in (slice(0, 4), slice(4, 8)):
        weights = ((key[..., head] * reader.query[head]).sum(-1) / 2).softmax(dim=-1)
        read[..., head] = (weights[..., None] * value[..., head]).sum(dim=2)
    torch.testing.assert_close(reader(tokens), tokens[:, :, 0] + read @ reader.proj.weight.T)


@pytest.mark.parametrize("adapter", ["bottleneck", "tokens"])
def test_cached_features_give_the_same_loss(adapter: str) -> None:
    model = vivit(adapter=adapter).train()
    clips, labels = randn(3, 8, 3, 8, 8), torch.tensor([0, 1, 2])
    cache = FeatureCache(model)
    calls = []
    model.spatial.register_forward_hook(lambda *arguments: calls.append(len(arguments[1][0])))
    fresh = cache.features(["a", "b", "a"], clips[[0, 1, 0]])
    assert (calls, len(cache)) == ([2 * 4], 2)
    again = cache.features(["b", ("c", 1), "a"], clips[[1, 2, 0]])
    assert calls == [8, 4]
    torch.testing.assert_close(fresh[0], again[2], atol=0, rtol=0)
    logits = model.classify(model.from_frames(cache.features(["a", "b", ("c", 1)], clips)))
    assert calls == [8, 4]
    loss = torch.nn.functional.cross_entropy
    torch.testing.assert_close(loss(logits, labels), loss(model.logits(clips), labels))
    with pytest.raises(InputError, match="3 clips need as many keys, not 1"):
        cache.features(["a"], clips)
    with pytest.raises(InputError, match="while the spatial part is frozen"):
        FeatureCache(vivit(frozen=False))


# --- Starts ---


@pytest.mark.parametrize("how", ["central", "average"])
def test_a_vit_of_pictures_starts_the_spatial_part(how: str) -> None:
    model, vit = vivit(tubelet=2), picture_vit()
    model.inflate(vit, how)
    clip = randn(1, 4, 3, 8, 8)
    for j in range(2):
        pair = clip[:, 2 * j : 2 * j + 2]
        seen = pair[:, 1] if how == "central" else pair.mean(dim=1)
        torch.testing.assert_close(model.frame_features(clip)[:, j], vit(seen).pooled, atol=1e-5, rtol=1e-5)
    bigger = picture_vit(image_size=16)
    model.inflate(bigger, how)
    assert model.spatial.pos_embed.shape == (1, 5, 8)
    torch.testing.assert_close(model.spatial.pos_embed[:, 0], bigger.pos_embed[:, 0])


def test_starts_of_the_temporal_transformer() -> None:
    model, vit = vivit(), picture_vit()
    untouched = {key: value.clone() for key, value in model.state_dict().items()}
    model.start_temporal("random")
    assert all(torch.equal(value, untouched[key]) for key, value in model.state_dict().items())
    for donor in (None, vit):
        given = model.spatial if donor is None else donor
        model.start_temporal("image", donor)
        for own, other in zip(model.blocks, given.blocks[1:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))
        assert torch.equal(model.cls_token, given.cls_token)
        assert torch.equal(model.norm.weight, given.norm.weight)
        assert not model.pos_embed.any()
    other = vivit(seed=5, num_frames=16)
    model.start_temporal("video", other)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, other.blocks[1].mlp.fc1.weight)
    assert torch.equal(model.cls_token, other.cls_token)
    assert torch.equal(model.pos_embed[:, 0], other.pos_embed[:, 0])
    assert model.pos_embed.requires_grad
    assert model.blocks[0].attn.qkv.weight.requires_grad
    assert torch.equal(model.head.weight, untouched["head.weight"])


# --- Official files ---


def scenic_state(model: FrozenViViT, seed: int = 0) -> dict[str, Tensor]:
    """Names and shapes of a checkpoint of scenic's factorised encoder of this size."""
    d, heads, hidden = model.width, 2, 4 * model.width
    shapes: dict[str, tuple[int, ...]] = {
        "embedding/kernel": (2, 4, 4, 3, d),
        "embedding/bias": (d,),
        "output_projection/kernel": (d, 3),
        "output_projection/bias": (3,),
    }
    for part, depth, tokens in (("Spatial", 3, 4), ("Temporal", 2, 4)):
        shapes[f"cls_{part}Transformer"] = (1, 1, d)
        root = f"{part}Transformer"
        shapes[f"{root}/posembed_input/pos_embedding"] = (1, 1 + tokens, d)
        shapes |= {f"{root}/encoder_norm/{kind}": (d,) for kind in ("scale", "bias")}
        for i in range(depth):
            block = f"{root}/encoderblock_{i}"
            for norm in ("LayerNorm_0", "LayerNorm_1"):
                shapes |= {f"{block}/{norm}/{kind}": (d,) for kind in ("scale", "bias")}
            for name in ("query", "key", "value"):
                shapes[f"{block}/MultiHeadDotProductAttention_0/{name}/kernel"] = (d, heads, d // heads)
                shapes[f"{block}/MultiHeadDotProductAttention_0/{name}/bias"] = (heads, d // heads)
            shapes[f"{block}/MultiHeadDotProductAttention_0/out/kernel"] = (heads, d // heads, d)
            shapes[f"{block}/MultiHeadDotProductAttention_0/out/bias"] = (d,)
            shapes[f"{block}/MlpBlock_0/Dense_0/kernel"] = (d, hidden)
            shapes[f"{block}/MlpBlock_0/Dense_0/bias"] = (hidden,)
            shapes[f"{block}/MlpBlock_0/Dense_1/kernel"] = (hidden, d)
            shapes[f"{block}/MlpBlock_0/Dense_1/bias"] = (d,)
    return {key: randn(*shape, seed=seed + index) for index, (key, shape) in enumerate(shapes.items())}


def test_an_official_file_is_loaded(tmp_path: Path) -> None:
    model = vivit(adapter="bottleneck")
    adapter = {key: value.clone() for key, value in model.adapter.state_dict().items()}
    state = scenic_state(model)
    save_file(state, tmp_path / "vivit.safetensors")
    model.load_official(tmp_path / "vivit.safetensors")
    assert all(torch.equal(value, adapter[key]) for key, value in model.adapter.state_dict().items())
    block = "SpatialTransformer/encoderblock_1/"
    attention = block + "MultiHeadDotProductAttention_0/"
    x = randn(1, 5, 8)
    expected = [
        torch.einsum("bld,dhk->bhlk", x, state[f"{attention}{name}/kernel"]) + state[f"{attention}{name}/bias"][:, None]
        for name in ("query", "key", "value")
    ]
    for found, wanted in zip(model.spatial.blocks[1].attn.heads(x), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    mixed = torch.nn.functional.scaled_dot_product_attention(*expected)
    out = torch.einsum("bhlk,hkd->bld", mixed, state[f"{attention}out/kernel"]) + state[f"{attention}out/bias"]
    torch.testing.assert_close(model.spatial.blocks[1].attn(x), out, atol=1e-4, rtol=1e-4)
    mlp = model.spatial.blocks[1].mlp.fc1(x)
    torch.testing.assert_close(
        mlp, x @ state[f"{block}MlpBlock_0/Dense_0/kernel"] + state[f"{block}MlpBlock_0/Dense_0/bias"]
    )
    assert torch.equal(model.blocks[1].norm2.weight, state["TemporalTransformer/encoderblock_1/LayerNorm_1/scale"])
    assert torch.equal(model.norm.bias, state["TemporalTransformer/encoder_norm/bias"])
    assert torch.equal(model.cls_token, state["cls_TemporalTransformer"])
    assert torch.equal(model.spatial.pos_embed, state["SpatialTransformer/posembed_input/pos_embedding"])
    assert torch.equal(model.head.weight, state["output_projection/kernel"].T)
    clip = randn(1, 2, 3, 4, 4)
    patch = torch.einsum("btchw,thwcd->bd", clip, state["embedding/kernel"]) + state["embedding/bias"]
    torch.testing.assert_close(model.spatial.patch_embed(clip.flatten(1, 2))[:, 0], patch, atol=1e-4, rtol=1e-4)


def test_official_files_of_other_sizes(tmp_path: Path) -> None:
    model = vivit(image_size=16, num_frames=16)
    state = scenic_state(model)
    save_file(state, tmp_path / "vivit.safetensors")
    model.load_official(tmp_path / "vivit.safetensors")
    assert (model.spatial.pos_embed.shape, model.pos_embed.shape) == ((1, 17, 8), (1, 9, 8))
    model = vivit()
    for key in ("cls_TemporalTransformer", "SpatialTransformer/encoderblock_0/MultiHeadDotProductAttention_0/key/bias"):
        del state[key]
    save_file(state | {"pre_logits/bias": torch.zeros(2)}, tmp_path / "wrong.safetensors")
    with pytest.raises(InputError) as caught:
        model.load_official(tmp_path / "wrong.safetensors")
    assert "missing: cls_token; not expected: pre_logits/bias;" in str(caught.value)
    assert "spatial.blocks.0.attn.qkv.bias is [16] and should be [24]" in str(caught.value)


# --- Errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(adapter="bottle"), "unknown adapter of frozen_vivit 'bottle'.*did you mean 'bottleneck'"),
        (dict(num_frames=7), "num_frames must be a multiple of tubelet, not 7 with tubelet=2"),
        (dict(image_size=9), "multiples of 4 pixels"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vivit(**options)


def test_wrong_inputs() -> None:
    model = vivit()
    with pytest.raises(InputError, match="clips of a multiple of 2 frames, not 3"):
        model(randn(1, 3, 3, 8, 8))
    with pytest.raises(InputError, match="multiples of 4 pixels, not 8 x 9"):
        model(randn(1, 4, 3, 8, 9))
    with pytest.raises(InputError, match="unknown way to inflate"):
        model.inflate(picture_vit(), "middle")
    with pytest.raises(InputError, match=r"another width, depth or kind: .*blocks\.3"):
        model.inflate(picture_vit(depth=4))
    with pytest.raises(InputError, match="has none"):
        model.inflate(picture_vit(class_token=False))
    with pytest.raises(InputError, match="unknown source"):
        model.start_temporal("vit")
    with pytest.raises(InputError, match="a class token and 2 blocks or more"):
        model.start_temporal("image", picture_vit(depth=1))
    with pytest.raises(InputError, match="needs a ViViT with temporal layers"):
        model.start_temporal("video", picture_vit())
    with pytest.raises(InputError, match="nothing to start"):
        vivit(temporal_depth=0).start_temporal("image")
    with pytest.raises(InputError, match="another width"):
        model.start_temporal("image", picture_vit(width=16))
