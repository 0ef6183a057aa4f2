"""Dropping visual tokens: what is left equals the stock model that may not look at what is gone, on every family."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import families as tiny
import pytest
import torch
from families import FAMILIES, MROPE_FAMILIES
from specimens import (
    NEW_TOKENS,
    EveryOther,
    Mirror,
    anatomy_of,
    forward_logits,
    generate,
    logits,
    model_of,
    specimen,
    tokens,
)
from torch import Tensor

import sightline as sl
from sightline.methods import Method

each_family = pytest.mark.parametrize("family", FAMILIES)
REDUCERS = [("every_other", family) for family in FAMILIES]
REDUCERS += [("fastervlm", family) for family in tiny.CLS_FAMILIES]
each_reducer = pytest.mark.parametrize(("name", "family"), REDUCERS)


def reducer(name: str, **options: Any) -> Any:
    return EveryOther(**options) if name == "every_other" else type(specimen(name))(**{"keep": 0.4, **options})


def dropped_places(ids: Tensor, visual: Tensor, kept: list[list[Tensor]], lengths: list[int]) -> Tensor:
    """bool [B, S]: where the dropped tokens were, walking through the prompt image by image."""
    gone = torch.zeros_like(ids, dtype=torch.bool)
    images = iter(lengths)
    for row, row_kept in enumerate(kept):
        places = visual[row].nonzero()[:, 0].tolist()
        start = 0
        for indices in row_kept:
            length = next(images)
            for index in range(length):
                gone[row, places[start + index]] = index not in indices.tolist()
            start += length
        assert start == len(places)
    return gone


def kept_by(family: str, method: Method, batch: dict[str, Any]) -> tuple[list[list[Tensor]], Tensor]:
    """What a reducer keeps of a batch, and bool [B, S] where it drops."""
    model, anatomy = model_of(family), anatomy_of(family)
    with sl.attach(model, method) as attachment:
        forward_logits(model, batch)
    kept = attachment.kept
    assert kept is not None
    visual = anatomy.visual_positions(batch["input_ids"])
    return kept, dropped_places(batch["input_ids"], visual, kept, anatomy.tokens_per_image(batch))


# --- The reference: the stock model, which reads everything at every step but may not look at some columns ---


@contextlib.contextmanager
def blind_to(family: str, gone: Tensor) -> Iterator[None]:
    """Closes the columns where `gone` [B, S] is True to all queries but themselves, layer by layer. What comes after S
    has been generated: nothing before it sees it (a plain forward of PaliGemma takes it for part of the prompt)."""
    prompt = gone.shape[1]

    def close(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask, length = kwargs["attention_mask"], args[0].shape[1]
        past = torch.ones(length, length, dtype=torch.bool).tril()
        if mask is None:
            mask = past[None, None]
        assert mask.dtype == torch.bool
        closed = torch.nn.functional.pad(gone, (0, length - prompt))[:, None, None, :].repeat(1, 1, length, 1)
        closed[..., prompt:] |= ~past[:, prompt:]
        return args, {**kwargs, "attention_mask": mask & (~closed | torch.eye(length, dtype=torch.bool))}

    layers = anatomy_of(family).layers
    handles = [layer.register_forward_pre_hook(close, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_anew(family: str, batch: dict[str, Any], gone: Tensor, steps: int) -> Tensor:
    """Logits [B, steps, vocabulary] of greedy decoding without a cache, one plain forward of the whole a token."""
    model = model_of(family)
    batch, found = dict(batch), []
    with torch.no_grad(), blind_to(family, gone):
        for _ in range(steps):
            found.append(model(**batch, use_cache=False).logits[:, -1])
            new = found[-1].argmax(dim=-1, keepdim=True)
            for name, value in {"input_ids": new, "attention_mask": torch.ones_like(new)}.items():
                batch[name] = torch.cat([batch[name], value], dim=1)
            for name in ("token_type_ids", "mm_token_type_ids"):
                if name in batch:
                    batch[name] = torch.nn.functional.pad(batch[name], (0, 1))
    return torch.stack(found, dim=1)


@each_reducer
@pytest.mark.parametrize("images", [1, [2, 0, 1]], ids=["one each", "two, none, one"])
def test_with_positions_kept_dropping_is_not_looking(name: str, family: str, images: Any) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model, images_per_row=images)
    method = reducer(name, positions="kept")
    _, gone = kept_by(family, method, batch)
    want = read_anew(family, batch, gone, NEW_TOKENS)
    with sl.attach(model, method):
        cached, anew = generate(model, batch), generate(model, batch, use_cache=False)
        plain = forward_logits(model, batch)
    torch.testing.assert_close(logits(cached), want, atol=3e-5, rtol=0)
    torch.testing.assert_close(logits(anew), want, atol=3e-5, rtol=0)
    torch.testing.assert_close(plain, want[:, 0], atol=3e-5, rtol=0)
    assert torch.equal(logits(cached).argmax(-1), want.argmax(-1))
    stock = read_anew(family, batch, torch.zeros_like(gone), 1)
    assert (stock[0, 0] - want[0, 0]).abs().max() > 1e-2  # what was dropped mattered


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "idefics3"])
def test_not_looking_is_what_the_users_own_mask_says(family: str) -> None:
    """The reference above, checked against the stock model's public mask of rows that have holes."""
    model = model_of(family)
    batch = tiny.inputs(family, model)
    _, gone = kept_by(family, EveryOther(), batch)
    mask = batch["attention_mask"] * ~gone
    positions = torch.arange(gone.shape[1]).expand(3, -1)
    holes = forward_logits(model, {**batch, "attention_mask": mask, "position_ids": positions}, use_cache=False)
    torch.testing.assert_close(read_anew(family, batch, gone, 1)[:, 0], holes, atol=3e-5, rtol=0)


