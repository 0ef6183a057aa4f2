"""PAI: boosted attention against one written out in loops, the guidance, and a head that was made to read pictures."""

from __future__ import annotations

import itertools
import math
from typing import Any

import families as tiny
import pytest
import torch
from slow_boost import SlowBoost, slow_answer
from specimens import forward_logits, generate, logits, row_counts, specimen
from torch import Tensor

import sightline as sl
from sightline.errors import InputError
from sightline.grounding.debiasing import Debiasing
from sightline.grounding.lacing import Lacing
from sightline.grounding.pai import PAI
from sightline.grounding.ritual import Ritual
from sightline.methods import describe, parse_methods


def on_pictures(batch: dict[str, Any], alpha: float) -> Tensor:
    """The factors of the columns."""
    return (batch["input_ids"] == tiny.IMAGE) * alpha


def test_the_defaults() -> None:
    method = PAI()
    assert (method.alpha, method.layers, method.gamma, method.boost_prefill) == (0.5, None, 1.1, "auto")
    assert list(method.layers_of(32)) == list(range(2, 32))
    assert list(method.layers_of(40)) == list(range(2, 40))
    assert list(method.layers_of(16)) == list(range(1, 16))
    assert list(method.layers_of(3)) == [0, 1, 2]
    assert list(PAI(layers=(4, 1, 4)).layers_of(32)) == [1, 4]
    text = "pai:alpha=0.2,layers=1;2,gamma=2.0,boost_prefill=always"
    assert parse_methods(text) == (PAI(alpha=0.2, layers=(1, 2), gamma=2.0, boost_prefill="always"),)
    assert describe(parse_methods(text)) == text


def test_what_leaves_the_model_as_it_is() -> None:
    assert PAI(alpha=0.0, gamma=1.0).is_identity
    assert PAI(layers=(), gamma=1.0).is_identity
    assert PAI().identity().is_identity
    assert not PAI(alpha=0.0).is_identity
    assert not PAI(gamma=1.0).is_identity
    # Guidance alone does not touch the attention, and goes with another method that does.
    assert PAI().claims() == {"the attention logits"}
    assert not PAI(alpha=0.0).claims()


@torch.no_grad()
@pytest.mark.parametrize(("alpha", "gamma", "layers", "prefill"), [(0.5, 1.0, None, "auto"), (1.5, 1.0, (1,), "never")])
def test_answers_are_those_of_a_stock_model_with_slow_attention(
    alpha: float, gamma: float, layers: tuple[int, ...] | None, prefill: Any
) -> None:
    check_against_slow_attention(PAI(alpha, layers, gamma, prefill), boost_prompt=prefill == "auto")


@torch.no_grad()
@pytest.mark.parametrize(("prefill", "boost_prompt"), [("auto", False), ("always", True)])
def test_guided_answers_are_those_of_two_stock_models(prefill: Any, boost_prompt: bool) -> None:
    check_against_slow_attention(PAI(gamma=2.0, boost_prefill=prefill), boost_prompt=boost_prompt)


def check_against_slow_attention(method: PAI, *, boost_prompt: bool) -> None:
    model = tiny.tiny_model("llava", seed=1)
    batch = tiny.inputs("llava", model, images_per_row=[1, 2, 1])
    assert (batch["attention_mask"] == 0).any()
    steps, layers = 3, method.layers_of(3)
    answers = []
    for use_cache in (True, False):
        boost = SlowBoost(on_pictures(batch, method.alpha), layers)
        tokens, expected = slow_answer(
            model, batch, boost, method.gamma, steps, boost_prompt=boost_prompt, use_cache=use_cache
        )
        with sl.attach(model, method):
            out = generate(model, batch, steps, use_cache=use_cache)
        assert out.sequences[:, -steps:].tolist() == tokens
        got = torch.stack(out.logits).log_softmax(dim=-1)
        torch.testing.assert_close(got, torch.stack(expected).log_softmax(dim=-1), atol=2e-5, rtol=1e-4)
        answers.append(got)
    torch.testing.assert_close(*answers, atol=2e-5, rtol=1e-4)
    stock = torch.stack(generate(model, batch, steps).logits).log_softmax(dim=-1)
    first = (answers[0][0] - stock[0]).clamp(min=-9.0).abs().max()
    assert first > 1e-2 if boost_prompt or method.gamma != 1 else first == 0
    assert (answers[0][1] - stock[1]).abs().max() > 1e-2


