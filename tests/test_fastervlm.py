"""FasterVLM: which tokens stay, by eager attention and by hand, and what the decoder gets."""

from __future__ import annotations

import dataclasses
from typing import Any

import families as tiny
import pytest
import torch
from families import IMAGE
from torch import Tensor

from sightline.errors import InputError
from sightline.methods import attach
from sightline.reduction.fastervlm import FasterVLM, diverse
from sightline.reduction.token_reducer import ImageTokens


def top(scores: list[float], count: int) -> list[int]:
    """The places of the `count` highest scores, in raster order."""
    return sorted(sorted(range(len(scores)), key=lambda place: -scores[place])[:count])


def kept(model: Any, batch: dict[str, Any], method: FasterVLM) -> list[list[list[int]]]:
    """By row and image, the tokens that a forward kept."""
    with attach(model, method) as attachment, torch.no_grad():
        model(**batch)
        assert attachment.kept is not None
        return [[image.tolist() for image in row] for row in attachment.kept]


def eager_cls_rows(model: Any, pixels: Tensor, layer: int) -> list[list[float]]:
    """For each picture, what [CLS] pays each patch in `attentions[layer]` of the tower, averaged over heads."""
    model.set_attn_implementation({"vision_config": "eager"})
    with torch.no_grad():
        attention = model.model.vision_tower(pixel_values=pixels, output_attentions=True).attentions[layer]
    model.set_attn_implementation({"vision_config": "sdpa"})
    rows = []
    for weights in attention.tolist():  # heads x queries x keys
        row = [sum(head[0][key] for head in weights) / len(weights) for key in range(1, len(weights[0][0]))]
        rows.append(row)
    return rows


# --- The paper's rule ---


def test_the_defaults() -> None:
    method = FasterVLM()
    assert dataclasses.asdict(method) == {"keep": 0.25, "positions": "compact", "important_ratio": 1.0}
    assert method.paper == "fastervlm"
    assert method.needs_cls


def slow_diverse(features: list[list[float]], budget: int) -> list[int]:
    """VisPruner's second part with plain lists: by turns into a and b, of a the eight most like one in b go."""

    def cosine(one: list[float], other: list[float]) -> float:
        norms = sum(x * x for x in one) ** 0.5 * sum(x * x for x in other) ** 0.5
        return sum(x * y for x, y in zip(one, other, strict=True)) / norms

    left = list(range(len(features)))
    while len(left) > budget:
        here, there = left[0::2], left[1::2]
        nearest = {one: max(cosine(features[one], features[other]) for other in there) for one in here}
        gone = sorted(here, key=lambda one: -nearest[one])[: min(8, len(left) - budget)]
        left = [one for one in left if one not in gone]
    return left


@pytest.mark.parametrize(("tokens", "budget"), [(30, 11), (9, 1), (31, 30), (5, 5)])
def test_the_diverse_ones_are_those_of_plain_lists(tokens: int, budget: int) -> None:
    features = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(tokens))
    assert diverse(features, budget).tolist() == slow_diverse(features.tolist(), budget)


def test_the_background_keeps_a_token_when_some_are_chosen_for_diversity() -> None:
    """Sixty tokens of one object that [CLS] looks at, one of another thing that it passes over."""
    features = torch.cat([torch.tensor([[1.0, 0.0]]).repeat(60, 1), torch.tensor([[0.0, 1.0]])])
    image = ImageTokens(features, readings={"cls": torch.linspace(1, 0, 61)})
    plain, _ = FasterVLM(keep=0.5).reduce(image)
    varied, _ = FasterVLM(keep=0.5, important_ratio=0.5).reduce(image)
    assert plain.nonzero()[:, 0].tolist() == list(range(30))
    assert int(varied.sum()) == 30
    assert varied[:15].all()
    assert varied[60]


