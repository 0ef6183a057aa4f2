"""AGLA: the mask by loops, and its answers by two stock models of which one is given pictures blacked out by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import families as tiny
import pytest
import torch
from slow_decoder import slow_answer, slow_sum
from torch import Tensor

import sightline as sl
from sightline.errors import InputError
from sightline.grounding.agla import Agla, blurred, keep_ratio, matching_pixels, unit_range
from sightline.grounding.matchers import DecoderAttention, Match, Matcher
from sightline.methods import attach, describe, parse_methods
from sightline.models.call import Call

Given = Callable[[int, int], tuple[Tensor, float]]
"""The map and the similarity of a tile of an image."""


@dataclass(frozen=True)
class FakeMatcher(Matcher):
    given: Given
    asked: list[int]

    def matches(self, call: Call, pictures: Sequence[Sequence[Tensor]]) -> list[list[Match]]:
        self.asked.append(len(pictures))
        return [[Match(*self.given(image, tile)) for tile in range(len(tiles))] for image, tiles in enumerate(pictures)]


@dataclass(frozen=True)
class Planted(Agla):
    """Its matcher says what it is told to."""

    given: Given = field(default=lambda image, tile: (torch.zeros(2, 2), 0.5), compare=False)
    asked: list[int] = field(default_factory=list, compare=False)

    def matching(self) -> Matcher:
        return FakeMatcher(self.given, self.asked)


@dataclass(frozen=True)
class Watched(Agla):
    """Notes what its matcher finds."""

    seen: list[list[list[Match]]] = field(default_factory=list, compare=False)

    def matching(self) -> Matcher:
        inner, seen = super().matching(), self.seen

        class Watching(Matcher):
            def matches(self, call: Call, pictures: Sequence[Sequence[Tensor]]) -> list[list[Match]]:
                seen.append(inner.matches(call, pictures))
                return seen[-1]

        return Watching()


def found(model: Any, batch: dict[str, Any], **settings: Any) -> list[list[Match]]:
    """What the matcher finds in a batch: for each image, for each of its tiles."""
    method = Watched(**settings)
    with attach(model, method), torch.no_grad():
        model(**batch)
    return method.seen[0]


# --- The combination ---


def test_the_defaults() -> None:
    assert dataclasses.asdict(Agla()) == {
        "alpha": 2.0,
        "beta": 0.5,
        "normalise": False,
        "matcher": "attention",
        "similarity": 0.35,
        "layers": None,
        "queries": "last",
    }
    assert Agla.paper == "agla"


def test_four_tokens_by_hand() -> None:
    # The model's own probabilities are .5 .3 .1 .1, plausible from .25: two tokens are out, whatever the branch says.
    own = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    branch = torch.tensor([[1.0, 2.0, 50.0, 0.0]])
    by_hand = [math.log(0.5) + 2, math.log(0.3) + 4, -math.inf, -math.inf]
    assert Agla().combine(own, own, [branch])[0].tolist() == pytest.approx(by_hand)
    normal = Agla(normalise=True).combine(own, own, [branch])[0].tolist()
    assert normal == pytest.approx([by_hand[0] / 3, by_hand[1] / 3, -math.inf, -math.inf])
    # What a method before it has made of the logits is added to; what is plausible stays the model's own.
    before = torch.tensor([[0.0, -1.0, 9.0, 0.0]])
    assert Agla().combine(before, own, [branch])[0].tolist() == pytest.approx([2.0, 3.0, -math.inf, -math.inf])


@pytest.mark.parametrize("normalise", [True, False])
def test_the_combination_of_random_logits(normalise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for alpha, beta in ((2.0, 0.5), (1.0, 0.01), (7.5, 0.1)):
        own, branch = torch.randn(2, 6, 40, generator=generator) * 3
        combined = Agla(alpha=alpha, beta=beta, normalise=normalise).combine(own, own, [branch])
        for row in range(6):
            expected = slow_sum(own[row].tolist(), branch[row].tolist(), alpha, beta, normalise)
            torch.testing.assert_close(combined[row], torch.tensor(expected))
        assert torch.isinf(combined).any()


@torch.no_grad()
def test_a_map_that_says_nothing_only_sharpens_the_distribution_of_the_plausible_tokens() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    stock = model(**batch).logits[:, -1].softmax(dim=-1)
    plausible = stock >= 0.1 * stock.amax(dim=-1, keepdim=True)
    assert (plausible.sum(dim=-1) > 1).all()
    for method, power in ((Planted(beta=0.1), 3), (Planted(beta=0.1, normalise=True), 1)):
        expected = (stock * plausible) ** power
        with attach(model, method):
            answered = model(**batch).logits[:, -1].softmax(dim=-1)
        torch.testing.assert_close(answered, expected / expected.sum(dim=-1, keepdim=True), atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_without_weight_it_is_the_stock_model() -> None:
    assert Agla(alpha=0.0).is_identity
    assert Agla().identity().is_identity
    assert not Agla(beta=0.0, similarity=0.0).is_identity
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    stock = model(**batch).logits
    with attach(model, Agla(alpha=0.0)):
        assert torch.equal(model(**batch).logits, stock)


# --- From the map to the pixels ---


def slow_blur(values: list[list[float]], deviation: float) -> list[list[float]]:
    """The whole two-dimensional kernel at once, the picture mirrored at its edges as often as it takes."""
    radius = int(4 * deviation + 0.5)
    height, width = len(values), len(values[0])

    def mirrored(place: int, length: int) -> int:
        while not 0 <= place < length:
            place = -1 - place if place < 0 else 2 * length - 1 - place
        return place

    weights = {
        (down, across): math.exp(-(down**2 + across**2) / (2 * deviation**2))
        for down in range(-radius, radius + 1)
        for across in range(-radius, radius + 1)
    }
    total = sum(weights.values())
    return [
        [
            sum(w * values[mirrored(y + dy, height)][mirrored(x + dx, width)] for (dy, dx), w in weights.items())
            / total
            for x in range(width)
        ]
        for y in range(height)
    ]


@pytest.mark.parametrize(("height", "width", "deviation"), [(5, 7, 0.3), (6, 4, 1.2), (3, 5, 2.0)])
def test_the_blur(height: int, width: int, deviation: float) -> None:
    values = torch.rand(height, width, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor(slow_blur(values.tolist(), deviation))
    torch.testing.assert_close(blurred(values, deviation), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("similarity", "kept"), [(0.0, 1 - 1e-5), (-0.3, 1 - 1e-5), (0.4, 0.8), (1.0, 0.5), (1.9, 0.05)]
)
def test_the_better_picture_and_prompt_fit_the_more_goes(similarity: float, kept: float) -> None:
    assert keep_ratio(similarity) == pytest.approx(kept)
    generator = torch.Generator().manual_seed(1)
    for h, w, height, width in ((4, 4, 16, 16), (3, 5, 27, 40), (6, 4, 90, 64)):
        mask = matching_pixels(torch.randn(h, w, generator=generator), similarity, height, width)
        assert mask.shape == (height, width)
        assert int((~mask).sum()) == height * width - (math.floor(height * width * kept) + 1)


def test_what_stays_is_what_the_blurred_map_ranks_highest() -> None:
    relevance = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)) * 1e-4 + 0.02  # any scale
    height, width, similarity = 12, 20, 0.5
    unit = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    large = torch.nn.functional.interpolate(unit[None, None], size=(height, width), mode="bicubic")[0, 0]
    smooth = slow_blur(large.tolist(), 0.02 * 20)
    ranked = sorted(
        ((y, x) for y in range(height) for x in range(width)), key=lambda place: -smooth[place[0]][place[1]]
    )
    stay = set(ranked[: int(height * width * 0.75) + 1])
    mask = matching_pixels(relevance, similarity, height, width)
    assert {(y, x) for y, x in mask.nonzero().tolist()} == stay


def test_the_scale_of_a_map() -> None:
    scaled = unit_range(torch.tensor([[2.0, 4.0], [3.0, 6.0]]))
    assert scaled is not None
    assert scaled.tolist() == [[0.0, 0.5], [0.25, 1.0]]


@pytest.mark.parametrize("relevance", [torch.zeros(3, 3), torch.full((3, 3), 0.01), torch.full((3, 3), math.nan)])
def test_a_map_that_says_nothing_keeps_every_pixel(relevance: Tensor) -> None:
    assert matching_pixels(relevance, 0.9, 9, 12).all()


# --- What the branch sees ---


def hot(rows: slice, columns: slice, share: float) -> tuple[Tensor, float]:
    """A map of 4 x 4 that is high in one part, and the similarity with which that share of the pixels stays."""
    relevance = torch.zeros(4, 4)
    relevance[rows, columns] = 1
    return relevance, 2 * (1 - share)


LEFT, RIGHT = (slice(0, 4), slice(0, 2)), (slice(0, 4), slice(2, 4))


def test_a_map_of_one_part_keeps_that_part() -> None:
    relevance, similarity = hot(slice(1, 3), slice(2, 4), 0.25)
    mask = matching_pixels(relevance, similarity, 64, 64)
    part = torch.zeros(64, 64, dtype=torch.bool)
    part[16:48, 32:] = True
    assert int((mask & part).sum()) >= 0.9 * int(part.sum())  # the corners of the part are rounded
    assert not mask[:, :28].any()


def blacked(batch: dict[str, Any], keep: Sequence[Tensor]) -> Tensor:
    """The pixels of a Llava batch with black where `keep` is False, picture by picture."""
    black = torch.tensor([-m / s for m, s in zip(tiny.CLIP_MEAN, tiny.CLIP_STD, strict=True)])[:, None, None]
    return torch.stack([torch.where(mask, p, black) for p, mask in zip(batch["pixel_values"], keep, strict=True)])


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_an_answer_is_that_of_two_models_one_of_which_sees_the_pictures_blacked_out(use_cache: bool) -> None:
    """Every picture has a map of its own, also where a prompt has two; the branch keeps its own cache."""
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, images_per_row=[1, 2, 1])
    parts = [hot(*LEFT, 0.5), hot(*RIGHT, 0.5), hot(slice(0, 2), slice(0, 4), 0.5), (torch.zeros(4, 4), 1.0)]
    method = Planted(alpha=1.5, beta=0.05, given=lambda image, tile: parts[image])
    keep = [matching_pixels(*part, 16, 16) for part in parts]
    assert keep[0][:, :7].all()
    assert not keep[0][:, 9:].any()
    assert not keep[1][:, :7].any()
    assert not keep[2][9:].any()
    assert keep[3].all()
    other = blacked(batch, keep)
    expected, scores = slow_answer(model, batch, other, partial(slow_sum, alpha=method.alpha, beta=method.beta), 4)
    with attach(model, method):
        output = model.generate(
            **batch,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            use_cache=use_cache,
        )
    assert output.sequences[:, -4:].tolist() == expected.tolist()
    torch.testing.assert_close(torch.stack(output.logits), torch.tensor(scores), atol=2e-4, rtol=0)
    assert method.asked == [4]  # the maps are made once, also where the prompt is read anew for every token
    # A branch that took over the main one's cache would be the same as the main one from the second token on.
    shared = slow_answer(
        model, batch, batch["pixel_values"], partial(slow_sum, alpha=method.alpha, beta=method.beta), 4
    )[1]
    assert (torch.tensor(shared)[1:] - torch.tensor(scores)[1:]).abs().nan_to_num(0).max() > 1e-2


@torch.no_grad()
def test_what_the_matcher_leaves_out_does_not_reach_the_branch() -> None:
    """Pixels that change where the matcher sees no match change the main branch only."""
    model = tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0)
    changed = {**batch, "pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][..., 10:] = changed["pixel_values"][..., 10:].flip(-1)
    weight = 99.0

    def branch(inputs: dict[str, Any], part: tuple[slice, slice]) -> Tensor:
        own = model(**inputs).logits[:, -1]
        with attach(model, Planted(alpha=weight, beta=0.0, given=lambda image, tile: hot(*part, 0.5))):
            return (model(**inputs).logits[:, -1] - own) / weight

    torch.testing.assert_close(branch(changed, LEFT), branch(batch, LEFT), atol=1e-4, rtol=0)
    assert (branch(changed, RIGHT) - branch(batch, RIGHT)).abs().max() > 1e-2


@torch.no_grad()
def test_beams_ask_the_matcher_once() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, images_per_row=[2, 0, 1])
    method = Planted(given=lambda image, tile: hot(*LEFT, 0.5))
    with attach(model, method):
        model.generate(**batch, max_new_tokens=3, num_beams=3, do_sample=False)
    assert method.asked == [3]


# --- The decoder's attention as the matcher ---


def eager_maps(model: Any, batch: dict[str, Any], layers: Sequence[int], queries: str) -> list[list[float]]:
    """For each row, what is paid to its visual tokens, read off the model's own output."""
    model.set_attn_implementation("eager")
    try:
        attentions = model(**batch, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    maps = []
    for row, ids in enumerate(batch["input_ids"].tolist()):
        visual = [place for place, token in enumerate(ids) if token == tiny.IMAGE]
        looking = [len(ids) - 1] if queries == "last" else list(range(visual[-1] + 1, len(ids)))
        weights = [attentions[layer][row, :, query] for layer in layers for query in looking]
        maps.append([sum(float(w[:, place].mean()) for w in weights) / len(weights) for place in visual])
    return maps


@torch.no_grad()
@pytest.mark.parametrize("queries", ["last", "text"])
@pytest.mark.parametrize("layers", [(0,), (0, 2)])
def test_the_map_is_the_decoders_attention_laid_over_the_picture(layers: tuple[int, ...], queries: str) -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, images_per_row=[1, 2, 1])
    expected = eager_maps(model, batch, layers, queries)
    matches = found(model, batch, layers=layers, queries=queries, similarity=0.3)
    by_image = [expected[0], expected[1][:16], expected[1][16:], expected[2]]
    assert len(matches) == 4
    for (match,), values in zip(matches, by_image, strict=True):
        torch.testing.assert_close(match.relevance, torch.tensor(values).reshape(4, 4), atol=1e-6, rtol=1e-4)
        assert match.similarity == 0.3


