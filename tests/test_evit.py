"""EViT: counts of the paper, equality with the ViT, and a slow reorganisation that goes picture by picture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sightline.encoders.encoder import count_macs, count_parameters, create_encoder
from sightline.encoders.evit import FUSED, EViT, KeptFeatures, keep_rate
from sightline.errors import InputError

TABLE = {
    1.0: ((196, 196, 196), 4.6, 17.56),
    0.9: ((178, 162, 147), 4.02, 15.40),
    0.8: ((158, 128, 104), 3.48, 13.33),
    0.7: ((139, 99, 71), 3.03, 11.61),
    0.6: ((119, 73, 45), 2.64, 10.09),
    0.5: ((99, 51, 27), 2.31, 8.82),
}


def nano(**settings: object) -> EViT:
    torch.manual_seed(0)
    encoder = create_encoder("evit_nano", **{"width": 32, "num_heads": 4, "image_size": (20, 28), **settings}).eval()
    for block in encoder.blocks:  # attention that is far from even, so that the choice of tokens is clear
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.4)
    assert isinstance(encoder, EViT)
    return encoder


def pixels(batch: int, *size: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "millions"), [("evit_small", 22.05), ("evit_base", 86.57)])
def test_parameters_are_those_of_deit(name: str, millions: float) -> None:
    with torch.device("meta"):
        encoder = create_encoder(name, num_classes=1000)
    assert count_parameters(encoder) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("keep", TABLE)
def test_counts_of_the_paper(keep: float) -> None:
    tokens, small, base = TABLE[keep]
    with torch.device("meta"):
        assert create_encoder("evit_small", keep=keep).token_counts(196) == tokens
    assert count_macs("evit_small", keep=keep) / 1e9 == pytest.approx(small, rel=0.005)
    assert count_macs("evit_base", keep=keep) / 1e9 == pytest.approx(base, rel=0.005)


def test_counts_without_fusion() -> None:
    with torch.device("meta"):
        encoder = create_encoder("evit_small", keep=0.7, fuse=False).eval()
        assert encoder.token_counts(196) == (138, 97, 68)
        features = encoder(torch.empty(1, 3, 224, 224), hidden_states=True)
    assert [state.shape[1] for state in features.hidden_states] == [196] * 4 + [138] * 3 + [97] * 3 + [68] * 3


def test_a_rate_of_one_is_the_vit_bit_for_bit() -> None:
    encoder = nano(num_classes=5, keep=1.0, image_size=32)
    plain = create_encoder("vit_nano", width=32, num_heads=4, num_classes=5).eval()
    plain.load_state_dict(encoder.state_dict())
    given = pixels(2, 24, 40)
    got, want = encoder(given, hidden_states=True), plain(given, hidden_states=True)
    assert torch.equal(encoder.logits(given), plain.logits(given))
    assert got.grid == want.grid == (6, 10)
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(got.maps[0], want.maps[0])
    assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, want.hidden_states, strict=True))
    assert torch.equal(got.kept, torch.arange(60).expand(2, -1))


def slow(encoder: EViT, picture: Tensor) -> tuple[Tensor, list[Tensor], list[object]]:
    """Class feature, the other tokens and what they are, as the official code has it: kept tokens by falling attention,
    the complement in rising order, one picture at a time."""
    x, _ = encoder.embed(picture[None])
    x = x[0]
    names: list[object] = list(range(len(x) - 1))
    for index, block in enumerate(encoder.blocks):
        heads = encoder.num_heads
        query, key, value = block.attn.qkv(block.norm1(x)).reshape(len(x), 3, heads, -1).unbind(1)
        weights = torch.einsum("ihd,jhd->hij", query, key).div(math.sqrt(query.shape[-1])).softmax(-1)
        x = x + block.attn.proj(torch.einsum("hij,jhd->ihd", weights, value).reshape(len(x), -1))
        if index in encoder.locations:
            rate = encoder.keep[encoder.locations.index(index)]
            count = math.ceil(rate * (len(x) - 1))
            if count < len(x) - 1:
                a = [sum(weights[head, 0, 1 + i] for head in range(heads)) / heads for i in range(len(x) - 1)]
                order = sorted(range(len(x) - 1), key=lambda i: -float(a[i].detach()))
                rest = sorted(order[count:])
                parts = [x[0], *(x[1 + i] for i in order[:count])]
                new: list[object] = [names[i] for i in order[:count]]
                if encoder.fuse:
                    parts.append(sum(a[i] * x[1 + i] for i in rest))
                    new.append(FUSED)
                x, names = torch.stack(parts), new
        x = x + block.mlp(block.norm2(x))
    x = encoder.norm(x)
    return x[0], list(x[1:]), names


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("keep", [(0.5, 0.6, 0.7), (0.9, 1.0, 0.3)])
def test_equals_the_slow_reorganisation(keep: tuple[float, ...], fuse: bool) -> None:
    encoder = nano(keep=keep, fuse=fuse).double()
    given = pixels(3, 20, 28).double()
    features = encoder(given)
    assert isinstance(features, KeptFeatures)
    for row, picture in enumerate(given):
        pooled, tokens, names = slow(encoder, picture)
        torch.testing.assert_close(features.pooled[row], pooled, rtol=0, atol=1e-10)
        # Raster order, then the fused tokens; the slow way has them by weight, the newest fused token last.
        patches = sorted(name for name in names if name != FUSED)
        fused = [token for token, name in zip(tokens, names, strict=True) if name == FUSED]
        assert features.kept[row].tolist() == patches + [FUSED] * len(fused)
        by_name = {name: token for token, name in zip(tokens, names, strict=True) if name != FUSED}
        for place, name in enumerate(patches):
            torch.testing.assert_close(features.tokens[row, place], by_name[name], rtol=0, atol=1e-10)
        for token in fused:
            gaps = (features.tokens[row, len(patches) :] - token).abs().amax(dim=-1)
            assert float(gaps.detach().min()) < 1e-10


def test_gradients_equal_the_slow_ones_and_flow_through_the_weights() -> None:
    encoder = nano(keep=0.5).double()
    picture = pixels(1, 20, 28).double()

    def gradients(pooled: Tensor) -> list[Tensor]:
        parameters = [block.attn.qkv.weight for block in encoder.blocks] + [encoder.pos_embed]
        return list(torch.autograd.grad(pooled.square().sum(), parameters))

    for got, want in zip(gradients(encoder(picture).pooled[0]), gradients(slow(encoder, picture[0])[0]), strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_a_block_follows_a_permutation_of_its_patches() -> None:
    encoder = nano().double()
    block = encoder.blocks[1]
    x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(3)).double()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(4))
    numbers = torch.arange(11).expand(2, -1)
    out, kept = block(x, (1, 11), numbers, 4)
    turned, turned_kept = block(torch.cat([x[:, :1], x[:, 1:][:, order]], dim=1), (1, 11), numbers[:, order], 4)
    torch.testing.assert_close(turned[:, 0], out[:, 0])
    torch.testing.assert_close(turned[:, -1], out[:, -1])
    for row in range(2):
        assert set(kept[row].tolist()) == set(turned_kept[row].tolist())
        assert len(set(kept[row].tolist())) == 5  # four patches and the fused token


def test_the_grid_says_whether_patches_are_missing() -> None:
    assert nano(keep=0.999)(pixels(1, 20, 28)).grid == (5, 7)  # ceil(0.999 * 35) = 35: nothing is left out
    encoder = nano(keep=(0.97, 1.0, 1.0))
    features = encoder(pixels(1, 20, 28))  # one patch is fused alone: as many tokens as before, but not the same ones
    assert features.grid == (1, 35)
    assert features.maps[0].shape == (1, 32, 1, 35)
    assert FUSED in features.kept


def test_keep_can_be_set_between_steps() -> None:
    encoder = nano()
    encoder.keep = 0.5
    assert encoder(pixels(1, 20, 28)).tokens.shape[1] == encoder.token_counts(35)[-1] == 7
    encoder.keep = [1.0, 0.5, 1.0]
    assert encoder.token_counts(35) == (35, 19, 19)
    with torch.device("meta"):
        assert create_encoder("evit_small", image_size=384, keep=0.5).eval()(torch.empty(1, 3, 304, 384)).grid[0] == 1


def test_schedule() -> None:
    rates = [keep_rate(step, keep=0.6, start=10, length=20) for step in range(40)]
    assert rates[:11] == [1.0] * 11
    assert rates[20] == pytest.approx(0.8)
    assert rates[15] == pytest.approx(0.6 + 0.4 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[30:] == [0.6] * 10
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "keep must be a rate above 0 and at most 1"),
        ({"keep": 1.5}, "keep must be a rate above 0"),
        ({"keep": (0.5, 0.5)}, "one for each of the 3 locations"),
        ({"locations": (1, 4)}, "locations must be different blocks from 0 to 3"),
        ({"locations": (1, 1)}, "locations must be different blocks"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_encoder("evit_nano", **settings)


def test_bad_schedule() -> None:
    with pytest.raises(InputError, match="keep must be above 0"):
        keep_rate(0, keep=0.0, start=0, length=1)


def official(depth: int, width: int, tokens: int, classes: int) -> dict[str, Tensor]:
    """A checkpoint in the names of timm's DeiT, which the official code keeps."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + tokens, width),
        "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (classes, width),
        "head.bias": (classes,),
    }
    for index in range(depth):
        for name, shape in {
            "norm1": (width,),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "norm2": (width,),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }.items():
            shapes[f"blocks.{index}.{name}.weight"] = shape
            shapes[f"blocks.{index}.{name}.bias"] = shape[:1]
    generator = torch.Generator().manual_seed(5)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def test_official_checkpoint(tmp_path: Path) -> None:
    state = official(4, 32, 64, 5)
    save_file(state, tmp_path / "evit.safetensors")
    encoder = nano(num_classes=5, image_size=32)
    encoder.load_official(tmp_path / "evit.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
    other = nano(num_classes=5, image_size=(16, 24))
    other.load_official(tmp_path / "evit.safetensors")
    assert other.pos_embed.shape == (1, 1 + 4 * 6, 32)
    assert torch.equal(other.pos_embed[:, 0], state["pos_embed"][:, 0])
    del state["blocks.2.attn.qkv.bias"]
    save_file(state | {"dist_token": torch.zeros(1)}, tmp_path / "wrong.safetensors")
    with pytest.raises(InputError, match=r"missing: blocks.2.attn.qkv.bias; not expected: dist_token"):
        encoder.load_official(tmp_path / "wrong.safetensors")