# hidden_states has the embeddings first: entry k >= 0 is the output of layer k - 1. From the end the indices agree.
@pytest.mark.parametrize(("chosen", "attention"), [(-2, -2), (-1, -1), (-3, -3), (1, 0), (2, 1)])
@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_what_stays_is_what_cls_attends_to_most(chosen: int, attention: int, keep: float) -> None:
    model = tiny.tiny_model("llava", vision_feature_layer=chosen)
    batch = tiny.inputs("llava", model, images_per_row=[2, 1, 1])
    rows = eager_cls_rows(model, batch["pixel_values"], attention)
    expected = [top(row, int(16 * keep)) for row in rows]
    assert kept(model, batch, FasterVLM(keep=keep)) == [expected[:2], expected[2:3], expected[3:]]
    other = eager_cls_rows(model, batch["pixel_values"], 1 if attention in (0, -3) else 0)
    assert expected != [top(row, int(16 * keep)) for row in other]  # it matters which layer is read


def looking_at_brightness(model: Any) -> None:
    """Makes [CLS] attend to a patch the more, the brighter it is.

    A patch is embedded as brightness * u + w, with the same u (+1, -1 in the first two channels) and w (+1, -1 in the
    next two) for all. Layer norms keep the direction, so the brighter, the more of it is along u. The keys read off u,
    in the first head; the query is constant.
    """
    tower = model.model.vision_tower
    embeddings, attention = tower.embeddings, tower.encoder.layers[0].self_attn
    with torch.no_grad():
        for parameter in (embeddings.patch_embedding.weight, embeddings.position_embedding.weight):
            parameter.zero_()
        embeddings.patch_embedding.weight[0] = 1 / 48  # the mean of 3 channels x 4 x 4 pixels
        embeddings.patch_embedding.weight[1] = -1 / 48
        embeddings.position_embedding.weight[:, 2] = 1
        embeddings.position_embedding.weight[:, 3] = -1
        for norm in (tower.pre_layrnorm, tower.encoder.layers[0].layer_norm1):
            norm.weight.fill_(1)
            norm.bias.zero_()
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight.zero_()
            linear.bias.zero_()
        attention.q_proj.bias[:8] = 1
        attention.k_proj.weight[:8, 0] = 1
        attention.k_proj.weight[:8, 1] = -1


def test_cls_made_to_look_at_bright_patches_keeps_the_bright_patches() -> None:
    model = tiny.tiny_model("llava", vision_feature_layer=-1, vision_config=dict(num_hidden_layers=1))
    looking_at_brightness(model)
    brightness = torch.tensor(
        [
            [0.1, 0.9, 0.2, 0.0],
            [0.3, 0.4, 0.8, 0.1],
            [1.0, 0.2, 0.5, 0.3],
            [0.0, 0.1, 0.7, 0.6],
        ]
    )
    picture = brightness.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(1, 3, 16, 16)
    batch = {**tiny.inputs("llava", model, questions=[[5, 6]]), "pixel_values": picture}
    assert kept(model, batch, FasterVLM(keep=1 / 16)) == [[[8]]]
    assert kept(model, batch, FasterVLM(keep=4 / 16)) == [[[1, 6, 8, 14]]]
    assert kept(model, batch, FasterVLM(keep=6 / 16)) == [[[1, 6, 8, 10, 14, 15]]]
    mirrored = {**batch, "pixel_values": picture.flip(-1)}
    assert kept(model, mirrored, FasterVLM(keep=4 / 16)) == [[[2, 5, 11, 13]]]


@pytest.mark.parametrize(
    ("keep", "count"), [(0.25, 4), (0.5, 8), (0.75, 12), (1 / 16, 1), (0.01, 1), (0.1, 2), (0.99, 16), (15 / 16, 15)]
)
def test_the_share_of_sixteen_tokens_is_an_exact_number(keep: float, count: int) -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, images_per_row=[1, 2, 0])
    with attach(model, FasterVLM(keep=keep)) as attachment, torch.no_grad():
        model(**batch)
        assert attachment.kept is not None
        assert [[len(image) for image in row] for row in attachment.kept] == [[count], [count, count], []]
        assert attachment.visual_tokens == [count, 2 * count, 0]
        assert attachment.visual_tokens_given == [16, 32, 0]


