"""DAMRO: which tokens the branch sees, by eager attention, and its answer by two stock models, one fed these alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import families as tiny
import pytest
import torch
from slow_decoder import slow_contrast
from torch import Tensor

import sightline as sl
from sightline.errors import InputError
from sightline.grounding.damro import Damro
from sightline.methods import attach
from sightline.models.call import Call, Stream


@dataclass(frozen=True)
class Watched(Damro):
    """Notes what its branch sees."""

    seen: list[Tensor] = field(default_factory=list, compare=False)

    def branches(self, call: Call) -> Sequence[Stream]:
        streams = super().branches(call)
        assert streams[0].visible is not None
        self.seen.append(streams[0].visible)
        return streams


def shown(model: Any, batch: dict[str, Any], **settings: Any) -> list[int]:
    """The places, among the visual tokens of the batch, of those that the branch sees."""
    method = Watched(**settings)
    with attach(model, method), torch.no_grad():
        model(**batch)
    places: list[int] = method.seen[0].nonzero()[:, 0].tolist()
    return places


def top(scores: dict[int, float], count: int) -> list[int]:
    """The keys of the `count` highest scores."""
    return sorted(sorted(scores, key=lambda key: -scores[key])[:count])


def eager_cls_rows(model: Any, pixels: Tensor, layer: int) -> list[list[float]]:
    """For each picture, what [CLS] pays each patch in a layer of the tower, averaged over heads."""
    model.set_attn_implementation({"vision_config": "eager"})
    with torch.no_grad():
        attention = model.model.vision_tower(pixel_values=pixels, output_attentions=True).attentions[layer]
    model.set_attn_implementation({"vision_config": "sdpa"})
    return [
        [sum(head[0][key] for head in weights) / len(weights) for key in range(1, len(weights[0][0]))]
        for weights in attention.tolist()
    ]


def flat_cls_rows(model: Any, pixels: Tensor, layer: int) -> list[list[float]]:
    """As `eager_cls_rows`, with query and keys of the full width as one head, from the tower's own hidden states."""
    tower = model.model.vision_tower
    block = tower.encoder.layers[layer]
    index = range(len(tower.encoder.layers))[layer]
    with torch.no_grad():
        before = block.layer_norm1(tower(pixel_values=pixels, output_hidden_states=True).hidden_states[index])
        queries = before @ block.self_attn.q_proj.weight.T + block.self_attn.q_proj.bias
        keys = before @ block.self_attn.k_proj.weight.T + block.self_attn.k_proj.bias
    rows = []
    for query, picture in zip(queries[:, 0].tolist(), keys.tolist(), strict=True):
        logits = [sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(len(query)) for key in picture]
        total = sum(math.exp(x) for x in logits)
        rows.append([math.exp(x) / total for x in logits[1:]])
    return rows


# --- The combination ---


def test_the_defaults() -> None:
    assert dataclasses.asdict(Damro()) == {"alpha": 2.0, "k": 10, "beta": 0.1, "head_mode": "mean"}
    assert Damro.paper == "damro"
    assert Damro.needs_cls
    assert Damro.needs_picture


def test_four_tokens_by_hand() -> None:
    # Probabilities .6 .3 .07 .03, plausible from .06. The branch likes the first: three parts less two of its own.
    own = torch.tensor([[0.6, 0.3, 0.07, 0.03]]).log()
    branch = torch.tensor([[0.9, 0.05, 0.04, 0.01]]).log()
    one, two, three = math.log(0.6**3 / 0.9**2), math.log(0.3**3 / 0.05**2), math.log(0.07**3 / 0.04**2)
    assert Damro().combine(own, own, [branch])[0].tolist() == pytest.approx([one, two, three, -math.inf])
    assert int(Damro().combine(own, own, [branch]).argmax()) == 1
    half = Damro(alpha=0.5, beta=0.0).combine(own, own, [branch])[0].tolist()
    expected = [1.5 * x - 0.5 * y for x, y in zip(own[0].tolist(), branch[0].tolist(), strict=True)]
    assert half == pytest.approx(expected)
    # After another method it adds its contrast and no more; what is ruled out stays so.
    before = torch.tensor([[1.0, -math.inf, 3.0, 4.0]])
    after = Damro(alpha=1.0).combine(before, own, [branch])[0].tolist()
    assert after == pytest.approx([1 + math.log(0.6 / 0.9), -math.inf, 3 + math.log(0.07 / 0.04), -math.inf])


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.CLS_FAMILIES)
def test_a_branch_that_sees_every_token_changes_nothing_that_is_plausible(family: str) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model, images_per_row=[2, 1, 1])
    stock = model(**batch).logits[:, -1]
    plausible = stock.softmax(dim=-1) >= 0.1 * stock.softmax(dim=-1).amax(dim=-1, keepdim=True)
    total = int((batch["input_ids"] == tiny.IMAGE).sum())
    assert shown(model, batch, k=1000) == list(range(total))
    with attach(model, Damro(k=1000)):
        changed = model(**batch).logits[:, -1]
    torch.testing.assert_close(changed, stock.masked_fill(~plausible, -math.inf), atol=1e-4, rtol=0)
    assert not plausible.all()


