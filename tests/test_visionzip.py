"""VisionZip: dominant tokens and averages against a slow version on eager attention and keys."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import families as tiny
import pytest
import torch
from families import MROPE_FAMILIES
from specimens import anatomy_of
from test_fopru import KNOWN, on_tokens, profiles, tower_attention
from torch import Tensor

import sightline as sl
from sightline.errors import InputError
from sightline.models.anatomy import Anatomy
from sightline.reduction.token_reducer import ImageTokens
from sightline.reduction.visionzip import VisionZip


def slow(
    scores: list[float], keys: list[list[float]], features: list[list[float]], keep: int, contextual: float
) -> dict[int, list[float]]:
    """The places that stay, and what stands there."""

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    patches = [place for place, score in enumerate(scores) if score != -math.inf]
    newlines = [place for place in range(len(scores)) if place not in patches]
    of_patches = min(keep, len(patches))
    averages = round(contextual * of_patches)
    dominant = sorted(patches, key=lambda place: -scores[place])[: of_patches - averages]
    left = {place: features[place] for place in dominant + newlines[: keep - of_patches]}
    others = [place for place in patches if place not in dominant]
    targets = [others[number * (len(others) // averages)] for number in range(averages)]
    groups: dict[int, list[int]] = {target: [target] for target in targets}
    for place in others:
        if targets and place not in targets:
            nearest = max(targets, key=lambda target: cosine(keys[place], keys[target]))
            groups[nearest].append(place)
    for target, group in groups.items():
        left[target] = [sum(values) / len(group) for values in zip(*(features[one] for one in group), strict=True)]
    return left


def tower_keys(anatomy: Anatomy, batch: dict[str, Any]) -> Tensor:
    """[pictures, tokens, head_dim]: the keys of the connected layer as its projection gave them, mean over heads."""
    assert anatomy.connected_layer is not None
    attention: Any = anatomy.tower_attentions[anatomy.connected_layer]
    seen: list[Tensor] = []
    last = attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj
    handle = last.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        anatomy.model(**batch)
    handle.remove()
    heads = torch.cat(seen).chunk(attention.num_heads, dim=-1)
    return sum(heads[1:], heads[0]) / len(heads)


def entering(model: Any, batch: dict[str, Any], *methods: VisionZip) -> tuple[Tensor, Any]:
    anatomy, seen = Anatomy.of(model), []
    with sl.attach(model, *methods) as attachment, torch.no_grad():
        handle = anatomy.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
        )
        model(**batch)
        handle.remove()
    return seen[0], attachment


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize(("keep", "contextual"), [(0.4, 0.5), (0.6, 10 / 64)])
def test_what_is_left_is_what_a_slow_zipping_leaves(family: str, keep: float, contextual: float) -> None:
    model = tiny.tiny_model(family)
    anatomy = Anatomy.of(model)
    method = VisionZip(keep=keep, contextual=contextual)
    for row in tiny.rows_of(family, model, images_per_row=2)[:2]:
        batch = tiny.collate(family, model, [row], "left")
        attention, leading = tower_attention(anatomy, batch), anatomy.leading_tokens
        if leading:
            pictures = attention.mean(dim=1)[:, 0, 1:].tolist()
        else:
            pictures = profiles(attention, 0)[0]
        channels = tower_keys(anatomy, batch)[:, leading:].unbind(dim=-1)
        by_channel = [on_tokens(family, row, channel.tolist()) for channel in channels]
        stock, _ = entering(model, batch)
        got, attachment = entering(model, batch, method)
        visual = anatomy.visual_positions(batch["input_ids"])[0].nonzero()[:, 0]
        start, expected = 0, {column: stock[column] for column in range(len(stock)) if column not in visual.tolist()}
        for image, scores in enumerate(on_tokens(family, row, pictures)):
            keys = [[max(channel[image][place], -1e9) for channel in by_channel] for place in range(len(scores))]
            places = visual[start : start + len(scores)]
            left = slow(scores, keys, stock[places].tolist(), method.budget(len(scores)), contextual)
            assert attachment.kept[0][image].tolist() == sorted(left)
            expected |= {int(places[place]): torch.tensor(value) for place, value in left.items()}
            start += len(scores)
        want = torch.stack([expected[column] for column in sorted(expected)])
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_an_example_by_hand() -> None:
    """Two dominant tokens; of the other six, targets 0 and 4 (every third), each joined by those with its key."""
    cls = torch.tensor([0.1, 0.9, 0.2, 0.1, 0.0, 0.8, 0.1, 0.0])
    a, b = [1.0, 0.0], [0.0, 2.0]
    keys = torch.tensor([a, a, b, a, b, b, a, b])
    features = torch.arange(8.0)[:, None]
    image = ImageTokens(features, readings={"cls": cls, "keys": keys})
    keep, left = VisionZip(keep=0.5, contextual=0.5).reduce(image)
    assert left is not None
    assert keep.nonzero()[:, 0].tolist() == [0, 1, 4, 5]
    assert left[:, 0].tolist() == pytest.approx([(0 + 3 + 6) / 3, 1, (2 + 4 + 7) / 3, 5])
    keep, left = VisionZip(keep=0.5, contextual=0.0).reduce(image)
    assert left is not None
    assert keep.nonzero()[:, 0].tolist() == left[:, 0].tolist() == [0, 1, 2, 5]
    keep, left = VisionZip(keep=0.25, contextual=1.0).reduce(image)
    assert left is not None
    assert keep.nonzero()[:, 0].tolist() == [0, 4]
    assert left[:, 0].tolist() == [(0 + 1 + 3 + 6) / 4, (2 + 4 + 5 + 7) / 4]


def test_newlines_take_no_part_and_come_last() -> None:
    cls = torch.tensor([0.5, 0.1, -math.inf, 0.2, 0.3, -math.inf])
    keys = torch.ones(6, 2)
    keys[[2, 5]] = 0
    image = ImageTokens(torch.arange(6.0)[:, None], readings={"cls": cls, "keys": keys})
    keep, left = VisionZip(keep=0.5, contextual=1 / 3).reduce(image)
    assert left is not None
    assert keep.nonzero()[:, 0].tolist() == [0, 1, 4]
    assert left[:, 0].tolist() == [0, (1 + 3) / 2, 4]
    keep, left = VisionZip(keep=0.8, contextual=0.5).reduce(image)
    assert left is not None
    assert keep.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]  # four patches, of which two are averages of one, a newline
    assert left[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_settings_and_refusals() -> None:
    assert dataclasses.asdict(VisionZip()) == {"keep": 0.25, "positions": "compact", "contextual": 0.15625}
    assert VisionZip(keep=1.0).is_identity
    with pytest.raises(InputError, match=r"contextual of visionzip must lie in \[0, 1\], not 1.2"):
        VisionZip(contextual=1.2)
    for family in MROPE_FAMILIES:
        with pytest.raises(InputError, match=f"visionzip looks at the patches of the vision tower, but in {family}"):
            VisionZip().check(anatomy_of(family))
