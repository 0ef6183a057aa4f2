"""ToMe: the tower's layers against a merging tower written out picture by picture, and what the decoder gets."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import families as tiny
import pytest
import torch
from specimens import anatomy_of, forward_logits, model_of, traces
from test_merging import slow_groups
from torch import Tensor

import sightline as sl
from sightline.errors import InputError
from sightline.methods import Method
from sightline.models.anatomy import Anatomy
from sightline.reduction.tome import ToMe

WORKS = ("llava", "llava_next", "llava_onevision", "paligemma")


@torch.no_grad()
def slow_tower(anatomy: Anatomy, entering: Tensor, patches_left: int) -> tuple[Tensor, list[list[int]], Tensor]:
    """One picture through the merging layers, token by token.

    Returns:
        For each token of the stock tower the value of its cluster [tokens, C], the clusters, and the attention that the
        first token pays to each cluster in the last layer.
    """
    assert anatomy.connected_layer is not None
    layers: list[Any] = list(anatomy.tower_layers[: anatomy.connected_layer + 1])
    x, clusters = entering, [[token] for token in range(len(entering))]
    leading = anatomy.leading_tokens
    given = len(entering) - leading
    paid = torch.zeros(0)
    for index, layer in enumerate(layers):
        attention, normed = layer.self_attn, layer.layer_norm1(x)
        query, key, value = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
        size = torch.tensor([float(len(cluster)) for cluster in clusters])
        heads, keys, weights = [], [], []
        for head in range(attention.num_heads):
            part = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            logits = query[:, part] @ key[:, part].T / math.sqrt(attention.head_dim)
            weights.append((logits + size.log()).softmax(dim=-1))
            heads.append(weights[-1] @ value[:, part])
            keys.append(key[:, part])
        paid = torch.stack(weights).mean(dim=0)[0]
        if index == len(layers) - 1:
            before_last = [list(cluster) for cluster in clusters]
        x = x + attention.out_proj(torch.cat(heads, dim=-1))
        should_be_left = given - (given - patches_left) * (index + 1) // len(layers)
        r = len(x) - leading - should_be_left
        groups = slow_groups(torch.stack(keys).mean(dim=0).tolist(), r, protect_first=leading > 0)
        x = torch.stack([(x[group] * size[group, None]).sum(dim=0) / size[group].sum() for group in groups])
        clusters = [sorted(token for one in group for token in clusters[one]) for group in groups]
        x = x + layer.mlp(layer.layer_norm2(x))
    whole = torch.zeros_like(entering)
    for value, cluster in zip(x, clusters, strict=True):
        whole[cluster] = value
    share = torch.zeros(len(entering))
    for weight, cluster in zip(paid, before_last, strict=True):
        share[cluster] = weight / len(cluster)
    return whole, clusters, share


def run(model: Any, batch: dict[str, Any], *methods: Method) -> tuple[Tensor, Tensor, Any]:
    """What enters the tower's first layer, what enters the connector, and the attachment."""
    anatomy = Anatomy.of(model)
    seen: dict[str, Tensor] = {}
    with sl.attach(model, *methods) as attachment:
        assert anatomy.connector is not None
        handles = [
            anatomy.tower_layers[0].register_forward_pre_hook(lambda module, args: seen.update(entering=args[0])),
            anatomy.connector.register_forward_pre_hook(lambda module, args: seen.update(tower=args[0])),
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
    return seen["entering"], seen["tower"], attachment


def expected_places(family: str, row: tiny.Row, clusters: list[list[list[int]]], leading: int) -> list[list[int]]:
    """For each image of a row, the first token of each cluster, and what is no patch."""
    of = [{token - leading: place for place, group in enumerate(one) for token in group} for one in clusters]
    places, start = [], 0
    for image, tiles in enumerate(row.pictures):
        names: list[Any] = [(start, of[start][patch]) for patch in range(16)]
        if family.startswith(("llava_next", "llava_onevision")):
            down, across = tiny.packed_raster(*row.sizes[image])
            for y in down:
                for x in across:
                    tile = start + 1 + (y // 4) * tiny.TILINGS[row.sizes[image]][1] + x // 4
                    names.append((tile, of[tile][(y % 4) * 4 + x % 4]))
                names.append(("newline", y))
        assert len(names) == row.lengths[image]
        places.append([place for place, name in enumerate(names) if name not in names[:place]])
        start += len(tiles)
    return places


@pytest.mark.parametrize("family", WORKS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("keep", [0.4, 0.75])
def test_the_tower_is_one_that_merges(family: str, implementation: str, keep: float) -> None:
    model = tiny.tiny_model(family)
    anatomy = Anatomy.of(model)
    model.set_attn_implementation(implementation)
    rows = tiny.rows_of(family, model, images_per_row=[2, 1, 1])
    batch = tiny.collate(family, model, rows, "left")
    entering, tower, attachment = run(model, batch, ToMe(keep=keep))
    assert len(entering) == sum(len(tiles) for row in rows for tiles in row.pictures)
    left = max(1, round(16 * keep))
    slow = [slow_tower(anatomy, picture, left) for picture in entering]
    leading = anatomy.leading_tokens
    for got, (whole, clusters, _) in zip(tower, slow, strict=True):
        assert len(clusters) == left + leading
        if family == "paligemma":  # its connector reads what comes after the tower's last norm
            norm = anatomy.vision_tower.get_submodule("post_layernorm")
            whole = norm(whole).detach()
        torch.testing.assert_close(got[-16:], whole[leading:], atol=2e-5, rtol=1e-5)
    start = 0
    for row, kept in zip(rows, attachment.kept, strict=True):
        count = sum(len(tiles) for tiles in row.pictures)
        of_row = [one for _, one, _ in slow[start : start + count]]
        assert [image.tolist() for image in kept] == expected_places(family, row, of_row, leading)
        start += count


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_merging_patches_that_are_all_alike_changes_nothing_but_their_number(family: str) -> None:
    """Without positions, twelve patches of one colour are one token twelve times: attention that knows of their number
    makes of the merged ones what the stock tower makes of all."""
    model = tiny.tiny_model(family)
    anatomy = Anatomy.of(model)
    embeddings: Any = anatomy.vision_tower.get_submodule("embeddings")
    with torch.no_grad():
        embeddings.position_embedding.weight[1 if family == "llava" else 0 :] = 0
    batch = tiny.single(family, model, 0)
    picture = batch["pixel_values"].clone()
    for place in range(16):
        if place not in (1, 6, 8, 15):
            y, x = 4 * (place // 4), 4 * (place % 4)
            picture[..., y : y + 4, x : x + 4] = 0.7
    batch = {**batch, "pixel_values": picture}
    _, stock, _ = run(model, batch)
    _, merged, attachment = run(model, batch, ToMe(keep=0.5))
    torch.testing.assert_close(merged, stock, atol=2e-5, rtol=1e-5)
    ((kept,),) = attachment.kept
    assert len(kept) == 8
    assert {1, 6, 8, 15} < set(kept.tolist())


def test_what_other_methods_read_off_the_tower_is_of_its_patches() -> None:
    """[CLS] pays a patch the share of what it pays the token that the patch is part of."""
    model = model_of("llava")
    batch = tiny.inputs("llava", model)
    entering, _, attachment = run(model, batch, ToMe(keep=0.4), sl.Damro(k=4))
    read = attachment.call.encoded.readings["cls"]
    assert read.shape == (3, 16)
    for got, picture in zip(read, entering, strict=True):
        torch.testing.assert_close(got, slow_tower(anatomy_of("llava"), picture, 6)[2][1:], atol=1e-6, rtol=1e-4)


def test_a_layer_merges_half_of_its_tokens_at_most() -> None:
    model = model_of("llava")  # two layers before the connector
    with sl.attach(model, ToMe(keep=0.01)) as attachment:
        forward_logits(model, tiny.single("llava", model, 0))
    assert attachment.visual_tokens == [5]  # 17 tokens with [CLS], then 10, then 6


def test_layers_after_the_connected_one_see_all_patches_again() -> None:
    model = model_of("llava")
    tower: Any = anatomy_of("llava").vision_tower
    with sl.attach(model, ToMe(keep=0.5)), torch.no_grad():
        states = tower(torch.rand(2, 3, 16, 16), output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in states] == [17, 13, 17, 17]


def test_a_pass_that_fails_leaves_nothing() -> None:
    model = model_of("llava")
    batch = tiny.single("llava", model, 0)
    before, stock = traces(model), forward_logits(model, batch)
    layer = anatomy_of("llava").tower_layers[1]

    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("on purpose")

    with sl.attach(model, ToMe(keep=0.4)):
        want = forward_logits(model, batch)
        handle = layer.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            forward_logits(model, batch)
        handle.remove()
        assert torch.equal(forward_logits(model, batch), want)
    assert traces(model) == before
    assert torch.equal(forward_logits(model, batch), stock)


def test_tokens_that_mix_clusters_stay() -> None:
    """A raster that is too large is shrunk while packing: its tokens are means of patches."""
    model = tiny.tiny_model("llava_onevision", image_grid_pinpoints=[[64, 64]], vision_aspect_ratio="anyres_max_2")
    side = int(16 // (16 * 16 / (2 * 16)) ** 0.5)
    tokens = 16 + side * (side + 1)
    ids = torch.tensor([[1] + [tiny.IMAGE] * tokens + [5]])
    pixels = torch.rand(1, 17, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = dict(input_ids=ids, pixel_values=pixels, image_sizes=torch.tensor([[60, 60]]))
    with sl.attach(model, ToMe(keep=0.4)) as attachment, torch.no_grad():
        model(**inputs)
    assert attachment.kept is not None
    kept = attachment.kept[0][0].tolist()
    assert len([place for place in kept if place < 16]) == 6  # the whole picture
    assert kept[6:] == list(range(16, tokens))


def test_settings_and_refusals() -> None:
    assert dataclasses.asdict(ToMe()) == {"keep": 0.25, "positions": "compact"}
    with pytest.raises(InputError, match=r"keep of tome must lie in \(0, 1\]"):
        ToMe(keep=1.5)
    for family in ("qwen2_vl", "internvl", "idefics3", "gemma3"):
        with pytest.raises(InputError, match=rf"which {family} with this tower does not have.*works on llava,"):
            ToMe().check(anatomy_of(family))
    several = Anatomy.of(tiny.tiny_model("llava", vision_feature_layer=[-2, -1]))
    with pytest.raises(InputError, match="vision_feature_layer has several"):
        ToMe().check(several)
    model = tiny.tiny_model("llava")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(InputError, match=r"which flex_attention does not allow.*'sdpa'"):
        sl.attach(model, ToMe())