# --- Positions closed up: as if the dropped tokens had never been ---


def shortened_prompt(family: str, batch: dict[str, Any], gone: Tensor) -> Tensor:
    """Next-token logits [vocabulary] of a single row whose dropped columns are deleted before the stock decoder."""
    model, anatomy = model_of(family), anatomy_of(family)
    stays = (~gone[0]).nonzero()[:, 0]
    seen: dict[str, Any] = {}
    handle = anatomy.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    forward_logits(model, batch)
    handle.remove()
    embeds = seen["inputs_embeds"][:, stays]
    image = anatomy.visual_positions(batch["input_ids"])[0, stays]
    length = len(stays)
    mask: Any = torch.ones(1, length, dtype=torch.long)
    if family == "paligemma":
        mask = torch.ones(1, 1, length, length, dtype=torch.bool)  # the prompt is a prefix: all see all
    elif family == "gemma3":
        block = (image.long().diff(prepend=torch.zeros(1, dtype=torch.long)) == 1).cumsum(0) * image
        same = (block[:, None] == block[None]) & image[:, None] & image[None]  # an image's tokens see each other
        square = (torch.ones(length, length, dtype=torch.bool).tril() | same)[None, None]
        mask = {"full_attention": square, "sliding_attention": square}
    first = 1 if family == "paligemma" else 0
    with torch.no_grad():
        hidden = anatomy.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=torch.arange(first, first + length)[None]
        ).last_hidden_state
        return anatomy.head_logits(hidden[0, -1])


@each_reducer
def test_with_positions_closed_up_it_is_a_shorter_prompt(name: str, family: str) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model, images_per_row=2)
    compact, kept = reducer(name), reducer(name, positions="kept")
    assert compact.positions == "compact"
    with sl.attach(model, compact):
        answers = generate(model, batch, new=1)
    for row in range(3):
        one = tiny.single(family, model, row, images_per_row=2)
        _, gone = kept_by(family, compact, one)
        if family in MROPE_FAMILIES:  # a place in the picture is a place in the picture
            with sl.attach(model, kept):
                want = forward_logits(model, one)[0]
        else:
            want = shortened_prompt(family, one, gone)
        torch.testing.assert_close(logits(answers)[row, 0], want, atol=5e-5, rtol=0)


# --- What is kept, and what the cache holds ---