@torch.no_grad()
@pytest.mark.parametrize("family", ["internvl", "idefics3"])
def test_of_an_image_in_tiles_each_tile_has_its_own_map(family: str) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model, images_per_row=[1, 1, 1])  # the second image is cut into tiles
    expected = eager_maps(model, batch, [1], "last")
    matches = found(model, batch, layers=(1,))
    assert [len(tiles) for tiles in matches] == ([1, 3, 1] if family == "internvl" else [1, 5, 1])
    for row, tiles in enumerate(matches):
        values = torch.cat([tile.relevance.flatten() for tile in tiles])
        torch.testing.assert_close(values, torch.tensor(expected[row]), atol=1e-6, rtol=1e-4)
        assert {tuple(tile.relevance.shape) for tile in tiles} == {(4, 4)}


@torch.no_grad()
def test_a_grid_that_is_no_square() -> None:
    model = tiny.tiny_model("qwen2_5_vl")
    batch = tiny.inputs("qwen2_5_vl", model)
    shapes = [tuple(match.relevance.shape) for (match,) in found(model, batch)]
    assert shapes == [(4, 6), (5, 4), (4, 4)]


@torch.no_grad()
def test_beams_do_not_mix_up_the_rows() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, images_per_row=[1, 2, 1])
    method = Watched()
    with attach(model, method):
        model.generate(**batch, max_new_tokens=1, num_beams=3, do_sample=False)
    plain = found(model, batch)
    assert len(plain) == 4
    for (match,), (other,) in zip(method.seen[0], plain, strict=True):
        torch.testing.assert_close(match.relevance, other.relevance, atol=1e-6, rtol=1e-4)


