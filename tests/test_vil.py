"""Vision-LSTM: counts of the published sizes, directions and pooling by hand, official keys, sizes of pictures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.encoder import count_macs, count_parameters, create_encoder, list_encoders
from sightline.encoders.vil import ViL
from sightline.errors import InputError


def noisy(name: str, **settings: object) -> ViL:
    """An encoder in float64 whose norms, gates and head are not at their start."""
    torch.manual_seed(0)
    made = create_encoder(name, **settings).double().eval()  # type: ignore[arg-type]
    assert isinstance(made, ViL)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vil_tiny", 6.09),
        ("vil_small", 22.8),
        ("vil_base", 88.1),
        ("vil2_tiny", 6.39),
        ("vil2_small", 23.4),
        ("vil2_base", 89.3),
    ],
)
def test_parameters_of_the_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        made = create_encoder(name, num_classes=1000)
    assert count_parameters(made) / 1e6 == pytest.approx(millions, rel=0.005)


def test_the_names() -> None:
    assert set(ViL.configs) == set(list_encoders("vil_*") + list_encoders("vil2_*"))
    for name in ("vil_nano", "vil2_nano"):
        assert 50_000 < count_parameters(create_encoder(name)) < 300_000


def test_multiply_adds_by_hand() -> None:
    # The first version's small size at 32 x 32: 64 tokens of 48, inner width 96 in 4 heads of 24, chunks of 32.
    layer = 48 * 192 + 96 * 4 + 3 * 96 * 4 + 2 * 2 * 96 * 4 + 2 * 32 * 96 + 2 * 24 * 96 + 96 * 48
    assert count_macs("vil_nano") == 64 * (3 * 16 * 48 + 4 * layer) + 48 * 1000
    # The second: a kernel of 3 x 3 instead of 4, and a head on both ends.
    assert count_macs("vil2_nano") == 64 * (3 * 16 * 48 + 4 * (layer + 5 * 96)) + 96 * 1000


def normed(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def test_the_first_version_step_by_step() -> None:
    made = noisy("vil_nano", num_classes=5)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    features = made(pixels, hidden_states=True)
    patches = F.conv2d(pixels, made.patch_embed.proj.weight, made.patch_embed.proj.bias, stride=4).flatten(2).mT
    x = patches + made.pos_embed
    for index, block in enumerate(made.blocks):
        torch.testing.assert_close(features.hidden_states[index], x)
        inside = normed(x, 1 + block.norm.weight)
        # Every second layer sees the tokens the other way round.
        assert block.layer.reverse is (index % 2 == 1)
        block.layer.reverse = False
        mixed = block.layer(inside.flip(1), ()).flip(1) if index % 2 else block.layer(inside, ())
        block.layer.reverse = index % 2 == 1
        x = x + mixed
    torch.testing.assert_close(features.hidden_states[-1], x)
    x = normed(x, 1 + made.legacy_norm.weight)
    torch.testing.assert_close(features.tokens, normed(x, made.norm.weight, made.norm.bias, 1e-6))
    # The ends are averaged before the norm.
    pooled = normed((x[:, 0] + x[:, -1]) / 2, made.norm.weight, made.norm.bias, 1e-6)
    torch.testing.assert_close(features.pooled, pooled)
    torch.testing.assert_close(made.logits(pixels), F.linear(pooled, made.head.weight, made.head.bias))
    assert features.grid == (8, 8)
    torch.testing.assert_close(features.maps[0][:, :, 2, 3], features.tokens[:, 2 * 8 + 3])


def test_the_second_version_step_by_step() -> None:
    made = noisy("vil2_nano", num_classes=5)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    features = made(pixels, hidden_states=True)
    x = features.hidden_states[0]
    for index, pair in enumerate(made.blocks):
        blocks = (pair.rowwise_from_top_left, pair.rowwise_from_bot_right)
        assert [block.layer.reverse for block in blocks] == [False, True]
        for block in blocks:
            x = x + block.layer(normed(x, 1 + block.norm.weight, block.norm.bias), (8, 8))
        torch.testing.assert_close(features.hidden_states[index + 1], x)
    x = normed(x, 1 + made.norm.weight, made.norm.bias, 1e-6)
    torch.testing.assert_close(features.tokens, x)
    torch.testing.assert_close(features.pooled, torch.cat([x[:, 0], x[:, -1]], dim=-1))
    assert made.logits(pixels).shape == (2, 5)
    assert len(features.hidden_states) == 3


@pytest.mark.parametrize("name", ["vil_nano", "vil2_nano"])
def test_information_reaches_every_token(name: str) -> None:
    # Two directions: the last patch changes the first token and the other way round.
    torch.manual_seed(0)
    made = create_encoder(name).double()
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for corner in ((slice(0, 4), slice(0, 4)), (slice(28, 32), slice(28, 32))):
        other = pixels.clone()
        other[:, :, corner[0], corner[1]] += 1
        assert ((made(other).tokens - made(pixels).tokens).abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize("name", ["vil_nano", "vil2_nano"])
@pytest.mark.parametrize("size", [(224, 224), (384, 224), (4, 12)])
def test_other_sizes(name: str, size: tuple[int, int]) -> None:
    made = create_encoder(name).to("meta")
    features = made(torch.empty(1, 3, *size, device="meta"))
    assert features.grid == (size[0] // 4, size[1] // 4)
    assert features.tokens.shape == (1, features.grid[0] * features.grid[1], 48)


def official_state(made: ViL, *, first_names: bool = False) -> dict[str, Tensor]:
    """The weights under the names of the official code, or under those of the first version's published files."""
    state: dict[str, Tensor] = {}
    for key, value in made.state_dict().items():
        if key == "pos_embed":
            key, value = "pos_embed.embed", value.unflatten(1, made.grid)
        if made.version == 1:
            key = key.replace("layer.conv.", "layer.conv1d.conv.")
        key = re.sub(r"layer\.(igate|fgate|outnorm)", r"layer.mlstm_cell.\1", key)
        if first_names:
            key = key.replace("legacy_norm.", "post_blocks_norm.")
            key = re.sub(r"^head\.", "head.1.", key)
            key = re.sub(r"^norm\.", "head.0.", key)
            key = re.sub(r"^(blocks\.\d+)\.norm\.", r"\1.xlstm_norm.", key)
            key = re.sub(r"^(blocks\.\d+)\.layer\.", r"\1.xlstm.", key)
        state[key] = value.float().contiguous()
    return state