@torch.no_grad()
def test_the_guidance_adds_to_what_other_contrasts_make_of_the_logits() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    pai, ritual = PAI(gamma=1.5, boost_prefill="always"), Ritual(beta=0.0, transform="horizontal_flip")
    answers = []
    for methods in ((pai, ritual), (ritual, pai)):
        with sl.attach(model, *methods):
            answers.append(logits(generate(model, batch)))
    torch.testing.assert_close(*answers, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_branch_is_shared_and_only_there_for_guidance() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    for methods, expected in (
        ((PAI(gamma=1.0),), [3, 3]),
        ((PAI(),), [6, 6]),
        ((PAI(alpha=0.0), Debiasing()), [6, 6]),
        ((Debiasing(), PAI(), Ritual()), [9, 9]),
    ):
        with sl.attach(model, *methods), row_counts(model) as counts:
            generate(model, batch, 2)
        assert counts == expected


@torch.no_grad()
@pytest.mark.parametrize("other", [Ritual(beta=0.0, transform="horizontal_flip"), Debiasing()], ids=["ritual", "vdd"])
def test_the_rows_of_branches_are_not_boosted(other: Any) -> None:
    """Without the model's own logits in it, the answer is the branch's, whatever is done to the main rows."""
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    seen: list[list[Tensor]] = []
    combine = type(other).combine

    def listen(self: Any, values: Tensor, own: Tensor, branches: list[Tensor]) -> Tensor:
        seen[-1].append(branches[0])
        return combine(self, values, own, branches)

    forced = [[5, 9, 30]] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(other), "combine", listen)
        for methods in ((other,), (PAI(alpha=2.0, gamma=1.0), other)):
            seen.append([])
            with sl.attach(model, *methods):
                generate(model, batch, 3, prefix_allowed_tokens_fn=lambda row, ids: [forced[row][len(ids) % 3]])
    for alone, beside in zip(*seen, strict=True):
        torch.testing.assert_close(beside, alone, atol=1e-5, rtol=0)


def test_the_guidance_by_hand() -> None:
    """Probabilities .5 .3 .15 .05 with the picture and .25 each without: the last is at a tenth, and stays."""
    own, branch = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), torch.full((1, 4), 0.25).log()
    guided = PAI(gamma=2.0).combine(own, own + 3, [branch - 7]).exp()
    assert (guided / guided.sum())[0].tolist() == pytest.approx(
        [p / 0.365 for p in (0.25, 0.09, 0.0225, 0.0025)], rel=1e-5
    )
    own = torch.tensor([[0.5, 0.3, 0.16, 0.04]]).log()
    assert PAI().combine(own, own, [branch])[0].isneginf().tolist() == [False, False, False, True]


# --- Where the attention goes ---


def planted(image_logit: float) -> Any:
    """A tiny Llava in whose first layer head 0 gives visual keys the logit `image_logit` wherever they are, and all
    others 0; its other heads give 0 to all keys. In eager mode, so that it shows its weights."""
    model = tiny.tiny_model("llava", text_config=dict(rope_parameters=dict(rope_type="default", rope_theta=1e12)))
    decoder, width = model.model.language_model, 32
    attention = decoder.layers[0].self_attn
    with torch.no_grad():
        decoder.layers[0].input_layernorm.weight.fill_(1.0)
        decoder.embed_tokens.weight.zero_()[:, 1] = width**0.5  # text: unit norm along 1; pictures: along 0
        model.model.multi_modal_projector.linear_2.weight.zero_()
        model.model.multi_modal_projector.linear_2.bias.zero_()[0] = width**0.5
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
        # The fourth pair of coordinates turns by 1e-9 a position: not at all.
        attention.q_proj.weight[3, 1] = image_logit / attention.scaling / width**0.5
        attention.k_proj.weight[3, 0] = 1 / width**0.5
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
@pytest.mark.parametrize("image_logit", [-2.0, 1.0])
@pytest.mark.parametrize("alpha", [0.5, 1.5])
def test_a_head_that_reads_the_picture_reads_it_more(image_logit: float, alpha: float) -> None:
    model = planted(image_logit)
    batch = tiny.single("llava", model, 0)
    text = int((batch["input_ids"] != tiny.IMAGE).sum())
    visual = batch["input_ids"][0] == tiny.IMAGE

    def share(logit: float, others: int) -> float:
        return 16 * math.exp(logit) / (16 * math.exp(logit) + others)

    def shares(out: Any) -> list[Tensor]:
        return [step[0][0, :, -1, : len(visual)][:, visual].sum(dim=-1) for step in out.attentions]

    stock = shares(generate(model, batch, 3, output_attentions=True))
    with sl.attach(model, PAI(alpha=alpha, gamma=1.0)):
        boosted = shares(generate(model, batch, 3, output_attentions=True))
    higher = image_logit + alpha * abs(image_logit)
    for step in range(3):
        others = text + step
        assert float(stock[step][0]) == pytest.approx(share(image_logit, others), rel=1e-5)
        assert float(boosted[step][0]) == pytest.approx(share(higher, others), rel=1e-5)
        # A logit of 0 has no size to be raised by.
        assert boosted[step][1:].tolist() == pytest.approx([share(0, others)] * 3, rel=1e-5)


