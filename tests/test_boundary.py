"""The boundary of the language model: how often and with which rows the decoder runs, what the extra rows are, and what
is refused."""

from __future__ import annotations

from typing import Any

import families as tiny
import pytest
import torch
from families import FAMILIES
from specimens import (
    NAMES,
    WORKING,
    EveryOther,
    Listening,
    Mirror,
    Nothing,
    Watching,
    anatomy_of,
    composing,
    forward_logits,
    generate,
    logits,
    model_of,
    specimen,
    tokens,
)
from tiny_processor import TinyProcessor, picture
from torch import Tensor
from transformers import DynamicCache

import sightline as sl
from sightline.errors import InputError
from sightline.grounding.attention_steering import AttentionSteering
from sightline.grounding.contrastive_decoding import ContrastiveDecoding, PictureView
from sightline.grounding.hidden_steering import HiddenSteering
from sightline.methods import Method
from sightline.models.answering import prepare

works = pytest.mark.parametrize(("name", "family"), WORKING)
each_family = pytest.mark.parametrize("family", FAMILIES)


class Counter:
    """Notes rows and length of every run of the first decoder layer, and counts the runs of the tower."""

    def __init__(self, family: str) -> None:
        anatomy = anatomy_of(family)
        self.runs: list[tuple[int, int]] = []
        self.encoded = 0
        self._handles = [
            anatomy.layers[0].register_forward_pre_hook(lambda module, args: self.runs.append(args[0].shape[:2])),
            anatomy.vision_tower.register_forward_pre_hook(self._count),
        ]

    def _count(self, module: Any, args: Any) -> None:
        self.encoded += 1

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


WITHOUT_PICTURE = ("debiasing", "imbalanced_attention", "pai")
"""The contrastive methods whose branch is the prompt without its picture: they share its rows."""
LOOKS_FIRST = "agla"
"""Reads the prompt once by itself, to see where the model looks, and encodes what it makes of the picture."""


READS_THE_QUESTION = "inference_optimal"
"""Reads the questions of the rows with pictures by themselves, before it makes visual tokens."""


def expected_runs(
    methods: list[Method], rows: int, prompt: int, new: int, whole: int = 0, asked: tuple[int, int] | None = None
) -> list[tuple[int, int]]:
    """From the kinds of the methods: the prompt is read once, with a row more for each branch, and `whole`, before
    tokens are dropped, by the method that looks first; before that what is `asked`, where the question is read alone.
    """
    steering = sum(isinstance(method, HiddenSteering) for method in methods)
    while_reading = sum(isinstance(method, AttentionSteering) for method in methods)
    contrastive = [method.paper for method in methods if isinstance(method, ContrastiveDecoding)]
    to_the_end = len({"shared" if paper in WITHOUT_PICTURE else paper for paper in contrastive})
    extra = [(rows, whole or prompt)] * (LOOKS_FIRST in contrastive) + [(2 * rows, prompt)] * steering
    first = [asked] if asked and READS_THE_QUESTION in {method.paper for method in methods} else []
    read = (rows * (1 + while_reading + to_the_end), prompt)
    return [*first, *extra, read] + [(rows * (1 + to_the_end), 1)] * (new - 1)


@works
def test_the_prompt_is_read_once(name: str, family: str) -> None:
    model, method = model_of(family), specimen(name)
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    with Counter(family) as stock:
        generate(model, batch)
    with sl.attach(model, method) as attachment, Counter(family) as attached:
        generate(model, batch)
    assert attachment.columns is not None
    prompt = attachment.columns.shape[1]
    assert attached.runs == expected_runs([method], 3, prompt, 4, asked=attached.runs[0])
    if name == READS_THE_QUESTION:
        rows, longest = attached.runs[0]
        assert rows == 2
        assert longest < int((batch["input_ids"] != anatomy_of(family).image_token_id).sum(dim=1).max())
    put_in = bool((attachment.columns < 0).any())
    assert prompt == batch["input_ids"].shape[1] or attachment.kept is not None or put_in
    assert attached.encoded == stock.encoded + (isinstance(method, PictureView) or name == LOOKS_FIRST)


@each_family
def test_the_prompt_is_read_once_by_all_methods_together(family: str) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model)
    methods = composing([name for name in NAMES if (name, family) in WORKING])
    with sl.attach(model, *methods) as attachment, Counter(family) as counter:
        generate(model, batch, num_beams=2)
    assert attachment.columns is not None
    prompt = attachment.columns.shape[1]
    assert counter.runs == expected_runs(methods, 6, prompt, 4, batch["input_ids"].shape[1])