@pytest.mark.parametrize(("name", "first_names"), [("vil_nano", False), ("vil_nano", True), ("vil2_nano", False)])
def test_official_weights(tmp_path: Path, name: str, first_names: bool) -> None:
    source = noisy(name, num_classes=5).float()
    state = official_state(source, first_names=first_names)
    if not first_names:
        block = "blocks.1." if name == "vil_nano" else "blocks.1.rowwise_from_bot_right."
        conv = "layer.conv1d.conv.weight" if name == "vil_nano" else "layer.conv.weight"
        expected = {
            "norm.weight": [48],
            "layer.proj_up.weight": [192, 48],
            "layer.q_proj.weight": [24, 4, 4],
            "layer.k_proj.weight": [24, 4, 4],
            "layer.v_proj.weight": [24, 4, 4],
            conv: [96, 1, 4] if name == "vil_nano" else [96, 1, 3, 3],
            "layer.mlstm_cell.igate.weight": [4, 288],
            "layer.mlstm_cell.fgate.bias": [4],
            "layer.mlstm_cell.outnorm.weight": [96],
            "layer.learnable_skip": [96],
            "layer.proj_down.weight": [48, 96],
        }
        assert {key: list(state[block + key].shape) for key in expected} == expected
        assert list(state["pos_embed.embed"].shape) == [1, 8, 8, 48]
    path = tmp_path / "official.safetensors"
    save_file(state, path)
    made = create_encoder(name, num_classes=5)
    made.load_official(path)
    for key, value in made.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key
    # Without a head the official one is left out; another grid takes a resized table.
    larger = create_encoder(name, image_size=(32, 48))
    larger.load_official(path)
    assert larger(torch.zeros(1, 3, 32, 48)).grid == (8, 12)
    del state[next(key for key in state if "q_proj" in key)]
    save_file({**state, "other": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"missing: blocks\.0\..*q_proj\.weight; not expected: other"):
        made.load_official(path)


def test_what_it_does_not_take() -> None:
    with pytest.raises(InputError, match="version must be 1 or 2, not 3"):
        ViL(version=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="width of ViL must be a multiple of its 4 heads, not 50"):
        ViL(width=50)
    with pytest.raises(InputError, match="multiples of 4 pixels, not 30 x 32"):
        create_encoder("vil_nano")(torch.zeros(1, 3, 30, 32))
