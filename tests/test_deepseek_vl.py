"""DeepSeek-VL's hybrid encoder: transformers' `deepseek_vl_hybrid`, attention against loops, the skip, sizes, names."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DeepseekVLHybridConfig, DeepseekVLHybridModel, SamVisionConfig, SiglipVisionConfig

from sightline.encoders.deepseek_vl import DecomposedAttention, DeepSeekHybrid, relative_table
from sightline.encoders.encoder import MacCounter, count_macs, count_parameters, create_encoder
from sightline.errors import InputError

CLIP = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])[..., None, None]
WINDOWED = dict(downsamples=(32, 64), low_width=48)
"""transformers' downsamples are twice and four times the neck's width."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def used(module: nn.Module, seed: int = 0) -> Any:
    """The module in float64 and eval mode, with no parameter left at its start."""
    generator = torch.Generator().manual_seed(seed)
    module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return module


def nano(**options: Any) -> Any:
    return used(create_encoder("deepseek_vl_hybrid_nano", **options))


def normalised(pixels: Tensor, low_size: int) -> tuple[Tensor, Tensor]:
    """What the two towers read of a picture in [0, 1]."""
    low = pixels
    if pixels.shape[-2:] != (low_size, low_size):
        low = F.interpolate(pixels, size=(low_size, low_size), mode="bilinear", antialias=True, align_corners=False)
    return (pixels - CLIP[0].double()) / CLIP[1].double(), (low - 0.5) / 0.5


# --- Against transformers ---


def theirs() -> Any:
    high = SamVisionConfig(
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
        window_size=3,
        global_attn_indexes=[1, 3],
        mlp_dim=128,
    )
    low = SiglipVisionConfig(
        hidden_size=48,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=16,
        patch_size=4,
        hidden_act="gelu",
        vision_use_head=False,
    )
    text = dict(
        model_type="llama",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=8,
    )
    config = DeepseekVLHybridConfig(
        text_config=text, vision_config=low.to_dict(), high_res_vision_config=high.to_dict(), image_token_id=7
    )
    return used(DeepseekVLHybridModel(config), seed=1)