def test_the_budgets_of_the_paper_for_576_patches() -> None:
    vision = dict(image_size=96, num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1)
    model = tiny.tiny_model("llava", image_seq_length=576, vision_feature_layer=-1, vision_config=vision)
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[tiny.BOS, *[IMAGE] * 576, 7]])
    batch = dict(input_ids=ids, pixel_values=torch.randn(1, 3, 96, 96, generator=generator))
    for keep, budget in ((0.5, 288), (0.25, 144), (0.1, 58), (0.05, 29)):
        assert len(kept(model, batch, FasterVLM(keep=keep))[0][0]) == budget


# --- The choice depends on the picture alone ---


def test_the_question_does_not_change_what_stays() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, questions=[[3], [70, 4, 9, 33], [8, 8]])
    batch["pixel_values"][:] = batch["pixel_values"][1].clone()
    first, second, third = kept(model, batch, FasterVLM())
    assert first == second == third


def test_the_order_of_the_batch_does_not_change_what_stays() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    order = [2, 0, 1]
    shuffled = {name: value[order] for name, value in batch.items()}
    in_order = kept(model, batch, FasterVLM())
    assert len({str(row) for row in in_order}) == 3
    assert kept(model, shuffled, FasterVLM()) == [in_order[row] for row in order]


# --- What reaches the decoder ---


def at_the_boundary(model: Any, batch: dict[str, Any], *methods: FasterVLM) -> dict[str, Any]:
    """What the language model is called with."""
    seen: dict[str, Any] = {}
    with attach(model, *methods), torch.no_grad():
        handle = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
        )
        model(**batch)
        handle.remove()
    return seen


@pytest.mark.parametrize("family", tiny.CLS_FAMILIES)
def test_the_survivors_reach_the_decoder_as_they_were(family: str) -> None:
    model = tiny.tiny_model(family)
    for row in range(3):
        batch = tiny.single(family, model, row)
        whole = at_the_boundary(model, batch)["inputs_embeds"][0]
        ((chosen,),) = kept(model, batch, FasterVLM(keep=0.3))
        visual = (batch["input_ids"][0] == IMAGE).nonzero()[:, 0].tolist()
        columns = [column for column in range(len(whole)) if column not in visual or visual.index(column) in chosen]
        seen = at_the_boundary(model, batch, FasterVLM(keep=0.3))
        assert torch.equal(seen["inputs_embeds"][0], whole[columns])  # raster order, and the text around it
        assert seen["position_ids"].tolist() == [list(range(len(columns)))]
        unmoved = at_the_boundary(model, batch, FasterVLM(keep=0.3, positions="kept"))
        assert unmoved["position_ids"].tolist() == [columns]


def test_an_answer_is_that_of_the_shortened_prompt() -> None:
    """Greedy decoding by hand: the stock language model reads the shortened prompt anew for each token."""
    model = tiny.tiny_model("llava")
    for row in range(3):
        batch = tiny.single("llava", model, row)
        ((chosen,),) = kept(model, batch, FasterVLM())
        with torch.no_grad():
            embeds = at_the_boundary(model, batch)["inputs_embeds"][0]
            visual = (batch["input_ids"][0] == IMAGE).nonzero()[:, 0]
            dropped = {int(visual[place]) for place in range(16) if place not in chosen}
            short = embeds[[column for column in range(len(embeds)) if column not in dropped]]
            answer, scores = [], []
            for _ in range(4):
                hidden = model.model.language_model(inputs_embeds=short[None], use_cache=False).last_hidden_state
                scores.append(model.lm_head(hidden[0, -1]))
                answer.append(int(scores[-1].argmax()))
                short = torch.cat([short, model.get_input_embeddings()(torch.tensor(answer[-1:]))])
            with attach(model, FasterVLM()):
                output = model.generate(
                    **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
                )
        assert output.sequences[0, -4:].tolist() == answer
        torch.testing.assert_close(torch.cat(output.logits), torch.stack(scores), atol=1e-4, rtol=0)
        assert output.past_key_values.get_seq_length() == len(embeds) - 12 + 3  # the last token is not read


