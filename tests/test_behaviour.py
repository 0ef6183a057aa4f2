"""Every method of the catalogue on every family: it works in each way of generating, or is refused with the reason."""

from __future__ import annotations

import random
from typing import Any

import families as tiny
import pytest
import torch
from families import CLS_FAMILIES, FAMILIES, MROPE_FAMILIES
from specimens import (
    NAMES,
    NEW_TOKENS,
    ORDERED_PAIRS,
    REFUSED,
    WORKING,
    EveryOther,
    Nothing,
    composing,
    forward_logits,
    generate,
    has_picture,
    logits,
    model_of,
    refusal,
    refusal_on,
    specimen,
    tokens,
    traces,
)
from transformers import DynamicCache

import sightline as sl
from sightline.errors import InputError
from sightline.methods import methods

works = pytest.mark.parametrize(("name", "family"), WORKING)
IMAGES = pytest.mark.parametrize("images", [1, [2, 0, 1]], ids=["one each", "two, none, one"])


def test_the_suite_is_made_from_the_catalogue() -> None:
    assert set(NAMES) == {name for name, kind in methods().items() if kind.attaches}
    assert len(WORKING) + len(REFUSED) == len(NAMES) * len(FAMILIES)
    assert {name for name, _ in WORKING} == set(NAMES)
    for name in NAMES:
        assert not specimen(name).is_identity
        assert specimen(name).identity().is_identity


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_what_cannot_work_is_refused_and_the_model_left_alone(name: str, family: str) -> None:
    model = model_of(family)
    reason = refusal(name, family)
    before = traces(model)
    with pytest.raises(InputError, match=reason):
        sl.attach(model, specimen(name))
    with pytest.raises(InputError, match=reason):
        sl.attach(model, EveryOther() if methods()[name].changes == frozenset() else Nothing(), specimen(name))
    assert traces(model) == before


@works
def test_it_does_something(name: str, family: str) -> None:
    """Or else everything below would prove nothing."""
    model = model_of(family)
    batch = tiny.single(family, model, 0)
    stock = forward_logits(model, batch)
    with sl.attach(model, specimen(name)):
        assert (forward_logits(model, batch) - stock).abs().max() > 1e-2


# --- Identity ---


@works
def test_the_identity_setting_is_the_stock_model_bit_for_bit(name: str, family: str) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model)
    sampled: dict[str, Any] = dict(do_sample=True, temperature=1.5)

    def everything() -> list[torch.Tensor]:
        torch.manual_seed(7)
        return [
            torch.stack(generate(model, batch).logits),
            generate(model, batch, **sampled).sequences,
            model(**batch).logits,
        ]

    stock = everything()
    with sl.attach(model, specimen(name).identity()):
        attached = everything()
    for one, other in zip(stock, attached, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
@IMAGES
def test_the_engine_itself_changes_nothing(family: str, images: Any) -> None:
    """All hooks on, by a method that does nothing: still the stock model bit for bit."""
    model = model_of(family)
    batch = tiny.inputs(family, model, images_per_row=images)
    stock = [torch.stack(generate(model, batch).logits), model(**batch).logits]
    beams = tokens(model, batch, num_beams=3)
    with sl.attach(model, Nothing()):
        attached = [torch.stack(generate(model, batch).logits), model(**batch).logits]
        assert tokens(model, batch, num_beams=3) == beams
    for one, other in zip(stock, attached, strict=True):
        assert torch.equal(one, other)


# --- Batches ---


@works
@IMAGES
def test_a_row_of_a_padded_batch_is_answered_as_if_it_were_alone(name: str, family: str, images: Any) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model, images_per_row=images)
    assert (batch["attention_mask"] == 0).any()
    with sl.attach(model, specimen(name)):
        together = generate(model, batch)
        plain = forward_logits(model, batch)
    for row in range(3):
        one = tiny.single(family, model, row, images_per_row=images)
        # A row without a picture is answered as by the stock model.
        with sl.attach(model, *([specimen(name)] if has_picture(one) else [])):
            alone = generate(model, one)
            alone_plain = forward_logits(model, one)[0]
        assert torch.equal(alone.sequences[0, -NEW_TOKENS:], together.sequences[row, -NEW_TOKENS:])
        torch.testing.assert_close(logits(together)[row], logits(alone)[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(plain[row], alone_plain, atol=1e-4, rtol=0)


@works
def test_generate_begins_where_a_plain_forward_ends(name: str, family: str) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model, images_per_row=2)
    with sl.attach(model, specimen(name)):
        first = logits(generate(model, batch, new=1))[:, 0]
        torch.testing.assert_close(first, forward_logits(model, batch), atol=1e-4, rtol=0)
        torch.testing.assert_close(first, forward_logits(model, batch, use_cache=False), atol=1e-4, rtol=0)
        torch.testing.assert_close(first, forward_logits(model, batch, logits_to_keep=1), atol=1e-4, rtol=0)


@works
def test_a_plain_loop_with_a_cache_equals_generate(name: str, family: str) -> None:
    model = model_of(family)
    with sl.attach(model, specimen(name)):
        # The stock Qwen models cannot be called with a cache and a mask, so that nothing may be padded.
        padded = family not in MROPE_FAMILIES
        batch = tiny.inputs(family, model) if padded else tiny.single(family, model, 1)
        want = generate(model, batch)
        with torch.no_grad():
            out = model(**batch, use_cache=True)
            mask = batch["attention_mask"]
            for step in range(NEW_TOKENS):
                got = out.logits[:, -1].clamp(min=-99.0)
                torch.testing.assert_close(got, logits(want)[:, step], atol=1e-4, rtol=0)
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                further = dict(attention_mask=mask, past_key_values=out.past_key_values)
                if not padded:
                    further.pop("attention_mask")
                out = model(got.argmax(-1, keepdim=True), **further)


# --- Ways of generating ---


@works
@IMAGES
def test_without_a_cache_the_answer_is_the_same(name: str, family: str, images: Any) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model, images_per_row=images)
    with sl.attach(model, specimen(name)):
        cached, anew = generate(model, batch), generate(model, batch, use_cache=False)
    assert torch.equal(cached.sequences, anew.sequences)
    torch.testing.assert_close(logits(cached), logits(anew), atol=1e-4, rtol=0)


