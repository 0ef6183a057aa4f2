"""The base of methods that read a row's pictures as a clip: what they are given, and where their tokens go."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import families as tiny
import pytest
import torch
from families import FAMILIES
from specimens import Mirror
from torch import Tensor, nn

import sightline as sl
from sightline.errors import InputError
from sightline.models.anatomy import Anatomy
from sightline.reduction.frame_reducer import FrameReducer, Frames

WORKING = ("llava", "paligemma")


@dataclass(frozen=True)
class FirstOfEach(FrameReducer):
    """Two tokens: the sum of all frames' first tokens, and that of the question. Notes what it is given."""

    paper: ClassVar[str] = "first_of_each"
    count: int = 2
    seen: list[Frames] = field(default_factory=list, hash=False, compare=False)
    weights: str = field(default="untrained", kw_only=True)

    def identity(self) -> Self:
        return replace(self, count=0)

    def build(self, anatomy: Anatomy) -> nn.Module:
        return nn.Identity()

    def tokens(self, frames: Frames) -> Tensor:
        self.seen.append(frames)
        both = torch.stack([frames.features[:, 0].sum(0), frames.question.sum(0)])
        return both.repeat(self.count, 1)[: self.count]


def given(family: str, batch: dict[str, Any]) -> tuple[list[Frames], list[Tensor], Any]:
    """What the method saw in a plain forward, and what entered the decoder without it and with it."""
    model = tiny.tiny_model(family)
    method = FirstOfEach()
    entered: list[Tensor] = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args: entered.append(args[0])
    )
    with torch.no_grad():
        model(**batch)
        with sl.attach(model, method) as attachment:
            model(**batch)
    handle.remove()
    return method.seen, entered, attachment


@pytest.mark.parametrize("family", WORKING)
def test_what_a_clip_is(family: str) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model, images_per_row=[3, 0, 2])
    seen, _, _ = given(family, batch)
    features = model.model.get_image_features(batch["pixel_values"]).pooler_output
    features = torch.stack(list(features))
    assert [len(frames) for frames in seen] == [3, 2]
    for frames, pictures in zip(seen, (slice(0, 3), slice(3, 5)), strict=True):
        torch.testing.assert_close(frames.features, features[pictures], rtol=0, atol=1e-6)
        # The connector's input is what it makes these features of.
        torch.testing.assert_close(frames.connected(frames.tower), features[pictures], rtol=0, atol=1e-6)
        assert frames.grid == (4, 4)
        assert frames.readings == {}


@pytest.mark.parametrize("family", WORKING)
def test_the_question_is_the_text_after_the_last_picture(family: str) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model, images_per_row=[3, 0, 2])
    seen, _, _ = given(family, batch)
    for frames, row in zip(seen, (0, 2), strict=True):
        ids = batch["input_ids"][row].tolist()
        last = max(place for place, token in enumerate(ids) if token == tiny.IMAGE)
        expected = model.model.language_model.embed_tokens(torch.tensor(ids[last + 1 :]))
        torch.testing.assert_close(frames.question, expected)


def test_where_nothing_follows_the_pictures_the_question_is_all_text_without_padding() -> None:
    model = tiny.tiny_model("llava")
    ids = torch.tensor([[tiny.PAD, tiny.BOS, 7, *[tiny.IMAGE] * 16]])
    picture = tiny.single("llava", model, 0)["pixel_values"]
    seen, _, _ = given("llava", {"input_ids": ids, "attention_mask": (ids != tiny.PAD).long(), "pixel_values": picture})
    expected = model.model.language_model.embed_tokens(torch.tensor([tiny.BOS, 7]))
    torch.testing.assert_close(seen[0].question, expected)


@pytest.mark.parametrize("family", WORKING)
def test_the_tokens_stand_at_the_first_places_of_the_row(family: str) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.single(family, model, 0, images_per_row=3)
    seen, (stock, reduced), attachment = given(family, batch)
    ids = batch["input_ids"][0].tolist()
    places = [place for place, token in enumerate(ids) if token == tiny.IMAGE]
    left = [place for place in range(len(ids)) if place not in places[2:]]
    expected = stock[0].clone()
    expected[places[0]] = seen[0].features[:, 0].sum(0)
    expected[places[1]] = seen[0].question.sum(0)
    torch.testing.assert_close(reduced[0], expected[left], rtol=0, atol=1e-5)
    assert [[image.tolist() for image in row] for row in attachment.kept] == [[[0, 1], [], []]]


def test_rows_of_a_batch_are_reduced_each_by_itself_also_under_beams() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, images_per_row=[3, 0, 2])
    method = FirstOfEach()
    with sl.attach(model, method) as attachment:
        model.generate(**batch, max_new_tokens=2, num_beams=2, do_sample=False)
        assert attachment.visual_tokens == [2, 2, 0, 0, 2, 2]
    rows = [tiny.single("llava", model, row, images_per_row=[3, 0, 2]) for row in (0, 2)]
    for frames, one in zip(method.seen, rows, strict=True):
        alone, _, _ = given("llava", one)
        torch.testing.assert_close(frames.features, alone[0].features, rtol=0, atol=1e-6)
        torch.testing.assert_close(frames.question, alone[0].question)


def test_without_a_cache_the_answer_is_no_part_of_the_question() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0)
    method = FirstOfEach()
    with sl.attach(model, method):
        model.generate(**batch, max_new_tokens=3, do_sample=False, use_cache=False)
    lengths = {len(frames.question) for frames in method.seen}
    assert len(method.seen) == 3
    assert lengths == {len(tiny.questions_for(1)[0])}


@dataclass(frozen=True)
class FiveOrTwo(FirstOfEach):
    """Leaves five tokens or two, as a picture has it, or its mirror image."""

    paper: ClassVar[str] = "five_or_two"
    changes: ClassVar[frozenset[str]] = frozenset()

    def tokens(self, frames: Frames) -> Tensor:
        left, right = frames.features[0, 0].sum(), frames.features[0, 3].sum()
        return frames.features[0, : 5 if left > right else 2]


@pytest.mark.parametrize("family", WORKING)
def test_a_branch_may_keep_more_tokens_than_the_main_rows_or_fewer(family: str) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model, images_per_row=[0, 0, 1])
    mirrored = {**batch, "pixel_values": batch["pixel_values"].flip(-1)}
    counts = []
    for shown, other in ((batch, mirrored), (mirrored, batch)):
        with torch.no_grad(), sl.attach(model, FiveOrTwo()) as attachment:
            expected = model(**other).logits[:, -1]
            counts.append(attachment.visual_tokens)
        with torch.no_grad(), sl.attach(model, Mirror(), FiveOrTwo()):
            found = model(**shown).logits[:, -1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert sorted(counts) == [[0, 0, 2], [0, 0, 5]]


def test_more_tokens_than_places_are_refused() -> None:
    model = tiny.tiny_model("llava")
    with sl.attach(model, FirstOfEach(count=17)), pytest.raises(InputError, match=r"makes 17 tokens .* has 16 places"):
        model(**tiny.single("llava", model, 0))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WORKING])
def test_models_whose_connector_is_not_plain_are_refused(family: str) -> None:
    with pytest.raises(InputError, match=f"which {family} does not have"):
        sl.attach(tiny.tiny_model(family), FirstOfEach())