# --- Families whose tokens are not simply the patches ---


def test_a_token_of_internvl_counts_with_all_four_of_its_patches() -> None:
    model = tiny.tiny_model("internvl")
    batch = tiny.inputs("internvl", model, questions=[[5, 6], [7]], images_per_row=1)  # 1 tile, and 3 tiles
    rows = eager_cls_rows(model, batch["pixel_values"], model.config.vision_feature_layer)
    numbered = torch.arange(64.0).reshape(1, 8, 8, 1)
    groups = model.model.pixel_shuffle(numbered, scale_factor=0.5).reshape(16, 4).long().tolist()
    assert sorted(patch for group in groups for patch in group) == list(range(64))
    for token, group in enumerate(groups):  # a square of patches, at the token's own place
        row, column = divmod(token, 4)
        assert {(patch // 8, patch % 8) for patch in group} == {
            (2 * row + down, 2 * column + right) for down in (0, 1) for right in (0, 1)
        }
    scores = [[sum(row[patch] for patch in group) for group in groups] for row in rows]
    first, second = kept(model, batch, FasterVLM())
    assert first == [top(scores[0], 4)]
    assert second == [top(scores[1] + scores[2] + scores[3], 12)]


def next_scores(model: Any, row: tiny.Row) -> list[float]:
    """Scores of one packed image by hand: the whole picture's patches, then the raster of all tiles row by row, without
    its padding, each row followed by a newline that is no patch."""
    rows = eager_cls_rows(model, torch.stack(row.pictures[0]), -2)
    scores = list(rows[0])
    tiles_across = tiny.TILINGS[row.sizes[0]][1]
    down, across = tiny.packed_raster(*row.sizes[0])
    for y in down:
        for x in across:
            tile = (y // 4) * tiles_across + x // 4
            scores.append(rows[1 + tile][(y % 4) * 4 + x % 4])
        scores.append(-1.0)
    return scores


def test_newlines_of_llava_next_go_first() -> None:
    model = tiny.tiny_model("llava_next")
    for row in tiny.rows_of("llava_next", model):
        batch = tiny.collate("llava_next", model, [row], "left")
        scores = next_scores(model, row)
        patches = [place for place, score in enumerate(scores) if score >= 0]
        assert len(scores) == row.lengths[0] > len(patches)
        for count in (len(patches), len(patches) // 2, 1):
            ((chosen,),) = kept(model, batch, FasterVLM(keep=count / len(scores)))
            assert chosen == top(scores, count)
            assert set(chosen) <= set(patches)
        ((chosen,),) = kept(model, batch, FasterVLM(keep=(len(patches) + 1) / len(scores)))
        assert set(patches) < set(chosen)


# --- Errors ---


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_outside_the_range_is_refused(keep: float) -> None:
    with pytest.raises(InputError, match=r"keep of fastervlm must lie in \(0, 1\], not"):
        FasterVLM(keep=keep)


def test_an_unknown_numbering_is_refused() -> None:
    with pytest.raises(InputError, match="positions of fastervlm must be 'compact' or 'kept', not 'old'"):
        FasterVLM(positions="old")  # type: ignore[arg-type]


def test_a_tower_without_cls_is_refused_and_the_right_ones_named() -> None:
    siglip = dict(model_type="siglip_vision_model", vision_use_head=False)
    model = tiny.tiny_model("llava", vision_config=siglip, vision_feature_select_strategy="full")
    for refused in (model, tiny.tiny_model("qwen2_vl")):
        with pytest.raises(InputError, match=r"needs a vision tower with a \[CLS\] token.*CLIP.*InternVL.*simvlg"):
            attach(refused, FasterVLM())