@works
def test_without_a_cache_what_the_prompt_told_is_not_asked_again(name: str, family: str) -> None:
    model, method = model_of(family), specimen(name)
    batch = tiny.single(family, model, 0)
    with Counter(family) as stock:
        generate(model, batch, use_cache=False)
    with sl.attach(model, method), Counter(family) as attached:
        generate(model, batch, use_cache=False)
    expected = expected_runs([method], 1, 0, 4, asked=(1, 0))
    assert [rows for rows, _ in attached.runs] == [rows for rows, _ in expected]
    assert attached.encoded == stock.encoded + (isinstance(method, PictureView) or name == LOOKS_FIRST)


# --- The extra rows, against the stock model ---


def deleted(family: str, one: dict[str, Any]) -> dict[str, Any]:
    """A single prompt without its visual tokens and without pictures."""
    keep = ~anatomy_of(family).visual_positions(one["input_ids"])
    names = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    return {name: one[name][keep][None] for name in names if name in one}


def layers_of_stock(family: str, batch: dict[str, Any], heads: bool = False) -> Tensor:
    """What each layer (or with `heads` each layer's attention heads) gives at the last position, [B, layers, D]."""
    anatomy = anatomy_of(family)
    found: list[Tensor] = []
    if heads:
        handles = [
            anatomy.attention_heads_input(layer).register_forward_pre_hook(
                lambda module, args: found.append(args[0][:, -1])
            )
            for layer in anatomy.layers
        ]
    else:
        handles = [
            layer.register_forward_hook(lambda module, args, output: found.append(output[:, -1]))
            for layer in anatomy.layers
        ]
    forward_logits(model_of(family), batch)
    for handle in handles:
        handle.remove()
    return torch.stack(found, dim=1)