RENAMED = (
    ("high_res_vision_model.vision_encoder.", "high."),
    ("high_res_vision_neck.", "high.neck_hd."),
    ("high_res_vision_proj.conv1.", "high.downsamples.0."),
    ("high_res_vision_proj.conv2.", "high.downsamples.1."),
    ("high_res_vision_alpha", "high.hd_alpha_downsamples"),
    ("vision_model.", "low."),
    (".patch_embed.projection.", ".patch_embed.proj."),
    (".embeddings.patch_embedding.", ".patch_embed.proj."),
    (".embeddings.position_embedding.weight", ".pos_embed"),
    (".encoder.layers.", ".blocks."),
    (".layers.", ".blocks."),
    (".self_attn.out_proj.", ".attn.proj."),
    (".post_layernorm.", ".norm."),
    (".mlp.lin1.", ".mlp.fc1."),
    (".mlp.lin2.", ".mlp.fc2."),
    ("neck.conv1.", "neck.0."),
    ("neck.layer_norm1.", "neck.1."),
    ("neck.conv2.", "neck.2."),
    ("neck.layer_norm2.", "neck.3."),
    ("neck_hd.conv1.", "neck_hd.0."),
    ("neck_hd.layer_norm1.", "neck_hd.1."),
    ("neck_hd.conv2.", "neck_hd.2."),
    ("neck_hd.layer_norm2.", "neck_hd.3."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
)


def ours_of(model: Any) -> dict[str, Tensor]:
    """transformers' towers under this library's names."""
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith(("aligner.", "language_model.")):
            continue
        for before, after in RENAMED:
            key = key.replace(before, after, 1)
        state[key] = value.reshape(1, -1, value.shape[-1]) if key.endswith("pos_embed") else value
    for key in [key for key in state if ".self_attn.q_proj." in key]:
        parts = [state.pop(key.replace("q_proj", name)) for name in ("q_proj", "k_proj", "v_proj")]
        state[key.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
    return state


@torch.no_grad()
def test_both_towers_are_those_of_transformers() -> None:
    model = theirs()
    encoder = create_encoder("deepseek_vl_hybrid_nano", **WINDOWED).double().eval()
    encoder.load_state_dict(ours_of(model))
    pixels = numbers(2, 3, 32, 32)
    high, low = normalised(pixels, 16)
    expected = model.get_image_features(pixel_values=low, high_res_pixel_values=high, return_dict=True)
    features = encoder(pixels)
    assert features.grid == (4, 4)
    assert features.tokens.shape == (2, 16, 64 + 48)
    close = dict(atol=1e-6, rtol=1e-5)  # their softmax and resizing are in single precision
    torch.testing.assert_close(features.tokens[..., :64], expected.high_res_vision_last_hidden_state, **close)
    torch.testing.assert_close(features.tokens[..., 64:], expected.last_hidden_state, **close)
    torch.testing.assert_close(features.maps[0].flatten(2).mT, features.tokens)
    torch.testing.assert_close(features.pooled, features.tokens.mean(dim=1))


# --- The attention ---


@torch.no_grad()
@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (5, 1)])
def test_decomposed_positions_by_loops(grid: tuple[int, int]) -> None:
    attention = used(DecomposedAttention(6, 2, grid))
    x = numbers(1, math.prod(grid), 6)
    query, key, value = (x @ attention.qkv.weight.T + attention.qkv.bias)[0].chunk(3, dim=-1)
    places = list(itertools.product(range(grid[0]), range(grid[1])))
    mixed = torch.zeros_like(value)
    for head in (slice(0, 3), slice(3, 6)):
        for at, (row, column) in enumerate(places):
            scores = []
            for other, (row_k, column_k) in enumerate(places):
                score = query[at, head] @ key[other, head] / math.sqrt(3)
                score = score + query[at, head] @ attention.rel_pos_h[row - row_k + grid[0] - 1]
                scores.append(score + query[at, head] @ attention.rel_pos_w[column - column_k + grid[1] - 1])
            mixed[at, head] = torch.softmax(torch.stack(scores), 0) @ value[:, head]
    expected = mixed @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x, grid)[0], expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(6, 6), (7, 5), (3, 4), (2, 2)])