@works
def test_beams_with_a_cache_are_those_that_read_everything_anew(name: str, family: str) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    beams: dict[str, Any] = dict(num_beams=3, num_return_sequences=2, output_scores=True)
    with sl.attach(model, specimen(name)) as attachment:
        cached = generate(model, batch, new=5, **beams)
        assert len(attachment.visual_tokens) == 9
        anew = generate(model, batch, new=5, use_cache=False, **beams)
    assert cached.sequences.shape == (6, batch["input_ids"].shape[1] + 5)
    assert torch.equal(cached.sequences, anew.sequences)
    torch.testing.assert_close(cached.sequences_scores, anew.sequences_scores, atol=1e-4, rtol=0)


def test_beams_change_places_in_that_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above proves something only if beams are reordered, and those of a branch with them."""
    orders = []
    reorder = DynamicCache.reorder_cache
    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda self, beams: orders.append(beams) or reorder(self, beams))
    model = model_of("llava")
    with sl.attach(model, specimen("ritual")):
        generate(model, tiny.inputs("llava", model, images_per_row=[2, 0, 1]), new=5, num_beams=3)
    assert any(order.tolist() != sorted(order.tolist()) for order in orders)
    for order in orders:
        assert order.tolist() == [*order[:9].tolist(), *(order[:9] + 9).tolist()]


@works
def test_sampling_follows_the_seed_and_gives_as_many_answers_as_asked(name: str, family: str) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    options: dict[str, Any] = dict(do_sample=True, temperature=2.0, top_k=20, num_return_sequences=2)
    with sl.attach(model, specimen(name)):
        torch.manual_seed(3)
        first = generate(model, batch, **options)
        torch.manual_seed(3)
        again = generate(model, batch, **options)
        torch.manual_seed(3)
        anew = generate(model, batch, use_cache=False, **options)
    assert first.sequences.shape == (6, batch["input_ids"].shape[1] + NEW_TOKENS)
    assert torch.equal(first.sequences, again.sequences)
    assert torch.equal(first.sequences, anew.sequences)
    assert logits(first).isfinite().all()


@works
def test_prompts_without_pictures_pass_as_through_the_stock_model_or_are_refused(name: str, family: str) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model, images_per_row=0)
    if specimen(name).needs_picture:
        with sl.attach(model, specimen(name)), pytest.raises(InputError, match="no prompt of this batch has one"):
            generate(model, batch)
        return
    stock = [torch.stack(generate(model, batch).logits), model(**batch).logits]
    beams = tokens(model, batch, num_beams=3)
    with sl.attach(model, specimen(name)):
        generate(model, tiny.inputs(family, model))  # what was seen before must not matter
        attached = [torch.stack(generate(model, batch).logits), model(**batch).logits]
        assert tokens(model, batch, num_beams=3) == beams
    for one, other in zip(stock, attached, strict=True):
        assert torch.equal(one, other)


@works
def test_hidden_states_and_attentions_are_those_of_the_rows_that_were_asked_about(name: str, family: str) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model)
    with sl.attach(model, specimen(name)):
        out = generate(model, batch, output_hidden_states=True)
    assert {len(layer) for step in out.hidden_states for layer in step} == {3}
    model.set_attn_implementation("eager")
    try:
        with sl.attach(model, specimen(name)):
            out = generate(model, batch, output_attentions=True)
    finally:
        model.set_attn_implementation("sdpa")
    assert {len(layer) for step in out.attentions for layer in step} == {3}


# --- Two at once ---


def family_of(first: str, second: str) -> str:
    """By turns one of the families with a [CLS] token and one of the others, of those on which both methods work."""
    turn = ORDERED_PAIRS.index((first, second))
    others = [family for family in FAMILIES if family not in CLS_FAMILIES]
    wanted, rest = (others, CLS_FAMILIES) if turn % 2 else (CLS_FAMILIES, others)
    both = [family for family in (*wanted, *rest) if refusal(first, family) is None and refusal(second, family) is None]
    return both[turn // 2 % len(both)] if both else wanted[turn // 2 % len(wanted)]


@pytest.mark.parametrize(("first", "second", "family"), [(*pair, family_of(*pair)) for pair in ORDERED_PAIRS])
def test_two_methods_at_once_work_or_are_refused(first: str, second: str, family: str) -> None:
    model = model_of(family)
    pair = (specimen(first), specimen(second))
    reason = refusal(first, family) or refusal(second, family)
    if pair[0].claims() & pair[1].claims():  # told before what either lacks
        reason = "do not compose: both change"
    if reason is not None:
        with pytest.raises(InputError, match=reason):
            sl.attach(model, *pair)
        return
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    with sl.attach(model, *pair):
        cached, anew = generate(model, batch, new=3), generate(model, batch, new=3, use_cache=False)
        beams = tokens(model, batch, new=3, num_beams=2)
    row = random.Random(f"{first}{second}{family}").randrange(3)
    single = tiny.single(family, model, row, images_per_row=[2, 0, 1])
    with sl.attach(model, *(pair if has_picture(single) else ())):
        alone = generate(model, single, new=3)
    assert torch.equal(cached.sequences, anew.sequences)
    torch.testing.assert_close(logits(cached)[row], logits(alone)[0], atol=1e-4, rtol=0)
    assert [len(answer) for answer in beams] == [3, 3, 3]
    for one in pair:
        with sl.attach(model, one):
            by_itself = logits(generate(model, batch, new=1))[:, 0]
        # Both act: with one of them alone the first logits are others.
        assert (logits(cached)[0, 0] - by_itself[0]).abs().max() > 1e-3


def test_all_methods_at_once() -> None:
    model = model_of("llava")
    batch = tiny.inputs("llava", model, images_per_row=[2, 0, 1])
    everything = composing(NAMES)
    with sl.attach(model, *everything):
        assert tokens(model, batch) == tokens(model, batch, use_cache=False)
        assert tokens(model, batch, num_beams=3) == tokens(model, batch, num_beams=3, use_cache=False)


def test_a_token_that_one_method_rules_out_stays_out_in_the_next() -> None:
    model = model_of("llava")
    batch = tiny.single("llava", model, 0)
    with sl.attach(model, sl.Ritual(beta=0.5)), torch.no_grad():
        out = model(**batch).logits[0, -1].isneginf()
    with sl.attach(model, sl.Ritual(beta=0.5), sl.Vista(strength=0.0, gamma=1.0)), torch.no_grad():
        both = model(**batch).logits[0, -1]
    assert out.any()
    assert torch.equal(both.isneginf(), out)
    assert not both.isnan().any()


# --- Other towers, other decoders, another precision ---

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava with SigLIP": (
        "llava",
        dict(
            vision_config=dict(model_type="siglip_vision_model", vision_use_head=False),
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        ),
    ),
    "llava with Qwen2": ("llava", dict(text_config=dict(model_type="qwen2", head_dim=8))),
    "llava_next with a short window": ("llava_next", dict(text_config=dict(sliding_window=8))),
    "paligemma with Gemma 2": (
        "paligemma",
        dict(
            text_config=dict(
                model_type="gemma2", query_pre_attn_scalar=8, sliding_window=512, final_logit_softcapping=3.0
            )
        ),
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_members_of_the_families(name: str, variant: str) -> None:
    family, options = VARIANTS[variant]
    model = tiny.tiny_model(family, **options)
    method = specimen(name)
    reason = refusal_on(name, sl.Anatomy.of(model))
    if reason is not None:
        with pytest.raises(InputError, match=reason):
            sl.attach(model, method)
        return
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    with sl.attach(model, method):
        cached, anew = generate(model, batch), generate(model, batch, use_cache=False)
        alone = generate(model, tiny.single(family, model, 2, images_per_row=[2, 0, 1]))
        assert tokens(model, batch, num_beams=3) == tokens(model, batch, num_beams=3, use_cache=False)
    assert torch.equal(cached.sequences, anew.sequences)
    torch.testing.assert_close(logits(cached)[2], logits(alone)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_bfloat16(name: str, family: str) -> None:
    if refusal(name, family):
        return
    model = tiny.tiny_model(family).bfloat16()
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with sl.attach(model, specimen(name)):
        out = generate(model, batch)
    assert out.logits[0].dtype == torch.float32  # `generate` hands out float32
    assert not torch.stack(out.logits).isnan().any()