@each_family
@pytest.mark.parametrize("kind", [Watching, Listening])
@pytest.mark.parametrize("reducer", [None, EveryOther(positions="kept")], ids=["whole", "reduced"])
def test_the_row_without_a_picture_is_the_prompt_without_its_visual_tokens(
    family: str, kind: Any, reducer: Any
) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    method = kind()
    others = [] if reducer is None else [reducer]
    with sl.attach(model, method, *others):
        got = forward_logits(model, batch)
    with sl.attach(model, *others):
        torch.testing.assert_close(got, forward_logits(model, batch), atol=5e-5, rtol=0)
        full = [layers_of_stock(family, batch, heads=kind is Listening)]
    text = [
        layers_of_stock(
            family, deleted(family, tiny.single(family, model, row, images_per_row=[2, 0, 1])), kind is Listening
        )
        for row in range(3)
    ]
    if kind is Watching:
        (seen,) = method.seen
    else:  # layer by layer, [B, heads, head_dim] each
        seen = tuple(torch.stack([layer[side].flatten(1) for layer in method.seen], dim=1) for side in (0, 1))
    torch.testing.assert_close(seen[0], full[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(seen[1], torch.cat(text), atol=2e-5, rtol=0)


@each_family
@pytest.mark.parametrize("images", [1, [2, 0, 1]], ids=["one each", "two, none, one"])
def test_a_branch_is_the_stock_model_shown_the_other_picture(family: str, images: Any) -> None:
    model, anatomy = model_of(family), anatomy_of(family)
    batch = tiny.inputs(family, model, images_per_row=images)
    mirrored = anatomy.map_pictures(batch, lambda picture, _: picture.flip(-1))
    want = generate(model, mirrored)
    assert (logits(want) - logits(generate(model, batch)))[0].abs().max() > 1e-2
    with sl.attach(model, Mirror()):
        for options in ({}, {"use_cache": False}):
            got = generate(model, batch, **options)
            assert torch.equal(got.sequences, want.sequences)
            torch.testing.assert_close(logits(got), logits(want), atol=1e-4, rtol=0)
        torch.testing.assert_close(forward_logits(model, batch), logits(want)[:, 0], atol=1e-4, rtol=0)


@each_family
def test_a_branch_follows_the_beams_as_the_stock_model_does(family: str) -> None:
    model, anatomy = model_of(family), anatomy_of(family)
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    mirrored = anatomy.map_pictures(batch, lambda picture, _: picture.flip(-1))
    options: dict[str, Any] = dict(new=6, num_beams=3, num_return_sequences=3, output_scores=True)
    want = generate(model, mirrored, **options)
    with sl.attach(model, Mirror()):
        got = generate(model, batch, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llava", "internvl", "idefics3"])
def test_a_branch_does_not_see_the_padding_of_later_tokens(family: str) -> None:
    model, anatomy = model_of(family), anatomy_of(family)
    batch = tiny.inputs(family, model)
    mirrored = anatomy.map_pictures(batch, lambda picture, _: picture.flip(-1))
    later = torch.tensor([[tiny.PAD, tiny.PAD, 7], [4, 5, 6], [tiny.PAD, 8, 9]])
    mask = torch.cat([batch["attention_mask"], (later != tiny.PAD).long()], dim=1)

    def further(inputs: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            cache = model(**inputs).past_key_values
            return model(later, attention_mask=mask, past_key_values=cache).logits[:, -1]

    want = further(mirrored)
    with sl.attach(model, Mirror()):
        torch.testing.assert_close(further(batch), want, atol=1e-4, rtol=0)


# --- What is refused ---

refused_family = pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])


def test_a_question_so_long_that_nothing_visual_fits_is_refused() -> None:
    model = tiny.tiny_model("llava")
    room = model.config.text_config.max_position_embeddings = 40
    question = [7] * room
    with sl.attach(model, EveryOther()), pytest.raises(InputError, match=r"tokens of text, and llava reads 40 at most"):
        model(**tiny.inputs("llava", model, questions=[question]))
    with sl.attach(model, EveryOther()):
        model(**tiny.inputs("llava", model, questions=[question[:30]]))
    processor = TinyProcessor("llava", model)
    with pytest.raises(InputError, match=r"tokens of text, and llava reads 40 at most"):  # also with nothing attached
        prepare(model, processor, [picture(7)], ["t7 " * room])


def test_a_prompt_without_pictures_is_not_taken_for_the_one_before() -> None:
    model = model_of("llava")
    with sl.attach(model, EveryOther()) as attachment:
        model(**tiny.inputs("llava", model))
        assert attachment.visual_tokens == [8, 8, 8]
        model(**tiny.inputs("llava", model, images_per_row=0))
        assert attachment.call is None
        assert attachment.kept is None


@refused_family
@pytest.mark.parametrize("method", [Nothing(), EveryOther(), Mirror()], ids=lambda method: method.paper)
class TestRefusals:
    """One clear sentence, raised by whatever is called first; the context can be used afterwards."""

    def test_right_padding(self, family: str, method: Method) -> None:
        model = model_of(family)
        batch = tiny.inputs(family, model, padding="right")
        with sl.attach(model, method):
            with pytest.raises(InputError, match="pad the prompts on the left"):
                generate(model, batch)
            with pytest.raises(InputError, match="pad the prompts on the left"):
                model(**batch)
            assert len(tokens(model, tiny.inputs(family, model))) == 3

    def test_a_static_cache(self, family: str, method: Method) -> None:
        model = model_of(family)
        with sl.attach(model, method), pytest.raises(InputError, match="the dynamic cache, not a static one"):
            generate(model, tiny.inputs(family, model), cache_implementation="static")

    def test_embeddings_in_the_place_of_ids(self, family: str, method: Method) -> None:
        model = model_of(family)
        batch = tiny.inputs(family, model)
        embeds = model.get_input_embeddings()(batch["input_ids"])
        with sl.attach(model, method), pytest.raises(InputError, match="needs input_ids"):
            model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])

    def test_pictures_encoded_outside_the_context(self, family: str, method: Method) -> None:
        model = model_of(family)
        batch = tiny.inputs(family, model)
        names = [name for name in ("pixel_values", "image_grid_thw") if name in batch]
        encoded = anatomy_of(family).base.get_image_features(**{name: batch[name] for name in names}, return_dict=True)
        given = {name: value for name, value in batch.items() if name != "pixel_values"}
        given["mm_encoder_outputs"] = {"image": encoded}
        with torch.no_grad():
            torch.testing.assert_close(model(**given).logits, model(**batch).logits)  # the stock model takes them
        with sl.attach(model, method):
            with pytest.raises(InputError, match="encode the pictures inside the same context"):
                model(**given)
            other = tiny.inputs(family, model, seed=1)
            generate(model, other)
            with pytest.raises(InputError, match="not those that were encoded last in this context"):
                model(**given)
            with pytest.raises(InputError, match="encode the pictures inside the same context"):
                model(**{name: value for name, value in batch.items() if name != "pixel_values"})

    def test_a_cache_filled_outside_the_context(self, family: str, method: Method) -> None:
        model = model_of(family)
        one = tiny.single(family, model, 0)
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(**one, past_key_values=cache)
        with sl.attach(model, method), pytest.raises(InputError, match="this cache was filled outside the context"):
            model(torch.tensor([[5]]), past_key_values=cache)

    def test_a_second_picture_for_a_kept_cache(self, family: str, method: Method) -> None:
        model = model_of(family)
        one = tiny.single(family, model, 0)
        with sl.attach(model, method), torch.no_grad():
            cache = model(**one).past_key_values
            with pytest.raises(InputError, match="no picture can join a prompt whose cache is kept"):
                model(**{name: one[name] for name in one if name != "attention_mask"}, past_key_values=cache)

    def test_a_prompt_in_pieces(self, family: str, method: Method) -> None:
        model = model_of(family)
        with sl.attach(model, method), pytest.raises(InputError, match="in one piece"):
            generate(model, tiny.single(family, model, 0), prefill_chunk_size=7)

    def test_several_tokens_at_a_time(self, family: str, method: Method) -> None:
        model = model_of(family)
        one = tiny.single(family, model, 0, questions=[[5, 6, 7, 5, 6, 7, 5, 6]])
        with sl.attach(model, method), pytest.raises(InputError, match="no assisted decoding and no prompt lookup"):
            generate(model, one, new=8, prompt_lookup_num_tokens=2)

    def test_a_tuple_in_the_place_of_a_dict(self, family: str, method: Method) -> None:
        model = model_of(family)
        with sl.attach(model, method), pytest.raises(InputError, match="leave return_dict as it is"):
            model(**tiny.single(family, model, 0), return_dict=False)

    def test_a_square_mask(self, family: str, method: Method) -> None:
        model = model_of(family)
        one = tiny.single(family, model, 0)
        length = one["input_ids"].shape[1]
        one["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        with sl.attach(model, method), pytest.raises(InputError, match="ordinary attention_mask"):
            model(**one)

    def test_a_prompt_and_pictures_that_do_not_fit(self, family: str, method: Method) -> None:
        model = model_of(family)
        batch = tiny.inputs(family, model)
        short = {name: value[:2] if name in ("input_ids", "attention_mask") else value for name, value in batch.items()}
        with sl.attach(model, method), pytest.raises((InputError, ValueError, RuntimeError)):
            model(**short)


@pytest.mark.parametrize("family", tiny.MROPE_FAMILIES)
def test_a_video(family: str) -> None:
    model = model_of(family)
    one = tiny.single(family, model, 0)
    ids = torch.where(one["input_ids"] == tiny.IMAGE, tiny.VIDEO, one["input_ids"])
    film = {"pixel_values_videos": one["pixel_values"], "video_grid_thw": one["image_grid_thw"]}
    with sl.attach(model, Nothing()), pytest.raises(InputError, match="no videos"):
        model(input_ids=ids, attention_mask=one["attention_mask"], mm_token_type_ids=2 * (ids == tiny.VIDEO), **film)


@each_family
def test_tokens_of_a_shortened_cache_that_are_given_again(family: str) -> None:
    """`generate` would take as many of them as the cache seems to lack."""
    model = model_of(family)
    one = tiny.single(family, model, 0, questions=[list(range(3, 30))])
    with sl.attach(model, EveryOther()):
        first = generate(model, one)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6]])], dim=1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
        if "token_type_ids" in one:
            again["token_type_ids"] = torch.zeros_like(ids)
        with pytest.raises(InputError, match="cannot be given again"):
            generate(model, again)