def test_windows_are_maps_of_their_own_padded_with_zeros(grid: tuple[int, int]) -> None:
    attention = used(DecomposedAttention(6, 2, grid, window=3))
    x = numbers(2, math.prod(grid), 6)
    rows, columns = -(-grid[0] // 3) * 3, -(-grid[1] // 3) * 3
    image = torch.zeros(2, rows, columns, 6, dtype=torch.float64)
    image[:, : grid[0], : grid[1]] = x.unflatten(1, grid)
    out = torch.zeros_like(image)
    for top, left in itertools.product(range(0, rows, 3), range(0, columns, 3)):
        tile = (slice(None), slice(top, top + 3), slice(left, left + 3))
        out[tile] = attention.attend(image[tile])
    expected = out[:, : grid[0], : grid[1]].flatten(1, 2)
    torch.testing.assert_close(attention(x, grid), expected, atol=1e-12, rtol=1e-12)


def test_relative_tables_of_another_size_are_interpolated() -> None:
    table = torch.arange(7.0)[:, None] * torch.tensor([[1.0, -2.0]])
    assert torch.equal(relative_table(table, 4)[3, 0], table[6])
    assert torch.equal(relative_table(table, 4)[0, 3], table[0])
    resized = relative_table(table, 6)
    assert resized.shape == (6, 6, 2)
    torch.testing.assert_close(resized[2, 2], table[3])  # the middle stays the middle
    expected = F.interpolate(table.T[None], size=11, mode="linear")[0].T
    torch.testing.assert_close(resized[5, 1], expected[9])


def test_the_gradients_of_the_attention() -> None:
    attention = used(DecomposedAttention(4, 2, (3, 3), window=2))
    inputs = [numbers(1, 9, 4).requires_grad_(), *attention.parameters()]
    assert torch.autograd.gradcheck(lambda x, *_: attention(x, (3, 3)), inputs)


def test_multiply_adds() -> None:
    x = torch.empty(2, 35, 6)
    assert DecomposedAttention(6, 2, (7, 5)).mixing_macs(x, (7, 5)) == 2 * 35 * (2 * 35 + 12) * 6
    assert DecomposedAttention(6, 2, (7, 5), window=3).mixing_macs(x, (7, 5)) == 2 * 6 * 9 * (2 * 9 + 6) * 6


# --- The two branches ---


@torch.no_grad()
def test_alpha_zero_is_the_path_without_the_skip() -> None:
    started = create_encoder("deepseek_vl_hybrid_nano").eval()
    assert started.high.hd_alpha_downsamples.tolist() == [0.0]
    for own, first in zip(started.high.neck_hd.parameters(), started.high.neck.parameters(), strict=True):
        assert torch.equal(own, first)
    encoder, without = nano(), nano(hd=False)
    shared = {key: value for key, value in encoder.state_dict().items() if key in without.state_dict()}
    assert len(encoder.state_dict()) - len(shared) == 7  # the neck's six, and alpha
    without.load_state_dict(shared)
    pixels = numbers(1, 3, 32, 32)
    skipping = encoder(pixels).tokens
    encoder.high.hd_alpha_downsamples.zero_()
    assert torch.equal(encoder(pixels).tokens, without(pixels).tokens)
    assert not torch.allclose(skipping, without(pixels).tokens)


@torch.no_grad()
def test_the_skip_starts_at_the_first_global_block() -> None:
    encoder = nano()
    high, _ = normalised(numbers(1, 3, 32, 32), 16)
    states: list[Tensor] = []
    out = encoder.high(high, states)
    assert len(states) == 5

    def reduced(neck: nn.Module, tokens: Tensor) -> Tensor:
        image = neck(tokens.mT.unflatten(2, (8, 8)))
        return encoder.high.downsamples(F.interpolate(image, size=(16, 16), mode="bilinear", align_corners=False))

    alpha = encoder.high.hd_alpha_downsamples
    expected = reduced(encoder.high.neck, states[4]) + alpha * reduced(encoder.high.neck_hd, states[2])
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_each_half_of_a_token_comes_from_its_own_branch() -> None:
    encoder = nano()
    pixels = numbers(2, 3, 48, 40)
    features = encoder(pixels, hidden_states=True)
    high, low = normalised(pixels, 16)
    torch.testing.assert_close(features.tokens[..., :48], encoder.high(high, None).flatten(2).mT)
    torch.testing.assert_close(features.tokens[..., 48:], encoder.low.encode(low, False).tokens)
    assert [tuple(state.shape[1:]) for state in features.hidden_states] == [(120, 32)] * 5 + [(16, 48)] * 4
    # Where the sizes are those of the low branch nothing is resized.
    same = numbers(1, 3, 16, 16)
    torch.testing.assert_close(encoder(same).tokens[..., 48:], encoder.low.encode((same - 0.5) / 0.5, False).tokens)
    grey = nano(in_chans=1)
    assert grey.high_mean.flatten().tolist() == pytest.approx([CLIP[0].mean().item()])
    assert grey(numbers(1, 1, 32, 32)).tokens.shape == (1, 16, 96)


def test_only_necks_downsamples_and_alpha_train_as_released() -> None:
    with torch.device("meta"):
        encoder = create_encoder("deepseek_vl_hybrid")
    assert isinstance(encoder, DeepSeekHybrid)
    encoder.freeze_as_released()
    free = sum(parameter.numel() for parameter in encoder.high.parameters() if parameter.requires_grad)
    assert free == pytest.approx(7.47e6, rel=1e-3)
    assert all(parameter.requires_grad for parameter in encoder.low.parameters())


# --- Counts and sizes ---


def test_the_parameters_of_the_published_encoder() -> None:
    with torch.device("meta"):
        encoder = create_encoder("deepseek_vl_hybrid").eval()
    assert isinstance(encoder, DeepSeekHybrid)
    assert count_parameters(encoder.high) == pytest.approx(96.36e6, rel=5e-3)
    assert count_parameters(encoder.low) == pytest.approx(316.3e6 - 12.6e6, rel=5e-3)  # without the unread pooling
    assert encoder.high.neck_hd is not None
    for part, count in (
        (encoder.high.neck, 0.787e6),
        (encoder.high.neck_hd, 0.787e6),
        (encoder.high.downsamples, 5.9e6),
    ):
        assert count_parameters(part) == pytest.approx(count, rel=5e-3)
    assert 50_000 < count_parameters(create_encoder("deepseek_vl_hybrid_nano")) < 300_000
    for size in ((1024, 1024), (384, 384), (512, 768)):
        with torch.no_grad(), MacCounter(encoder) as counter:
            features = encoder(torch.empty(1, 3, *size, device="meta"))
        assert features.tokens.shape == (1, 576, 2048)
        assert features.grid == (24, 24)
        if size == (1024, 1024):
            # Windows of 14 pad 64 x 64 patches to 70 x 70.
            maps = 12 * 4096 * 8 * 768**2 + (4 * 4096 + 8 * 4900) * 4 * 768**2 + 4096 * 768**2
            attention = 4 * 4096 * (2 * 4096 + 128) * 768 + 8 * 4900 * (2 * 196 + 28) * 768
            after = 4096 * (768 * 256 + 9 * 256**2) + 48**2 * 9 * 256 * 512 + 24**2 * 9 * 512 * 1024
            low = 576 * 768 * 1024 + 24 * 576 * (12 * 1024**2 + 2 * 576 * 1024)
            assert counter.macs == maps + attention + 2 * after + low
    assert count_macs("deepseek_vl_hybrid_nano") > 0


@torch.no_grad()
def test_another_size_is_what_an_encoder_built_for_it_gives_with_resized_tables() -> None:
    encoder = nano()
    built = create_encoder("deepseek_vl_hybrid_nano", image_size=(48, 40)).double().eval()
    assert isinstance(built, DeepSeekHybrid)
    state = {
        f"vision_tower_{key.replace('.', '.vision_tower.', 1)}": value for key, value in encoder.state_dict().items()
    }
    renamed = {built.our_key(key): value for key, value in built.adapt_official(state).items()}
    assert renamed["high.pos_embed"].shape == (1, 120, 32)
    assert renamed["high.blocks.1.attn.rel_pos_h"].shape == (23, 16)
    assert renamed["high.blocks.0.attn.rel_pos_h"].shape == (5, 16)
    built.load_state_dict(renamed)
    pixels = numbers(2, 3, 48, 40)
    torch.testing.assert_close(built(pixels).tokens, encoder(pixels).tokens, atol=1e-12, rtol=1e-12)


# --- Official checkpoints ---


def official() -> dict[str, Tensor]:
    """The nano encoder's state dict with the names and shapes of the official code, within a whole model."""
    shapes: dict[str, tuple[int, ...]] = {}
    towers = (
        ("vision_tower_high", 32, 4, ("mlp.lin1", "mlp.lin2")),
        ("vision_tower_low", 48, 3, ("mlp.fc1", "mlp.fc2")),
    )
    for tower, width, depth, (first, second) in towers:
        at = f"vision_model.{tower}.vision_tower"
        shapes |= {f"{at}.patch_embed.proj.weight": (width, 3, 4, 4), f"{at}.patch_embed.proj.bias": (width,)}
        shapes[f"{at}.pos_embed"] = (1, 8, 8, width) if tower.endswith("high") else (1, 16, width)
        for block in range(depth):
            inside = f"{at}.blocks.{block}"
            for norm in ("norm1", "norm2"):
                shapes |= {f"{inside}.{norm}.weight": (width,), f"{inside}.{norm}.bias": (width,)}
            maps = (("attn.qkv", 3, 1), ("attn.proj", 1, 1), (first, 4, 1), (second, 1, 4))
            for name, after, before in maps:
                shapes |= {f"{inside}.{name}.weight": (after * width, before * width)}
                shapes |= {f"{inside}.{name}.bias": (after * width,)}
            if tower.endswith("high"):
                side = 8 if block in (1, 3) else 3
                shapes |= {f"{inside}.attn.rel_pos_{axis}": (2 * side - 1, 16) for axis in "hw"}
    at = "vision_model.vision_tower_high.vision_tower"
    for neck in ("neck", "neck_hd"):
        shapes |= {f"{at}.{neck}.0.weight": (16, 32, 1, 1), f"{at}.{neck}.2.weight": (16, 16, 3, 3)}
        shapes |= {f"{at}.{neck}.{norm}.{name}": (16,) for norm in (1, 3) for name in ("weight", "bias")}
    shapes |= {f"{at}.downsamples.0.weight": (32, 16, 3, 3), f"{at}.downsamples.1.weight": (48, 32, 3, 3)}
    shapes[f"{at}.hd_alpha_downsamples"] = (1,)
    at = "vision_model.vision_tower_low.vision_tower"
    shapes |= {f"{at}.norm.weight": (48,), f"{at}.norm.bias": (48,)}
    shapes |= {f"{at}.attn_pool.latent": (1, 1, 48), f"{at}.attn_pool.q.weight": (48, 48)}
    shapes |= {f"vision_model.{which}_layer_norm.weight": (48,) for which in ("high", "low")}
    shapes |= {"aligner.high_up_proj.weight": (4, 48), "language_model.lm_head.weight": (2, 4)}
    generator = torch.Generator().manual_seed(3)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def test_official_checkpoints(tmp_path: Path) -> None:
    given = official()
    save_file(given, tmp_path / "official.safetensors")
    encoder = create_encoder("deepseek_vl_hybrid_nano")
    assert isinstance(encoder, DeepSeekHybrid)
    encoder.load_official(tmp_path / "official.safetensors")
    high, low = (f"vision_model.vision_tower_{which}.vision_tower" for which in ("high", "low"))
    assert torch.equal(encoder.high.pos_embed[0], given[f"{high}.pos_embed"].flatten(1, 2)[0])
    assert torch.equal(encoder.low.pos_embed, given[f"{low}.pos_embed"])
    assert torch.equal(encoder.high.blocks[1].attn.rel_pos_w, given[f"{high}.blocks.1.attn.rel_pos_w"])
    assert torch.equal(encoder.high.blocks[2].mlp.fc2.weight, given[f"{high}.blocks.2.mlp.lin2.weight"])
    assert torch.equal(encoder.low.blocks[2].mlp.fc2.weight, given[f"{low}.blocks.2.mlp.fc2.weight"])
    assert torch.equal(encoder.high.hd_alpha_downsamples, given[f"{high}.hd_alpha_downsamples"])
    assert torch.equal(encoder.high.neck_hd[2].weight, given[f"{high}.neck_hd.2.weight"])
    create_encoder("deepseek_vl_hybrid_nano", hd=False).load_official(tmp_path / "official.safetensors")

    del given[f"{high}.downsamples.1.weight"], given[f"{low}.norm.bias"]
    given[f"{low}.cls_token"] = torch.zeros(1)
    save_file(given, tmp_path / "broken.safetensors")
    wrong = r"missing: high\.downsamples\.1\.weight, low\.norm\.bias; not expected: low\.cls_token$"
    with pytest.raises(InputError, match=wrong):
        encoder.load_official(tmp_path / "broken.safetensors")


# --- Errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(image_size=30), "DeepSeek-VL's high branch takes .* multiples of 4 pixels, not 30 x 30"),
        (dict(low_size=18), "DeepSeek-VL's low branch takes .* multiples of 4 pixels, not 18 x 18"),
        (dict(global_layers=(1, 4)), r"global_layers must be numbers of blocks from 0 to 3, .*not \(1, 4\)"),
        (dict(global_layers=()), r"at least one with hd, not \(\)"),
        (dict(high_heads=5), "the width 32 cannot be shared by 5 heads"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_encoder("deepseek_vl_hybrid_nano", **options)


def test_bad_pictures() -> None:
    encoder = create_encoder("deepseek_vl_hybrid_nano")
    with pytest.raises(InputError, match="sides are multiples of 4 pixels, not 30 x 32; the nearest size is 32 x 32"):
        encoder(torch.zeros(1, 3, 30, 32))