@torch.no_grad()
def test_without_weight_it_is_the_stock_model() -> None:
    assert Damro(alpha=0.0).is_identity
    assert Damro().identity() == Damro(alpha=0.0)
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    stock = model(**batch).logits
    with attach(model, Damro(alpha=0.0)):
        assert torch.equal(model(**batch).logits, stock)


# --- Which tokens the branch sees ---


@pytest.mark.parametrize(("chosen", "layer"), [(-2, -2), (-1, -1), (1, 0)])
@pytest.mark.parametrize("k", [1, 3, 10, 16])
def test_the_branch_sees_what_cls_attends_to_most(chosen: int, layer: int, k: int) -> None:
    model = tiny.tiny_model("llava", vision_feature_layer=chosen)
    batch = tiny.inputs("llava", model, images_per_row=[2, 0, 1])
    for head_mode, rows_of in (("mean", eager_cls_rows), ("flat", flat_cls_rows)):
        rows = rows_of(model, batch["pixel_values"], layer)
        expected = [
            16 * image + place for image, row in enumerate(rows) for place in top(dict(enumerate(row)), min(k, 16))
        ]
        assert shown(model, batch, k=k, head_mode=head_mode) == expected


def test_one_wide_head_picks_others_than_the_mean_over_heads() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    assert shown(model, batch, k=4) != shown(model, batch, k=4, head_mode="flat")


@pytest.mark.parametrize("k", [1, 2, 5])
def test_every_tile_of_llava_next_gives_its_own_and_one_newline_ends_the_image(k: int) -> None:
    model = tiny.tiny_model("llava_next")
    batch = tiny.inputs("llava_next", model, images_per_row=[1, 0, 2])
    places, start = [], 0
    for image, (size, tiling) in enumerate(tiny.TILINGS.items()):
        tiles = 1 + tiling[0] * tiling[1]
        attention = eager_cls_rows(model, batch["pixel_values"][image, :tiles], -2)
        rasters: list[dict[int, float]] = [{start + patch: attention[0][patch] for patch in range(16)}]
        rasters += [{} for _ in range(tiles - 1)]
        rows, columns = tiny.packed_raster(*size)
        place = start + 16
        for row in rows:
            for column in columns:
                tile = 1 + row // 4 * tiling[1] + column // 4
                rasters[tile][place] = attention[tile][row % 4 * 4 + column % 4]
                place += 1
            place += 1  # a newline
        for raster in rasters:
            places += top(raster, min(k, len(raster)))
        places.append(place - 1)
        start = place
    assert shown(model, batch, k=k) == sorted(places)