@pytest.mark.parametrize("use_cache", [True, False])
@each_family
def test_a_generated_placeholder_is_a_token_like_any_other(family: str, use_cache: bool) -> None:
    """As in the stock model: with a cache it is embedded and goes on; without, its features are missing."""
    model = model_of(family)
    batch = tiny.inputs(family, model)
    always: dict[str, Any] = dict(new=3, use_cache=use_cache, prefix_allowed_tokens_fn=lambda row, ids: [tiny.IMAGE])
    if not use_cache:
        with pytest.raises(Exception, match=r"do not match|does not match"):
            generate(model, batch, **always)
        with sl.attach(model, EveryOther()), pytest.raises((InputError, ValueError)):
            generate(model, batch, **always)
        return
    want = tokens(model, batch, **always)
    for method in (EveryOther(), Mirror(), Watching(), Listening()):
        with sl.attach(model, method):
            assert tokens(model, batch, **always) == want


def test_an_unknown_family() -> None:
    with pytest.raises(InputError, match="unknown model family 'Linear'"):
        sl.attach(torch.nn.Linear(2, 2), EveryOther())  # type: ignore[arg-type]


def test_the_same_method_twice_and_two_reducers() -> None:
    model = model_of("llava")
    with pytest.raises(InputError, match="vista is given twice; give it once"):
        sl.attach(model, specimen("vista"), specimen("vhr"), specimen("vista").identity())
    with pytest.raises(InputError, match="fastervlm and every_other do not compose: both change which visual tokens"):
        sl.attach(model, specimen("fastervlm"), EveryOther())
    with pytest.raises(InputError, match="vhr and listening do not compose: both change the attention heads' outputs"):
        sl.attach(model, specimen("vhr"), Listening())