@torch.no_grad()
def test_other_keys_keep_their_relative_odds_and_other_queries_all_of_them() -> None:
    model = tiny.tiny_model("llava")
    model.set_attn_implementation("eager")
    batch = tiny.single("llava", model, 1)
    visual = batch["input_ids"][0] == tiny.IMAGE
    stock = model(**batch, output_attentions=True).attentions
    with sl.attach(model, PAI(layers=(1,), gamma=1.0)):
        boosted = model(**batch, output_attentions=True).attentions
    assert torch.equal(boosted[0], stock[0])
    assert torch.equal(boosted[1][:, :, :-1], stock[1][:, :, :-1])
    before, after = stock[1][0, :, -1, ~visual], boosted[1][0, :, -1, ~visual]
    torch.testing.assert_close(after / after.sum(-1, keepdim=True), before / before.sum(-1, keepdim=True))
    assert (after.sum(-1) < before.sum(-1)).all()


@torch.no_grad()
def test_the_attention_to_the_picture_grows_with_alpha() -> None:
    model = tiny.tiny_model("llava")
    model.set_attn_implementation("eager")
    batch = tiny.inputs("llava", model)
    visual = (batch["input_ids"] == tiny.IMAGE)[:, None]
    shares = []
    for alpha in (0.0, 0.1, 0.5, 1.0, 3.0, 10.0):
        with sl.attach(model, PAI(alpha=alpha, gamma=1.0)):
            attention = model(**batch, output_attentions=True).attentions[0][:, :, -1]
        shares.append((attention * visual).sum(dim=-1))
    for less, more in itertools.pairwise(shares):
        assert (more >= less).all()
        assert (more > less).any()


@torch.no_grad()
def test_keys_and_values_of_the_prompt_are_the_stock_models() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    stock = model(**batch, use_cache=True).past_key_values
    caches = {}
    for prefill in ("always", "never"):
        with sl.attach(model, PAI(gamma=1.0, boost_prefill=prefill)):
            caches[prefill] = model(**batch, use_cache=True).past_key_values
    for index, layer in enumerate(stock.layers):
        always, never = (caches[prefill].layers[index] for prefill in ("always", "never"))
        for name in ("keys", "values"):
            expected = getattr(layer, name)
            assert torch.equal(getattr(never, name), expected)
            torch.testing.assert_close(getattr(always, name)[:, :, :-1], expected[:, :, :-1])
            # The last position itself has read the picture with other weights in the layers before.
            last = (getattr(always, name)[:, :, -1] - expected[:, :, -1]).abs().max()
            assert last == 0 if index == 0 else last > 1e-3


@torch.no_grad()
def test_a_key_that_has_left_the_window_stays_hidden() -> None:
    """Without a cache it is there and masked, with one it is gone; a factor above 1 must not bring it back."""
    model = tiny.tiny_model("gemma3", text_config=dict(sliding_window=8))
    batch = tiny.inputs("gemma3", model)
    with sl.attach(model, PAI(alpha=2.0, gamma=1.0)):
        cached, anew = (generate(model, batch, 5, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, anew.sequences)
    torch.testing.assert_close(logits(cached), logits(anew), atol=1e-4, rtol=0)


# --- Errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha=-0.1), r"alpha of pai must lie in \[0, 10\], not -0.1"),
        (dict(alpha="much"), "alpha of pai must be a number"),
        (dict(gamma=0.5), r"gamma of pai must lie in \[1, 10\], not 0.5"),
        (dict(boost_prefill="allways"), "unknown boost_prefill of pai .*did you mean 'always'"),
        (dict(layers=(1, 0.5)), "layers of pai must be whole numbers, not 0.5"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PAI(**options)


def test_a_layer_that_the_decoder_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="pai is asked to steer layer 3, but the decoder has layers 0 to 2"):
        sl.attach(tiny.tiny_model("llava"), PAI(layers=(0, 3)))


def test_two_that_change_the_logits_do_not_compose() -> None:
    model = tiny.tiny_model("llava")
    lacing = Lacing(cfg_scale=1.0, mda=True)
    for first, second in itertools.permutations([PAI(), lacing]):
        message = f"{first.paper} and {second.paper} do not compose: both change the attention logits"
        with pytest.raises(InputError, match=message):
            sl.attach(model, first, second)
    batch = tiny.single("llava", model, 0)
    for others in ((PAI(alpha=0.0), lacing), (PAI(), specimen("lacing"))):  # guidance alone, on either side
        with sl.attach(model, *others):
            assert forward_logits(model, batch).isfinite().all()


# --- With gradients ---


def test_gradients_reach_the_pixels() -> None:
    """As a forward in the context is the model's own, it can be differentiated."""
    model = tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0)
    pixels = batch["pixel_values"]

    def score(values: Tensor) -> Tensor:
        return model(**{**batch, "pixel_values": values}).logits[0, -1, 5]

    leaf = pixels.clone().requires_grad_()
    with sl.attach(model, PAI(gamma=1.0)):
        score(leaf).backward()
        assert leaf.grad is not None
        step = 1e-3 * leaf.grad / leaf.grad.norm()
        with torch.no_grad():
            slope = float(score(pixels + step) - score(pixels - step)) / 2e-3
    assert slope == pytest.approx(float(leaf.grad.norm()), rel=0.02)