def test_the_layers_that_are_read() -> None:
    default = DecoderAttention(None, "last", 0.35)
    assert list(default.layers_of(5)) == [2, 3]
    assert list(default.layers_of(32)) == list(range(13, 26))
    assert all(len(default.layers_of(depth)) >= 1 for depth in range(1, 50))
    assert max(default.layers_of(2)) <= 1
    assert list(DecoderAttention((3, 1, 3), "last", 0.35).layers_of(5)) == [1, 3]


# --- Settings ---


def test_the_short_form() -> None:
    method = Agla(matcher="Salesforce/blip-itm-large-coco", alpha=1.0, layers=(3, 4))
    assert parse_methods(describe([method])) == (method,)
    (parsed,) = parse_methods("agla:matcher=some/where,queries=text")
    assert parsed == Agla(matcher="some/where", queries="text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha=-1.0), r"alpha of agla must lie in \[0, 100\], not -1.0"),
        (dict(beta=1.5), r"beta of agla must lie in \[0, 1\], not 1.5"),
        (dict(similarity=float("nan")), "similarity of agla"),
        (dict(matcher=""), "matcher of agla must be 'attention', or a folder or hub id of a checkpoint, not ''"),
        (dict(matcher=None), "matcher of agla must be .* not None"),
        (dict(layers=()), "layers of agla must name at least one layer"),
        (dict(queries="lost"), "unknown queries of agla 'lost' .did you mean 'last'"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Agla(**options)


def test_what_the_decoder_lacks_is_refused_when_attached() -> None:
    model = tiny.tiny_model("llava")
    for layer in (3, -1):
        with pytest.raises(InputError, match=f"has layers 0 to 2, and no layer {layer}"):
            attach(model, Agla(layers=(layer,)))
    for family in ("llava_next", "llava_onevision"):
        with pytest.raises(InputError, match=f"cannot be laid over the pictures of this {family}"):
            attach(tiny.tiny_model(family), Agla())
    with_cls = tiny.tiny_model("llava", vision_feature_select_strategy="full", image_seq_length=17)
    with pytest.raises(InputError, match="tokens are no raster"):
        attach(with_cls, Agla())
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="cannot be reached in 'flash_attention_2'"):
        attach(model, Agla())


def test_an_image_whose_tokens_are_no_raster_is_refused_when_it_comes() -> None:
    model = tiny.tiny_model("qwen2_vl")
    batch = tiny.single("qwen2_vl", model, 0)
    batch["image_grid_thw"] = torch.tensor([[2, 4, 12]])  # a film
    with attach(model, Agla()), pytest.raises(InputError, match="an image of this qwen2_vl whose visual tokens"):
        model(**batch)


def test_it_is_exported() -> None:
    assert sl.Agla is Agla