@each_reducer
@pytest.mark.parametrize("positions", ["compact", "kept"])
def test_the_cache_holds_the_kept_tokens_and_no_other(name: str, family: str, positions: str) -> None:
    model, anatomy = model_of(family), anatomy_of(family)
    method = reducer(name, positions=positions)
    for row in range(3):
        batch = tiny.single(family, model, row, images_per_row=2)
        lengths = anatomy.tokens_per_image(batch)
        with sl.attach(model, method) as attachment:
            out = generate(model, batch)
        expected = [max(1, round(method.keep * length)) for length in lengths]
        assert [len(image) for image in attachment.kept[0]] == expected
        assert attachment.visual_tokens == [sum(expected)]
        assert attachment.visual_tokens_given == [sum(lengths)]
        prompt = batch["input_ids"].shape[1]
        filled = prompt - (sum(lengths) - sum(expected)) + NEW_TOKENS - 1  # the last token is never read
        assert [layer.keys.shape[-2] for layer in out.past_key_values.layers] == [filled] * len(anatomy.layers)
        assert [layer.values.shape[-2] for layer in out.past_key_values.layers] == [filled] * len(anatomy.layers)


@pytest.mark.parametrize("positions", ["compact", "kept"])
@pytest.mark.parametrize("family", ["gemma3", "llava_next"])
def test_windows_that_are_shorter_than_the_prompt_count_what_is_left(family: str, positions: str) -> None:
    """Step by step from the cache, which holds nothing else, and read anew at every step."""
    model = tiny.tiny_model(family, text_config=dict(sliding_window=12))
    batch = tiny.inputs(family, model, images_per_row=[2, 1, 1])
    with sl.attach(model, EveryOther(positions=positions)):
        cached, anew = (generate(model, batch, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, anew.sequences)
    torch.testing.assert_close(logits(cached), logits(anew), atol=1e-4, rtol=1e-4)


@each_reducer
def test_a_batch_is_cut_to_its_longest_row(name: str, family: str) -> None:
    model, anatomy = model_of(family), anatomy_of(family)
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    with sl.attach(model, reducer(name)) as attachment:
        out = generate(model, batch, num_beams=2)
    left = batch["attention_mask"].sum(dim=1) - anatomy.visual_positions(batch["input_ids"]).sum(dim=1)
    left = left.repeat_interleave(2) + torch.tensor(attachment.visual_tokens)
    assert {layer.keys.shape[-2] for layer in out.past_key_values.layers} == {int(left.max()) + NEW_TOKENS - 1}
    assert [len(row) for row in attachment.kept] == [2, 2, 0, 0, 1, 1]


@each_reducer
def test_what_is_kept_stands_in_the_order_of_the_prompt(name: str, family: str) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    kept, gone = kept_by(family, reducer(name), batch)
    assert [len(row) for row in kept] == [2, 0, 1]
    for row in kept:
        for image in row:
            assert image.tolist() == sorted(set(image.tolist()))
    visual = anatomy_of(family).visual_positions(batch["input_ids"])
    assert gone.any()
    assert not (gone & ~visual).any()  # text and padding marks are never dropped


@each_family
def test_the_kept_columns_reach_the_decoder_unchanged(family: str) -> None:
    model, anatomy = model_of(family), anatomy_of(family)
    batch = tiny.single(family, model, 0, images_per_row=2)
    _, gone = kept_by(family, EveryOther(), batch)
    entered: list[Tensor] = []
    handle = anatomy.layers[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    forward_logits(model, batch)
    with sl.attach(model, EveryOther()):
        forward_logits(model, batch)
    handle.remove()
    assert torch.equal(entered[1], entered[0][:, ~gone[0]])


@each_family
def test_what_the_dropped_tokens_held_does_not_matter(family: str) -> None:
    model, base = model_of(family), anatomy_of(family).base
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    _, gone = kept_by(family, EveryOther(), batch)
    flat = gone[anatomy_of(family).visual_positions(batch["input_ids"])]
    encode = base.get_image_features

    def spoil(features: Any) -> Any:
        """Adds noise to the dropped tokens' features, whatever they are grouped by."""
        groups = list(features)
        width = groups[0].shape[-1]
        noise = torch.randn(len(flat), width, generator=torch.Generator().manual_seed(0)) * flat[:, None] * 10
        parts = torch.split(noise, [group.reshape(-1, width).shape[0] for group in groups])
        spoilt = [group + part.reshape(group.shape) for group, part in zip(groups, parts, strict=True)]
        return torch.stack(spoilt) if isinstance(features, Tensor) else spoilt

    @functools.wraps(encode)
    def spoilt(*args: Any, **kwargs: Any) -> Any:
        output = encode(*args, **kwargs)
        output.pooler_output = spoil(output.pooler_output)
        if getattr(output, "deepstack_features", None):
            output.deepstack_features = [spoil(layer) for layer in output.deepstack_features]
        return output

    def everything() -> list[Tensor]:
        return [
            logits(generate(model, batch)),
            forward_logits(model, batch),
            logits(generate(model, batch, num_beams=2)),
        ]

    stock = forward_logits(model, batch)
    with sl.attach(model, EveryOther()):
        want = everything()
    base.get_image_features = spoilt
    try:
        assert (forward_logits(model, batch) - stock)[0].abs().max() > 1e-2
        with sl.attach(model, EveryOther()):
            got = everything()
        assert base.get_image_features is spoilt
    finally:
        del base.get_image_features
    for one, other in zip(want, got, strict=True):
        assert torch.equal(one, other)


# --- With other methods ---


@each_family
@pytest.mark.parametrize("order", ["mirror first", "reducer first"])
def test_a_branch_drops_its_own_tokens(family: str, order: str) -> None:
    """With a branch that is listened to alone, the answer is that of the reduced model shown the branch's picture."""
    model, anatomy = model_of(family), anatomy_of(family)
    batch = tiny.inputs(family, model, images_per_row=[2, 1, 1])
    mirrored = anatomy.map_pictures(batch, lambda picture, _: picture.flip(-1))
    method = reducer("fastervlm" if family in tiny.CLS_FAMILIES else "every_other")
    pair = [Mirror(), method] if order == "mirror first" else [method, Mirror()]
    with sl.attach(model, method) as alone:
        want = generate(model, mirrored)
        beams = tokens(model, mirrored, num_beams=3)
        other = alone.kept
    with sl.attach(model, *pair) as attachment:
        got = generate(model, batch)
        kept = attachment.kept
        assert tokens(model, batch, num_beams=3) == beams
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(logits(got), logits(want), atol=1e-4, rtol=0)
    if family in tiny.CLS_FAMILIES:
        assert kept is not None
        assert other is not None
        assert any(one.tolist() != two.tolist() for one, two in zip(kept[0], other[0], strict=True))


@each_family
def test_a_plain_loop_with_a_cache_equals_generate(family: str) -> None:
    model = model_of(family)
    one = tiny.single(family, model, 1)
    with sl.attach(model, EveryOther()), torch.no_grad():
        want = logits(generate(model, one))
        out = model(**one)
        for step in range(NEW_TOKENS):
            torch.testing.assert_close(out.logits[:, -1], want[:, step], atol=1e-4, rtol=0)
            out = model(out.logits[:, -1:].argmax(dim=-1), past_key_values=out.past_key_values)


# PaliGemma is no model for conversations: whatever is given to it at once sees itself whole, as a prompt does.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "paligemma"])
def test_a_conversation_goes_on_with_the_cache(family: str) -> None:
    """More text, several tokens at once, after an answer: as if all had been one prompt."""
    model = model_of(family)
    one = tiny.single(family, model, 0)
    method = EveryOther(positions="kept")
    _, gone = kept_by(family, method, one)
    with sl.attach(model, method):
        first = generate(model, one)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
        whole = {**one, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        kinds = [name for name in ("token_type_ids", "mm_token_type_ids") if name in one]
        for name in kinds:
            whole[name] = torch.nn.functional.pad(one[name], (0, ids.shape[1] - one[name].shape[1]))
        # The last token of the answer has not been read yet.
        new = {"input_ids": ids[:, -4:], "attention_mask": whole["attention_mask"]}
        new |= {name: whole[name][:, -4:] for name in kinds if name == "token_type_ids"}
        again = generate(model, {**new, "past_key_values": first.past_key_values}, new=3)
    torch.testing.assert_close(logits(again), read_anew(family, whole, gone, 3), atol=1e-4, rtol=0)