def test_a_token_of_internvl_has_the_attention_of_its_four_patches() -> None:
    model = tiny.tiny_model("internvl")
    batch = tiny.inputs("internvl", model)
    rows = eager_cls_rows(model, batch["pixel_values"], -1)
    expected = []
    for picture, row in enumerate(rows):
        tokens = dict.fromkeys(range(16), 0.0)
        for patch, weight in enumerate(row):
            tokens[patch // 16 * 4 + patch % 8 // 2] += weight
        expected += [16 * picture + place for place in top(tokens, 3)]
    assert len(expected) == 3 * len(batch["pixel_values"])
    assert shown(model, batch, k=3) == expected


def test_a_planted_outlier_is_what_is_left_of_the_picture() -> None:
    """The keys of one patch are made to answer to the query of [CLS], by its place: no picture outweighs that."""
    model = tiny.tiny_model("llava", vision_feature_layer=-1, vision_config=dict(num_hidden_layers=1))
    tower = model.model.vision_tower
    attention = tower.encoder.layers[0].self_attn
    batch = tiny.inputs("llava", model)
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[:, 0] = 0
        tower.embeddings.patch_embedding.weight[0] = 0
        for planted in (11, 2):
            tower.embeddings.position_embedding.weight[:, 0] = 0
            tower.embeddings.position_embedding.weight[1 + planted, 0] = 1000.0
            attention.q_proj.weight.zero_()
            attention.q_proj.bias.fill_(1.0)
            attention.k_proj.weight[:, 0] = 10.0  # what is large in the first channel has large keys in every head
            assert shown(model, batch, k=1) == [planted, 16 + planted, 32 + planted]
            assert shown(model, batch, k=1, head_mode="flat") == [planted, 16 + planted, 32 + planted]
            features = torch.cat(list(model.model.get_image_features(batch["pixel_values"]).pooler_output))
            with attach(model, Damro(k=1, alpha=1.0)):
                got = model(**batch).logits[:, -1]
            expected = [slow_logits(model, batch, features, [16 * row + planted], row, [], 1.0) for row in range(3)]
            torch.testing.assert_close(got, torch.tensor(expected), atol=1e-4, rtol=0)


# --- The branch is a prompt of k visual tokens ---


def slow_logits(
    model: Any, batch: dict[str, Any], features: Tensor, places: list[int], row: int, answer: list[int], alpha: float
) -> list[float]:
    """The logits of one row after `answer`, by the stock model that reads two prompts of embeddings anew: one with all
    features in it, one that holds only those at `places` (in the batch's count)."""
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() + answer
    words = model.get_input_embeddings().weight
    first = int((batch["input_ids"][:row] == tiny.IMAGE).sum())
    full, left = [], []
    for token in ids:
        if token != tiny.IMAGE:
            full.append(words[token])
            left.append(words[token])
            continue
        full.append(features[first])
        if first in places:
            left.append(features[first])
        first += 1
    own, branch = (
        model(inputs_embeds=torch.stack(embeds)[None], use_cache=False).logits[0, -1].tolist()
        for embeds in (full, left)
    )
    return slow_contrast(own, branch, alpha, 0.1)


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.CLS_FAMILIES)
def test_an_answer_is_that_of_two_models_one_of_which_gets_only_these_features(family: str) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model, images_per_row=[1, 2, 1])
    places = shown(model, batch, k=3)
    picture = {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}
    features = model.model.get_image_features(**picture).pooler_output
    features = features.flatten(0, 1) if isinstance(features, Tensor) else torch.cat(list(features))
    with attach(model, Damro(k=3, alpha=1.5)):
        output = model.generate(
            **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    for row in range(3):
        answer: list[int] = []
        for step in range(4):
            expected = slow_logits(model, batch, features, places, row, answer, 1.5)
            torch.testing.assert_close(output.logits[step][row], torch.tensor(expected), atol=2e-4, rtol=0)
            answer.append(max(range(len(expected)), key=expected.__getitem__))
        assert output.sequences[row, -4:].tolist() == answer
    stock = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, -4:]
    assert stock.tolist() != output.sequences[:, -4:].tolist()


@torch.no_grad()
def test_with_a_reducer_the_branch_has_those_that_are_left() -> None:
    """FasterVLM keeps the eight that [CLS] attends to most, among them the three outliers."""
    model = tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0)
    places = shown(model, batch, k=3)
    features = torch.cat(list(model.model.get_image_features(batch["pixel_values"]).pooler_output))
    with attach(model, sl.FasterVLM(keep=0.5)) as attachment:
        own = model(**batch).logits[0, -1].tolist()
        assert attachment.kept is not None
        assert set(places) < set(attachment.kept[0][0].tolist())
    left = torch.stack(
        [
            features[place] if token == tiny.IMAGE else model.get_input_embeddings().weight[token]
            for place, token in enumerate(batch["input_ids"][0].tolist(), start=-_before_picture(batch))
            if token != tiny.IMAGE or place in places
        ]
    )
    branch = model(inputs_embeds=left[None]).logits[0, -1].tolist()
    with attach(model, sl.FasterVLM(keep=0.5), Damro(k=3)):
        got = model(**batch).logits[0, -1]
    torch.testing.assert_close(got, torch.tensor(slow_contrast(own, branch, 2.0, 0.1)), atol=1e-4, rtol=0)


def _before_picture(batch: dict[str, Any]) -> int:
    return int((batch["input_ids"][0] == tiny.IMAGE).int().argmax())


# --- Errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha=-1.0), r"alpha of damro must lie in \[0, 100\], not -1.0"),
        (dict(beta=1.5), r"beta of damro must lie in \[0, 1\], not 1.5"),
        (dict(k=0), r"k of damro must lie in \[1, "),
        (dict(k=2.5), "k of damro must be a whole number, not 2.5"),
        (dict(head_mode="flatt"), r"unknown head_mode of damro .*did you mean 'flat'"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Damro(**options)


@pytest.mark.parametrize("head_mode", ["mean", "flat"])
def test_a_tower_without_cls_is_refused(head_mode: Any) -> None:
    with pytest.raises(InputError, match=r"damro needs a vision tower with a \[CLS\] token, which gemma3 lacks"):
        attach(tiny.tiny_model("gemma3"), Damro(head_mode=head_mode))


def test_a_batch_without_pictures_is_refused() -> None:
    model = tiny.tiny_model("llava")
    with attach(model, Damro()), pytest.raises(InputError, match="damro keeps answers true to a picture"):
        model(**tiny.inputs("llava", model, images_per_row=0))
