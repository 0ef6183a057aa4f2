"""SimVLG: gradual merging against a slow one, and the paper's own modules by their exact properties."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import families as tiny
import pytest
import torch
from families import FAMILIES
from specimens import anatomy_of, forward_logits, model_of
from torch import Tensor, nn

import sightline as sl
from sightline.errors import InputError
from sightline.reduction.merging import bipartite_soft_matching
from sightline.reduction.simvlg import SimVLG, TemporalMerging, TomeFormer, TomeLayer
from sightline.reduction.token_reducer import ImageTokens


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- On a stock model ---


def slow(features: list[list[float]], keep: int, layers: int) -> list[tuple[list[int], list[float]]]:
    """Members and value of each token that is left, in the order of their first members. Plain means in each step."""

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    tokens = [([place], list(value)) for place, value in enumerate(features)]
    r = math.ceil((len(tokens) - keep) / layers)
    while len(tokens) > keep:
        even, odd = tokens[0::2], tokens[1::2]
        best = [max(range(len(odd)), key=lambda place: cosine(value, odd[place][1])) for _, value in even]
        order = sorted(range(len(even)), key=lambda place: -cosine(even[place][1], odd[best[place]][1]))
        merged = order[: min(r, len(tokens) // 2, len(tokens) - keep)]
        after = [even[place] for place in range(len(even)) if place not in merged]
        for place, own in enumerate(odd):
            group = [own, *(even[other] for other in merged if best[other] == place)]
            value = [sum(parts) / len(group) for parts in zip(*(value for _, value in group), strict=True)]
            after.append(([one for members, _ in group for one in members], value))
        tokens = after
    return sorted(((sorted(members), value) for members, value in tokens), key=lambda token: token[0][0])


@pytest.mark.parametrize(("n", "keep", "layers"), [(16, 0.25, 3), (17, 0.3, 12), (23, 0.05, 2), (9, 0.9, 12)])
def test_what_is_left_is_what_a_slow_merging_leaves(n: int, keep: float, layers: int) -> None:
    method = SimVLG(keep=keep, layers=layers)
    features = rand(n, 5)
    expected = slow(features.tolist(), method.budget(n), layers)
    stays, merged = method.reduce(ImageTokens(features))
    assert stays.nonzero()[:, 0].tolist() == [members[0] for members, _ in expected]
    assert merged is not None
    torch.testing.assert_close(merged, torch.tensor([value for _, value in expected]))
    assert sorted(one for members, _ in expected for one in members) == list(range(n))


def test_duplicates_merge_and_nothing_else_is_mixed() -> None:
    """Each token at an even place has a twin at an odd one, before or after it."""
    kinds = rand(4, 6)
    order = torch.tensor([0, 0, 1, 2, 2, 1, 3, 3])
    stays, merged = SimVLG(keep=0.5, layers=1).reduce(ImageTokens(kinds[order]))
    assert merged is not None
    assert stays.nonzero()[:, 0].tolist() == [0, 2, 3, 6]
    torch.testing.assert_close(merged, kinds)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_tokens_reach_the_decoder(family: str) -> None:
    model, anatomy = model_of(family), anatomy_of(family)
    batch = tiny.single(family, model, 0, images_per_row=2)
    method = SimVLG(keep=0.3, layers=4)
    entered: list[Tensor] = []

    def read(*methods: SimVLG) -> list[int]:
        with sl.attach(model, *methods) as attachment:
            handle = anatomy.language_model.register_forward_pre_hook(
                lambda module, args, kwargs: entered.append(kwargs["inputs_embeds"][0]), with_kwargs=True
            )
            forward_logits(model, batch)
            handle.remove()
        return attachment.visual_tokens

    read()
    left = read(method)
    visual = anatomy.visual_positions(batch["input_ids"])[0].nonzero()[:, 0].tolist()
    start, places, values = 0, [], []
    for length in anatomy.tokens_per_image(batch):
        features = entered[0][visual[start : start + length]]
        for members, value in slow(features.tolist(), method.budget(length), 4):
            places.append(visual[start + members[0]])
            values.append(value)
        start += length
    assert left == [len(places)]
    columns = [column for column in range(len(entered[0])) if column not in visual or column in places]
    got = entered[1]
    assert len(got) == len(columns)
    for index, column in enumerate(columns):
        want = torch.tensor(values[places.index(column)]) if column in places else entered[0][column]
        torch.testing.assert_close(got[index], want, atol=1e-4, rtol=1e-4)


def test_settings() -> None:
    assert dataclasses.asdict(SimVLG()) == {"keep": 0.25, "positions": "compact", "layers": 12}
    for wrong in (0, 1.5, True):
        with pytest.raises(InputError, match="layers of simvlg must"):
            SimVLG(layers=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"keep of simvlg must lie in \(0, 1\]"):
        SimVLG(keep=0)


# --- The TomeFormer ---


def tomeformer(**changes: Any) -> TomeFormer:
    torch.manual_seed(0)
    small: dict[str, Any] = dict(width=16, layers=3, heads=4, mlp=24, r=2, tokens=12)
    return TomeFormer(10, 6, **{**small, **changes}).eval()


def test_the_papers_sizes_leave_29_of_257_tokens() -> None:
    seen = rand(1, 257, 10)
    with torch.no_grad():
        assert tomeformer(tokens=257, layers=12, r=19)(seen).shape == (1, 29, 6)
        assert tomeformer(tokens=257, layers=12, r=0)(seen).shape == (1, 257, 6)


@pytest.mark.parametrize(("n", "r", "left"), [(10, 19, 6), (12, 2, 10), (2, 5, 2), (3, 5, 2)])
def test_a_layer_takes_no_more_than_half_of_what_is_not_cls(n: int, r: int, left: int) -> None:
    with torch.no_grad():
        assert tomeformer(layers=1, r=r)(rand(2, n, 10)).shape == (2, left, 6)


def test_without_merging_it_is_a_plain_encoder_of_bert() -> None:
    former = tomeformer(r=0)
    seen = rand(2, 12, 10)
    plain: list[nn.Module] = []
    for layer in former.layers:
        assert isinstance(layer, TomeLayer)
        bert = nn.TransformerEncoderLayer(16, 4, 24, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True)
        parts = (layer.query, layer.key, layer.value)
        with torch.no_grad():
            bert.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            bert.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
            pairs = [
                (bert.self_attn.out_proj, layer.attention_output),
                (bert.norm1, layer.attention_norm),
                (bert.linear1, layer.intermediate),
                (bert.linear2, layer.output),
                (bert.norm2, layer.output_norm),
            ]
            for part, ours in pairs:
                part.load_state_dict(ours.state_dict())
        plain.append(bert.eval())
    with torch.no_grad():
        tokens = former.norm(former.widen(former.tower_norm(seen)) + former.positions + former.token_type)
        for theirs in plain:
            tokens = theirs(tokens)
        torch.testing.assert_close(former(seen), former.narrow(tokens), atol=1e-5, rtol=1e-5)
        assert (tomeformer(r=0)(seen)[:, 0] - tomeformer()(seen)[:, 0]).abs().max() > 1e-3


def test_duplicated_tokens_merge_into_what_they_were() -> None:
    """Every token twice, at an even place and the next: the pairs merge, except that of [CLS], which is protected."""
    once = rand(1, 9, 8)
    twice = once.repeat_interleave(2, dim=1)
    merged = bipartite_soft_matching(twice, 8, protect_first=True).merge(twice)
    torch.testing.assert_close(merged, torch.cat([once[:, :1], once], dim=1))


def test_a_layer_merges_by_keys_after_attention_and_before_the_feed_forward_part() -> None:
    torch.manual_seed(1)
    layer = TomeLayer(8, 2, 3, 12).eval()
    tokens = rand(2, 7, 8)
    with torch.no_grad():
        key, query, value = layer.key(tokens), layer.query(tokens), layer.value(tokens)
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            weights = (query[..., head] @ key[..., head].transpose(1, 2) / 2).softmax(dim=-1)
            heads.append(weights @ value[..., head])
        attended = layer.attention_norm(tokens + layer.attention_output(torch.cat(heads, dim=-1)))
        metric = (key[..., :4] + key[..., 4:]) / 2
        merged = bipartite_soft_matching(metric, 3, protect_first=True).merge(attended)
        forward = layer.output(nn.functional.gelu(layer.intermediate(merged)))
        torch.testing.assert_close(layer(tokens), layer.output_norm(merged + forward), atol=1e-5, rtol=1e-5)


def test_gradients_reach_all_weights() -> None:
    former = tomeformer().train()
    former(rand(2, 12, 10)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in former.parameters())


# --- Attention over frames ---


def test_temporal_merging_begins_as_the_identity_and_has_the_papers_size() -> None:
    merging = TemporalMerging(1408)
    assert sum(parameter.numel() for parameter in merging.parameters()) == 721_409
    tokens = rand(8, 3, 1408)
    assert torch.equal(merging(tokens, 4), tokens)


def test_temporal_merging_mixes_the_frames_of_a_film_at_one_place() -> None:
    torch.manual_seed(0)
    merging = TemporalMerging(6, hidden=4, heads=2)
    nn.init.constant_(merging.a, 0.5)
    films, frames, places = 2, 3, 5
    tokens = rand(films * frames, places, 6)
    with torch.no_grad():
        got = merging(tokens, frames)
        for film in range(films):
            own = tokens[film * frames : (film + 1) * frames]
            for place in range(places):
                x = own[:, place]
                query, key = merging.query(x), merging.key(x)
                mixed = []
                for head in range(2):
                    q, k = query[:, 2 * head : 2 * head + 2], key[:, 2 * head : 2 * head + 2]
                    mixed.append((q @ k.T / 4**0.5).softmax(dim=-1) @ x[:, 3 * head : 3 * head + 3])
                want = x + 0.5 * torch.cat(mixed, dim=-1)
                torch.testing.assert_close(got[film * frames : (film + 1) * frames, place], want)
        torch.testing.assert_close(merging(tokens, 1), 1.5 * tokens)  # one frame: (1 + a) x
